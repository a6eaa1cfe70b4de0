// v3bench logits: the logits of a checkpoint on a list of token ids, as a NumPy file.
#pragma once
#include <string>

#include "model/backend.h"

namespace v3b::scen {

struct LogitsOptions {
  std::string model;                  // checkpoint folder
  std::string tokens;                 // file of ids, separated by whitespace or commas
  std::string backend = "reference";  // reference | cpu, or a full backend name
  std::string dtype;                  // f64 | f32 | bf16; empty: f64 for reference, bf16 for cpu
  std::string out;                    // .npy, float32 [T, V]
  int64_t threads = 0;
  int64_t chunk = 0;              // tokens a call; 0: all in one
  model::BackendOptions options;  // flags; max_context 0: that of the model
};
// Writes the file beside its final name and renames it; prints one line to stderr. Returns 0;
// throws v3b::Error (not found, bad input naming file, line and position, cannot write).
int run_logits(const LogitsOptions& o);

// Ids of a text: separators are whitespace and commas. Throws Error(bad_input) naming `where`, line
// and column; ids must lie in [0, V) and there must be one.
std::vector<int32_t> parse_token_ids(const std::string& text, const std::string& where, int64_t V);
// Reads a whole file. Throws Error(not_found).
std::string read_text_file(const std::string& path);
// NumPy format 1.0, little-endian float32, C order. Throws Error(cannot_write).
void write_npy(const std::string& path, int64_t rows, int64_t cols, const float* data);

}  // namespace v3b::scen
