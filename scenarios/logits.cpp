#include "scenarios/logits.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "bench/harness/flags_text.h"
#include "model/error.h"
#include "scenarios/backend_factory.h"

namespace v3b::scen {

std::string read_text_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::error_code ec;
  if (!in || std::filesystem::is_directory(path, ec))
    throw Error(ExitCode::not_found, "cannot read the file", path, "a readable file");
  return {std::istreambuf_iterator<char>(in), {}};
}

std::vector<int32_t> parse_token_ids(const std::string& text, const std::string& where, int64_t V) {
  std::vector<int32_t> ids;
  int64_t line = 1;
  size_t line_start = 0;
  const auto separator = [](char c) {
    return c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == ',' || c == '\f' || c == '\v';
  };
  for (size_t i = 0; i < text.size();) {
    if (separator(text[i])) {
      if (text[i] == '\n') ++line, line_start = i + 1;
      ++i;
      continue;
    }
    size_t end = i;
    while (end < text.size() && !separator(text[end])) ++end;
    const std::string place = fmt::format("{}, line {}, column {} (token {})", where, line,
                                          i - line_start + 1, ids.size());
    std::string word = text.substr(i, std::min<size_t>(end - i, 40));
    for (char& c : word)  // a binary file: the message stays one line of text
      if (static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) > 0x7e) c = '?';
    int64_t id = 0;
    const auto r = std::from_chars(text.data() + i, text.data() + end, id);
    if (r.ec == std::errc::invalid_argument || r.ptr != text.data() + end)
      throw Error(ExitCode::bad_input, "not a token id", place, "an integer", "'" + word + "'");
    if (r.ec != std::errc() || id < 0 || id >= V)
      throw Error(ExitCode::bad_input, "token id out of range", place,
                  fmt::format("0 <= id < {}", V), word);
    ids.push_back(static_cast<int32_t>(id));
    i = end;
  }
  if (ids.empty()) throw Error(ExitCode::bad_input, "no token ids", where, "at least one");
  return ids;
}

void write_npy(const std::string& path, int64_t rows, int64_t cols, const float* data) {
  std::string dict =
      fmt::format("{{'descr': '<f4', 'fortran_order': False, 'shape': ({}, {}), }}", rows, cols);
  constexpr size_t kPrefix = 10;  // magic, version, header length
  while ((kPrefix + dict.size() + 1) % 64 != 0) dict += ' ';
  dict += '\n';
  // A device or pipe (/dev/stdout) is written in place: nothing may take its name.
  std::error_code ec;
  const auto status = std::filesystem::status(path, ec);
  const bool direct = std::filesystem::exists(status) && !std::filesystem::is_regular_file(status);
  const std::string partial = direct ? path : path + ".partial";
  const auto fail = [&] {
    const std::string why = std::strerror(errno);
    if (!direct) std::remove(partial.c_str());
    throw Error(ExitCode::cannot_write, "cannot write the file", path, "", why);
  };
  std::FILE* f = std::fopen(partial.c_str(), "wb");
  if (f == nullptr) fail();
  const unsigned char head[kPrefix] = {0x93,
                                       'N',
                                       'U',
                                       'M',
                                       'P',
                                       'Y',
                                       1,
                                       0,
                                       static_cast<unsigned char>(dict.size() & 255),
                                       static_cast<unsigned char>(dict.size() >> 8)};
  const size_t n = static_cast<size_t>(rows * cols);
  const bool good = std::fwrite(head, 1, kPrefix, f) == kPrefix &&
                    std::fwrite(dict.data(), 1, dict.size(), f) == dict.size() &&
                    std::fwrite(data, sizeof(float), n, f) == n && std::fflush(f) == 0;
  const int error = errno;
  if ((std::fclose(f) != 0) | !good) {
    if (!good) errno = error;
    fail();
  }
  if (!direct && std::rename(partial.c_str(), path.c_str()) != 0) fail();
}

int run_logits(const LogitsOptions& o) {
  if (o.chunk < 0)
    throw Error(ExitCode::usage, "bad value", "--chunk", "1 or more", fmt::format("{}", o.chunk));
  const std::string name = backend_name(o.backend, o.dtype);
  const std::string text = read_text_file(o.tokens);
  const model::WeightsPtr weights = model::load_weights(o.model);
  const model::ModelConfig& c = weights->config;
  const std::vector<int32_t> ids = parse_token_ids(text, o.tokens, c.vocab_size);
  const int64_t T = static_cast<int64_t>(ids.size());
  const int64_t room =
      o.options.max_context > 0 ? o.options.max_context : c.max_position_embeddings;
  if (T > room)
    throw Error(ExitCode::bad_input, "more tokens than the model's context", o.tokens,
                fmt::format("at most {}", room), fmt::format("{}", T));
  model::BackendOptions options = o.options;
  options.threads = o.threads;
  auto backend = make_backend(name, weights, options);
  auto seq = backend->new_sequence();
  const auto t0 = std::chrono::steady_clock::now();
  std::vector<float> logits;
  logits.reserve(static_cast<size_t>(T * c.vocab_size));
  const int64_t chunk = o.chunk > 0 ? o.chunk : T;
  for (int64_t at = 0; at < T; at += chunk) {
    const int64_t n = std::min(chunk, T - at);
    const auto r = backend->forward(*seq, std::span(ids).subspan(size_t(at), size_t(n)),
                                    {model::LogitsOf::all});
    logits.insert(logits.end(), r.logits.begin(), r.logits.end());
  }
  const double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
  write_npy(o.out, T, c.vocab_size, logits.data());
  const std::string flags = bench::changed_flags_text(options.flags);
  fmt::print(stderr, "logits [{}, {}] of {} by {}{}{} in {:.2f} s -> {}\n", T, c.vocab_size,
             o.model, name, flags.empty() ? "" : " with ", flags, s, o.out);
  return 0;
}

}  // namespace v3b::scen
