#include "bench/ops/registry.h"

namespace v3b::bench {

// One factory an op, defined in bench/ops/<op>.cpp.
std::unique_ptr<OpBase> make_rmsnorm_op();

std::vector<std::unique_ptr<OpBase>> all_ops() {
  std::vector<std::unique_ptr<OpBase>> ops;
  ops.push_back(make_rmsnorm_op());
  return ops;
}

}  // namespace v3b::bench
