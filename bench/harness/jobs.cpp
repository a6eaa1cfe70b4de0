#include "bench/harness/jobs.h"

#include <algorithm>
#include <charconv>
#include <regex>

#include "kernels/core/cuda.h"
#include "model/error.h"

namespace v3b::bench {
namespace {

constexpr size_t kMaxExpanded = 100000;

int64_t parse_int(std::string_view s, const std::string& where) {
  int64_t v = 0;
  const auto r = std::from_chars(s.data(), s.data() + s.size(), v);
  if (r.ec != std::errc() || r.ptr != s.data() + s.size())
    throw Error(ExitCode::usage, "bad number", where, "an integer or a range a:b:*2 or a:b:+4",
                "'" + std::string(s) + "'");
  return v;
}

std::vector<std::string> split(const std::string& text, char sep) {
  std::vector<std::string> parts;
  size_t lo = 0;
  while (true) {
    const size_t hi = text.find(sep, lo);
    parts.push_back(text.substr(lo, hi == std::string::npos ? hi : hi - lo));
    if (hi == std::string::npos) return parts;
    lo = hi + 1;
  }
}

std::vector<int64_t> parse_range(const std::string& text, const std::string& where) {
  const auto parts = split(text, ':');
  if (parts.size() == 1) return {parse_int(text, where)};
  if (parts.size() > 3)
    throw Error(ExitCode::usage, "bad range", where, "a:b:step", "'" + text + "'");
  const int64_t lo = parse_int(parts[0], where), hi = parse_int(parts[1], where);
  std::string step = parts.size() == 3 ? parts[2] : "1";
  const bool times = !step.empty() && step[0] == '*';
  if (!step.empty() && (step[0] == '*' || step[0] == '+')) step.erase(0, 1);
  const int64_t by = parse_int(step, where);
  if (lo > hi || by < (times ? 2 : 1) || (times && lo <= 0))
    throw Error(ExitCode::usage, "empty or endless range", where, "a <= b and a growing step",
                "'" + text + "'");
  std::vector<int64_t> out;
  for (int64_t v = lo; v <= hi; v = times ? v * by : v + by) {
    out.push_back(v);
    if (out.size() > kMaxExpanded)
      throw Error(ExitCode::usage, "too long a range", where, "", "'" + text + "'");
    if (times ? v > hi / by : v > hi - by) break;  // also keeps the step from overflowing
  }
  return out;
}

std::string joined_names(const Ops& ops) {
  std::string s;
  for (const auto& op : ops) s += (s.empty() ? "" : " ") + op->name();
  return s;
}

bool contains(const std::vector<std::string>& v, const std::string& s) {
  return std::find(v.begin(), v.end(), s) != v.end();
}

std::vector<const OpBase*> chosen_ops(const Ops& ops, const Selection& sel) {
  std::vector<const OpBase*> out;
  for (const auto& name : sel.ops) {
    const auto it =
        std::find_if(ops.begin(), ops.end(), [&](const auto& op) { return op->name() == name; });
    if (it == ops.end())
      throw Error(ExitCode::usage, "unknown op", "--op", "one of: " + joined_names(ops),
                  "'" + name + "'");
    out.push_back(it->get());
  }
  if (sel.ops.empty())
    for (const auto& op : ops) out.push_back(op.get());
  return out;
}

void check_impls(const std::vector<const OpBase*>& ops, const Selection& sel) {
  for (const auto& wanted : sel.impls) {
    bool known = false;
    std::string names;
    for (const OpBase* op : ops)
      for (const auto& how : op->impls()) {
        known = known || wanted == how || wanted == impl_name(*op, how);
        if (ops.size() == 1) names += (names.empty() ? "" : " ") + how;
      }
    if (!known)
      throw Error(ExitCode::usage, "unknown implementation", "--impl",
                  names.empty() ? "a name that 'v3bench list' shows" : "one of: " + names,
                  "'" + wanted + "'");
  }
}

}  // namespace

std::string impl_name(const OpBase& op, const std::string& how) { return op.name() + "." + how; }
std::string job_name(const OpBase& op, const std::string& how, const CaseInfo& info) {
  return impl_name(op, how) + "/" + info.text;
}
std::string device_of(const std::string& how) { return how.rfind("cuda", 0) == 0 ? "cuda" : "cpu"; }
std::string device_column(const std::string& how) {
  if (device_of(how) == "cpu") return "cpu";
  const kern::CudaDevice& d = kern::cuda_device();
  return d.mode == kern::CudaMode::device     ? d.name
         : d.mode == kern::CudaMode::emulated ? "cuda_emulated"
                                              : "cuda";
}
const char* size_name(Size s) {
  return s == Size::quick ? "quick" : s == Size::standard ? "standard" : "full";
}
const char* cache_name(CacheState c) { return c == CacheState::hot ? "hot" : "cold"; }

std::vector<int64_t> parse_int_list(const std::string& text, const std::string& where) {
  std::vector<int64_t> out;
  for (const auto& part : split(text, ',')) {
    const auto more = parse_range(part, where);
    out.insert(out.end(), more.begin(), more.end());
  }
  return out;
}

std::vector<std::string> expand_case(const std::string& text) {
  std::vector<std::string> out = {""};
  for (const auto& item : split(text, ',')) {
    if (item.empty()) continue;
    const size_t eq = item.find('=');
    const std::string key = item.substr(0, eq),
                      value = eq == std::string::npos ? "" : item.substr(eq + 1);
    std::vector<std::string> values = {value};
    if (value.find(':') != std::string::npos) {
      values.clear();
      for (int64_t v : parse_range(value, "--case, key '" + key + "'"))
        values.push_back(std::to_string(v));
    }
    std::vector<std::string> next;
    for (const auto& prefix : out)
      for (const auto& v : values)
        next.push_back(prefix + (prefix.empty() ? "" : ",") + key + "=" + v);
    if (next.size() > kMaxExpanded)
      throw Error(ExitCode::usage, "too many cases", "--case", "", "'" + text + "'");
    out = std::move(next);
  }
  return out;
}

std::vector<JobGroup> select_jobs(const Ops& ops, const Selection& sel) {
  const auto chosen = chosen_ops(ops, sel);
  check_impls(chosen, sel);
  if (!sel.cases.empty() && sel.ops.size() != 1)
    throw Error(ExitCode::usage, "a case belongs to one op", "--case", "--op NAME beside it");
  std::regex filter;
  try {
    filter = std::regex(sel.filter, std::regex::ECMAScript);
  } catch (const std::regex_error& e) {
    throw Error(ExitCode::usage, "bad regular expression", "--filter", "",
                "'" + sel.filter + "' (" + e.what() + ")");
  }
  std::vector<JobGroup> groups;
  for (const OpBase* op : chosen) {
    std::vector<CaseInfo> cases;
    if (!sel.cases.empty()) {
      for (const auto& c : sel.cases)
        for (const auto& one : expand_case(c)) cases.push_back(op->parse_case(one));
    } else {
      for (const auto& c : op->cases())
        if (c.size <= sel.size && (sel.check_only_cases || !c.check_only)) cases.push_back(c);
    }
    for (auto& info : cases) {
      if (!sel.cache.empty()) info.cache = sel.cache == "hot" ? CacheState::hot : CacheState::cold;
      JobGroup g{op, info, {}};
      for (const auto& how : op->impls()) {
        if (!sel.device.empty() && device_of(how) != sel.device) continue;
        if (!sel.impls.empty() && !contains(sel.impls, how) &&
            !contains(sel.impls, impl_name(*op, how)))
          continue;
        if (!sel.filter.empty() && !std::regex_search(job_name(*op, how, info), filter)) continue;
        g.hows.push_back(how);
      }
      if (!g.hows.empty()) groups.push_back(std::move(g));
    }
  }
  return groups;
}

}  // namespace v3b::bench
