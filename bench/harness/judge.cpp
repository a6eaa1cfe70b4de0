#include "bench/harness/judge.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iterator>
#include <limits>
#include <map>
#include <set>

namespace v3b::bench {
namespace {

constexpr int64_t kParallelFrom = 1
                                  << 17;  // elements or bytes; waking the threads costs more below
constexpr int64_t kChunk = 1 << 14;
constexpr double kInf = std::numeric_limits<double>::infinity();

std::string number(double v) {
  char buf[40];
  std::snprintf(buf, sizeof buf, "%.6g", v);
  return buf;
}

std::string place(const ExpectedTensor& e, int64_t i) {
  return e.name + "[" + std::to_string(i) + "]";
}

Verdict failure(const std::string& reason) {
  Verdict v;
  v.reason = reason;
  v.err_over_bound = kInf;
  return v;
}

// |got - expected| where equal infinities agree; NaN in `got` gives infinity, so that every maximum
// keeps it.
double difference(double got, double expected) {
  if (got == expected) return 0;
  const double d = std::fabs(got - expected);
  return d >= 0 ? d : kInf;
}

struct Partial {  // of one chunk
  double err2 = 0, max_abs = 0, max_rel = 0, worst = 0;
  int64_t worst_at = -1;
};

// Element i of the tensor is compared with e.values[i], unless skip[i] says that it is not judged. A
// NaN of the reference differs from everything (`difference`) and fails.
Verdict judge_values(const ExpectedTensor& e, const std::vector<uint8_t>& skip,
                     const std::vector<double>* replaced, const HostTensor& t,
                     const Tolerance& tol) {
  const std::vector<double>& values = e.values;
  const int64_t n = static_cast<int64_t>(values.size());
  if (!skip.empty() && skip.size() != values.size())
    return failure(e.name + ": the mask of judged elements has another size");
  const auto judges = [&skip](int64_t i) {
    return skip.empty() || skip[static_cast<size_t>(i)] == 0;
  };
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  const double* want = values.data();
  double sum2 = 0;
  int64_t judged = 0;
#pragma omp parallel for schedule(static) reduction(+ : sum2, judged) if (n > kParallelFrom)
  for (int64_t i = 0; i < n; ++i) {
    if (!judges(i)) continue;
    ++judged;
    if (std::isfinite(want[i])) sum2 += want[i] * want[i];
  }
  Verdict v;
  v.passed = true;
  if (n > 0 && judged == 0) return failure(e.name + ": the reference judges no element");
  if (n == 0) return v;
  if (!e.skip.empty() && judged < n)
    v.note =
        e.name + ": " + std::to_string(judged) + " of " + std::to_string(n) + " elements judged";
  const double rms = std::sqrt(sum2 / static_cast<double>(judged));
  std::vector<Partial> parts(static_cast<size_t>(chunks));
#pragma omp parallel for schedule(static) if (n > kParallelFrom)
  for (int64_t c = 0; c < chunks; ++c) {
    Partial& p = parts[static_cast<size_t>(c)];
    double got[kChunk];
    const int64_t lo = c * kChunk, count = std::min(kChunk, n - lo);
    if (replaced != nullptr)
      std::copy_n(replaced->data() + lo, count, got);
    else
      t.read(lo, count, got);
    for (int64_t i = 0; i < count; ++i) {
      if (!judges(lo + i)) continue;
      const double w = want[lo + i];
      const double err = difference(got[i], w);
      const double bound = tol.abs_rms * rms + tol.rel * std::fabs(w) + tol.abs;
      const double quotient = bound > 0 ? err / bound : kInf;
      const double ratio = err == 0 ? 0 : (quotient >= 0 ? quotient : kInf);  // NaN: inf over inf
      p.err2 += err * err;
      p.max_abs = std::max(p.max_abs, err);
      if (std::fabs(w) >= rms * 1e-3 && w != 0) p.max_rel = std::max(p.max_rel, err / std::fabs(w));
      if (p.worst_at < 0 || ratio > p.worst) p.worst = ratio, p.worst_at = lo + i;
    }
  }
  Partial all;
  for (const Partial& p : parts) {
    all.err2 += p.err2;
    all.max_abs = std::max(all.max_abs, p.max_abs);
    all.max_rel = std::max(all.max_rel, p.max_rel);
    if (p.worst_at >= 0 && (all.worst_at < 0 || p.worst > all.worst))
      all.worst = p.worst, all.worst_at = p.worst_at;
  }
  v.max_abs_err = all.max_abs;
  v.max_rel_err = all.max_rel;
  const double err_norm = std::sqrt(all.err2);
  v.rel_fro_err = err_norm == 0 ? 0 : (sum2 > 0 ? err_norm / std::sqrt(sum2) : kInf);
  const double norm_ratio =
      v.rel_fro_err == 0 ? 0 : (tol.rel_fro > 0 ? v.rel_fro_err / tol.rel_fro : kInf);
  v.err_over_bound = std::max(all.worst, norm_ratio);
  v.worst_index = place(e, all.worst_at);
  if (!(all.worst <= 1)) {
    double got = 0;
    if (replaced != nullptr)
      got = (*replaced)[static_cast<size_t>(all.worst_at)];
    else
      t.read(all.worst_at, 1, &got);
    v.passed = false;
    v.reason = v.worst_index + ": expected " + number(want[all.worst_at]) + ", found " +
               number(got) +
               (all.worst == kInf ? "" : ", " + number(all.worst) + " times the bound");
    if (std::isnan(want[all.worst_at])) v.reason = v.worst_index + ": the reference itself is NaN";
  } else if (!(norm_ratio <= 1)) {
    v.passed = false;
    v.reason = e.name + ": relative Frobenius error " + number(v.rel_fro_err) + ", bound " +
               number(tol.rel_fro);
  }
  return v;
}

// Routes as sets. `flipped` tells rows that differ within the allowed gap; `got` keeps the indices
// for `follow`.
Verdict judge_routes(const ExpectedTensor& e, const HostTensor& t, std::vector<bool>& flipped,
                     std::vector<double>& got) {
  const int64_t k = e.route_k, n = static_cast<int64_t>(e.values.size()), rows = n / k;
  Verdict v;
  v.passed = true;
  got.resize(e.values.size());
  t.read(0, n, got.data());
  flipped.assign(static_cast<size_t>(rows), false);
  if (n % k != 0 || static_cast<int64_t>(e.route_gap.size()) != rows)
    return failure(e.name + ": the reference gives no score gap for every row");
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<double> a(got.begin() + r * k, got.begin() + (r + 1) * k);
    std::vector<double> b(e.values.begin() + r * k, e.values.begin() + (r + 1) * k);
    std::sort(a.begin(), a.end());
    std::sort(b.begin(), b.end());
    if (a == b) continue;
    const bool distinct = std::adjacent_find(a.begin(), a.end()) == a.end() && a.front() >= 0;
    const double gap = e.route_gap[static_cast<size_t>(r)];
    // A near-tie can exchange one expert, or one group with all its experts; somebody must stay or the row is no flip.
    std::vector<double> common;
    std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(common));
    if (distinct && (k == 1 || !common.empty()) && gap < e.route_gap_bound) {
      flipped[static_cast<size_t>(r)] = true;
      ++v.route_flips;
      continue;
    }
    if (v.passed) {
      v.passed = false;
      v.err_over_bound = kInf;
      v.worst_index = e.name + "[" + std::to_string(r) + ",:]";
      v.reason = v.worst_index + ": other routes than the reference, whose score gap " +
                 number(gap) + " is not below " + number(e.route_gap_bound);
      if (!distinct) v.reason = v.worst_index + ": routes are not distinct and valid";
    }
  }
  if (v.route_flips > 0)
    v.note = e.name + ": " + std::to_string(rows - v.route_flips) + " of " + std::to_string(rows) +
             " rows judged, the others flipped within the gap";
  if (v.passed && 2 * v.route_flips > rows) {  // too little is left to prove anything
    v.passed = false;
    v.err_over_bound = kInf;
    v.worst_index = e.name;
    v.reason = "fewer than half can be judged: " + v.note;
  }
  return v;
}

const HostTensor* find(const std::vector<HostTensor*>& tensors, const std::string& name) {
  for (const HostTensor* t : tensors)
    if (t->name() == name) return t;
  return nullptr;
}

// What a follower is judged by when routes flipped or came in another order: rows that flipped are
// not judged, and a [rows, K] follower is put into the reference's order of experts.
struct Followed {
  const ExpectedTensor* routes = nullptr;
  std::vector<bool> flipped;
  std::vector<double> got_index;
};

Verdict judge_follower(const ExpectedTensor& e, const Followed& f, const HostTensor& t,
                       const Tolerance& tol) {
  const int64_t rows = static_cast<int64_t>(f.flipped.size()),
                n = static_cast<int64_t>(e.values.size());
  if (rows == 0 || n % rows != 0)
    return failure(e.name + ": follows routes with another number of rows");
  const int64_t width = n / rows, k = f.routes->route_k;
  std::vector<double> got(e.values.size());
  std::vector<uint8_t> skip = e.skip;
  skip.resize(e.values.size(), 0);
  t.read(0, n, got.data());
  std::vector<double> ordered = got;
  for (int64_t r = 0; r < rows; ++r) {
    if (f.flipped[static_cast<size_t>(r)]) {
      std::fill_n(skip.begin() + r * width, width, uint8_t{1});
    } else if (width == k) {
      for (int64_t j = 0; j < k; ++j)
        for (int64_t i = 0; i < k; ++i)
          if (f.got_index[static_cast<size_t>(r * k + i)] ==
              f.routes->values[static_cast<size_t>(r * k + j)])
            ordered[static_cast<size_t>(r * k + j)] = got[static_cast<size_t>(r * k + i)];
    }
  }
  return judge_values(e, skip, &ordered, t, tol);
}

}  // namespace

void Verdict::merge(const Verdict& o) {
  max_abs_err = std::max(max_abs_err, o.max_abs_err);
  max_rel_err = std::max(max_rel_err, o.max_rel_err);
  rel_fro_err = std::max(rel_fro_err, o.rel_fro_err);
  if (worst_index.empty() || o.err_over_bound > err_over_bound) worst_index = o.worst_index;
  err_over_bound = std::max(err_over_bound, o.err_over_bound);
  route_flips += o.route_flips;
  if (reason.empty()) reason = o.reason;
  if (note.find(o.note) == std::string::npos) note += (note.empty() ? "" : "; ") + o.note;
  passed = passed && o.passed;
}

Verdict judge(const Expected& expected, const std::vector<HostTensor*>& tensors,
              const ToleranceOf& tolerance) {
  Verdict all;
  all.passed = true;
  std::map<std::string, Followed> followed;  // output -> the routes it follows
  std::set<std::string> seen;
  for (const auto& e : expected.tensors) {
    seen.insert(e.name);
    const HostTensor* t = find(tensors, e.name);
    if (t == nullptr) return failure("the reference names an unknown output '" + e.name + "'");
    if (t->numel() != static_cast<int64_t>(e.values.size()))
      return failure(e.name + ": the reference has " + std::to_string(e.values.size()) +
                     " elements, the output " + std::to_string(t->numel()));
    if (e.route_k <= 0) continue;
    Followed f;
    f.routes = &e;
    all.merge(judge_routes(e, *t, f.flipped, f.got_index));
    for (const auto& name : e.follow) followed[name] = f;
  }
  for (const HostTensor* t : tensors)
    if (t->role() == Role::output && t->numel() > 0 && seen.count(t->name()) == 0)
      return failure("output '" + t->name() + "' has no expected values");
  if (seen.empty()) return failure("the reference judges no output");
  for (const auto& e : expected.tensors) {
    if (e.route_k > 0) continue;
    const HostTensor& t = *find(tensors, e.name);
    const auto f = followed.find(e.name);
    all.merge(f == followed.end() ? judge_values(e, e.skip, nullptr, t, tolerance(e.name))
                                  : judge_follower(e, f->second, t, tolerance(e.name)));
  }
  return all;
}

}  // namespace v3b::bench
