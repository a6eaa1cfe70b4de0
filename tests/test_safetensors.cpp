// The safetensors container: round trips, and every way a file may lie (SPEC 2.3 rule 6; issue
// section 7). Each rejection must name file, place, expected and found.
#include "checkpoint_testing.h"

using namespace checkpoint_testing;

namespace {
using SafetensorsFiles = Folder;
}  // namespace

TEST_F(SafetensorsFiles, RoundTripOfEveryDtype) {
  std::vector<OwnedTensor> in;
  const DType all[] = {DType::f64,    DType::f32, DType::bf16, DType::f16,
                       DType::f8e4m3, DType::i64, DType::i32,  DType::u8};
  for (const DType t : all)
    in.push_back(tensor(std::string("a.") + spec::dtype_name(t), t, {3, 5}));
  in.push_back(tensor("scalar", DType::f32, {}));
  in.push_back(tensor("empty", DType::f32, {0, 7}));
  in.push_back(tensor("odd", DType::u8, {1}));
  in.push_back(tensor("deep", DType::bf16, {2, 1, 3, 1, 2}));
  in.push_back(tensor("n\"a\\me \xc3\xa9", DType::f16, {2}));
  save_safetensors(file(), in, {{"format", "pt"}, {"note", "x"}});
  const SafetensorsFile f = open_safetensors(file());
  EXPECT_EQ(f.metadata, (std::map<std::string, std::string>{{"format", "pt"}, {"note", "x"}}));
  ASSERT_EQ(f.tensors.size(), in.size());
  for (const OwnedTensor& t : in) {
    const TensorView& v = f.tensors.at(t.name);
    EXPECT_EQ(v.name, t.name);
    EXPECT_EQ(v.dtype, t.dtype);
    EXPECT_EQ(v.shape, t.shape);
    if (!t.bytes.empty()) {
      EXPECT_EQ(std::memcmp(v.data, t.bytes.data(), t.bytes.size()), 0) << t.name;
    }
    // The payload starts 8-aligned and wide types come first, so every tensor is aligned for its
    // type.
    EXPECT_EQ(
        reinterpret_cast<uintptr_t>(v.data) % static_cast<uintptr_t>(spec::dtype_bytes(v.dtype)),
        0u)
        << t.name;
  }
  // No temporary file is left, and saving again replaces.
  save_safetensors(file(), {in[0]});
  EXPECT_EQ(open_safetensors(file()).tensors.size(), 1u);
  EXPECT_EQ(std::distance(fs::directory_iterator(dir), fs::directory_iterator{}), 1);
  save_safetensors(file(), {});
  EXPECT_TRUE(open_safetensors(file()).tensors.empty());
}

TEST_F(SafetensorsFiles, LyingHeaders) {
  const std::string ok = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  struct Bad {
    const char* name;
    std::string bytes;
    std::vector<std::string> parts;
  };
  auto entry = [](const std::string& body) { return "{\"a\":{" + body + "}}"; };
  auto two = [](const std::string& a, const std::string& b) {
    return R"({"a":{"dtype":"U8","shape":[4],"data_offsets":)" + a +
           R"(},"b":{"dtype":"U8","shape":[4],"data_offsets":)" + b + "}}";
  };
  const std::vector<Bad> cases = {
      {"empty file", "", {"header length", "8 bytes", "found 0"}},
      {"7 bytes", std::string(7, 'x'), {"header length", "found 7"}},
      {"only a length", u64(100), {"byte 0", "found 100"}},
      {"length 0", container("", 8), {"found 0"}},
      {"length beyond the file", u64(ok.size() + 9) + ok + std::string(8, '\0'), {"byte 0"}},
      {"length 2^63", u64(uint64_t{1} << 63) + ok, {"found 9223372036854775808"}},
      {"length 2^64-1", u64(~uint64_t{0}) + ok, {"found 18446744073709551615"}},
      {"truncated header", container(ok.substr(0, 30), 0), {"JSON syntax", "header"}},
      {"not an object", container("[1]", 0), {"byte 8", "found byte 91"}},
      {"leading space", container(" {}", 0), {"byte 8"}},
      {"garbage after", container(ok + "x", 8), {"JSON syntax"}},
      {"binary", container(std::string("{\xff\x00\x01", 4), 0), {"JSON syntax"}},
      {"nested",
       container("{\"a\":" + std::string(5000, '[') + std::string(5000, ']') + "}", 0),
       {"nesting"}},
      {"duplicate name",
       container(R"({"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},)"
                 R"("a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})",
                 0),
       {"duplicate key", "\"a\" twice"}},
      {"entry not an object", container(R"({"a":3})", 0), {"tensor \"a\"", "found 3"}},
      {"no dtype",
       container(entry(R"("shape":[2],"data_offsets":[0,8])"), 8),
       {"tensor \"a\"", "dtype"}},
      {"no shape", container(entry(R"("dtype":"F32","data_offsets":[0,8])"), 8), {"shape"}},
      {"no offsets", container(entry(R"("dtype":"F32","shape":[2])"), 8), {"data_offsets"}},
      {"extra key",
       container(entry(R"("dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1)"), 8),
       {"key \"x\""}},
      {"unknown dtype",
       container(entry(R"("dtype":"F8_E5M2","shape":[2],"data_offsets":[0,2])"), 2),
       {"dtype", "F8_E4M3", "F8_E5M2"}},
      {"dtype number",
       container(entry(R"("dtype":7,"shape":[2],"data_offsets":[0,8])"), 8),
       {"dtype", "found 7"}},
      {"negative shape",
       container(entry(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])"), 8),
       {"shape", "found -2"}},
      {"fraction",
       container(entry(R"("dtype":"F32","shape":[2.0],"data_offsets":[0,8])"), 8),
       {"shape", "found 2.0"}},
      {"shape text",
       container(entry(R"("dtype":"F32","shape":"2","data_offsets":[0,8])"), 8),
       {"shape"}},
      {"shape overflow",
       container(entry(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8])"), 8),
       {"shape", "2^63"}},
      {"shape wraps to 8 bytes",
       container(
           entry(
               R"("dtype":"F32","shape":[9223372036854775807,2,2305843009213693953],"data_offsets":[0,8])"),
           8),
       {"shape", "2^63"}},
      {"shape beyond int64",
       container(entry(R"("dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,8])"), 8),
       {"shape", "2^63"}},
      {"rank 17",
       container(
           entry(
               R"("dtype":"U8","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],"data_offsets":[0,1])"),
           1),
       {"shape", "at most 16"}},
      {"one offset",
       container(entry(R"("dtype":"F32","shape":[2],"data_offsets":[8])"), 8),
       {"two integers"}},
      {"negative offset",
       container(entry(R"("dtype":"F32","shape":[2],"data_offsets":[-8,0])"), 8),
       {"found -8"}},
      {"reversed",
       container(entry(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])"), 8),
       {"begin <= end"}},
      {"beyond the file",
       container(entry(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])"), 7),
       {"<= 7 (payload"}},
      {"far beyond",
       container(entry(R"("dtype":"F32","shape":[2],"data_offsets":[1099511627776,1099511627784])"),
                 8),
       {"<= 8 (payload"}},
      {"wrong size",
       container(entry(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])"), 8),
       {"12 bytes", "found 8"}},
      {"zero elements with bytes",
       container(entry(R"("dtype":"F32","shape":[0,2],"data_offsets":[0,8])"), 8),
       {"0 bytes", "found 8"}},
      {"overlap",
       container(two("[0,4]", "[2,6]"), 6),
       {"overlap", "tensor \"b\"", "byte 4", "byte 2"}},
      {"same bytes twice", container(two("[0,4]", "[0,4]"), 4), {"overlap"}},
      {"hole", container(two("[0,4]", "[5,9]"), 9), {"hole", "tensor \"b\"", "byte 4", "byte 5"}},
      {"hole in front",
       container(two("[1,5]", "[5,9]"), 9),
       {"hole", "tensor \"a\"", "byte 0", "byte 1"}},
      {"trailing bytes", container(ok, 9), {"payload length", "8 bytes", "found 9"}},
      {"metadata number",
       container(R"({"__metadata__":{"k":1}})", 0),
       {"__metadata__.k", "a string", "found 1"}},
      {"metadata list", container(R"({"__metadata__":[]})", 0), {"__metadata__", "found []"}},
  };
  for (const Bad& b : cases) {
    SCOPED_TRACE(b.name);
    write("bad.safetensors", b.bytes);
    std::vector<std::string> parts = b.parts;
    parts.push_back(file("bad.safetensors"));
    expect_error(attempt([&] { open_safetensors(file("bad.safetensors")); }), ExitCode::bad_input,
                 parts);
  }
  write("good.safetensors", container(ok + "   ", 8));  // trailing spaces are the official padding
  EXPECT_EQ(open_safetensors(file("good.safetensors")).tensors.size(), 1u);
}

TEST_F(SafetensorsFiles, EveryTruncationIsRejected) {
  save_safetensors(file(), {tensor("a", DType::f32, {3}), tensor("b", DType::bf16, {5})},
                   {{"k", "v"}});
  std::ifstream in(file(), std::ios::binary);
  const std::string whole((std::istreambuf_iterator<char>(in)), {});
  for (size_t n = 0; n < whole.size(); ++n) {
    write("cut.safetensors", whole.substr(0, n));
    EXPECT_EQ(attempt([&] { open_safetensors(file("cut.safetensors")); }).code, ExitCode::bad_input)
        << n;
  }
  // Single corrupted header bytes: rejected, or the file still describes tensors inside itself.
  for (size_t i = 0; i < whole.size() - 22; ++i)
    for (const unsigned char flip : {0x01, 0x80, 0xff}) {
      std::string bytes = whole;
      bytes[i] = static_cast<char>(static_cast<unsigned char>(bytes[i]) ^ flip);
      write("flip.safetensors", bytes);
      try {
        const SafetensorsFile f = open_safetensors(file("flip.safetensors"));
        for (const auto& [name, v] : f.tensors) {
          volatile uint8_t sum = 0;  // ASan would see a read outside the mapping
          for (int64_t k = 0; k < v.numel() * spec::dtype_bytes(v.dtype); ++k)
            sum = static_cast<uint8_t>(sum + static_cast<const uint8_t*>(v.data)[k]);
        }
      } catch (const Error& e) {
        EXPECT_EQ(e.code(), ExitCode::bad_input) << e.what();
      }
    }
}

TEST_F(SafetensorsFiles, UnreadableAndUnwritable) {
  expect_error(attempt([&] { open_safetensors(file("none")); }), ExitCode::not_found,
               {file("none")});
  expect_error(attempt([&] { open_safetensors(dir); }), ExitCode::bad_input, {dir, "directory"});
  const std::vector<OwnedTensor> one = {tensor("a", DType::f32, {3})};
  expect_error(attempt([&] { save_safetensors("/nonexistent/x.safetensors", one); }),
               ExitCode::cannot_write, {"/nonexistent/x.safetensors", "No such file"});
  ASSERT_EQ(::mkdir(file("d").c_str(), 0700), 0);
  expect_error(attempt([&] { save_safetensors(file("d"), one); }), ExitCode::cannot_write,
               {file("d"), "directory"});
  OwnedTensor wrong = one[0];
  wrong.bytes.pop_back();
  expect_error(attempt([&] { save_safetensors(file("w"), {wrong}); }), ExitCode::cannot_write,
               {"12 bytes", "found 11"});
  expect_error(attempt([&] {
                 save_safetensors(file("w"), {one[0], one[0]});
               }),
               ExitCode::cannot_write, {"duplicate"});
  EXPECT_FALSE(fs::exists(file("w")));
  // A full disk, as a file size limit: the old file stays, no temporary is left.
  save_safetensors(file("full"), one);
  std::signal(SIGXFSZ, SIG_IGN);
  rlimit old{}, small{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &old), 0);
  small = old;
  small.rlim_cur = 4096;
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  const Outcome o =
      attempt([&] { save_safetensors(file("full"), {tensor("big", DType::f32, {5000})}); });
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &old), 0);
  std::signal(SIGXFSZ, SIG_DFL);
  expect_error(o, ExitCode::cannot_write, {file("full"), "too large"});
  EXPECT_EQ(open_safetensors(file("full")).tensors.count("a"), 1u);
  EXPECT_EQ(std::distance(fs::directory_iterator(dir), fs::directory_iterator{}),
            2);  // "d" and "full"
}
