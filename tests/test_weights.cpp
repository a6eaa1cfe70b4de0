// Checkpoints to typed weights: round trips, MTP copies, warnings, random weights, dequantisation,
// goldens.
#include "checkpoint_testing.h"

using namespace checkpoint_testing;

namespace {
using Checkpoints = Folder;
}  // namespace

TEST_F(Checkpoints, RoundTripInEveryStorage) {
  for (const DType t : {DType::f32, DType::bf16, DType::f16, DType::f8e4m3})
    for (const size_t shards : {0u, 3u}) {
      SCOPED_TRACE(std::string(spec::dtype_name(t)) + " shards " + std::to_string(shards));
      const Checkpoint c(t);
      fs::remove_all(dir);
      fs::create_directory(dir);
      if (shards)
        c.save_sharded(dir, shards);
      else
        c.save(dir);
      const WeightsPtr w = load_weights(dir);
      EXPECT_TRUE(w->warnings.empty()) << (w->warnings.empty() ? "" : w->warnings[0]);
      EXPECT_EQ(config_to_json(w->config), config_to_json(c.config));
      ASSERT_EQ(w->mtp.size(), 1u);
      EXPECT_FALSE(w->layers[0].is_moe);
      EXPECT_TRUE(w->layers[1].is_moe);
      EXPECT_EQ(w->layers[1].moe.experts.size(), 8u);
      EXPECT_EQ(w->layers[1].moe.e_score_correction_bias.dtype, DType::f32);
      const Checkpoint again = [&] {
        Checkpoint x = c;
        x.tensors.clear();
        for (const auto& [name, v] : named_tensors(*w)) x.add(name, v);
        return x;
      }();
      EXPECT_EQ(again.tensors.size(), c.tensors.size());
      for (const auto& [name, owned] : c.tensors) {
        ASSERT_TRUE(again.tensors.count(name)) << name;
        EXPECT_EQ(again.tensors.at(name).bytes, owned.bytes) << name;
      }
    }
}

TEST_F(Checkpoints,
       PresetShapesBind) {  // no query compression, softmax router without bias, no MTP
  ModelConfig c = load_preset("micro");
  c.q_lora_rank = 0;
  c.scoring_func = ScoringFunc::softmax;
  c.topk_method = TopkMethod::greedy;
  c.n_shared_experts = 0;
  c.num_nextn_predict_layers = 0;
  c.tie_word_embeddings = true;
  const WeightsPtr w = random_weights(c, 3, DType::f32);
  Checkpoint k(DType::f32);
  k.config = w->config;
  k.tensors.clear();
  for (const auto& [name, v] : named_tensors(*w)) k.add(name, v);
  EXPECT_EQ(k.tensors.count("lm_head.weight"), 0u);
  EXPECT_EQ(k.tensors.count("model.layers.0.self_attn.q_proj.weight"), 1u);
  k.save(dir);
  const WeightsPtr back = load_weights(dir);
  expect_same(*w, *back);
  EXPECT_EQ(back->lm_head.data, back->embed_tokens.data);
  EXPECT_FALSE(back->layers[1].moe.e_score_correction_bias.present());
  EXPECT_FALSE(back->layers[1].moe.shared.gate_proj.present());
  EXPECT_TRUE(back->mtp.empty());
}

TEST_F(Checkpoints, MtpCopiesAndSkipping) {
  Checkpoint c(DType::bf16);
  c.at("model.layers.2.embed_tokens.weight").bytes[9] ^= std::byte{1};
  c.save(dir);
  WeightsPtr w = load_weights(dir);
  ASSERT_EQ(w->warnings.size(), 1u);
  EXPECT_NE(w->warnings[0].find("model.layers.2.embed_tokens.weight"), std::string::npos)
      << w->warnings[0];
  EXPECT_NE(w->mtp[0].embed_tokens.data, w->embed_tokens.data);  // its own is used
  EXPECT_EQ(static_cast<const std::byte*>(w->mtp[0].embed_tokens.data)[9],
            c.at("model.layers.2.embed_tokens.weight").bytes[9]);
  // Without copies: views of the main ones.
  Checkpoint(DType::bf16, "micro", false).save(dir);
  w = load_weights(dir);
  EXPECT_TRUE(w->warnings.empty());
  EXPECT_EQ(w->mtp[0].embed_tokens.data, w->embed_tokens.data);
  EXPECT_EQ(w->mtp[0].shared_head_head.data, w->lm_head.data);
  // Not requested: neither needed nor complained about.
  LoadOptions o;
  o.load_mtp = false;
  c.tensors.erase("model.layers.2.enorm.weight");
  c.save(dir);
  w = load_weights(dir, o);
  EXPECT_TRUE(w->mtp.empty());
  EXPECT_TRUE(w->warnings.empty());
  EXPECT_THROW(load_weights(dir), Error);
}

TEST_F(Checkpoints, WarningsAndIgnoredTensors) {
  Checkpoint c(DType::bf16);
  const std::string inv = "model.layers.0.self_attn.rotary_emb.inv_freq",
                    odd = "model.layers.0.mystery.weight";
  c.tensors[inv] = tensor(inv, DType::f32, {2});
  c.tensors[odd] = tensor(odd, DType::f32, {2});
  c.save(dir);
  const WeightsPtr w = load_weights(dir);
  ASSERT_EQ(w->warnings.size(), 1u);
  EXPECT_NE(w->warnings[0].find(odd), std::string::npos);
  // The bias may be stored in BF16 and arrives as float32 with the same values.
  const std::string bias = "model.layers.1.mlp.gate.e_score_correction_bias";
  OwnedTensor b{bias, DType::bf16, {8}, std::vector<std::byte>(16)};
  for (int i = 0; i < 8; ++i) {
    const uint16_t bits = spec::to_bf16(0.1f * static_cast<float>(i)).bits;
    std::memcpy(b.bytes.data() + 2 * i, &bits, 2);
  }
  c.tensors[bias] = b;
  c.save(dir);
  const WeightsPtr v = load_weights(dir);
  const TensorView& got = v->layers[1].moe.e_score_correction_bias;
  ASSERT_EQ(got.dtype, DType::f32);
  for (int i = 0; i < 8; ++i)
    EXPECT_EQ(static_cast<const float*>(got.data)[i],
              spec::to_float(spec::to_bf16(0.1f * static_cast<float>(i))));
  // FP8 tensors beside a config without quantization_config, and the reverse.
  Checkpoint f(DType::f8e4m3);
  f.config.fp8 = false;
  f.save(dir);
  ASSERT_EQ(load_weights(dir)->warnings.size(), 1u);
  c.tensors.erase(odd);
  c.config.fp8 = true;
  c.save(dir);
  ASSERT_EQ(load_weights(dir)->warnings.size(), 1u);
}

TEST_F(Checkpoints, UnalignedFilesLoad) {  // other writers do not pad: header length chosen odd
  Checkpoint c(DType::f8e4m3);
  c.save(dir);
  std::ifstream in(file("model.safetensors"), std::ios::binary);
  const std::string whole((std::istreambuf_iterator<char>(in)), {});
  uint64_t n = 0;
  std::memcpy(&n, whole.data(), 8);
  const WeightsPtr aligned = load_weights(dir);
  fs::remove(file("model.safetensors"));  // not in place: the old bytes are still mapped
  write("model.safetensors", u64(n + 1) + whole.substr(8, n) + " " + whole.substr(8 + n));
  const WeightsPtr shifted = load_weights(dir);
  expect_same(*aligned, *shifted);
  const TensorView& t = shifted->layers[1].attn.q_a_proj;
  EXPECT_EQ(reinterpret_cast<uintptr_t>(t.scale_inv) % alignof(float), 0u);
  EXPECT_EQ(to_float_vector(t), to_float_vector(aligned->layers[1].attn.q_a_proj));
}

TEST(RandomWeights, DeterministicAndScaled) {
  const ModelConfig c = load_preset("train");
  const WeightsPtr a = random_weights(c, 11, DType::f32), b = random_weights(c, 11, DType::f32),
                   other = random_weights(c, 12, DType::f32);
  expect_same(*a, *b);
  EXPECT_NE(to_float_vector(a->lm_head), to_float_vector(other->lm_head));
  auto stats = [](const TensorView& t) {
    double s1 = 0, s2 = 0;
    for (const float v : to_float_vector(t)) {
      s1 += v;
      s2 += static_cast<double>(v) * v;
    }
    const auto n = static_cast<double>(t.numel());
    return std::pair{s1 / n, s2 / n - s1 / n * s1 / n};
  };
  const auto [mean, var] = stats(a->lm_head);  // N(0, 1/in), 32768 values: five standard errors
  EXPECT_NEAR(mean, 0, 5 / std::sqrt(128.0 * 32768));
  EXPECT_NEAR(var * 128, 1, 5 * std::sqrt(2.0 / 32768));
  EXPECT_NEAR(stats(a->embed_tokens).second, 1, 5 * std::sqrt(2.0 / 32768));
  EXPECT_NEAR(stats(a->norm).first, 1, 5 * 0.1 / std::sqrt(128.0));
  // Lower precision is the same draw, rounded.
  const WeightsPtr half = random_weights(c, 11, DType::bf16);
  const std::vector<float> full = to_float_vector(a->lm_head), low = to_float_vector(half->lm_head);
  for (size_t i = 0; i < full.size(); ++i)
    ASSERT_EQ(low[i], spec::to_float(spec::to_bf16(full[i])));
  // FP8: 128x128 blocks, codes use the whole range, error within half a step of E4M3.
  const WeightsPtr q = random_weights(c, 11, DType::f8e4m3);
  const TensorView& t = q->layers[0].mlp.gate_proj;  // [384,128]
  ASSERT_EQ(t.dtype, DType::f8e4m3);
  const std::vector<float> exact = to_float_vector(a->layers[0].mlp.gate_proj),
                           approx = to_float_vector(t);
  for (int64_t r = 0; r < 384; ++r)
    for (int64_t k = 0; k < 128; ++k) {
      const auto i = static_cast<size_t>(r * 128 + k);
      const float s = t.scale_inv[r / 128];
      ASSERT_LE(std::fabs(approx[i] - exact[i]),
                std::fabs(exact[i]) * (1 / 16.0f + 1 / 256.0f) * 1.001f + s * 0x1p-10f)
          << r << " " << k;
    }
  for (int64_t block = 0; block < 3; ++block) {
    int top = 0;
    for (int64_t i = 0; i < 128 * 128; ++i)
      top = std::max(top, static_cast<const uint8_t*>(t.data)[block * 128 * 128 + i] & 0x7f);
    EXPECT_EQ(top, 0x7e) << block;
  }
  EXPECT_EQ(q->lm_head.dtype, DType::bf16);
  EXPECT_EQ(q->layers[1].moe.gate.dtype, DType::bf16);
  EXPECT_EQ(q->mtp[0].eh_proj.dtype, DType::bf16);
  EXPECT_TRUE(q->config.fp8);
}

TEST(Dequantise, BlockScalesAndRaggedTails) {  // SPEC 2.1: rnd_bf16(float(q) * scale)
  const int64_t rows = 130, cols = 257;        // 2 x 3 blocks
  std::vector<uint8_t> codes(static_cast<size_t>(rows * cols));
  std::vector<float> scales = {1, 0.5f, 3.14159f, 1e-3f, 7, 0.1f};
  for (size_t i = 0; i < codes.size(); ++i) {
    codes[i] = static_cast<uint8_t>(rng_u64({9, 9}, i));
    if ((codes[i] & 0x7f) == 0x7f) codes[i] = 0;
  }
  TensorView t;
  t.dtype = DType::f8e4m3;
  t.shape = {rows, cols};
  t.data = codes.data();
  t.scale_inv = scales.data();
  const std::vector<float> got = to_float_vector(t);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) {
      const auto i = static_cast<size_t>(r * cols + c);
      const float s = scales[static_cast<size_t>(r / 128 * 3 + c / 128)];
      ASSERT_EQ(got[i], spec::to_float(spec::to_bf16(spec::to_float(spec::f8e4m3{codes[i]}) * s)))
          << r << "," << c;
    }
}

TEST(Goldens,
     EveryGoldenCheckpointLoads) {  // written by the official Python library and transformers
  int loaded = 0;
  for (const auto& entry : fs::directory_iterator(V3B_SOURCE_DIR "/tests/goldens")) {
    if (!fs::exists(entry.path() / "config.json")) continue;
    SCOPED_TRACE(entry.path().string());
    const WeightsPtr w = load_weights(entry.path().string());
    for (const std::string& warning : w->warnings) ADD_FAILURE() << warning;
    EXPECT_FALSE(
        open_safetensors((entry.path() / "expected.safetensors").string()).tensors.empty());
    ++loaded;
  }
  EXPECT_GE(loaded, 10);
}
