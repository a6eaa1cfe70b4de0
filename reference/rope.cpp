#include "reference/rope.h"

#include <cmath>
#include <vector>

namespace v3b::ref {

template <class S>
void rope_table(const model::RopeFreqs& f, int64_t first, int64_t positions, S* cos, S* sin) {
  const int64_t half = static_cast<int64_t>(f.inv_freq.size());
  for (int64_t p = 0; p < positions; ++p) {
    for (int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(first + p) * f.inv_freq[static_cast<size_t>(i)];
      cos[p * half + i] = static_cast<S>(std::cos(angle) * f.cos_sin_multiplier);
      sin[p * half + i] = static_cast<S>(std::sin(angle) * f.cos_sin_multiplier);
    }
  }
}

template <class S>
void rope(int64_t T, int64_t n_h, int64_t d_r, spec::RopeForm form, bool inverse, const S* x,
          const S* cos, const S* sin, S* y) {
  using spec::RopeForm;
  const int64_t half = d_r / 2;
  const bool in_pairs =
      form == RopeForm::interleaved || (form == RopeForm::interleaved_to_half && !inverse);
  const bool out_pairs =
      form == RopeForm::interleaved || (form == RopeForm::interleaved_to_half && inverse);
  std::vector<S> out(static_cast<size_t>(d_r));
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t h = 0; h < n_h; ++h) {
      const S* xs = x + (t * n_h + h) * d_r;
      for (int64_t i = 0; i < half; ++i) {
        const S a = in_pairs ? xs[2 * i] : xs[i], b = in_pairs ? xs[2 * i + 1] : xs[half + i];
        const S c = cos[t * half + i], s = inverse ? -sin[t * half + i] : sin[t * half + i];
        out[static_cast<size_t>(out_pairs ? 2 * i : i)] = a * c - b * s;
        out[static_cast<size_t>(out_pairs ? 2 * i + 1 : half + i)] = a * s + b * c;
      }
      for (int64_t i = 0; i < d_r; ++i) y[(t * n_h + h) * d_r + i] = out[static_cast<size_t>(i)];
    }
  }
}

#define V3B_INSTANTIATE(S)                                                                   \
  template void rope_table<S>(const model::RopeFreqs&, int64_t, int64_t, S*, S*);            \
  template void rope<S>(int64_t, int64_t, int64_t, spec::RopeForm, bool, const S*, const S*, \
                        const S*, S*);
V3B_INSTANTIATE(float)
V3B_INSTANTIATE(double)

}  // namespace v3b::ref
