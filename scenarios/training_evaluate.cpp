#include "scenarios/training_evaluate.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "bench/harness/progress.h"
#include "kernels/train/step.h"
#include "model/error.h"
#include "reports/csv.h"
#include "reports/machine.h"

namespace v3b::scen {
namespace {

class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  ~Descriptor() { close(); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }
  void close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }

 private:
  int fd_;
};

// The text in a file without a name, read from its start.
int unnamed_file(std::string_view text) {
  std::string path = (std::filesystem::temp_directory_path() / "v3bench-xz-XXXXXX").string();
  const int fd = ::mkostemp(path.data(), O_CLOEXEC);
  if (fd < 0) throw Error(ExitCode::cannot_write, "cannot create", path, "", std::strerror(errno));
  ::unlink(path.c_str());
  for (size_t done = 0; done < text.size();) {
    const ssize_t n = ::write(fd, text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      const std::string why = std::strerror(errno);
      ::close(fd);
      throw Error(ExitCode::cannot_write, "cannot write", path, "", why);
    }
    done += static_cast<size_t>(n);
  }
  ::lseek(fd, 0, SEEK_SET);
  return fd;
}

void write_row(const EvaluateOptions& o, const EvaluateResult& r, int64_t context, double seconds) {
  const std::string dir = std::filesystem::path(o.out).parent_path().string();
  rep::write_machine_json(dir.empty() ? "." : dir);
  rep::CsvWriter csv(
      o.out, rep::with_identity({"model", "split", "documents", "context", "arithmetic", "tokens",
                                 "bytes", "nats", "loss", "bits_per_byte", "mtp_loss", "mtp_agree",
                                 "xz_bytes", "xz_bits_per_byte", "fewer_bits", "seconds"}));
  const EvalResult& m = r.model;
  rep::Record x;
  x.set(rep::identity("cpu")).set("model", o.init_dir).set("split", o.split);
  x.set("documents", r.documents).set("context", context).set("tokens", m.tokens);
  x.set("arithmetic", o.exact ? "f32" : "bf16").set("bytes", m.bytes).set("nats", m.nats);
  x.set("loss", m.loss()).set("bits_per_byte", m.bits_per_byte());
  if (m.mtp_compared > 0) {
    x.set("mtp_loss", m.mtp_nats / static_cast<double>(m.mtp_tokens));
    x.set("mtp_agree", static_cast<double>(m.mtp_agree) / static_cast<double>(m.mtp_compared));
  }
  x.set("xz_bytes", r.xz_bytes).set("xz_bits_per_byte", r.xz_bits_per_byte());
  x.set("fewer_bits", 1 - m.bits_per_byte() / r.xz_bits_per_byte()).set("seconds", seconds);
  csv.write(x);
}

}  // namespace

int64_t xz_size(std::string_view text, const std::string& program) {
  const Descriptor in(unnamed_file(text));
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0)
    throw Error(ExitCode::check_failed, "cannot make a pipe", program, "", std::strerror(errno));
  const Descriptor from(ends[0]);
  Descriptor to(ends[1]);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, in.get(), STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&actions, to.get(), STDOUT_FILENO);
  std::string name = program, preset = "-9e", out = "-c", threads = "-T1";
  std::array<char*, 5> args{name.data(), preset.data(), threads.data(), out.data(), nullptr};
  pid_t pid = 0;
  const int error = ::posix_spawnp(&pid, program.c_str(), &actions, nullptr, args.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0)
    throw Error(ExitCode::not_found, "cannot run the compressor that the model is compared with",
                program, "an installed xz (Debian: apt-get install xz-utils)",
                std::strerror(error));
  to.close();
  int64_t bytes = 0;
  std::array<char, 65536> buffer;
  for (;;) {
    const ssize_t n = ::read(from.get(), buffer.data(), buffer.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    bytes += n;
  }
  int status = 0;
  while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0 || bytes == 0)
    throw Error(
        ExitCode::check_failed, "the compressor failed", program + " -9e", "status 0",
        fmt::format("status {}, {} bytes",
                    WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), bytes));
  return bytes;
}

EvaluateResult evaluate_split(const EvaluateOptions& o) {
  if (o.split != "heldout" && o.split != "validation")
    throw Error(ExitCode::usage, "unknown split", "--evaluate", "heldout or validation", o.split);
  if (o.init_dir.empty())
    throw Error(ExitCode::usage, "no checkpoint to evaluate", "--evaluate", "--init DIR");
  if (o.context < 0)
    throw Error(ExitCode::usage, "bad value", "--context", "1 or more",
                fmt::format("{}", o.context));
  const auto begin = std::chrono::steady_clock::now();
  const model::WeightsPtr weights = model::load_weights(o.init_dir);
  const model::ModelConfig& c = weights->config;
  const int64_t context = o.context > 0 ? o.context : c.max_position_embeddings;
  if (context > c.max_position_embeddings)
    throw Error(ExitCode::usage, "more than the model's context", "--context",
                fmt::format("at most {}", c.max_position_embeddings), fmt::format("{}", context));
  const std::string path = o.tokenizer.empty() ? o.init_dir + "/tokenizer.model" : o.tokenizer;
  const auto tokenizer = model::Tokenizer::load(path);
  if (tokenizer.vocab_size() > c.vocab_size)
    throw Error(ExitCode::bad_input, "vocabulary of the tokenizer", path,
                fmt::format("at most vocab_size {}", c.vocab_size),
                fmt::format("{}", tokenizer.vocab_size()));
  const auto corpus = model::Corpus::load(o.corpus_dir, o.split);
  const model::TokenStream stream =
      model::tokenize_corpus(corpus, tokenizer, model::default_cache_path(corpus));
  EvaluateResult r;
  r.documents = stream.num_documents();
  r.xz_bytes = xz_size(corpus.text());  // first: it may be missing, and takes seconds
  auto step = kern::train::make_train_step(
      c, o.exact ? kern::train::Arithmetic::f32 : kern::train::Arithmetic::bf16);
  set_weights(*step, *weights);
  const auto tokens = static_cast<double>(stream.ids.size());
  bench::Progress progress("evaluate " + o.split, tokens);
  double shown = 0;
  r.model = evaluate(*step, stream, tokenizer, context, 0, 0.3, [&](double share) {
    if (!o.quiet) progress.advance((share - shown) * tokens);
    shown = share;
  });
  if (!o.quiet) progress.finish();
  if (!std::isfinite(r.model.nats))
    throw Error(ExitCode::check_failed, "the loss is no number", o.init_dir, "a finite loss",
                fmt::format("{}", r.model.nats));
  if (r.model.bytes != static_cast<int64_t>(corpus.text().size()))
    throw Error(ExitCode::check_failed, "bytes of the predicted tokens", corpus.path(),
                fmt::format("{}", corpus.text().size()), fmt::format("{}", r.model.bytes));
  const double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  if (!o.out.empty()) write_row(o, r, context, s);
  return r;
}

int run_evaluate(const EvaluateOptions& o) {
  const EvaluateResult r = evaluate_split(o);
  const EvalResult& m = r.model;
  fmt::print("{}, split {}: {} documents, {} tokens, {} bytes\n", o.init_dir, o.split, r.documents,
             m.tokens, m.bytes);
  fmt::print("model    {:.4f} bits/byte  ({:.1f} nats, {:.4f} a token)\n", m.bits_per_byte(),
             m.nats, m.loss());
  if (m.mtp_compared > 0)
    fmt::print("MTP      loss {:.4f} nats a token, top-1 agrees with the model's own in {:.1f}%\n",
               m.mtp_nats / static_cast<double>(m.mtp_tokens),
               100.0 * static_cast<double>(m.mtp_agree) / static_cast<double>(m.mtp_compared));
  fmt::print("xz -9e   {:.4f} bits/byte  ({} bytes, the split in one stream)\n",
             r.xz_bits_per_byte(), r.xz_bytes);
  const double fewer = 1 - m.bits_per_byte() / r.xz_bits_per_byte();
  fmt::print("the model needs {:.1f}% {} bits than xz -9e (its own size not counted)\n",
             100 * std::abs(fewer), fewer >= 0 ? "fewer" : "MORE");
  return 0;
}

}  // namespace v3b::scen
