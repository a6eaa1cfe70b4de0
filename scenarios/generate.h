// v3bench generate: continues a text, with or without speculative decoding through the MTP module.
#pragma once
#include <string>

#include "model/backend.h"

namespace v3b::scen {

struct GenerateOptions {
  std::string model;                 // checkpoint folder with tokenizer.model; "" for model/tiny-v3
  std::string prompt;                // text; or
  std::string prompt_file;           // a file of it
  std::string backend = "cpu_bf16";  // backend_factory.h, or reference | cpu with dtype
  std::string dtype;
  int64_t max_new = 128;
  bool mtp = true;     // speculative decoding; off, with a note, when the model has no MTP module
  int64_t drafts = 1;  // draft tokens a step
  bool greedy = true;
  double temperature = 0.8, top_p = 0.95;  // used if not greedy
  uint64_t seed = 1;
  int64_t threads = 0;
  spec::Flags flags;  // of the forward pass
  bool compare =
      false;  // also decode plainly and say whether the tokens agree (greedy) and the speed-up
};
// The continuation goes to stdout, statistics to stderr. Returns 0, or 1 if `compare` finds a
// difference that is no near-tie. Throws v3b::Error (empty or non-UTF-8 prompt, too long a context,
// missing files).
int run_generate(const GenerateOptions& o);

}  // namespace v3b::scen
