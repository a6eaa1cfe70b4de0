// Damages of the plain blocks: norms, RoPE, products, quantisation, embedding, the output head.
#pragma once
#include "reference/spec/lm_head_ce.h"
#include "tests/broken_kernels.h"

namespace v3b::bench::broken {

// Half of the codes one step nearer to zero, as truncation leaves them.
inline void cut_codes(HostTensor& codes) {
  for (int64_t i = 0; i < codes.numel(); i += 2) {
    uint8_t& q = codes.as<uint8_t>()[i];
    if ((q & 0x7f) != 0) --q;
  }
}

inline std::vector<Victim> block_victims() {
  std::vector<Victim> v;
  v.push_back({"rmsnorm",
               "T=5,d=130,residual=1,dtype=bf16",
               {{.name = "weights off by one", .before = rotated("w")},
                {.name = "residual not stored", .after = [](const Tensors& t) {
                   std::memcpy(tensor(t, "r").data(), tensor(t, "r_in").data(),
                               static_cast<size_t>(tensor(t, "r").bytes()));
                 }}}});
  v.push_back({"rmsnorm",
               "T=5,d=384,quant=1,dtype=bf16",
               {{.name = "weights off by one", .before = rotated("w")},
                {.name = "scale of the next block", .after = rotated("scales")},
                {.name = "scale of amax over 224",
                 .after = on("scales", [](HostTensor& s) { scale_by(s, 2); })},
                {.name = "codes cut off instead of rounded", .after = on("codes", cut_codes)}}});
  v.push_back({"rope",
               "T=7,n_h=3,d_r=64,dtype=bf16",
               {{.name = "RoPE off by one", .before = rotated("positions")},
                {.name = "rotates the other way", .before = scaled("sin", -1)}}});
  v.push_back({"swiglu",
               "T=5,m=129,dtype=bf16",
               {{.name = "gate and up exchanged", .before = on("gate_up", [](HostTensor& x) {
                                                    const int64_t n = width(x), m = n / 2;
                                                    for (int64_t at = 0; at < x.numel(); at += n)
                                                      swap_at(x, at, at + m, m);
                                                  })}}});
  v.push_back({"swiglu",
               "T=5,m=384,quant=1,dtype=bf16",
               {{.name = "scale of the next block", .after = rotated("scales")},
                {.name = "scale of amax over 224",
                 .after = on("scales", [](HostTensor& s) { scale_by(s, 2); })},
                {.name = "codes cut off instead of rounded", .after = on("codes", cut_codes)}}});
  v.push_back({"softmax",
               "T=5,n=37,dtype=f32",
               {{.name = "scale forgotten", .before = scaled("x", 2)},
                {.name = "last column left out of the sum",
                 .before = on("x", [](HostTensor& x) { x.set(x.numel() - 1, -1e9); })}}});
  v.push_back({"gemm",
               "m=5,n=48,k=64",
               {{.name = "last k dropped", .before = on("b", [](HostTensor& b) {
                                             const int64_t k = b.shape()[1];  // [n, k]
                                             for (int64_t r = 0; r < b.shape()[0]; ++r)
                                               b.set(r * k + k - 1, 0);
                                           })}}});
  v.push_back({"mla_absorb",
               "T=5,n_h=3,n=48,k=64",
               {{.name = "weights of the next head",
                 .before = on("w", [](HostTensor& w) { rotate(w, w.shape()[1] * w.shape()[2]); })},
                {.name = "query of the next head",
                 .before = on("x", [](HostTensor& x) { rotate(x, width(x)); })},
                {.name = "last k dropped", .before = on("w", [](HostTensor& w) {
                                             for (int64_t i = width(w) - 1; i < w.numel();
                                                  i += width(w))
                                               w.set(i, 0);
                                           })}}});
  v.push_back({"fp8_gemm",
               "m=5,n=256,k=256",
               {{.name = "scale transposed", .before = on("sb", transpose_square)},
                {.name = "activation scale of the neighbour",
                 .before = on("sa", [](HostTensor& s) { swap_at(s, 0, 1); })}}});
  v.push_back({"fp8_quant",
               "rows=256,cols=256,weight=1",
               {{.name = "scale transposed", .after = on("scales", transpose_square)},
                {.name = "one code off by one",
                 .after = on("codes", [](HostTensor& c) { c.as<uint8_t>()[ordinary(c)] ^= 1; })}}});
  v.push_back({"embedding",
               "T=5,d=37,V=11,dtype=f32",
               {{.name = "row of the next token", .before = rotated("ids")},
                {.name = "table off by one row", .before = rotated("table")},
                {.name = "one element from the next row", .after = [](const Tensors& t) {
                   HostTensor& y = tensor(t, "y");
                   y.set(0, tensor(t, "table").get(0) == y.get(0) ? 1 : tensor(t, "table").get(0));
                 }}}});
  for (const char* text : {"T=9,d=64,V=301,dtype=f32", "T=9,d=64,V=301,dtype=bf16"})
    v.push_back({"lm_head_ce",
                 text,
                 {{.name = "labels not shifted", .before = rotated("labels")},
                  {.name = "ignored labels counted",
                   .before = on("labels",
                                [](HostTensor& l) {
                                  for (int64_t i = 0; i < l.numel(); ++i)
                                    if (l.get(i) == spec::kIgnoreLabel) l.set(i, 0);
                                })},
                  {.name = "last vocabulary entry left out",
                   .before = on("w",
                                [](HostTensor& w) {
                                  for (int64_t i = w.numel() - width(w); i < w.numel(); ++i)
                                    w.set(i, 0);
                                })},
                  {.name = "last feature left out",
                   .before = on("h",
                                [](HostTensor& h) {
                                  const int64_t d = width(h);
                                  for (int64_t i = d - 1; i < h.numel(); i += d) h.set(i, 0);
                                })},
                  {.name = "loss and lse exchanged", .after = [](const Tensors& t) {
                     HostTensor &a = tensor(t, "nll"), &b = tensor(t, "lse");
                     for (int64_t i = 0; i < a.numel(); ++i) {
                       const double x = a.get(i);
                       a.set(i, b.get(i));
                       b.set(i, x);
                     }
                   }}}});
  v.push_back(
      {"topk_backward",
       "T=7,E=13,K=3",
       {{.name = "last choice forgotten",
         .before = on("idx", [](HostTensor& i) { i.set(i.numel() - 1, i.get(i.numel() - 2)); })},
        {.name = "routes of the next token", .before = rotated("idx")},
        {.name = "expert off by one",
         .before = on("idx",
                      [](HostTensor& i) {
                        for (int64_t j = 0; j < i.numel(); ++j)
                          i.set(j, std::fmod(i.get(j) + 1, 13));
                      })},
        {.name = "straight through where it should not", .after = [](const Tensors& t) {
           std::memcpy(tensor(t, "ds").data(), tensor(t, "dy").data(),
                       static_cast<size_t>(tensor(t, "ds").bytes()));
         }}}});
  v.push_back({"topk_backward",
               "T=7,E=13,K=3,ste=1",
               {{.name = "only the chosen get a gradient", .after = [](const Tensors& t) {
                   HostTensor& ds = tensor(t, "ds");
                   const HostTensor& idx = tensor(t, "idx");
                   const int64_t E = width(ds), K = width(idx);
                   for (int64_t i = 0; i < ds.numel(); ++i) {
                     const int64_t row = i / E;
                     bool chosen = false;
                     for (int64_t k = 0; k < K; ++k)
                       chosen |= idx.get(row * K + k) == static_cast<double>(i % E);
                     if (!chosen) ds.set(i, 0);
                   }
                 }}}});
  return v;
}

}  // namespace v3b::bench::broken
