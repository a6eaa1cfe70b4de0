// Random weights for tests and benches: every element from (seed, hash of its tensor's name,
// index), so the values do not depend on threads or on which tensors exist besides it.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>

#include "model/all_cores.h"
#include "model/error.h"
#include "model/rng.h"
#include "model/weights.h"
#include "model/weights_walk.h"

namespace v3b::model {

namespace {

using spec::DType;

struct Buffers {
  std::vector<std::unique_ptr<std::byte[]>> blocks;
  std::byte* get(int64_t bytes) {
    blocks.emplace_back(new std::byte[static_cast<size_t>(bytes)]);
    return blocks.back().get();
  }
};

void fill_normal(std::vector<float>& v, const Rng& rng, double mean, double std) {
  const auto n = static_cast<int64_t>(v.size());
  auto part = [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i)
      v[static_cast<size_t>(i)] =
          static_cast<float>(std::fma(std, rng_normal(rng, static_cast<uint64_t>(i)), mean));
  };
  const int64_t threads =
      n < 100'000 ? 1 : std::min<int64_t>(16, std::max(1u, std::thread::hardware_concurrency()));
  std::vector<std::thread> pool;
  for (int64_t t = 1; t < threads; ++t)
    pool.emplace_back(part, n * t / threads, n * (t + 1) / threads);
  part(0, n / threads);
  for (std::thread& t : pool) t.join();
}

// SPEC 1.22, weights 128x128: s = max|block|/448 (1 for an all-zero block), codes = rnd(w/s).
void quantise_blocks(const std::vector<float>& w, int64_t rows, int64_t cols, bool ue8m0,
                     uint8_t* codes, float* scales) {
  const int64_t blocks = (cols + 127) / 128;
  for (int64_t br = 0; br * 128 < rows; ++br)
    for (int64_t bc = 0; bc < blocks; ++bc) {
      const int64_t r1 = std::min(rows, br * 128 + 128), c1 = std::min(cols, bc * 128 + 128);
      float amax = 0;
      for (int64_t r = br * 128; r < r1; ++r)
        for (int64_t c = bc * 128; c < c1; ++c)
          amax = std::max(amax, std::fabs(w[static_cast<size_t>(r * cols + c)]));
      float s = amax > 0 ? amax / 448.0f : 1.0f;
      if (ue8m0) s = spec::ceil_pow2(s);
      scales[br * blocks + bc] = s;
      for (int64_t r = br * 128; r < r1; ++r)
        for (int64_t c = bc * 128; c < c1; ++c)
          codes[r * cols + c] = spec::to_f8e4m3(w[static_cast<size_t>(r * cols + c)] / s).bits;
    }
}

void store(const std::vector<float>& v, DType dtype, std::byte* out) {
  for (size_t i = 0; i < v.size(); ++i) {
    if (dtype == DType::f32) {
      std::memcpy(out + 4 * i, &v[i], 4);
    } else {
      const uint16_t bits =
          dtype == DType::bf16 ? spec::to_bf16(v[i]).bits : spec::to_f16(v[i]).bits;
      std::memcpy(out + 2 * i, &bits, 2);
    }
  }
}

}  // namespace

WeightsPtr random_weights(const ModelConfig& config, uint64_t seed, spec::DType dtype) {
  if (dtype != DType::f32 && dtype != DType::bf16 && dtype != DType::f16 && dtype != DType::f8e4m3)
    throw Error(ExitCode::usage, "random weights", "dtype", "f32, bf16, f16 or f8e4m3",
                spec::dtype_name(dtype));
  auto buffers = std::make_shared<Buffers>();
  auto w = std::make_shared<ModelWeights>();
  w->config = config;
  w->config.fp8 = dtype == DType::f8e4m3;
  w->config.torch_dtype = dtype == DType::f32   ? "float32"
                          : dtype == DType::f16 ? "float16"
                                                : "bfloat16";
  auto make = [&](TensorView& t, const std::string& name, const Shape& shape, Role role) {
    if (role == Role::mtp_embed || role == Role::mtp_head) return;
    if (role == Role::head && config.tie_word_embeddings) return;
    t.name = name;
    t.shape = shape;
    std::vector<float> v(static_cast<size_t>(t.numel()));
    const Rng rng{seed, rng_stream(name.c_str())};
    const double in = static_cast<double>(t.cols());
    switch (role) {
      case Role::norm:
        fill_normal(v, rng, 1.0, 0.1);
        break;
      case Role::bias:
        fill_normal(v, rng, 0.0, 0.05);
        break;
      case Role::embed:
        fill_normal(v, rng, 0.0, 1.0);
        break;
      default:
        fill_normal(v, rng, 0.0, 1.0 / std::sqrt(in));
    }
    t.dtype = role == Role::bias ? DType::f32 : dtype != DType::f8e4m3 ? dtype : DType::bf16;
    if (role == Role::quantisable && dtype == DType::f8e4m3) {
      t.dtype = DType::f8e4m3;
      const int64_t n = (t.rows() + 127) / 128 * ((t.cols() + 127) / 128);
      std::byte* codes = buffers->get(t.numel());
      auto* scales = reinterpret_cast<float*>(buffers->get(4 * n));
      quantise_blocks(v, t.rows(), t.cols(), config.ue8m0, reinterpret_cast<uint8_t*>(codes),
                      scales);
      t.data = codes;
      t.scale_inv = scales;
      return;
    }
    std::byte* data = buffers->get(t.numel() * spec::dtype_bytes(t.dtype));
    store(v, t.dtype, data);
    t.data = data;
  };
  walk_weights(*w, w->config, true, make);
  if (config.tie_word_embeddings) w->lm_head = w->embed_tokens;
  for (MtpWeights& t : w->mtp) {
    t.embed_tokens = w->embed_tokens;
    t.shared_head_head = w->lm_head;
  }
  w->storage = buffers;
  return w;
}

namespace {

constexpr int kLevels = 4096;            // quantiles of the fast fill; 12 bits each
constexpr int64_t kFillChunk = 1 << 16;  // elements; a multiple of 4
constexpr size_t kHuge = size_t{2} << 20;

// 64-byte aligned (2 MiB and huge pages advised from there on), freed together.
struct AlignedBuffers {
  std::vector<void*> blocks;
  AlignedBuffers() = default;
  AlignedBuffers(const AlignedBuffers&) = delete;
  AlignedBuffers& operator=(const AlignedBuffers&) = delete;
  ~AlignedBuffers() {
    for (void* p : blocks) std::free(p);
  }
  void* get(int64_t bytes) {
    const size_t n = (static_cast<size_t>(bytes) + 63) / 64 * 64;
    void* p = nullptr;
    if (posix_memalign(&p, n >= kHuge ? kHuge : 64, std::max<size_t>(n, 64)) != 0)
      throw std::bad_alloc();
    blocks.push_back(p);
    if (n >= kHuge) (void)madvise(p, n / kHuge * kHuge, MADV_HUGEPAGE);  // advice only
    return p;
  }
};

template <class T>
void fill_levels(T* out, int64_t n, const Rng& rng, const T (&level)[kLevels]) {
  on_all_cores(n, kFillChunk, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i += 4) {
      const uint64_t bits = rng_u64(rng, static_cast<uint64_t>(i / 4));
      for (int64_t j = i; j < std::min(to, i + 4); ++j)
        out[j] = level[bits >> (4 + 16 * (j - i)) & (kLevels - 1)];
    }
  });
}
double quantile(int level) { return rng_normal_quantile((level + 0.5) / kLevels); }

}  // namespace

WeightsPtr fast_random_weights(const ModelConfig& config, uint64_t seed, spec::DType dtype) {
  if (dtype != DType::bf16 && dtype != DType::f8e4m3)
    throw Error(ExitCode::usage, "fast random weights", "dtype", "bf16 or f8e4m3",
                spec::dtype_name(dtype));
  auto buffers = std::make_shared<AlignedBuffers>();
  auto w = std::make_shared<ModelWeights>();
  w->config = config;
  w->config.fp8 = dtype == DType::f8e4m3;
  w->config.torch_dtype = "bfloat16";
  const auto make = [&](TensorView& t, const std::string& name, const Shape& shape, Role role) {
    if (role == Role::mtp_embed || role == Role::mtp_head) return;
    if (role == Role::head && config.tie_word_embeddings) return;
    t.name = name;
    t.shape = shape;
    const Rng rng{seed, rng_stream(name.c_str())};
    const double mean = role == Role::norm ? 1 : 0,
                 std = role == Role::norm    ? 0.1
                       : role == Role::bias  ? 0.05
                       : role == Role::embed ? 1.0
                                             : 1.0 / std::sqrt(static_cast<double>(t.cols()));
    if (role == Role::quantisable && dtype == DType::f8e4m3) {
      // Codes have a deviation of 100; the scales lie between half and one and a half of what that asks for.
      uint8_t level[kLevels];
      for (int i = 0; i < kLevels; ++i)
        level[i] = spec::to_f8e4m3(static_cast<float>(100 * quantile(i))).bits;
      const int64_t blocks = (t.rows() + 127) / 128 * ((t.cols() + 127) / 128);
      auto* codes = static_cast<uint8_t*>(buffers->get(t.numel()));
      auto* scales = static_cast<float*>(buffers->get(4 * blocks));
      fill_levels(codes, t.numel(), rng, level);
      for (int64_t b = 0; b < blocks; ++b)
        scales[b] = static_cast<float>(
            std / 100 * (0.5 + rng_uniform({seed, ~rng.stream}, static_cast<uint64_t>(b))));
      t.dtype = DType::f8e4m3;
      t.data = codes;
      t.scale_inv = scales;
    } else if (role == Role::bias) {
      auto* out = static_cast<float*>(buffers->get(4 * t.numel()));
      for (int64_t i = 0; i < t.numel(); ++i)
        out[i] = static_cast<float>(std * rng_normal(rng, static_cast<uint64_t>(i)));
      t.dtype = DType::f32;
      t.data = out;
    } else {
      uint16_t level[kLevels];
      for (int i = 0; i < kLevels; ++i)
        level[i] = spec::to_bf16(static_cast<float>(mean + std * quantile(i))).bits;
      auto* out = static_cast<uint16_t*>(buffers->get(2 * t.numel()));
      fill_levels(out, t.numel(), rng, level);
      t.dtype = DType::bf16;
      t.data = out;
    }
  };
  walk_weights(*w, w->config, true, make);
  if (config.tie_word_embeddings) w->lm_head = w->embed_tokens;
  for (MtpWeights& t : w->mtp) {
    t.embed_tokens = w->embed_tokens;
    t.shared_head_head = w->lm_head;
  }
  w->storage = buffers;
  w->in_place = true;
  return w;
}

}  // namespace v3b::model
