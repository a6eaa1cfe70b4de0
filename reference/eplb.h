// EPLB: which experts get replicas and where the replicas go (SPEC 1.21), plain. Written from the
// description there; loads are double.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace v3b::ref {

struct Packing {
  std::vector<int64_t> pack, rank;  // [n] pack of each item and its place in it
};
// n items into packs of exactly n / packs. Items in descending weight (equal ones in index order),
// each to the lightest pack that is not full (first such). n == packs: identity. Throws
// v3b::Error(bad_input) if packs < 1 or n % packs != 0.
Packing balanced_packing(std::span<const double> weight, int64_t packs);

struct Replication {
  std::vector<int64_t> phy2log, rank;  // [P] expert of each replica, its number among the expert's
  std::vector<int64_t> logcnt;         // [E]
};
// One replica each, then replica after replica to the first argmax of weight / count. Throws if
// P < E.
Replication replicate(std::span<const double> weight, int64_t P);

enum class EplbPolicy { automatic, hierarchical, global };
struct EplbShape {
  int64_t E = 0, P = 0;           // logical experts, physical replicas
  int64_t groups = 1, nodes = 1;  // expert groups (whole groups go to a node)
  int64_t gpus = 1;
};
// Whether E % groups, gpus % nodes and groups % nodes are 0.
bool eplb_hierarchical_possible(const EplbShape& s);

struct Placement {
  int64_t max_count = 0;         // replicas of the most replicated expert, over all layers
  std::vector<int64_t> phy2log;  // [layers, P]; replica p is on GPU p / (P / gpus)
  std::vector<int64_t> log2phy;  // [layers, E, max_count], padded with -1
  std::vector<int64_t> logcnt;   // [layers, E]
};
// weight [layers, E]: load estimates >= 0. Hierarchical: (1) groups to nodes by their sums, (2) the
// experts of a node replicated to P / nodes, (3) replicas (weight / count) to the node's GPUs.
// Global: the same with groups = nodes = 1. Automatic: hierarchical where possible, else global.
// Throws v3b::Error(bad_input) where P % gpus != 0, P < E, a load is negative or NaN, or
// hierarchical is asked for and not possible.
Placement eplb(int64_t layers, const double* weight, EplbShape s,
               EplbPolicy policy = EplbPolicy::automatic);

// Load of each GPU in one layer, replicas of an expert sharing its weight equally: [gpus].
std::vector<double> eplb_gpu_load(const EplbShape& s, const double* weight, const int64_t* phy2log,
                                  const int64_t* logcnt);

}  // namespace v3b::ref
