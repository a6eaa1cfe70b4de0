// Routed and shared experts with cuBLAS' grouped products: see moe_libs_cuda.h for what a time of it includes.
// Bounds as in moe_ffn_mma.cuh, plus the rows that go through memory between the steps: (2 K d + 3 K m) e bytes a token.
// cuBLAS manual 2.8.15 (cublasGemmGroupedBatchedEx): sizes, strides and scalars of groups in host memory, the arrays of
// pointers in device memory; CUBLAS_COMPUTE_32F takes bf16 x bf16 -> bf16, fp16 alike, f32 x f32 -> f32; operands of bf16
// start 16-byte aligned where k is a multiple of 8.
#include "kernels/moe/moe_libs_cuda.h"
#include "model/error.h"

#if defined(V3B_HAVE_CUBLASLT)
#include <cublas_api.h>
#include <dlfcn.h>

#include <memory>
#include <vector>

#include "kernels/gemm/cublaslt_plan.h"
#include "kernels/moe/moe_cuda.h"
#include "kernels/moe/moe_experts_cuda.h"
#include "kernels/norm_rope/norm_rope_cuda.h"

namespace v3b::kern {
namespace {

#define V3B_BLAS_FUNCTIONS(F) \
  F(cublasCreate_v2)          \
  F(cublasSetStream_v2)       \
  F(cublasSetWorkspace_v2)    \
  F(cublasGemmGroupedBatchedEx)

struct Blas {
  std::string missing;
  cublasHandle_t handle = nullptr;
#define V3B_BLAS(f) decltype(&::f) f = nullptr;
  V3B_BLAS_FUNCTIONS(V3B_BLAS)
#undef V3B_BLAS
  Blas() {
    void* so = open_cublas("libcublas", missing);
    if (so == nullptr) return;
#define V3B_BLAS(f)                                    \
  f = reinterpret_cast<decltype(&::f)>(dlsym(so, #f)); \
  if (f == nullptr) missing = "libcublas has no " #f;
    V3B_BLAS_FUNCTIONS(V3B_BLAS)
#undef V3B_BLAS
  }
  void check(cublasStatus_t s, const char* where) const {
    if (s != CUBLAS_STATUS_SUCCESS)
      throw Error(ExitCode::usage, "cuBLAS status " + std::to_string(static_cast<int>(s)), where);
  }
  cublasHandle_t get() {
    if (!missing.empty()) throw Error(ExitCode::usage, missing, "cuBLAS grouped product");
    if (handle == nullptr) check(cublasCreate_v2(&handle), "cublasCreate");
    return handle;
  }
};
Blas& blas() {
  static Blas b;
  return b;
}

// Rows X [n, k] times weights W [out, k]: groups of equal shape, each of `each` products.
struct Grouped {
  std::vector<cublasOperation_t> trans_w, trans_x;
  std::vector<int> out, n, k, each;
  std::vector<float> one, zero;
  std::vector<const void*> w, x;
  std::vector<void*> y;
  int64_t tables = 0;  // of w, x, y: where in the scratch
  void add(int64_t rows, int64_t outs, int64_t inner, int products) {
    trans_w.push_back(CUBLAS_OP_T), trans_x.push_back(CUBLAS_OP_N);
    out.push_back(static_cast<int>(outs)), n.push_back(static_cast<int>(rows));
    k.push_back(static_cast<int>(inner)), each.push_back(products);
    one.push_back(1.0f), zero.push_back(0.0f);
  }
  void product(const void* weights, const void* rows, void* to) {
    w.push_back(weights), x.push_back(rows), y.push_back(to);
  }
};

struct Layout {
  int64_t offsets, row, plan, rows, gate, up, hidden, out, shared_gate, shared_up, shared_hidden,
      shared_out, tables, work, bytes;
};
spec::MoeDispatchArgs dispatch_of(const spec::MoeExpertsArgs& a) {
  return {a.T, a.d, a.E, a.K, a.x_dtype, a.x, a.idx, nullptr, nullptr, nullptr};
}
Layout layout_of(const spec::MoeExpertsArgs& a) {
  Layout l{};
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t here = at;
    at += (bytes + 255) / 256 * 256;
    return here;
  };
  const int64_t slots = a.T * a.K, e = spec::dtype_bytes(a.x_dtype),
                shared = a.shared_m > 0 ? a.T : 0;
  l.offsets = take((a.E + 1) * 8);
  l.row = take(slots * 8);
  l.plan = take(moe_dispatch_cuda_scratch_bytes(dispatch_of(a)));
  l.rows = take(slots * a.d * e);
  l.gate = take(slots * a.m * e), l.up = take(slots * a.m * e), l.hidden = take(slots * a.m * e);
  l.out = take(slots * a.d * e);
  l.shared_gate = take(shared * a.shared_m * e), l.shared_up = take(shared * a.shared_m * e);
  l.shared_hidden = take(shared * a.shared_m * e);
  l.shared_out = take(shared * a.d * e);
  l.tables = take((2 + 1) * (a.E + 1) * 3 * 8);  // three pointers a product
  l.work = take(kCublasLtScratchBytes);
  l.bytes = at;
  return l;
}

}  // namespace

struct MoeCublasPlan {
  spec::MoeExpertsArgs a;
  char* scratch;
  Layout l;
  Grouped gate_up, down;
};

namespace {

void run(const MoeCublasPlan& p, const Grouped& g) {
  Blas& b = blas();
  const auto type = p.a.x_dtype == spec::DType::bf16 ? CUDA_R_16BF : CUDA_R_32F;
  const auto products = static_cast<int64_t>(g.w.size());
  auto* table = reinterpret_cast<void**>(p.scratch + g.tables);
  b.check(b.cublasGemmGroupedBatchedEx(
              b.get(), g.trans_w.data(), g.trans_x.data(), g.out.data(), g.n.data(), g.k.data(),
              g.one.data(), table, type, g.k.data(), table + products, type, g.k.data(),
              g.zero.data(), table + 2 * products, type, g.out.data(),
              static_cast<int>(g.each.size()), g.each.data(), CUBLAS_COMPUTE_32F),
          "cublasGemmGroupedBatchedEx");
}
void swiglu(spec::DType t, int64_t rows, int64_t m, const void* gate, const void* up, void* y,
            CudaStream stream) {
  swiglu_cuda_simt({rows, m, t, t, gate, up, m, nullptr, y, m}, stream);
}

}  // namespace

std::string moe_cublas_missing() { return blas().missing; }
int64_t moe_experts_cublas_scratch_bytes(const spec::MoeExpertsArgs& a) {
  return layout_of(a).bytes;
}

MoeCublasPlan* moe_cublas_plan(const spec::MoeExpertsArgs& a, const int32_t* idx, void* scratch,
                               CudaStream stream) {
  blas().get();
  auto p = std::make_unique<MoeCublasPlan>();
  p->a = a, p->scratch = static_cast<char*>(scratch), p->l = layout_of(a);
  const Layout& l = p->l;
  const int64_t e = spec::dtype_bytes(a.x_dtype);
  std::vector<int64_t> counts(static_cast<size_t>(a.E), 0);
  for (int64_t s = 0; s < a.T * a.K; ++s)
    if (idx[s] >= 0) ++counts[static_cast<size_t>(idx[s])];
  int64_t row = 0;
  const auto add = [&](const spec::FfnPointers& f, int64_t rows, int64_t m, const void* x,
                       char* gate, char* up, char* hidden, char* out) {
    p->gate_up.add(rows, m, a.d, 2);
    p->gate_up.product(f.gate, x, gate);
    p->gate_up.product(f.up, x, up);
    p->down.add(rows, a.d, m, 1);
    p->down.product(f.down, hidden, out);
  };
  for (int64_t i = 0; i < a.E; ++i) {
    const int64_t n = counts[static_cast<size_t>(i)];
    if (n == 0) continue;
    const int64_t at_d = row * a.d * e, at_m = row * a.m * e;
    add(a.experts[i], n, a.m, p->scratch + l.rows + at_d, p->scratch + l.gate + at_m,
        p->scratch + l.up + at_m, p->scratch + l.hidden + at_m, p->scratch + l.out + at_d);
    row += n;
  }
  if (a.shared_m > 0 && a.T > 0)
    add(a.shared, a.T, a.shared_m, a.x, p->scratch + l.shared_gate, p->scratch + l.shared_up,
        p->scratch + l.shared_hidden, p->scratch + l.shared_out);
  int64_t at = l.tables;
  for (Grouped* g : {&p->gate_up, &p->down}) {
    g->tables = at;
    const auto bytes = static_cast<int64_t>(g->w.size() * sizeof(void*));
    for (const void* table :
         {static_cast<const void*>(g->w.data()), static_cast<const void*>(g->x.data()),
          static_cast<const void*>(g->y.data())}) {
      cuda_upload(p->scratch + at, table, bytes, stream);
      at += bytes;
    }
  }
  return p.release();
}
void moe_cublas_free(MoeCublasPlan* plan) { delete plan; }

void moe_experts_cuda_cublas(const MoeCublasPlan& p, CudaStream stream) {
  const spec::MoeExpertsArgs& a = p.a;
  const Layout& l = p.l;
  if (a.T == 0) return;
  Blas& b = blas();
  b.check(b.cublasSetStream_v2(b.get(), stream), "cublasSetStream");
  b.check(b.cublasSetWorkspace_v2(b.get(), p.scratch + l.work,
                                  static_cast<size_t>(kCublasLtScratchBytes)),
          "cublasSetWorkspace");
  spec::MoeDispatchArgs d = dispatch_of(a);
  d.offsets = reinterpret_cast<int64_t*>(p.scratch + l.offsets);
  d.row = reinterpret_cast<int64_t*>(p.scratch + l.row);
  d.rows = p.scratch + l.rows;
  moe_dispatch_cuda_simt(d, p.scratch + l.plan, stream);
  run(p, p.gate_up);
  swiglu(a.x_dtype, a.T * a.K, a.m, p.scratch + l.gate, p.scratch + l.up, p.scratch + l.hidden,
         stream);
  if (a.shared_m > 0)
    swiglu(a.x_dtype, a.T, a.shared_m, p.scratch + l.shared_gate, p.scratch + l.shared_up,
           p.scratch + l.shared_hidden, stream);
  run(p, p.down);
  moe_experts_combine_cuda_simt({a.T, a.d, a.K, a.x_dtype, p.scratch + l.out, d.row, a.weight, a.y},
                                a.x_dtype, a.shared_m > 0 ? p.scratch + l.shared_out : nullptr,
                                stream);
}

}  // namespace v3b::kern

#else

namespace v3b::kern {
namespace {
[[noreturn]] void absent() {
  throw Error(ExitCode::usage, moe_cublas_missing(), "cuBLAS grouped product");
}
}  // namespace
std::string moe_cublas_missing() { return "built without CUDA"; }
int64_t moe_experts_cublas_scratch_bytes(const spec::MoeExpertsArgs&) { absent(); }
MoeCublasPlan* moe_cublas_plan(const spec::MoeExpertsArgs&, const int32_t*, void*, CudaStream) {
  absent();
}
void moe_cublas_free(MoeCublasPlan*) {}
void moe_experts_cuda_cublas(const MoeCublasPlan&, CudaStream) { absent(); }
}  // namespace v3b::kern
#endif
