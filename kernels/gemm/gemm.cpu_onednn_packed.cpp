// A linear layer through oneDNN with its weight in the library's own layout, reordered once: the fairest form of the peer.
#include "kernels/gemm/gemm.h"

#include <cstdio>
#include <cstdlib>
#include <dnnl.hpp>

#include "kernels/core/cpu.h"

namespace v3b::kern {
namespace {

dnnl::memory::data_type dnnl_type(spec::DType t) {
  return t == spec::DType::bf16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32;
}

}  // namespace

struct OnednnLinear::Impl {
  dnnl::engine engine;
  dnnl::stream stream;
  dnnl::matmul prim;
  dnnl::memory a, b, c;
};

bool OnednnLinear::supported(spec::DType ab_type, spec::DType c_type) {
  using dims = dnnl::memory::dims;
  (void)cpu_features();  // applies V3BENCH_MAX_ISA before oneDNN looks
  const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  const dnnl::memory::desc a(dims{16, 16}, dnnl_type(ab_type), dims{16, 1});
  const dnnl::memory::desc any(dims{16, 16}, dnnl_type(ab_type), dnnl::memory::format_tag::any);
  const dnnl::memory::desc c(dims{16, 16}, dnnl_type(c_type), dims{16, 1});
  const dnnl::matmul::primitive_desc pd(engine, a, any, c, dnnl::primitive_attr(),
                                        /*allow_empty=*/true);
  return static_cast<bool>(pd);
}

OnednnLinear::OnednnLinear(const GemmArgs& g) : impl_(new Impl) {
  using dims = dnnl::memory::dims;
  using tag = dnnl::memory::format_tag;
  Impl& i = *impl_;
  (void)cpu_features();  // applies V3BENCH_MAX_ISA and asks for AMX before oneDNN looks
  i.engine = dnnl::engine(dnnl::engine::kind::cpu, 0);
  i.stream = dnnl::stream(i.engine);
  const dnnl::memory::desc a(dims{g.M, g.K}, dnnl_type(g.ab_type), dims{g.lda, 1});
  const dnnl::memory::desc b(dims{g.K, g.N}, dnnl_type(g.ab_type), dims{1, g.ldb});
  const dnnl::memory::desc any(dims{g.K, g.N}, dnnl_type(g.ab_type), tag::any);
  const dnnl::memory::desc c(dims{g.M, g.N}, dnnl_type(g.c_type), dims{g.ldc, 1});
  const dnnl::matmul::primitive_desc pd(i.engine, a, any, c, dnnl::primitive_attr(),
                                        /*allow_empty=*/true);
  if (!pd) {
    std::fprintf(stderr, "v3bench: oneDNN has no matmul with a packed weight for these types\n");
    std::abort();
  }
  i.prim = dnnl::matmul(pd);
  i.a = dnnl::memory(a, i.engine, const_cast<void*>(g.a));
  i.c = dnnl::memory(c, i.engine, g.c);
  i.b = dnnl::memory(pd.weights_desc(), i.engine);
  dnnl::memory from(b, i.engine, const_cast<void*>(g.b));
  dnnl::reorder(from, i.b).execute(i.stream, from, i.b);
  i.stream.wait();
}
OnednnLinear::~OnednnLinear() { delete impl_; }

void OnednnLinear::run() noexcept {
  Impl& i = *impl_;
  i.prim.execute(i.stream, {{DNNL_ARG_SRC, i.a}, {DNNL_ARG_WEIGHTS, i.b}, {DNNL_ARG_DST, i.c}});
  i.stream.wait();
}

}  // namespace v3b::kern
