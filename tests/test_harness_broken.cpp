// Law 11: kernels that are wrong on purpose must all be caught, and the right ones must pass. A
// broken kernel is a good one of the registry whose inputs or outputs are damaged around its run.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "bench/harness/check.h"
#include "bench/harness/jobs.h"
#include "bench/ops/registry.h"

namespace v3b::bench {
namespace {

using Tensors = std::vector<HostTensor*>;

HostTensor& tensor(const Tensors& all, const std::string& name) {
  for (HostTensor* t : all)
    if (t->name() == name) return *t;
  throw Error(ExitCode::usage, "no tensor '" + name + "'", "test");
}
bool is_float(const HostTensor& t) { return t.dtype() <= spec::DType::f8e4m3; }

struct Damage {
  std::string name;
  std::function<void(const Tensors&)>
      before;  // inputs, as the broken kernel understands them; put back after the run
  std::function<void(const Tensors&)> after;  // outputs, or whatever else it ruins
  bool skip_run = false;
};

// The good op with one more implementation, "broken": the kernel `how` with the damage.
class BrokenOp final : public OpBase {
 public:
  BrokenOp(const OpBase& good, std::string how, Damage damage)
      : good_(good), how_(std::move(how)), damage_(std::move(damage)) {}
  std::string name() const override { return good_.name(); }
  std::vector<CaseInfo> cases() const override { return good_.cases(); }
  CaseInfo parse_case(const std::string& text) const override { return good_.parse_case(text); }
  std::vector<std::string> impls() const override { return {"broken"}; }
  bool is_baseline(const std::string&) const override { return false; }
  Support support(const std::string&, const std::string& text) const override {
    return good_.support(how_, text);
  }
  DataHandle make(const std::string& text, Fill fill, uint64_t seed) const override {
    return good_.make(text, fill, seed);
  }
  Expected reference(const DataHandle& data) const override { return good_.reference(data); }
  Cost cost(const std::string& text) const override { return good_.cost(text); }
  Tolerance tolerance(const std::string& text, Fill fill,
                      const std::string& output) const override {
    return good_.tolerance(text, fill, output);
  }
  bool has_exact_fill(const std::string& text) const override { return good_.has_exact_fill(text); }
  Runner prepare(const std::string&, DataHandle& data) const override {
    auto kept = std::make_shared<std::vector<std::vector<std::byte>>>();
    for (const HostTensor* t : data.tensors) {
      const auto* p = static_cast<const std::byte*>(t->data());
      kept->emplace_back(p, p + t->bytes());
    }
    if (damage_.before) damage_.before(data.tensors);
    Runner r = good_.prepare(how_, data);
    Runner broken = r;
    const Tensors tensors = data.tensors;
    const Damage damage = damage_;
    broken.run = [r, tensors, kept, damage] {
      if (!damage.skip_run) r.run();
      for (size_t i = 0; i < tensors.size(); ++i)
        if (tensors[i]->role() == Role::input)
          std::memcpy(tensors[i]->data(), (*kept)[i].data(), (*kept)[i].size());
      if (damage.after) damage.after(tensors);
    };
    return broken;
  }

 private:
  const OpBase& good_;
  std::string how_;
  Damage damage_;
};

// ---- damages that fit every op
HostTensor& float_output(const Tensors& all) {
  for (HostTensor* t : all)
    if (t->role() == Role::output && is_float(*t)) return *t;
  throw Error(ExitCode::usage, "no float output", "test");
}
// An element of ordinary size: the first that is at least the root mean square (in absolute value).
int64_t ordinary(const HostTensor& t) {
  const auto v = t.to_doubles();
  double sum2 = 0;
  int64_t n = 0;
  for (double x : v)
    if (std::isfinite(x)) sum2 += x * x, ++n;
  const double rms = std::sqrt(sum2 / static_cast<double>(std::max<int64_t>(n, 1)));
  for (size_t i = v.size() / 2; i < v.size() + v.size() / 2; ++i)
    if (std::fabs(v[i % v.size()]) >= rms) return static_cast<int64_t>(i % v.size());
  return 0;
}

std::vector<Damage> generic_damages() {
  return {
      {.name = "writes nothing", .skip_run = true},
      {.name = "one NaN",
       .after =
           [](const Tensors& t) {
             HostTensor& y = float_output(t);
             y.set(y.numel() / 2, std::numeric_limits<double>::quiet_NaN());
           }},
      {.name = "negatives x20",
       .after =
           [](const Tensors& t) {
             HostTensor& y = float_output(t);
             for (int64_t i = 0; i < y.numel(); ++i)
               if (y.get(i) < 0) y.set(i, 20 * y.get(i));
           }},
      {.name = "one element x1.5",
       .after =
           [](const Tensors& t) {
             HostTensor& y = float_output(t);
             const int64_t i = ordinary(y);
             y.set(i, 1.5 * y.get(i));
           }},
      {.name = "last element missing",
       .after =
           [](const Tensors& t) {
             HostTensor& y = float_output(t);
             y.set(y.numel() - 1, std::numeric_limits<double>::quiet_NaN());
           }},
      {.name = "writes past its output",
       .after =
           [](const Tensors& t) {
             HostTensor& y = float_output(t);
             static_cast<uint8_t*>(y.data())[y.bytes()] ^= 0x40;
           }},
      {.name = "writes before its output",
       .after =
           [](const Tensors& t) {
             HostTensor& y = float_output(t);
             static_cast<uint8_t*>(y.data())[-1] ^= 0x40;
           }},
      {.name = "modifies its input",
       .after =
           [](const Tensors& t) {
             for (HostTensor* x : t)
               if (x->role() == Role::input && x->bytes() > 0) {
                 static_cast<uint8_t*>(x->data())[x->bytes() - 1] ^= 1;
                 return;
               }
           }},
  };
}

void transpose_square(HostTensor& t) {
  const int64_t n = t.shape()[0];
  ASSERT_EQ(n, t.shape()[1]);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i + 1; j < n; ++j) {
      const double a = t.get(i * n + j), b = t.get(j * n + i);
      ASSERT_NE(a, b) << "the damage would change nothing";
      t.set(i * n + j, b);
      t.set(j * n + i, a);
    }
}
void swap_values(HostTensor& t, double a, double b) {
  for (int64_t i = 0; i < t.numel(); ++i) {
    const double v = t.get(i);
    if (v == a || v == b) t.set(i, v == a ? b : a);
  }
}
void scale_by(HostTensor& t, double f) {
  for (int64_t i = 0; i < t.numel(); ++i) t.set(i, f * t.get(i));
}

struct Victim {
  const char *op, *text;
  std::vector<Damage> own;
  bool negatives = true;  // the output has negative values
};

std::vector<Victim> victims() {
  std::vector<Victim> v;
  v.push_back({"rmsnorm",
               "T=5,d=130,residual=1,dtype=bf16",
               {{.name = "weights off by one",
                 .before =
                     [](const Tensors& t) {
                       HostTensor& w = tensor(t, "w");
                       const auto old = w.to_doubles();
                       for (int64_t i = 0; i < w.numel(); ++i)
                         w.set(i, old[static_cast<size_t>((i + 1) % w.numel())]);
                     }},
                {.name = "residual not stored", .after = [](const Tensors& t) {
                   std::memcpy(tensor(t, "r").data(), tensor(t, "r_in").data(),
                               static_cast<size_t>(tensor(t, "r").bytes()));
                 }}}});
  v.push_back({"rope",
               "T=7,n_h=3,d_r=64,dtype=bf16",
               {{.name = "RoPE off by one",
                 .before =
                     [](const Tensors& t) {
                       HostTensor& p = tensor(t, "positions");
                       const auto old = p.to_doubles();
                       for (int64_t i = 0; i < p.numel(); ++i)
                         p.set(i, old[static_cast<size_t>((i + 1) % p.numel())]);
                     }},
                {.name = "rotates the other way",
                 .before = [](const Tensors& t) { scale_by(tensor(t, "sin"), -1); }}}});
  v.push_back({"swiglu", "T=5,m=129,dtype=bf16", {}});
  v.push_back({"softmax", "T=5,n=37,dtype=f32", {}, false});
  v.push_back({"gemm", "m=5,n=48,k=64", {{.name = "last k dropped", .before = [](const Tensors& t) {
                                            HostTensor& b = tensor(t, "b");  // [n, k]
                                            const int64_t k = b.shape()[1];
                                            for (int64_t r = 0; r < b.shape()[0]; ++r)
                                              b.set(r * k + k - 1, 0);
                                          }}}});
  v.push_back({"fp8_gemm",
               "m=5,n=256,k=256",
               {{.name = "scale transposed",
                 .before = [](const Tensors& t) { transpose_square(tensor(t, "sb")); }},
                {.name = "activation scale of the neighbour", .before = [](const Tensors& t) {
                   HostTensor& s = tensor(t, "sa");
                   const double a = s.get(0);
                   s.set(0, s.get(1));
                   s.set(1, a);
                 }}}});
  v.push_back({"fp8_quant",
               "rows=256,cols=256,weight=1",
               {{.name = "scale transposed",
                 .after = [](const Tensors& t) { transpose_square(tensor(t, "scales")); }},
                {.name = "one code off by one", .after = [](const Tensors& t) {
                   HostTensor& c = tensor(t, "codes");
                   c.as<uint8_t>()[ordinary(c)] ^= 1;
                 }}}});
  v.push_back({"router",
               "T=33,E=16,K=4,G=4,M=2",
               {{.name = "two experts swapped",
                 .after = [](const Tensors& t) { swap_values(tensor(t, "idx"), 3, 7); }},
                {.name = "bias forgotten",
                 .before = [](const Tensors& t) { scale_by(tensor(t, "bias"), 0); }},
                {.name = "weights of another order",
                 .after =
                     [](const Tensors& t) {
                       HostTensor& w = tensor(t, "weight");
                       const double a = w.get(0);
                       w.set(0, w.get(1));
                       w.set(1, a);
                     }}},
               false});
  v.push_back({"moe_experts",
               "T=9,d=128,m=64,E=8,K=2",
               {{.name = "two experts swapped",
                 .before =
                     [](const Tensors& t) {
                       HostTensor& idx = tensor(t, "idx");
                       double other = idx.get(0);
                       for (int64_t i = 0; i < idx.numel() && other == idx.get(0); ++i)
                         other = idx.get(i);
                       swap_values(idx, idx.get(0), other);
                     }},
                {.name = "a token's routing weight ignored", .before = [](const Tensors& t) {
                   HostTensor& w = tensor(t, "weight");
                   w.set(0, 2 * w.get(0));
                 }}}});
  v.push_back(
      {"mla_decode",
       "B=2,s=70,s_q=1,n_h=4,d_c=512,d_r=64",
       {{.name = "mscale forgotten",  // V3: softmax scale lacks (0.1 ln 40 + 1)^2
         .before =
             [](const Tensors& t) { scale_by(tensor(t, "q"), 1 / (1.3688879454 * 1.3688879454)); }},
        {.name = "reads a NaN row past the length",
         .before =
             [](const Tensors& t) {
               HostTensor& n = tensor(t, "seqlens");
               n.set(0, n.get(0) + 1);
             }},
        {.name = "one row too few", .before = [](const Tensors& t) {
           HostTensor& n = tensor(t, "seqlens");
           n.set(0, n.get(0) - 1);
         }}}});
  return v;
}

class Broken : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { ops_ = new Ops(all_ops()); }
  static void TearDownTestSuite() {
    delete ops_;
    ops_ = nullptr;
  }
  static Ops* ops_;
  const OpBase* find(const std::string& name) {
    for (const auto& op : *ops_)
      if (op->name() == name) return op.get();
    return nullptr;
  }
};
Ops* Broken::ops_ = nullptr;

TEST_F(Broken, EveryOneIsCaughtAndTheRightOnesPass) {
  int caught = 0;
  for (const Victim& victim : victims()) {
    const OpBase* op = find(victim.op);
    ASSERT_NE(op, nullptr) << victim.op;
    const CaseInfo info = op->parse_case(victim.text);
    for (const std::string& how : op->impls()) {
      if (op->support(how, info.text).state != Support::State::yes) continue;
      const CheckResult right = CaseChecker(*op, info, 1).check(how);
      EXPECT_EQ(right.status, "passed")
          << impl_name(*op, how) << "/" << info.text << ": " << right.reason;
    }
    const std::string how = op->impls().front();
    std::vector<Damage> damages = generic_damages();
    damages.insert(damages.end(), victim.own.begin(), victim.own.end());
    for (const Damage& damage : damages) {
      if (damage.name == "negatives x20" && !victim.negatives) continue;
      const BrokenOp broken(*op, how, damage);
      CaseChecker checker(broken, info, 1);
      const CheckResult r = checker.check("broken");
      EXPECT_EQ(r.status, "failed")
          << impl_name(*op, how) << ", " << damage.name << ": " << r.reason;
      EXPECT_FALSE(r.reason.empty());
      caught += r.status == "failed";
    }
  }
  RecordProperty("caught", caught);
  EXPECT_GE(caught, 80);
}

TEST_F(Broken, ADamagedInputDoesNotReachTheReference) {
  // After a kernel that ruins its input, the next implementation is judged by a clean reference.
  const OpBase* op = find("rmsnorm");
  ASSERT_NE(op, nullptr);
  const CaseInfo info = op->parse_case("T=5,d=130,dtype=bf16");
  const Damage ruin{.name = "zeroes its input",
                    .after = [](const Tensors& t) { scale_by(tensor(t, "x"), 0); }};
  const BrokenOp broken(*op, op->impls().front(), ruin);
  CaseChecker checker(broken, info, 1);
  const CheckResult r = checker.check("broken");
  EXPECT_EQ(r.status, "failed");
  EXPECT_NE(r.reason.find("changed its input 'x'"), std::string::npos) << r.reason;
  EXPECT_FALSE(checker.has_expected());
}

TEST_F(Broken, TheNoDamageWrapperPasses) {
  const OpBase* op = find("rmsnorm");
  ASSERT_NE(op, nullptr);
  const BrokenOp whole(*op, op->impls().front(), {.name = "none"});
  EXPECT_EQ(CaseChecker(whole, op->parse_case("T=5,d=130,residual=1"), 1).check("broken").status,
            "passed");
}

}  // namespace
}  // namespace v3b::bench
