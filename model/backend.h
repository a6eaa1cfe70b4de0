// What a forward pass is to its callers (scenarios, logits, generate, goldens), whoever computes it:
// reference_f64, reference_f32, cpu_bf16, cpu_f32, later cuda_bf16. SPEC 1.32.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "model/config.h"
#include "model/error.h"
#include "model/weights.h"
#include "reference/spec/flags.h"

namespace v3b::model {

enum class LogitsOf { none, last, all };

struct ForwardOptions {
  LogitsOf logits = LogitsOf::last;
  bool hidden = false;  // what MTP consumes: post-model.norm state (or pre-norm, flag mtp_hidden)
  bool layer_hidden = false;  // residual stream: [0] embedding output, [l+1] after layer l
  bool routes = false;
};
struct LayerRoutes {
  int64_t layer = 0, K = 0;
  std::vector<int32_t> idx;   // [T,K], larger weight order not promised
  std::vector<float> weight;  // [T,K]
  std::vector<float>
      gap;  // [T] how far the choice is from changing (score units); reference backends only
  // [T,K] 1: chosen, but beyond the expert's capacity, so not computed. Empty without a capacity.
  std::vector<char> dropped;
};
struct ForwardResult {
  int64_t T = 0;
  std::vector<float> logits;                     // [T or 1, V]
  std::vector<float> hidden;                     // [T, d]
  std::vector<std::vector<float>> layer_hidden;  // each [T, d]
  std::vector<LayerRoutes> routes;               // MoE layers in order
};

// One sequence's caches: the main layers' paged latent cache and the MTP layers' own.
class Sequence {
 public:
  virtual ~Sequence() = default;
  virtual int64_t length() const = 0;         // tokens in the main cache
  virtual int64_t mtp_length() const = 0;     // rows in the MTP cache
  virtual void truncate(int64_t length) = 0;  // drop main rows past `length`
  virtual void mtp_truncate(int64_t length) = 0;
  virtual int64_t cache_bytes() const = 0;  // what the allocator really holds for this sequence
};

struct BackendOptions {
  spec::Flags flags;
  int64_t threads = 0;            // 0: all
  int64_t max_context = 0;        // 0: config.max_position_embeddings
  int64_t page_size = 64;         // rows a cache page
  bool absorbed_prefill = false;  // use the absorbed form for prefill too
  // Experts serve at most max(1, ceil(cf*K*T/E)) slots of a layer, T the tokens of a call (a
  // sequence's share of a batch on the reference); flags.drop_policy says which. 0: no dropping.
  // SPEC 1.15; V3 itself drops nothing.
  double capacity_factor = 0;
};

// What a layer finds in the cache of a made-up context: writes c [n, d_c] after its norm and k [n, d_r] before RoPE, for
// the n that append_rows is called with.
using CacheRows = std::function<void(int64_t layer, float* c, float* k)>;

struct BatchItem {  // one sequence's share of a batched call
  Sequence* sequence;
  std::span<const int32_t> ids;
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string name() const = 0;  // e.g. "cpu_bf16"
  virtual const ModelConfig& config() const = 0;
  virtual std::unique_ptr<Sequence> new_sequence() = 0;
  // Appends ids (any count >= 1) to the sequence at positions length()...; token ids out of range throw.
  virtual ForwardResult forward(Sequence& seq, std::span<const int32_t> ids,
                                const ForwardOptions& o) = 0;
  // Batched: results in order. Linear layers run over all tokens together.
  virtual std::vector<ForwardResult> forward_batch(std::span<const BatchItem> items,
                                                   const ForwardOptions& o) = 0;
  // MTP rows (SPEC 1.25, 1.32): row j consumes next_ids[j] = t_{i+1} and hidden row j = h_i; appended to the
  // MTP cache at positions mtp_length().... result.logits over the shared head, result.hidden the
  // post-shared_head.norm state (for recycling in chained drafts).
  virtual ForwardResult mtp_forward(Sequence& seq, std::span<const int32_t> next_ids,
                                    std::span<const float> hidden, const ForwardOptions& o) = 0;
  // Benches of long contexts: n rows go to the end of every main layer's cache, as if n tokens had been run. The two
  // pointers are valid during the call of `rows` only. Throws Error(usage) where a backend cannot.
  virtual void append_rows(Sequence& seq, int64_t n, const CacheRows& rows) {
    (void)seq, (void)n, (void)rows;
    throw Error(ExitCode::usage, "this backend takes no cache rows", name());
  }
};

}  // namespace v3b::model
