// Shared by test_safetensors, test_weights and test_weights_reject: temporary folders, expected
// errors and a checkpoint that can be edited before it is saved.
#pragma once
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>

#include "model/error.h"
#include "model/rng.h"
#include "model/weights.h"

using namespace v3b;
using namespace v3b::model;
using nlohmann::json;
using spec::DType;
namespace fs = std::filesystem;

namespace checkpoint_testing {

struct Outcome {
  ExitCode code = ExitCode::ok;
  std::string message;
};
inline Outcome attempt(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    return {e.code(), e.what()};
  }
  return {};
}
inline void expect_error(const Outcome& o, ExitCode code, const std::vector<std::string>& parts) {
  EXPECT_EQ(o.code, code) << o.message;
  EXPECT_NE(o.message.find("expected "), std::string::npos) << o.message;
  EXPECT_NE(o.message.find("found "), std::string::npos) << o.message;
  EXPECT_EQ(o.message.find('\n'), std::string::npos) << o.message;
  for (const std::string& p : parts)
    EXPECT_NE(o.message.find(p), std::string::npos) << p << " | " << o.message;
}

struct Folder : testing::Test {
  void SetUp() override {
    char name[] = "/tmp/v3b_safetensors_XXXXXX";
    ASSERT_NE(::mkdtemp(name), nullptr);
    dir = name;
  }
  void TearDown() override { fs::remove_all(dir); }
  std::string file(const std::string& name = "t.safetensors") const { return dir + "/" + name; }
  void write(const std::string& name, const std::string& bytes) const {
    std::ofstream(file(name), std::ios::binary) << bytes;
  }
  std::string dir;
};

inline std::string u64(uint64_t n) {
  std::string s;
  for (int i = 0; i < 8; ++i) s += static_cast<char>(n >> (8 * i));
  return s;
}
inline std::string container(const std::string& header, size_t payload) {
  return u64(header.size()) + header + std::string(payload, '\0');
}

inline OwnedTensor tensor(const std::string& name, DType dtype, std::vector<int64_t> shape,
                          uint64_t seed = 1) {
  OwnedTensor t{name, dtype, std::move(shape), {}};
  int64_t n = spec::dtype_bytes(dtype);
  for (const int64_t s : t.shape) n *= s;
  for (int64_t i = 0; i < n; ++i)
    t.bytes.push_back(static_cast<std::byte>(
        rng_u64({seed, rng_stream(name.c_str())}, static_cast<uint64_t>(i))));
  return t;
}

// A writable checkpoint in memory: edit, save, load.
struct Checkpoint {
  ModelConfig config;
  std::map<std::string, OwnedTensor> tensors;

  explicit Checkpoint(DType dtype, const std::string& preset = "micro", bool copies = true) {
    const WeightsPtr w = random_weights(load_preset(preset), 5, dtype);
    config = w->config;
    for (const auto& [name, v] : named_tensors(*w)) add(name, v);
    if (copies)
      for (const MtpWeights& m : w->mtp) {
        add("model.layers.2.embed_tokens.weight", m.embed_tokens);
        add("model.layers.2.shared_head.head.weight", m.shared_head_head);
      }
  }
  void add(const std::string& name, const TensorView& v) {
    OwnedTensor t{name, v.dtype, v.shape, {}};
    t.bytes.resize(static_cast<size_t>(v.numel() * spec::dtype_bytes(v.dtype)));
    std::memcpy(t.bytes.data(), v.data, t.bytes.size());
    tensors[name] = std::move(t);
  }
  OwnedTensor& at(const std::string& name) { return tensors.at(name); }
  std::vector<OwnedTensor> list() const {
    std::vector<OwnedTensor> out;
    for (const auto& [name, t] : tensors) out.push_back(t);
    return out;
  }
  void save(const std::string& dir) const {
    std::ofstream(dir + "/config.json") << config_to_json(config);
    save_safetensors(dir + "/model.safetensors", list());
  }
  void save_sharded(const std::string& dir, size_t shards) const {
    std::ofstream(dir + "/config.json") << config_to_json(config);
    std::vector<std::vector<OwnedTensor>> parts(shards);
    json map = json::object();
    size_t i = 0;
    for (const auto& [name, t] : tensors) {
      map[name] = shard_name(i % shards);
      parts[i++ % shards].push_back(t);
    }
    for (size_t s = 0; s < shards; ++s) save_safetensors(dir + "/" + shard_name(s), parts[s]);
    std::ofstream(dir + "/model.safetensors.index.json") << json{{"weight_map", map}}.dump();
  }
  static std::string shard_name(size_t s) { return "part-" + std::to_string(s) + ".safetensors"; }
};

inline void expect_same(const ModelWeights& a, const ModelWeights& b) {
  const auto x = named_tensors(a), y = named_tensors(b);
  ASSERT_EQ(x.size(), y.size());
  for (size_t i = 0; i < x.size(); ++i) {
    ASSERT_EQ(x[i].first, y[i].first);
    ASSERT_EQ(x[i].second.shape, y[i].second.shape);
    ASSERT_EQ(x[i].second.dtype, y[i].second.dtype);
    const auto n = static_cast<size_t>(x[i].second.numel() * spec::dtype_bytes(x[i].second.dtype));
    ASSERT_EQ(std::memcmp(x[i].second.data, y[i].second.data, n), 0) << x[i].first;
  }
}

}  // namespace checkpoint_testing
