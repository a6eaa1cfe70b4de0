// RoPE (SPEC 1.3) from fp32 tables. Bound by bytes: 2 e a rotated element, the tables come from L2. A slice (one head of
// one token) stays within one warp that has read all of it before anything is written, so y may be x in every form.
// Vector kernel: 8 pairs a lane, so that both orders of pairs use 16-byte accesses; d_r/16 a power of two up to 32.
#include "kernels/core/cuda_vector.cuh"
#include "kernels/norm_rope/norm_rope_cuda.h"
#include "model/error.h"

namespace v3b::kern {
namespace {

using namespace dev;

constexpr int kThreads = 256;
constexpr int64_t kMaxDr = 512;

struct Orders {
  bool in_pairs, out_pairs;  // (2i, 2i+1) rather than (i, i + d_r/2)
};
Orders orders_of(const spec::RopeArgs& a) {
  const bool both = a.form == spec::RopeForm::interleaved,
             mixed = a.form == spec::RopeForm::interleaved_to_half;
  return {both || (mixed && !a.inverse), both || (mixed && a.inverse)};
}

// lanes = d_r / 16 lanes a slice.
__global__ void __launch_bounds__(kThreads)
    rope_vector_kernel(spec::RopeArgs r, Orders o, int log_lanes) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t slice = thread >> log_lanes, half = r.d_r / 2;
  const int64_t part = 8 * (thread & ((int64_t{1} << log_lanes) - 1));
  const bool valid = slice < r.T * r.n_h;
  const int64_t t = slice / r.n_h, h = slice - t * r.n_h;
  const int64_t n = valid ? 8 : 0, y_at = t * r.y_token_stride + h * r.y_head_stride;
  float a[8], b[8], c[8], s[8];
  if (valid) {
    const int64_t x_at = t * r.x_token_stride + h * r.x_head_stride;
    const int64_t p = (r.positions == nullptr ? t : r.positions[t]) * half + part;
    float u[8], v[8];
    load8(r.x, x_at + (o.in_pairs ? 2 * part : part), r.x_type, true, 8, u);
    load8(r.x, x_at + (o.in_pairs ? 2 * part + 8 : half + part), r.x_type, true, 8, v);
    load8(r.cos + p, true, 8, c);
    load8(r.sin + p, true, 8, s);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float x0 = o.in_pairs ? (i < 4 ? u[2 * i % 8] : v[2 * i % 8]) : u[i];
      const float x1 = o.in_pairs ? (i < 4 ? u[2 * i % 8 + 1] : v[2 * i % 8 + 1]) : v[i];
      const float sn = r.inverse ? -s[i] : s[i];
      a[i] = x0 * c[i] - x1 * sn;
      b[i] = x0 * sn + x1 * c[i];
    }
  }
  __syncwarp();
  if (n == 0) return;
  float u[8], v[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    u[i] = o.out_pairs ? (i % 2 == 0 ? a[i / 2] : b[i / 2]) : a[i];
    v[i] = o.out_pairs ? (i % 2 == 0 ? a[4 + i / 2] : b[4 + i / 2]) : b[i];
  }
  store8(r.y, y_at + (o.out_pairs ? 2 * part : part), r.y_type, true, 8, u);
  store8(r.y, y_at + (o.out_pairs ? 2 * part + 8 : half + part), r.y_type, true, 8, v);
}

// One warp a slice, pairs lane, lane + 32, ...: any size up to kMaxDr, any stride.
__global__ void __launch_bounds__(kThreads) rope_plain_kernel(spec::RopeArgs r, Orders o) {
  constexpr int kPairs = kMaxDr / 2 / 32;
  const int64_t slice = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + warp_id();
  const int64_t half = r.d_r / 2;
  const bool valid = slice < r.T * r.n_h;
  const int64_t t = slice / r.n_h, h = slice - t * r.n_h;
  float a[kPairs], b[kPairs];
  if (valid) {
    const int64_t x_at = t * r.x_token_stride + h * r.x_head_stride;
    const int64_t p = (r.positions == nullptr ? t : r.positions[t]) * half;
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      const int64_t i = lane_id() + 32 * k;
      if (i >= half) continue;
      const float x0 = load_as_float(r.x, x_at + (o.in_pairs ? 2 * i : i), r.x_type);
      const float x1 = load_as_float(r.x, x_at + (o.in_pairs ? 2 * i + 1 : half + i), r.x_type);
      const float c = r.cos[p + i], s = r.inverse ? -r.sin[p + i] : r.sin[p + i];
      a[k] = x0 * c - x1 * s;
      b[k] = x0 * s + x1 * c;
    }
  }
  __syncwarp();
  if (!valid) return;
  const int64_t y_at = t * r.y_token_stride + h * r.y_head_stride;
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    const int64_t i = lane_id() + 32 * k;
    if (i >= half) continue;
    store_from_float(r.y, y_at + (o.out_pairs ? 2 * i : i), r.y_type, a[k]);
    store_from_float(r.y, y_at + (o.out_pairs ? 2 * i + 1 : half + i), r.y_type, b[k]);
  }
}

}  // namespace

void rope_cuda_simt(const spec::RopeArgs& a, CudaStream stream) {
  if (a.d_r % 2 != 0 || a.d_r > kMaxDr)
    throw Error(ExitCode::usage, "rotated size out of range", "rope.cuda_simt", "even, at most 512",
                std::to_string(a.d_r));
  const int64_t slices = a.T * a.n_h;
  if (slices == 0 || a.d_r == 0) return;
  const auto strides_fit = [](int64_t token, int64_t head) {
    return token % 8 == 0 && head % 8 == 0;
  };
  int log_lanes = -1;
  for (int l = 0; l <= 5; ++l)
    if (a.d_r == int64_t{16} << l) log_lanes = l;
  if (log_lanes >= 0 && aligned16(a.x, a.y, a.cos, a.sin) &&
      strides_fit(a.x_token_stride, a.x_head_stride) &&
      strides_fit(a.y_token_stride, a.y_head_stride)) {
    const int64_t blocks = ((slices << log_lanes) + kThreads - 1) / kThreads;
    launch(rope_vector_kernel, {dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream}, a,
           orders_of(a), log_lanes);
  } else {
    const int64_t blocks = (slices + kThreads / 32 - 1) / (kThreads / 32);
    launch(rope_plain_kernel, {dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream}, a,
           orders_of(a));
  }
}

}  // namespace v3b::kern
