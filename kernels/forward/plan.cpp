// Which rows go through which form of attention. Expanded attention re-creates K and V of all s
// keys (2 n_h (d_n + d_v) d_c FLOP each) and then costs 2 n_h (d_qk + d_v) a pair; absorbed costs 2
// n_h (2 d_c + d_r) a pair. Expanded pays from T > (d_n + d_v) d_c / (2 d_c + d_r - d_qk - d_v) new
// rows (171 for V3, SPEC 1.8).
#include <algorithm>

#include "kernels/forward/pass.h"

namespace v3b::kern {
namespace {

constexpr int64_t kQueriesAUnit =
    64;  // absorbed queries of one sequence in one call: bounds the scratch
constexpr int64_t kExpandFromEmpty = 5;  // on an empty sequence nothing has to be re-expanded

bool use_expanded(const model::ModelConfig& c, const PassItem& item, bool absorbed_prefill) {
  if (absorbed_prefill) return false;
  if (item.s0 == 0) return item.T >= kExpandFromEmpty;
  const int64_t gain = 2 * c.kv_lora_rank + c.qk_rope_head_dim - c.qk_head_dim() - c.v_head_dim;
  if (gain <= 0) return false;
  return item.T > (c.qk_nope_head_dim + c.v_head_dim) * c.kv_lora_rank / gain;
}

void add_absorbed(Plan& plan, size_t first_item, size_t count, int64_t offset, int64_t s_q) {
  AttentionUnit u;
  u.first = plan.items[first_item].first + offset;
  u.B = static_cast<int64_t>(count);
  u.s_q = s_q;
  u.table = static_cast<int64_t>(plan.tables.size());
  u.lens = static_cast<int64_t>(plan.seqlens.size());
  for (size_t i = first_item; i < first_item + count; ++i)
    u.max_blocks =
        std::max(u.max_blocks, static_cast<int64_t>(plan.items[i].track->blocks().size()));
  for (size_t i = first_item; i < first_item + count; ++i) {
    const PassItem& item = plan.items[i];
    const auto& blocks = item.track->blocks();
    plan.tables.insert(plan.tables.end(), blocks.begin(), blocks.end());
    plan.tables.resize(plan.tables.size() + static_cast<size_t>(u.max_blocks) - blocks.size(), -1);
    plan.seqlens.push_back(static_cast<int32_t>(item.s0 + offset + s_q));
  }
  plan.units.push_back(u);
}

}  // namespace

void make_plan(const model::ModelConfig& c, bool absorbed_prefill, Plan& plan) {
  plan.rows = 0;
  plan.positions.clear();
  plan.slots.clear();
  plan.units.clear();
  plan.tables.clear();
  plan.seqlens.clear();
  for (PassItem& item : plan.items) {
    item.first = plan.rows;
    item.track->reserve(item.s0 + item.T);
    for (int64_t i = 0; i < item.T; ++i) {
      plan.positions.push_back(static_cast<int32_t>(item.s0 + i));
      plan.slots.push_back(static_cast<int32_t>(item.track->slot(item.s0 + i)));
    }
    plan.rows += item.T;
  }
  for (size_t i = 0; i < plan.items.size();) {
    const int64_t T = plan.items[i].T;
    if (use_expanded(c, plan.items[i], absorbed_prefill)) {
      AttentionUnit u;
      u.expanded = true;
      u.first = plan.items[i].first;
      u.s_q = T;
      u.item = i++;
      plan.units.push_back(u);
      continue;
    }
    if (T > kQueriesAUnit) {
      for (int64_t at = 0; at < T; at += kQueriesAUnit)
        add_absorbed(plan, i, 1, at, std::min(kQueriesAUnit, T - at));
      ++i;
      continue;
    }
    size_t n = 1;  // neighbours with as many new rows share a call
    while (i + n < plan.items.size() && plan.items[i + n].T == T &&
           !use_expanded(c, plan.items[i + n], absorbed_prefill))
      ++n;
    add_absorbed(plan, i, n, 0, T);
    i += n;
  }
}

}  // namespace v3b::kern
