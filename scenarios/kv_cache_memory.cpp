// The memory part of the kv-cache scenario: forms, the paged allocator at work, what fits.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <fstream>
#include <memory>

#include "kernels/core/cuda_error.h"
#include "kernels/forward/cuda_arena.h"
#include "kernels/forward/page_pool.h"
#include "model/error.h"
#include "scenarios/kv_cache.h"

namespace v3b::scen {

KvForm parse_kv_form(const std::string& name) {
  using enum model::KvScheme;
  if (name == "mha") return {name, mha, 1};
  if (name == "mqa") return {name, mqa, 1};
  if (name == "mla") return {name, mla, 1};
  if (name == "mla-expanded") return {name, mha_expanded, 1};
  if (name.rfind("gqa-", 0) == 0) {
    int64_t n = 0;
    const char* end = name.data() + name.size();
    const auto r = std::from_chars(name.data() + 4, end, n);
    if (r.ec == std::errc() && r.ptr == end && n >= 1) return {name, gqa, n};
  }
  throw Error(ExitCode::usage, "unknown form of attention", "--forms",
              "mha, gqa-N with N >= 1, mqa, mla-expanded or mla", "'" + name + "'");
}

model::KvElem parse_kv_elem(const std::string& name) {
  using enum model::KvElem;
  for (const auto e : {f32, bf16, f16, fp8})
    if (name == model::kv_elem_name(e)) return e;
  throw Error(ExitCode::usage, "unknown cache dtype", "--dtypes", "f32, bf16, f16 or fp8",
              "'" + name + "'");
}

std::string kv_form_problem(const KvForm& f, const model::ModelConfig& c) {
  const int64_t n_h = c.num_attention_heads;
  if (f.scheme == model::KvScheme::gqa && (f.groups > n_h || n_h % f.groups != 0))
    return fmt::format("{} heads do not divide into {} groups", n_h, f.groups);
  return "";
}

int64_t longest_context(int64_t memory_bytes, int64_t bytes_per_token, int64_t batch,
                        int64_t page) {
  return memory_bytes / (bytes_per_token * page * batch) * page;
}

int64_t resident_bytes() {
  for (const char* path : {"/proc/self/smaps_rollup", "/proc/self/status"}) {
    std::ifstream in(path);
    for (std::string line; std::getline(in, line);) {
      if (line.rfind("Rss:", 0) != 0 && line.rfind("VmRSS:", 0) != 0) continue;
      int64_t kib = 0;
      const char* p = line.data() + line.find_first_of("0123456789");
      if (std::from_chars(p, line.data() + line.size(), kib).ec == std::errc()) return kib * 1024;
    }
  }
  throw Error(ExitCode::not_found, "no figure of resident memory",
              "/proc/self/smaps_rollup, /proc/self/status");
}

namespace {

// What the tracks' pages take in device memory: by the driver's figure of free memory, which counts its own granularity;
// emulated: what was allocated.
int64_t device_bytes(MeasuredCache& m, int64_t page, int64_t row_bytes,
                     const std::vector<std::unique_ptr<kern::PagedTrack>>& tracks) {
  int32_t most = -1;
  for (const auto& t : tracks)
    for (const int32_t b : t->blocks()) most = std::max(most, b);
  try {
    const int64_t free = kern::cuda_free_bytes();
    kern::CudaArena arena(m.layers, page, row_bytes);
    arena.ensure(most + 1);
    const bool counted = kern::cuda_device().mode == kern::CudaMode::device;
    return counted ? free - kern::cuda_free_bytes() : arena.bytes();
  } catch (const kern::CudaOutOfMemory& e) {
    m.reason = e.what();
    return 0;
  }
}

}  // namespace

MeasuredCache measure_cache(int64_t row_bytes, int64_t context, int64_t layers, int64_t sequences,
                            int64_t page, int64_t limit_bytes, bool cuda) {
  MeasuredCache m;
  const int64_t one = (context + page - 1) / page * page * row_bytes;
  if (one > limit_bytes) {
    m.reason =
        fmt::format("one layer of one sequence takes {} bytes, more than the {} allowed a row", one,
                    limit_bytes);
    return m;
  }
  m.layers = std::min(layers, limit_bytes / one);
  m.sequences = std::clamp<int64_t>(limit_bytes / (one * m.layers), 1, sequences);
  m.formula_bytes = context * row_bytes * m.layers * m.sequences;

  std::vector<std::unique_ptr<kern::PagedTrack>> tracks;
  tracks.reserve(static_cast<size_t>(m.sequences));
  const int64_t before = cuda ? 0 : resident_bytes();
  const auto pool =
      std::make_shared<kern::PagePool>(m.layers, page, row_bytes, context * m.sequences);
  for (int64_t s = 0; s < m.sequences; ++s)
    tracks.push_back(std::make_unique<kern::PagedTrack>(pool));
  // All sequences grow in turn by a page, as in batched decoding, so that their pages interleave.
  for (int64_t begin = 0; begin < context; begin += page) {
    const int64_t end = std::min(context, begin + page);
    for (auto& t : tracks) {
      t->reserve(end);
      for (int64_t l = 0; l < m.layers && !cuda; ++l)
        std::memset(pool->arena(l) + t->slot(begin) * row_bytes, 1,
                    static_cast<size_t>((end - begin) * row_bytes));
      t->set_length(end);
    }
  }
  if (cuda)
    m.process_bytes = device_bytes(m, page, row_bytes, tracks);
  else
    m.process_bytes = resident_bytes() - before;
  for (const auto& t : tracks) m.allocated_bytes += t->bytes();
  return m;
}

}  // namespace v3b::scen
