#include "scenarios/training_data.h"

#include <algorithm>
#include <numeric>

#include "kernels/train/step.h"
#include "model/error.h"
#include "model/rng.h"
#include "scenarios/training.h"

namespace v3b::scen {

WindowOrder::WindowOrder(const model::TokenStream& stream, int64_t context, uint64_t seed,
                         int64_t min_document_tokens)
    : stream_(stream), context_(context), min_tokens_(min_document_tokens), seed_(seed) {
  build(0);
}

void WindowOrder::build(int64_t epoch) {
  epoch_ = epoch;
  const model::Rng docs{seed_, static_cast<uint64_t>(2 * epoch)};
  const model::Rng windows{seed_, static_cast<uint64_t>(2 * epoch + 1)};
  const auto by_key = [](std::vector<int64_t>& v, const model::Rng& r) {
    std::vector<std::pair<uint64_t, int64_t>> keyed;
    keyed.reserve(v.size());
    for (size_t i = 0; i < v.size(); ++i) keyed.emplace_back(model::rng_u64(r, i), v[i]);
    std::sort(keyed.begin(), keyed.end());
    for (size_t i = 0; i < v.size(); ++i) v[i] = keyed[i].second;
  };
  std::vector<int64_t> document;
  for (int64_t d = 0; d < stream_.num_documents(); ++d) {
    if (static_cast<int64_t>(stream_.document(d).size()) >= min_tokens_) document.push_back(d);
  }
  by_key(document, docs);
  ids_.clear();
  ids_.reserve(stream_.ids.size());
  for (int64_t d : document) {
    const auto s = stream_.document(d);
    ids_.insert(ids_.end(), s.begin(), s.end());
  }
  const int64_t n = (static_cast<int64_t>(ids_.size()) - 1) / context_;
  if (n < 1) {
    throw Error(ExitCode::bad_input, "training text too short", "train split",
                std::to_string(context_ + 1) + " tokens or more", std::to_string(ids_.size()));
  }
  order_.resize(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) order_[static_cast<size_t>(i)] = i * context_;
  by_key(order_, windows);
}

void WindowOrder::batch(int64_t position, int64_t B, int32_t* tokens) {
  for (int64_t b = 0; b < B; ++b) {
    const int64_t i = position * B + b, epoch = i / windows_per_epoch();
    // An epoch may differ by nothing but its order: windows_per_epoch() is the same for all.
    if (epoch != epoch_) build(epoch);
    const int64_t start = order_[static_cast<size_t>(i % windows_per_epoch())];
    std::copy_n(ids_.begin() + start, context_ + 1, tokens + b * (context_ + 1));
  }
}

EvalResult evaluate(kern::train::TrainStep& step, const model::TokenStream& stream,
                    const model::Tokenizer& tokenizer, int64_t context, int64_t max_tokens,
                    double mtp_lambda, const std::function<void(double share)>& on_progress) {
  struct Chunk {
    int64_t begin, inputs;
  };
  std::vector<Chunk> chunks;
  int64_t total = 0;
  for (int64_t d = 0; d < stream.num_documents(); ++d) {
    const int64_t at = stream.token_begin[static_cast<size_t>(d)];
    const int64_t n = static_cast<int64_t>(stream.document(d).size()) - 1;
    for (int64_t b = 0; b < n; b += context) {
      chunks.push_back({at + b, std::min(context, n - b)});
      total += chunks.back().inputs;
    }
  }
  if (max_tokens > 0 && total > max_tokens) {
    const size_t every = static_cast<size_t>((total + max_tokens - 1) / max_tokens);
    std::vector<Chunk> kept;
    for (size_t i = 0; i < chunks.size(); i += every) kept.push_back(chunks[i]);
    chunks = std::move(kept);
  }
  constexpr int64_t kBatch = 4;
  EvalResult r;
  std::vector<int32_t> tokens, targets;
  for (size_t c0 = 0; c0 < chunks.size(); c0 += kBatch) {
    const int64_t B = std::min<int64_t>(kBatch, static_cast<int64_t>(chunks.size() - c0));
    tokens.assign(static_cast<size_t>(B * (context + 1)), 0);
    targets.assign(static_cast<size_t>(B * context), -100);
    for (int64_t b = 0; b < B; ++b) {
      const Chunk& c = chunks[c0 + static_cast<size_t>(b)];
      for (int64_t i = 0; i <= c.inputs; ++i) {
        const int32_t id = stream.ids[static_cast<size_t>(c.begin + i)];
        tokens[static_cast<size_t>(b * (context + 1) + i)] = id;
        if (i == 0) continue;
        targets[static_cast<size_t>(b * context + i - 1)] = id;
        r.bytes += static_cast<int64_t>(tokenizer.piece_bytes(id).size());
      }
    }
    kern::train::LossOptions o;
    o.mtp_lambda = mtp_lambda;
    const auto l = step.run({B, context, tokens.data(), targets.data()}, o, false);
    r.tokens += l.targets, r.nats += l.nats;
    r.mtp_tokens += l.mtp_targets, r.mtp_nats += l.mtp_nats;
    r.mtp_agree += l.mtp_agree, r.mtp_compared += l.mtp_compared;
    if (on_progress) {
      on_progress(static_cast<double>(c0 + static_cast<size_t>(B)) /
                  static_cast<double>(chunks.size()));
    }
  }
  return r;
}

}  // namespace v3b::scen
