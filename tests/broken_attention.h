// Damages of the attention ops: masks, lengths, heads, pages, mscale, RoPE parts.
#pragma once
#include "bench/ops/attention_common.h"
#include "tests/broken_kernels.h"

namespace v3b::bench::broken {

// What an attention kernel may get wrong, as plain loops: o and lse of every query anew.
struct PlainAttention {
  int64_t s0 = 0, n_kv = 1;
  int64_t future = 0;        // keys after the query itself that are seen
  int64_t past = 0;          // first key seen
  bool interleaved = false;  // head h reads key head h % n_kv instead of h / (n_h / n_kv)
  double scale = 1;          // factor on the right scale

  void operator()(const Tensors& t) const {
    const HostTensor &q = tensor(t, "q"), &k = tensor(t, "k"), &v = tensor(t, "v");
    HostTensor &o = tensor(t, "o"), &lse = tensor(t, "lse");
    const int64_t T = q.shape()[0], n_h = q.shape()[1], d = width(q), dv = width(v),
                  keys = k.shape()[0];
    for (int64_t i = 0; i < T; ++i)
      for (int64_t h = 0; h < n_h; ++h) {
        const int64_t g = interleaved ? h % n_kv : h / (n_h / n_kv),
                      end = std::min(keys, s0 + i + 1 + future);
        std::vector<double> p, sum(static_cast<size_t>(dv), 0.0);
        double total = 0;
        for (int64_t j = past; j < end; ++j) {
          double s = 0;
          for (int64_t c = 0; c < d; ++c)
            s += q.get((i * n_h + h) * d + c) * k.get((j * n_kv + g) * d + c);
          p.push_back(std::exp(s * scale * attention_scale(d)));
          total += p.back();
        }
        for (int64_t j = past; j < end; ++j)
          for (int64_t c = 0; c < dv; ++c)
            sum[static_cast<size_t>(c)] +=
                p[static_cast<size_t>(j - past)] / total * v.get((j * n_kv + g) * dv + c);
        lse.set(i * n_h + h, std::log(total));
        for (int64_t c = 0; c < dv; ++c) o.set((i * n_h + h) * dv + c, sum[static_cast<size_t>(c)]);
      }
  }
};

inline constexpr double kMscale2 = 1.3688879454 * 1.3688879454;  // V3: (0.1 ln 40 + 1)^2

// Rows [a, a + n) and [b, b + n) exchanged.
inline Change swap_rows(const char* name, int64_t a, int64_t b, int64_t n = 1) {
  return on(name, [=](HostTensor& t) { swap_at(t, a * width(t), b * width(t), n * width(t)); });
}
inline Change both(Change f, Change g) {
  return [f = std::move(f), g = std::move(g)](const Tensors& t) {
    f(t);
    g(t);
  };
}

inline std::vector<Victim> attention_victims() {
  std::vector<Victim> v;
  for (const char* dtype : {"f32", "bf16"}) {
    const std::string end = std::string(",dtype=") + dtype;
    v.push_back(
        {"attention_prefill",
         "T=33,s0=5,n_h=6,n_kv=2,d_qk=24,d_v=16" + end,
         {{.name = "sees one future token",
           .after = PlainAttention{.s0 = 5, .n_kv = 2, .future = 1}},
          {.name = "misses itself", .after = PlainAttention{.s0 = 5, .n_kv = 2, .future = -1}},
          {.name = "misses the oldest key", .after = PlainAttention{.s0 = 5, .n_kv = 2, .past = 1}},
          {.name = "offset of the context forgotten", .after = PlainAttention{.s0 = 0, .n_kv = 2}},
          {.name = "groups of heads interleaved",
           .after = PlainAttention{.s0 = 5, .n_kv = 2, .interleaved = true}},
          {.name = "scale 1% off", .after = PlainAttention{.s0 = 5, .n_kv = 2, .scale = 1.01}},
          {.name = "two value rows exchanged", .before = swap_rows("v", 0, 2)}}});
    v.push_back({"attention_prefill",
                 "T=9,s0=4,n_h=2,n_kv=2,d_qk=192,d_v=16" + end,
                 {{.name = "mscale forgotten",
                   .after = PlainAttention{.s0 = 4, .n_kv = 2, .scale = 1 / kMscale2}}}});
    constexpr int64_t kRows = 73;  // of one head's cache: s + 3 spare ones
    v.push_back({"attention_decode",
                 "B=2,s=70,min_s=41,n_h=6,n_kv=2,d_qk=192,d_v=17" + end,
                 {{.name = "mscale forgotten", .before = scaled("q", 1 / kMscale2)},
                  {.name = "reads a NaN row past the length", .before = add_at("seqlens", 0, 1)},
                  {.name = "one row too few", .before = add_at("seqlens", 1, -1)},
                  {.name = "lengths exchanged", .before = rotated("seqlens")},
                  {.name = "misses the oldest key",
                   .before = on("k",
                                [](HostTensor& k) {
                                  for (int64_t i = 0; i < width(k); ++i) k.set(i, -1e3);
                                })},
                  {.name = "key heads exchanged", .before = swap_rows("k", 0, kRows, kRows)},
                  {.name = "value heads exchanged", .before = swap_rows("v", 0, kRows, kRows)},
                  {.name = "query heads exchanged", .before = swap_rows("q", 2, 3)},
                  {.name = "two value rows exchanged", .before = swap_rows("v", 3, 4)}}});
    v.push_back({"mla_prefill",
                 "T=17,s0=6,n_h=2,d_n=128,d_r=64,d_v=24,d_c=48" + end,
                 {{.name = "mscale forgotten", .before = scaled("q", 1 / kMscale2)},
                  {.name = "RoPE part of the keys forgotten", .before = scaled("k_pe", 0)},
                  {.name = "RoPE part of the next key", .before = rotated("k_pe")},
                  {.name = "mask off by one", .before = both(rotated("c"), rotated("k_pe"))},
                  {.name = "latent of the next key", .before = rotated("c")},
                  {.name = "last latent channel dropped",
                   .before = on("c",
                                [](HostTensor& c) {
                                  for (int64_t i = width(c) - 1; i < c.numel(); i += width(c))
                                    c.set(i, 0);
                                })},
                  {.name = "heads exchanged in kv_b", .before = swap_rows("w_kvb", 0, 152, 152)},
                  {.name = "values before keys in kv_b", .before = swap_rows("w_kvb", 0, 128, 24)},
                  {.name = "query heads exchanged", .before = on("q", [](HostTensor& q) {
                                                      const int64_t d = width(q);
                                                      for (int64_t t = 0; t < q.shape()[0]; ++t)
                                                        swap_at(q, 2 * t * d, (2 * t + 1) * d, d);
                                                    })}}});
  }
  v.push_back({"mla_decode",
               "B=2,s=70,s_q=1,n_h=4,d_c=512,d_r=64",
               {{.name = "mscale forgotten", .before = scaled("q", 1 / kMscale2)},
                {.name = "reads a NaN row past the length", .before = add_at("seqlens", 0, 1)},
                {.name = "one row too few", .before = add_at("seqlens", 0, -1)},
                {.name = "pages exchanged",
                 .before = on("block_table", [](HostTensor& t) {
                   swap_at(t, 0, width(t));  // the first pages of the two sequences
                 })}}});
  v.push_back({"mla_decode",
               "B=2,s=70,s_q=2,n_h=4,d_c=512,d_r=64,kv_format=fp8_656_pow2",
               {{.name = "reads a NaN row past the length", .before = add_at("seqlens", 0, 1)},
                {.name = "one row too few", .before = add_at("seqlens", 0, -1)},
                {.name = "query tokens exchanged", .before = on("q", [](HostTensor& q) {
                                                     const int64_t n = 4 * width(q);
                                                     swap_at(q, 0, n, n);
                                                   })}}});
  for (const char* text : {"T=40,d_c=128,d_r=64,page=16,kv_format=bf16,rope=1",
                           "T=40,d_c=128,d_r=64,page=16,kv_format=fp8_656_pow2,rope=1"})
    v.push_back({"mla_cache_write",
                 text,
                 {{.name = "RoPE off by one", .before = rotated("positions")},
                  {.name = "rotates the other way", .before = scaled("sin", -1)},
                  {.name = "RoPE part of the next token", .before = rotated("k_pe")}}});
  for (const char* text : {"T=40,d_c=160,d_r=10,page=16,kv_format=bf16,dtype=bf16",
                           "T=40,d_c=160,d_r=10,page=16,kv_format=fp8_656_pow2,dtype=bf16",
                           "T=40,d_c=160,d_r=10,page=16,kv_format=fp8_656_free,dtype=f32"})
    v.push_back(
        {"mla_cache_write",
         text,
         {{.name = "slots of the next token", .before = rotated("slots")},
          {.name = "one slot off by one",
           .before =
               on("slots", [](HostTensor& s) { s.set(5, s.get(5) + (s.get(5) < 70 ? 1 : -1)); })},
          {.name = "writes a token without a slot",
           .before = on("slots",
                        [](HostTensor& s) {
                          for (int64_t i = 0; i < s.numel(); ++i)
                            if (s.get(i) < 0) s.set(i, s.get(0));
                        })},
          {.name = "leaves the last token out",
           .before = on("slots", [](HostTensor& s) { s.set(s.numel() - 1, -1); })},
          {.name = "RoPE part of the next token", .before = rotated("k_pe")},
          {.name = "amax of one tile too small", .before = on("c", [](HostTensor& c) {
                                                   const int64_t i = ordinary(c);
                                                   c.set(i, c.get(i) / 2);
                                                 })}}});
  return v;
}

}  // namespace v3b::bench::broken
