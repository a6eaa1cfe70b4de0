// scenario, all. A scenario is one entry of the list below; its options and run function come from
// scenarios/<name>.h.
#include <fmt/format.h>

#include "bench/harness/jobs.h"
#include "bench/harness/nvml.h"
#include "bench/main/commands.h"
#include "model/error.h"
#include "reports/machine.h"
#include "reports/table.h"
#include "scenarios/claims.h"
#include "scenarios/device.h"
#include "scenarios/expert_load.h"
#include "scenarios/kv_cache.h"
#include "scenarios/mtp_decoding.h"
#include "scenarios/yarn_perplexity.h"

namespace v3b::cli {
namespace {

// --contexts 1024:65536:*2,100000
void add_int_list(CLI::App& app, const std::string& name, std::vector<int64_t>& out,
                  const std::string& help) {
  app.add_option_function<std::string>(
      name, [&out, name](const std::string& text) { out = bench::parse_int_list(text, name); },
      help);
}

void add_common(CLI::App& app, scen::CommonOptions& o) {
  app.add_option("--out", o.out, "folder for the CSV, default results");
  app.add_option("--model", o.model,
                 "checkpoint folder or random:PRESET; default: the shipped model");
  app.add_option("--backend", o.backend,
                 "cpu_bf16, cpu_f32, cuda_bf16, cuda_f32, reference_f32, reference_f64");
  app.add_option("--corpus", o.corpus, "folder of scripts/build_corpus.py");
  app.add_option("--text", o.text, "a text file instead of the corpus");
  auto* full = app.add_flag("--full", o.full, "everything");
  app.add_flag_callback(
         "--quick", [] {}, "a minute or less (the default)")
      ->excludes(full);
  app.add_flag("--resume", o.resume, "keep the finished rows and do the rest");
  app.add_option("--seed", o.seed, "seed of all that is random");
  app.add_option("--threads", o.threads, "threads (0: all)")->check(CLI::Range(0, 4096));
  add_flags(app, o.flags);
}

void note_rows_in(const std::string& out) {
  set_interrupt_note("finished rows are in " + out + ", --resume does the rest");
}

scen::CommonOptions from_common(const Common& c) {
  scen::CommonOptions o;
  o.out = c.out;
  o.full = c.full;
  o.resume = c.resume;
  o.seed = c.seed;
  o.threads = c.threads;
  scen::choose_device(o, c.device);
  o.print_table = false;  // `all` prints every table at the end
  return o;
}

void kv_cache_options(CLI::App& sub, scen::KvCacheOptions& o) {
  sub.add_option("--presets", o.presets, "model/presets names or config.json paths")
      ->delimiter(',');
  sub.add_option("--forms", o.forms, "mha, gqa-N, mqa, mla-expanded, mla")->delimiter(',');
  sub.add_option("--dtypes", o.dtypes, "f32, bf16, f16, fp8")->delimiter(',');
  add_int_list(sub, "--contexts", o.contexts, "context lengths, 1024:131072:*2");
  add_int_list(sub, "--batches", o.batches, "sequences at once");
  sub.add_option("--memory-gb", o.memory_gb, "memories whose longest context is told")
      ->delimiter(',');
  sub.add_option("--page", o.page, "rows a cache page");
  sub.add_option("--measure-gb", o.measure_gb, "most memory that one measured row takes");
  sub.add_option("--step-presets", o.step_presets, "whose heads the measured decode steps have")
      ->delimiter(',');
  add_int_list(sub, "--step-contexts", o.step_contexts, "contexts of the measured decode steps");
  add_int_list(sub, "--step-batches", o.step_batches, "batches of the measured decode steps");
  add_int_list(sub, "--run-contexts", o.run_contexts, "lengths that the model itself reads");
  sub.add_option("--step-gb", o.step_gb, "most bytes that one measured step reads");
  sub.add_option("--step-seconds", o.step_seconds, "samples of one measured step");
  sub.add_flag("!--no-memory", o.measure_memory, "formulas only, no memory is taken");
  sub.add_flag("!--no-step", o.measure_step, "no decode steps are measured");
}

void expert_load_options(CLI::App& sub, scen::ExpertLoadOptions& o) {
  sub.add_option("--parts", o.parts, "model, capacity, training, synthetic")->delimiter(',');
  sub.add_option("--tokens", o.tokens, "held-out tokens a setting");
  sub.add_option("--window", o.window, "tokens a sequence");
  sub.add_option("--batch-windows", o.batch_windows, "sequences whose load one MaxVio is of");
  sub.add_option("--capacity-factors", o.capacity_factors, "1,1.25,1.5,2 (SPEC 1.15)")
      ->delimiter(',');
  sub.add_option("--drop-policies", o.drop_policies, "slot, token, prob")->delimiter(',');
  sub.add_option("--capacity-tokens", o.capacity_tokens, "held-out tokens a capacity factor");
  sub.add_option("--strategies", o.strategies, "none, switch, sequence, bias, bias+sequence")
      ->delimiter(',');
  sub.add_option("--train-model", o.train_model, "preset or config of the trained model");
  sub.add_option("--train-steps", o.train_steps, "steps a strategy");
  sub.add_option("--train-batch", o.train_batch, "sequences a step");
  sub.add_option("--train-context", o.train_context, "tokens a sequence");
  sub.add_option("--bias-speed", o.bias_speed, "u of SPEC 1.18");
  sub.add_option("--routes", o.routes, "synthetic routes")->delimiter(',');
  sub.add_option("--route-tokens", o.route_tokens, "tokens of a synthetic case");
  sub.add_option("--route-seconds", o.route_seconds, "samples of one measured case");
}

void yarn_options(CLI::App& sub, scen::YarnOptions& o) {
  sub.add_option("--variants", o.variants, "none, pi, ntk, yarn, ...")->delimiter(',');
  sub.add_option("--factors", o.factors, "scale factors")->delimiter(',');
  sub.add_option("--length", o.length, "tokens scored of each document");
  sub.add_option("--docs", o.docs, "documents");
  add_int_list(sub, "--windows", o.windows, "sliding windows");
  sub.add_option("--stride", o.stride, "of the sliding window");
  sub.add_option("--window-variants", o.window_variants, "variants of the sliding windows")
      ->delimiter(',');
  sub.add_option("--window-docs", o.window_docs, "documents of the sliding windows");
  sub.add_option("--window-length", o.window_length, "tokens of each of those");
  sub.add_option("--chunk", o.chunk, "new tokens a forward pass");
  sub.add_option("--finetune", o.finetune, "steps of each fine-tuning phase");
  add_int_list(sub, "--finetune-contexts", o.finetune_contexts, "contexts of the phases");
  sub.add_option("--finetune-variants", o.finetune_variants, "variants to fine-tune")
      ->delimiter(',');
  sub.add_option("--finetune-factor", o.finetune_factor, "scale factor while fine-tuning");
  sub.add_option("--finetune-tokens", o.finetune_tokens, "tokens a step");
  sub.add_option("--finetune-lr", o.finetune_lr, "learning rate");
}

void mtp_options(CLI::App& sub, scen::MtpOptions& o) {
  add_int_list(sub, "--drafts", o.drafts, "tokens drafted a step");
  sub.add_option("--temperatures", o.temperatures, "of sampled decoding, beside greedy")
      ->delimiter(',');
  sub.add_option("--top-p", o.top_p, "of sampled decoding");
  sub.add_option("--prompts", o.prompts, "prompts a domain");
  sub.add_option("--prompt-tokens", o.prompt_tokens, "tokens of a prompt");
  sub.add_option("--max-new", o.max_new, "tokens emitted for a prompt");
  sub.add_option("--forced", o.forced, "acceptances of the draft oracle")->delimiter(',');
  sub.add_option("--forced-prompts", o.forced_prompts, "prompts of the oracle");
  sub.add_option("--text-tokens", o.text_tokens, "held-out tokens a domain for the drafts");
}

void claims_options(CLI::App& sub, scen::ClaimsOptions& /*o*/) {
  for (const char* name : {"--flags", "--device"})  // it runs no model
    sub.remove_option(sub.get_option(name));
}

struct ScenarioEntry {
  const char* name;
  std::function<void(CLI::App& scenario, Chosen& chosen)> add;
  std::function<int(const Common& common)> run_default;
};

template <class Options>
ScenarioEntry entry(const char* name, const char* help, int (*run)(const Options&),
                    void (*own_options)(CLI::App&, Options&)) {
  const auto add = [=](CLI::App& scenario, Chosen& chosen) {
    auto o = std::make_shared<Options>();
    auto* sub = scenario.add_subcommand(name, help);
    add_common(*sub, *o);
    auto device = std::make_shared<std::string>();
    sub->add_option("--device", *device, "cpu or cuda: the backend of the same dtype there")
        ->check(CLI::IsMember({"cpu", "cuda"}));
    own_options(*sub, *o);
    sub->callback([o, device, run, &chosen] {
      chosen.run = [o, device, run] {
        scen::choose_device(*o, *device);
        prepare_run({.threads = o->threads});
        if (scen::on_cuda(*o)) bench::describe_gpu();
        note_rows_in(o->out);
        return run(*o);
      };
    });
  };
  const auto run_default = [run](const Common& c) {
    Options o;
    static_cast<scen::CommonOptions&>(o) = from_common(c);
    return run(o);
  };
  return {name, add, run_default};
}

// The next scenario is one _options function above and one line here. Claims reads the others'
// files, so it stands last.
const std::vector<ScenarioEntry>& scenario_entries() {
  static const std::vector<ScenarioEntry> entries = {
      entry("kv-cache", "bytes of the cache in each form of attention, and the decode step over it",
            scen::run_kv_cache, kv_cache_options),
      entry("expert-load", "how evenly experts are used, and what imbalance costs",
            scen::run_expert_load, expert_load_options),
      entry("yarn-perplexity", "loss past the trained context, by extension method",
            scen::run_yarn_perplexity, yarn_options),
      entry("mtp-decoding", "what the MTP module's drafts are worth in decoding",
            scen::run_mtp_decoding, mtp_options),
      entry("claims", "published figures beside those of the files in --out", scen::run_claims,
            claims_options),
  };
  return entries;
}

// The first code that is not 0 is the whole run's; everything else is still done.
int run_all(const Common& common, const std::vector<std::string>& benchmark_args) {
  rep::ensure_output_dir(common.out);
  int first_bad = run_all_jobs(common, benchmark_args);
  note_rows_in(common.out);
  for (const auto& s : scenario_entries()) {
    fmt::print(stderr, "scenario {}\n", s.name);
    int code = 0;
    try {
      code = s.run_default(common);
    } catch (const Error& e) {
      if (e.code() == ExitCode::cannot_write) throw;  // the others could write nothing either
      fmt::print(stderr, "v3bench: scenario {}: {}\n", s.name, e.what());
      code = static_cast<int>(e.code());
    } catch (const std::exception& e) {  // out of memory, say: the other scenarios still run
      fmt::print(stderr, "v3bench: scenario {}: {}\n", s.name, e.what());
      code = static_cast<int>(ExitCode::check_failed);
    }
    if (first_bad == 0) first_bad = code;
  }
  rep::write_machine_json(common.out);
  fmt::print("\n{}", rep::render_all_tables(common.out, false));
  fmt::print("\nAll rows: v3bench table {}\n", common.out);
  return first_bad;
}

}  // namespace

void add_scenario_commands(CLI::App& app, Chosen& chosen) {
  auto* scenario = app.add_subcommand("scenario", "one question answered with a table and a CSV");
  scenario->require_subcommand(1);
  for (const auto& s : scenario_entries()) s.add(*scenario, chosen);

  auto common = std::make_shared<Common>();
  auto* all = app.add_subcommand("all", "check, bench and every scenario into one folder");
  add_sizes(*all, *common);
  add_threads_seed(*all, *common);
  add_out(*all, *common, "results");
  all->add_option("--device", common->device, "cpu or cuda")->check(CLI::IsMember({"cpu", "cuda"}));
  all->callback([common, &chosen] {
    chosen.run = [common, &chosen] { return run_all(*common, chosen.benchmark_args); };
  });
}

}  // namespace v3b::cli
