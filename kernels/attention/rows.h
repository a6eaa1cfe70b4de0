// Inside of the CPU attention kernels: "rows against keys". A row is one query of one head; the
// rows of a task share their keys (all heads of MLA decode, a group of GQA, a block of queries of
// one head in prefill).
//
// Idea. Scores are computed transposed, S^T[key][row], with rows along the SIMD lanes: keys are
// broadcast from memory, q lies packed [d/2][row][2] (bf16 pairs; [d][row] in f32). Softmax then
// works lane by lane with no horizontal step. P is stored as pairs of keys [key/2][row][2] and
// multiplied onto V packed [key/2][d_v][2], so both products are the same register tile: C[m][lane]
// (+)= sum_k A[m][k] B[k][lane] over 32-bit units that are a float or a bf16 pair. Each block of
// keys is fetched (and dequantised) once for all rows. Cost of a task: 2 R (d_qk + d_v) FLOP a key;
// bytes: a key row once, q and o once.
#pragma once
#include <cstdint>

#include "reference/spec/dtype.h"
#include "reference/spec/flags.h"

namespace v3b::kern {

constexpr int64_t kMaxRows = 256;   // rows of a task: q and o tiles stay in L2
constexpr int64_t kKeyBlock = 128;  // keys taken at once: scores of 64 rows are 32 KiB

// Where key j lies: row index j, or table[j / page] * page + j % page.
struct KeySource {
  const uint8_t* k1 = nullptr;  // first d1 elements of the key
  const uint8_t* k2 = nullptr;  // the other d2 (MLA's shared rope key), or null with d2 = 0
  const uint8_t* v = nullptr;  // rows without a table; null: V is the first d_v elements of the key
  int64_t k1_stride = 0, k2_stride = 0, v_stride = 0;  // bytes between rows
  int64_t d1 = 0, d2 = 0;
  const int32_t* table = nullptr;
  int64_t page = 1;
  bool record = false;  // k1 is the FP8 record of d1 codes and d2 rope values (SPEC 1.9)
};

struct RowsTask {
  int64_t R = 0;      // rows, <= kMaxRows
  int64_t inner = 1;  // row r = (i, g): i = r / inner (query), g = r % inner (head)
  int64_t d_qk = 0, d_v = 0;
  float scale = 1;
  spec::DType dtype = spec::DType::bf16;  // of q, o, keys: f32 or bf16
  spec::EmptyLse empty_lse = spec::EmptyLse::pos_inf;
  const void* q = nullptr;  // element strides of i and g below
  void* o = nullptr;
  float* lse = nullptr;  // or null
  int64_t q_outer = 0, q_inner = 0, o_outer = 0, o_inner = 0, lse_outer = 0, lse_inner = 0;
  KeySource keys;
  int64_t lim0 = 0;        // row (i, g) sees keys j < lim0 + i
  int64_t j0 = 0, j1 = 0;  // this task's share of them
  // If set, the un-normalised result goes here instead of o and lse: [R, d_v], max (log2 domain)
  // and sum.
  float* part_o = nullptr;
  float* part_m = nullptr;
  float* part_l = nullptr;
};

// Bytes that will be read later: fetched into the cache line by line while a product runs, so that memory works
// behind the arithmetic.
struct Ahead {
  const void* p = nullptr;
  int64_t bytes = 0;
};

// C[m][n] = (c_scale ? c_scale[m] * C[m][n] : 0) + sum_k A[m][k] B[k][n] for M rows and nv vectors
// of lanes. A: 32-bit units at byte strides a_m, a_k. B: [K][nv * lanes] units.
using TileFn = void (*)(int64_t M, const void* a, int64_t a_m, int64_t a_k, const void* b,
                        int64_t nv, int64_t K, float* c, int64_t ldc, const float* c_scale,
                        Ahead ahead);
// Keys packed for one product and the panels between: what differs between instruction sets. Sizes: n keys, width
// lanes (rows) of a panel.
struct RowsKernels {
  TileFn tile;
  // Scores S [n][width] -> P: in place (f32), pairs of keys [ceil(n / 2)][width], or with p_rows [width][ldp] pairs,
  // zeros to a multiple of 16 pairs. Updates maximum m (log2 domain) and sum l of each row; alpha: the factor for what
  // was summed before. visible: keys that a row sees, or null for all.
  void (*softmax)(int64_t n, int64_t width, float scale_log2, const int32_t* visible, float* S,
                  uint32_t* P, float* m, float* l, float* alpha);
  // Rows of d elements at `stride` bytes -> panels of V, pairs [first, first + ceil(n / 2)) of K; null: generic.
  void (*pack_values)(int64_t n, int64_t d, const uint8_t* rows, int64_t stride, int64_t first,
                      int64_t K, uint32_t* dst);
  // `count` <= 16 rows of `units` pairs -> lanes of a panel [k][width], other lanes zero; null: generic.
  void (*pack_lanes)(const uint8_t* const* rows, int64_t count, int64_t units, uint32_t* dst,
                     int64_t width);
  // FP8 records -> rows of bf16 (SPEC 1.9; results below 2^-126 are 0); null: generic.
  void (*read_record)(const uint8_t* record, int64_t d_c, int64_t d_r, uint8_t* out);
  // c [n][width] f32, of which `lanes` lanes count -> bf16 out[lane][0, n); null: generic.
  void (*store_turned)(const float* c, int64_t n, int64_t width, int64_t lanes, uint16_t* out,
                       int64_t ld);
  // The product with V's rows as they lie instead of packed pairs of them: b is the first row, K the number of rows, ldb
  // the bytes between them; else as tile. Null: none. Few rows of P make little of a packed V.
  void (*direct)(int64_t M, const void* a, int64_t a_m, int64_t a_k, const void* b, int64_t ldb,
                 int64_t nv, int64_t K, float* c, int64_t ldc, const float* c_scale, Ahead ahead);
  // Around the calls of a thread (the configuration of tiles); null: nothing to do.
  void (*begin)();
  void (*end)();
  int64_t key_block = kKeyBlock;
  int64_t unit = 1;     // K is a multiple of this many units, filled with zeros
  bool p_rows = false;  // P as rows of units: a_k = 4
};
constexpr int64_t kMostKeys = 256;           // key_block is at most this
constexpr int64_t kPairRow = kMostKeys / 2;  // units between the rows of P with p_rows

void rows_tile_avx512bf16(int64_t M, const void* a, int64_t a_m, int64_t a_k, const void* b,
                          int64_t nv, int64_t K, float* c, int64_t ldc, const float* c_scale,
                          Ahead ahead) noexcept;  // 16 lanes of bf16 pairs
RowsKernels rows_kernels_avx512bf16() noexcept;
bool rows_native(
    RowsKernels& kernels) noexcept;  // those for bf16 of this machine; false: Highway's
// Tasks of at most kFewRows rows of kFewDims elements whose keys and values are bf16 rows without a table. o [R][ldo]
// un-normalised, ldo d_v rounded up to 32; m [R] in the log2 domain, l [R].
constexpr int64_t kFewRows = 8, kFewDims = 1024;
void rows_few_avx512bf16(const RowsTask& t, float* o, int64_t ldo, float* m, float* l) noexcept;
RowsKernels rows_kernels_amx() noexcept;
RowsKernels rows_kernels_amx_emulated() noexcept;

// Keys [j, j + n) as elements of dtype, rows at row_bytes.
void rows_fetch(const KeySource& s, int64_t j, int64_t n, spec::DType dtype, void* dst,
                int64_t row_bytes) noexcept;
// Runs one task on the calling thread (scratch is the thread's own).
void rows_run(const RowsTask& t) noexcept;
// parts results at part_o + p * R * d_v etc. (contiguous) -> o, lse of `t`, for rows [r0, r1).
void rows_merge(const RowsTask& t, int64_t parts, int64_t r0, int64_t r1) noexcept;
const char* rows_isa(bool bf16) noexcept;  // the instruction set that rows_run uses here

// What a task moves and computes, in the units of team_for().
struct RowsWork {
  double bytes, flop;
};
RowsWork rows_work(const RowsTask& t) noexcept;

// Independent tasks whose keys [j0, j1) may be split: an even share of all keys for each thread,
// partial results merged. Every task must leave part_* null.
void rows_run_split(const RowsTask* tasks, int64_t n) noexcept;

}  // namespace v3b::kern
