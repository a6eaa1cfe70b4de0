#include "kernels/moe/moe_scratch.h"

namespace v3b::kern {

MoeScratch::MoeScratch() : impl_(std::make_unique<Impl>()) {}
MoeScratch::~MoeScratch() = default;
MoeScratch::MoeScratch(MoeScratch&&) noexcept = default;

void MoeScratch::Impl::plan(int64_t T, int64_t K, int64_t E, const int32_t* idx) {
  offsets.assign(static_cast<size_t>(E + 1), 0);
  for (int64_t i = 0; i < T * K; ++i)
    if (idx[i] >= 0) ++offsets[idx[i] + 1];
  for (int64_t e = 0; e < E; ++e) offsets[e + 1] += offsets[e];
  next.assign(offsets.begin(), offsets.end() - 1);
  slot.resize(static_cast<size_t>(offsets[E]));
  for (int64_t i = 0; i < T * K; ++i)
    if (idx[i] >= 0) slot[next[idx[i]]++] = i;
}

}  // namespace v3b::kern
