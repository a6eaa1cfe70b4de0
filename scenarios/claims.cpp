// claims.csv: each published figure, what is measured here, and the verdict.
#include "scenarios/claims.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>
#include <map>

#include "model/params.h"
#include "model/rng.h"
#include "reference/fp8_gemm.h"
#include "reference/fp8_quant.h"
#include "reference/spec/dtype.h"
#include "reports/machine.h"

namespace v3b::scen {
namespace {

constexpr const char* kArithmetic = "arithmetic";
constexpr const char* kFull = "full scale";

std::optional<rep::CsvTable> read_if_there(const std::string& path) {
  std::error_code ec;
  if (!std::filesystem::exists(path, ec)) return std::nullopt;
  return rep::read_csv(path, {.drop_torn_last_line = true});
}

// Equal to the published figure when rounded to its own last digit (`unit` of it).
bool rounds_to(double v, double published, double last_digit) {
  return std::abs(v - published) <= 0.5 * last_digit * (1 + 1e-9);
}

Finding exact(double v, const std::string& unit, int digits, bool holds,
              const std::string& note = "") {
  Finding f;
  f.measured = fmt::format("{:.{}f} {}", v, digits, unit);
  f.number = v;
  f.unit = unit;
  f.from = kArithmetic;
  f.scale = kFull;
  f.verdict = holds ? kHolds : kFails;
  f.reason = note;
  return f;
}
Finding unmeasured(const std::string& reason) {
  Finding f;
  f.verdict = kUnmeasured;
  f.reason = reason;
  return f;
}
Finding needs(const char* file, const char* scenario) {
  return unmeasured(fmt::format("no rows for it in {} (v3bench scenario {})", file, scenario));
}
Finding reduced(const std::string& measured, std::optional<double> number, const std::string& unit,
                const std::string& from, const std::string& scale, bool holds) {
  return {measured, number, unit, from, scale, holds ? kReduced : kFails, ""};
}

double billions(int64_t v) { return static_cast<double>(v) * 1e-9; }

// GQA cache of another published model: layers x groups x head_dim keys and values of two bytes.
double gqa_kb(int64_t layers, int64_t groups, int64_t head_dim) {
  return static_cast<double>(layers * groups * head_dim * 2 * 2) * 1e-3;
}

// FLOP of training one token: three times the forward pass (SPEC 0.5).
double training_gflop(const model::ModelConfig& c, double s) {
  const double linear = 2.0 * static_cast<double>(model::count_params(c).active_excl_embedding);
  const double pair = 2.0 * static_cast<double>(c.num_attention_heads) *
                      static_cast<double>(c.qk_head_dim() + c.v_head_dim);
  return 3 * (linear + static_cast<double>(c.num_hidden_layers) * pair * s / 2) * 1e-9;
}

// INS' formula: dispatch (FP8) and combine (BF16) of 32 tokens to 9 experts of hidden 7K, twice a
// layer.
double ep_tokens_s(const model::ModelConfig& c, double bytes_s) {
  const double a_time = (1.0 + 2.0) * 32 * 9 * 7000 / bytes_s;
  return 1 / (2 * a_time * static_cast<double>(c.num_hidden_layers));
}

// Largest error of the emulated Hopper accumulator over N(0,1) operands at K = 4096, in units of
// the RMS of the result.
double hopper_error(int64_t promote_every) {
  constexpr int64_t M = 32, N = 32, K = 4096;
  const model::Rng rng{1, model::rng_stream("claims")};
  std::vector<double> a(M * K), b(N * K);
  for (size_t i = 0; i < a.size(); ++i) a[i] = model::rng_normal(rng, i);
  for (size_t i = 0; i < b.size(); ++i) b[i] = model::rng_normal(rng, a.size() + i);
  std::vector<spec::f8e4m3> qa(a.size()), qb(b.size());
  std::vector<float> sa(M * K / 128), sb((N + 127) / 128 * K / 128), c(M * N);
  ref::fp8_quantize_act<double>(M, K, a.data(), qa.data(), sa.data());
  ref::fp8_quantize_weight<double>(N, K, b.data(), qb.data(), sb.data());
  std::vector<double> want(M * N);
  ref::fp8_gemm_hopper(M, N, K, qa.data(), sa.data(), qb.data(), sb.data(), c.data(),
                       {.promote_every = promote_every});
  ref::fp8_gemm<double>(M, N, K, qa.data(), sa.data(), qb.data(), sb.data(), want.data());
  double most = 0, square = 0;
  for (size_t i = 0; i < c.size(); ++i) {
    const double error = std::abs(c[i] - want[i]);
    most = std::isnan(error) ? INFINITY : std::max(most, error);  // std::max alone drops NaN
    square += want[i] * want[i];
  }
  return most / std::sqrt(square / static_cast<double>(c.size()));
}

Finding arithmetic(const std::string& id) {
  const auto v3 = model::load_preset("v3");
  const auto p = model::count_params(v3);
  const auto files = model::checkpoint_size(v3);
  using model::KvElem;
  using model::KvScheme;
  const auto kv = [&](KvScheme s, KvElem e) {
    return static_cast<double>(model::kv_cache_bytes_per_token(s, v3, e));
  };
  if (id == "1a") {
    const double v = billions(p.main_total);
    return exact(v, "B", 3, rounds_to(v, 671, 1));
  }
  if (id == "1b") {
    const double v = billions(p.active_excl_embedding);
    return exact(v, "B", 2, rounds_to(v, 37, 1),
                 fmt::format("without the input embedding; {:.2f}B with it", billions(p.active)));
  }
  if (id == "2a") {
    const double v = billions(files.elements());
    return exact(v, "B", 2, rounds_to(v, 685, 1), "scales counted");
  }
  if (id == "2b") {
    const double v = billions(files.elements() - p.main_total);
    return exact(
        v, "B", 3, rounds_to(v, 14, 1),
        fmt::format("everything but the main model, scales counted; {:.2f}B of MTP tensors",
                    billions(p.mtp_stored)));
  }
  if (id == "3b") return exact(gqa_kb(80, 8, 128), "KB", 3, gqa_kb(80, 8, 128) == 327.68);
  if (id == "3c") return exact(gqa_kb(126, 8, 128), "KB", 3, gqa_kb(126, 8, 128) == 516.096);
  if (id == "4") {
    const double v = kv(KvScheme::mha, KvElem::bf16) / kv(KvScheme::mla, KvElem::bf16);
    return exact(
        v, "x", 1, rounds_to(v, 16, 1),
        fmt::format("against MHA of the same heads; {:.1f}x against expanded MLA",
                    kv(KvScheme::mha_expanded, KvElem::bf16) / kv(KvScheme::mla, KvElem::bf16)));
  }
  if (id == "5") {
    const double v = training_gflop(v3, 4096);
    return exact(v, "GFLOP", 1, rounds_to(v, 250, 1));
  }
  if (id == "11") {
    const double v =
        static_cast<double>(model::kv_cache_bytes_per_layer(KvScheme::mla, v3, KvElem::fp8));
    return exact(v, "bytes", 0, v == 656);
  }
  if (id == "17") {
    const double v = 160.0 / 50.0 * static_cast<double>(v3.topk_group);
    return exact(v, "experts", 1, rounds_to(v, 13, 1), "NVLink / InfiniBand x nodes a token");
  }
  if (id == "18a") {
    const double v = ep_tokens_s(v3, 50e9);
    return exact(v, "tokens/s", 1, std::abs(v / 67 - 1) < 0.02, "the source's own formula");
  }
  if (id == "18b") {
    const double v = ep_tokens_s(v3, 900e9);
    return exact(v, "tokens/s", 0, std::abs(v / 1200 - 1) < 0.05, "the source's own formula");
  }
  if (id == "22a") {
    const double v = billions(model::layer_params(v3, v3.num_hidden_layers).total());
    return exact(v, "B", 3, rounds_to(v, 11.5, 0.1),
                 fmt::format("the transformer layer alone; {:.2f}B with eh_proj and norms",
                             billions(p.mtp_unique)));
  }
  if (id == "22b") {
    const double v =
        billions(model::layer_params(v3, v3.num_hidden_layers).active() + 2 * p.embedding);
    return exact(
        v, "B", 2, rounds_to(v, 2.4, 0.1),
        fmt::format("layer, embedding and head; {:.2f}B with eh_proj", billions(p.mtp_active)));
  }
  if (id == "25") {
    const double v = 100 * hopper_error(0);
    auto f = reduced(fmt::format("{:.2f}%", v), v, "%", "emulation",
                     "emulated accumulator of 14 bits, 32 x 32 x 4096, N(0,1)", v >= 1 && v <= 4);
    f.reason = "largest error over RMS of the result; holds within a factor of two";
    return f;
  }
  if (id == "26") {
    const double v = 100 * hopper_error(128);
    auto f = reduced(fmt::format("{:.3f}%", v), v, "%", "emulation",
                     "emulated accumulator of 14 bits, 32 x 32 x 4096, N(0,1)", v < 100 * 0x1p-8);
    f.reason = "largest error over RMS of the result; holds below half an ulp of bf16";
    return f;
  }
  return {};
}

}  // namespace

Evidence::Evidence(const std::string& dir)
    : kv_(read_if_there(dir + "/kv_cache.csv")),
      experts_(read_if_there(dir + "/expert_load.csv")),
      yarn_(read_if_there(dir + "/yarn_perplexity.csv")),
      mtp_(read_if_there(dir + "/mtp_decoding.csv")) {}

namespace {

// Rows where all the given columns have the given texts.
std::vector<size_t> where(const rep::CsvTable& t,
                          const std::vector<std::pair<const char*, std::string>>& equal) {
  std::vector<size_t> out;
  for (size_t i = 0; i < t.rows.size(); ++i)
    if (std::all_of(equal.begin(), equal.end(),
                    [&](const auto& e) { return t.cell(i, e.first) == e.second; }))
      out.push_back(i);
  return out;
}

Finding kv_token(const std::optional<rep::CsvTable>& t) {
  const auto v3 = model::load_preset("v3");
  const double v = 1e-3 * static_cast<double>(model::kv_cache_bytes_per_token(
                              model::KvScheme::mla, v3, model::KvElem::bf16));
  Finding f = exact(v, "KB", 3, rounds_to(v, 70.272, 1e-3));
  if (!t) return f;
  for (const size_t i :
       where(*t, {{"kind", "size"}, {"preset", "v3"}, {"form", "mla"}, {"dtype", "bf16"}})) {
    const auto formula = t->number(i, "measured_formula_bytes"),
               got = t->number(i, "allocated_bytes");
    if (!formula || !got) continue;
    f.from = "arithmetic, kv_cache.csv";
    f.reason = fmt::format("the paged allocator took {:.2f}% more, whole pages",
                           100 * (*got / *formula - 1));
    break;
  }
  return f;
}

Finding acceptance(const std::optional<rep::CsvTable>& t) {
  if (!t) return needs("mtp_decoding.csv", "mtp-decoding");
  for (const char* domain : {"all", "text"})
    for (const size_t i : where(*t, {{"kind", "position"},
                                     {"decoding", "greedy"},
                                     {"drafts", "1"},
                                     {"position", "1"},
                                     {"forced_acceptance", ""},
                                     {"domain", domain}})) {
      const auto a = t->number(i, "acceptance"), low = t->number(i, "acceptance_low"),
                 high = t->number(i, "acceptance_high");
      if (!a || !low || !high) continue;
      auto f = reduced(fmt::format("{:.1f}% ({:.1f}..{:.1f}%)", 100 * *a, 100 * *low, 100 * *high),
                       100 * *a, "%", "mtp_decoding.csv", t->cell(i, "model") + ", greedy",
                       *high >= 0.85);
      f.reason = "holds when the 95% interval reaches 85%";
      return f;
    }
  return needs("mtp_decoding.csv", "mtp-decoding");
}

Finding speedup(const std::optional<rep::CsvTable>& t) {
  if (!t) return needs("mtp_decoding.csv", "mtp-decoding");
  Finding best;
  for (const size_t i : where(*t, {{"kind", "summary"}})) {
    const auto forced = t->number(i, "forced_acceptance"), s = t->number(i, "measured_speedup");
    if (!forced || !s || *forced < 0.85 || *forced > 0.9) continue;
    if (best.number && *best.number >= *s) continue;
    best = reduced(fmt::format("{:.2f}x at {:.0f}% accepted", *s, 100 * *forced), *s, "x",
                   "mtp_decoding.csv", t->cell(i, "model") + ", draft oracle, one sequence",
                   *s >= 1.75);
    best.reason = fmt::format(
        "a step of two tokens and drafting cost {:.2f} plain steps",
        t->number(i, "verify_over_base").value_or(0) + t->number(i, "draft_over_base").value_or(0));
  }
  return best.number ? best : needs("mtp_decoding.csv", "mtp-decoding");
}

// Last row of each strategy.
std::map<std::string, size_t> last_rows(const rep::CsvTable& t) {
  std::map<std::string, size_t> last;
  for (const size_t i : where(t, {{"part", "training"}}))
    if (t.number(i, "val_loss")) last[t.cell(i, "strategy")] = i;
  return last;
}

Finding strategies(const std::optional<rep::CsvTable>& t, const std::string& id) {
  if (!t) return needs("expert_load.csv", "expert-load");
  const auto last = last_rows(*t);
  const std::string other = id == "30" ? "sequence" : "switch";
  const char* column = id == "28" ? "maxvio_batch" : "val_loss";
  if (last.count("bias") == 0 || last.count(other) == 0)
    return needs("expert_load.csv", "expert-load");
  const auto a = t->number(last.at("bias"), column), b = t->number(last.at(other), column);
  if (!a || !b) return needs("expert_load.csv", "expert-load");
  auto f = reduced(fmt::format("{:.3f} against {:.3f}", *a, *b), *a, "", "expert_load.csv",
                   t->cell(last.at("bias"), "model") + ", " + t->cell(last.at("bias"), "tokens") +
                       " tokens, one seed",
                   *a < *b);
  f.reason = id == "28" ? "MaxVio of batches, which has a floor of noise"
                        : "validation loss, ordering only; one seed says little";
  return f;
}

struct YarnRow {
  size_t row;
  double ppl;
};
// Rows past the trained context of one model as trained, at the largest factor of YaRN.
std::map<std::string, YarnRow> past_context(const rep::CsvTable& t) {
  std::map<std::string, YarnRow> out;
  double factor = 0, length = 0;
  const auto untuned = where(t, {{"kind", "bin"}, {"finetune_steps", "0"}, {"status", "ok"}});
  for (const size_t i : untuned) {
    if (t.cell(i, "bin_begin") != t.cell(i, "trained_context")) continue;
    length = std::max(length, t.number(i, "bin_end").value_or(0));
    if (t.cell(i, "variant") != "yarn") continue;
    const double f = t.number(i, "factor").value_or(0), L = *t.number(i, "trained_context");
    // The smallest factor that covers the length, as in the tables.
    const bool covers = f * L >= length, had = factor * L >= length;
    if (factor == 0 || (covers && (!had || f < factor)) || (!covers && !had && f > factor))
      factor = f;
  }
  for (const size_t i : untuned) {
    if (t.cell(i, "bin_begin") != t.cell(i, "trained_context") || t.number(i, "bin_end") != length)
      continue;
    const auto f = t.number(i, "factor");
    if (f && *f != factor) continue;
    if (const auto p = t.number(i, "ppl")) out[t.cell(i, "variant")] = {i, *p};
  }
  return out;
}

std::string yarn_scale(const rep::CsvTable& t, size_t i) {
  return fmt::format("{}, {} -> {} tokens, without fine-tuning", t.cell(i, "model"),
                     t.cell(i, "trained_context"), t.cell(i, "bin_end"));
}

Finding yarn_helps(const std::optional<rep::CsvTable>& t) {
  if (!t) return needs("yarn_perplexity.csv", "yarn-perplexity");
  const auto rows = past_context(*t);
  if (rows.count("yarn") == 0 || rows.count("none") == 0)
    return needs("yarn_perplexity.csv", "yarn-perplexity");
  const size_t y = rows.at("yarn").row;
  const auto high = t->number(y, "vs_none_high"), d = t->number(y, "vs_none_nll");
  if (!high || !d) return needs("yarn_perplexity.csv", "yarn-perplexity");
  auto f = reduced(fmt::format("perplexity {:.3g} with YaRN, {:.3g} without", rows.at("yarn").ppl,
                               rows.at("none").ppl),
                   rows.at("yarn").ppl, "", "yarn_perplexity.csv", yarn_scale(*t, y), *high < 0);
  f.reason = fmt::format(
      "{:+.3f} nats a token past the trained context, 95% interval below {:+.3f}", *d, *high);
  return f;
}

Finding yarn_order(const std::optional<rep::CsvTable>& t) {
  if (!t) return needs("yarn_perplexity.csv", "yarn-perplexity");
  const auto rows = past_context(*t);
  for (const char* n : {"yarn", "ntk", "pi"})
    if (rows.count(n) == 0) return needs("yarn_perplexity.csv", "yarn-perplexity");
  const double y = rows.at("yarn").ppl, n = rows.at("ntk").ppl, p = rows.at("pi").ppl;
  auto f = reduced(fmt::format("YaRN {:.4g}, NTK {:.4g}, PI {:.4g}", y, n, p), y, "",
                   "yarn_perplexity.csv", yarn_scale(*t, rows.at("yarn").row), y < n && n < p);
  f.reason = "ordering only";
  return f;
}

}  // namespace

Finding Evidence::find(const Claim& c) const {
  if (!c.reason.empty()) return unmeasured(c.reason);
  if (c.id == "3a") return kv_token(kv_);
  if (c.id == "19") return acceptance(mtp_);
  if (c.id == "20") return speedup(mtp_);
  if (c.id == "28" || c.id == "28p" || c.id == "30") return strategies(experts_, c.id);
  if (c.id == "34") return yarn_helps(yarn_);
  if (c.id == "35") return yarn_order(yarn_);
  return arithmetic(c.id);
}

// Seed, threads and flags of the file that the finding was read from; "" for arithmetic.
std::string Evidence::params(const Finding& f) const {
  for (const auto* t : {&kv_, &experts_, &yarn_, &mtp_}) {
    if (!*t ||
        f.from.find(std::filesystem::path((*t)->path).filename().string()) == std::string::npos)
      continue;
    std::string out;  // one folder's file has one seed and one set of flags
    for (const char* key : {"seed", "threads", "flags"})
      for (size_t i = 0; i < (*t)->rows.size(); ++i) {
        const std::string v = param_of((*t)->cell(i, "params"), key);
        if (v.empty()) continue;
        out += (out.empty() ? "" : ";") + std::string(key) + "=" + v;
        break;
      }
    return out;
  }
  return "";
}

int run_claims(const ClaimsOptions& o) {
  const Evidence evidence(o.out);  // before claims.csv: a bad file there is an error of its own
  CommonOptions fresh = o;
  fresh.resume = false;  // verdicts follow the other files, so they are always made again
  const auto csv =
      open_csv(fresh, "claims.csv",
               {"number", "claim", "published", "source", "conditions", "kind", "measured",
                "measured_number", "unit", "measured_from", "scale", "verdict", "reason", "params"},
               {"number"});
  for (const auto& c : published_claims()) {
    const Finding f = evidence.find(c);
    rep::Record r;
    r.set("number", c.id).set("claim", c.claim).set("published", c.value).set("source", c.source);
    r.set("conditions", c.conditions).set("kind", c.kind).set("measured", f.measured);
    r.set("measured_number", f.number).set("unit", f.unit).set("measured_from", f.from);
    r.set("scale", f.scale).set("verdict", f.verdict).set("reason", f.reason);
    r.set("params", evidence.params(f));
    csv->write(r.set(rep::identity("cpu")));
  }
  rep::write_machine_json(o.out);
  if (o.print_table) print_table(*csv);
  return 0;
}

}  // namespace v3b::scen
