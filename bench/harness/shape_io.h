// Shapes to and from text: "T=512,d=7168,dtype=bf16,kv_format=fp8_656_pow2".
#pragma once
#include <algorithm>
#include <charconv>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "model/error.h"
#include "reference/spec/dtype.h"
#include "reference/spec/flags.h"
#include "reference/spec/forward.h"

namespace v3b::bench {

// Text forms of enums used in shapes: specialise `table()` for each.
template <class E>
struct EnumText;
#define V3B_ENUM_TEXT(E, ...)                                                \
  template <>                                                                \
  struct EnumText<E> {                                                       \
    static const std::vector<std::pair<E, const char*>>& table() {           \
      using enum E;                                                          \
      static const std::vector<std::pair<E, const char*>> t = {__VA_ARGS__}; \
      return t;                                                              \
    }                                                                        \
  };
V3B_ENUM_TEXT(spec::DType, {f64, "f64"}, {f32, "f32"}, {bf16, "bf16"}, {f16, "f16"},
              {f8e4m3, "f8e4m3"}, {i64, "i64"}, {i32, "i32"}, {u8, "u8"})
V3B_ENUM_TEXT(spec::RopeLayout, {interleaved, "interleaved"}, {hf_halfsplit, "hf_halfsplit"})
V3B_ENUM_TEXT(spec::YarnWhen, {always, "always"}, {only_if_ctx_gt_orig, "only_if_ctx_gt_orig"})
V3B_ENUM_TEXT(spec::YarnRamp, {index, "index"}, {paper, "paper"})
V3B_ENUM_TEXT(spec::PplDef, {token_mean, "token_mean"}, {window_mean, "window_mean"})
V3B_ENUM_TEXT(spec::NormRounding, {single, "single"}, {hf, "hf"})
V3B_ENUM_TEXT(spec::RouterMask, {neg_inf, "neg_inf"}, {zero, "zero"})
V3B_ENUM_TEXT(spec::RouterDtype, {fp32, "fp32"}, {bf16, "bf16"})
V3B_ENUM_TEXT(spec::GateEps, {eps_1e20, "1e-20"}, {zero, "0"})
V3B_ENUM_TEXT(spec::MoeAccum, {fp32, "fp32"}, {bf16, "bf16"})
V3B_ENUM_TEXT(spec::KvFormat, {bf16, "bf16"}, {fp8_656_pow2, "fp8_656_pow2"},
              {fp8_656_free, "fp8_656_free"})
V3B_ENUM_TEXT(spec::ActScale, {fp32, "fp32"}, {ue8m0, "ue8m0"})
V3B_ENUM_TEXT(spec::MtpHidden, {post_norm, "post_norm"}, {pre_norm, "pre_norm"})
V3B_ENUM_TEXT(spec::MtpConcat, {emb_h, "emb_h"}, {h_emb, "h_emb"})
V3B_ENUM_TEXT(spec::BalanceF, {scores, "scores"}, {routing, "routing"})
V3B_ENUM_TEXT(spec::DropPolicy, {slot, "slot"}, {token, "token"}, {prob, "prob"})
V3B_ENUM_TEXT(spec::ForwardContext, {tokens, "tokens"}, {rows, "rows"})
V3B_ENUM_TEXT(spec::ForwardWeights, {steered, "steered"}, {tiny_v3, "tiny_v3"})
V3B_ENUM_TEXT(spec::EmptyLse, {pos_inf, "+inf"}, {neg_inf, "-inf"})

template <class T>
std::string field_to_text(const T& v) {
  if constexpr (std::is_same_v<T, bool>) {
    return v ? "1" : "0";
  } else if constexpr (std::is_enum_v<T>) {
    for (const auto& [e, text] : EnumText<T>::table())
      if (e == v) return text;
    return "?";
  } else {
    char buf[64];
    const auto r = std::to_chars(buf, buf + sizeof buf, v);
    return std::string(buf, r.ptr);
  }
}
template <class T>
bool field_from_text(std::string_view text, T& v) {
  if constexpr (std::is_same_v<T, bool>) {
    if (text == "1" || text == "true") return v = true, true;
    if (text == "0" || text == "false") return v = false, true;
    return false;
  } else if constexpr (std::is_enum_v<T>) {
    for (const auto& [e, name] : EnumText<T>::table())
      if (text == name) return v = e, true;
    return false;
  } else {
    const auto r = std::from_chars(text.data(), text.data() + text.size(), v);
    return r.ec == std::errc() && r.ptr == text.data() + text.size();
  }
}

template <class Shape>
std::string shape_to_text(const Shape& s) {
  std::string out;
  Shape::visit(s, [&](const char* key, const auto& v) {
    if (!out.empty()) out += ',';
    out += key;
    out += '=';
    out += field_to_text(v);
  });
  return out;
}

template <class Shape>
Shape shape_from_text(std::string_view text, const std::string& op) {
  Shape s;
  std::vector<std::string> given;
  while (!text.empty()) {
    const auto comma = text.find(',');
    const std::string_view item = text.substr(0, comma);
    text = comma == std::string_view::npos ? std::string_view{} : text.substr(comma + 1);
    if (item.empty()) continue;
    const auto eq = item.find('=');
    const std::string key(item.substr(0, eq));
    const std::string value(eq == std::string_view::npos ? std::string_view{}
                                                         : item.substr(eq + 1));
    bool known = false, good = false;
    std::string keys;
    Shape::visit(s, [&](const char* k, auto& v) {
      keys += (keys.empty() ? "" : " ") + std::string(k);
      if (key == k) known = true, good = field_from_text(value, v);
    });
    if (std::find(given.begin(), given.end(), key) != given.end())
      throw Error(ExitCode::usage, "key '" + key + "' is given twice", "--case of " + op);
    given.push_back(key);
    if (!known)
      throw Error(ExitCode::usage, "unknown key '" + key + "'", "--case of " + op,
                  "one of: " + keys);
    if (!good)
      throw Error(ExitCode::usage, "bad value for '" + key + "'", "--case of " + op, "",
                  "'" + value + "'");
  }
  return s;
}

}  // namespace v3b::bench
