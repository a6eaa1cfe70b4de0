// The CUDA attention kernels in the emulation: the small odd cases of their ops and small ones of V3's dimensions, each in
// both orders of threads, and what no op covers: the tile of devices with less shared memory, gathered rows, graphs.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "bench/harness/check.h"
#include "bench/ops/registry.h"
#include "kernels/attention/attention.h"
#include "kernels/attention/attention_cuda.h"
#include "kernels/attention/attention_cudnn.h"
#include "kernels/attention/split_schedule.cuh"
#include "kernels/core/cuda_device.cuh"
#include "reference/kv_cache.h"
#include "reference/mla.h"

namespace v3b {
namespace {

const bool kEmulate = [] { return setenv("V3BENCH_CUDA", "emulate", 1) == 0; }();

__global__ void nothing(int) {}
// Launches alternate between ascending and descending threads; one more flips the order of what follows.
void flip_order() { kern::launch(nothing, {dim3(1), 32, 0, kern::cuda_stream()}, 0); }

const bench::OpBase* op_named(const std::string& name) {
  static const auto ops = bench::all_ops();
  for (const auto& op : ops)
    if (op->name() == name) return op.get();
  return nullptr;
}
// Checks every CUDA implementation that takes the case; returns how many did.
int check(const std::string& op_name, const bench::CaseInfo& c, const std::string& which) {
  const bench::OpBase* op = op_named(op_name);
  bench::CaseChecker checker(*op, c, 11);
  int checked = 0;
  for (const auto& how : op->impls()) {
    if (how.find(which) == std::string::npos) continue;
    for (int order = 0; order < 2; ++order) {
      flip_order();
      const auto r = checker.check(how);
      if (r.status == "unsupported" || how == "cuda_cudnn") continue;  // a library: hardware only
      EXPECT_EQ(r.status, "passed") << op_name << "." << how << " " << c.text << ": " << r.reason;
      ++checked;
    }
  }
  return checked;
}

TEST(CudaEmulatedAttention, OddCasesOfEveryOp) {
  int checked = 0;
  for (const char* name :
       {"mla_cache_write", "mla_decode", "attention_decode", "attention_prefill", "mla_prefill"}) {
    ASSERT_NE(op_named(name), nullptr) << name;
    for (const auto& c : op_named(name)->cases())
      if (c.check_only) checked += check(name, c, "cuda_");
  }
  EXPECT_GE(checked, 100);
}

TEST(CudaEmulatedAttention, DimensionsOfV3) {
  const std::vector<std::pair<const char*, const char*>> cases = {
      {"mla_cache_write", "T=40,kv_format=fp8_656_pow2"},
      {"mla_decode", "s=300,n_h=16"},
      {"mla_decode", "s=130,n_h=128"},
      {"mla_decode", "s=300,n_h=16,kv_format=fp8_656_pow2"},
      {"mla_decode", "B=3,s=150,min_s=1,s_q=2,n_h=33,kv_format=fp8_656_free"},
      {"mla_decode", "B=3,s=400,min_s=0,s_q=2,n_h=16"},
      {"mla_decode", "B=40,s=90,min_s=0,n_h=16"},
      {"attention_decode", "B=2,s=300,min_s=90,n_h=16,n_kv=4"},
      {"attention_decode", "s=200,n_h=4,n_kv=4,d_qk=192,d_v=128"},
      {"attention_decode", "s=200,n_h=40,n_kv=1"},
      {"attention_prefill", "T=150,s0=33,n_h=4,n_kv=2"},
      {"attention_prefill", "T=130,n_h=8,n_kv=1"},
      {"mla_prefill", "T=80,s0=70,n_h=2"},
      {"mla_prefill", "T=30,n_h=8"},
  };
  for (const auto& [name, text] : cases)
    EXPECT_EQ(check(name, op_named(name)->parse_case(text), "cuda_mma") +
                  (std::string(name) == "mla_cache_write"
                       ? check(name, op_named(name)->parse_case(text), "cuda_simt")
                       : 0),
              2)
        << name << " " << text;
}

// Every tile of every sequence belongs to exactly one segment, slots are unique and below parts + B.
TEST(CudaEmulatedAttention, ScheduleCoversEveryTileOnce) {
  for (const std::vector<int>& lengths :
       {std::vector<int>{0}, {5}, {0, 0, 700, 3, 0}, {64, 65, 1, 0, 64}, std::vector<int>(70, 33)})
    for (const int parts : {1, 3, 8, 100}) {
      const int tile = 32, B = static_cast<int>(lengths.size());
      int total = 0;
      for (const int n : lengths) total += kern::dev::split_tiles(n, tile);
      const int chunk = kern::dev::split_chunk(total, parts);
      EXPECT_GE(chunk * parts, total);
      std::vector<int> slots(static_cast<size_t>(parts + B), 0);
      int before = 0;
      for (int b = 0; b < B; ++b) {
        const int n = kern::dev::split_tiles(lengths[size_t(b)], tile);
        if (n > 0)
          for (int p = before / chunk; p <= (before + n - 1) / chunk; ++p) {
            ASSERT_LT(p, parts);
            EXPECT_EQ(slots[size_t(p + b)]++, 0) << p << "," << b;
          }
        before += n;
      }
      EXPECT_EQ(before, total);
    }
}

// One paged problem with V3's dimensions: 70 rows, two sequences.
struct Paged {
  static constexpr int64_t kB = 2, kSq = 2, kHeads = 35, kC = 512, kR = 64, kPage = 64, kBlocks = 5;
  static constexpr int64_t kDim = kC + kR, kRows = kSq * kHeads;
  std::vector<spec::bf16> q = std::vector<spec::bf16>(kB * kRows * kDim),
                          cache = std::vector<spec::bf16>(kBlocks * kPage * kDim);
  std::vector<int32_t> table = {3, 0, -7, 1, 2147483000, 99}, lengths = {100, 37};
  std::vector<double> out = std::vector<double>(kB * kRows * kC);
  kern::DeviceBuffer dq, dcache, dtable, dlengths, dout, scratch;
  spec::MlaDecodeArgs args{};

  Paged() {
    uint32_t state = 1;
    const auto next = [&] {
      state = state * 1664525u + 1013904223u;
      return spec::to_bf16(static_cast<float>(static_cast<int32_t>(state >> 8) - (1 << 23)) *
                           0x1p-23f);
    };
    for (auto& x : q) x = next();
    for (auto& x : cache) x = next();
    const std::vector<double> dq_ = doubles(q), dc = doubles(cache);
    ref::mla_decode_paged<double>({.B = kB,
                                   .s_q = kSq,
                                   .n_h = kHeads,
                                   .d_c = kC,
                                   .d_r = kR,
                                   .page = kPage,
                                   .max_blocks = 3,
                                   .scale = 0.1},
                                  dq_.data(), dc.data(), table.data(), lengths.data(), out.data());
    upload(dq, q), upload(dcache, cache), upload(dtable, table), upload(dlengths, lengths);
    dout.reserve(2 * kB * kRows * kC);
    args = {kB,
            kSq,
            kHeads,
            kC,
            kR,
            kPage,
            3,
            0.1,
            spec::DType::bf16,
            spec::KvFormat::bf16,
            spec::EmptyLse::pos_inf,
            dq.data(),
            dcache.data(),
            dtable.as<int32_t>(),
            dlengths.as<int32_t>(),
            dout.data(),
            nullptr};
  }
  static std::vector<double> doubles(const std::vector<spec::bf16>& v) {
    std::vector<double> d(v.size());
    for (size_t i = 0; i < v.size(); ++i) d[i] = spec::to_float(v[i]);
    return d;
  }
  template <class T>
  static void upload(kern::DeviceBuffer& b, const std::vector<T>& v) {
    b.reserve(static_cast<int64_t>(v.size() * sizeof(T)));
    kern::cuda_upload(b.data(), v.data(), b.bytes(), kern::cuda_stream());
  }
  // Relative Frobenius error of what stands in the output.
  double error() {
    std::vector<spec::bf16> got(out.size());
    kern::cuda_download(got.data(), dout.data(), dout.bytes(), kern::cuda_stream());
    double diff = 0, norm = 0;
    for (size_t i = 0; i < out.size(); ++i) {
      diff += std::pow(spec::to_float(got[i]) - out[i], 2);
      norm += out[i] * out[i];
    }
    return std::sqrt(diff / norm);
  }
};

TEST(CudaEmulatedAttention, TilesForLessSharedMemory) {
  for (const int64_t shared : {int64_t{0}, int64_t{163} << 10})
    for (int order = 0; order < 2; ++order) {
      Paged p;
      p.scratch.reserve(kern::mla_decode_cuda_mma_scratch_bytes(p.args, shared));
      kern::mla_decode_cuda_mma(p.args, p.scratch.data(), kern::cuda_stream(), shared);
      EXPECT_LT(p.error(), 6e-3) << shared;
      flip_order();
    }
}

TEST(CudaEmulatedAttention, DecodeInAGraphFollowsTheLengths) {
  Paged p;
  p.scratch.reserve(kern::mla_decode_cuda_mma_scratch_bytes(p.args));
  const std::vector<int32_t> other = {12, 64};
  kern::cuda_upload(p.dlengths.data(), other.data(), 8, kern::cuda_stream());
  kern::CudaGraph graph;
  graph.begin(kern::cuda_stream());
  kern::mla_decode_cuda_mma(p.args, p.scratch.data(), kern::cuda_stream());
  graph.end(kern::cuda_stream());
  graph.launch(kern::cuda_stream());
  EXPECT_GT(p.error(), 0.05);  // other lengths, other result
  kern::cuda_upload(p.dlengths.data(), p.lengths.data(), 8, kern::cuda_stream());
  graph.launch(kern::cuda_stream());
  EXPECT_LT(p.error(), 6e-3);
}

TEST(CudaEmulatedAttention, GatheredRowsAreWhatTheReferenceReads) {
  const int64_t page = 16, blocks = 5, s = 61;
  const std::vector<int32_t> table = {4, 0, 2, 1};
  for (const auto& [d_c, d_r] : {std::pair<int64_t, int64_t>{160, 10}, {512, 64}})
    for (const auto dtype : {spec::DType::f32, spec::DType::bf16})
      for (const auto format :
           {spec::KvFormat::bf16, spec::KvFormat::fp8_656_pow2, spec::KvFormat::fp8_656_free}) {
        std::vector<float> c(size_t(blocks * page * d_c)), pe(size_t(blocks * page * d_r));
        for (size_t i = 0; i < c.size(); ++i) c[i] = std::sin(0.1f * float(i)) * 3;
        for (size_t i = 0; i < pe.size(); ++i) pe[i] = std::cos(0.1f * float(i));
        std::vector<int32_t> slots(size_t(blocks * page));
        for (size_t i = 0; i < slots.size(); ++i) slots[i] = int32_t(i);
        std::vector<uint8_t> cache(
            size_t(blocks * page * spec::mla_cache_row_bytes(format, dtype, d_c, d_r)));
        ref::mla_cache_write(blocks * page, d_c, d_r, format, dtype, c.data(), pe.data(),
                             slots.data(), cache.data());
        kern::DeviceBuffer dcache, dtable, out(s * (d_c + d_r) * spec::dtype_bytes(dtype));
        Paged::upload(dcache, cache), Paged::upload(dtable, table);
        kern::mla_cache_gather_cuda_simt(
            {s, d_c, d_r, page, dtype, format, dtable.as<int32_t>(), dcache.data(), out.data()},
            kern::cuda_stream());
        std::vector<uint8_t> got(size_t(out.bytes()));
        kern::cuda_download(got.data(), out.data(), out.bytes(), kern::cuda_stream());
        std::vector<float> want(size_t(d_c + d_r));
        for (int64_t j = 0; j < s; ++j) {
          ref::mla_cache_read(table[size_t(j / page)] * page + j % page, d_c, d_r, format, dtype,
                              cache.data(), want.data());
          for (int64_t i = 0; i < d_c + d_r; ++i) {
            const int64_t at = j * (d_c + d_r) + i;
            const float x =
                dtype == spec::DType::f32
                    ? reinterpret_cast<const float*>(got.data())[at]
                    : spec::to_float(reinterpret_cast<const spec::bf16*>(got.data())[at]);
            ASSERT_EQ(x, want[size_t(i)]) << j << "," << i;
          }
        }
      }
}

// What the library's attention gets and gives (attention_cudnn.h): only its own call needs a GPU.
TEST(LibraryGlue, KeysAndLse) {
  const int64_t T = 3, s0 = 4, s = s0 + T, n_h = 3, d_n = 5, d_r = 2, d_v = 6, both = d_n + d_v;
  std::vector<uint16_t> kv(size_t(s * (n_h * both + 1))), pe(size_t(s * (d_r + 1)));
  for (size_t i = 0; i < kv.size(); ++i) kv[i] = uint16_t(i);
  for (size_t i = 0; i < pe.size(); ++i) pe[i] = uint16_t(10000 + i);
  kern::DeviceBuffer dkv, dpe, keys(s * n_h * (d_n + d_r) * 2);
  Paged::upload(dkv, kv), Paged::upload(dpe, pe);
  spec::MlaPrefillArgs a{};
  a.T = T, a.s0 = s0, a.n_h = n_h, a.d_n = d_n, a.d_r = d_r, a.d_v = d_v;
  a.kv = dkv.data(), a.k_pe = dpe.data();
  a.kv_stride = n_h * both + 1, a.k_pe_stride = d_r + 1, a.q_stride = n_h * (d_n + d_r);
  a.o_stride = n_h * d_v;
  kern::build_keys_cuda_simt(a, keys.data(), kern::cuda_stream());
  std::vector<uint16_t> got(size_t(keys.bytes() / 2));
  kern::cuda_download(got.data(), keys.data(), keys.bytes(), kern::cuda_stream());
  // The plan's strides say where q, keys and values of (token, head) lie.
  const kern::SdpaShape x = kern::sdpa_of(a);
  EXPECT_EQ(x.T_k, s);
  EXPECT_TRUE(x.causal);
  for (int64_t t = 0; t < s; ++t)
    for (int64_t h = 0; h < n_h; ++h)
      for (int64_t j = 0; j < d_n + d_r; ++j)
        ASSERT_EQ(got[size_t(t * x.k.token + h * x.k.head + j)],
                  j < d_n ? kv[size_t(t * x.v.token + h * x.v.head + j)]
                          : pe[size_t(t * (d_r + 1) + j - d_n)]);
  std::vector<float> lse(size_t(T * n_h)), back(lse.size());
  for (size_t i = 0; i < lse.size(); ++i) lse[i] = float(i);
  kern::DeviceBuffer from, to(T * n_h * 4);
  Paged::upload(from, lse);
  kern::transpose_lse_cuda_simt(T, n_h, from.as<float>(), to.as<float>(), kern::cuda_stream());
  kern::cuda_download(back.data(), to.data(), to.bytes(), kern::cuda_stream());
  for (int64_t t = 0; t < T; ++t)
    for (int64_t h = 0; h < n_h; ++h) EXPECT_EQ(back[size_t(t * n_h + h)], lse[size_t(h * T + t)]);
}

}  // namespace
}  // namespace v3b
