// Plain cross-entropy (SPEC 1.29, 3.8), float and double; labels of -100 are ignored.
#pragma once
#include <cstdint>

namespace v3b::ref {

// log sum exp of z [V]; chunked: online over pieces of `chunk` (running maximum and scaled sum).
template <class S>
S logsumexp(int64_t V, const S* z);
template <class S>
S logsumexp_chunked(int64_t V, int64_t chunk, const S* z);

struct CrossEntropySum {
  double nll_sum = 0;  // over the labels that are not -100
  int64_t valid = 0;
  double mean() const { return valid > 0 ? nll_sum / static_cast<double>(valid) : 0.0; }
};

// logits [T,V], labels [T] -> nll [T] (0 where ignored) and lse [T], each may be null.
template <class S>
CrossEntropySum cross_entropy(int64_t T, int64_t V, const S* logits, const int64_t* labels, S* nll,
                              S* lse);

// dz [T,V] = (softmax(z) - onehot) * scale for valid labels, 0 for ignored rows. scale is 1/N_valid
// for the mean, lambda/(D T) for MTP depth k.
template <class S>
void cross_entropy_backward(int64_t T, int64_t V, const S* logits, const int64_t* labels, S scale,
                            S* dz);

// h [T,d] after the final norm, w [V,d]: logits formed `chunk` columns at a time, never as a whole.
// lse [T]; argmax [T] (lowest index among equals), nll [T] and labels may be null. chunk 0: all of
// V.
template <class S>
void lm_head_ce(int64_t T, int64_t d, int64_t V, const S* h, const S* w, const int64_t* labels,
                S* nll, S* lse, int32_t* argmax, int64_t chunk = 0);

}  // namespace v3b::ref
