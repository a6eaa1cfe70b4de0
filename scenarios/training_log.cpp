#include "scenarios/training_log.h"

#include <fmt/format.h>

#include <cmath>
#include <filesystem>

#include "model/error.h"
#include "reports/machine.h"

namespace v3b::scen {
namespace {

const std::vector<std::string>& columns() {
  static const std::vector<std::string> c = {
      "step",         "tokens",        "seconds",           "loss",
      "mtp_loss",     "bits_per_byte", "val_loss",          "val_bpb",
      "lr",           "grad_norm",     "maxvio_batch_mean", "maxvio_max",
      "tokens_per_s", "aux_loss",      "val_mtp_loss",      "val_mtp_agree",
      "params"};
  return c;
}

std::optional<double> measured(double v) {
  return v >= 0 ? std::optional<double>(v) : std::nullopt;
}

void check_number(const char* flag, double v, bool good, const char* expected) {
  if (std::isfinite(v) && good) return;
  throw Error(ExitCode::usage, "bad value", flag, expected, fmt::format("{}", v));
}
void check_count(const char* flag, int64_t v, int64_t least) {
  if (v >= least) return;
  throw Error(ExitCode::usage, "bad value", flag, fmt::format("{} or more", least),
              fmt::format("{}", v));
}

}  // namespace

TrainLog::TrainLog(const std::string& path, bool resume, int64_t last_step, std::string params)
    : params_(std::move(params)) {
  if (path.empty()) return;
  const std::string dir = std::filesystem::path(path).parent_path().string();
  rep::write_machine_json(dir.empty() ? "." : dir);
  std::set<std::string> later;
  std::error_code ec;
  if (resume && std::filesystem::exists(path, ec) && std::filesystem::file_size(path, ec) > 0) {
    const rep::CsvTable old =
        rep::read_csv(path, {.required = {"step"}, .drop_torn_last_line = true});
    for (size_t i = 0; i < old.rows.size(); ++i) {
      const std::optional<double> step = old.number(i, "step");
      if (!step || *step > static_cast<double>(last_step)) later.insert(old.cell(i, "step"));
    }
  }
  csv_ = std::make_unique<rep::CsvWriter>(path, rep::with_identity(columns()),
                                          std::vector<std::string>{"step"}, resume, "step", later);
}

void TrainLog::add(const TrainRow& r) {
  if (csv_ == nullptr) return;
  rep::Record x;
  x.set(rep::identity("cpu")).set("step", r.step).set("tokens", r.tokens);
  x.set("seconds", r.seconds).set("loss", r.loss).set("mtp_loss", r.mtp_loss);
  x.set("bits_per_byte", r.bits_per_byte).set("val_loss", measured(r.val_loss));
  x.set("val_bpb", measured(r.val_bpb)).set("lr", r.lr).set("grad_norm", r.grad_norm);
  x.set("maxvio_batch_mean", r.maxvio_batch_mean).set("maxvio_max", r.maxvio_max);
  x.set("tokens_per_s", r.tokens_per_s).set("aux_loss", r.aux_loss);
  x.set("val_mtp_loss", measured(r.val_mtp_loss)).set("val_mtp_agree", measured(r.val_mtp_agree));
  x.set("params", params_);
  csv_->write(x);
}

void check_train_options(const TrainOptions& o) {
  check_number("--minutes", o.minutes, o.minutes >= 0, "a finite number of 0 or more");
  check_count("--steps", o.steps, 0);
  if ((o.steps > 0) == (o.minutes > 0)) {
    throw Error(ExitCode::usage, "training length", "--steps, --minutes", "exactly one of the two");
  }
  check_count("--context", o.context, 0);
  check_count("--batch", o.batch, 1);
  check_count("--warmup", o.warmup_steps, 0);
  check_count("--min-document-tokens", o.min_document_tokens, 0);
  check_count("--log-every", o.log_every, 1);
  check_count("--validate-every", o.validate_every, 0);
  check_count("--validate-tokens", o.validate_tokens, 0);
  check_count("--final-validate-tokens", o.final_validate_tokens, 0);
  const char* some = "a finite number of 0 or more";
  check_number("--lr", o.lr, o.lr > 0, "a finite number above 0");
  check_number("--min-lr-ratio", o.min_lr_ratio, o.min_lr_ratio >= 0 && o.min_lr_ratio <= 1,
               "0 to 1");
  check_number("--weight-decay", o.weight_decay, o.weight_decay >= 0, some);
  check_number("--clip", o.clip, o.clip >= 0, "a finite number of 0 (no clipping) or more");
  check_number("--mtp-lambda", o.mtp_lambda, o.mtp_lambda >= 0, some);
  check_number("--mtp-lambda-late", o.mtp_lambda_late, o.mtp_lambda_late >= 0, some);
  check_number("--aux-alpha", o.aux_alpha, o.aux_alpha >= 0 || o.aux_alpha == -1,
               "a finite number of 0 or more (-1: the strategy's own)");
  check_number("--bias-speed", o.bias_speed, o.bias_speed >= 0, some);
  check_number("--checkpoint-minutes", o.checkpoint_minutes, o.checkpoint_minutes >= 0, some);
  check_number("--export-minutes", o.export_minutes, o.export_minutes >= 0, some);
}

}  // namespace v3b::scen
