// name -> view table to typed ModelWeights: SPEC 2.3 rules 3 (bias values), 4 (tied head), 6 and 7.
#include "model/weights_bind.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>

#include "model/error.h"
#include "model/weights.h"
#include "model/weights_walk.h"

namespace v3b::model {

namespace {

using spec::DType;

std::string shape_text(const std::vector<int64_t>& s) {
  std::string t = "[";
  for (size_t i = 0; i < s.size(); ++i) t += (i ? "," : "") + std::to_string(s[i]);
  return t + "]";
}

float load_f32(const void* p, int64_t i) {
  float v;
  std::memcpy(&v, static_cast<const char*>(p) + 4 * i, 4);
  return v;
}

struct ScaleStorage {  // copies made because the file holds them unaligned or in another dtype
  std::vector<std::unique_ptr<float[]>> blocks;
};

class Binder {
 public:
  Binder(const ModelConfig& c, const std::map<std::string, TensorView>& table, const LoadOptions& o,
         FileOf file_of)
      : c_(c),
        table_(table),
        o_(o),
        file_of_(std::move(file_of)),
        copies_(std::make_shared<ScaleStorage>()) {}

  ModelWeights bind() {
    ModelWeights w;
    w.config = c_;
    walk_weights(w, c_, o_.load_mtp,
                 [this](TensorView& slot, const std::string& name, const Shape& shape, Role role) {
                   take(slot, name, shape, role);
                 });
    tie_head(w);
    share_mtp(w);
    if (fp8_seen_ && !c_.fp8) warn("FP8 tensors although config.json has no quantization_config");
    if (c_.fp8 && !fp8_seen_) warn("config.json has a quantization_config but no tensor is FP8");
    check_leftovers();
    w.warnings = std::move(warnings_);
    w.storage = copies_;
    return w;
  }

 private:
  std::string place(const std::string& name) const {
    return file_of_(name) + ", tensor \"" + name + "\"";
  }
  [[noreturn]] void fail(const std::string& what, const std::string& name,
                         const std::string& expected, const std::string& found) const {
    throw Error(ExitCode::bad_input, what, place(name), expected, found);
  }
  void warn(const std::string& text) {
    if (warnings_.size() < 20)
      warnings_.push_back(file_of_("") + ": " + text);
    else if (warnings_.size() == 20)
      warnings_.push_back(file_of_("") + ": more warnings left out");
  }

  void take(TensorView& slot, const std::string& name, const Shape& shape, Role role) {
    const auto it = table_.find(name);
    if (it == table_.end()) {
      if (role == Role::mtp_embed || role == Role::mtp_head) return;
      if (role == Role::head && c_.tie_word_embeddings) return;
      fail("missing tensor", name, shape_text(shape), "none");
    }
    used_.insert(name);
    slot = it->second;
    slot.name = name;
    slot.scale_inv = nullptr;
    if (slot.shape.size() != shape.size())
      fail("wrong rank", name, shape_text(shape), shape_text(slot.shape));
    if (slot.shape != shape) fail("wrong shape", name, shape_text(shape), shape_text(slot.shape));
    const bool may_be_fp8 = role == Role::quantisable;
    const DType t = slot.dtype;
    const bool is_float = t == DType::f32 || t == DType::bf16 || t == DType::f16;
    if (!is_float && !(may_be_fp8 && t == DType::f8e4m3))
      fail("wrong dtype", name, may_be_fp8 ? "f32, bf16, f16 or f8e4m3" : "f32, bf16 or f16",
           spec::dtype_name(t));
    if (t == DType::f8e4m3) take_fp8(slot, name, it->second);
    if (role == Role::bias) take_bias(slot, name);
  }

  void take_fp8(TensorView& slot, const std::string& name, const TensorView& original) {
    fp8_seen_ = true;
    const std::string scale_name = name + "_scale_inv";
    const Shape want{(slot.rows() + 127) / 128, (slot.cols() + 127) / 128};
    const auto it = table_.find(scale_name);
    const void* data = nullptr;
    if (it != table_.end()) {
      used_.insert(scale_name);
      const TensorView& s = it->second;
      if (s.dtype != DType::f32) fail("wrong dtype", scale_name, "f32", spec::dtype_name(s.dtype));
      if (s.shape != want)
        fail("wrong scale shape", scale_name, shape_text(want), shape_text(s.shape));
      data = s.data;
    } else if (original
                   .scale_inv) {  // table made in memory (training, tests): scales already attached
      data = original.scale_inv;
    } else {
      fail("FP8 without scale", name, "\"" + scale_name + "\" f32 " + shape_text(want), "none");
    }
    const int64_t n = want[0] * want[1];
    if (o_.scan_payload) {
      for (int64_t i = 0; i < n; ++i)
        if (const float v = load_f32(data, i); !(v > 0) || !std::isfinite(v))
          fail("bad scale",
               scale_name + "[" + std::to_string(i / want[1]) + "," + std::to_string(i % want[1]) +
                   "]",
               "a finite number > 0", std::to_string(v));
      scan_codes(slot, name);
    }
    if (reinterpret_cast<uintptr_t>(data) % alignof(float) != 0) data = copy_floats(data, n);
    slot.scale_inv = static_cast<const float*>(data);
  }

  const float* copy_floats(const void* data, int64_t n) {
    auto& block = copies_->blocks.emplace_back(new float[static_cast<size_t>(n)]);
    std::memcpy(block.get(), data, static_cast<size_t>(n) * 4);
    return block.get();
  }

  void scan_codes(const TensorView& t, const std::string& name) const {
    const auto* p = static_cast<const uint8_t*>(t.data);
    const int64_t n = t.numel();
    int64_t bad = 0;
    for (int64_t i = 0; i < n; ++i) bad += (p[i] & 0x7f) == 0x7f;
    if (bad == 0) return;
    int64_t i = 0;
    while ((p[i] & 0x7f) != 0x7f) ++i;
    fail("NaN code",
         name + "[" + std::to_string(i / t.cols()) + "," + std::to_string(i % t.cols()) + "]",
         "E4M3 codes other than 0x7F and 0xFF", std::to_string(bad) + " of " + std::to_string(n));
  }

  // The bias is always handed on as aligned float32 (SPEC 2.1: F32, accept BF16).
  void take_bias(TensorView& slot, const std::string& name) {
    const std::vector<float> values = to_float_vector(slot);
    if (o_.scan_payload)
      for (size_t i = 0; i < values.size(); ++i)
        if (!std::isfinite(values[i]))
          fail("bad bias", name + "[" + std::to_string(i) + "]", "a finite number",
               std::to_string(values[i]));
    if (slot.dtype == DType::f32 && reinterpret_cast<uintptr_t>(slot.data) % alignof(float) == 0)
      return;
    slot.data = copy_floats(values.data(), static_cast<int64_t>(values.size()));
    slot.dtype = DType::f32;
  }

  static bool same_values(const TensorView& a, const TensorView& b) {
    if (a.data == b.data && a.dtype == b.dtype) return true;
    if (a.dtype == b.dtype)
      return std::memcmp(a.data, b.data,
                         static_cast<size_t>(a.numel() * spec::dtype_bytes(a.dtype))) == 0;
    return to_float_vector(a) == to_float_vector(b);
  }

  void tie_head(ModelWeights& w) const {
    if (!c_.tie_word_embeddings) return;
    if (w.lm_head.present()) {
      if (!same_values(w.lm_head, w.embed_tokens))
        fail("tie_word_embeddings is true but lm_head differs", "lm_head.weight",
             "the values of model.embed_tokens", "others");
      return;
    }
    w.lm_head = w.embed_tokens;
  }

  void share_mtp(ModelWeights& w) {
    auto settle = [this](TensorView& own, const TensorView& main, const std::string& name) {
      if (!own.present())
        own = main;
      else if (o_.scan_payload && !same_values(own, main))
        warn("tensor \"" + name + "\" differs from the main model's \"" + main.name +
             "\"; the MTP layer uses its own");
    };
    for (MtpWeights& t : w.mtp) {
      settle(t.embed_tokens, w.embed_tokens, t.embed_tokens.name);
      settle(t.shared_head_head, w.lm_head, t.shared_head_head.name);
    }
  }

  // "model.layers.L.mlp.experts.E.": both numbers, or -1 where the pattern does not hold.
  static bool digits(const std::string& s) {
    return !s.empty() && s.size() < 10 &&
           std::all_of(s.begin(), s.end(), [](char ch) { return ch >= '0' && ch <= '9'; });
  }
  void check_expert_id(const std::string& name) const {
    static const std::string mark = ".mlp.experts.";
    const size_t at = name.find(mark);
    if (at == std::string::npos) return;
    const size_t from = at + mark.size(), to = name.find('.', from);
    const std::string id = name.substr(from, to == std::string::npos ? to : to - from);
    const std::string range = "expert ids 0 to " + std::to_string(c_.n_routed_experts - 1);
    if (!digits(id) || std::stoll(id) >= c_.n_routed_experts)
      fail("expert id out of range", name, range, id);
    if (id != std::to_string(std::stoll(id)))
      fail("duplicate expert id", name, range + " without leading zeros", id);
  }
  int64_t layer_of(const std::string& name) const {
    static const std::string mark = "model.layers.";
    if (name.rfind(mark, 0) != 0) return -1;
    const std::string id = name.substr(mark.size(), name.find('.', mark.size()) - mark.size());
    return digits(id) ? std::stoll(id) : -1;
  }

  void check_leftovers() {
    for (const auto& [name, view] : table_) {
      if (used_.count(name) || name.ends_with("rotary_emb.inv_freq")) continue;
      if (!o_.load_mtp && layer_of(name) >= c_.num_hidden_layers) continue;
      check_expert_id(name);
      if (static const std::string tail = "_scale_inv"; name.ends_with(tail)) {
        const std::string owner = name.substr(0, name.size() - tail.size());
        const auto it = table_.find(owner);
        if (it == table_.end())
          fail("scale without FP8", name, "an FP8 tensor \"" + owner + "\"", "none");
        if (it->second.dtype != DType::f8e4m3)
          fail("scale without FP8", name, "\"" + owner + "\" as f8e4m3",
               spec::dtype_name(it->second.dtype));
      }
      warn("tensor \"" + name + "\" is not used");
    }
  }

  const ModelConfig& c_;
  const std::map<std::string, TensorView>& table_;
  const LoadOptions& o_;
  FileOf file_of_;
  std::shared_ptr<ScaleStorage> copies_;
  std::set<std::string> used_;
  std::vector<std::string> warnings_;
  bool fp8_seen_ = false;
};

}  // namespace

ModelWeights bind_weights_from(const ModelConfig& config,
                               const std::map<std::string, TensorView>& table,
                               const LoadOptions& options, FileOf file_of) {
  return Binder(config, table, options, std::move(file_of)).bind();
}

ModelWeights bind_weights(const ModelConfig& config, const std::map<std::string, TensorView>& table,
                          const LoadOptions& options, const std::string& where) {
  return bind_weights_from(config, table, options, [where](const std::string&) { return where; });
}

}  // namespace v3b::model
