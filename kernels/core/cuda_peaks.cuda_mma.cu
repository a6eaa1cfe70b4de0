// Probes of cuda_peaks.h. Each kernel does nothing but the one thing whose rate it measures; a value that depends on
// everything is stored under a condition that never holds, so that nothing is optimised away.
#include <algorithm>

#include "kernels/core/cuda_device.cuh"
#include "kernels/core/cuda_peaks.h"

namespace v3b::kern {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 2;      // 16 warps an SM: enough for arithmetic from registers
constexpr int kCopyBlocksPerSm = 8;  // 64 warps an SM with 4 loads of 16 bytes each in flight
constexpr int kVectors = 4;
constexpr int kPasses = 3;
constexpr double kProbeSeconds = 1e-3;  // of one pass of an arithmetic probe
constexpr int64_t kProbeBytes = int64_t{512} << 20;
constexpr float kNever = 1.234567e33f;

__global__ void read_kernel(const uint4* p, int64_t n, float* sink) {
  unsigned x = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * kVectors;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads * kVectors + threadIdx.x; i < n;
       i += step) {
    uint4 v[kVectors];
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
      v[j] = i + j * kThreads < n ? p[i + j * kThreads] : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) x ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (x == 0x5eed1234u) *sink = 1.0f;
}

__global__ void copy_kernel(const uint4* from, uint4* to, int64_t n) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * kVectors;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads * kVectors + threadIdx.x; i < n;
       i += step) {
    uint4 v[kVectors];
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
      if (i + j * kThreads < n) v[j] = from[i + j * kThreads];
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
      if (i + j * kThreads < n) to[i + j * kThreads] = v[j];
  }
}

constexpr int kF32Sums = 16;
__global__ void f32_kernel(int rounds, float a, float b, float* sink) {
  float s[kF32Sums];
  for (int i = 0; i < kF32Sums; ++i) s[i] = static_cast<float>(threadIdx.x + i);
  for (int r = 0; r < rounds; ++r) {
#pragma unroll
    for (int u = 0; u < 8; ++u)
#pragma unroll
      for (int i = 0; i < kF32Sums; ++i) s[i] = __fmaf_rn(s[i], a, b);
  }
  float all = 0;
  for (int i = 0; i < kF32Sums; ++i) all += s[i];
  if (all == kNever) *sink = all;
}
constexpr double kF32FlopPerThreadRound = 2.0 * 8 * kF32Sums;

// Values of moderate size that differ between lanes: what real operands draw in power, and no infinities.
__device__ __forceinline__ uint32_t bf16_pair(unsigned seed) {
  const unsigned h = seed * 2654435761u;
  return 0x3f803f80u | (h & 0x807f807fu);
}
__device__ __forceinline__ uint32_t e4m3_quad(unsigned seed) {
  const unsigned h = seed * 2654435761u;
  return 0x30303030u | (h & 0x87878787u);
}

constexpr int kTiles = 8;  // independent accumulators a warp
template <bool kFp8>
__global__ void mma_kernel(int rounds, float* sink) {
  float d[kTiles][4] = {};
  uint32_t a[4], b[kTiles][2];
  for (unsigned i = 0; i < 4; ++i)
    a[i] = kFp8 ? e4m3_quad(threadIdx.x * 4 + i) : bf16_pair(threadIdx.x * 4 + i);
  for (unsigned t = 0; t < kTiles; ++t)
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned seed = 4096 + (threadIdx.x * kTiles + t) * 2 + i;
      b[t][i] = kFp8 ? e4m3_quad(seed) : bf16_pair(seed);
    }
  for (int r = 0; r < rounds; ++r) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if constexpr (kFp8)
        dev::mma_e4m3(d[t], a, b[t][0], b[t][1]);
      else
        dev::mma_bf16(d[t], a, b[t][0], b[t][1]);
    }
  }
  float all = 0;
  for (int t = 0; t < kTiles; ++t)
    for (int i = 0; i < 4; ++i) all += d[t][i];
  if (all == kNever) *sink = all;
}
template <bool kFp8>
constexpr double kMmaFlopPerWarpRound = 2.0 * 16 * 8 * (kFp8 ? 32 : 16) * kTiles;

const char* g_tensor_instruction = "mma.sync";

DeviceBuffer& probe_buffer() {
  static DeviceBuffer buffer = [] {
    const int64_t bytes = std::max(4 * cuda_device().l2_bytes, kProbeBytes);
    DeviceBuffer b(std::min(bytes, cuda_free_bytes() / 8) / 4096 * 4096);
    cuda_fill(b.data(), 0x3c, b.bytes(), cuda_stream());
    return b;
  }();
  return buffer;
}
float* sink() {
  static DeviceBuffer buffer(256);
  return buffer.as<float>();
}
bool on_device() { return cuda_device().mode == CudaMode::device; }
dim3 blocks(int per_sm) { return dim3(static_cast<unsigned>(cuda_device().sms * per_sm)); }

void launch_read(int64_t bytes) {
  launch(read_kernel, {blocks(kCopyBlocksPerSm), kThreads, 0, cuda_stream()},
         probe_buffer().as<const uint4>(), bytes / 16, sink());
}

template <class F>
double best_of(double units, F&& enqueue) {
  double best = 0;
  for (int i = 0; i < kPasses; ++i) {
    const double s = cuda_seconds(cuda_stream(), enqueue);
    if (s > 0) best = std::max(best, units / s);
  }
  return best;
}

// run(rounds) launches and returns its operations; rounds are first found so that a pass takes kProbeSeconds.
template <class F>
double rate(F&& run) {
  if (!on_device()) return 0;
  int rounds = 64;
  for (;;) {
    const double s = cuda_seconds(cuda_stream(), [&] { run(rounds); });
    if (s > kProbeSeconds / 4 || rounds >= 1 << 26) {
      rounds = std::max(1, static_cast<int>(rounds * std::min(8.0, kProbeSeconds / s)));
      break;
    }
    rounds *= 4;
  }
  double operations = 0;
  run(1);
  double best = 0;
  for (int i = 0; i < kPasses; ++i) {
    const double s = cuda_seconds(cuda_stream(), [&] { operations = run(rounds); });
    if (s > 0) best = std::max(best, operations / s);
  }
  return best;
}

template <bool kFp8>
double mma_rate() {
  return rate([](int rounds) {
    launch(mma_kernel<kFp8>, {blocks(kBlocksPerSm), kThreads, 0, cuda_stream()}, rounds, sink());
    return kMmaFlopPerWarpRound<kFp8> * rounds * (kThreads / 32) * kBlocksPerSm * cuda_device().sms;
  });
}

double tensor_rate(double mma, double (*wgmma)(int, int, float*)) {
  if (!on_device() || cuda_device().cc != 90) return mma;
  const double w = rate([&](int rounds) { return wgmma(cuda_device().sms, rounds, sink()); });
  if (w > mma) g_tensor_instruction = "wgmma";
  return std::max(mma, w);
}

}  // namespace

double cuda_read_bytes_per_s() {
  if (!on_device()) return 0;
  const int64_t bytes = probe_buffer().bytes();
  launch_read(bytes);
  return best_of(static_cast<double>(bytes), [&] { launch_read(bytes); });
}

double cuda_copy_bytes_per_s() {
  if (!on_device()) return 0;
  const int64_t half = probe_buffer().bytes() / 2;
  const auto* from = probe_buffer().as<const uint4>();
  auto* to = probe_buffer().as<uint4>() + half / 16;
  const auto run = [&] {
    launch(copy_kernel, {blocks(kCopyBlocksPerSm), kThreads, 0, cuda_stream()}, from, to,
           half / 16);
  };
  run();
  return best_of(2.0 * static_cast<double>(half), run);
}

double cuda_f32_flop_per_s() {
  return rate([](int rounds) {
    launch(f32_kernel, {blocks(2 * kBlocksPerSm), kThreads, 0, cuda_stream()}, rounds, 0.999f, 0.5f,
           sink());
    return kF32FlopPerThreadRound * rounds * kThreads * 2 * kBlocksPerSm * cuda_device().sms;
  });
}

double cuda_bf16_flop_per_s() { return tensor_rate(mma_rate<false>(), detail::wgmma_launch_bf16); }
double cuda_fp8_flop_per_s() {
  if (!on_device() || cuda_device().cc < 89) return 0;
  return tensor_rate(mma_rate<true>(), detail::wgmma_launch_fp8);
}
const char* cuda_tensor_instruction() { return g_tensor_instruction; }

void cuda_empty_l2() {
  if (!on_device()) return;
  launch_read(std::min(probe_buffer().bytes(), 3 * cuda_device().l2_bytes));
}

#if defined(V3B_CUDA_EMULATE)  // the file with Hopper's instructions is not part of that build
double detail::wgmma_launch_bf16(int, int, float*) { return 0; }
double detail::wgmma_launch_fp8(int, int, float*) { return 0; }
#endif

}  // namespace v3b::kern
