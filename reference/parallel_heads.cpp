#include "reference/parallel_heads.h"

#include <algorithm>
#include <limits>
#include <string>

#include "model/error.h"
#include "reference/layer_backward.h"
#include "reference/softmax.h"

namespace v3b::ref {
namespace {

template <class S>
struct HeadActs {
  LayerActs<S> layer;
  RowMatrix<S> x, f;  // residual stream after the layer, and after the norm
};

template <class S>
RowMatrix<S> head_forward(const ModelParams<S>& p, int64_t i, int64_t B, int64_t T,
                          const LossOptions& o, const RowMatrix<S>& z, HeadActs<S>& a) {
  a.x = layer_forward<S>(p.config, p.layers[size_t(i - 1)], B, T, o, z, a.layer);
  a.f = norm_forward<S>(a.x, p.norm, p.config.rms_norm_eps);
  return linear_forward<S>(a.f, p.head_or_embed(), p.config.vocab_size);
}

void require(bool ok, const char* what, const std::string& expected, const std::string& found) {
  if (!ok) throw Error(ExitCode::bad_input, what, "parallel heads", expected, found);
}

}  // namespace

template <class S>
std::vector<S> parallel_head_logits(const ModelParams<S>& p, int64_t i, int64_t B, int64_t T,
                                    const S* z, const LossOptions& o) {
  require(i >= 1 && i <= int64_t(p.layers.size()), "head", "1.." + std::to_string(p.layers.size()),
          std::to_string(i));
  HeadActs<S> a;
  const RowMatrix<S> y = head_forward<S>(
      p, i, B, T, o, Eigen::Map<const RowMatrix<S>>(z, B * T, p.config.hidden_size), a);
  return std::vector<S>(y.data(), y.data() + y.size());
}

template <class S>
ParallelHeadsLoss parallel_heads_loss(const ModelParams<S>& p, int64_t B, int64_t T, const S* z,
                                      const int32_t* tokens, const int32_t* targets,
                                      const LossOptions& o, ModelParams<S>* grads, S* dz) {
  const int64_t n = int64_t(p.layers.size()), d = p.config.hidden_size, V = p.config.vocab_size;
  require(n >= 1 && T >= n, "shape", "1 <= heads <= T",
          std::to_string(n) + " heads, T " + std::to_string(T));
  require((grads == nullptr) == (dz == nullptr), "gradients", "grads and dz, or neither",
          "one of them");
  ParallelHeadsLoss r;
  r.smallest_gap = std::numeric_limits<double>::infinity();
  const auto target = [&](int64_t b, int64_t q) {  // what head 1 predicts at position q
    return targets != nullptr ? targets[b * T + q] : tokens[b * (T + 1) + q + 1];
  };
  for (int64_t b = 0; b < B; ++b)
    for (int64_t q = 0; q < T; ++q) r.targets += target(b, q) != -100;
  const double per_target = 1.0 / double(std::max<int64_t>(1, r.targets));

  const RowMatrix<S> states = Eigen::Map<const RowMatrix<S>>(z, B * T, d);
  for (int64_t i = 1; i <= n; ++i) {
    std::vector<int32_t> labels;
    for (int64_t b = 0; b < B; ++b)
      for (int64_t q = 0; q < T; ++q) labels.push_back(q + i - 1 < T ? target(b, q + i - 1) : -100);
    HeadActs<S> a;
    const RowMatrix<S> logits = head_forward<S>(p, i, B, T, o, states, a);
    RowMatrix<S> d_logits(B * T, V);
    int64_t count = 0;
    r.nats.push_back(double(cross_entropy_sum<S>(B * T, V, logits.data(), labels.data(),
                                                 S(per_target), d_logits.data(), &count)));
    r.counts.push_back(count);
    r.total += r.nats.back() * per_target;
    if (p.layers[size_t(i - 1)].is_moe) {
      r.load.push_back(a.layer.load);
      r.aux += a.layer.aux;
      for (S g : a.layer.routes.gap) r.smallest_gap = std::min(r.smallest_gap, double(g));
    }
    if (grads == nullptr) continue;
    const RowMatrix<S> df =
        linear_backward<S>(a.f, p.head_or_embed(), d_logits, grads->head_or_embed());
    const RowMatrix<S> dx = norm_backward<S>(a.x, p.norm, p.config.rms_norm_eps, df, grads->norm);
    Eigen::Map<RowMatrix<S>>(dz, B * T, d) += layer_backward<S>(
        p.config, p.layers[size_t(i - 1)], B, T, o, a.layer, dx, grads->layers[size_t(i - 1)]);
  }
  r.total += r.aux;
  return r;
}

#define V3B_INSTANTIATE(S)                                                                    \
  template std::vector<S> parallel_head_logits<S>(const ModelParams<S>&, int64_t, int64_t,    \
                                                  int64_t, const S*, const LossOptions&);     \
  template ParallelHeadsLoss parallel_heads_loss<S>(const ModelParams<S>&, int64_t, int64_t,  \
                                                    const S*, const int32_t*, const int32_t*, \
                                                    const LossOptions&, ModelParams<S>*, S*);
V3B_INSTANTIATE(float)
V3B_INSTANTIATE(double)

}  // namespace v3b::ref
