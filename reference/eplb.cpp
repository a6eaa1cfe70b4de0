#include "reference/eplb.h"

#include <algorithm>
#include <numeric>
#include <string>

#include "model/error.h"

namespace v3b::ref {
namespace {

void require(bool ok, const char* what, const std::string& expected, const std::string& found) {
  if (!ok) throw Error(ExitCode::bad_input, what, "eplb", expected, found);
}

// One layer: phy2log [P], rank [P], logcnt [E].
Replication place_layer(const double* w, const EplbShape& s) {
  const int64_t group_size = s.E / s.groups, groups_per_node = s.groups / s.nodes;
  const int64_t experts = s.E / s.nodes, replicas = s.P / s.nodes, gpus = s.gpus / s.nodes;
  // (1) groups to nodes: `of_node[n * experts + j]` is the expert at place j of node n.
  std::vector<double> sums(size_t(s.groups), 0.0);
  for (int64_t e = 0; e < s.E; ++e) sums[size_t(e / group_size)] += w[e];
  const Packing groups = balanced_packing(sums, s.nodes);
  std::vector<int64_t> of_node(static_cast<size_t>(s.E));
  for (int64_t g = 0; g < s.groups; ++g) {
    const int64_t place = groups.pack[size_t(g)] * groups_per_node + groups.rank[size_t(g)];
    for (int64_t j = 0; j < group_size; ++j)
      of_node[size_t(place * group_size + j)] = g * group_size + j;
  }
  Replication out;
  out.phy2log.resize(size_t(s.P));
  out.rank.resize(size_t(s.P));
  out.logcnt.resize(size_t(s.E));
  for (int64_t n = 0; n < s.nodes; ++n) {
    const int64_t* expert = of_node.data() + n * experts;
    std::vector<double> node_weight;
    for (int64_t j = 0; j < experts; ++j) node_weight.push_back(w[expert[j]]);
    // (2) replicas inside the node
    const Replication r = replicate(node_weight, replicas);
    for (int64_t j = 0; j < experts; ++j) out.logcnt[size_t(expert[j])] = r.logcnt[size_t(j)];
    // (3) replicas to the node's GPUs
    std::vector<double> share;
    for (int64_t j : r.phy2log)
      share.push_back(node_weight[size_t(j)] / double(r.logcnt[size_t(j)]));
    const Packing gpu = balanced_packing(share, gpus);
    for (int64_t p = 0; p < replicas; ++p) {
      const int64_t at =
          n * replicas + gpu.pack[size_t(p)] * (replicas / gpus) + gpu.rank[size_t(p)];
      out.phy2log[size_t(at)] = expert[r.phy2log[size_t(p)]];
      out.rank[size_t(at)] = r.rank[size_t(p)];
    }
  }
  return out;
}

}  // namespace

Packing balanced_packing(std::span<const double> weight, int64_t packs) {
  const int64_t n = int64_t(weight.size());
  require(packs >= 1 && n % packs == 0, "items into packs", "a multiple of the packs",
          std::to_string(n) + " into " + std::to_string(packs));
  Packing p{std::vector<int64_t>(size_t(n)), std::vector<int64_t>(size_t(n))};
  if (n == packs) {
    std::iota(p.pack.begin(), p.pack.end(), 0);
    return p;
  }
  std::vector<size_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return weight[a] > weight[b]; });
  std::vector<double> load(size_t(packs), 0.0);
  std::vector<int64_t> count(size_t(packs), 0);
  for (size_t item : order) {
    int64_t best = -1;
    for (int64_t k = 0; k < packs; ++k) {
      if (count[size_t(k)] == n / packs) continue;
      if (best < 0 || load[size_t(k)] < load[size_t(best)]) best = k;
    }
    p.pack[item] = best;
    p.rank[item] = count[size_t(best)]++;
    load[size_t(best)] += weight[item];
  }
  return p;
}

Replication replicate(std::span<const double> weight, int64_t P) {
  const int64_t E = int64_t(weight.size());
  require(E >= 1 && P >= E, "replicas", "at least one an expert",
          std::to_string(P) + " for " + std::to_string(E));
  Replication r;
  r.logcnt.assign(size_t(E), 1);
  r.rank.assign(size_t(P), 0);
  for (int64_t e = 0; e < E; ++e) r.phy2log.push_back(e);
  for (int64_t p = E; p < P; ++p) {
    size_t best = 0;
    for (size_t e = 1; e < size_t(E); ++e)
      if (weight[e] / double(r.logcnt[e]) > weight[best] / double(r.logcnt[best])) best = e;
    r.phy2log.push_back(int64_t(best));
    r.rank[size_t(p)] = r.logcnt[best]++;
  }
  return r;
}

bool eplb_hierarchical_possible(const EplbShape& s) {
  return s.groups >= 1 && s.nodes >= 1 && s.E % s.groups == 0 && s.gpus % s.nodes == 0 &&
         s.groups % s.nodes == 0;
}

Placement eplb(int64_t layers, const double* weight, EplbShape s, EplbPolicy policy) {
  require(s.E >= 1 && s.gpus >= 1 && s.P >= s.E && s.P % s.gpus == 0, "replicas",
          "P >= E and a multiple of the GPUs",
          std::to_string(s.P) + " for " + std::to_string(s.E) + " experts on " +
              std::to_string(s.gpus) + " GPUs");
  const bool possible = eplb_hierarchical_possible(s);
  require(possible || policy != EplbPolicy::hierarchical, "hierarchical policy",
          "E % groups, gpus % nodes and groups % nodes of 0",
          std::to_string(s.groups) + " groups, " + std::to_string(s.nodes) + " nodes");
  if (policy == EplbPolicy::global || !possible) s.groups = s.nodes = 1;
  for (int64_t i = 0; i < layers * s.E; ++i)
    require(weight[i] >= 0, "load", ">= 0", std::to_string(weight[i]));
  Placement out;
  std::vector<int64_t> rank;
  for (int64_t l = 0; l < layers; ++l) {
    const Replication r = place_layer(weight + l * s.E, s);
    out.phy2log.insert(out.phy2log.end(), r.phy2log.begin(), r.phy2log.end());
    out.logcnt.insert(out.logcnt.end(), r.logcnt.begin(), r.logcnt.end());
    rank.insert(rank.end(), r.rank.begin(), r.rank.end());
  }
  for (int64_t c : out.logcnt) out.max_count = std::max(out.max_count, c);
  out.log2phy.assign(size_t(layers * s.E * out.max_count), -1);
  for (int64_t l = 0; l < layers; ++l)
    for (int64_t p = 0; p < s.P; ++p) {
      const size_t at = size_t(l * s.P + p);
      out.log2phy[size_t((l * s.E + out.phy2log[at]) * out.max_count + rank[at])] = p;
    }
  return out;
}

std::vector<double> eplb_gpu_load(const EplbShape& s, const double* weight, const int64_t* phy2log,
                                  const int64_t* logcnt) {
  std::vector<double> load(size_t(s.gpus), 0.0);
  for (int64_t p = 0; p < s.P; ++p)
    load[size_t(p / (s.P / s.gpus))] += weight[phy2log[p]] / double(logcnt[phy2log[p]]);
  return load;
}

}  // namespace v3b::ref
