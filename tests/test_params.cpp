// SPEC 0.2, 0.3 and 0.4: every figure, to the unit.
#include <gtest/gtest.h>

#include <map>

#include "model/error.h"
#include "model/params.h"
#include "model/weights.h"

using namespace v3b;
using namespace v3b::model;

namespace {
const ModelConfig& v3() {
  static const ModelConfig c = load_preset("v3");
  return c;
}
}  // namespace

TEST(Params, V3Pieces) {
  const LayerParams dense = layer_params(v3(), 0), moe = layer_params(v3(), 3);
  EXPECT_EQ(dense.attention, 187105280);
  EXPECT_EQ(moe.attention, 187105280);
  EXPECT_EQ(dense.norms, 16384);
  EXPECT_EQ(dense.dense_ffn, 396361728);
  EXPECT_EQ(moe.dense_ffn, 0);
  EXPECT_EQ(moe.expert, 44040192);
  EXPECT_EQ(moe.shared, 44040192);
  EXPECT_EQ(moe.gate, 1835008);
  EXPECT_EQ(moe.bias, 256);
  EXPECT_EQ(moe.gate + moe.bias + moe.expert * moe.experts + moe.shared, 11320164608);
  EXPECT_EQ(dense.total(), 583483392);
  EXPECT_EQ(dense.active(), 583483392);
  EXPECT_EQ(moe.total(), 11507286272);
  EXPECT_EQ(moe.active(), 585318656);
}

TEST(Params, V3Totals) {
  const ParamCounts p = count_params(v3());
  EXPECT_EQ(p.embedding, 926679040);
  EXPECT_EQ(p.main_total, 671026419200);
  EXPECT_EQ(p.active, 37552297472);
  EXPECT_EQ(p.active_excl_embedding, 36625618432);
  EXPECT_EQ(p.active_excl_both, 35698939392);
  EXPECT_EQ(p.mtp_unique, 11610068224);
  EXPECT_EQ(p.mtp_stored, 13463426304);
  EXPECT_EQ(p.mtp_active_unique, 688100608);
  EXPECT_EQ(p.mtp_active, 2541458688);
}

TEST(Params, V3Checkpoint) {
  const CheckpointSize s = checkpoint_size(v3());
  EXPECT_EQ(s.main_entries, 45395);
  EXPECT_EQ(s.mtp_entries, 788);
  EXPECT_EQ(s.scale_entries, 45808);
  EXPECT_EQ(s.main_entries + s.mtp_entries + s.scale_entries, 91991);
  EXPECT_EQ(s.fp8, 680571043840);
  EXPECT_EQ(s.bf16, 3918786560);
  EXPECT_EQ(s.f32, 41555600);
  EXPECT_EQ(s.elements(), 684531386000);
  EXPECT_EQ(s.bytes(), 688574839360);
}

TEST(Params, V3Bytes) {
  EXPECT_EQ(layer_bytes(v3(), 0, false), 1166966784);
  EXPECT_EQ(layer_bytes(v3(), 0, true), 583642336);
  EXPECT_EQ(layer_bytes(v3(), 3, false), 23014573056);
  EXPECT_EQ(layer_bytes(v3(), 3, true), 11511947488);
  EXPECT_EQ(attention_bytes(v3(), false), 374210560);
  EXPECT_EQ(attention_bytes(v3(), true), 187151072);
  EXPECT_EQ(expert_bytes(v3(), false), 88080384);
  EXPECT_EQ(expert_bytes(v3(), true), 44050944);
  EXPECT_EQ(layer_decode_bytes(v3(), 3, true), 587313376);
  EXPECT_NEAR(static_cast<double>(decode_bytes(v3(), true)), 37.67e9, 0.005e9);
  const ModelConfig lite = load_preset("v2-lite");
  EXPECT_EQ(layer_bytes(lite, 0, false), 162014208);
  EXPECT_EQ(layer_bytes(lite, 1, false), 1169695744);
  EXPECT_NEAR(expected_distinct_experts(v3(), 1), 8, 1e-12);
  EXPECT_NEAR(expected_distinct_experts(v3(), 8), 57.4, 0.05);
  EXPECT_NEAR(expected_distinct_experts(v3(), 32), 163.3, 0.05);
  EXPECT_NEAR(expected_distinct_experts(v3(), 128), 251.6, 0.05);
}

TEST(Params, V2AndLite) {
  const ParamCounts v2 = count_params(load_preset("v2")),
                    lite = count_params(load_preset("v2-lite"));
  EXPECT_EQ(v2.main_total, 235741434880);
  EXPECT_EQ(v2.active_excl_embedding, 20851512320);
  EXPECT_EQ(lite.main_total, 15706484224);
  EXPECT_EQ(lite.active, 2661150208);
  EXPECT_EQ(lite.active_excl_embedding, 2451435008);
}

TEST(Params, PublishedSizesOfTheOthers) {  // rounded figures of the model cards: 1T/32B, 16B/3B
  const ParamCounts k2 = count_params(load_preset("kimi-k2")),
                    moonlight = count_params(load_preset("moonlight"));
  EXPECT_NEAR(static_cast<double>(k2.main_total), 1.03e12, 0.005e12);
  EXPECT_NEAR(static_cast<double>(k2.active), 32.9e9, 0.1e9);
  EXPECT_NEAR(static_cast<double>(moonlight.main_total), 15.96e9, 0.01e9);
}

TEST(Params, SuiteConfigs) {
  const std::map<std::string, std::pair<int64_t, int64_t>> want{
      {"micro", {33784, 20944}}, {"train", {2305584, 713456}}, {"tiny", {6405040, 1988016}}};
  for (const auto& [name, counts] : want) {
    const ModelConfig c = load_preset(name);
    const ParamCounts p = count_params(c);
    EXPECT_EQ(p.main_total, counts.first) << name;
    EXPECT_EQ(p.mtp_unique, counts.second) << name;
    // The same numbers counted on real tensors.
    const WeightsPtr w = random_weights(c, 1, spec::DType::bf16);
    int64_t elements = 0;
    for (const auto& [key, view] : named_tensors(*w)) elements += view.numel();
    EXPECT_EQ(elements, counts.first + counts.second) << name;
  }
}

TEST(Params, AbsurdSizesThrowInsteadOfWrapping) {
  ModelConfig c = v3();
  c.hidden_size = c.moe_intermediate_size = 1 << 20;
  c.n_routed_experts = 1 << 16;
  c.num_hidden_layers = 4096;
  EXPECT_THROW(count_params(c), Error);
}

TEST(KvBytes, V3Table) {
  struct Row {
    KvScheme scheme;
    int64_t groups, elements, bf16_layer, bf16_token, fp8_token;
  };
  const Row rows[] = {{KvScheme::mha_expanded, 1, 40960, 81920, 4997120, 2576640},
                      {KvScheme::mha, 1, 32768, 65536, 3997696, 2061312},
                      {KvScheme::gqa, 16, 4096, 8192, 499712, 257664},
                      {KvScheme::gqa, 8, 2048, 4096, 249856, 128832},
                      {KvScheme::gqa, 4, 1024, 2048, 124928, 64416},
                      {KvScheme::gqa, 2, 512, 1024, 62464, 32208},
                      {KvScheme::mqa, 1, 256, 512, 31232, 16104},
                      {KvScheme::mla, 1, 576, 1152, 70272, 40016},
                      {KvScheme::tpa, 1, 512, 1024, 62464, 32208},
                      {KvScheme::tpa, 2, 1024, 2048, 124928, 64416}};
  for (const Row& r : rows) {
    SCOPED_TRACE(std::string(kv_scheme_name(r.scheme)) + " " + std::to_string(r.groups));
    EXPECT_EQ(kv_cache_elements_per_layer(r.scheme, v3(), r.groups), r.elements);
    EXPECT_EQ(kv_cache_bytes_per_layer(r.scheme, v3(), KvElem::bf16, r.groups), r.bf16_layer);
    EXPECT_EQ(kv_cache_bytes_per_token(r.scheme, v3(), KvElem::bf16, r.groups), r.bf16_token);
    EXPECT_EQ(kv_cache_bytes_per_token(r.scheme, v3(), KvElem::fp8, r.groups), r.fp8_token);
    EXPECT_EQ(kv_cache_bytes_per_token(r.scheme, v3(), KvElem::f32, r.groups), 2 * r.bf16_token);
  }
  EXPECT_EQ(kv_cache_bytes_per_layer(KvScheme::mla, v3(), KvElem::fp8), 656);
  EXPECT_EQ(kv_cache_bytes_per_token(KvScheme::mla, v3(), KvElem::bf16, 1, true), 71424);
  const double mla = 70272;
  EXPECT_NEAR(3997696 / mla, 56.9, 0.05);
  EXPECT_NEAR(4997120 / mla, 71.1, 0.05);
  EXPECT_EQ(kv_cache_bytes_per_token(KvScheme::mla, load_preset("v2-lite"), KvElem::bf16), 31104);
  // MQA is GQA with one group, MHA is GQA with n_h groups.
  EXPECT_EQ(kv_cache_bytes_per_token(KvScheme::gqa, v3(), KvElem::fp8, 1), 16104);
  EXPECT_EQ(kv_cache_bytes_per_token(KvScheme::gqa, v3(), KvElem::fp8, 128), 2061312);
}
