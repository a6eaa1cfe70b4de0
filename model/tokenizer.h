// SentencePiece tokenizer of a model folder. encode and decode are exact inverses for every valid
// UTF-8 text: newlines, tabs, runs of blanks and unknown characters (byte pieces) come back as they
// were. Nothing is normalised and no prefix blank is added; bos and eos are never added by encode.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace v3b::model {

// Byte offset of the first byte that is not part of a valid UTF-8 sequence (overlong forms,
// surrogates and values above U+10FFFF are invalid), or npos when all of the text is valid.
size_t find_invalid_utf8(std::string_view text);

class Tokenizer {
 public:
  // Reads a SentencePiece model file. Throws v3b::Error (not_found, bad_input) naming the file;
  // a model that would not give every text back (normalisation, prefix blank, no byte pieces) is
  // bad input too.
  static Tokenizer load(const std::string& path);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;

  // Ids in [0, vocab_size). Throws v3b::Error(bad_input) on invalid UTF-8, naming `source` and the
  // byte offset. An empty text gives no ids. Long texts are cut where a newline follows a
  // non-newline, so that time stays linear; the cuts depend on the text alone.
  std::vector<int32_t> encode(std::string_view text, const std::string& source = "text") const;

  // The bytes of the pieces one after the other; control pieces (bos, eos, unk) give nothing. A cut
  // in the middle of a character gives that character's first bytes only. Throws
  // v3b::Error(bad_input) on an id out of range, naming its position.
  std::string decode(std::span<const int32_t> ids) const;

  int32_t vocab_size() const { return static_cast<int32_t>(pieces_.size()); }
  int32_t bos() const { return bos_; }
  int32_t eos() const { return eos_; }
  int32_t unk() const { return unk_; }
  // What decode gives for one id (empty for control pieces); id in [0, vocab_size).
  std::string_view piece_bytes(int32_t id) const { return pieces_.at(static_cast<size_t>(id)); }
  // 16 hex digits that change with any byte of the model file.
  const std::string& fingerprint() const { return fingerprint_; }

 private:
  Tokenizer();
  void encode_part(std::string_view text, std::vector<int32_t>& ids) const;

  struct Impl;
  std::unique_ptr<Impl> impl_;
  std::vector<std::string> pieces_;
  int32_t byte_id_[256] = {};
  int32_t bos_ = -1, eos_ = -1, unk_ = -1;
  std::string fingerprint_;
};

}  // namespace v3b::model
