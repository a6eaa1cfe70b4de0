#include "reference/embedding.h"

#include <string>

#include "model/error.h"

namespace v3b::ref {

namespace {

void check_id(int64_t t, int32_t id, int64_t V) {
  if (id < 0 || id >= V)
    throw Error(ExitCode::bad_input, "token id out of range", "position " + std::to_string(t),
                "0 <= id < " + std::to_string(V), std::to_string(id));
}

}  // namespace

template <class S>
void embedding(int64_t T, int64_t d, int64_t V, const int32_t* ids, const S* table, S* y) {
  for (int64_t t = 0; t < T; ++t) {
    check_id(t, ids[t], V);
    for (int64_t i = 0; i < d; ++i) y[t * d + i] = table[ids[t] * d + i];
  }
}

template <class S>
void embedding_part(int64_t T, int64_t d, int64_t V, int64_t first_row, int64_t rows,
                    const int32_t* ids, const S* part, S* y) {
  for (int64_t t = 0; t < T; ++t) {
    check_id(t, ids[t], V);
    const int64_t r = ids[t] - first_row;
    const bool here = r >= 0 && r < rows;
    for (int64_t i = 0; i < d; ++i) y[t * d + i] = here ? part[r * d + i] : S(0);
  }
}

template <class S>
void embedding_backward(int64_t T, int64_t d, const int32_t* ids, const S* dy, S* d_table) {
  for (int64_t t = 0; t < T; ++t)
    for (int64_t i = 0; i < d; ++i) d_table[ids[t] * d + i] += dy[t * d + i];
}

#define V3B_INSTANTIATE(S)                                                                     \
  template void embedding<S>(int64_t, int64_t, int64_t, const int32_t*, const S*, S*);         \
  template void embedding_part<S>(int64_t, int64_t, int64_t, int64_t, int64_t, const int32_t*, \
                                  const S*, S*);                                               \
  template void embedding_backward<S>(int64_t, int64_t, const int32_t*, const S*, S*);
V3B_INSTANTIATE(float)
V3B_INSTANTIATE(double)

}  // namespace v3b::ref
