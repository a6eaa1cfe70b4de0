// Products through oneDNN's matmul. Creating a primitive costs ~0.1-1 ms (code generation), looking
// one up must cost next to nothing, so every thread keeps its own table from the full shape to a
// ready primitive with its three memory objects and a scratch buffer: no lock, no allocation, no
// std::unordered_map of arguments on the hot path. The generated code itself is shared between
// threads by oneDNN's own cache.
#include "kernels/gemm/gemm.h"

#include <omp.h>

#include <cstdio>
#include <cstdlib>
#include <dnnl.hpp>
#include <memory>
#include <unordered_map>

#include "kernels/core/buffer.h"
#include "kernels/core/cpu.h"

namespace v3b::kern {
namespace {

using spec::DType;

// All that decides the generated code. `threads` too: oneDNN splits the work when it creates a
// primitive, and a primitive made for two threads computes half of C when it runs inside a parallel
// region.
struct Key {
  int64_t m, n, k, lda, ldb, ldc, count, sa, sb, sc;
  int32_t flags, threads;
  bool operator==(const Key&) const = default;
};
struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64_t h = 0x9e3779b97f4a7c15u;
    const auto mix = [&h](int64_t v) {
      h = (h ^ static_cast<uint64_t>(v)) * 0xff51afd7ed558ccdu;
      h ^= h >> 32;
    };
    mix(key.m), mix(key.n), mix(key.k), mix(key.lda), mix(key.ldb), mix(key.ldc);
    mix(key.count), mix(key.sa), mix(key.sb), mix(key.sc), mix(key.flags), mix(key.threads);
    return h;
  }
};

struct Entry {
  dnnl::matmul prim;
  dnnl::memory a, b, c;
  dnnl::memory scratch;
  int64_t scratch_bytes = 0;
  bool via_f32 = false;  // oneDNN has nothing for these types here: through fp32 copies
};

// Old shapes are dropped wholesale when the table is full: an endless stream of new shapes must not
// eat the memory.
constexpr size_t kMaxEntries = 2048;

struct ThreadCache {
  std::unordered_map<Key, std::unique_ptr<Entry>, KeyHash> entries;
  Key last_key{};
  Entry* last = nullptr;
  dnnl::stream stream;
  Buffer<uint8_t> scratch;
  Buffer<float> wide_a, wide_b, wide_c;
};

const dnnl::engine& cpu_engine() {
  static const dnnl::engine engine = [] {
    (void)cpu_features();  // applies V3BENCH_MAX_ISA and asks for AMX before oneDNN looks
    return dnnl::engine(dnnl::engine::kind::cpu, 0);
  }();
  return engine;
}

ThreadCache& thread_cache() {
  thread_local ThreadCache cache = [] {
    ThreadCache c;
    c.stream = dnnl::stream(cpu_engine());
    return c;
  }();
  return cache;
}

dnnl::memory::data_type dnnl_type(DType t) {
  return t == DType::bf16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32;
}

[[noreturn]] void die(const GemmArgs& g, const char* what) {
  std::fprintf(
      stderr,
      "v3bench: oneDNN gemm M=%lld N=%lld K=%lld lda=%lld ldb=%lld ldc=%lld ta=%d tb=%d: %s\n",
      static_cast<long long>(g.M), static_cast<long long>(g.N), static_cast<long long>(g.K),
      static_cast<long long>(g.lda), static_cast<long long>(g.ldb), static_cast<long long>(g.ldc),
      g.trans_a, g.trans_b, what);
  std::abort();
}

std::unique_ptr<Entry> make_entry(const GemmArgs& g, const Key& key) {
  using dims = dnnl::memory::dims;
  const auto desc = [&](int64_t rows, int64_t cols, int64_t ld, bool trans, int64_t stride,
                        DType t) {
    const int64_t rs = trans ? 1 : ld, cs = trans ? ld : 1;
    if (key.count == 1) return dnnl::memory::desc(dims{rows, cols}, dnnl_type(t), dims{rs, cs});
    const int64_t n = stride == 0 ? 1 : key.count;  // stride 0: the same operand for every problem
    const int64_t bs = stride == 0 ? rows * cols : stride;
    return dnnl::memory::desc(dims{n, rows, cols}, dnnl_type(t), dims{bs, rs, cs});
  };
  auto e = std::make_unique<Entry>();
  const auto md_a = desc(g.M, g.K, g.lda, g.trans_a, key.sa, g.ab_type);
  const auto md_b = desc(g.K, g.N, g.ldb, g.trans_b, key.sb, g.ab_type);
  const auto md_c = desc(g.M, g.N, g.ldc, false, key.sc, g.c_type);
  dnnl::primitive_attr attr;
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  if (g.accumulate) {
    dnnl::post_ops ops;
    ops.append_sum(1.0F);
    attr.set_post_ops(ops);
  }
  // Inside a parallel region oneDNN must plan for one thread; the setting belongs to this thread
  // only.
  const int before = omp_get_max_threads();
  if (before != key.threads) omp_set_num_threads(key.threads);
  const dnnl::matmul::primitive_desc pd(cpu_engine(), md_a, md_b, md_c, attr, /*allow_empty=*/true);
  if (pd) e->prim = dnnl::matmul(pd);
  if (before != key.threads) omp_set_num_threads(before);
  if (!pd) {
    if (g.ab_type == DType::f32 && g.c_type == DType::f32) die(g, "no implementation");
    e->via_f32 = true;
    return e;
  }
  const auto md_s = pd.scratchpad_desc();
  e->scratch_bytes = static_cast<int64_t>(md_s.get_size());
  e->a = dnnl::memory(md_a, cpu_engine(), nullptr);
  e->b = dnnl::memory(md_b, cpu_engine(), nullptr);
  e->c = dnnl::memory(md_c, cpu_engine(), nullptr);
  e->scratch = dnnl::memory(md_s, cpu_engine(), nullptr);
  return e;
}

Entry& lookup(ThreadCache& tc, const GemmArgs& g, const Key& key) {
  if (tc.last != nullptr && tc.last_key == key) return *tc.last;
  auto it = tc.entries.find(key);
  if (it == tc.entries.end()) {
    if (tc.entries.size() >= kMaxEntries) tc.entries.clear();
    it = tc.entries.emplace(key, make_entry(g, key)).first;
  }
  tc.last_key = key;
  tc.last = it->second.get();
  return *tc.last;
}

void run(ThreadCache& tc, Entry& e, const GemmArgs& g, int threads) {
  if (tc.scratch.size() < e.scratch_bytes) tc.scratch.reserve_discard(e.scratch_bytes);
  void* a = const_cast<void*>(g.a);  // oneDNN's handles are not const; A and B are only read
  void* b = const_cast<void*>(g.b);
  dnnl_memory_set_data_handle(e.a.get(), a);
  dnnl_memory_set_data_handle(e.b.get(), b);
  dnnl_memory_set_data_handle(e.c.get(), g.c);
  dnnl_memory_set_data_handle(e.scratch.get(), tc.scratch.data());
  const dnnl_exec_arg_t args[4] = {{DNNL_ARG_SRC, e.a.get()},
                                   {DNNL_ARG_WEIGHTS, e.b.get()},
                                   {DNNL_ARG_DST, e.c.get()},
                                   {DNNL_ARG_SCRATCHPAD, e.scratch.get()}};
  // A primitive runs on the team that it was made for; the setting belongs to this thread only.
  const int before = omp_get_max_threads();
  if (before != threads) omp_set_num_threads(threads);
  const bool ok = dnnl_primitive_execute(e.prim.get(), tc.stream.get(), 4, args) == dnnl_success;
  if (before != threads) omp_set_num_threads(before);
  if (!ok) die(g, "execution failed");
}

void* at(const void* p, int64_t elements, DType t) {
  return const_cast<uint8_t*>(static_cast<const uint8_t*>(p)) + elements * spec::dtype_bytes(t);
}

void run_via_f32(ThreadCache& tc, const GemmArgs& g, int64_t count, int64_t sa, int64_t sb,
                 int64_t sc, int threads);

void zero_c(const GemmArgs& g, int64_t count, int64_t sc) {
  const int64_t bytes = spec::dtype_bytes(g.c_type);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t r = 0; r < g.M; ++r) {
      uint8_t* row = static_cast<uint8_t*>(g.c) + (i * sc + r * g.ldc) * bytes;
      std::fill(row, row + g.N * bytes, uint8_t{0});
    }
  }
}

void run_any(const GemmArgs& g, int64_t count, int64_t sa, int64_t sb, int64_t sc, int threads) {
  if (count == 0 || g.M == 0 || g.N == 0) return;
  if (g.K == 0) {
    if (!g.accumulate) zero_c(g, count, sc);
    return;
  }
  ThreadCache& tc = thread_cache();
  const int32_t flags = (g.trans_a ? 1 : 0) | (g.trans_b ? 2 : 0) | (g.accumulate ? 4 : 0) |
                        (g.ab_type == DType::bf16 ? 8 : 0) | (g.c_type == DType::bf16 ? 16 : 0);
  const Key key{g.M, g.N, g.K, g.lda, g.ldb, g.ldc, count, sa, sb, sc, flags, threads};
  Entry& e = lookup(tc, g, key);
  if (e.via_f32) return run_via_f32(tc, g, count, sa, sb, sc, threads);
  run(tc, e, g, threads);
}

// bf16 operands are widened to fp32 (dense copies), fp32 ones are used as they are; a bf16 C is
// rounded from an fp32 one.
void run_via_f32(ThreadCache& tc, const GemmArgs& g, int64_t count, int64_t sa, int64_t sb,
                 int64_t sc, int threads) {
  const int64_t ar = g.trans_a ? g.K : g.M, ac = g.trans_a ? g.M : g.K;
  const int64_t br = g.trans_b ? g.N : g.K, bc = g.trans_b ? g.K : g.N;
  const auto widen = [](const void* p, int64_t rows, int64_t cols, int64_t ld, Buffer<float>& out) {
    out.reserve_discard(rows * cols);
    for (int64_t r = 0; r < rows; ++r) {
      convert_bf16_to_f32(static_cast<const spec::bf16*>(p) + r * ld, out.data() + r * cols, cols);
    }
    return out.data();
  };
  for (int64_t i = 0; i < count; ++i) {
    GemmArgs w = g;
    w.a = at(g.a, i * sa, g.ab_type), w.b = at(g.b, i * sb, g.ab_type),
    w.c = at(g.c, i * sc, g.c_type);
    if (g.ab_type == DType::bf16) {
      w.a = widen(w.a, ar, ac, g.lda, tc.wide_a), w.lda = ac;
      w.b = widen(w.b, br, bc, g.ldb, tc.wide_b), w.ldb = bc;
      w.ab_type = DType::f32;
    }
    if (g.c_type == DType::f32) {
      run_any(w, 1, 0, 0, 0, threads);
      continue;
    }
    auto* c = static_cast<spec::bf16*>(w.c);
    tc.wide_c.reserve_discard(g.M * g.N);
    w.c = tc.wide_c.data(), w.ldc = g.N, w.c_type = DType::f32;
    run_any(w, 1, 0, 0, 0, threads);
    for (int64_t r = 0; r < g.M; ++r) {
      convert_f32_to_bf16(tc.wide_c.data() + r * g.N, c + r * g.ldc, g.N);
    }
  }
}

// A size that varies from call to call (tokens of an expert, keys seen so far) would need a new
// primitive each time, 0.3 ms and 100 KiB. Problems small enough for that to hurt are cut at a
// multiple of kGrain, so that a dimension below 2048 needs at most 64 + 124 primitives; the tails
// are again small problems.
constexpr int64_t kGrain = 16, kExactTo = 64;
constexpr double kExactFromFlop = 1e9;  // >= 2.5 ms: a new primitive costs little beside that

int64_t cut(int64_t n) { return n <= kExactTo || n % kGrain == 0 ? n : n / kGrain * kGrain; }

void run_split(const GemmArgs& g, int64_t count, int64_t sa, int64_t sb, int64_t sc, int threads) {
  const double flop = 2.0 * static_cast<double>(g.M) * static_cast<double>(g.N) *
                      static_cast<double>(g.K) * static_cast<double>(count);
  const int64_t m = cut(g.M), n = cut(g.N), k = g.c_type == DType::f32 ? cut(g.K) : g.K;
  if (flop >= kExactFromFlop || (m == g.M && n == g.N && k == g.K)) {
    return run_any(g, count, sa, sb, sc, threads);
  }
  GemmArgs head = g, tail = g;
  if (m != g.M) {
    head.M = m, tail.M = g.M - m;
    tail.a = at(g.a, g.trans_a ? m : m * g.lda, g.ab_type);
    tail.c = at(g.c, m * g.ldc, g.c_type);
  } else if (n != g.N) {
    head.N = n, tail.N = g.N - n;
    tail.b = at(g.b, g.trans_b ? n * g.ldb : n, g.ab_type);
    tail.c = at(g.c, n, g.c_type);
  } else {
    head.K = k, tail.K = g.K - k;
    tail.a = at(g.a, g.trans_a ? k * g.lda : k, g.ab_type);
    tail.b = at(g.b, g.trans_b ? k : k * g.ldb, g.ab_type);
    tail.accumulate = true;
  }
  run_split(head, count, sa, sb, sc, threads);
  run_split(tail, count, sa, sb, sc, threads);
}

}  // namespace

void gemm_batched_onednn(const GemmArgs& g, int64_t count, int64_t stride_a, int64_t stride_b,
                         int64_t stride_c) noexcept {
  try {  // the library's own choice of threads
    run_split(g, count, stride_a, stride_b, stride_c, num_threads());
  } catch (const std::exception& e) {
    die(g, e.what());
  }
}
void gemm_onednn(const GemmArgs& g) noexcept { gemm_batched_onednn(g, 1, 0, 0, 0); }

std::string gemm_onednn_isa() {
  (void)cpu_engine();
  switch (dnnl::get_effective_cpu_isa()) {
    case dnnl::cpu_isa::avx2:
      return "oneDNN:avx2";
    case dnnl::cpu_isa::avx2_vnni:
      return "oneDNN:avx2_vnni";
    case dnnl::cpu_isa::avx2_vnni_2:
      return "oneDNN:avx2_vnni_2";
    case dnnl::cpu_isa::avx512_core:
      return "oneDNN:avx512_core";
    case dnnl::cpu_isa::avx512_core_vnni:
      return "oneDNN:avx512_core_vnni";
    case dnnl::cpu_isa::avx512_core_bf16:
      return "oneDNN:avx512_core_bf16";
    case dnnl::cpu_isa::avx512_core_fp16:
      return "oneDNN:avx512_core_fp16";
    case dnnl::cpu_isa::avx512_core_amx:
      return "oneDNN:avx512_core_amx";
    case dnnl::cpu_isa::avx512_core_amx_fp16:
      return "oneDNN:avx512_core_amx_fp16";
    default:
      return "oneDNN:other";
  }
}

}  // namespace v3b::kern
