// v3bench logits and generate: files in, files out, bad input (issue 7).
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>

#include "model/error.h"
#include "model/tokenizer.h"
#include "model/weights.h"
#include "scenarios/generate.h"
#include "scenarios/logits.h"

namespace v3b {
namespace {

namespace fs = std::filesystem;

std::string code_and_text(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    return std::to_string(static_cast<int>(e.code())) + " " + e.what();
  }
  return "no error";
}
bool contains(const std::string& s, const std::string& part) {
  return s.find(part) != std::string::npos;
}

class Logits : public testing::Test {
 protected:
  Logits() : dir(fs::temp_directory_path() / ("v3b_logits_" + std::to_string(getpid()))) {
    fs::create_directories(dir);
  }
  ~Logits() override { fs::remove_all(dir); }
  std::string write(const std::string& name, const std::string& text) const {
    std::ofstream(dir / name) << text;
    return (dir / name).string();
  }
  fs::path dir;
  const fs::path golden = fs::path(V3B_SOURCE_DIR) / "tests" / "goldens" / "base_f32";
};

TEST_F(Logits, NpyHoldsTheGoldenLogits) {
  const auto want_file = model::open_safetensors((golden / "expected.safetensors").string());
  const auto want = model::to_float_vector(want_file.tensors.at("logits"));
  const struct {
    const char *backend, *dtype;
    double tol;
    int64_t chunk;
  } cases[] = {{"reference", "", 1e-6, 0},
               {"reference", "f32", 1e-5, 5},
               {"cpu", "f32", 1e-4, 0},
               {"cpu", "", 3e-2, 3},
               {"cpu_bf16", "", 3e-2, 0}};
  for (const auto& c : cases) {
    scen::LogitsOptions o;
    o.model = golden.string();
    o.tokens = (golden / "tokens.txt").string();
    o.backend = c.backend;
    o.dtype = c.dtype;
    o.chunk = c.chunk;
    o.out = (dir / "out.npy").string();
    EXPECT_EQ(scen::run_logits(o), 0);
    EXPECT_FALSE(fs::exists(o.out + ".partial"));
    const std::string bytes = scen::read_text_file(o.out);
    ASSERT_EQ(bytes.substr(0, 8), std::string("\x93NUMPY\x01\x00", 8));
    const size_t header =
        10 + static_cast<unsigned char>(bytes[8]) + 256u * static_cast<unsigned char>(bytes[9]);
    EXPECT_EQ(header % 64, 0u);
    EXPECT_TRUE(contains(bytes.substr(0, header),
                         "'descr': '<f4', 'fortran_order': False, 'shape': (16, 96)"));
    ASSERT_EQ(bytes.size(), header + want.size() * 4);
    std::vector<float> got(want.size());
    std::memcpy(got.data(), bytes.data() + header, got.size() * 4);
    double d = 0, n = 0;
    for (size_t i = 0; i < got.size(); ++i)
      d += std::pow(double(got[i]) - want[i], 2), n += double(want[i]) * want[i];
    EXPECT_TRUE(std::sqrt(d / n) <= c.tol)
        << c.backend << " " << c.dtype << " " << std::sqrt(d / n);
  }
}

TEST_F(Logits, TokenFiles) {
  EXPECT_EQ(scen::parse_token_ids(" 1, 2\n3,,4\r\n\t5 ", "f", 6),
            (std::vector<int32_t>{1, 2, 3, 4, 5}));
  const auto error = [](const std::string& text) {
    return code_and_text([&] { (void)scen::parse_token_ids(text, "ids.txt", 100); });
  };
  EXPECT_EQ(
      error("1 2\n3 x4 5"),
      "65 ids.txt, line 2, column 3 (token 3): not a token id; expected an integer, found 'x4'");
  EXPECT_EQ(error("1 100"),
            "65 ids.txt, line 1, column 3 (token 1): token id out of range; expected 0 <= id < "
            "100, found 100");
  EXPECT_TRUE(contains(error("-1"), "out of range"));
  EXPECT_TRUE(contains(error("99999999999999999999999"), "out of range"));
  EXPECT_TRUE(contains(error("1.5"), "not a token id"));
  EXPECT_TRUE(contains(error(" ,\n"), "no token ids"));
}

TEST_F(Logits, BadFiles) {
  scen::LogitsOptions o;
  o.model = golden.string();
  o.tokens = (golden / "tokens.txt").string();
  o.out = (dir / "out.npy").string();
  const auto error = [](const scen::LogitsOptions& x) {
    return code_and_text([&] { (void)scen::run_logits(x); });
  };
  auto x = o;
  x.tokens = (dir / "none.txt").string();
  EXPECT_TRUE(error(x).starts_with("66 ")) << error(x);
  x = o;
  x.tokens = dir.string();
  EXPECT_TRUE(error(x).starts_with("66 ")) << error(x);
  x = o;
  x.model = (dir / "nothing").string();
  EXPECT_TRUE(error(x).starts_with("66 ")) << error(x);
  x = o;
  x.out = (dir / "no" / "such" / "folder.npy").string();
  EXPECT_TRUE(error(x).starts_with("74 ")) << error(x);
  x = o;
  x.dtype = "f16";
  EXPECT_TRUE(error(x).starts_with("64 ")) << error(x);
  x = o;
  std::string many;
  for (int i = 0; i < 257; ++i) many += "1 ";
  x.tokens = write("many.txt", many);
  EXPECT_TRUE(error(x).starts_with("65 ") && contains(error(x), "at most 256")) << error(x);
  EXPECT_FALSE(fs::exists(o.out));
  x = o;
  x.out = "/dev/full";
  EXPECT_TRUE(error(x).starts_with("74 ")) << error(x);
}

// A checkpoint folder with random weights and the shipped tokenizer.
class Generate : public Logits {
 protected:
  Generate() {
    const fs::path tokenizer = fs::path(V3B_SOURCE_DIR) / "model" / "tiny-v3" / "tokenizer.model";
    model::ModelConfig c = model::load_preset("micro");
    c.vocab_size = model::Tokenizer::load(tokenizer.string()).vocab_size();
    c.max_position_embeddings = 256;
    const auto w = model::random_weights(c, 3, spec::DType::bf16);
    std::vector<model::OwnedTensor> tensors;
    for (const auto& [name, t] : model::named_tensors(*w)) {
      const auto* p = static_cast<const std::byte*>(t.data);
      tensors.push_back({name, t.dtype, t.shape, {p, p + t.numel() * spec::dtype_bytes(t.dtype)}});
    }
    model::save_safetensors((dir / "model.safetensors").string(), tensors);
    std::ofstream(dir / "config.json") << model::config_to_json(c);
    fs::copy_file(tokenizer, dir / "tokenizer.model");
    o.model = dir.string();
    o.prompt = "The quick brown fox";
    o.max_new = 24;
    o.backend = "cpu_f32";
    o.threads = 1;
  }
  std::string run(int& code) {
    testing::internal::CaptureStdout();
    testing::internal::CaptureStderr();
    code = scen::run_generate(o);
    err = testing::internal::GetCapturedStderr();
    return testing::internal::GetCapturedStdout();
  }
  scen::GenerateOptions o;
  std::string err;
};

TEST_F(Generate, SpeculativeTextEqualsPlainText) {
  int code = -1;
  o.compare = true;
  const std::string fast = run(code);
  EXPECT_EQ(code, 0);
  EXPECT_TRUE(contains(err, "tokens identical") || contains(err, "a near-tie")) << err;
  EXPECT_TRUE(contains(err, "draft 1 accepted")) << err;
  o.compare = false;
  o.mtp = false;
  const std::string plain = run(code);
  EXPECT_EQ(code, 0);
  EXPECT_TRUE(contains(err, "plain: prompt")) << err;
  EXPECT_EQ(fast, plain);
  EXPECT_GT(plain.size(), 1u);
}

TEST_F(Generate, SampledRunsRepeat) {
  int code = -1;
  o.greedy = false;
  const std::string a = run(code), b = run(code);
  EXPECT_EQ(a, b);
  o.seed = 2;
  EXPECT_NE(run(code), a);
}

TEST_F(Generate, BadPrompts) {
  const auto error = [&] { return code_and_text([&] { (void)scen::run_generate(o); }); };
  o.prompt = "";
  EXPECT_TRUE(error().starts_with("65 ")) << error();
  o.prompt = "abc\xff";
  EXPECT_TRUE(error().starts_with("65 ")) << error();
  o.prompt.clear();
  o.prompt_file = (dir / "none.txt").string();
  EXPECT_TRUE(error().starts_with("66 ")) << error();
  o.prompt_file = write("long.txt", std::string(4000, 'q'));
  EXPECT_FALSE(error().starts_with("no error")) << error();
  o.prompt_file = write("ok.txt", "text");
  o.temperature = 0;
  o.greedy = false;
  EXPECT_TRUE(error().starts_with("64 ")) << error();
}

}  // namespace
}  // namespace v3b
