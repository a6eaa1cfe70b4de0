// Kernels that are wrong on purpose (DESIGN 3, law 11): a good kernel of the registry whose inputs or
// outputs are damaged around its run. Shared by the lists of damages, tests/broken_*.h.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bench/harness/op.h"

namespace v3b::bench::broken {

using Tensors = std::vector<HostTensor*>;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

inline HostTensor& tensor(const Tensors& all, const std::string& name) {
  for (HostTensor* t : all)
    if (t->name() == name) return *t;
  throw Error(ExitCode::usage, "no tensor '" + name + "'", "test");
}
inline bool is_float(const HostTensor& t) { return t.dtype() <= spec::DType::f8e4m3; }

using Change = std::function<void(const Tensors&)>;
struct Damage {
  std::string name;
  Change before;  // inputs, as the broken kernel understands them; put back after the run
  Change after;   // outputs, or whatever else it ruins
  bool skip_run = false;
  bool may_change_nothing = false;  // then it is skipped
};

struct Victim {
  std::string op, text;
  std::vector<Damage> own;
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
    auto kept = std::make_shared<Bytes>(bytes_of(data.tensors));
    if (damage_.before) {
      damage_.before(data.tensors);
      *changed_ |= bytes_of(data.tensors) != *kept;
    }
    Runner r = good_.prepare(how_, data);
    Runner broken = r;
    const Tensors tensors = data.tensors;
    const Damage damage = damage_;
    broken.run = [r, tensors, kept, damage, changed = changed_] {
      if (!damage.skip_run) r.run();
      for (size_t i = 0; i < tensors.size(); ++i)
        if (tensors[i]->role() == Role::input)
          std::memcpy(tensors[i]->data(), (*kept)[i].data(), (*kept)[i].size());
      if (!damage.after) return;
      const Bytes right = bytes_of(tensors);
      damage.after(tensors);
      *changed |= bytes_of(tensors) != right;
      for (const HostTensor* t : tensors) *changed |= !t->canaries_intact();
    };
    return broken;
  }
  // After a check: did the damage change anything at all?
  bool changed() const { return *changed_ || damage_.skip_run; }

 private:
  using Bytes = std::vector<std::vector<std::byte>>;
  static Bytes bytes_of(const Tensors& tensors) {
    Bytes all;
    for (const HostTensor* t : tensors) {
      const auto* p = static_cast<const std::byte*>(t->data());
      all.emplace_back(p, p + t->bytes());
    }
    return all;
  }
  const OpBase& good_;
  std::string how_;
  Damage damage_;
  std::shared_ptr<bool> changed_ = std::make_shared<bool>(false);
};

// ---- changes to build damages from
inline void scale_by(HostTensor& t, double f) {
  for (int64_t i = 0; i < t.numel(); ++i) t.set(i, f * t.get(i));
}
inline void swap_values(HostTensor& t, double a, double b) {
  for (int64_t i = 0; i < t.numel(); ++i) {
    const double v = t.get(i);
    if (v == a || v == b) t.set(i, v == a ? b : a);
  }
}
inline void swap_at(HostTensor& t, int64_t a, int64_t b, int64_t n = 1) {
  for (int64_t i = 0; i < n; ++i) {
    const double v = t.get(a + i);
    t.set(a + i, t.get(b + i));
    t.set(b + i, v);
  }
}
// Element i becomes element i + by, around the end; with by = a row's width, rows move up.
inline void rotate(HostTensor& t, int64_t by = 1) {
  const auto old = t.to_doubles();
  for (int64_t i = 0; i < t.numel(); ++i) t.set(i, old[static_cast<size_t>((i + by) % t.numel())]);
}
inline void transpose_square(HostTensor& t) {
  const int64_t n = t.shape()[0];
  if (n != t.shape()[1]) throw Error(ExitCode::usage, "not square", "test");
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i + 1; j < n; ++j) swap_at(t, i * n + j, j * n + i);
}
inline int64_t width(const HostTensor& t) { return t.shape().empty() ? 1 : t.shape().back(); }

inline Change on(const char* name, std::function<void(HostTensor&)> f) {
  return [name = std::string(name), f = std::move(f)](const Tensors& t) { f(tensor(t, name)); };
}
inline Change add_at(const char* name, int64_t i, double v) {
  return on(name, [=](HostTensor& t) { t.set(i, t.get(i) + v); });
}
inline Change rotated(const char* name) {  // by one row
  return on(name, [](HostTensor& t) { rotate(t, t.shape().size() > 1 ? width(t) : 1); });
}
inline Change scaled(const char* name, double f) {
  return on(name, [=](HostTensor& t) { scale_by(t, f); });
}

// An element of ordinary size: the first from the middle on that is at least the root mean square (of E4M3: that has room
// for half of itself more).
inline int64_t ordinary(const HostTensor& t) {
  const auto v = t.to_doubles();
  double sum2 = 0;
  int64_t n = 0;
  for (double x : v)
    if (std::isfinite(x)) sum2 += x * x, ++n;
  const double rms = std::sqrt(sum2 / static_cast<double>(std::max<int64_t>(n, 1)));
  const double most =
      t.dtype() == spec::DType::f8e4m3 ? 256 : std::numeric_limits<double>::infinity();
  for (size_t i = v.size() / 2; i < v.size() + v.size() / 2; ++i)
    if (std::fabs(v[i % v.size()]) >= rms && !(std::fabs(v[i % v.size()]) > most))
      return static_cast<int64_t>(i % v.size());
  return 0;
}

// ---- damages that fit every op, for each of its outputs
inline std::vector<Damage> float_damages(const std::string& n) {
  const char* name = n.c_str();
  return {
      {.name = "one NaN in " + n,
       .after = on(name, [](HostTensor& y) { y.set(y.numel() / 2, kNan); })},
      {.name = "negatives x20 in " + n,
       .after = on(name,
                   [](HostTensor& y) {
                     for (int64_t i = 0; i < y.numel(); ++i)
                       if (y.get(i) < 0) y.set(i, 20 * y.get(i));
                   }),
       .may_change_nothing = true},
      {.name = "one element x1.5 in " + n,
       .after = on(name,
                   [](HostTensor& y) {
                     const int64_t i = ordinary(y);
                     y.set(i, 1.5 * y.get(i));
                   })},
      {.name = "one sign wrong in " + n,
       .after = on(name,
                   [](HostTensor& y) {
                     const int64_t i = ordinary(y);
                     y.set(i, -y.get(i));
                   })},
      {.name = "last row missing in " + n,
       .after = on(name,
                   [](HostTensor& y) {
                     for (int64_t i = y.numel() - width(y); i < y.numel(); ++i) y.set(i, kNan);
                   })},
      {.name = "tail of the last row zero in " + n,
       .after = on(name,
                   [](HostTensor& y) {
                     for (int64_t i = y.numel() - (width(y) + 1) / 2; i < y.numel(); ++i)
                       y.set(i, 0);
                   }),
       .may_change_nothing = true},
  };
}
inline std::vector<Damage> integer_damages(const std::string& n) {
  const char* name = n.c_str();
  return {
      {.name = "one element off by one in " + n,
       .after = on(name,
                   [](HostTensor& y) {
                     const int64_t i = y.numel() / 2;
                     y.set(i, y.get(i) == 0 ? 1 : y.get(i) - 1);
                   })},
      {.name = "last element missing in " + n,
       .after = on(name,
                   [](HostTensor& y) {
                     std::memset(
                         static_cast<char*>(y.data()) + y.bytes() - spec::dtype_bytes(y.dtype()),
                         0x5a, static_cast<size_t>(spec::dtype_bytes(y.dtype())));
                   })},
  };
}
inline std::vector<Damage> generic_damages(const Tensors& tensors) {
  std::vector<Damage> all{{.name = "writes nothing", .skip_run = true},
                          {.name = "modifies its input", .after = [](const Tensors& t) {
                             for (HostTensor* x : t)
                               if (x->role() == Role::input && x->bytes() > 0) {
                                 static_cast<uint8_t*>(x->data())[x->bytes() - 1] ^= 1;
                                 return;
                               }
                           }}};
  for (const HostTensor* t : tensors) {
    if (t->role() == Role::input || t->numel() == 0) continue;
    const std::string n = t->name();
    auto more = is_float(*t) ? float_damages(n) : integer_damages(n);
    if (t->role() == Role::output)
      more.push_back(
          {.name = n + " not written", .after = on(n.c_str(), [](HostTensor& y) { y.poison(); })});
    more.push_back({.name = "writes past " + n, .after = on(n.c_str(), [](HostTensor& y) {
                                                  static_cast<uint8_t*>(y.data())[y.bytes()] ^=
                                                      0x40;
                                                })});
    more.push_back({.name = "writes before " + n, .after = on(n.c_str(), [](HostTensor& y) {
                                                    static_cast<uint8_t*>(y.data())[-1] ^= 0x40;
                                                  })});
    all.insert(all.end(), more.begin(), more.end());
  }
  return all;
}

}  // namespace v3b::bench::broken
