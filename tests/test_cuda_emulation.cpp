// The emulation itself: collectives, tensor-core layouts against a plain product, and kernels that are wrong on
// purpose (missing barrier, missing wait, divergent barrier, write past a buffer), each of which must show.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <vector>

#include "kernels/core/cuda_device.cuh"
#include "kernels/norm_rope/norm_rope_cuda.h"
#include "model/error.h"

namespace v3b::kern {
namespace {

using namespace dev;

const bool kEmulate = [] { return setenv("V3BENCH_CUDA", "emulate", 1) == 0; }();

template <class T>
std::vector<T> host(const DeviceBuffer& b) {
  std::vector<T> v(static_cast<size_t>(b.bytes()) / sizeof(T));
  cuda_download(v.data(), b.data(), b.bytes(), cuda_stream());
  return v;
}
template <class T>
DeviceBuffer device(const std::vector<T>& v) {
  DeviceBuffer b(static_cast<int64_t>(v.size() * sizeof(T)));
  cuda_upload(b.data(), v.data(), b.bytes(), cuda_stream());
  return b;
}

__global__ void collectives(float* out) {
  V3B_DYNAMIC_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const int t = static_cast<int>(threadIdx.x);
  const float s = warp_sum(static_cast<float>(t));
  const float m = block_max(static_cast<float>((t * 37) % 101), scratch);
  const float total = block_sum(static_cast<float>(t), scratch);
  const int up = __shfl_up_sync(kFullMask, t, 3), down = __shfl_down_sync(kFullMask, t, 5);
  const unsigned odd = __ballot_sync(kFullMask, t % 2 == 1);
  const int half = __shfl_sync(t % 32 < 16 ? 0xffffu : 0xffff0000u, t, 16 * (t % 32 / 16));
  float* o = out + 8 * (blockIdx.x * blockDim.x + threadIdx.x);
  o[0] = s, o[1] = m, o[2] = total, o[3] = static_cast<float>(up), o[4] = static_cast<float>(down);
  o[5] = static_cast<float>(odd), o[6] = static_cast<float>(half);
  o[7] = static_cast<float>(__syncthreads_or(t == 70));
}

TEST(CudaEmulation, Collectives) {
  for (int again = 0; again < 2; ++again) {  // both orders of threads
    constexpr int kThreads = 96, kBlocks = 2;
    DeviceBuffer out(kBlocks * kThreads * 8 * 4);
    launch(collectives, {dim3(kBlocks), kThreads, 34 * 4, cuda_stream()}, out.as<float>());
    const auto v = host<float>(out);
    for (int i = 0; i < kBlocks * kThreads; ++i) {
      const int t = i % kThreads, l = t % 32, w = t / 32;
      const float* o = v.data() + 8 * i;
      EXPECT_EQ(o[0], static_cast<float>(32 * 32 * w + 496)) << i;
      EXPECT_EQ(o[1], 100.0f) << i;  // some t below 96 has 37 t = 100 mod 101
      EXPECT_EQ(o[2], 4560.0f) << i;
      EXPECT_EQ(o[3], static_cast<float>(l >= 3 ? t - 3 : t)) << i;
      EXPECT_EQ(o[4], static_cast<float>(l + 5 < 32 ? t + 5 : t)) << i;
      EXPECT_EQ(o[5], static_cast<float>(0xaaaaaaaau)) << i;
      EXPECT_EQ(o[6], static_cast<float>(32 * w + (l < 16 ? 0 : 16))) << i;
      EXPECT_EQ(o[7], 1.0f) << i;
    }
  }
}

// One warp: c[16, 8] = a[16, 64] b[8, 64]^T through shared memory, cp.async, ldmatrix and mma.
__global__ void product(const spec::bf16* a, const spec::bf16* b, float* c, bool wait) {
  V3B_DYNAMIC_SHARED(shared);
  auto* sA = reinterpret_cast<spec::bf16*>(shared);  // [16, 64 + 8]: rows 144 bytes apart
  auto* sB = sA + 16 * 72;                           // [8, 72]
  const int l = lane_id();
  for (int i = l; i < 24 * 8; i += 32) {
    const int row = i / 8, chunk = i % 8;
    if (row < 16)
      cp_async16(sA + row * 72 + 8 * chunk, a + row * 64 + 8 * chunk);
    else
      cp_async16(sB + (row - 16) * 72 + 8 * chunk, b + (row - 16) * 64 + 8 * chunk);
  }
  cp_async_commit();
  if (wait) cp_async_wait<0>();
  __syncthreads();
  float d[4] = {};
  for (int k = 0; k < 64; k += 32) {
    uint32_t ra[2][4], rb[4];
    for (int h = 0; h < 2; ++h) ldmatrix_x4(ra[h], sA + (l % 16) * 72 + k + 16 * h + 8 * (l / 16));
    ldmatrix_x4(rb, sB + (l % 8) * 72 + k + 8 * (l / 8));
    mma_bf16(d, ra[0], rb[0], rb[1]);
    mma_bf16(d, ra[1], rb[2], rb[3]);
  }
  if (!wait) cp_async_wait<0>();  // too late
  const int g = l / 4, t = l % 4;
  c[g * 8 + 2 * t] = d[0], c[g * 8 + 2 * t + 1] = d[1];
  c[(g + 8) * 8 + 2 * t] = d[2], c[(g + 8) * 8 + 2 * t + 1] = d[3];
}

TEST(CudaEmulation, TensorCoreLayouts) {
  std::vector<spec::bf16> a(16 * 64), b(8 * 64);
  for (size_t i = 0; i < a.size(); ++i)
    a[i] = spec::to_bf16(static_cast<float>(int(i * 7 % 13) - 6));
  for (size_t i = 0; i < b.size(); ++i)
    b[i] = spec::to_bf16(static_cast<float>(int(i * 5 % 11) - 5));
  const DeviceBuffer da = device(a), db = device(b);
  DeviceBuffer c(16 * 8 * 4);
  const auto run = [&](bool wait) {
    launch(product, {dim3(1), 32, 24 * 144, cuda_stream()}, da.as<const spec::bf16>(),
           db.as<const spec::bf16>(), c.as<float>(), wait);
    return host<float>(c);
  };
  const auto v = run(true);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      float want = 0;
      for (int k = 0; k < 64; ++k)
        want += spec::to_float(a[size_t(i * 64 + k)]) * spec::to_float(b[size_t(j * 64 + k)]);
      EXPECT_EQ(v[size_t(i * 8 + j)], want) << i << "," << j;
    }
  for (const float x : run(false)) EXPECT_TRUE(std::isnan(x));  // read before it arrived
}

__global__ void fp8_product(const uint32_t* a, const uint32_t* b,
                            float* c) {  // a [16, 32] codes, b [8, 32]
  const int l = lane_id(), g = l / 4, t = l % 4;
  const uint32_t ra[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4],
                          a[(g + 8) * 8 + t + 4]};
  float d[4] = {};
  mma_e4m3(d, ra, b[g * 8 + t], b[g * 8 + t + 4]);
  c[g * 8 + 2 * t] = d[0], c[g * 8 + 2 * t + 1] = d[1];
  c[(g + 8) * 8 + 2 * t] = d[2], c[(g + 8) * 8 + 2 * t + 1] = d[3];
}
TEST(CudaEmulation, Fp8Product) {
  std::vector<uint8_t> a(16 * 32), b(8 * 32);
  for (size_t i = 0; i < a.size(); ++i)
    a[i] = spec::to_f8e4m3(static_cast<float>(int(i * 7 % 9) - 4)).bits;
  for (size_t i = 0; i < b.size(); ++i)
    b[i] = spec::to_f8e4m3(static_cast<float>(int(i * 3 % 7) - 3)).bits;
  const DeviceBuffer da = device(a), db = device(b);
  DeviceBuffer c(16 * 8 * 4);
  launch(fp8_product, {dim3(1), 32, 0, cuda_stream()}, da.as<const uint32_t>(),
         db.as<const uint32_t>(), c.as<float>());
  const auto v = host<float>(c);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      float want = 0;
      for (int k = 0; k < 32; ++k)
        want += spec::to_float(spec::f8e4m3{a[size_t(i * 32 + k)]}) *
                spec::to_float(spec::f8e4m3{b[size_t(j * 32 + k)]});
      EXPECT_EQ(v[size_t(i * 8 + j)], want) << i << "," << j;
    }
}

__global__ void reverse(float* x, bool with_barrier) {
  V3B_DYNAMIC_SHARED(shared);
  float* s = reinterpret_cast<float*>(shared);
  const int t = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  s[t] = x[t];
  if (with_barrier) __syncthreads();
  x[t] = s[n - 1 - t];
}
TEST(CudaEmulation, MissingBarrierShows) {
  std::vector<float> x(128);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
  for (const bool right : {true, false}) {
    DeviceBuffer d = device(x);
    launch(reverse, {dim3(1), 128, 512, cuda_stream()}, d.as<float>(), right);
    const auto v = host<float>(d);
    int wrong = 0;
    for (size_t i = 0; i < v.size(); ++i) wrong += !(v[i] == static_cast<float>(127 - i));
    if (right)
      EXPECT_EQ(wrong, 0);
    else
      EXPECT_GE(wrong, 64);
  }
}

__global__ void divergent(int* x) {
  if (threadIdx.x < 16) __syncthreads();
  x[threadIdx.x] = 1;
}
TEST(CudaEmulation, DivergentBarrierIsAnError) {
  DeviceBuffer d(64 * 4);
  EXPECT_THROW(launch(divergent, {dim3(1), 64, 0, cuda_stream()}, d.as<int>()), Error);
}

TEST(CudaEmulation, GraphReplays) {
  std::vector<float> x(64, 1.0f);
  DeviceBuffer d = device(x), e(256);
  CudaGraph graph;
  graph.begin(cuda_stream());
  launch(reverse, {dim3(1), 64, 256, cuda_stream()}, d.as<float>(), true);
  cuda_copy(e.data(), d.data(), 256, cuda_stream());
  graph.end(cuda_stream());
  EXPECT_TRUE(std::isnan(host<float>(e)[0]));  // captured, not run
  x[0] = 5;
  cuda_upload(d.data(), x.data(), 256, cuda_stream());
  graph.launch(cuda_stream());
  EXPECT_EQ(host<float>(e)[63], 5.0f);
  graph.launch(cuda_stream());
  EXPECT_EQ(host<float>(e)[0], 5.0f);
}

TEST(CudaEmulation, RmsNorm) {
  const int64_t T = 3, d = 8200;  // longer than a block keeps
  std::vector<float> x(static_cast<size_t>(T * d)), w(static_cast<size_t>(d), 0.5f);
  for (size_t i = 0; i < x.size(); ++i) x[i] = std::sin(static_cast<float>(i));
  const DeviceBuffer dx = device(x), dw = device(w);
  DeviceBuffer dy(T * d * 4);
  rmsnorm_cuda_simt({T, d, 1e-6, spec::NormRounding::single, spec::DType::f32, dx.data(), nullptr,
                     dw.data(), dy.data()},
                    cuda_stream());
  const auto y = host<float>(dy);
  for (int64_t r = 0; r < T; ++r) {
    double s = 0;
    for (int64_t j = 0; j < d; ++j) s += double(x[size_t(r * d + j)]) * x[size_t(r * d + j)];
    const double f = 0.5 / std::sqrt(s / double(d) + 1e-6);
    for (int64_t j = 0; j < d; ++j)
      ASSERT_NEAR(y[size_t(r * d + j)], f * x[size_t(r * d + j)], 1e-6) << r << " " << j;
  }
}

}  // namespace
}  // namespace v3b::kern
