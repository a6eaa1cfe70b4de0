// Batched speculative acceptance: everything the suite knows about this op.
#include "kernels/mtp/mtp_accept.h"

#include <cmath>
#include <vector>

#include "bench/harness/cuda_mirror.h"
#include "bench/harness/op.h"
#include "bench/ops/registry.h"
#include "kernels/mtp/mtp_cuda.h"
#include "model/rng.h"
#include "reference/speculative.h"

namespace v3b::bench {
namespace {

struct MtpAccept {
  static constexpr const char* name = "mtp_accept";
  using Shape = spec::MtpAcceptShape;
  struct Data {
    Shape shape;
    HostTensor p, q, draft, uniform, accepted, tokens_out;
    std::vector<HostTensor*> tensors() {
      return {&p, &q, &draft, &uniform, &accepted, &tokens_out};
    }
    spec::MtpAcceptArgs args(HostTensor& count, HostTensor& tokens) const {
      return {shape.B,
              shape.gamma,
              shape.V,
              shape.greedy,
              p.as<float>(),
              q.as<float>(),
              draft.as<int32_t>(),
              uniform.as<double>(),
              count.as<int32_t>(),
              tokens.as<int32_t>()};
    }
  };

  static void validate(const Shape& s) {
    if (s.dtype != spec::DType::f32 || s.gamma < 1 || s.V < 2)
      throw Error(ExitCode::usage, "bad shape", "--case of mtp_accept",
                  "dtype=f32, gamma >= 1, V >= 2");
  }
  // p is q reweighted by up to e^+-1, so that some drafts are accepted and some are not; drafts
  // come from q. Greedy: every second draft is the argmax of p.
  static std::unique_ptr<Data> make(const Shape& s, Fill, uint64_t seed) {
    auto d = std::make_unique<Data>();
    d->shape = s;
    const int64_t rows = s.gamma + 1;
    d->p = HostTensor("p", Role::input, spec::DType::f32, {s.B, rows, s.V});
    d->q = HostTensor("q", Role::input, spec::DType::f32, {s.B, s.gamma, s.V});
    d->draft = HostTensor("draft", Role::input, spec::DType::i32, {s.B, s.gamma});
    d->uniform = HostTensor("uniform", Role::input, spec::DType::f64, {s.B, rows});
    d->accepted = HostTensor("accepted", Role::output, spec::DType::i32, {s.B});
    d->tokens_out = HostTensor("tokens", Role::output, spec::DType::i32, {s.B, rows});
    std::vector<double> q(size_t(s.V)), p(size_t(s.V));
    for (int64_t b = 0; b < s.B; ++b) {
      for (int64_t k = 0; k < rows; ++k) {
        const uint64_t at = uint64_t(b * rows + k) * uint64_t(s.V);
        double qs = 0, ps = 0;
        for (int64_t i = 0; i < s.V; ++i) {
          const double u = model::rng_uniform({seed, 1}, at + uint64_t(i));
          qs += q[size_t(i)] = std::exp(-12 * u);
          ps += p[size_t(i)] =
              q[size_t(i)] * std::exp(2 * model::rng_uniform({seed, 2}, at + uint64_t(i)) - 1);
        }
        for (int64_t i = 0; i < s.V; ++i) {
          q[size_t(i)] /= qs;
          d->p.set((b * rows + k) * s.V + i, p[size_t(i)] / ps);
          if (k < s.gamma) d->q.set((b * s.gamma + k) * s.V + i, q[size_t(i)]);
        }
        d->uniform.set(b * rows + k, model::rng_uniform({seed, 3}, uint64_t(b * rows + k)));
        if (k == s.gamma) continue;
        const bool best = s.greedy && (b + k) % 2 == 0;
        const float* row = d->p.as<float>() + (b * rows + k) * s.V;
        d->draft.set(b * s.gamma + k,
                     best ? ref::argmax(std::span<const float>(row, size_t(s.V)))
                          : ref::sample(q, model::rng_uniform({seed, 4}, uint64_t(b * rows + k))));
      }
    }
    return d;
  }
  static Expected reference(const Data& d) {
    HostTensor count("accepted", Role::output, spec::DType::i32, {d.shape.B});
    HostTensor tokens("tokens", Role::output, spec::DType::i32, {d.shape.B, d.shape.gamma + 1});
    ref::mtp_accept(d.args(count, tokens));
    Expected e;
    e.tensors.push_back({.name = "accepted", .values = count.to_doubles()});
    e.tensors.push_back({.name = "tokens", .values = tokens.to_doubles()});
    return e;
  }
  // Greedy reads rows of p until the first mismatch; sampled reads one p row, and its q row when it
  // is rejected. Least: one row a sequence.
  static Cost cost(const Shape& s) {
    const double n = double(s.B) * double(s.V);
    return {s.greedy ? n : 3 * n, 4 * n, "f32"};
  }
  static Tolerance tolerance(const Shape&, Fill, const std::string&) {
    return {};
  }  // integers, exactly
  static std::vector<Case<Shape>> cases() {
    std::vector<Case<Shape>> c;
    c.push_back({{.B = 32, .gamma = 1, .V = 16384}, Size::quick});
    c.push_back({{.B = 32, .gamma = 1, .V = 129280}, Size::full});
    c.push_back({{.B = 32, .gamma = 1, .V = 129280, .greedy = true}, Size::standard});
    c.push_back({{.B = 1, .gamma = 3, .V = 129280}, Size::standard});
    c.push_back({{.B = 57, .gamma = 3, .V = 13}, Size::quick, true});
    c.push_back({{.B = 57, .gamma = 2, .V = 37, .greedy = true}, Size::quick, true});
    return c;
  }
  static std::vector<Impl<MtpAccept>> impls() {
    std::vector<Impl<MtpAccept>> v;
    v.push_back(
        {.how = "cpu_simd",
         .prepare =
             [](Data& d) {
               return Runner{
                   .run = [&d] { kern::mtp_accept_cpu_simd(d.args(d.accepted, d.tokens_out)); },
                   .resolved_isa = kern::mtp_accept_cpu_simd_isa()};
             },
         .levels = {kern::Isa::avx2, kern::Isa::avx512}});
    v.push_back(cuda_impl<MtpAccept>("cuda_simt", nullptr, [](Data& d, CudaMirror& m) {
      auto a = d.args(d.accepted, d.tokens_out);
      m.map(a.p, a.q, a.draft, a.uniform, a.accepted, a.tokens);
      void* scratch = m.scratch(kern::mtp_accept_cuda_scratch_bytes(a));
      return [=](kern::CudaStream stream) { kern::mtp_accept_cuda_simt(a, scratch, stream); };
    }));
    v.push_back({"cpu_eigen", nullptr,
                 [](Data& d) {
                   return Runner{.run = [&d] { ref::mtp_accept(d.args(d.accepted, d.tokens_out)); },
                                 .resolved_isa = "baseline"};
                 },
                 true});
    return v;
  }
};

}  // namespace

std::unique_ptr<OpBase> make_mtp_accept_op() { return make_op<MtpAccept>(); }

}  // namespace v3b::bench
