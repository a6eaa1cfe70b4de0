// Damages of the whole passes and of speculative acceptance.
#pragma once
#include "tests/broken_kernels.h"

namespace v3b::bench::broken {

// Another token at place i of every sequence: what a wrong cache row, position or shift comes to.
inline Change other_token(int64_t i) {
  return on("ids", [=](HostTensor& ids) {
    const int64_t n = width(ids);
    for (int64_t b = 0; b < ids.numel(); b += n)
      ids.set(b + (i + n) % n, ids.get(b + (i + n) % n) == 0 ? 1 : ids.get(b + (i + n) % n) - 1);
  });
}

inline std::vector<Damage> forward_damages() {
  return {{.name = "oldest token of the context wrong", .before = other_token(0)},
          {.name = "a middle token of the context wrong", .before = other_token(7)},
          {.name = "last token wrong", .before = other_token(-1)},
          {.name = "two neighbours of the context exchanged",
           .before = on("ids", [](HostTensor& ids) { swap_at(ids, 3, 4); })},
          {.name = "tokens shifted by one",
           .before = on("ids",
                        [](HostTensor& ids) {
                          const auto old = ids.to_doubles();
                          const int64_t n = width(ids);
                          for (int64_t i = 0; i < ids.numel(); ++i)
                            ids.set(i, old[static_cast<size_t>(i / n * n + (i + 1) % n)]);
                        })},
          {.name = "hidden states of other rows",
           .after = rotated("hidden"),
           .may_change_nothing = true},
          {.name = "hidden states 3% large", .after = scaled("hidden", 1.03)},
          {.name = "logits 3% large", .after = scaled("logits", 1.03)},
          {.name = "another expert",
           .after = on("routes",
                       [](HostTensor& r) {  // K = 2
                         double other = 0;
                         while (other == r.get(0) || other == r.get(1)) ++other;
                         r.set(0, other);
                       })},
          {.name = "one expert twice",
           .after = on("routes", [](HostTensor& r) { r.set(1, r.get(0)); })}};
}

inline std::vector<Victim> forward_victims() {
  std::vector<Victim> v;
  // A small model, so that its reference takes a moment.
  const std::string model =
      ",L=3,L_d=1,d=96,n_h=4,d_n=16,d_r=8,d_v=16,d_q=48,d_c=32,f=128,m=48,E=8,K=2,G=4,M=2,V=211,";
  for (const char* dtype : {"dtype=f32", "dtype=bf16"}) {
    v.push_back({"forward_prefill", "B=2,T=21,s0=12" + model + dtype, forward_damages()});
    v.push_back({"forward_decode", "B=2,T=1,s0=24" + model + dtype, forward_damages()});
    v.push_back({"mtp_module", "B=1,T=5,s0=16" + model + dtype, forward_damages()});
  }
  return v;
}

inline std::vector<Victim> acceptance_victims() {
  const auto too_many = [](const Tensors& t) {
    HostTensor &n = tensor(t, "accepted"), &out = tensor(t, "tokens");
    const HostTensor& draft = tensor(t, "draft");
    const int64_t gamma = width(draft);
    for (int64_t b = 0; b < n.numel(); ++b) {
      const auto k = static_cast<int64_t>(n.get(b));
      if (k == gamma) continue;
      out.set(b * (gamma + 1) + k, draft.get(b * gamma + k));
      n.set(b, static_cast<double>(k + 1));
      return;  // one sequence
    }
  };
  const auto no_resampling = [](const Tensors& t) {  // the rejected draft comes out after all
    const HostTensor &n = tensor(t, "accepted"), &draft = tensor(t, "draft");
    HostTensor& out = tensor(t, "tokens");
    const int64_t gamma = width(draft);
    for (int64_t b = 0; b < n.numel(); ++b) {
      const auto k = static_cast<int64_t>(n.get(b));
      if (k < gamma) out.set(b * (gamma + 1) + k, draft.get(b * gamma + k));
    }
  };
  const std::vector<Damage> common{
      {.name = "accepts one draft too many", .after = too_many},
      {.name = "emits the rejected draft", .after = no_resampling},
      {.name = "drafts of the next sequence", .before = rotated("draft")},
      {.name = "probabilities of the row before",
       .before = on("p",
                    [](HostTensor& p) {
                      const auto old = p.to_doubles();
                      for (int64_t i = width(p); i < p.numel(); ++i)
                        p.set(i, old[static_cast<size_t>(i - width(p))]);
                    })},
      {.name = "accepts nothing", .after = on("accepted", [](HostTensor& n) { scale_by(n, 0); })},
      {.name = "accepts without looking", .after = on("accepted", [](HostTensor& n) {
                                            for (int64_t b = 0; b < n.numel(); ++b) n.set(b, 2);
                                          })}};
  std::vector<Damage> sampled = common;
  sampled.push_back({.name = "draft probabilities of the row before", .before = rotated("q")});
  sampled.push_back({.name = "draft probabilities halved", .before = scaled("q", 0.5)});
  sampled.push_back({.name = "random numbers of the next sequence", .before = rotated("uniform")});
  sampled.push_back({.name = "accepts too readily", .before = scaled("uniform", 0.8)});
  return {{"mtp_accept", "B=57,gamma=3,V=13", sampled},
          {"mtp_accept", "B=57,gamma=3,V=37,greedy=1", common}};
}

}  // namespace v3b::bench::broken
