#include "bench/harness/host_tensor.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include "bench/harness/check.h"
#include "bench/harness/fill_rng.h"
#include "model/error.h"

namespace v3b::bench {
namespace {

constexpr int64_t kGuard = 64;  // canary bytes on each side
// Larger tensors are rounded up to whole huge pages: a tensor on 4 KiB pages is read and written at half of the
// bandwidth where page walks are nested (a virtual machine), and would measure the pages and not the kernel.
constexpr int64_t kHugeFrom = 1 << 19, kHugePage = 2 << 20;
constexpr int64_t kParallelFrom = 1
                                  << 17;  // elements or bytes; waking the threads costs more below
constexpr int64_t kChunk = 1 << 14;       // elements a thread takes at once
constexpr uint64_t kOutlierEvery = 64;    // about one channel in so many is an outlier
constexpr float kOutlierScale = 8.0f;

unsigned char canary(int64_t i) { return static_cast<unsigned char>(0xC3 ^ (i * 29)); }

float nan_f32() { return std::numeric_limits<float>::quiet_NaN(); }

// Writes n equal NaN (floats) or 0x5A (integers) elements at p.
void poison_elements(spec::DType t, std::byte* p, int64_t n) {
  using enum spec::DType;
  switch (t) {
    case f64:
      std::fill_n(reinterpret_cast<double*>(p), n, std::numeric_limits<double>::quiet_NaN());
      return;
    case f32:
      std::fill_n(reinterpret_cast<float*>(p), n, nan_f32());
      return;
    case bf16:
      std::fill_n(reinterpret_cast<uint16_t*>(p), n, uint16_t{0x7fc0});
      return;
    case f16:
      std::fill_n(reinterpret_cast<uint16_t*>(p), n, uint16_t{0x7e00});
      return;
    case f8e4m3:
      std::memset(p, 0x7f, static_cast<size_t>(n));
      return;
    case i64:
    case i32:
    case u8:
      std::memset(p, 0x5a, static_cast<size_t>(n * spec::dtype_bytes(t)));
      return;
  }
}

template <class T>
T clamp_round(double v) {
  const double r = std::nearbyint(v);
  return static_cast<T>(
      std::clamp(r, double(std::numeric_limits<T>::min()), double(std::numeric_limits<T>::max())));
}

double load(spec::DType t, const std::byte* p, int64_t i) {
  using enum spec::DType;
  switch (t) {
    case f64:
      return reinterpret_cast<const double*>(p)[i];
    case f32:
      return reinterpret_cast<const float*>(p)[i];
    case bf16:
      return spec::to_float(reinterpret_cast<const spec::bf16*>(p)[i]);
    case f16:
      return spec::to_float(reinterpret_cast<const spec::f16*>(p)[i]);
    case f8e4m3:
      return spec::to_float(reinterpret_cast<const spec::f8e4m3*>(p)[i]);
    case i64:
      return static_cast<double>(reinterpret_cast<const int64_t*>(p)[i]);
    case i32:
      return reinterpret_cast<const int32_t*>(p)[i];
    case u8:
      return reinterpret_cast<const uint8_t*>(p)[i];
  }
  return 0;
}

// double -> float that rounds to odd: a later rounding to a narrower type is then the correctly
// rounded one.
float to_odd_f32(double v) {
  float f = static_cast<float>(v);
  if (static_cast<double>(f) == v || !std::isfinite(v) || !std::isfinite(f)) return f;
  if (std::fabs(static_cast<double>(f)) > std::fabs(v)) f = std::nextafterf(f, 0.0f);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(f) | 1u);
}

void store(spec::DType t, std::byte* p, int64_t i, double v) {
  using enum spec::DType;
  switch (t) {
    case f64:
      reinterpret_cast<double*>(p)[i] = v;
      return;
    case f32:
      reinterpret_cast<float*>(p)[i] = static_cast<float>(v);
      return;
    case bf16:
      reinterpret_cast<spec::bf16*>(p)[i] = spec::to_bf16(to_odd_f32(v));
      return;
    case f16:
      reinterpret_cast<spec::f16*>(p)[i] = spec::to_f16(to_odd_f32(v));
      return;
    case f8e4m3:
      reinterpret_cast<spec::f8e4m3*>(p)[i] = spec::to_f8e4m3(to_odd_f32(v));
      return;
    case i64:
      reinterpret_cast<int64_t*>(p)[i] = static_cast<int64_t>(std::nearbyint(v));
      return;
    case i32:
      reinterpret_cast<int32_t*>(p)[i] = clamp_round<int32_t>(v);
      return;
    case u8:
      reinterpret_cast<uint8_t*>(p)[i] = clamp_round<uint8_t>(v);
      return;
  }
}

// f(index, channel) -> float, for every element, in parallel; the result depends on these alone.
template <class F>
void generate(spec::DType t, std::byte* p, int64_t n, int64_t channels, F&& f) {
#pragma omp parallel for schedule(static) if (n > kParallelFrom)
  for (int64_t chunk = 0; chunk < (n + kChunk - 1) / kChunk; ++chunk) {
    const int64_t lo = chunk * kChunk, hi = std::min(n, lo + kChunk);
    int64_t c = lo % channels;
    for (int64_t i = lo; i < hi; ++i) {
      const float v = f(i, c);
      if (++c == channels) c = 0;
      if (t == spec::DType::bf16)
        reinterpret_cast<spec::bf16*>(p)[i] = spec::to_bf16(v);
      else if (t == spec::DType::f32)
        reinterpret_cast<float*>(p)[i] = v;
      else
        store(t, p, i, v);
    }
  }
}

// Before the kernel's promise of memory turns into a killed process.
void check_memory(const std::string& what, const std::vector<int64_t>& shape, int64_t size) {
  constexpr int64_t kFrom = int64_t{64} << 20;  // asking costs more below
  double bytes = static_cast<double>(size);
  for (const int64_t s : shape) bytes *= static_cast<double>(s);
  if (bytes < static_cast<double>(kFrom)) return;
  const double have = static_cast<double>(available_memory_bytes());
  if (bytes < 0x1p60 && (have <= 0 || bytes <= 0.9 * have)) return;
  char text[128];
  std::snprintf(text, sizeof text, "%s needs %.3g GB of memory, %.3g GB are free", what.c_str(),
                bytes / 1e9, have / 1e9);
  throw TooLarge(text);
}

}  // namespace

HostTensor::HostTensor(std::string name, Role role, spec::DType dtype, std::vector<int64_t> shape)
    : name_(std::move(name)), role_(role), dtype_(dtype), shape_(std::move(shape)) {
  for (int64_t s : shape_)
    if (s < 0)
      throw Error(ExitCode::usage, "negative dimension", "tensor " + name_, ">= 0",
                  std::to_string(s));
  check_memory("'" + name_ + "'", shape_, spec::dtype_bytes(dtype_));
  const int64_t n = bytes();
  const int64_t held = n + 2 * kGuard;
  storage_ = kern::Buffer<std::byte>(
      held < kHugeFrom ? held : (held + kHugePage - 1) / kHugePage * kHugePage, false);
  data_ = storage_.data() + kGuard;  // Buffer aligns to as much
  for (int64_t i = 0; i < kGuard; ++i) {
    data_[i - kGuard] = static_cast<std::byte>(canary(i));
    data_[n + i] = static_cast<std::byte>(canary(i));
  }
  if (role_ == Role::output)
    poison();
  else {
#pragma omp parallel for schedule(static) if (n > kParallelFrom)
    for (int64_t lo = 0; lo < n; lo += kChunk * 8)
      std::memset(data_ + lo, 0, static_cast<size_t>(std::min(kChunk * 8, n - lo)));
  }
}

int64_t HostTensor::numel() const {
  int64_t n = 1;
  for (int64_t s : shape_) n *= s;
  return n;
}

double HostTensor::get(int64_t i) const { return load(dtype_, data_, i); }
void HostTensor::set(int64_t i, double v) { store(dtype_, data_, i, v); }

std::vector<double> HostTensor::to_doubles() const {
  const int64_t n = numel();
  check_memory("the float64 copy of '" + name_ + "'", shape_, 8);
  std::vector<double> out(static_cast<size_t>(n));
  double* o = out.data();
#pragma omp parallel for schedule(static) if (n > kParallelFrom)
  for (int64_t c = 0; c < (n + kChunk - 1) / kChunk; ++c)
    read(c * kChunk, std::min(kChunk, n - c * kChunk), o + c * kChunk);
  return out;
}

void HostTensor::read(int64_t first, int64_t n, double* out) const {
  if (dtype_ == spec::DType::bf16) {
    const auto* p = as<spec::bf16>() + first;
    for (int64_t i = 0; i < n; ++i) out[i] = spec::to_float(p[i]);
  } else if (dtype_ == spec::DType::f32) {
    const auto* p = as<float>() + first;
    for (int64_t i = 0; i < n; ++i) out[i] = p[i];
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = load(dtype_, data_, first + i);
  }
}

void HostTensor::poison() {
  const int64_t n = numel(), size = spec::dtype_bytes(dtype_);
#pragma omp parallel for schedule(static) if (n > kParallelFrom)
  for (int64_t lo = 0; lo < n; lo += kChunk)
    poison_elements(dtype_, data_ + lo * size, std::min(kChunk, n - lo));
}

void HostTensor::fill_nan_rows(int64_t first_row, int64_t rows) {
  if (shape_.empty() || first_row < 0 || rows < 0 || first_row + rows > shape_[0])
    throw Error(ExitCode::usage, "rows to poison", "tensor " + name_);
  const int64_t row = shape_[0] == 0 ? 0 : numel() / shape_[0];
  poison_elements(dtype_, data_ + first_row * row * spec::dtype_bytes(dtype_), rows * row);
}

bool HostTensor::canaries_intact() const {
  if (data_ == nullptr) return true;
  const int64_t n = bytes();
  for (int64_t i = 0; i < kGuard; ++i)
    if (data_[i - kGuard] != static_cast<std::byte>(canary(i)) ||
        data_[n + i] != static_cast<std::byte>(canary(i)))
      return false;
  return true;
}

void HostTensor::fill_real(uint64_t seed, double std, bool outliers) {
  const uint64_t key = stream_key(seed, name_), channels = stream_key(seed, name_ + "#channels");
  const int64_t d = shape_.empty() ? 1 : std::max<int64_t>(1, shape_.back());
  std::vector<float> scale(static_cast<size_t>(d), static_cast<float>(std));
  if (outliers && d > 1)
    for (int64_t c = 0; c < d; ++c)
      if (random_u64(channels, static_cast<uint64_t>(c)) % kOutlierEvery == 0)
        scale[static_cast<size_t>(c)] *= kOutlierScale;
  const float* s = scale.data();
  generate(dtype_, data_, numel(), d, [=](int64_t i, int64_t c) {
    return random_normal(key, static_cast<uint64_t>(i)) * s[c];
  });
}

void HostTensor::fill_exact(uint64_t seed, int64_t max_abs) {
  const uint64_t key = stream_key(seed, name_), span = static_cast<uint64_t>(2 * max_abs + 1);
  generate(dtype_, data_, numel(), 1, [=](int64_t i, int64_t) {
    return static_cast<float>(
        static_cast<int64_t>(((random_u64(key, static_cast<uint64_t>(i)) >> 32) * span) >> 32) -
        max_abs);
  });
}

}  // namespace v3b::bench
