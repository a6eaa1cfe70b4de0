// config.json: presets, both RoPE spellings, and every rule of SPEC 2.3 (1-5) as a rejected file
// whose message names the file, the key, what was expected and what was found.
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>

#include "model/config.h"
#include "model/error.h"

using namespace v3b;
using namespace v3b::model;
using nlohmann::json;

namespace {

json base() { return json::parse(config_to_json(load_preset("v3"))); }

struct Outcome {
  ExitCode code = ExitCode::ok;
  std::string message;
};
Outcome attempt(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    return {e.code(), e.what()};
  }
  return {};
}
Outcome parse_text(const std::string& text) {
  return attempt([&] { parse_config(text, "/x/config.json"); });
}

struct BadCase {
  const char* name;
  std::function<void(json&)> edit;
  std::vector<const char*> parts;  // key, expected, found: all must be in the message
};

void reject_all(const std::vector<BadCase>& cases) {
  for (const BadCase& b : cases) {
    SCOPED_TRACE(b.name);
    json j = base();
    b.edit(j);
    const Outcome o = parse_text(j.dump());
    EXPECT_EQ(o.code, ExitCode::bad_input) << o.message;
    EXPECT_NE(o.message.find("/x/config.json"), std::string::npos) << o.message;
    EXPECT_NE(o.message.find("expected "), std::string::npos) << o.message;
    EXPECT_NE(o.message.find("found "), std::string::npos) << o.message;
    EXPECT_EQ(o.message.find('\n'), std::string::npos) << o.message;
    for (const char* part : b.parts)
      EXPECT_NE(o.message.find(part), std::string::npos) << part << " | " << o.message;
  }
}

}  // namespace

TEST(Config, PresetsHaveThePublishedValues) {
  const ModelConfig v3 = load_preset("v3");
  EXPECT_EQ(v3.vocab_size, 129280);
  EXPECT_EQ(v3.hidden_size, 7168);
  EXPECT_EQ(v3.num_hidden_layers, 61);
  EXPECT_EQ(v3.qk_head_dim(), 192);
  EXPECT_EQ(v3.n_group, 8);
  EXPECT_EQ(v3.topk_group, 4);
  EXPECT_EQ(v3.rope_scaling.type, RopeType::yarn);
  EXPECT_EQ(v3.rope_scaling.factor, 40);
  EXPECT_EQ(v3.rope_scaling.original_max_position_embeddings, 4096);
  EXPECT_TRUE(v3.fp8);
  EXPECT_FALSE(v3.ue8m0);
  EXPECT_FALSE(v3.is_moe_layer(2));
  EXPECT_TRUE(v3.is_moe_layer(3));
  EXPECT_TRUE(v3.is_moe_layer(61));  // MTP
  const ModelConfig lite = load_preset("v2-lite");
  EXPECT_EQ(lite.q_lora_rank, 0);
  EXPECT_EQ(lite.scoring_func, ScoringFunc::softmax);
  EXPECT_EQ(lite.topk_method, TopkMethod::greedy);
  EXPECT_FALSE(lite.norm_topk_prob);
  EXPECT_EQ(lite.rope_scaling.mscale, 0.707);
  EXPECT_EQ(load_preset("v2").topk_method, TopkMethod::group_limited_greedy);
  EXPECT_EQ(load_preset("moonlight").rope_theta, 50000);
  EXPECT_EQ(load_preset("kimi-k2").n_routed_experts, 384);
  for (const char* name :
       {"v3", "r1", "v2-lite", "v2", "moonlight", "kimi-k2", "micro", "train", "tiny"}) {
    const ModelConfig c = load_preset(name);
    // Only Kimi-K2's equal betas deserve a word.
    EXPECT_EQ(c.warnings.size(), std::string(name) == "kimi-k2" ? 1u : 0u) << name;
    const ModelConfig again = parse_config(config_to_json(c), "again");
    EXPECT_EQ(config_to_json(again), config_to_json(c)) << name;
  }
}

TEST(Config, UnknownPresetListsTheNames) {
  const Outcome o = attempt([] { load_preset("v9"); });
  EXPECT_EQ(o.code, ExitCode::not_found);
  EXPECT_NE(o.message.find("kimi-k2"), std::string::npos) << o.message;
  EXPECT_NE(o.message.find("\"v9\""), std::string::npos) << o.message;
  EXPECT_EQ(attempt([] { load_preset("../presets/v3"); }).code, ExitCode::not_found);
}

TEST(Config, OldAndNewRopeSpellingAgree) {
  json j = base();
  const ModelConfig old = parse_config(j.dump(), "old");
  json p = j["rope_scaling"];
  p.erase("type");
  p["rope_theta"] = j["rope_theta"];
  j.erase("rope_scaling");
  j.erase("rope_theta");
  j["rope_parameters"] = p;
  const ModelConfig fresh = parse_config(j.dump(), "new");
  EXPECT_EQ(config_to_json(old), config_to_json(fresh));
  EXPECT_TRUE(fresh.warnings.empty());
  // "default" in the new spelling is no scaling.
  j["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 5000.0}};
  const ModelConfig plain = parse_config(j.dump(), "plain");
  EXPECT_EQ(plain.rope_scaling.type, RopeType::none);
  EXPECT_EQ(plain.rope_theta, 5000);
  // Only "type", only "rope_type".
  j = base();
  j["rope_scaling"].erase("rope_type");
  EXPECT_EQ(parse_config(j.dump(), "t").rope_scaling.type, RopeType::yarn);
  j = base();
  j["rope_scaling"].erase("type");
  EXPECT_EQ(parse_config(j.dump(), "t").rope_scaling.type, RopeType::yarn);
  for (const char* t : {"linear", "ntk", "dynamic", "ntk_by_parts", "yarn", "dynamic-yarn"}) {
    j["rope_scaling"]["rope_type"] = t;
    const ModelConfig c = parse_config(j.dump(), "t");
    EXPECT_EQ(config_to_json(parse_config(config_to_json(c), "t")), config_to_json(c)) << t;
  }
}

TEST(Config, DefaultsFollowTheModelClass) {
  json j = base();
  for (const char* k : {"num_nextn_predict_layers", "moe_layer_freq", "scoring_func", "topk_method",
                        "norm_topk_prob", "routed_scaling_factor", "rope_theta", "rope_scaling",
                        "quantization_config", "hidden_act", "max_position_embeddings",
                        "rms_norm_eps", "rope_interleave", "torch_dtype"})
    j.erase(k);
  const ModelConfig c = parse_config(j.dump(), "d");
  EXPECT_EQ(c.num_nextn_predict_layers, 0);
  EXPECT_EQ(c.moe_layer_freq, 1);
  EXPECT_EQ(c.scoring_func, ScoringFunc::sigmoid);
  EXPECT_EQ(c.topk_method, TopkMethod::noaux_tc);
  EXPECT_EQ(c.routed_scaling_factor, 2.5);
  EXPECT_EQ(c.rope_theta, 10000);
  EXPECT_EQ(c.rope_scaling.type, RopeType::none);
  EXPECT_EQ(c.max_position_embeddings, 4096);
  EXPECT_FALSE(c.fp8);
  j["model_type"] = "deepseek_v2";
  const ModelConfig v2 = parse_config(j.dump(), "d");
  EXPECT_EQ(v2.scoring_func, ScoringFunc::softmax);
  EXPECT_EQ(v2.topk_method, TopkMethod::greedy);
}

TEST(Config, UnknownKeysAreWarnings) {
  json j = base();
  j["frobnicate"] = 3;
  j["rope_scaling"]["sharpness"] = 1;
  j["quantization_config"]["colour"] = "red";
  const ModelConfig c = parse_config(j.dump(), "w");
  ASSERT_EQ(c.warnings.size(), 3u);
  std::string all;
  for (const std::string& w : c.warnings) all += w + "\n";
  for (const char* key :
       {"\"frobnicate\"", "\"rope_scaling.sharpness\"", "\"quantization_config.colour\""})
    EXPECT_NE(all.find(key), std::string::npos) << key;
}

TEST(Config, Fp8AndUe8m0) {
  json j = base();
  j["quantization_config"]["scale_fmt"] = "ue8m0";
  EXPECT_TRUE(parse_config(j.dump(), "q").ue8m0);
  j["quantization_config"] = nullptr;
  EXPECT_FALSE(parse_config(j.dump(), "q").fp8);
}

TEST(ConfigRejects, Rule1Sizes) {
  std::vector<BadCase> cases;
  static const char* const kRequired[] = {"vocab_size",
                                          "hidden_size",
                                          "intermediate_size",
                                          "moe_intermediate_size",
                                          "num_hidden_layers",
                                          "num_attention_heads",
                                          "n_routed_experts",
                                          "num_experts_per_tok",
                                          "kv_lora_rank",
                                          "qk_nope_head_dim",
                                          "qk_rope_head_dim",
                                          "v_head_dim",
                                          "first_k_dense_replace",
                                          "n_group",
                                          "topk_group",
                                          "n_shared_experts",
                                          "q_lora_rank"};
  for (const char* key : kRequired) {
    cases.push_back({key, [key](json& j) { j.erase(key); }, {key, "missing"}});
    cases.push_back({key, [key](json& j) { j[key] = "61"; }, {key, "\"61\""}});
    cases.push_back({key, [key](json& j) { j[key] = 2.5; }, {key, "2.5"}});
    cases.push_back({key, [key](json& j) { j[key] = true; }, {key, "true"}});
    cases.push_back({key, [key](json& j) { j[key] = -4; }, {key, "-4"}});
    cases.push_back(
        {key, [key](json& j) { j[key] = 18446744073709551615ull; }, {key, "18446744073709551615"}});
    cases.push_back(
        {key, [key](json& j) { j[key] = int64_t{1} << 60; }, {key, "1152921504606846976"}});
    const std::string k = key;
    if (k != "first_k_dense_replace" && k != "n_shared_experts" && k != "q_lora_rank")
      cases.push_back({key, [key](json& j) { j[key] = 0; }, {key, "found 0"}});
    if (k != "n_shared_experts" && k != "q_lora_rank")
      cases.push_back({key, [key](json& j) { j[key] = nullptr; }, {key, "null"}});
  }
  cases.push_back({"dense lead",
                   [](json& j) { j["first_k_dense_replace"] = 62; },
                   {"first_k_dense_replace", "0 to 61", "found 62"}});
  cases.push_back(
      {"freq", [](json& j) { j["moe_layer_freq"] = 0; }, {"moe_layer_freq", "found 0"}});
  cases.push_back({"mtp",
                   [](json& j) { j["num_nextn_predict_layers"] = -1; },
                   {"num_nextn_predict_layers", "found -1"}});
  cases.push_back({"type",
                   [](json& j) { j["model_type"] = "llama"; },
                   {"model_type", "deepseek_v3", "\"llama\""}});
  cases.push_back({"no type", [](json& j) { j.erase("model_type"); }, {"model_type", "missing"}});
  cases.push_back({"eps", [](json& j) { j["rms_norm_eps"] = 0; }, {"rms_norm_eps", "found 0"}});
  cases.push_back(
      {"eps", [](json& j) { j["rms_norm_eps"] = "1e-6"; }, {"rms_norm_eps", "a number", "1e-6"}});
  cases.push_back({"kv heads",
                   [](json& j) { j["num_key_value_heads"] = 0; },
                   {"num_key_value_heads", "found 0"}});
  cases.push_back({"max",
                   [](json& j) { j["max_position_embeddings"] = 0; },
                   {"max_position_embeddings", "found 0"}});
  reject_all(cases);
}

TEST(ConfigRejects, Rule2Rope) {
  auto scaling = [](const char* key, json value) {
    return [key, value](json& j) { j["rope_scaling"][key] = value; };
  };
  auto type = [](const char* t, const char* key, json value) {
    return [t, key, value](json& j) {
      j["rope_scaling"]["type"] = j["rope_scaling"]["rope_type"] = t;
      j["rope_scaling"][key] = value;
    };
  };
  reject_all({
      {"odd",
       [](json& j) { j["qk_rope_head_dim"] = 63; },
       {"qk_rope_head_dim", "even", "found 63"}},
      {"theta 1", [](json& j) { j["rope_theta"] = 1; }, {"rope_theta", "> 1", "found 1"}},
      {"theta text",
       [](json& j) { j["rope_theta"] = "1e4"; },
       {"rope_theta", "a number", "\"1e4\""}},
      {"theta 1 new",
       [](json& j) {
         j.erase("rope_theta");
         j["rope_parameters"] = j["rope_scaling"];
         j.erase("rope_scaling");
         j["rope_parameters"]["rope_theta"] = 0.5;
       },
       {"rope_theta", "> 1", "found 0.5"}},
      {"yarn factor", type("yarn", "factor", 0.5), {"factor", ">= 1", "found 0.5"}},
      {"linear factor", type("linear", "factor", 0.99), {"factor", ">= 1", "found 0.99"}},
      {"dynamic factor", type("dynamic", "factor", -2), {"factor", ">= 1", "found -2"}},
      {"ntk factor", type("ntk", "factor", 0), {"factor", ">= 1", "found 0"}},
      {"no factor",
       [](json& j) { j["rope_scaling"].erase("factor"); },
       {"rope_scaling.factor", "missing"}},
      {"original 0",
       scaling("original_max_position_embeddings", 0),
       {"original_max_position_embeddings", "> 0", "found 0"}},
      {"original -1",
       scaling("original_max_position_embeddings", -1),
       {"original_max_position_embeddings", "> 0", "found -1"}},
      {"beta", scaling("beta_slow", 33), {"beta_fast", "> beta_slow = 33", "found 32"}},
      {"beta 0", scaling("beta_slow", 0), {"beta_slow", "> 0", "found 0"}},
      {"beta equal by parts",
       type("ntk_by_parts", "beta_slow", 32),
       {"beta_fast", "> beta_slow", "found 32"}},
      {"type", scaling("rope_type", "yarn2"), {"rope_type", "yarn"}},
      {"types differ", scaling("type", "linear"), {"rope_type", "linear", "yarn"}},
      {"unknown",
       [](json& j) {
         j["rope_scaling"] = {{"rope_type", "llama3"}, {"factor", 8}};
       },
       {"unknown rope type", "dynamic", "\"llama3\""}},
      {"no type",
       [](json& j) {
         j["rope_scaling"] = {{"factor", 8}};
       },
       {"rope_type", "missing"}},
      {"not an object",
       [](json& j) { j["rope_scaling"] = 4; },
       {"rope_scaling", "an object", "found 4"}},
      {"two thetas",
       [](json& j) {
         j["rope_parameters"] = j["rope_scaling"];
         j["rope_parameters"]["rope_theta"] = 5000;
       },
       {"rope_parameters.rope_theta", "10000", "5000"}},
      {"two scalings",
       [](json& j) {
         j["rope_parameters"] = j["rope_scaling"];
         j["rope_parameters"]["factor"] = 4;
       },
       {"rope_parameters", "the same as rope_scaling"}},
      {"mscale", scaling("mscale", -1), {"mscale", ">= 0", "found -1"}},
      {"attention factor", scaling("attention_factor", 0), {"attention_factor", "> 0", "found 0"}},
      {"truncate", scaling("truncate", false), {"truncate", "true", "false"}},
  });
  // Kimi-K2 is published with beta_fast = beta_slow = 1: accepted for YaRN, with a warning.
  json j = base();
  j["rope_scaling"]["beta_fast"] = 1;
  EXPECT_EQ(parse_config(j.dump(), "k").warnings.size(), 1u);
  // The requested context.
  const ModelConfig c = load_preset("v3");
  EXPECT_NO_THROW(check_context(c, 163840, "here"));
  const Outcome o = attempt([&] { check_context(c, 163841, "flag --context"); });
  EXPECT_EQ(o.code, ExitCode::bad_input);
  EXPECT_EQ(o.message,
            "flag --context: requested context; expected 1 to max_position_embeddings = 163840, "
            "found 163841");
}

TEST(ConfigRejects, Rule3Router) {
  auto set = [](const char* key, json v) { return [key, v](json& j) { j[key] = v; }; };
  reject_all({
      {"E % G", set("n_group", 7), {"n_routed_experts", "multiple of n_group = 7", "found 256"}},
      {"M > G", set("topk_group", 9), {"topk_group", "1 to 8", "found 9"}},
      {"K too large",
       set("num_experts_per_tok", 129),
       {"num_experts_per_tok", "1 to 128", "found 129"}},
      {"pairs",
       [](json& j) {
         j["n_group"] = 256;
         j["topk_group"] = 8;
       },
       {"n_group", "at least 2 experts", "found 1 a group"}},
      {"scoring", set("scoring_func", "tanh"), {"scoring_func", "sigmoid or softmax", "\"tanh\""}},
      {"method", set("topk_method", "best"), {"topk_method", "noaux_tc", "\"best\""}},
      {"method type", set("topk_method", 3), {"topk_method", "a string", "found 3"}},
      {"norm", set("norm_topk_prob", 1), {"norm_topk_prob", "true or false", "found 1"}},
      {"scale", set("routed_scaling_factor", 0), {"routed_scaling_factor", "> 0", "found 0"}},
  });
}

TEST(ConfigRejects, Rule4And5Features) {
  auto set = [](const char* key, json v) { return [key, v](json& j) { j[key] = v; }; };
  auto quant = [](const char* key, json v) {
    return [key, v](json& j) { j["quantization_config"][key] = v; };
  };
  reject_all({
      {"act", set("hidden_act", "gelu"), {"hidden_act", "\"silu\"", "\"gelu\""}},
      {"bias", set("attention_bias", true), {"attention_bias", "false", "true"}},
      {"method",
       quant("quant_method", "awq"),
       {"quantization_config.quant_method", "\"fp8\"", "\"awq\""}},
      {"no method",
       [](json& j) { j["quantization_config"].erase("quant_method"); },
       {"quantization_config.quant_method", "missing"}},
      {"fmt", quant("fmt", "e5m2"), {"quantization_config.fmt", "\"e4m3\"", "\"e5m2\""}},
      {"scheme",
       quant("activation_scheme", "static"),
       {"activation_scheme", "\"dynamic\"", "\"static\""}},
      {"block",
       quant("weight_block_size", json::array({64, 64})),
       {"weight_block_size", "[128,128]", "[64,64]"}},
      {"block type",
       quant("weight_block_size", 128),
       {"weight_block_size", "[128,128]", "found 128"}},
      {"scale_fmt", quant("scale_fmt", "fp16"), {"scale_fmt", "\"ue8m0\"", "\"fp16\""}},
      {"not an object",
       set("quantization_config", "fp8"),
       {"quantization_config", "an object", "\"fp8\""}},
  });
}

TEST(ConfigRejects, BrokenJson) {
  for (const std::string& text :
       {std::string(""), std::string("{"), std::string("[1,2]"), std::string("{\"a\":1,}"),
        std::string("nul"), std::string("{\"vocab_size\": 1e999}"),
        std::string("{\"model_type\": \"\xff\xfe\"}"),
        "{\"a\":" + std::string(2000, '[') + std::string(2000, ']') + "}"}) {
    const Outcome o = parse_text(text);
    EXPECT_EQ(o.code, ExitCode::bad_input) << text.substr(0, 40) << o.message;
    EXPECT_NE(o.message.find("/x/config.json"), std::string::npos) << o.message;
    EXPECT_LT(o.message.size(), 400u);
  }
  const Outcome o = parse_text("{\"vocab_size\": 5, \"vocab_size\": 6}");
  EXPECT_EQ(o.code, ExitCode::bad_input);
  EXPECT_NE(o.message.find("\"vocab_size\" twice"), std::string::npos) << o.message;
}

TEST(ConfigRejects, Files) {
  Outcome o = attempt([] { load_config("/nonexistent/config.json"); });
  EXPECT_EQ(o.code, ExitCode::not_found);
  EXPECT_NE(o.message.find("/nonexistent/config.json"), std::string::npos);
  char dir[] = "/tmp/v3b_config_XXXXXX";
  ASSERT_NE(::mkdtemp(dir), nullptr);
  const std::string file = std::string(dir) + "/config.json";
  o = attempt([&] { load_config(dir); });
  EXPECT_EQ(o.code, ExitCode::not_found) << o.message;
  ASSERT_EQ(::mkdir(file.c_str(), 0700), 0);
  o = attempt([&] { load_config(dir); });
  EXPECT_EQ(o.code, ExitCode::bad_input) << o.message;
  EXPECT_NE(o.message.find("directory"), std::string::npos) << o.message;
  ASSERT_EQ(::rmdir(file.c_str()), 0);
  { std::ofstream(file) << config_to_json(load_preset("micro")); }
  EXPECT_EQ(load_config(dir).hidden_size, 32);
  EXPECT_EQ(load_config(file).hidden_size, 32);
  ::unlink(file.c_str());
  ::rmdir(dir);
}
