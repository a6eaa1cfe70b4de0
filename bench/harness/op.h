// One declaration an op (DESIGN 2). An op x implementation x case is a job; the modes list, support,
// check, bench and profile are loops over jobs. An op file defines one struct like this and one factory:
//
//   struct RmsNorm {
//     static constexpr const char* name = "rmsnorm";
//     using Shape = spec::RmsNormShape;            // plain struct with visit(), see below
//     struct Data { HostTensor x, w, y; std::vector<HostTensor*> tensors() { return {&x, &w, &y}; } };
//     static std::unique_ptr<Data> make(const Shape&, Fill, uint64_t seed);
//     static Expected reference(const Data&);      // float64 on the very same rounded inputs; runs AFTER the kernel
//     static Cost cost(const Shape&);
//     static Tolerance tolerance(const Shape&, Fill, const std::string& output);
//     static std::vector<Case<Shape>> cases();
//     static std::vector<Impl<RmsNorm>> impls();
//   };
//   std::unique_ptr<OpBase> make_rmsnorm_op() { return make_op<RmsNorm>(); }
//
// and one line in bench/ops/registry.cpp. Shapes list their fields for text (--case d=7168,T=512,dtype=bf16):
//
//   struct RmsNormShape { int64_t T = 1, d = 7168; DType dtype = DType::bf16;
//     template <class S, class V> static void visit(S& s, V&& v) { v("T", s.T); v("d", s.d); v("dtype", s.dtype); } };
//
// Field types: int64_t, double, bool, DType, and the enums of spec/flags.h (text forms in shape_io.h).
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "bench/harness/host_tensor.h"
#include "bench/harness/shape_io.h"
#include "kernels/core/cpu.h"

namespace v3b::bench {

enum class Fill { real, exact };
enum class CacheState { hot, cold };
// quick: always; standard: bench without flags; full: --full only
enum class Size { quick, standard, full };

template <class Shape>
struct Case {
  Shape shape;
  Size size = Size::standard;
  bool check_only = false;  // odd little shapes that are worth no time
  CacheState cache = CacheState::cold;
};

struct Cost {
  double flop = 0;   // multiply-add = 2
  double bytes = 0;  // least bytes: every operand once
  // Which peaks bound it: "f32" | "bf16" | "f64" | "int8" compute roof beside the read bandwidth.
  const char* compute_roof = "f32";
  double written = 0;  // part of `bytes`; its roof is the copy bandwidth, the rest is read
};

// Judged per element and by norm, NaN fails (law 2). bound_i = abs_rms * rms(expected) + rel * |expected_i| + abs.
// All zeros: bitwise equality of values.
struct Tolerance {
  double rel_fro = 0;  // ||y - y64||_F / ||y64||_F
  double abs_rms = 0, rel = 0, abs = 0;
};

struct ExpectedTensor {
  std::string name;            // of the output tensor that it judges
  std::vector<double> values;  // same order as the tensor; a NaN that is judged fails the job
  std::vector<uint8_t> skip;   // empty: every element is judged; else 1 = element is not judged
  // Routes (law 5): if set, `name` holds K indices a row, compared as sets; a row whose reference gap is
  // below `route_gap_bound` may differ and is counted as a flip.
  int64_t route_k = 0;
  std::vector<double> route_gap;  // [rows]
  double route_gap_bound = 0;
  std::vector<std::string> follow;  // outputs judged only on rows without a flip (e.g. weights)
};
struct Expected {
  std::vector<ExpectedTensor> tensors;
};

// Why a job cannot run here; empty = it can.
struct Support {
  enum class State { yes, unsupported, not_built, no_device } state = State::yes;
  std::string reason;
};

// What prepare() returns: packing, uploads and scratch are done; run() computes outputs from inputs.
struct Runner {
  std::function<void()> run;
  // optional: seconds of one run measured by the device (CUDA events)
  std::function<double()> timed_run;
  std::function<void()> fetch;  // optional: device outputs -> host tensors
  std::function<void()>
      poison;  // optional: device outputs -> NaN bytes, as the host's before a timed round
  // what really ran: "avx2", "avx512", "avx512_bf16", "amx_bf16", "oneDNN:..."
  std::string resolved_isa;
};

template <class Op>
struct Impl {
  std::string how;  // name is "<op>.<how>", e.g. cpu_eigen, cpu_onednn, cpu_simd
  std::function<Support(const typename Op::Shape&)> support;  // null: always
  std::function<Runner(typename Op::Data&)> prepare;
  bool baseline = false;  // a peer (library or plain reference form), not ours
  // All instruction-set levels that this implementation is written for, the highest included. Named `how` it runs at
  // the machine's best of them; each other one is an implementation of its own, "<how>@avx2". Everything that it calls
  // must follow cpu_features() or Highway's dispatch at every call (no oneDNN).
  std::vector<kern::Isa> levels = {};
  // Null: the op's. Else what SPEC 0.6 allows where this implementation's sums are made (Hopper's FP8 tensor cores keep
  // about 14 bits inside a segment) or its roundings stand (a library that rounds in between), with the derivation.
  std::function<Tolerance(const typename Op::Shape&, Fill, const std::string&)> tolerance;
};

// ---- type erasure: what the modes see -------------------------------------------------------------------
struct CaseInfo {
  std::string text;  // "T=512,d=7168,dtype=bf16", complete, parseable
  Size size = Size::standard;
  bool check_only = false;
  CacheState cache = CacheState::cold;
  std::string dtype;  // of the shape's dtype field, or ""
};
struct DataHandle {  // owns one Data
  std::shared_ptr<void> data;
  std::vector<HostTensor*> tensors;
};

class OpBase {
 public:
  virtual ~OpBase() = default;
  virtual std::string name() const = 0;
  virtual std::vector<CaseInfo> cases() const = 0;
  // Any shape from "key=value,..."; missing keys take the defaults of Shape; throws Error(usage).
  virtual CaseInfo parse_case(const std::string& text) const = 0;
  virtual std::vector<std::string> impls() const = 0;  // "how" of each
  virtual bool is_baseline(const std::string& how) const = 0;
  virtual Support support(const std::string& how, const std::string& case_text) const = 0;
  virtual DataHandle make(const std::string& case_text, Fill fill, uint64_t seed) const = 0;
  virtual Runner prepare(const std::string& how, DataHandle& data) const = 0;
  virtual Expected reference(const DataHandle& data) const = 0;
  virtual Cost cost(const std::string& case_text) const = 0;
  virtual Tolerance tolerance(const std::string& case_text, Fill fill,
                              const std::string& output) const = 0;
  // The same for one implementation; most have no tolerance of their own.
  virtual Tolerance tolerance_of(const std::string& /*how*/, const std::string& case_text,
                                 Fill fill, const std::string& output) const {
    return tolerance(case_text, fill, output);
  }
  virtual bool has_exact_fill(const std::string& case_text) const = 0;
};

template <class Op>
std::unique_ptr<OpBase> make_op(
    std::vector<Impl<Op>> extra = {});  // extra: broken kernels of the harness test

}  // namespace v3b::bench

#include "bench/harness/op_impl.h"
