// v3bench train --evaluate: bits per byte of a checkpoint on a whole split, beside xz -9e on the
// same bytes.
#pragma once
#include <string>
#include <string_view>

#include "scenarios/training.h"

namespace v3b::scen {

struct EvaluateOptions {
  std::string split;                        // heldout | validation
  std::string init_dir;                     // checkpoint folder
  std::string corpus_dir = "build/corpus";  // of scripts/build_corpus.py
  std::string tokenizer;                    // "": tokenizer.model of init_dir
  std::string out;                          // CSV of one row; "": none
  int64_t context = 0;                      // tokens a chunk; 0: max_position_embeddings
  bool exact = false;                       // float32 GEMMs
  bool quiet = false;                       // no progress on stderr
};
struct EvaluateResult {
  EvalResult model;
  int64_t documents = 0;
  int64_t xz_bytes = 0;  // of `xz -9e` on the concatenated text of the split
  double xz_bits_per_byte() const {
    return 8.0 * static_cast<double>(xz_bytes) / static_cast<double>(model.bytes);
  }
};
// Throws v3b::Error: usage (unknown split, no checkpoint, bad context), what loading throws,
// not_found without the xz program, check_failed when a loss is no number.
EvaluateResult evaluate_split(const EvaluateOptions& o);
// evaluate_split() printed; returns 0.
int run_evaluate(const EvaluateOptions& o);

// Bytes that `PROGRAM -9e -c` makes of the text (given as a file on its standard input). Throws
// v3b::Error: not_found naming the program when it is not installed, check_failed when it fails.
int64_t xz_size(std::string_view text, const std::string& program = "xz");

}  // namespace v3b::scen
