// How many bytes the key-value cache takes in each form of attention, and what a decode step over
// it costs (SPEC 0.4, 1.5, 1.8, 1.9). Writes kv_cache.csv; columns in reports/README.md.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "model/params.h"
#include "scenarios/common.h"

namespace v3b::scen {

// Empty lists take the defaults of --quick or --full.
struct KvCacheOptions : CommonOptions {
  std::vector<std::string>
      presets;  // names of model/presets, or paths of a config.json or its folder
  std::vector<std::string> forms;   // mha, gqa-N, mqa, mla-expanded, mla
  std::vector<std::string> dtypes;  // f32, bf16, f16, fp8
  std::vector<int64_t> contexts, batches;
  std::vector<double>
      memory_gb;          // SI gigabytes for the longest context; default 80 and this machine's own
  int64_t page = 64;      // rows a cache page
  double measure_gb = 0;  // most memory that one measured row takes; 0: 0.1 quick, 0.5 full
  std::vector<std::string> step_presets;  // whose heads the measured decode steps have
  std::vector<int64_t> step_contexts, step_batches;
  double step_gb = 0;  // most bytes that one measured step reads; 0: 0.1 quick, 2.5 full
  std::vector<int64_t>
      run_contexts;  // lengths that the model itself (--model) reads; default 512 and 4096
  bool measure_memory = true, measure_step = true;
  double step_seconds = 0;  // samples of one measured step; 0: 0.1 quick, 0.5 full
};

// Throws v3b::Error. Returns an exit code of DESIGN 4: 1 when a measured kernel failed its check.
int run_kv_cache(const KvCacheOptions& o);

// ---- parts, for tests
// --------------------------------------------------------------------------------------
struct KvForm {
  std::string name;  // as in `forms`
  model::KvScheme scheme = model::KvScheme::mla;
  int64_t groups = 1;  // key-value heads of gqa
};
// Throws Error(usage) naming the legal forms.
KvForm parse_kv_form(const std::string& name);
model::KvElem parse_kv_elem(const std::string& name);
// "" if the form exists for these heads, else why not.
std::string kv_form_problem(const KvForm& f, const model::ModelConfig& c);

// Tokens of one of `batch` equal sequences that fit `memory_bytes` of cache in whole pages.
int64_t longest_context(int64_t memory_bytes, int64_t bytes_per_token, int64_t batch, int64_t page);

// One paged cache, really reserved and written: as many layers and sequences as `limit_bytes`
// permit.
struct MeasuredCache {
  int64_t layers = 0, sequences = 0;  // what the figures below cover
  int64_t formula_bytes = 0;          // of that part
  int64_t allocated_bytes = 0;        // whole pages that the allocator handed out
  int64_t process_bytes =
      0;  // growth of the process' resident memory; on a GPU: of the device memory in use
  std::string reason;  // why nothing was measured
};
// cuda: the pages are in device memory (kernels/forward/cuda_arena.h), written by a fill.
MeasuredCache measure_cache(int64_t row_bytes, int64_t context, int64_t layers, int64_t sequences,
                            int64_t page, int64_t limit_bytes, bool cuda = false);
// The cache format of a dtype: the 8-bit record for fp8 (flags.kv_format if that is one), else bf16,
// which stands for the backend's own dtype.
spec::KvFormat cache_format(model::KvElem e, const spec::Flags& flags);
// The same figures of a real sequence: `backend` reads `context` tokens (any ids) with the model.
MeasuredCache measure_backend(const LoadedModel& m, const std::string& backend, model::KvElem e,
                              int64_t context, int64_t page, const spec::Flags& flags = {});
int64_t resident_bytes();  // of this process, by /proc

}  // namespace v3b::scen
