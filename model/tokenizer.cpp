#include "model/tokenizer.h"

#include <sentencepiece_processor.h>

#include <charconv>
#include <cstdio>
#include <fstream>
#include <sstream>

#include "model/error.h"
#include "model/hash.h"

namespace v3b::model {

namespace {

constexpr std::string_view kBlank = "\xe2\x96\x81";  // U+2581, SentencePiece's mark of a space
constexpr size_t kPartBytes = 4096;                  // a part ends at the first line end after this

std::string replace_blanks(const std::string& piece) {
  std::string out;
  for (size_t i = 0; i < piece.size();) {
    if (piece.compare(i, kBlank.size(), kBlank) == 0) {
      out += ' ';
      i += kBlank.size();
    } else {
      out += piece[i++];
    }
  }
  return out;
}

// Bytes of the UTF-8 sequence at text[i], 0 when it is invalid.
size_t utf8_length(std::string_view text, size_t i) {
  const auto byte = [&](size_t k) { return static_cast<unsigned char>(text[i + k]); };
  const unsigned char c = byte(0);
  if (c < 0x80) return 1;
  const size_t n = c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : 2;
  if (c < 0xc2 || c > 0xf4 || i + n > text.size()) return 0;
  for (size_t k = 1; k < n; ++k)
    if ((byte(k) & 0xc0) != 0x80) return 0;
  if (c == 0xe0 && byte(1) < 0xa0) return 0;  // overlong
  if (c == 0xed && byte(1) > 0x9f) return 0;  // surrogates
  if (c == 0xf0 && byte(1) < 0x90) return 0;  // overlong
  if (c == 0xf4 && byte(1) > 0x8f) return 0;  // above U+10FFFF
  return n;
}

}  // namespace

size_t find_invalid_utf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const size_t n = utf8_length(text, i);
    if (n == 0) return i;
    i += n;
  }
  return std::string_view::npos;
}

struct Tokenizer::Impl {
  sentencepiece::SentencePieceProcessor processor;
};

Tokenizer::Tokenizer() : impl_(std::make_unique<Impl>()) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

Tokenizer Tokenizer::load(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file)
    throw Error(ExitCode::not_found, "cannot open tokenizer", path, "a readable file", "none");
  std::ostringstream bytes;
  bytes << file.rdbuf();
  const std::string model = bytes.str();
  Tokenizer t;
  auto& sp = t.impl_->processor;
  const auto status = sp.LoadFromSerializedProto(model);
  if (model.empty() || !status.ok())
    throw Error(ExitCode::bad_input, "tokenizer", path, "a SentencePiece model",
                model.empty() ? "an empty file" : status.ToString());
  t.fingerprint_ = hex64(fnv1a64(model));
  t.bos_ = sp.bos_id();
  t.eos_ = sp.eos_id();
  t.unk_ = sp.unk_id();
  int bytes_seen = 0;
  for (int id = 0; id < sp.GetPieceSize(); ++id) {
    const std::string& piece = sp.IdToPiece(id);
    if (sp.IsByte(id)) {
      unsigned value = 256;
      if (piece.size() != 6 || !piece.starts_with("<0x") || piece.back() != '>' ||
          std::from_chars(piece.data() + 3, piece.data() + 5, value, 16).ptr != piece.data() + 5)
        throw Error(ExitCode::bad_input, "byte piece", path + ", id " + std::to_string(id),
                    "<0xNN>", piece);
      t.byte_id_[value] = id;
      t.pieces_.emplace_back(1, static_cast<char>(value));
      ++bytes_seen;
    } else {
      t.pieces_.push_back(sp.IsControl(id) || sp.IsUnknown(id) ? "" : replace_blanks(piece));
    }
  }
  if (bytes_seen != 256)
    throw Error(ExitCode::bad_input, "byte pieces", path, "256", std::to_string(bytes_seen));
  constexpr std::string_view kProbe = "  a \t\n\n  B\xc3\xa9\xef\xac\x81 \xe2\x96\x81x  \n ";
  const std::vector<int32_t> ids = t.encode(kProbe, path);
  if (t.decode(ids) != kProbe)
    throw Error(ExitCode::bad_input, "tokenizer", path, "encode and decode to give every text back",
                "a model that normalises or adds blanks");
  return t;
}

void Tokenizer::encode_part(std::string_view text, std::vector<int32_t>& ids) const {
  // A real U+2581 would come back as a space: it goes in as its three bytes.
  while (!text.empty()) {
    const size_t mark = text.find(kBlank);
    std::vector<int> part;
    const auto status = impl_->processor.Encode(text.substr(0, mark), &part);
    if (!status.ok())
      throw Error(ExitCode::bad_input, "cannot encode", "text", "", status.ToString());
    ids.insert(ids.end(), part.begin(), part.end());
    if (mark == std::string_view::npos) return;
    for (const char c : kBlank) ids.push_back(byte_id_[static_cast<unsigned char>(c)]);
    text.remove_prefix(mark + kBlank.size());
  }
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, const std::string& source) const {
  const size_t bad = find_invalid_utf8(text);
  if (bad != std::string_view::npos) {
    char found[8];
    std::snprintf(found, sizeof found, "0x%02x", static_cast<unsigned char>(text[bad]));
    throw Error(ExitCode::bad_input, "text", source + ", byte " + std::to_string(bad),
                "valid UTF-8", found);
  }
  std::vector<int32_t> ids;
  ids.reserve(text.size() / 3);
  while (!text.empty()) {
    size_t end = kPartBytes < text.size() ? text.find('\n', kPartBytes) : std::string_view::npos;
    if (end != std::string_view::npos) end = text.find_first_not_of('\n', end);
    const size_t n = std::min(end, text.size());
    encode_part(text.substr(0, n), ids);
    text.remove_prefix(n);
  }
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids) const {
  std::string out;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab_size())
      throw Error(ExitCode::bad_input, "token id", "position " + std::to_string(i),
                  "0 to " + std::to_string(vocab_size() - 1), std::to_string(ids[i]));
    out += pieces_[static_cast<size_t>(ids[i])];
  }
  return out;
}

}  // namespace v3b::model
