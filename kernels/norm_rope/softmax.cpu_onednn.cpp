// Softmax of rows with oneDNN, as a baseline: the scale as an elementwise pass into y where it is not 1, then softmax in
// place. The library gives no log-sum-exp; it follows from the largest of a row's first probabilities.
#include <algorithm>
#include <cmath>
#include <dnnl.hpp>
#include <memory>

#include "kernels/gemm/gemm.h"
#include "kernels/norm_rope/swiglu.h"

namespace v3b::kern {
namespace {

struct Prepared {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  dnnl::memory x, y;
  dnnl::eltwise_forward scale;
  dnnl::softmax_forward softmax;
  spec::SoftmaxArgs a;

  explicit Prepared(const spec::SoftmaxArgs& args) : a(args) {
    using dnnl::prop_kind, dnnl::algorithm, dnnl::memory;
    const memory::dims dims{a.T, a.n};
    const memory::desc from(dims, memory::data_type::f32, memory::dims{a.x_stride, 1});
    const memory::desc to(dims, memory::data_type::f32, memory::dims{a.y_stride, 1});
    x = memory(from, engine, const_cast<float*>(a.x));
    y = memory(to, engine, a.y);
    scale = dnnl::eltwise_forward({engine, prop_kind::forward_inference, algorithm::eltwise_linear,
                                   from, to, static_cast<float>(a.scale), 0.0F});
    const auto& in = a.scale == 1.0 ? from : to;
    softmax = dnnl::softmax_forward(
        {engine, prop_kind::forward_inference, algorithm::softmax_accurate, in, to, 1});
  }
  void run() {
    if (a.scale != 1.0) scale.execute(stream, {{DNNL_ARG_SRC, x}, {DNNL_ARG_DST, y}});
    softmax.execute(stream, {{DNNL_ARG_SRC, a.scale == 1.0 ? x : y}, {DNNL_ARG_DST, y}});
    stream.wait();
    if (a.lse == nullptr) return;
    constexpr int64_t kLooked = 64;
    for (int64_t t = 0; t < a.T; ++t) {
      const float* p = a.y + t * a.y_stride;
      const int64_t i = std::max_element(p, p + std::min(a.n, kLooked)) - p;
      a.lse[t] = static_cast<float>(a.scale * static_cast<double>(a.x[t * a.x_stride + i]) -
                                    std::log(static_cast<double>(p[i])));
    }
  }
};

}  // namespace

std::function<void()> softmax_cpu_onednn(const spec::SoftmaxArgs& a) {
  return [p = std::make_shared<Prepared>(a)] { p->run(); };
}

}  // namespace v3b::kern
