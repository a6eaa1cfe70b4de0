// Damages of router, dispatch, experts and combine.
#pragma once
#include "tests/broken_kernels.h"

namespace v3b::bench::broken {

inline std::vector<Victim> moe_victims() {
  std::vector<Victim> v;
  v.push_back(
      {"router",
       "T=33,E=16,K=4,G=4,M=2",
       {{.name = "two experts swapped",
         .after = on("idx", [](HostTensor& i) { swap_values(i, 3, 7); })},
        {.name = "bias forgotten", .before = scaled("bias", 0)},
        {.name = "bias part of the weights",
         .after =
             [](const Tensors& t) {
               const HostTensor &idx = tensor(t, "idx"), &bias = tensor(t, "bias");
               HostTensor& w = tensor(t, "weight");
               for (int64_t i = 0; i < w.numel(); ++i)
                 w.set(i, w.get(i) + bias.get(static_cast<int64_t>(idx.get(i))));
             }},
        {.name = "scaling factor forgotten", .after = scaled("weight", 1 / 2.5)},
        {.name = "routes of the next token",
         .after = on("idx", [](HostTensor& i) { rotate(i, 4); })},
        {.name = "one expert twice", .after = on("idx", [](HostTensor& i) { i.set(5, i.get(4)); })},
        {.name = "weights of another order",
         .after = on("weight", [](HostTensor& w) { swap_at(w, 0, 1); })}}});
  for (const char* text : {"T=13,d=37,E=5,K=3,dtype=f32", "T=13,d=40,E=5,K=3,dtype=bf16"}) {
    v.push_back(
        {"moe_dispatch",
         text,
         {{.name = "two experts swapped",
           .before = on("idx", [](HostTensor& i) { swap_values(i, 1, 3); })},
          {.name = "offsets without the first zero", .after = rotated("offsets")},
          {.name = "rows of the next slot", .after = rotated("rows")},
          {.name = "two rows of one expert exchanged",
           .after = on("rows", [](HostTensor& r) { swap_at(r, 0, width(r), width(r)); })},
          {.name = "places exchanged", .after = on("row", [](HostTensor& r) { swap_at(r, 0, 1); })},
          {.name = "tokens off by one", .before = rotated("x")}}});
    v.push_back(
        {"moe_combine",
         text,
         {{.name = "a weight forgotten",
           .before = on("weight", [](HostTensor& w) { w.set(4, 1); })},
          {.name = "a slot forgotten", .before = on("weight", [](HostTensor& w) { w.set(4, 0); })},
          {.name = "all weights forgotten",
           .before = on("weight",
                        [](HostTensor& w) {
                          for (int64_t i = 0; i < w.numel(); ++i)
                            if (!std::isnan(w.get(i))) w.set(i, 1);
                        })},
          {.name = "weights exchanged",
           .before = on("weight", [](HostTensor& w) { swap_at(w, 0, 1); })},
          {.name = "rows exchanged", .before = on("row", [](HostTensor& r) { swap_at(r, 0, 4); })},
          {.name = "reads a dropped slot",
           .before = on("row",
                        [](HostTensor& r) {
                          for (int64_t i = 0; i < r.numel(); ++i)
                            if (r.get(i) < 0) r.set(i, 0);
                        })},
          {.name = "experts of the next token", .before = rotated("row")}}});
  }
  for (const char* text : {"T=9,d=128,m=64,E=8,K=2", "T=9,d=128,m=64,E=8,K=2,dtype=f32,w_dtype=f32",
                           "T=9,d=256,m=128,E=8,K=2,w_dtype=f8e4m3,shared_m=128",
                           "T=9,d=256,m=128,E=8,K=2,w_dtype=f8e4m3,shared_m=128,dtype=f8e4m3"})
    v.push_back({"moe_experts",
                 text,
                 {{.name = "two experts swapped",
                   .before = on("idx",
                                [](HostTensor& idx) {
                                  double other = idx.get(0);
                                  for (int64_t i = 0; i < idx.numel() && other == idx.get(0); ++i)
                                    other = idx.get(i);
                                  swap_values(idx, idx.get(0), other);
                                })},
                  {.name = "a routing weight doubled",
                   .before = on("weight", [](HostTensor& w) { w.set(0, 2 * w.get(0)); })},
                  {.name = "a routing weight 10% off",
                   .before = on("weight", [](HostTensor& w) { w.set(1, 1.1 * w.get(1)); })},
                  {.name = "weights of the slots exchanged",
                   .before = on("weight", [](HostTensor& w) { swap_at(w, 0, 1); })},
                  {.name = "last input channel left out",
                   .before = on("x",
                                [](HostTensor& x) {
                                  for (int64_t i = width(x) - 1; i < x.numel(); i += width(x))
                                    x.set(i, 0);
                                })},
                  {.name = "token of the next row", .before = rotated("x")},
                  {.name = "gate and up exchanged", .before = [](const Tensors& t) {
                     HostTensor &g = tensor(t, "gate"), &u = tensor(t, "up");
                     std::vector<char> a(static_cast<size_t>(g.bytes()));
                     std::memcpy(a.data(), g.data(), a.size());
                     std::memcpy(g.data(), u.data(), a.size());
                     std::memcpy(u.data(), a.data(), a.size());
                   }}}});
  v.push_back({"moe_experts",
               "T=9,d=256,m=256,E=8,K=2,w_dtype=f8e4m3,shared_m=256,dtype=f8e4m3",
               {{.name = "activation scales of the next row", .before = rotated("x_scale")},
                {.name = "activation scales of the next block",
                 .before = on("x_scale", [](HostTensor& s) { rotate(s, 1); })},
                {.name = "one activation scale for a row",
                 .before = on("x_scale",
                              [](HostTensor& s) {
                                for (int64_t i = 0; i < s.numel(); ++i)
                                  s.set(i, s.get(i / width(s) * width(s)));
                              })},
                {.name = "weight scales of the next block",
                 .before = on("gate_scale", [](HostTensor& s) { rotate(s, 1); })},
                {.name = "down's scales transposed",
                 .before = on("down_scale", [](HostTensor& s) { swap_at(s, 1, 2); })},
                {.name = "shared expert's scales of the next block",
                 .before = on("shared_up_scale", [](HostTensor& s) { rotate(s, 1); })}}});
  return v;
}

}  // namespace v3b::bench::broken
