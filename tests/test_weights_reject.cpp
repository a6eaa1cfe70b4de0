// Checkpoints that must be refused: SPEC 2.3 rules 3, 4, 6, 7 and broken shards.
#include "checkpoint_testing.h"

using namespace checkpoint_testing;

namespace {
using Checkpoints = Folder;
}  // namespace

TEST_F(Checkpoints, Rule6And7AndTheRest) {
  const std::string q = "model.layers.1.self_attn.q_a_proj.weight", norm = "model.norm.weight";
  const std::string expert = "model.layers.1.mlp.experts.7.down_proj.weight";
  const std::string bias = "model.layers.1.mlp.gate.e_score_correction_bias";
  struct Bad {
    const char* name;
    std::function<void(Checkpoint&)> edit;
    std::vector<std::string> parts;
  };
  auto set_f32 = [](OwnedTensor& t, size_t i, float v) {
    std::memcpy(t.bytes.data() + 4 * i, &v, 4);
  };
  const float inf = INFINITY, nan = NAN;
  const std::vector<Bad> cases = {
      {"missing",
       [&](Checkpoint& c) { c.tensors.erase(expert); },
       {"missing tensor", expert, "[32,16]", "none"}},
      {"missing head",
       [](Checkpoint& c) { c.tensors.erase("lm_head.weight"); },
       {"missing", "lm_head.weight"}},
      {"missing bias",
       [&](Checkpoint& c) { c.tensors.erase(bias); },
       {"missing tensor", bias, "[8]"}},
      {"missing enorm",
       [](Checkpoint& c) { c.tensors.erase("model.layers.2.enorm.weight"); },
       {"missing", "enorm"}},
      {"missing hnorm",
       [](Checkpoint& c) { c.tensors.erase("model.layers.2.hnorm.weight"); },
       {"missing", "hnorm"}},
      {"missing eh",
       [](Checkpoint& c) { c.tensors.erase("model.layers.2.eh_proj.weight"); },
       {"missing", "eh_proj", "[32,64]"}},
      {"eh shape",
       [](Checkpoint& c) {
         c.at("model.layers.2.eh_proj.weight").shape = {64, 32};
       },
       {"wrong shape", "eh_proj", "[32,64]", "[64,32]"}},
      {"rank",
       [&](Checkpoint& c) {
         c.at(norm).shape = {32, 1};
       },
       {"wrong rank", norm, "[32]", "[32,1]"}},
      {"shape",
       [&](Checkpoint& c) { c.tensors[norm] = tensor(norm, DType::bf16, {31}); },
       {"wrong shape", norm, "[32]", "[31]"}},
      {"transposed",
       [&](Checkpoint& c) {
         c.at(q).shape = {32, 24};
       },
       {"wrong shape", q, "[24,32]", "[32,24]"}},
      {"dtype",
       [&](Checkpoint& c) { c.tensors[norm] = tensor(norm, DType::i32, {32}); },
       {"wrong dtype", norm, "i32"}},
      {"f64",
       [&](Checkpoint& c) { c.tensors[norm] = tensor(norm, DType::f64, {32}); },
       {"wrong dtype", norm, "f64"}},
      {"fp8 norm",
       [&](Checkpoint& c) { c.tensors[norm] = tensor(norm, DType::f8e4m3, {32}); },
       {"wrong dtype", norm, "f8e4m3"}},
      {"fp8 gate",
       [](Checkpoint& c) {
         c.tensors["model.layers.1.mlp.gate.weight"] =
             tensor("model.layers.1.mlp.gate.weight", DType::f8e4m3, {8, 32});
       },
       {"wrong dtype", "mlp.gate.weight", "f8e4m3"}},
      {"no scale",
       [&](Checkpoint& c) { c.tensors.erase(q + "_scale_inv"); },
       {"FP8 without scale", q, q + "_scale_inv", "[1,1]"}},
      {"scale without FP8",
       [&](Checkpoint& c) {
         c.tensors[q] = tensor(q, DType::bf16, {24, 32});
       },
       {"scale without FP8", q + "_scale_inv", "f8e4m3", "bf16"}},
      {"scale of nothing",
       [](Checkpoint& c) {
         c.tensors["x_scale_inv"] = tensor("x_scale_inv", DType::f32, {1, 1});
       },
       {"scale without FP8", "x_scale_inv", "none"}},
      {"scale of a norm",
       [&](Checkpoint& c) {
         c.tensors[norm + "_scale_inv"] = tensor(norm + "_scale_inv", DType::f32, {1, 1});
       },
       {"scale without FP8", norm + "_scale_inv"}},
      {"scale shape",
       [&](Checkpoint& c) {
         c.tensors[q + "_scale_inv"] = tensor(q + "_scale_inv", DType::f32, {1, 2});
       },
       {"wrong scale shape", q + "_scale_inv", "[1,1]", "[1,2]"}},
      {"scale dtype",
       [&](Checkpoint& c) {
         c.tensors[q + "_scale_inv"] = tensor(q + "_scale_inv", DType::bf16, {1, 1});
       },
       {"wrong dtype", q + "_scale_inv", "f32", "bf16"}},
      {"scale 0",
       [&](Checkpoint& c) { set_f32(c.at(q + "_scale_inv"), 0, 0); },
       {"bad scale", q + "_scale_inv[0,0]", "> 0", "0.0"}},
      {"scale -0",
       [&](Checkpoint& c) { set_f32(c.at(q + "_scale_inv"), 0, -0.0f); },
       {"bad scale"}},
      {"scale < 0",
       [&](Checkpoint& c) { set_f32(c.at(q + "_scale_inv"), 0, -1); },
       {"bad scale", "-1"}},
      {"scale inf",
       [&](Checkpoint& c) { set_f32(c.at(q + "_scale_inv"), 0, inf); },
       {"bad scale", "inf"}},
      {"scale nan",
       [&](Checkpoint& c) { set_f32(c.at(q + "_scale_inv"), 0, nan); },
       {"bad scale", "nan"}},
      {"NaN code",
       [&](Checkpoint& c) { c.at(q).bytes[32 * 3 + 5] = std::byte{0x7f}; },
       {"NaN code", q + "[3,5]", "1 of 768"}},
      {"NaN code -",
       [&](Checkpoint& c) { c.at(expert).bytes[511] = std::byte{0xff}; },
       {"NaN code", expert + "[31,15]"}},
      {"bias nan",
       [&](Checkpoint& c) { set_f32(c.at(bias), 3, nan); },
       {"bad bias", bias + "[3]", "finite", "nan"}},
      {"bias inf",
       [&](Checkpoint& c) { set_f32(c.at(bias), 7, -inf); },
       {"bad bias", bias + "[7]", "-inf"}},
      {"expert 8",
       [](Checkpoint& c) {
         const std::string n = "model.layers.1.mlp.experts.8.up_proj.weight";
         c.tensors[n] = tensor(n, DType::bf16, {16, 32});
       },
       {"expert id out of range", "experts.8.up_proj", "0 to 7", "found 8"}},
      {"expert -1",
       [](Checkpoint& c) {
         const std::string n = "model.layers.1.mlp.experts.-1.up_proj.weight";
         c.tensors[n] = tensor(n, DType::bf16, {16, 32});
       },
       {"expert id out of range", "found -1"}},
      {"expert 07",
       [](Checkpoint& c) {
         const std::string n = "model.layers.1.mlp.experts.07.up_proj.weight";
         c.tensors[n] = tensor(n, DType::bf16, {16, 32});
       },
       {"duplicate expert id", "found 07"}},
      {"tied but distinct",
       [](Checkpoint& c) { c.config.tie_word_embeddings = true; },
       {"tie_word_embeddings", "lm_head.weight", "differs"}},
  };
  for (const Bad& b : cases) {
    SCOPED_TRACE(b.name);
    Checkpoint c(DType::f8e4m3);
    b.edit(c);
    for (auto& [name, t] : c.tensors) t.name = name;
    c.save(dir);
    std::vector<std::string> parts = b.parts;
    parts.push_back(dir);
    expect_error(attempt([&] { load_weights(dir); }), ExitCode::bad_input, parts);
  }
}

TEST_F(Checkpoints, ScanCanBeSwitchedOff) {
  Checkpoint c(DType::f8e4m3);
  c.at("model.layers.1.self_attn.q_a_proj.weight").bytes[0] = std::byte{0x7f};
  c.save(dir);
  LoadOptions o;
  EXPECT_THROW(load_weights(dir, o), Error);
  o.scan_payload = false;
  EXPECT_NO_THROW(load_weights(dir, o));
}

TEST_F(Checkpoints, Shards) {
  const Checkpoint c(DType::bf16);
  const std::string index = file("model.safetensors.index.json"), norm = "model.norm.weight";
  auto edit_index = [&](const std::function<void(json&)>& edit) {
    c.save_sharded(dir, 3);
    std::ifstream in(index);
    json j = json::parse(in);
    edit(j);
    std::ofstream(index) << j.dump();
  };
  auto fails = [&](ExitCode code, std::vector<std::string> parts) {
    expect_error(attempt([&] { load_weights(dir); }), code, parts);
  };
  edit_index([](json&) {});
  fs::remove(file("part-1.safetensors"));
  fails(ExitCode::not_found, {index, "missing shard", "part-1.safetensors"});
  edit_index([&](json& j) { j["weight_map"]["model.extra.weight"] = "part-0.safetensors"; });
  fails(ExitCode::bad_input, {index, "model.extra.weight", "nowhere"});
  edit_index([&](json& j) {
    j["weight_map"][norm] =
        j["weight_map"][norm] == "part-0.safetensors" ? "part-1.safetensors" : "part-0.safetensors";
  });
  fails(ExitCode::bad_input, {index, norm, "not in its shard"});
  edit_index([&](json& j) { j["weight_map"][norm] = "../part-0.safetensors"; });
  fails(ExitCode::bad_input, {index, norm, "without folders"});
  edit_index([&](json& j) { j["weight_map"][norm] = 3; });
  fails(ExitCode::bad_input, {index, norm, "found 3"});
  edit_index([&](json& j) { j["weight_map"][norm] = ""; });
  fails(ExitCode::bad_input, {index, norm});
  edit_index([&](json& j) { j.erase("weight_map"); });
  fails(ExitCode::bad_input, {index, "weight_map", "none"});
  edit_index([&](json& j) { j["weight_map"] = json::object(); });
  fails(ExitCode::bad_input, {index, "weight_map"});
  edit_index([](json&) {});
  write("model.safetensors.index.json", "{\"weight_map\": {");
  fails(ExitCode::bad_input, {index, "JSON syntax"});
  // The same tensor in two shards.
  edit_index([](json&) {});
  const SafetensorsFile f = open_safetensors(file("part-0.safetensors"));
  std::vector<OwnedTensor> both;
  for (const auto& [name, v] : f.tensors) both.push_back(c.tensors.at(name));
  for (const auto& [name, v] : open_safetensors(file("part-1.safetensors")).tensors)
    if (both.size() == f.tensors.size()) both.push_back(c.tensors.at(name));
  save_safetensors(file("part-0.safetensors"), both);
  fails(ExitCode::bad_input, {"duplicate tensor", "also in"});
  // A tensor that the index does not know is a warning.
  edit_index([&](json& j) { j["weight_map"].erase(norm); });
  EXPECT_EQ(load_weights(dir)->warnings.size(), 1u);
  // A damaged shard names itself.
  edit_index([](json&) {});
  fs::resize_file(file("part-2.safetensors"), fs::file_size(file("part-2.safetensors")) - 1);
  fails(ExitCode::bad_input, {file("part-2.safetensors")});
  // Neither file, no folder.
  fs::remove(index);
  fails(ExitCode::not_found, {dir, "model.safetensors", "neither"});
  expect_error(attempt([] { load_weights("/nonexistent"); }), ExitCode::not_found,
               {"/nonexistent", "No such file"});
}
