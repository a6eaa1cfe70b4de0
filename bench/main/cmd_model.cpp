// train, logits, generate: what needs a model on disk.
#include "bench/main/commands.h"

namespace v3b::cli {

void add_model_commands(CLI::App&, Chosen&) {}

}  // namespace v3b::cli
