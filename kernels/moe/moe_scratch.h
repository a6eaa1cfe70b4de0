// Scratch and dispatch plan shared by the expert kernels. Internal to kernels/moe.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/core/buffer.h"
#include "kernels/core/team.h"
#include "kernels/moe/moe.h"

namespace v3b::kern {

// Plan and memory of one call on packed experts (moe_experts.cpu_packed.cpp).
struct PackedPlan {
  struct Job {            // one chosen expert, the shared one (its index is E) last
    int64_t expert, m;    // m: width of its hidden layer
    int64_t first, rows;  // its rows in `slot`; the shared expert has no slots: first = -1
  };
  struct Block {                   // some rows of a job, packed together
    int64_t job, r0, rows, chunk;  // chunk: of tokens, in phase 2
    int64_t token0;  // its tokens follow one another from here on; -1: look in `token`
    int64_t x_at, hidden_at, packed_at;  // dwords, elements, dwords
  };
  struct Unit {  // groups of 16 outputs [g0, g1) of a block's hidden rows, or of a chunk's outputs
    int32_t of, g0, g1;
  };
  struct Pack {  // rows [r0, r1) of a block's input
    int32_t block, r0, r1;
  };
  std::vector<Job> jobs;
  std::vector<Block> blocks;
  std::vector<Unit> hidden_units, output_units;
  std::vector<int32_t> order, token, left;  // left: hidden units that a block still waits for
  std::vector<int64_t> job_units;           // [jobs + 1]: first unit of a job
  std::vector<Pack> packs;
  std::vector<int64_t> order_begin;  // [threads + 1]: each thread's hidden units in `order`
  Buffer<uint32_t> x, hidden_packed;
  Buffer<std::byte> hidden, per_thread;
};

struct MoeScratch::Impl {
  // One chosen expert, or the shared expert as the last job (it takes every token once, weight 1).
  struct Job {
    const spec::FfnPointers* w;
    int64_t m;            // width of its hidden layer
    int64_t first, rows;  // its rows in `slot`; the shared expert has no slots: first = -1
    bool few = true;      // row-major rows and dot products, else packed rows and strips
    const std::byte* a =
        nullptr;               // few: [rows, lda] input rows, in x itself where they lie together
    int64_t hidden_at = 0;     // element (packed: dword) offset of its hidden rows
    int64_t packed_at = 0;     // dword offset of its packed input rows
    bool rows_packed = false;  // few: rows in the order of MoeProduct::packs()
    int64_t gather_at = -1;    // few: byte offset of its copied input rows; -1: none
    bool packs = false;        // whether it has these packed, or shares another job's
    int64_t token0 = 0;        // its tokens are token0, token0 + 1, ...; -1: look in `token`
  };
  struct Unit {  // columns [n0, n1) of a job's hidden layer, rows [r0, r1)
    int32_t job, n0, n1, r0, r1;
  };

  std::vector<int64_t> offsets, next,
      slot;  // [E+1], [E], [rows]: rows sorted by expert, stable in t*K+k
  std::vector<Job> jobs;
  std::vector<Unit> units, packs, gathers;  // packs: groups of 16 rows [r0, r1) of a job's input
  std::vector<int32_t> token;               // of a slot, where jobs are packed
  Buffer<std::byte> x_copy;  // x with another row stride or type, where the products need it
  Buffer<std::byte> gathered, hidden;        // gathered input rows; SwiGLU results
  Buffer<uint32_t> packed_x, packed_hidden;  // the same of jobs with many rows
  Buffer<std::byte> per_thread;
  Buffer<float> ones, gate, up, out, sum;
  PackedPlan packed;

  void plan(int64_t T, int64_t K, int64_t E, const int32_t* idx);
};

// Threads for all jobs of a call; where this says one, every product in it is smaller still. Narrow products, SwiGLU and
// scattered rows: the experts run at about half the rate of one product.
template <class Job>
int experts_team(const spec::MoeExpertsArgs& a, const std::vector<Job>& jobs) {
  constexpr double kExpertFactor = 2;
  double bytes = 0, flop = 0;
  for (const Job& j : jobs) {
    const double weights = 3.0 * static_cast<double>(a.d) * static_cast<double>(j.m);
    bytes += weights * static_cast<double>(spec::dtype_bytes(a.w_dtype));
    bytes += static_cast<double>(j.rows) * static_cast<double>(a.d + 3 * j.m) * 4;
    flop += 2 * weights * static_cast<double>(j.rows);
  }
  return team_for(kExpertFactor * bytes, kExpertFactor * flop);
}

}  // namespace v3b::kern
