// Resumable training state on disk. Internal to scenarios/training*.cpp.
#pragma once
#include <cstdint>
#include <string>

#include "kernels/train/step.h"

namespace v3b::scen {

struct TrainState {
  int64_t step = 0, tokens = 0, position = 0;  // position: batches drawn from WindowOrder
  double seconds = 0;
};
// state-<step>.safetensors (weights, moments, selection bias) and state.json naming the newest;
// each written beside its final name and renamed, the last two states are kept. `fingerprint`
// guards against resuming with another model, corpus, batch or context.
void save_state(const std::string& dir, const std::string& fingerprint, const TrainState& s,
                kern::train::TrainStep& step);
// Throws v3b::Error: not_found without a state, bad_input when it does not fit.
TrainState load_state(const std::string& dir, const std::string& fingerprint,
                      kern::train::TrainStep& step);
void write_text_atomically(const std::string& path, const std::string& text);

}  // namespace v3b::scen
