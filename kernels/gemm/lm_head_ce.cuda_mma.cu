// Output head with online cross-entropy (SPEC 1.29). Few rows: bound by reading W (V d e bytes: 1.85 GB for V3, 553 us
// at 3.35 TB/s); many rows: 2 T d V FLOPs. Folding adds 8 T V bytes, mostly L2: a block of logits is at most kLogitBytes.
#include <algorithm>

#include "kernels/core/cuda_vector.cuh"
#include "kernels/core/order_key.h"
#include "kernels/gemm/gemm_cuda.h"
#include "kernels/gemm/rows_cuda.h"

namespace v3b::kern {
namespace {

using namespace dev;

constexpr int kThreads = 256;
constexpr int64_t kPiece = 4096;                    // columns of one fold: 16 a thread
constexpr int64_t kLogitBytes = int64_t{32} << 20;  // of the scratch; stays in H100's 50 MB L2
constexpr int64_t kRows = 2048;                     // at a time

struct Piece {
  uint64_t best;  // pick_key of the largest logit
  float sum;      // of exp(z - largest)
  float label;    // logit of the label, if it lies in this piece
};

__device__ __forceinline__ float term(float z, float max) {
  return z == -INFINITY ? 0.0f : expf(z - max);  // NaN stays
}

// Row blockIdx.x, piece blockIdx.y of n columns that start at column `first` of the vocabulary.
__global__ void __launch_bounds__(kThreads)
    fold_kernel(const float* z, int64_t ldz, int64_t n, int64_t first, bool wide,
                const int64_t* labels, Piece* pieces, int count) {
  V3B_DYNAMIC_SHARED(shared);
  auto* keys = reinterpret_cast<uint64_t*>(shared);           // 33
  float* floats = reinterpret_cast<float*>(shared + 34 * 8);  // 33
  const int64_t t = blockIdx.x, begin = blockIdx.y * kPiece, end = min(n, begin + kPiece);
  const float* row = z + t * ldz;
  constexpr int kChunks = kPiece / (8 * kThreads);
  float v[kChunks][8];
  uint64_t best = 0;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int64_t j = begin + 8 * (static_cast<int64_t>(threadIdx.x) + c * kThreads);
    load8(row + j, wide, end - j, v[c]);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (j + i >= end) {
        v[c][i] = -INFINITY;
        continue;
      }
      const uint64_t key = pick_key(order_key(v[c][i]), first + j + i);
      best = key > best ? key : best;
    }
  }
  best = block_max(best, keys);
  const float m = pick_value(best);
  float sum = 0;
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += term(v[c][i], m);
  sum = block_sum(sum, floats);
  if (threadIdx.x != 0) return;
  Piece p = {best, sum, 0.0f};
  const int64_t at = labels == nullptr ? -1 : labels[t] - first;
  if (at >= begin && at < end) p.label = row[at];
  pieces[t * count + first / kPiece + blockIdx.y] = p;
}

// One warp a row.
__global__ void __launch_bounds__(kThreads)
    finish_kernel(int64_t T, const Piece* pieces, int count, const int64_t* labels, float* nll,
                  float* lse, int32_t* argmax) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + warp_id();
  if (t >= T) return;  // whole warps
  const Piece* p = pieces + t * count;
  uint64_t best = 0;
  for (int i = lane_id(); i < count; i += 32) best = p[i].best > best ? p[i].best : best;
  best = warp_max(best);
  const float m = pick_value(best);
  float sum = 0;
  for (int i = lane_id(); i < count; i += 32) {
    const float mine = pick_value(p[i].best);  // -inf: sum is 0 or NaN
    sum += mine == -INFINITY ? p[i].sum : p[i].sum * expf(mine - m);
  }
  sum = warp_sum(sum);
  if (lane_id() != 0) return;
  const float l = m + logf(sum);
  lse[t] = l;
  if (argmax != nullptr) argmax[t] = pick_index(best);
  if (nll == nullptr) return;
  const int64_t label = labels == nullptr ? spec::kIgnoreLabel : labels[t];
  nll[t] = label == spec::kIgnoreLabel ? 0.0f : l - p[label / kPiece].label;
}

int64_t pieces_of(int64_t V) { return (V + kPiece - 1) / kPiece; }

void fold(int64_t rows, const float* z, int64_t ldz, int64_t n, int64_t first,
          const int64_t* labels, Piece* pieces, int64_t count, CudaStream stream) {
  launch(fold_kernel,
         {dim3(static_cast<unsigned>(rows), static_cast<unsigned>(pieces_of(n))), kThreads,
          34 * 8 + 34 * 4, stream},
         z, ldz, n, first, ldz % 4 == 0 && aligned16(z), labels, pieces, static_cast<int>(count));
}
void finish(int64_t rows, const Piece* pieces, int64_t count, const int64_t* labels, float* nll,
            float* lse, int32_t* argmax, CudaStream stream) {
  const int64_t each = kThreads / 32;
  launch(finish_kernel,
         {dim3(static_cast<unsigned>((rows + each - 1) / each)), kThreads, 0, stream}, rows, pieces,
         static_cast<int>(count), labels, nll, lse, argmax);
}

// How the logits are cut: rows at a time, columns of a block (a multiple of kPiece unless it is all), their stride.
struct Cut {
  int64_t rows, columns, stride, pieces_bytes;
};
Cut cut_of(const spec::LmHeadCeArgs& a) {
  const int64_t rows = std::min(a.T, kRows);
  const int64_t fit = kLogitBytes / 4 / std::max<int64_t>(rows, 1) / kPiece * kPiece;
  const int64_t columns = std::min(a.V, std::max(fit, kPiece));
  return {rows, columns, (columns + 7) / 8 * 8,
          (rows * pieces_of(a.V) * static_cast<int64_t>(sizeof(Piece)) + 255) / 256 * 256};
}

GemmArgs product_of(const spec::LmHeadCeArgs& a, const Cut& c, int64_t rows, int64_t columns) {
  GemmArgs g;
  g.M = rows, g.N = columns, g.K = a.d;
  g.lda = g.ldb = a.d, g.ldc = c.stride, g.ab_type = a.dtype;
  return g;
}

}  // namespace

int64_t cross_entropy_rows_cuda_scratch_bytes(int64_t T, int64_t V) {
  return T * pieces_of(V) * static_cast<int64_t>(sizeof(Piece));
}
void cross_entropy_rows_cuda_simt(int64_t T, int64_t V, const float* z, int64_t ldz,
                                  const int64_t* labels, float* nll, float* lse, int32_t* argmax,
                                  void* scratch, CudaStream stream) {
  if (T == 0 || V == 0) return;
  auto* pieces = static_cast<Piece*>(scratch);
  fold(T, z, ldz, V, 0, labels, pieces, pieces_of(V), stream);
  finish(T, pieces, pieces_of(V), labels, nll, lse, argmax, stream);
}

int64_t lm_head_ce_cuda_scratch_bytes(const spec::LmHeadCeArgs& a) {
  const Cut c = cut_of(a);
  return c.pieces_bytes + c.rows * c.stride * 4;
}
std::vector<GemmArgs> lm_head_ce_cuda_products(const spec::LmHeadCeArgs& a) {
  std::vector<GemmArgs> all;
  if (a.T == 0 || a.V == 0) return all;
  const Cut c = cut_of(a);
  const auto add = [&](int64_t rows, int64_t columns) {
    if (rows > 0 && columns > 0) all.push_back(product_of(a, c, rows, columns));
  };
  const int64_t last_rows = a.T % c.rows, last_columns = a.V % c.columns;
  for (const int64_t rows : {c.rows, last_rows})
    for (const int64_t columns : {c.columns, last_columns}) add(rows, columns);
  return all;
}
void lm_head_ce_cuda_mma(const spec::LmHeadCeArgs& a, void* scratch, CudaStream stream) {
  lm_head_ce_cuda_by(a, scratch, stream, [&](const GemmArgs& g) { gemm_cuda_mma(g, stream); });
}
void lm_head_ce_cuda_by(const spec::LmHeadCeArgs& a, void* scratch, CudaStream stream,
                        const std::function<void(const GemmArgs&)>& product) {
  if (a.T == 0 || a.V == 0) return;
  const Cut c = cut_of(a);
  auto* pieces = static_cast<Piece*>(scratch);
  auto* logits = reinterpret_cast<float*>(static_cast<uint8_t*>(scratch) + c.pieces_bytes);
  const int64_t elem = spec::dtype_bytes(a.dtype), count = pieces_of(a.V);
  for (int64_t t = 0; t < a.T; t += c.rows) {
    const int64_t rows = std::min(c.rows, a.T - t);
    const int64_t* labels = a.labels == nullptr ? nullptr : a.labels + t;
    for (int64_t v = 0; v < a.V; v += c.columns) {
      const int64_t n = std::min(c.columns, a.V - v);
      GemmArgs g = product_of(a, c, rows, n);
      g.a = static_cast<const uint8_t*>(a.h) + t * a.d * elem;
      g.b = static_cast<const uint8_t*>(a.w) + v * a.d * elem;
      g.c = logits;
      product(g);
      fold(rows, logits, c.stride, n, v, labels, pieces, count, stream);
    }
    finish(rows, pieces, count, labels, a.nll == nullptr ? nullptr : a.nll + t, a.lse + t,
           a.argmax == nullptr ? nullptr : a.argmax + t, stream);
  }
}

}  // namespace v3b::kern
