#include "scenarios/generate.h"

#include <fmt/format.h>

#include <cmath>
#include <cstdio>
#include <numeric>

#include "model/error.h"
#include "model/tokenizer.h"
#include "scenarios/backend_factory.h"
#include "scenarios/common.h"
#include "scenarios/decode_loop.h"
#include "scenarios/logits.h"

namespace v3b::scen {
namespace {

double total(const std::vector<double>& v) { return std::accumulate(v.begin(), v.end(), 0.0); }

void print_stats(const char* how, const DecodeResult& r, int64_t prompt_tokens) {
  const DecodeStats& s = r.stats;
  const double t = total(s.step_s);
  fmt::print(
      stderr,
      "{}: prompt {} tokens in {:.1f} ms ({:.0f} tokens/s), {} tokens in {} steps, {:.1f} tokens/s",
      how, prompt_tokens, s.prefill_s * 1e3,
      s.prefill_s > 0 ? double(prompt_tokens) / s.prefill_s : 0.0, s.emitted, s.steps,
      t > 0 ? double(s.emitted) / t : 0.0);
  if (!s.drafted.empty()) {
    fmt::print(stderr, ", {:.2f} tokens/step", s.tokens_per_step());
    for (size_t k = 0; k < s.drafted.size(); ++k)
      fmt::print(stderr, ", draft {} accepted {}/{}", k + 1, s.accepted[k], s.drafted[k]);
  }
  fmt::print(stderr, "\n");
}

void check_sampling(const GenerateOptions& o) {
  if (!(std::isfinite(o.temperature) && o.temperature > 0))
    throw Error(ExitCode::usage, "bad value", "--temperature", "a finite number above 0",
                fmt::format("{}", o.temperature));
  if (!(o.top_p > 0 && o.top_p <= 1))
    throw Error(ExitCode::usage, "bad value", "--top-p", "above 0, at most 1",
                fmt::format("{}", o.top_p));
}

}  // namespace

int run_generate(const GenerateOptions& o) {
  check_sampling(o);
  CommonOptions common;
  common.model = o.model;
  common.threads = o.threads;
  const std::string text = o.prompt_file.empty() ? o.prompt : read_text_file(o.prompt_file);
  const std::string source = o.prompt_file.empty() ? "--prompt" : o.prompt_file;
  if (text.empty()) throw Error(ExitCode::bad_input, "the prompt is empty", source, "some text");
  const std::string name = backend_name(o.backend, o.dtype);
  const LoadedModel loaded = load_model(common);
  if (loaded.path.empty())
    throw Error(ExitCode::usage, "random weights have no text to continue", "--model",
                "a checkpoint folder");
  const auto tokenizer = model::Tokenizer::load(loaded.path + "/tokenizer.model");
  std::vector<int32_t> ids = tokenizer.encode(text, source);
  const model::ModelConfig& c = loaded.config();
  if (tokenizer.bos() >= 0) ids.insert(ids.begin(), tokenizer.bos());
  for (int32_t id : ids)
    if (id >= c.vocab_size)
      throw Error(ExitCode::bad_input, "the tokenizer's ids exceed the model's vocabulary",
                  loaded.path + "/tokenizer.model", fmt::format("id < {}", c.vocab_size),
                  fmt::format("{}", id));
  model::BackendOptions options;
  options.threads = o.threads;
  options.flags = o.flags;
  auto backend = make_backend(name, loaded.weights, options);

  DecodeOptions d;
  d.max_new = o.max_new;
  d.greedy = o.greedy;
  d.temperature = o.temperature;
  d.top_p = o.top_p;
  d.seed = o.seed;
  d.drafts = o.mtp ? o.drafts : 0;
  if (d.drafts > 0 && loaded.weights->mtp.empty()) {
    fmt::print(stderr, "note: {} has no MTP module, decoding plainly\n", loaded.name);
    d.drafts = 0;
  }
  DecodeSession session(*backend, ids, d);
  size_t shown = 0;
  std::string held;  // bytes of a character that is not complete yet
  const auto show = [&](bool last) {
    const auto& t = session.tokens();
    for (; shown < t.size(); ++shown) held += tokenizer.piece_bytes(t[shown]);
    const size_t bad = last ? std::string::npos : model::find_invalid_utf8(held);
    const size_t n = bad == std::string::npos ? held.size() : bad;
    std::fwrite(held.data(), 1, n, stdout);
    std::fflush(stdout);
    held.erase(0, n);
    if (held.size() > 3) {  // not the start of a character: the model made it so
      std::fwrite(held.data(), 1, held.size(), stdout);
      held.clear();
    }
  };
  show(false);
  while (!session.done()) {
    session.step();
    show(false);
  }
  show(true);
  std::fputc('\n', stdout);
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0)
    throw Error(ExitCode::cannot_write, "cannot write the text", "standard output");
  const DecodeResult fast{session.tokens(), session.margins(), session.stats()};
  print_stats(d.drafts > 0 ? "speculative" : "plain", fast, static_cast<int64_t>(ids.size()));
  if (!o.compare || d.drafts == 0) return 0;

  DecodeOptions plain_options = d;
  plain_options.drafts = 0;
  const DecodeResult plain = decode(*backend, ids, plain_options);
  print_stats("plain", plain, static_cast<int64_t>(ids.size()));
  const double speedup =
      (total(plain.stats.step_s) / double(std::max<int64_t>(1, plain.stats.emitted))) /
      (total(fast.stats.step_s) / double(std::max<int64_t>(1, fast.stats.emitted)));
  fmt::print(stderr, "speed-up {:.2f}\n", speedup);
  if (!o.greedy) return 0;
  const int64_t at = first_difference(plain.tokens, fast.tokens);
  if (at < 0) {
    fmt::print(stderr, "tokens identical\n");
    return 0;
  }
  const float margin = plain.margins[std::min<size_t>(size_t(at), plain.margins.size() - 1)];
  const bool tie = margin < 1e-2F;
  fmt::print(stderr, "tokens differ from {} on; top-2 margin there {:.1e} RMS: {}\n", at, margin,
             tie ? "a near-tie" : "NOT a near-tie");
  return tie ? 0 : 1;
}

}  // namespace v3b::scen
