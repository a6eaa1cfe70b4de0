#include "reference/model_backward.h"

#include <algorithm>
#include <limits>

#include "reference/embedding.h"
#include "reference/layer_backward.h"
#include "reference/softmax.h"

namespace v3b::ref {
namespace {

template <class S>
struct MtpActs {
  RowMatrix<S> emb, h_prev, u, x,
      f;  // x: residual stream after the layer; f: after shared_head.norm
  LayerActs<S> layer;
  RowMatrix<S> d_logits;
  std::vector<int32_t> ids;
};

// Rows 0..n-1 of each of B sequences of T rows.
template <class S>
RowMatrix<S> first_rows(const RowMatrix<S>& h, int64_t B, int64_t T, int64_t n) {
  RowMatrix<S> out(B * n, h.cols());
  for (int64_t b = 0; b < B; ++b) out.middleRows(b * n, n) = h.middleRows(b * T, n);
  return out;
}
template <class S>
void add_first_rows(RowMatrix<S>& h, int64_t B, int64_t T, int64_t n, const RowMatrix<S>& rows) {
  for (int64_t b = 0; b < B; ++b) h.middleRows(b * T, n) += rows.middleRows(b * n, n);
}

void note(const std::vector<int64_t>& load, double aux, const auto& gap, LossParts& r) {
  r.load.push_back(load);
  r.aux += aux;
  for (auto v : gap) r.smallest_gap = std::min(r.smallest_gap, double(v));
}

}  // namespace

template <class S>
LossParts model_loss(const ModelParams<S>& p, int64_t B, int64_t T, const int32_t* tokens,
                     const int32_t* targets, const LossOptions& o, ModelParams<S>* grads) {
  const model::ModelConfig& c = p.config;
  const int64_t d = c.hidden_size, V = c.vocab_size, L = c.num_hidden_layers;
  const bool post_norm = o.flags.mtp_hidden == spec::MtpHidden::post_norm;
  const bool e_first = o.flags.mtp_concat == spec::MtpConcat::emb_h;
  LossParts r;
  r.smallest_gap = std::numeric_limits<double>::infinity();
  const auto target = [&](int64_t b, int64_t i) {  // of input position i
    return targets != nullptr ? targets[b * T + i] : tokens[b * (T + 1) + i + 1];
  };
  std::vector<int32_t> ids, labels;
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t i = 0; i < T; ++i) {
      ids.push_back(tokens[b * (T + 1) + i]);
      labels.push_back(target(b, i));
      r.targets += labels.back() != -100;
    }
  }
  const double per_target = 1.0 / double(std::max<int64_t>(1, r.targets));

  // Main model.
  std::vector<LayerActs<S>> acts(static_cast<size_t>(L));
  RowMatrix<S> h(B * T, d);
  embedding<S>(B * T, d, V, ids.data(), p.embed.data(), h.data());
  for (int64_t l = 0; l < L; ++l) {
    auto& a = acts[size_t(l)];
    h = layer_forward<S>(c, p.layers[size_t(l)], B, T, o, h, a);
    if (p.layers[size_t(l)].is_moe) note(a.load, a.aux, a.routes.gap, r);
  }
  const RowMatrix<S> f = norm_forward<S>(h, p.norm, c.rms_norm_eps);
  RowMatrix<S> logits = linear_forward<S>(f, p.head_or_embed(), V), d_logits(B * T, V);
  r.nats = double(
      cross_entropy_sum<S>(B * T, V, logits.data(), labels.data(), S(per_target), d_logits.data()));

  // MTP modules, depth k = 1..D.
  const int64_t D = int64_t(p.mtp.size());
  const double weight = D > 0 ? o.mtp_lambda / double(D) : 0;
  std::vector<MtpActs<S>> mtp(static_cast<size_t>(D));
  for (int64_t k = 1; k <= D; ++k) {
    const MtpParams<S>& m = p.mtp[size_t(k - 1)];
    MtpActs<S>& a = mtp[size_t(k - 1)];
    const int64_t n = T - k;
    if (n < 1) break;
    std::vector<int32_t> y;
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t i = 0; i < n; ++i) {
        a.ids.push_back(tokens[b * (T + 1) + i + k]);
        y.push_back(target(b, i + k));
      }
    }
    a.emb.resize(B * n, d);
    embedding<S>(B * n, d, V, a.ids.data(), (m.own_embed.empty() ? p.embed : m.own_embed).data(),
                 a.emb.data());
    const RowMatrix<S>& before =
        k == 1 ? (post_norm ? f : h) : (post_norm ? mtp[size_t(k - 2)].f : mtp[size_t(k - 2)].x);
    a.h_prev = first_rows<S>(before, B, T - k + 1, n);
    const RowMatrix<S> e = norm_forward<S>(a.emb, m.enorm, c.rms_norm_eps);
    const RowMatrix<S> g = norm_forward<S>(a.h_prev, m.hnorm, c.rms_norm_eps);
    a.u.resize(B * n, 2 * d);
    a.u << (e_first ? e : g), (e_first ? g : e);
    a.x = layer_forward<S>(c, m.layer, B, n, o, linear_forward<S>(a.u, m.eh_proj, d), a.layer);
    if (m.layer.is_moe) note(a.layer.load, a.layer.aux, a.layer.routes.gap, r);
    a.f = norm_forward<S>(a.x, m.norm, c.rms_norm_eps);
    const RowMatrix<S> z =
        linear_forward<S>(a.f, m.own_head.empty() ? p.head_or_embed() : m.own_head, V);
    a.d_logits.resize(B * n, V);
    r.mtp_nats += double(cross_entropy_sum<S>(B * n, V, z.data(), y.data(), S(weight * per_target),
                                              a.d_logits.data()));
  }
  r.total = r.nats * per_target + weight * r.mtp_nats * per_target + r.aux;
  if (grads == nullptr) return r;

  // Backward: MTP from the last depth to the first, then the trunk.
  RowMatrix<S> df = linear_backward<S>(f, p.head_or_embed(), d_logits, grads->head_or_embed());
  RowMatrix<S> dh = RowMatrix<S>::Zero(B * T, d);  // at the trunk's last residual stream
  RowMatrix<S> df_next, dx_next;                   // what depth k+1 gives back to depth k
  for (int64_t k = D; k >= 1; --k) {
    const MtpParams<S>& m = p.mtp[size_t(k - 1)];
    MtpParams<S>& g = grads->mtp[size_t(k - 1)];
    const MtpActs<S>& a = mtp[size_t(k - 1)];
    const int64_t n = T - k;
    if (n < 1) continue;
    RowMatrix<S> dfk =
        linear_backward<S>(a.f, m.own_head.empty() ? p.head_or_embed() : m.own_head, a.d_logits,
                           m.own_head.empty() ? grads->head_or_embed() : g.own_head);
    if (df_next.size() > 0) add_first_rows<S>(dfk, B, n, n - 1, df_next);
    RowMatrix<S> dx = norm_backward<S>(a.x, m.norm, c.rms_norm_eps, dfk, g.norm);
    if (dx_next.size() > 0) add_first_rows<S>(dx, B, n, n - 1, dx_next);
    const RowMatrix<S> du = linear_backward<S>(
        a.u, m.eh_proj, layer_backward<S>(c, m.layer, B, n, o, a.layer, dx, g.layer), g.eh_proj);
    const RowMatrix<S> d_e = norm_backward<S>(
        a.emb, m.enorm, c.rms_norm_eps,
        e_first ? RowMatrix<S>(du.leftCols(d)) : RowMatrix<S>(du.rightCols(d)), g.enorm);
    const RowMatrix<S> d_h = norm_backward<S>(
        a.h_prev, m.hnorm, c.rms_norm_eps,
        e_first ? RowMatrix<S>(du.rightCols(d)) : RowMatrix<S>(du.leftCols(d)), g.hnorm);
    embedding_backward<S>(B * n, d, a.ids.data(), d_e.data(),
                          (m.own_embed.empty() ? grads->embed : g.own_embed).data());
    if (k > 1) {
      (post_norm ? df_next : dx_next) = d_h;
    } else {
      add_first_rows<S>(post_norm ? df : dh, B, T, n, d_h);
    }
  }
  dh += norm_backward<S>(h, p.norm, c.rms_norm_eps, df, grads->norm);
  for (int64_t l = L - 1; l >= 0; --l)
    dh = layer_backward<S>(c, p.layers[size_t(l)], B, T, o, acts[size_t(l)], dh,
                           grads->layers[size_t(l)]);
  embedding_backward<S>(B * T, d, ids.data(), dh.data(), grads->embed.data());
  return r;
}

template LossParts model_loss<float>(const ModelParams<float>&, int64_t, int64_t, const int32_t*,
                                     const int32_t*, const LossOptions&, ModelParams<float>*);
template LossParts model_loss<double>(const ModelParams<double>&, int64_t, int64_t, const int32_t*,
                                      const int32_t*, const LossOptions&, ModelParams<double>*);

}  // namespace v3b::ref
