// The cache of a real forward pass: what the backend holds after a sequence of a given length.
#include <fmt/format.h>

#include <memory>

#include "kernels/core/cuda_error.h"
#include "kernels/forward/cuda_backend.h"
#include "model/error.h"
#include "model/rng.h"
#include "scenarios/backend_factory.h"
#include "scenarios/kv_cache.h"

namespace v3b::scen {

spec::KvFormat cache_format(model::KvElem e, const spec::Flags& flags) {
  if (e != model::KvElem::fp8) return spec::KvFormat::bf16;
  return flags.kv_format == spec::KvFormat::bf16 ? spec::KvFormat::fp8_656_pow2 : flags.kv_format;
}

namespace {

MeasuredCache measure(const LoadedModel& m, const std::string& backend, model::KvElem e,
                      int64_t context, int64_t page, const spec::Flags& flags) {
  MeasuredCache r;
  const std::string name = backend_name(backend, "");
  const bool record = e == model::KvElem::fp8;
  const bool cuda = name.starts_with("cuda_");
  if (!cuda && !name.starts_with("cpu_"))
    r.reason = "only the CPU and CUDA backends have a paged cache";
  else if (!record && name != fmt::format("{}_{}", cuda ? "cuda" : "cpu", model::kv_elem_name(e)))
    r.reason = fmt::format("{} does not store {}", name, model::kv_elem_name(e));
  if (!r.reason.empty()) return r;
  const auto& c = m.config();
  model::BackendOptions o;
  o.max_context = context;
  o.page_size = page;
  o.flags = flags;
  o.flags.kv_format = cache_format(e, flags);
  const auto b = make_backend(name, m.weights, o);
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < context; ++i)
    ids.push_back(
        static_cast<int32_t>(model::rng_below({1, 0}, static_cast<uint64_t>(i), c.vocab_size)));
  const auto pass = [&] {
    auto s = b->new_sequence();
    (void)b->forward(*s, ids, {.logits = model::LogitsOf::none});
    return s;
  };
  if (!cuda) (void)pass();  // work space that stays is taken here, not below
  const int64_t before = cuda ? 0 : resident_bytes();
  const auto s = pass();
  r.process_bytes = cuda ? kern::cuda_cache_bytes(*b) : resident_bytes() - before;
  r.layers = c.num_hidden_layers;
  r.sequences = 1;
  r.allocated_bytes = s->cache_bytes();
  r.formula_bytes = model::kv_cache_bytes_per_token(model::KvScheme::mla, c, e) * context;
  return r;
}

}  // namespace

MeasuredCache measure_backend(const LoadedModel& m, const std::string& backend, model::KvElem e,
                              int64_t context, int64_t page, const spec::Flags& flags) {
  try {
    return measure(m, backend, e, context, page, flags);
  } catch (const kern::CudaOutOfMemory& error) {
    MeasuredCache r;
    r.reason = error.what();
    return r;
  }
}

}  // namespace v3b::scen
