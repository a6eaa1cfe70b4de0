#include "scenarios/training.h"

#include <fmt/format.h>
#include <unistd.h>

#include <charconv>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <fstream>

#include "kernels/core/cpu.h"
#include "kernels/train/step.h"
#include "model/error.h"
#include "model/weights.h"
#include "scenarios/training_data.h"
#include "scenarios/training_log.h"
#include "scenarios/training_state.h"

namespace v3b::scen {
namespace {

namespace fs = std::filesystem;
namespace kt = kern::train;
using Clock = std::chrono::steady_clock;

volatile std::sig_atomic_t g_stop = 0;
void on_signal(int signal) {
  if (g_stop != 0) _exit(128 + signal);  // asked twice: at once, the last state stays
  g_stop = signal;
}

class SignalGuard {  // SIGINT and SIGTERM ask the loop to finish its step
 public:
  SignalGuard() {
    g_stop = 0;
    struct sigaction a {};
    a.sa_handler = on_signal;
    sigaction(SIGINT, &a, &old_int_);
    sigaction(SIGTERM, &a, &old_term_);
  }
  ~SignalGuard() {
    sigaction(SIGINT, &old_int_, nullptr);
    sigaction(SIGTERM, &old_term_, nullptr);
  }
  SignalGuard(const SignalGuard&) = delete;
  SignalGuard& operator=(const SignalGuard&) = delete;

 private:
  struct sigaction old_int_ {
  }, old_term_{};
};

double seconds_since(Clock::time_point t) {
  return std::chrono::duration<double>(Clock::now() - t).count();
}

std::string number(double v) {
  char buf[40];
  const auto r = std::to_chars(buf, buf + sizeof buf, v, std::chars_format::general, 7);
  return {buf, r.ptr};
}

double max_violation(const std::vector<int64_t>& load) {
  double total = 0, most = 0;
  for (int64_t v : load) {
    total += static_cast<double>(v);
    most = std::max(most, static_cast<double>(v));
  }
  return most / (total / static_cast<double>(load.size())) - 1;
}

model::ModelConfig choose_config(const TrainOptions& o) {
  model::ModelConfig c;
  if (!o.init_dir.empty()) {
    c = model::load_config(o.init_dir);
  } else if (fs::exists(o.model)) {
    c = model::load_config(o.model);
  } else {
    c = model::load_preset(o.model);
  }
  if (o.rope_scaling) c.rope_scaling = *o.rope_scaling;
  if (o.context > c.max_position_embeddings) c.max_position_embeddings = o.context;
  model::validate_config(c, "training configuration");
  return c;
}

void load_initial(const TrainOptions& o, const model::ModelConfig& c, kt::TrainStep& step) {
  if (!o.init_dir.empty()) return set_weights(step, *model::load_weights(o.init_dir));
  std::vector<float> w(static_cast<size_t>(step.table().total));
  kt::init_params(step.table(), c.initializer_range, o.seed, w);
  step.set_params(w);
}

struct Progress {
  bool on = true, tty = isatty(2) != 0;
  Clock::time_point last{};
  void show(const TrainRow& r, double left_s, double share) {
    if (!on) return;
    const double wait = tty ? 0.5 : 10;
    if (seconds_since(last) < wait) return;
    last = Clock::now();
    std::fprintf(stderr,
                 "%strain step %lld  %.1f%%  loss %.4f  mtp %.4f  %.4f bits/byte  MaxVio %.3f  "
                 "%.0f tokens/s  %d:%02d left%s",
                 tty ? "\r" : "", static_cast<long long>(r.step), 100 * share, r.loss, r.mtp_loss,
                 r.bits_per_byte, r.maxvio_batch_mean, r.tokens_per_s,
                 static_cast<int>(left_s) / 60, static_cast<int>(left_s) % 60, tty ? "   " : "\n");
  }
  void note(const char* text) {
    if (on) std::fprintf(stderr, "%s%s\n", tty ? "\n" : "", text);
  }
};

struct Window {  // sums since the last row
  int64_t steps = 0, tokens = 0, bytes = 0, mtp_tokens = 0, layers = 0;
  double nats = 0, mtp_nats = 0, aux = 0, grad = 0, maxvio = 0, maxvio_max = 0, seconds = 0;
};

}  // namespace

Balance parse_balance(const std::string& name) {
  for (Balance b : {Balance::none, Balance::switch_loss, Balance::sequence, Balance::bias,
                    Balance::bias_sequence}) {
    if (name == balance_name(b)) return b;
  }
  throw Error(ExitCode::usage, "unknown balance strategy", "--balance",
              "none, switch, sequence, bias or bias+sequence", name);
}
const char* balance_name(Balance b) {
  switch (b) {
    case Balance::none:
      return "none";
    case Balance::switch_loss:
      return "switch";
    case Balance::sequence:
      return "sequence";
    case Balance::bias:
      return "bias";
    case Balance::bias_sequence:
      return "bias+sequence";
  }
  return "?";
}

void set_weights(kern::train::TrainStep& step, const model::ModelWeights& weights) {
  const kt::ParamTable& t = step.table();
  std::vector<float> w(static_cast<size_t>(t.total), 0.0F);
  size_t found = 0;
  for (const auto& [name, view] : model::named_tensors(weights)) {
    if (const kt::Param* p = t.find(name); p != nullptr) {
      const std::vector<float> v = model::to_float_vector(view);
      if (static_cast<int64_t>(v.size()) == p->numel()) ++found;
      std::copy_n(v.begin(), std::min<size_t>(v.size(), static_cast<size_t>(p->numel())),
                  w.begin() + p->offset);
      continue;
    }
    for (const auto& l : t.layers) {
      if (!l.moe || name != l.prefix + "mlp.gate.e_score_correction_bias") continue;
      step.bias()[static_cast<size_t>(l.moe_index)] = model::to_float_vector(view);
    }
  }
  if (found != t.params.size()) {
    throw Error(ExitCode::bad_input, "tensors for training", "checkpoint",
                std::to_string(t.params.size()), std::to_string(found));
  }
  step.set_params(w);
}

TrainResult train(const TrainOptions& o) {
  check_train_options(o);
  TrainResult result;
  const model::ModelConfig c = result.config = choose_config(o);
  const int64_t S = o.context > 0 ? o.context : c.max_position_embeddings, B = o.batch;
  const std::string tok =
      o.tokenizer.empty() ? model::model_dir() + "/tiny-v3/tokenizer.model" : o.tokenizer;
  const auto tokenizer = model::Tokenizer::load(tok);
  if (tokenizer.vocab_size() > c.vocab_size) {
    throw Error(ExitCode::bad_input, "vocabulary of the tokenizer", tok,
                "at most vocab_size " + std::to_string(c.vocab_size),
                std::to_string(tokenizer.vocab_size()));
  }
  uint64_t text_hash = 0;
  const auto load = [&](const char* split) {
    const auto corpus = model::Corpus::load(o.corpus_dir, split);
    text_hash = text_hash * 31 + corpus.hash();
    return model::tokenize_corpus(corpus, tokenizer, model::default_cache_path(corpus));
  };
  const model::TokenStream train_text = load("train"), val_text = load("validation");
  WindowOrder order(train_text, S, o.seed, o.min_document_tokens);

  std::shared_ptr<kt::TrainStep> step =
      kt::make_train_step(c, o.exact ? kt::Arithmetic::f32 : kt::Arithmetic::bf16);
  result.step = step;
  load_initial(o, c, *step);
  result.flops_per_token = kt::train_flops_per_token(c, S);
  if (!o.quiet) {
    result.gemm_gflops =
        kt::measure_gemm_gflops(o.exact ? kt::Arithmetic::f32 : kt::Arithmetic::bf16);
    result.predicted_tokens_per_s =
        kPredictedShare * 1e9 * result.gemm_gflops / result.flops_per_token;
    std::fprintf(
        stderr,
        "%lld parameters, %.1f MFLOP a token; GEMM peak measured now %.0f GFLOP/s, at %.0f%% "
        "of it %.0f tokens/s\n",
        static_cast<long long>(step->table().trainable), result.flops_per_token / 1e6,
        result.gemm_gflops, 100 * kPredictedShare, result.predicted_tokens_per_s);
  }
  const bool files = !o.out_dir.empty();
  const std::string fingerprint =
      model::config_to_json(c) + " tokenizer " + tokenizer.fingerprint() + " text " +
      std::to_string(text_hash) + " batch " + std::to_string(B) + " context " + std::to_string(S) +
      " seed " + std::to_string(o.seed) + " balance " + balance_name(o.balance);
  TrainState state;
  if (files) {
    std::error_code ec;
    fs::create_directories(o.out_dir, ec);
    if (ec) throw Error(ExitCode::cannot_write, "cannot create", o.out_dir, "", ec.message());
  }
  if (o.resume) state = load_state(o.out_dir, fingerprint, *step);
  TrainLog csv(files ? o.out_dir + "/train.csv" : "", o.resume, state.step,
               fmt::format("seed={};threads={};flags=default;balance={};exact={}", o.seed,
                           kern::num_threads(), balance_name(o.balance), o.exact ? 1 : 0));

  const bool sequence = o.balance == Balance::sequence || o.balance == Balance::bias_sequence;
  const bool use_bias = o.balance == Balance::bias || o.balance == Balance::bias_sequence;
  kt::LossOptions loss;
  loss.aux = sequence                            ? kt::AuxLoss::sequence
             : o.balance == Balance::switch_loss ? kt::AuxLoss::switch_loss
                                                 : kt::AuxLoss::none;
  loss.aux_alpha = o.aux_alpha >= 0 ? o.aux_alpha : sequence ? 1e-4 : 1e-2;

  SignalGuard guard;
  Progress progress;
  progress.on = !o.quiet;
  std::vector<int32_t> tokens(static_cast<size_t>(B * (S + 1)));
  Window win;
  const double before = state.seconds;
  const auto start = Clock::now();
  double last_save = 0, last_export = 0;
  int bad = 0;
  bool done = false;
  const auto share_done = [&] {
    return o.steps > 0 ? static_cast<double>(state.step) / static_cast<double>(o.steps)
                       : state.seconds / (60 * o.minutes);
  };
  const auto validation_due = [&] {
    return o.validate_every > 0 && state.step % o.validate_every == 0;
  };
  while (!done && share_done() < 1) {
    const auto step_start = Clock::now();
    const double share = share_done();
    loss.mtp_lambda = share < 10 / 14.8 ? o.mtp_lambda : o.mtp_lambda_late;
    order.batch(state.position++, B, tokens.data());
    const kt::StepLosses l = step->run({B, S, tokens.data(), nullptr}, loss, true);
    kt::AdamOptions adam;
    const double warm = static_cast<double>(state.step + 1) /
                        static_cast<double>(std::max<int64_t>(o.warmup_steps, 1));
    const double cosine = 0.5 * (1 + std::cos(3.14159265358979323846 * std::min(share, 1.0)));
    adam.lr = o.lr * std::min(warm, 1.0) * (o.min_lr_ratio + (1 - o.min_lr_ratio) * cosine);
    adam.weight_decay = o.weight_decay, adam.clip = o.clip;
    const double grad = step->adamw(adam, state.step + 1);
    bad = std::isfinite(grad) && std::isfinite(l.total) ? 0 : bad + 1;
    if (bad >= 5) {
      throw Error(ExitCode::check_failed, "training diverged",
                  "step " + std::to_string(state.step + 1), "finite loss and gradient",
                  number(l.total) + ", " + number(grad));
    }
    if (use_bias && share < 1 - 0.5 / 14.8) {
      for (size_t i = 0; i < l.load.size(); ++i) {
        kt::update_bias(step->bias()[i], l.load[i], o.bias_speed);
      }
    }
    ++state.step;
    state.tokens += B * S;
    ++win.steps, win.tokens += l.targets, win.nats += l.nats, win.aux += l.aux, win.grad += grad;
    win.mtp_tokens += l.mtp_targets, win.mtp_nats += l.mtp_nats;
    for (const auto& load_of : l.load) {
      const double v = max_violation(load_of);
      win.maxvio += v, ++win.layers;
      win.maxvio_max = std::max(win.maxvio_max, v);
    }
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t i = 1; i <= S; ++i) {
        win.bytes += static_cast<int64_t>(
            tokenizer.piece_bytes(tokens[static_cast<size_t>(b * (S + 1) + i)]).size());
      }
    }
    win.seconds += seconds_since(step_start);
    state.seconds = before + seconds_since(start);
    done = g_stop != 0 || share_done() >= 1;

    if (win.steps >= o.log_every || done || validation_due()) {
      TrainRow r;
      const auto n = static_cast<double>(win.steps);
      r.step = state.step, r.tokens = state.tokens, r.seconds = state.seconds;
      r.loss = win.nats / static_cast<double>(win.tokens);
      r.mtp_loss = win.mtp_tokens > 0 ? win.mtp_nats / static_cast<double>(win.mtp_tokens) : 0;
      r.bits_per_byte = win.nats / (0.69314718055994530942 * static_cast<double>(win.bytes));
      r.lr = adam.lr, r.grad_norm = win.grad / n, r.aux_loss = win.aux / n;
      r.maxvio_batch_mean = win.layers > 0 ? win.maxvio / static_cast<double>(win.layers) : 0;
      r.maxvio_max = win.maxvio_max;
      r.tokens_per_s = static_cast<double>(win.tokens) / win.seconds;
      if (validation_due() && !done) {
        const EvalResult v = evaluate(*step, val_text, tokenizer, S, o.validate_tokens);
        r.val_loss = v.loss(), r.val_bpb = v.bits_per_byte();
        if (v.mtp_compared > 0) {
          r.val_mtp_loss = v.mtp_nats / static_cast<double>(v.mtp_tokens);
          r.val_mtp_agree = static_cast<double>(v.mtp_agree) / static_cast<double>(v.mtp_compared);
        }
        char text[160];
        std::snprintf(text, sizeof text,
                      "validation step %lld  loss %.4f  %.4f bits/byte  mtp agreement %.3f",
                      static_cast<long long>(r.step), r.val_loss, r.val_bpb, r.val_mtp_agree);
        progress.note(text);
      }
      csv.add(r);
      if (o.on_row) o.on_row(r);
      result.rows.push_back(r);
      win = {};
      const double sh = share_done();
      progress.show(r, sh > 0 ? state.seconds * (1 - sh) / sh : 0, sh);
    }
    const double now = seconds_since(start);
    if (files && (done || now - last_save > 60 * o.checkpoint_minutes)) {
      save_state(o.out_dir, fingerprint, state, *step);
      last_save = now;
    }
    if (files && (done || now - last_export > 60 * o.export_minutes)) {
      export_checkpoint(*step, c, step->bias(), o.out_dir + "/export-latest", tok);
      last_export = now;
    }
    state.seconds = before + seconds_since(start);
  }
  result.interrupted = g_stop != 0 && share_done() < 1;
  if (result.interrupted) result.signal = g_stop;
  double busy = 0;
  for (const TrainRow& r : result.rows) busy += 1 / r.tokens_per_s;
  if (busy > 0) result.tokens_per_s = static_cast<double>(result.rows.size()) / busy;
  if (!result.interrupted)
    result.validation = evaluate(*step, val_text, tokenizer, S, o.final_validate_tokens);
  if (progress.on && progress.tty) std::fputc('\n', stderr);
  return result;
}

int run_train(const TrainOptions& o) {
  const TrainResult r = train(o);
  if (r.interrupted) {
    std::fprintf(stderr, "v3bench: interrupted after step %lld; %s\n",
                 r.rows.empty() ? 0LL : static_cast<long long>(r.rows.back().step),
                 o.out_dir.empty() ? "nothing was kept (no --out)"
                                   : "state written, continue with --resume");
    return 128 + r.signal;
  }
  std::printf("trained %lld tokens in %.0f s: %.0f tokens/s, %.1f GFLOP/s (%.2f MFLOP a token)",
              static_cast<long long>(r.rows.empty() ? 0 : r.rows.back().tokens),
              r.rows.empty() ? 0.0 : r.rows.back().seconds, r.tokens_per_s,
              r.tokens_per_s * r.flops_per_token / 1e9, r.flops_per_token / 1e6);
  if (r.gemm_gflops > 0) {
    std::printf("; predicted %.0f tokens/s, reached %.0f%% of the GEMM peak %.0f GFLOP/s",
                r.predicted_tokens_per_s,
                100 * r.tokens_per_s * r.flops_per_token / 1e9 / r.gemm_gflops, r.gemm_gflops);
  }
  std::printf("\n");
  const EvalResult& v = r.validation;
  std::printf("validation: %lld tokens, loss %.4f nats, %.4f bits/byte",
              static_cast<long long>(v.tokens), v.loss(), v.bits_per_byte());
  if (v.mtp_compared > 0) {
    std::printf(", MTP loss %.4f, MTP agrees with the model's own top-1 in %.1f%%",
                v.mtp_nats / static_cast<double>(v.mtp_tokens),
                100.0 * static_cast<double>(v.mtp_agree) / static_cast<double>(v.mtp_compared));
  }
  std::printf("\n");
  if (!o.out_dir.empty()) std::printf("checkpoint: %s/export-latest\n", o.out_dir.c_str());
  return 0;
}

}  // namespace v3b::scen
