// Scratch and dispatch plan shared by the expert kernels. Internal to kernels/moe.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/core/buffer.h"
#include "kernels/moe/moe.h"

namespace v3b::kern {

struct MoeScratch::Impl {
  // One chosen expert, or the shared expert as the last job (it takes every token once, weight 1).
  struct Job {
    const spec::FfnPointers* w;
    int64_t m;            // width of its hidden layer
    int64_t first, rows;  // its rows in `slot`; the shared expert has no slots: first = -1
    const std::byte* a;   // [rows, lda] input rows: in x itself where they lie one after another
    int64_t hidden_at;    // element offset of its hidden rows
  };
  struct Unit {  // columns [n0, n1) of a job's hidden layer, rows [r0, r1)
    int32_t job, n0, n1, r0, r1;
  };

  std::vector<int64_t> offsets, next,
      slot;  // [E+1], [E], [rows]: rows sorted by expert, stable in t*K+k
  std::vector<Job> jobs;
  std::vector<Unit> units;
  Buffer<std::byte> x_copy;  // x with another row stride or type, where the products need it
  Buffer<std::byte> gathered, hidden;  // gathered input rows; SwiGLU results
  Buffer<std::byte> per_thread;
  Buffer<float> ones, gate, up, out, sum;

  void plan(int64_t T, int64_t K, int64_t E, const int32_t* idx);
};

}  // namespace v3b::kern
