#include "scenarios/training_state.h"

#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "model/error.h"
#include "model/weights.h"
#include "scenarios/training.h"

namespace v3b::scen {
namespace {

namespace fs = std::filesystem;
using model::OwnedTensor;

OwnedTensor f32_tensor(const std::string& name, std::vector<int64_t> shape, const float* p,
                       size_t n) {
  OwnedTensor t{name, spec::DType::f32, std::move(shape), {}};
  t.bytes.resize(n * 4);
  std::memcpy(t.bytes.data(), p, n * 4);
  return t;
}

std::string state_name(int64_t step) {
  std::ostringstream s;
  s << "state-";
  s.width(8);
  s.fill('0');
  s << step << ".safetensors";
  return s.str();
}

}  // namespace

void write_text_atomically(const std::string& path, const std::string& text) {
  const std::string tmp = path + ".tmp";
  {
    std::ofstream out(tmp, std::ios::binary);
    out << text;
    out.flush();
    if (!out) throw Error(ExitCode::cannot_write, "cannot write", tmp);
  }
  std::error_code ec;
  fs::rename(tmp, path, ec);
  if (ec) throw Error(ExitCode::cannot_write, "cannot rename to", path, "", ec.message());
}

void save_state(const std::string& dir, const std::string& fingerprint, const TrainState& s,
                kern::train::TrainStep& step) {
  const auto n = static_cast<size_t>(step.table().total);
  std::vector<float> w(n), bias;
  step.get_params(w);
  for (const auto& b : step.bias()) bias.insert(bias.end(), b.begin(), b.end());
  std::vector<OwnedTensor> tensors;
  const std::vector<int64_t> shape{step.table().total};
  tensors.push_back(f32_tensor("params", shape, w.data(), n));
  tensors.push_back(f32_tensor("moment1", shape, step.moment1().data(), n));
  tensors.push_back(f32_tensor("moment2", shape, step.moment2().data(), n));
  tensors.push_back(
      f32_tensor("bias", {static_cast<int64_t>(bias.size())}, bias.data(), bias.size()));
  const std::string name = state_name(s.step);
  model::save_safetensors(dir + "/" + name, tensors, {{"fingerprint", fingerprint}});
  const nlohmann::json j{{"state", name},          {"fingerprint", fingerprint},
                         {"step", s.step},         {"tokens", s.tokens},
                         {"position", s.position}, {"seconds", s.seconds}};
  write_text_atomically(dir + "/state.json", j.dump(1) + "\n");
  std::vector<std::string> old;
  for (const auto& e : fs::directory_iterator(dir)) {
    const std::string f = e.path().filename().string();
    if (f.starts_with("state-") && f.ends_with(".safetensors")) old.push_back(f);
  }
  std::sort(old.begin(), old.end());
  for (size_t i = 0; i + 2 < old.size(); ++i) fs::remove(dir + "/" + old[i]);
}

TrainState load_state(const std::string& dir, const std::string& fingerprint,
                      kern::train::TrainStep& step) {
  const std::string path = dir + "/state.json";
  std::ifstream in(path);
  if (!in) throw Error(ExitCode::not_found, "no training state to resume", path);
  TrainState s;
  std::string name;
  try {
    const nlohmann::json j = nlohmann::json::parse(in);
    s = {j.at("step"), j.at("tokens"), j.at("position"), j.at("seconds")};
    name = j.at("state");
    if (j.at("fingerprint") != fingerprint) {
      throw Error(ExitCode::bad_input, "state of another run", path, fingerprint,
                  j.at("fingerprint").get<std::string>());
    }
  } catch (const nlohmann::json::exception& e) {
    throw Error(ExitCode::bad_input, "not a training state", path, "", e.what());
  }
  const model::SafetensorsFile f = model::open_safetensors(dir + "/" + name);
  const auto read = [&](const char* key, size_t n, float* out) {
    const auto it = f.tensors.find(key);
    if (it == f.tensors.end() || it->second.dtype != spec::DType::f32 ||
        it->second.numel() != static_cast<int64_t>(n)) {
      throw Error(ExitCode::bad_input, std::string("tensor ") + key, dir + "/" + name,
                  std::to_string(n) + " f32 values");
    }
    std::memcpy(out, it->second.data, n * 4);
  };
  const auto n = static_cast<size_t>(step.table().total);
  std::vector<float> w(n);
  read("params", n, w.data());
  step.set_params(w);
  read("moment1", n, step.moment1().data());
  read("moment2", n, step.moment2().data());
  size_t count = 0;
  for (const auto& b : step.bias()) count += b.size();
  std::vector<float> bias(count);
  read("bias", count, bias.data());
  auto at = bias.begin();
  for (auto& b : step.bias()) {
    std::copy_n(at, b.size(), b.begin());
    at += static_cast<std::ptrdiff_t>(b.size());
  }
  return s;
}

void export_checkpoint(const kern::train::TrainStep& step, const model::ModelConfig& config,
                       const std::vector<std::vector<float>>& bias, const std::string& dir,
                       const std::string& tokenizer_model) {
  const auto& table = step.table();
  std::vector<float> w(static_cast<size_t>(table.total));
  step.get_params(w);
  std::vector<OwnedTensor> tensors;
  for (const auto& p : table.params) {
    OwnedTensor t{p.name, spec::DType::bf16, p.shape, {}};
    t.bytes.resize(static_cast<size_t>(p.numel()) * 2);
    for (int64_t i = 0; i < p.numel(); ++i) {
      const spec::bf16 v = spec::to_bf16(w[static_cast<size_t>(p.offset + i)]);
      std::memcpy(t.bytes.data() + 2 * i, &v, 2);
    }
    tensors.push_back(std::move(t));
  }
  for (const auto& l : table.layers) {
    if (!l.moe) continue;
    const auto& b = bias[static_cast<size_t>(l.moe_index)];
    tensors.push_back(f32_tensor(l.prefix + "mlp.gate.e_score_correction_bias",
                                 {static_cast<int64_t>(b.size())}, b.data(), b.size()));
  }
  const std::string tmp = dir + ".new", old = dir + ".old";
  try {
    fs::remove_all(tmp);
    fs::create_directories(tmp);
    model::save_safetensors(tmp + "/model.safetensors", tensors, {{"format", "pt"}});
    write_text_atomically(tmp + "/config.json", model::config_to_json(config));
    if (!tokenizer_model.empty()) {
      fs::copy_file(tokenizer_model, tmp + "/tokenizer.model");
      const fs::path extra = fs::path(tokenizer_model).parent_path() / "tokenizer_config.json";
      if (fs::exists(extra)) fs::copy_file(extra, tmp + "/tokenizer_config.json");
    }
    fs::remove_all(old);
    if (fs::exists(dir)) fs::rename(dir, old);
    fs::rename(tmp, dir);
    fs::remove_all(old);
  } catch (const fs::filesystem_error& e) {
    throw Error(ExitCode::cannot_write, "cannot export", dir, "", e.what());
  }
}

}  // namespace v3b::scen
