// train, logits, generate: what needs a model on disk.
#include "bench/main/commands.h"
#include "model/error.h"
#include "scenarios/generate.h"
#include "scenarios/logits.h"
#include "scenarios/training.h"
#include "scenarios/training_evaluate.h"

namespace v3b::cli {
namespace {

// train --evaluate: only what evaluation reads is taken from the training options.
int run_evaluation(const scen::TrainOptions& o, scen::EvaluateOptions e) {
  if (o.steps > 0 || o.minutes > 0 || o.resume || !o.out_dir.empty())
    throw Error(ExitCode::usage, "evaluation trains nothing", "--evaluate",
                "no --steps, --minutes, --resume, --out (--evaluate-out FILE keeps the result)");
  e.init_dir = o.init_dir, e.corpus_dir = o.corpus_dir, e.tokenizer = o.tokenizer;
  e.context = o.context, e.exact = o.exact;
  set_interrupt_note("nothing was written");
  return scen::run_evaluate(e);
}

void add_train(CLI::App& app, Chosen& chosen) {
  auto o = std::make_shared<scen::TrainOptions>();
  auto e = std::make_shared<scen::EvaluateOptions>();
  auto balance = std::make_shared<std::string>(scen::balance_name(o->balance));
  auto threads = std::make_shared<int64_t>(0);
  auto* sub = app.add_subcommand("train", "trains a V3-shaped model on this CPU");
  sub->add_option("--model", o->model,
                  "preset, config.json or checkpoint folder (its configuration)");
  sub->add_option("--init", o->init_dir, "start from these weights");
  sub->add_option("--context", o->context, "tokens a sequence");
  sub->add_option("--corpus", o->corpus_dir, "folder of scripts/build_corpus.py");
  sub->add_option("--tokenizer", o->tokenizer, "tokenizer.model");
  sub->add_option("--out", o->out_dir, "folder for train.csv, checkpoints and export-latest/");
  sub->add_option("--steps", o->steps, "end after so many steps");
  sub->add_option("--minutes", o->minutes, "end after so many minutes");
  sub->add_option("--batch", o->batch, "sequences a step");
  sub->add_option("--lr", o->lr, "highest learning rate");
  sub->add_option("--min-lr-ratio", o->min_lr_ratio, "last learning rate over the highest");
  sub->add_option("--warmup", o->warmup_steps, "steps of warm-up");
  sub->add_option("--weight-decay", o->weight_decay, "of AdamW");
  sub->add_option("--clip", o->clip, "largest norm of the gradient (0: any)");
  sub->add_option("--mtp-lambda", o->mtp_lambda, "weight of the MTP loss");
  sub->add_option("--mtp-lambda-late", o->mtp_lambda_late, "its weight late in the run");
  sub->add_option("--balance", *balance, "none, switch, sequence, bias, bias+sequence");
  sub->add_option("--aux-alpha", o->aux_alpha,
                  "weight of the balance loss (-1: the strategy's own)");
  sub->add_option("--bias-speed", o->bias_speed, "u of SPEC 1.18");
  sub->add_option("--min-document-tokens", o->min_document_tokens, "leave shorter documents out");
  sub->add_option("--log-every", o->log_every, "steps a row of train.csv");
  sub->add_option("--validate-every", o->validate_every, "steps between validations (0: never)");
  sub->add_option("--validate-tokens", o->validate_tokens, "tokens of one");
  sub->add_option("--final-validate-tokens", o->final_validate_tokens,
                  "tokens of the last one (0: all)");
  sub->add_option("--checkpoint-minutes", o->checkpoint_minutes, "between resumable states");
  sub->add_option("--export-minutes", o->export_minutes, "between exports in Hugging Face layout");
  sub->add_flag("--resume", o->resume, "go on from the last state in --out");
  sub->add_flag("--exact", o->exact, "float32 GEMMs");
  sub->add_option("--seed", o->seed, "seed of weights and data order");
  sub->add_option("--threads", *threads, "threads (0: all)")->check(CLI::Range(0, 4096));
  auto* evaluate = sub->add_option(
      "--evaluate", e->split,
      "trains nothing: bits per byte of the checkpoint --init on a whole split (heldout or "
      "validation), beside xz -9e on the same bytes");
  sub->add_option("--evaluate-out", e->out, "CSV file for its result")->needs(evaluate);
  sub->callback([=, &chosen] {
    chosen.run = [=] {
      if (evaluate->count() > 0) {
        prepare_run({.threads = *threads});
        return run_evaluation(*o, *e);
      }
      o->balance = scen::parse_balance(*balance);
      prepare_run({.threads = *threads});
      set_interrupt_note(o->out_dir.empty()
                             ? "nothing was kept (no --out)"
                             : "--resume goes on from the last state in " + o->out_dir);
      return scen::run_train(*o);
    };
  });
}

void add_logits(CLI::App& app, Chosen& chosen) {
  auto o = std::make_shared<scen::LogitsOptions>();
  auto* sub =
      app.add_subcommand("logits", "logits of a checkpoint on token ids, as float32 .npy [T, V]");
  sub->add_option("--model", o->model, "checkpoint folder")->required();
  sub->add_option("--tokens", o->tokens, "file of ids, whitespace or commas between them")
      ->required();
  sub->add_option("--backend", o->backend, "reference, cpu or cuda, or a full backend name");
  sub->add_option("--dtype", o->dtype, "f64, f32 or bf16");
  sub->add_option("--out", o->out, "file to write")->required();
  sub->add_option("--chunk", o->chunk, "tokens a call (default: all at once)")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40));
  add_flags(*sub, o->options.flags);
  sub->add_option("--threads", o->threads, "threads (0: all)")->check(CLI::Range(0, 4096));
  sub->callback([=, &chosen] {
    chosen.run = [=] {
      prepare_run({.threads = o->threads});
      set_interrupt_note("nothing was written");
      return scen::run_logits(*o);
    };
  });
}

void add_generate(CLI::App& app, Chosen& chosen) {
  auto o = std::make_shared<scen::GenerateOptions>();
  auto sample = std::make_shared<bool>(false);
  auto* sub = app.add_subcommand("generate", "continues a text, with or without MTP");
  sub->add_option("--model", o->model,
                  "checkpoint folder with tokenizer.model; default: the shipped model");
  auto* prompt = sub->add_option("--prompt", o->prompt, "the text to go on from");
  auto* file = sub->add_option("--prompt-file", o->prompt_file, "a file of it")->excludes(prompt);
  sub->add_option(
      "--backend", o->backend,
      "cpu_bf16, cpu_f32, cuda_bf16, cuda_f32, reference_f32, reference_f64, or reference | "
      "cpu | cuda");
  sub->add_option("--dtype", o->dtype, "f64, f32 or bf16, with reference | cpu | cuda");
  sub->add_option("--max-new", o->max_new, "tokens to add")->check(CLI::Range(1, 1 << 20));
  sub->add_flag("--mtp,!--no-mtp", o->mtp, "draft with the MTP module (default)");
  sub->add_option("--drafts", o->drafts, "draft tokens a step")->check(CLI::Range(1, 64));
  sub->add_flag("--sample", *sample, "sample instead of taking the most likely token");
  sub->add_option("--temperature", o->temperature, "of sampling");
  sub->add_option("--top-p", o->top_p, "of sampling");
  add_flags(*sub, o->flags);
  sub->add_flag("--compare", o->compare, "also decode plainly, compare tokens and speed");
  sub->add_option("--seed", o->seed, "of sampling");
  sub->add_option("--threads", o->threads, "threads (0: all)")->check(CLI::Range(0, 4096));
  sub->callback([=, &chosen] {
    chosen.run = [=] {
      if (prompt->count() + file->count() == 0)
        throw Error(ExitCode::usage, "nothing to continue", "generate",
                    "--prompt TEXT or --prompt-file FILE");
      o->greedy = !*sample;
      prepare_run({.threads = o->threads});
      return scen::run_generate(*o);
    };
  });
}

}  // namespace

void add_model_commands(CLI::App& app, Chosen& chosen) {
  add_train(app, chosen);
  add_logits(app, chosen);
  add_generate(app, chosen);
}

}  // namespace v3b::cli
