#include "bench/harness/peaks.h"

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <iterator>

#include "bench/harness/check.h"
#include "bench/harness/peaks_kernels.h"
#include "kernels/core/buffer.h"
#include "kernels/core/cpu.h"
#include "kernels/core/cuda_peaks.h"

namespace v3b::bench {
namespace {

constexpr int64_t kDefaultLlc = 32 << 20;
// A pass is cut into windows and the best one counts: a window is short enough to run undisturbed
// even where other processes want the same cores.
constexpr int kWindows = 8;
constexpr double kRateSeconds = 0.0006;  // of one window of an arithmetic probe

volatile double g_sink = 0;

double seconds_since(std::chrono::steady_clock::time_point t0) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
}

// One buffer for all bandwidth probes and for scrubbing, on huge pages where the kernel gives them.
kern::Buffer<uint64_t>& probe_buffer() {
  static kern::Buffer<uint64_t> buffer = [] {
    int64_t bytes = std::clamp<int64_t>(4 * last_level_cache_bytes(), 256 << 20, int64_t{1} << 30);
    const int64_t memory = available_memory_bytes();
    if (memory > 0) bytes = std::min(bytes, memory / 8);
    kern::Buffer<uint64_t> b(bytes / 4096 * 512);
    return b;
  }();
  return buffer;
}

// Sum of [p, p + n) read in kStreams parallel streams, each asked for kAhead words ahead (0: left to the machine), kLines lines of a stream at a
// time; n in 8-byte words, a multiple of 64. Up to kLines - 1 lines of a stream stay unread.
template <int kStreams, int kAhead, int kLines>
uint64_t read_streams(const uint64_t* p, int64_t n) {
  const int64_t step = n / kStreams / 8 * 8;
  __m256i sum[kStreams * kLines];
  for (auto& s : sum) s = _mm256_setzero_si256();
  for (int64_t i = 0; i + 8 * kLines <= step; i += 8 * kLines) {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams * kLines; ++s) {
      const uint64_t* q = p + s / kLines * step + i + s % kLines * 8;
      if (kAhead > 0) _mm_prefetch(reinterpret_cast<const char*>(q + kAhead), _MM_HINT_T0);
      sum[s] = _mm256_add_epi64(sum[s], _mm256_load_si256(reinterpret_cast<const __m256i*>(q)));
      sum[s] = _mm256_add_epi64(sum[s], _mm256_load_si256(reinterpret_cast<const __m256i*>(q + 4)));
    }
  }
  for (int s = 1; s < kStreams * kLines; ++s) sum[0] = _mm256_add_epi64(sum[0], sum[s]);
  return static_cast<uint64_t>(_mm256_extract_epi64(sum[0], 0));
}
// One linear stream a thread leaves the memory of some machines half idle, on others one or two beat eight by a fifth:
// every probe tries them all.
constexpr auto read_all = read_streams<8, 96, 1>;
using ReadForm = uint64_t (*)(const uint64_t*, int64_t);
constexpr ReadForm kReads[] = {read_all, read_streams<2, 96, 1>, read_streams<2, 0, 4>,
                               read_streams<1, 1024, 4>, read_streams<1, 0, 4>};

// Streaming copy: the destination is written past the caches, kLines lines after as many were read (one by one a quarter
// slower on Zen 4). n a multiple of 8 * kLines.
template <int kAhead, int kLines>
void copy_stream(const uint64_t* src, uint64_t* dst, int64_t n) {
  __m256i line[2 * kLines];
  for (int64_t i = 0; i < n; i += 8 * kLines) {
#pragma GCC unroll 8
    for (int k = 0; k < kLines && kAhead > 0; ++k)
      _mm_prefetch(reinterpret_cast<const char*>(src + i + 8 * k + kAhead), _MM_HINT_T0);
#pragma GCC unroll 8
    for (int k = 0; k < 2 * kLines; ++k)
      line[k] = _mm256_load_si256(reinterpret_cast<const __m256i*>(src + i + 4 * k));
#pragma GCC unroll 8
    for (int k = 0; k < 2 * kLines; ++k)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i + 4 * k), line[k]);
  }
  _mm_sfence();
}
using CopyForm = void (*)(const uint64_t*, uint64_t*, int64_t);
constexpr CopyForm kCopies[] = {copy_stream<128, 1>, copy_stream<128, 4>, copy_stream<1024, 4>};

// Stores alone: streaming, the processor's own way, and through the caches.
void fill_stream(uint64_t* dst, int64_t n) {
  const __m256i v = _mm256_set1_epi64x(n);
  for (int64_t i = 0; i < n; i += 8) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i), v);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i + 4), v);
  }
  _mm_sfence();
}
void fill_string(uint64_t* dst, int64_t n) {
  int64_t bytes = 8 * n;
  __asm__ volatile("rep stosb" : "+D"(dst), "+c"(bytes) : "a"(0) : "memory");
}
void fill_plain(uint64_t* dst, int64_t n) {
  const __m256i v = _mm256_set1_epi64x(n);
  for (int64_t i = 0; i < n; i += 4) _mm256_store_si256(reinterpret_cast<__m256i*>(dst + i), v);
}
using FillForm = void (*)(uint64_t*, int64_t);
constexpr FillForm kFills[] = {fill_stream, fill_string, fill_plain};

// Each thread works on its own page-aligned share of [0, words); returns bytes a second.
template <class F>
double bandwidth(int64_t words, double bytes, F&& f) {
  std::chrono::steady_clock::time_point t0;
  double seconds = 1;
#pragma omp parallel
  {
    const int64_t t = omp_get_num_threads(), i = omp_get_thread_num();
    const int64_t share = words / t / 512 * 512;
#pragma omp barrier
#pragma omp master
    t0 = std::chrono::steady_clock::now();
#pragma omp barrier
    f(i * share, share);
#pragma omp barrier
#pragma omp master
    seconds = seconds_since(t0);
  }
  return bytes / seconds;
}

using RateLoop = double (*)(int64_t, double*) noexcept;

double rate(RateLoop loop) {
  // How many rounds fill the time of a pass: from a short run on this thread.
  double sink = 0;
  int64_t rounds = 200;
  for (;; rounds *= 4) {
    const auto t0 = std::chrono::steady_clock::now();
    loop(rounds, &sink);
    const double s = seconds_since(t0);
    if (s > kRateSeconds / 10) {
      rounds = std::max<int64_t>(
          1, static_cast<int64_t>(static_cast<double>(rounds) * kRateSeconds / s));
      break;
    }
  }
  double best = 0;
  for (int i = 0; i < kWindows; ++i) {
    double operations = 0;
    const double per_second = bandwidth(0, 1.0, [&](int64_t, int64_t) {
      double mine = 0;
      const double done = loop(rounds, &mine);
#pragma omp critical
      operations += done, sink += mine;
    });
    best = std::max(best, operations * per_second);
  }
  g_sink = g_sink + sink;
  return best;
}

struct Rate {
  RateLoop loop = nullptr;
  const char* instruction = "";
};

Rate best_rate(const std::string& which) {
  const auto& f = kern::cpu_features();
  if (which == "f32")
    return f.avx512 ? Rate{rate_f32_avx512, "avx512"} : Rate{rate_f32_avx2, "avx2"};
  if (which == "f64")
    return f.avx512 ? Rate{rate_f64_avx512, "avx512"} : Rate{rate_f64_avx2, "avx2"};
  if (which == "bf16") {
    if (f.amx_bf16 && !f.amx_emulated) return {rate_bf16_amx, "amx_bf16"};
    if (f.avx512_bf16) return {rate_bf16_avx512, "avx512_bf16"};
  }
  if (which == "int8") {
    if (f.amx_int8) return {rate_int8_amx, "amx_int8"};
    if (f.avx512_vnni) return {rate_int8_avx512, "avx512_vnni"};
  }
  return {};
}

constexpr const char* kGpu = "gpu_";
bool is_gpu(const std::string& which) { return which.rfind(kGpu, 0) == 0; }

double gpu_rate(const std::string& which) {
  if (which == "gpu_read") return kern::cuda_read_bytes_per_s();
  if (which == "gpu_copy") return kern::cuda_copy_bytes_per_s();
  if (which == "gpu_f32") return kern::cuda_f32_flop_per_s();
  if (which == "gpu_bf16") return kern::cuda_bf16_flop_per_s();
  if (which == "gpu_fp8") return kern::cuda_fp8_flop_per_s();
  return 0;
}

std::string peak_key(const std::string& which) {
  const std::string plain = is_gpu(which) ? which.substr(std::strlen(kGpu)) : which;
  const bool bytes = plain == "read" || plain == "copy" || plain == "write";
  return which + (bytes ? "_gb_s" : plain == "int8" ? "_gop_s" : "_gflop_s");
}

void keep_best(Peaks& peaks, const std::string& key, double v) {
  double& best = peaks[key];
  best = std::max(best, v);
}

}  // namespace

int64_t last_level_cache_bytes() {
  const auto& f = kern::cpu_features();
  const int64_t llc = std::max(f.l3_bytes, f.l2_bytes);
  return llc > 0 ? llc : kDefaultLlc;
}

void probe_peak(const std::string& which, Peaks& peaks, int passes) {
  if (is_gpu(which)) {
    const double v = gpu_rate(which);  // makes passes of its own
    if (v > 0) keep_best(peaks, peak_key(which), v * 1e-9);
    return;
  }
  if (which == "read" || which == "copy" || which == "write") {
    auto& buffer = probe_buffer();
    uint64_t* p = buffer.data();
    const int64_t words = buffer.size();
    const int64_t window = words / kWindows / 1024 * 1024;
    // A window comes again after all the others, in another form.
    static_assert(kWindows % 2 == 0 && std::size(kReads) % 2 == 1 && std::size(kCopies) % 2 == 1 &&
                  std::size(kFills) % 2 == 1);
    const size_t forms = which == "read"   ? std::size(kReads)
                         : which == "copy" ? std::size(kCopies)
                                           : std::size(kFills);
    for (size_t i = 0; i < forms * static_cast<size_t>(passes * kWindows); ++i) {
      uint64_t* at = p + static_cast<int64_t>(i % kWindows) * window;
      if (which == "read") {
        uint64_t sum = 0;
        const double v =
            bandwidth(window, 8.0 * static_cast<double>(window), [&](int64_t lo, int64_t n) {
              const uint64_t mine = kReads[i % forms](at + lo, n);
#pragma omp atomic
              sum += mine;
            });
        g_sink = g_sink + static_cast<double>(sum & 1u);
        keep_best(peaks, "read_gb_s", v * 1e-9);
      } else if (which == "write") {
        const double v = bandwidth(window, 8.0 * static_cast<double>(window),
                                   [&](int64_t lo, int64_t n) { kFills[i % forms](at + lo, n); });
        keep_best(peaks, "write_gb_s", v * 1e-9);
      } else {
        const int64_t half = window / 2;
        const double v = bandwidth(
            half, 16.0 * static_cast<double>(half),
            [&](int64_t lo, int64_t n) { kCopies[i % forms](at + lo, at + half + lo, n); });
        keep_best(peaks, "copy_gb_s", v * 1e-9);
      }
    }
    return;
  }
  const Rate r = best_rate(which);
  if (r.loop == nullptr) return;
  for (int i = 0; i < passes; ++i) keep_best(peaks, peak_key(which), rate(r.loop) * 1e-9);
}

Peaks probe_all_peaks(int passes) {
  Peaks peaks;
  for (const char* which : {"read", "copy", "write", "f32", "f64", "bf16", "int8", "gpu_read",
                            "gpu_copy", "gpu_f32", "gpu_bf16", "gpu_fp8"})
    probe_peak(which, peaks, passes);
  return peaks;
}

std::string roof_instruction(const std::string& which) {
  if (which == "gpu_bf16" || which == "gpu_fp8") return kern::cuda_tensor_instruction();
  const Rate r = best_rate(which);
  return r.loop != nullptr ? r.instruction : "";
}

double roof_rate(const Peaks& peaks, const std::string& which) {
  const auto it = peaks.find(peak_key(which));
  if (it != peaks.end()) return it->second * 1e9;
  if (which == "gpu_fp8") return roof_rate(peaks, "gpu_bf16");
  return which == "bf16" ? roof_rate(peaks, "f32") : 0;
}

void scrub_caches() {
  auto& buffer = probe_buffer();
  const int64_t words = std::min(buffer.size(), 2 * last_level_cache_bytes() / 8);
  uint64_t sum = 0;
  bandwidth(words, 1.0, [&](int64_t lo, int64_t n) {
    const uint64_t mine = read_all(buffer.data() + lo, n);
#pragma omp atomic
    sum += mine;
  });
  g_sink = g_sink + static_cast<double>(sum & 1u);
}

}  // namespace v3b::bench
