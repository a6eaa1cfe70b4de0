#include "scenarios/common.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <numeric>

#include "bench/harness/flags_text.h"
#include "kernels/core/cpu.h"
#include "model/corpus.h"
#include "model/error.h"
#include "model/hash.h"
#include "model/rng.h"
#include "model/tokenizer.h"
#include "reports/machine.h"
#include "reports/table.h"

namespace v3b::scen {

namespace fs = std::filesystem;

namespace {

constexpr const char* kRandomPrefix = "random:";
constexpr int64_t kByteVocabulary = 256;  // preset `train`: tokens are bytes

std::string default_model() { return model::model_dir() + "/tiny-v3"; }

std::string last_part(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return fs::path(path).filename().string();
}

std::vector<std::string> corpus_places() {
  std::vector<std::string> places;
  if (const char* env = std::getenv("V3BENCH_CORPUS_DIR"); env && *env) return {env};
  places.push_back("build/corpus");
  std::error_code ec;
  const fs::path exe = fs::read_symlink("/proc/self/exe", ec);
  if (!ec) {
    places.push_back((exe.parent_path() / "corpus").string());
    places.push_back((exe.parent_path().parent_path() / "corpus").string());
  }
  places.push_back(fs::path(model::model_dir()).parent_path().string() + "/build/corpus");
  return places;
}

// `n` of `count` indices spread evenly, in order.
std::vector<int64_t> spread(int64_t count, int64_t n) {
  std::vector<int64_t> out;
  if (n <= 0 || n > count) n = count;
  for (int64_t i = 0; i < n; ++i) out.push_back(i * count / n);
  return out;
}

// Text to ids: bytes for the byte vocabulary, else the checkpoint's SentencePiece model.
class Encoder {
 public:
  Encoder(const LoadedModel& m) : bos_(static_cast<int32_t>(m.config().bos_token_id)) {
    if (m.config().vocab_size == kByteVocabulary) return;
    std::string path = (m.path.empty() ? default_model() : m.path) + "/tokenizer.model";
    tokenizer_ = std::make_unique<model::Tokenizer>(model::Tokenizer::load(path));
    if (tokenizer_->vocab_size() > m.config().vocab_size)
      throw Error(ExitCode::bad_input, "tokenizer does not fit the model", path,
                  "at most " + std::to_string(m.config().vocab_size) + " pieces (vocab_size)",
                  std::to_string(tokenizer_->vocab_size()));
  }
  // Ids of every document, bos in front. The corpus' token cache is used (model/corpus.h).
  std::vector<std::vector<int32_t>> encode(const model::Corpus& corpus, bool cached) const {
    std::vector<std::vector<int32_t>> all;
    if (!tokenizer_) {
      for (const auto& d : corpus.documents()) {
        all.push_back({bos_});
        for (const char c : d.text) all.back().push_back(static_cast<unsigned char>(c));
      }
      return all;
    }
    const model::TokenStream stream = model::tokenize_corpus(
        corpus, *tokenizer_, cached ? model::default_cache_path(corpus) : std::string());
    for (int64_t d = 0; d < stream.num_documents(); ++d) {
      const auto ids = stream.document(d);
      all.emplace_back(ids.begin(), ids.end());
      all.back()[0] = bos_;
    }
    return all;
  }
  std::vector<int32_t> bytes(std::span<const int32_t> ids) const {  // of each; ids[0] is bos
    std::vector<int32_t> n(ids.size(), 1);
    if (tokenizer_)
      for (size_t i = 0; i < ids.size(); ++i)
        n[i] = static_cast<int32_t>(tokenizer_->piece_bytes(ids[i]).size());
    if (!n.empty()) n[0] = 0;
    return n;
  }

 private:
  int32_t bos_;
  std::unique_ptr<model::Tokenizer> tokenizer_;
};

}  // namespace

LoadedModel load_model(const CommonOptions& o) {
  LoadedModel m;
  if (o.model.rfind(kRandomPrefix, 0) == 0) {
    const std::string preset = o.model.substr(std::string(kRandomPrefix).size());
    m.weights = model::random_weights(model::load_preset(preset), o.seed, spec::DType::bf16);
    m.name = o.model;
    m.trained = false;
    return m;
  }
  m.path = o.model.empty() ? default_model() : o.model;
  std::error_code ec;
  if (!fs::exists(m.path, ec))
    throw Error(ExitCode::not_found, "no such model folder", m.path,
                "a folder with config.json and model.safetensors, or random:PRESET", "nothing");
  m.weights = model::load_weights(m.path);
  m.name = last_part(m.path);
  return m;
}

std::string weights_id(const model::ModelWeights& w) {
  constexpr int64_t kBytes = 1 << 14;  // of each tensor; enough to tell two trainings apart
  uint64_t h = model::fnv1a64("weights");
  for (const auto& [name, view] : model::named_tensors(w)) {
    h = model::fnv1a64(name, h);
    for (const int64_t n : view.shape)
      h = model::fnv1a64({reinterpret_cast<const char*>(&n), sizeof n}, h);
    const int64_t bytes = view.numel() * spec::dtype_bytes(view.dtype);
    h = model::fnv1a64(
        {static_cast<const char*>(view.data), static_cast<size_t>(std::min(bytes, kBytes))}, h);
  }
  return model::hex64(h).substr(0, 8);
}

int64_t TokenSet::tokens() const {
  int64_t n = 0;
  for (const auto& d : docs) n += static_cast<int64_t>(d.ids.size());
  return n;
}

std::string corpus_dir(const CommonOptions& o) {
  if (!o.corpus.empty()) return o.corpus;
  std::error_code ec;
  std::string tried;
  for (const auto& p : corpus_places()) {
    if (fs::exists(p + "/heldout.txt", ec)) return p;
    tried += (tried.empty() ? "" : ", ") + p;
  }
  throw Error(ExitCode::not_found, "no text corpus", tried,
              "the folder that scripts/build_corpus.py writes (or --corpus DIR, --text FILE)",
              "none");
}

TokenSet load_tokens(const CommonOptions& o, const LoadedModel& m, const TokenSetOptions& t) {
  const bool file = !o.text.empty();
  const model::Corpus corpus =
      file ? model::Corpus::load_text_file(o.text) : model::Corpus::load(corpus_dir(o), t.split);
  const Encoder encoder(m);
  TokenSet set;
  set.name = file ? last_part(o.text) : t.split + (t.domain.empty() ? "" : "/" + t.domain);
  auto ids = encoder.encode(corpus, !file);
  std::vector<TokenDoc> fit;
  for (size_t i = 0; i < ids.size(); ++i) {
    const auto& d = corpus.documents()[i];
    if (!t.domain.empty() && d.domain != t.domain && !file) continue;
    if (static_cast<int64_t>(ids[i].size()) < t.min_tokens) continue;
    fit.push_back({d.id, d.domain, std::move(ids[i]), {}, 0});
  }
  for (const int64_t i : spread(static_cast<int64_t>(fit.size()), t.max_docs)) {
    TokenDoc& doc = fit[static_cast<size_t>(i)];
    if (t.max_tokens > 0 && static_cast<int64_t>(doc.ids.size()) > t.max_tokens)
      doc.ids.resize(static_cast<size_t>(t.max_tokens));
    doc.token_bytes = encoder.bytes(doc.ids);
    doc.bytes = std::accumulate(doc.token_bytes.begin(), doc.token_bytes.end(), int64_t{0});
    set.docs.push_back(std::move(doc));
  }
  if (set.docs.empty())
    throw Error(ExitCode::nothing_ran, "no document is long enough", corpus.path(),
                "one of " + std::to_string(t.min_tokens) + " tokens" +
                    (t.domain.empty() ? "" : " of domain " + t.domain),
                "none");
  return set;
}

double token_loss(const float* logits, int64_t V, int32_t target) {
  if (target < 0 || target >= V)
    throw Error(ExitCode::bad_input, "token id out of range", "loss", "0.." + std::to_string(V - 1),
                std::to_string(target));
  float top = logits[0];
  for (int64_t i = 1; i < V; ++i) top = std::max(top, logits[i]);
  double sum = 0;
  for (int64_t i = 0; i < V; ++i) sum += std::exp(static_cast<double>(logits[i]) - top);
  return std::log(sum) + (static_cast<double>(top) - static_cast<double>(logits[target]));
}

std::vector<double> sequence_losses(const model::ForwardResult& r, int64_t V,
                                    std::span<const int32_t> ids) {
  const auto T = static_cast<int64_t>(ids.size());
  if (static_cast<int64_t>(r.logits.size()) != T * V)
    throw Error(ExitCode::usage, "losses need the logits of every position", "sequence_losses",
                std::to_string(T * V) + " values", std::to_string(r.logits.size()));
  std::vector<double> loss;
  for (int64_t i = 0; i + 1 < T; ++i)
    loss.push_back(token_loss(r.logits.data() + i * V, V, ids[static_cast<size_t>(i + 1)]));
  return loss;
}

Interval wilson(int64_t k, int64_t n, double z) {
  if (n <= 0) return {0, 1};
  const double p = static_cast<double>(k) / static_cast<double>(n), N = static_cast<double>(n);
  const double center = (p + z * z / (2 * N)) / (1 + z * z / N);
  const double half = z * std::sqrt(p * (1 - p) / N + z * z / (4 * N * N)) / (1 + z * z / N);
  // The ends are exactly 0 and 1 where no or every trial succeeded.
  return {k == 0 ? 0 : std::max(0.0, center - half), k == n ? 1 : std::min(1.0, center + half)};
}

BootstrapResult bootstrap_ratio(std::span<const double> sums, std::span<const double> weights,
                                uint64_t seed, int64_t draws, double confidence) {
  const auto n = static_cast<int64_t>(sums.size());
  if (n == 0 || weights.size() != sums.size())
    throw Error(ExitCode::usage, "bootstrap needs one weight a document", "bootstrap_ratio",
                std::to_string(n), std::to_string(weights.size()));
  const auto total = [](std::span<const double> v) {
    return std::accumulate(v.begin(), v.end(), 0.0);
  };
  BootstrapResult r;
  r.mean = total(sums) / total(weights);
  r.interval = {r.mean, r.mean};
  if (n == 1) return r;
  const model::Rng rng{seed, model::rng_stream("bootstrap")};
  std::vector<double> means;
  for (int64_t b = 0; b < draws; ++b) {
    double s = 0, w = 0;
    for (int64_t i = 0; i < n; ++i) {
      const auto k =
          static_cast<size_t>(model::rng_below(rng, static_cast<uint64_t>(b * n + i), n));
      s += sums[k];
      w += weights[k];
    }
    if (w > 0) means.push_back(s / w);
  }
  if (means.empty()) return r;
  std::sort(means.begin(), means.end());
  const auto at = [&](double q) {
    const double x = q * static_cast<double>(means.size() - 1);
    const auto i = static_cast<size_t>(x);
    const double f = x - static_cast<double>(i);
    return i + 1 < means.size() ? means[i] * (1 - f) + means[i + 1] * f : means[i];
  };
  r.interval = {at((1 - confidence) / 2), at((1 + confidence) / 2)};
  return r;
}

double median(std::vector<double> v) {
  if (v.empty()) return std::nan("");
  std::sort(v.begin(), v.end());
  const size_t n = v.size();
  return n % 2 == 1 ? v[n / 2] : 0.5 * (v[n / 2 - 1] + v[n / 2]);
}

std::string params_text(const CommonOptions& o) {
  const std::string flags = bench::changed_flags_text(o.flags);
  return fmt::format("seed={};threads={};flags={}", o.seed,
                     o.threads > 0 ? o.threads : kern::num_threads(),
                     flags.empty() ? "default" : flags);
}

model::BackendOptions backend_options(const CommonOptions& o) {
  model::BackendOptions b;
  b.flags = o.flags;
  b.threads = o.threads;
  return b;
}

std::string param_of(const std::string& params, const std::string& key) {
  for (size_t at = 0; at < params.size();) {
    const size_t end = std::min(params.find(';', at), params.size());
    if (params.compare(at, key.size() + 1, key + "=") == 0)
      return params.substr(at + key.size() + 1, end - at - key.size() - 1);
    at = end + 1;
  }
  return "";
}

namespace {

// Rows from before there was `params` are of the defaults: nothing else could be asked for.
void refuse_other_flags(const std::string& path, const CommonOptions& o) {
  std::error_code ec;
  if (!fs::exists(path, ec) || fs::file_size(path, ec) == 0) return;
  const auto old = rep::read_csv(path, {.drop_torn_last_line = true});
  const std::string now = param_of(params_text(o), "flags");
  for (size_t i = 0; i < old.rows.size(); ++i) {
    const std::string text = param_of(old.cell(i, "params"), "flags");
    const std::string was = text.empty() ? "default" : text;
    if (was != now)
      throw Error(ExitCode::usage, "cannot resume rows of other flags", path,
                  "the same --flags as before, or another --out: " + was, now);
  }
}

}  // namespace

std::unique_ptr<rep::CsvWriter> open_csv(const CommonOptions& o, const std::string& file,
                                         const std::vector<std::string>& columns,
                                         const std::vector<std::string>& key_columns) {
  rep::ensure_output_dir(o.out);
  if (o.resume) refuse_other_flags(o.out + "/" + file, o);
  rep::write_machine_json(o.out);
  return std::make_unique<rep::CsvWriter>(o.out + "/" + file, rep::with_identity(columns),
                                          key_columns, o.resume, "status",
                                          std::set<std::string>{"no_device", "not_built"});
}

void print_table(const rep::CsvWriter& csv) {
  const std::string table = rep::render_table(csv.path());
  std::fwrite(table.data(), 1, table.size(), stdout);
  fmt::print("\n{} rows in {}\n", csv.rows(), csv.path());
  std::fflush(stdout);
}

}  // namespace v3b::scen
