#include "bench/harness/flags_text.h"

#include "bench/harness/shape_io.h"
#include "model/error.h"

namespace v3b::bench {

namespace {

// fn(name, member, does a forward pass read it)
template <class F, class Fn>
void visit_flags(F& f, Fn&& fn) {
  fn("rope_layout", f.rope_layout, true);
  fn("yarn_when", f.yarn_when, true);
  fn("yarn_ramp", f.yarn_ramp, true);
  fn("norm_rounding", f.norm_rounding, true);
  fn("router_mask", f.router_mask, true);
  fn("router_dtype", f.router_dtype, true);
  fn("gate_eps", f.gate_eps, true);
  fn("moe_accum", f.moe_accum, true);
  fn("kv_format", f.kv_format, true);
  fn("act_scale", f.act_scale, false);
  fn("mtp_hidden", f.mtp_hidden, true);
  fn("mtp_concat", f.mtp_concat, true);
  fn("mtp_zero_pos0", f.mtp_zero_pos0, true);
  fn("balance_f", f.balance_f, false);
  fn("drop_policy", f.drop_policy, false);
  fn("ppl", f.ppl, false);
  fn("empty_lse", f.empty_lse, true);
  fn("ignore_selection_bias", f.ignore_selection_bias, true);
  fn("ignore_group_limit", f.ignore_group_limit, true);
}

template <class T>
std::string values_of(const T&) {
  if constexpr (std::is_same_v<T, bool>) {
    return "0 1";
  } else {
    std::string s;
    for (const auto& [value, text] : EnumText<T>::table())
      s += (s.empty() ? "" : " ") + std::string(text);
    return s;
  }
}

void set_flag(spec::Flags& f, std::string_view item, const std::string& where) {
  const auto eq = item.find('=');
  const std::string key(item.substr(0, eq));
  const std::string value(eq == std::string_view::npos ? std::string_view{} : item.substr(eq + 1));
  bool known = false;
  std::string names;
  const spec::Flags defaults;
  spec::Flags next = f;
  visit_flags(next, [&](const char* name, auto& v, bool read) {
    names += (names.empty() ? "" : " ") + std::string(name);
    if (key != name) return;
    known = true;
    if (!field_from_text(value, v))
      throw Error(ExitCode::usage, "bad value for flag '" + key + "'", where,
                  "one of: " + values_of(v), "'" + value + "'");
    if (read) return;
    visit_flags(defaults, [&](const char* other, const auto& d, bool) {
      if (key == other && field_to_text(d) != field_to_text(v))
        throw Error(ExitCode::usage, "no forward pass reads flag '" + key + "'", where,
                    field_to_text(d), "'" + value + "'");
    });
  });
  if (!known)
    throw Error(ExitCode::usage, "unknown flag '" + key + "'", where, "one of: " + names,
                "'" + std::string(item) + "'");
  f = next;
}

}  // namespace

spec::Flags parse_forward_flags(std::string_view text, const std::string& where) {
  spec::Flags f;
  while (!text.empty()) {
    const auto comma = text.find(',');
    const std::string_view item = text.substr(0, comma);
    text = comma == std::string_view::npos ? std::string_view{} : text.substr(comma + 1);
    if (!item.empty()) set_flag(f, item, where);
  }
  return f;
}

std::string changed_flags_text(const spec::Flags& f) {
  std::string out;
  const spec::Flags defaults;
  visit_flags(f, [&](const char* name, const auto& v, bool) {
    visit_flags(defaults, [&](const char* other, const auto& d, bool) {
      if (std::string_view(name) != other || field_to_text(d) == field_to_text(v)) return;
      out += (out.empty() ? "" : ",") + std::string(name) + "=" + field_to_text(v);
    });
  });
  return out;
}

}  // namespace v3b::bench
