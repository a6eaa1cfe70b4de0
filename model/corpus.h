// The text corpus that scripts/build_corpus.py writes (model/corpus/README.md) and its token
// stream.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "model/tokenizer.h"

namespace v3b::model {

struct Document {
  std::string id, domain, package;  // domain: prose | code | text (a file given by the user)
  std::string_view text;            // into the corpus, valid while any copy of it lives
  int64_t offset_bytes = 0;         // of text[0] in the split's file
};

class Corpus {
 public:
  // Reads DIR/<split>.txt and DIR/<split>.index.tsv; split is train | validation | heldout.
  // Throws v3b::Error: not_found when a file is missing, bad_input (naming file and line or byte)
  // on a wrong header, wrong columns, lengths that do not cover the text exactly and in order,
  // empty documents, invalid UTF-8.
  static Corpus load(const std::string& dir, const std::string& split);
  // One text file as a corpus of one document of domain "text". Same errors.
  static Corpus load_text_file(const std::string& path);

  const std::vector<Document>& documents() const { return documents_; }
  std::string_view text() const { return *text_; }   // all documents one after the other
  const std::string& path() const { return path_; }  // of the text file
  uint64_t hash() const { return hash_; }            // of text and document borders

 private:
  std::string path_;
  std::shared_ptr<const std::string> text_;
  std::vector<Document> documents_;
  uint64_t hash_ = 0;
};

// All documents as one stream: bos, tokens of document 0, bos, tokens of document 1, ... so that
// windows can be cut anywhere and document borders are known to the model and to the reader.
struct TokenStream {
  std::vector<int32_t> ids;          // [tokens]
  std::vector<int64_t> token_begin;  // [documents + 1]; ids[token_begin[d]] is the bos before d
  std::vector<int64_t> byte_begin;   // [documents + 1]; into Corpus::text()
  std::string cache;                 // "read", "written" or why there is none

  int64_t num_documents() const { return static_cast<int64_t>(token_begin.size()) - 1; }
  // With its bos.
  std::span<const int32_t> document(int64_t d) const {
    const auto b = static_cast<size_t>(token_begin.at(static_cast<size_t>(d)));
    const auto e = static_cast<size_t>(token_begin.at(static_cast<size_t>(d) + 1));
    return std::span(ids).subspan(b, e - b);
  }
  int64_t document_bytes(int64_t d) const {
    return byte_begin.at(static_cast<size_t>(d) + 1) - byte_begin.at(static_cast<size_t>(d));
  }
};

// Tokenises every document, on all cores. With a cache path, a file there that was made from the
// same text, document borders and tokenizer is read instead; any other content is replaced (written
// to a temporary name and renamed). A cache that cannot be written is no error: `cache` says so.
// Throws v3b::Error(bad_input) when a document does not come back from its tokens byte by byte.
TokenStream tokenize_corpus(const Corpus& corpus, const Tokenizer& tokenizer,
                            const std::string& cache_path = "");

// Corpus::path() with ".txt" replaced by ".tokens.bin".
std::string default_cache_path(const Corpus& corpus);

}  // namespace v3b::model
