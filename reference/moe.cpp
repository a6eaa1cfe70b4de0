#include "reference/moe.h"

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <numeric>

#include "reference/fp8_quant.h"
#include "reference/spec/dtype.h"

namespace v3b::ref {
namespace {
template <class S>
using Mat = Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class S>
using CMap = Eigen::Map<const Mat<S>>;
template <class S>
using MMap = Eigen::Map<Mat<S>>;

template <class S>
S sigmoid(S a) {
  return a >= 0 ? S(1) / (S(1) + std::exp(-a)) : std::exp(a) / (S(1) + std::exp(a));
}

template <class S>
float bf16_of(S v) {
  return spec::to_float(spec::to_bf16(static_cast<float>(v)));
}

// Rows of x that chose one expert.
template <class S>
Mat<S> gather(const Dispatch& p, int64_t e, int64_t K, int64_t d, const S* x) {
  Mat<S> xe(p.counts[e], d);
  for (int64_t i = 0; i < p.counts[e]; ++i)
    xe.row(i) = Eigen::Map<const Eigen::Matrix<S, 1, Eigen::Dynamic>>(
        x + p.slot[p.offsets[e] + i] / K * d, d);
  return xe;
}
}  // namespace

Dispatch dispatch(int64_t T, int64_t K, int64_t E, const int32_t* idx) {
  Dispatch p;
  p.counts.assign(E, 0);
  p.offsets.assign(E + 1, 0);
  p.row.assign(T * K, -1);
  for (int64_t i = 0; i < T * K; ++i)
    if (idx[i] >= 0) ++p.counts[idx[i]];
  for (int64_t e = 0; e < E; ++e) p.offsets[e + 1] = p.offsets[e] + p.counts[e];
  p.slot.resize(p.offsets[E]);
  std::vector<int64_t> next(p.offsets.begin(), p.offsets.end() - 1);
  for (int64_t i = 0; i < T * K; ++i)
    if (idx[i] >= 0) {
      p.row[i] = next[idx[i]]++;
      p.slot[p.row[i]] = i;
    }
  return p;
}

template <class S>
void dispatch_rows(const Dispatch& p, int64_t K, int64_t d, const S* x, S* rows) {
  for (size_t r = 0; r < p.slot.size(); ++r)
    std::copy_n(x + p.slot[r] / K * d, d, rows + static_cast<int64_t>(r) * d);
}

template <class S>
S add_bf16(S a, S b) {
  return static_cast<S>(bf16_of(bf16_of(a) + bf16_of(b)));
}

template <class S>
void combine_rows(const Dispatch& p, int64_t T, int64_t K, int64_t d, const S* rows,
                  const S* weight, S* y, spec::MoeAccum accum) {
  MMap<S> Y(y, T, d);
  Y.setZero();
  if (accum == spec::MoeAccum::bf16) {
    for (size_t r = 0; r < p.slot.size(); ++r)
      for (int64_t j = 0; j < d; ++j) {
        const float v = bf16_of(rows[static_cast<int64_t>(r) * d + j]);
        S& sum = Y(p.slot[r] / K, j);
        sum = add_bf16<S>(sum, static_cast<S>(static_cast<float>(weight[p.slot[r]]) * v));
      }
    return;
  }
  for (int64_t i = 0; i < T * K; ++i)
    if (p.row[i] >= 0) Y.row(i / K) += weight[i] * CMap<S>(rows + p.row[i] * d, 1, d);
}

int64_t expert_capacity(double cf, int64_t K, int64_t T, int64_t E) {
  const double c = std::ceil(cf * static_cast<double>(K * T) / static_cast<double>(E));
  return c >= static_cast<double>(T * K) ? T * K : std::max<int64_t>(1, static_cast<int64_t>(c));
}

std::vector<char> apply_capacity(int64_t T, int64_t K, int64_t E, const int32_t* idx,
                                 const double* gate, int64_t capacity, spec::DropPolicy policy) {
  std::vector<int64_t> order(T * K);
  std::iota(order.begin(), order.end(), 0);
  if (policy == spec::DropPolicy::slot) {
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return a % K < b % K; });
  } else if (policy == spec::DropPolicy::prob) {
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return gate[a] > gate[b]; });
  }
  std::vector<int64_t> used(E, 0);
  std::vector<char> keep(T * K, 0);
  for (int64_t i : order)
    if (idx[i] >= 0 && used[idx[i]] < capacity) {
      ++used[idx[i]];
      keep[i] = 1;
    }
  return keep;
}

ContiguousLayout contiguous_layout(const std::vector<int64_t>& counts, int64_t align) {
  ContiguousLayout l;
  for (size_t e = 0; e < counts.size(); ++e) {
    const int64_t start = static_cast<int64_t>(l.m_indices.size());
    for (int64_t i = 0; i < counts[e]; ++i) {
      l.padded_row.push_back(start + i);
      l.m_indices.push_back(static_cast<int32_t>(e));
    }
    while (l.m_indices.size() % static_cast<size_t>(align) != 0) l.m_indices.push_back(-1);
  }
  return l;
}

template <class S>
void ffn(int64_t T, int64_t d, int64_t m, const S* x, const Ffn<S>& w, S* y, Hidden hidden) {
  const CMap<S> X(x, T, d);
  const Mat<S> a = X * CMap<S>(w.gate, m, d).transpose(), u = X * CMap<S>(w.up, m, d).transpose();
  Mat<S> h = a.binaryExpr(u, [](S av, S uv) { return av * sigmoid(av) * uv; });
  if (hidden == Hidden::fp8) {
    h = h.unaryExpr([](S v) { return S(bf16_of(v)); }).eval();
    std::vector<spec::f8e4m3> codes(static_cast<size_t>(T * m));
    std::vector<float> scales(static_cast<size_t>(T * spec::fp8_blocks(m)));
    fp8_quantize_act<S>(T, m, h.data(), codes.data(), scales.data());
    fp8_dequantize_act<S>(T, m, codes.data(), scales.data(), h.data());
  }
  MMap<S>(y, T, d) = h * CMap<S>(w.down, d, m).transpose();
}

template <class S>
void ffn_backward(int64_t T, int64_t d, int64_t m, const S* x, const Ffn<S>& w, const S* dy, S* dx,
                  FfnGrad<S> g) {
  const CMap<S> X(x, T, d), dY(dy, T, d);
  const Mat<S> a = X * CMap<S>(w.gate, m, d).transpose(), u = X * CMap<S>(w.up, m, d).transpose();
  const Mat<S> sig = a.unaryExpr([](S v) { return sigmoid(v); });
  const Mat<S> silu = a.cwiseProduct(sig);
  const Mat<S> h = silu.cwiseProduct(u);
  const Mat<S> dh = dY * CMap<S>(w.down, d, m);
  const Mat<S> du = dh.cwiseProduct(silu);
  const Mat<S> da =
      (dh.array() * u.array() * sig.array() * (S(1) + a.array() * (S(1) - sig.array()))).matrix();
  MMap<S>(g.down, d, m) += dY.transpose() * h;
  MMap<S>(g.gate, m, d) += da.transpose() * X;
  MMap<S>(g.up, m, d) += du.transpose() * X;
  MMap<S>(dx, T, d) += da * CMap<S>(w.gate, m, d) + du * CMap<S>(w.up, m, d);
}

template <class S>
void moe(int64_t T, int64_t d, int64_t m, int64_t E, int64_t K, const S* x, const int32_t* idx,
         const S* weight, const std::vector<Ffn<S>>& experts, const Ffn<S>& shared,
         int64_t shared_m, S* y, spec::MoeAccum accum, Hidden hidden) {
  const Dispatch p = dispatch(T, K, E, idx);
  Mat<S> out(p.offsets[E], d);
  for (int64_t e = 0; e < E; ++e) {
    if (p.counts[e] == 0) continue;
    const Mat<S> xe = gather(p, e, K, d, x);
    ffn(p.counts[e], d, m, xe.data(), experts[e], out.data() + p.offsets[e] * d, hidden);
  }
  combine_rows(p, T, K, d, out.data(), weight, y, accum);
  if (shared.gate) {
    Mat<S> ys(T, d);
    ffn(T, d, shared_m, x, shared, ys.data(), hidden);
    MMap<S> Y(y, T, d);
    if (accum == spec::MoeAccum::bf16)
      Y = Y.binaryExpr(ys, [](S a, S b) { return add_bf16<S>(a, b); }).eval();
    else
      Y += ys;
  }
}

template <class S>
void moe_backward(int64_t T, int64_t d, int64_t m, int64_t E, int64_t K, const S* x,
                  const int32_t* idx, const S* weight, const std::vector<Ffn<S>>& experts,
                  const Ffn<S>& shared, int64_t shared_m, const S* dy, S* dx, S* dweight,
                  const std::vector<FfnGrad<S>>& eg, FfnGrad<S> sg) {
  const Dispatch p = dispatch(T, K, E, idx);
  std::fill(dweight, dweight + T * K, S(0));
  MMap<S> dX(dx, T, d);
  for (int64_t e = 0; e < E; ++e) {
    const int64_t n = p.counts[e];
    if (n == 0) continue;
    const Mat<S> xe = gather(p, e, K, d, x), dye = gather(p, e, K, d, dy);
    Mat<S> out(n, d), dout(n, d), dxe = Mat<S>::Zero(n, d);
    ffn(n, d, m, xe.data(), experts[e], out.data());
    for (int64_t i = 0; i < n; ++i) {
      const int64_t slot = p.slot[p.offsets[e] + i];
      dweight[slot] = dye.row(i).dot(out.row(i));
      dout.row(i) = weight[slot] * dye.row(i);
    }
    ffn_backward(n, d, m, xe.data(), experts[e], dout.data(), dxe.data(), eg[e]);
    for (int64_t i = 0; i < n; ++i) dX.row(p.slot[p.offsets[e] + i] / K) += dxe.row(i);
  }
  if (shared.gate) ffn_backward(T, d, shared_m, x, shared, dy, dx, sg);
}

#define V3B_INSTANTIATE(S)                                                                        \
  template void dispatch_rows<S>(const Dispatch&, int64_t, int64_t, const S*, S*);                \
  template void combine_rows<S>(const Dispatch&, int64_t, int64_t, int64_t, const S*, const S*,   \
                                S*, spec::MoeAccum);                                              \
  template S add_bf16<S>(S, S);                                                                   \
  template void ffn<S>(int64_t, int64_t, int64_t, const S*, const Ffn<S>&, S*, Hidden);           \
  template void ffn_backward<S>(int64_t, int64_t, int64_t, const S*, const Ffn<S>&, const S*, S*, \
                                FfnGrad<S>);                                                      \
  template void moe<S>(int64_t, int64_t, int64_t, int64_t, int64_t, const S*, const int32_t*,     \
                       const S*, const std::vector<Ffn<S>>&, const Ffn<S>&, int64_t, S*,          \
                       spec::MoeAccum, Hidden);                                                   \
  template void moe_backward<S>(int64_t, int64_t, int64_t, int64_t, int64_t, const S*,            \
                                const int32_t*, const S*, const std::vector<Ffn<S>>&,             \
                                const Ffn<S>&, int64_t, const S*, S*, S*,                         \
                                const std::vector<FfnGrad<S>>&, FfnGrad<S>);
template void dispatch_rows<uint16_t>(const Dispatch&, int64_t, int64_t, const uint16_t*,
                                      uint16_t*);  // bf16 bits
V3B_INSTANTIATE(float)
V3B_INSTANTIATE(double)

}  // namespace v3b::ref
