// Tokenizer round trips, corpus index errors, the token stream and its cache.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>

#include "model/corpus.h"
#include "model/error.h"
#include "model/tokenizer.h"

namespace {

namespace fs = std::filesystem;
using v3b::Error;
using v3b::ExitCode;
using v3b::model::Corpus;
using v3b::model::find_invalid_utf8;
using v3b::model::Tokenizer;
using v3b::model::TokenStream;

const std::string kModel = std::string(V3B_SOURCE_DIR) + "/model/tiny-v3/tokenizer.model";
const std::string kHeader = "doc_id\tdomain\tpackage\toffset_bytes\tlength_bytes\n";

const Tokenizer& shipped() {
  static const Tokenizer t = Tokenizer::load(kModel);
  return t;
}

class Folder {
 public:
  Folder() {
    std::string name = (fs::temp_directory_path() / "v3b_corpus_XXXXXX").string();
    path_ = mkdtemp(name.data());
  }
  ~Folder() { fs::remove_all(path_); }
  std::string file(const std::string& name) const { return path_ + "/" + name; }
  void write(const std::string& name, const std::string& data) const {
    std::ofstream(file(name), std::ios::binary) << data;
  }
  std::string read(const std::string& name) const {
    std::ifstream f(file(name), std::ios::binary);
    std::ostringstream s;
    s << f.rdbuf();
    return s.str();
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// Runs f, expects a v3b::Error with this code whose line holds every one of the parts.
template <typename F>
void expect_error(F f, ExitCode code, const std::vector<std::string>& parts) {
  try {
    f();
    ADD_FAILURE() << "no error, expected one with: " << parts.front();
  } catch (const Error& e) {
    EXPECT_EQ(static_cast<int>(e.code()), static_cast<int>(code)) << e.what();
    for (const std::string& p : parts)
      EXPECT_NE(std::string(e.what()).find(p), std::string::npos)
          << p << " is not in: " << e.what();
  }
}

std::string utf8(char32_t c) {
  std::string s;
  if (c < 0x80) return {static_cast<char>(c)};
  const int n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
  static const unsigned kLead[] = {0, 0, 0xc0, 0xe0, 0xf0};
  s += static_cast<char>(kLead[n] | (c >> (6 * (n - 1))));
  for (int k = n - 2; k >= 0; --k) s += static_cast<char>(0x80 | ((c >> (6 * k)) & 0x3f));
  return s;
}

TEST(Tokenizer, ShippedModel) {
  const Tokenizer& t = shipped();
  EXPECT_EQ(t.vocab_size(), 4096);
  EXPECT_EQ(t.bos(), 0);
  EXPECT_EQ(t.eos(), 1);
  EXPECT_EQ(t.unk(), 2);
  EXPECT_EQ(t.piece_bytes(t.bos()), "");
  EXPECT_EQ(t.fingerprint().size(), 16u);
  EXPECT_TRUE(t.encode("").empty());
  EXPECT_EQ(t.decode({}), "");
}

TEST(Tokenizer, RoundTripOfAwkwardTexts) {
  const Tokenizer& t = shipped();
  std::string run;
  for (int i = 1; i < 70; ++i)
    run += std::string(static_cast<size_t>(i), ' ') + "x\n" +
           std::string(static_cast<size_t>(i % 7), '\n');
  const std::string texts[] = {" ",
                               "  ",
                               "\n",
                               "\n\n\n\n",
                               "\t",
                               "\t\t \n \t",
                               " a",
                               "a ",
                               "  a  b   c    ",
                               "\r\n",
                               "\r",
                               "def f(x):\n    return x  # \xc3\xa9\n",
                               "<s></s><unk><0x41><0x0A>",
                               "\xe2\x96\x81",
                               "a\xe2\x96\x81 \xe2\x96\x81\xe2\x96\x81 b",
                               "\xe2\x90\xa4",
                               "\xef\xac\x81 \xef\xbc\xa1 \xc2\xa0.",
                               "e\xcc\x81",
                               "\xe6\xbc\xa2\xe5\xad\x97 \xf0\x9f\x98\x80",
                               "\xef\xbb\xbf"
                               "bom",
                               std::string("a\0b", 3),
                               std::string(1, '\0'),
                               "\x01\x7f\x1b[0m",
                               std::string(20000, 'a'),
                               std::string(20000, '\n'),
                               run};
  for (const std::string& s : texts) {
    const auto ids = t.encode(s);
    EXPECT_EQ(t.decode(ids), s);
    for (const int32_t id : ids) {
      ASSERT_GE(id, 3);  // never bos, eos, unk
      ASSERT_LT(id, t.vocab_size());
    }
  }
}

TEST(Tokenizer, RoundTripOfRandomTexts) {
  const Tokenizer& t = shipped();
  std::mt19937 rng(7);
  const char32_t ranges[][2] = {{0, 0x7f},        {' ', ' '},       {'\n', '\n'},
                                {'a', 'z'},       {0x80, 0x7ff},    {0x800, 0xd7ff},
                                {0x2580, 0x2583}, {0xe000, 0xffff}, {0x10000, 0x10ffff}};
  for (int round = 0; round < 300; ++round) {
    std::string s;
    const size_t n = std::uniform_int_distribution<size_t>(1, 400)(rng);
    for (size_t i = 0; i < n; ++i) {
      const auto& r = ranges[std::uniform_int_distribution<int>(0, 8)(rng)];
      s += utf8(std::uniform_int_distribution<char32_t>(r[0], r[1])(rng));
    }
    ASSERT_EQ(find_invalid_utf8(s), std::string_view::npos);
    ASSERT_EQ(t.decode(t.encode(s)), s) << "round " << round;
  }
}

TEST(Tokenizer, PieceBytesAreDecode) {
  const Tokenizer& t = shipped();
  std::string all;
  std::vector<int32_t> ids;
  for (int32_t id = 0; id < t.vocab_size(); ++id) {
    ids.push_back(id);
    all += t.piece_bytes(id);
    if (id > 2) {
      EXPECT_FALSE(t.piece_bytes(id).empty()) << id;
    }
  }
  EXPECT_EQ(t.decode(ids), all);
}

TEST(Tokenizer, PiecesCoverNewlinesAndIndentation) {
  const Tokenizer& t = shipped();
  EXPECT_EQ(t.encode("\n").size(), 1u);
  EXPECT_EQ(t.encode("        ").size(), 1u);
  EXPECT_EQ(t.encode(".\n\n").size(), 1u);
}

TEST(Tokenizer, Errors) {
  const Tokenizer& t = shipped();
  expect_error([&] { t.encode("ab\xff", "x.txt"); }, ExitCode::bad_input,
               {"x.txt, byte 2", "0xff"});
  const std::vector<int32_t> bad = {5, 4096}, negative = {-1};
  expect_error([&] { t.decode(bad); }, ExitCode::bad_input, {"position 1", "4096"});
  expect_error([&] { t.decode(negative); }, ExitCode::bad_input, {"position 0", "-1"});
  expect_error([] { Tokenizer::load("/nowhere/t.model"); }, ExitCode::not_found,
               {"/nowhere/t.model"});
  const Folder dir;
  dir.write("empty.model", "");
  dir.write("garbage.model", "this is no protocol buffer");
  for (const char* name : {"empty.model", "garbage.model"})
    expect_error([&] { Tokenizer::load(dir.file(name)); }, ExitCode::bad_input, {name});
  std::ifstream f(kModel, std::ios::binary);
  std::string half(20000, '\0');
  f.read(half.data(), 20000);
  dir.write("half.model", half);
  expect_error([&] { Tokenizer::load(dir.file("half.model")); }, ExitCode::bad_input,
               {"half.model"});
}

TEST(Utf8, FindsTheFirstBadByte) {
  const std::pair<std::string, size_t> cases[] = {{"\x80", 0},
                                                  {"a\xc0\x80", 1},
                                                  {"ab\xc1\xbf", 2},
                                                  {"\xe0\x9f\xbf", 0},
                                                  {"\xed\xa0\x80", 0},
                                                  {"\xf0\x8f\xbf\xbf", 0},
                                                  {"\xf4\x90\x80\x80", 0},
                                                  {"\xf5\x80\x80\x80", 0},
                                                  {"x\xe2\x82", 1},
                                                  {"\xc3", 0},
                                                  {"\xc3\xa9\xc3(", 2}};
  for (const auto& [text, where] : cases) EXPECT_EQ(find_invalid_utf8(text), where);
  for (const std::string s : {"", "\xc2\x80", "\xef\xbf\xbf", "\xf4\x8f\xbf\xbf", "\xed\x9f\xbf"})
    EXPECT_EQ(find_invalid_utf8(s), std::string_view::npos);
}

// Three documents; the second is not ASCII.
void write_small(const Folder& dir) {
  dir.write("train.txt", "first one\nh\xc3\xa9 two\nthird\n\n");
  dir.write("train.index.tsv",
            kHeader + "p/a\tprose\tp\t0\t10\np/b\tcode\tp\t10\t8\np/c\tprose\tq\t18\t7\n");
}

TEST(Corpus, LoadsDocuments) {
  const Folder dir;
  write_small(dir);
  const Corpus c = Corpus::load(dir.path(), "train");
  ASSERT_EQ(c.documents().size(), 3u);
  EXPECT_EQ(c.documents()[0].text, "first one\n");
  EXPECT_EQ(c.documents()[1].text, "h\xc3\xa9 two\n");
  EXPECT_EQ(c.documents()[1].domain, "code");
  EXPECT_EQ(c.documents()[2].id, "p/c");
  EXPECT_EQ(c.documents()[2].package, "q");
  EXPECT_EQ(c.documents()[2].text, "third\n\n");
}

TEST(Corpus, Errors) {
  const Folder dir;
  const auto load = [&] { Corpus::load(dir.path(), "train"); };
  expect_error(load, ExitCode::not_found, {"train.txt"});
  expect_error([&] { Corpus::load(dir.path(), "test"); }, ExitCode::usage, {"heldout", "test"});
  write_small(dir);
  fs::remove(dir.file("train.index.tsv"));
  expect_error(load, ExitCode::not_found, {"train.index.tsv"});
  const struct {
    std::string table, place;
  } cases[] = {
      {"", "line 1"},
      {"doc_id\tdomain\tpackage\tlength_bytes\toffset_bytes\np\tprose\tp\t25\t0\n", "line 1"},
      {kHeader + "p/a\tprose\tp\t0\n", "line 2"},
      {kHeader + "p/a\tprose\tp\t0\t10\tmore\n", "line 2"},
      {kHeader + "p/a\tprose\tp\t0\tten\n", "line 2"},
      {kHeader + "p/a\tprose\tp\t0\t-3\n", "line 2"},
      {kHeader + "p/a\tprose\tp\t0\t99999999999999999999\n", "line 2"},
      {kHeader + "p/a\tprose\tp\t0\t26\n", "line 2"},
      {kHeader + "p/a\tprose\tp\t0\t0\n", "line 2"},
      {kHeader + "p/a\tprose\tp\t1\t24\n", "line 2"},
      {kHeader + "p/a\tprose\tp\t0\t12\np/b\tcode\tp\t12\t13\n", "line 3"},  // in the middle of é
      {kHeader + "p/a\tprose\tp\t0\t10\n", "25 bytes"}};
  for (const auto& c : cases) {
    dir.write("train.index.tsv", c.table);
    expect_error(load, ExitCode::bad_input, {"train.index.tsv", c.place});
  }
  write_small(dir);
  dir.write("train.txt", "first one\nh\xc3(two \nthird\n\n");
  expect_error(load, ExitCode::bad_input, {"train.txt, byte 11", "0xc3"});
  dir.write("train.txt", "");
  expect_error(load, ExitCode::bad_input, {"train.txt, byte 0", "empty"});
}

TEST(Corpus, TextFile) {
  const Folder dir;
  dir.write("my.txt", "some text");
  const Corpus c = Corpus::load_text_file(dir.file("my.txt"));
  ASSERT_EQ(c.documents().size(), 1u);
  EXPECT_EQ(c.documents()[0].text, "some text");
  dir.write("my.txt", "latin \xe9 one");
  expect_error([&] { Corpus::load_text_file(dir.file("my.txt")); }, ExitCode::bad_input,
               {"my.txt, byte 6", "0xe9"});
  dir.write("my.txt", "");
  expect_error([&] { Corpus::load_text_file(dir.file("my.txt")); }, ExitCode::bad_input, {"empty"});
  expect_error([&] { Corpus::load_text_file(dir.file("no.txt")); }, ExitCode::not_found,
               {"no.txt"});
}

void expect_same(const TokenStream& a, const TokenStream& b) {
  EXPECT_EQ(a.ids, b.ids);
  EXPECT_EQ(a.token_begin, b.token_begin);
  EXPECT_EQ(a.byte_begin, b.byte_begin);
}

TEST(TokenStream, BordersAndCache) {
  const Folder dir;
  write_small(dir);
  const Tokenizer& t = shipped();
  const Corpus c = Corpus::load(dir.path(), "train");
  const std::string cache = default_cache_path(c);
  EXPECT_EQ(cache, dir.file("train.tokens.bin"));
  const TokenStream plain = tokenize_corpus(c, t);
  ASSERT_EQ(plain.num_documents(), 3);
  for (int64_t d = 0; d < 3; ++d) {
    const auto ids = plain.document(d);
    EXPECT_EQ(ids[0], t.bos());
    EXPECT_EQ(t.decode(ids), c.documents()[static_cast<size_t>(d)].text);
    EXPECT_EQ(plain.document_bytes(d),
              static_cast<int64_t>(c.documents()[static_cast<size_t>(d)].text.size()));
  }
  EXPECT_EQ(t.decode(plain.ids), c.text());

  const TokenStream first = tokenize_corpus(c, t, cache);
  EXPECT_EQ(first.cache, "written");
  expect_same(first, plain);
  const TokenStream second = tokenize_corpus(c, t, cache);
  EXPECT_EQ(second.cache, "read");
  expect_same(second, plain);

  // Any damage is seen and repaired: one bit anywhere, a cut, a longer file.
  const std::string good = dir.read("train.tokens.bin");
  for (size_t i = 0; i < good.size(); i += 7) {
    std::string bad = good;
    bad[i] = static_cast<char>(bad[i] ^ 4);
    dir.write("train.tokens.bin", bad);
    const TokenStream s = tokenize_corpus(c, t, cache);
    ASSERT_EQ(s.cache, "written") << "byte " << i;
    expect_same(s, plain);
  }
  for (const std::string& bad :
       {std::string(), good.substr(0, 40), good.substr(0, good.size() - 1), good + "x"}) {
    dir.write("train.tokens.bin", bad);
    EXPECT_EQ(tokenize_corpus(c, t, cache).cache, "written");
  }
  EXPECT_EQ(dir.read("train.tokens.bin"), good);

  // Another text, and the same text cut at other places, are other keys.
  dir.write("train.txt", "First one\nh\xc3\xa9 two\nthird\n\n");
  EXPECT_EQ(tokenize_corpus(Corpus::load(dir.path(), "train"), t, cache).cache, "written");
  dir.write("train.index.tsv",
            kHeader + "p/a\tprose\tp\t0\t9\np/b\tcode\tp\t9\t9\np/c\tprose\tq\t18\t7\n");
  const TokenStream moved = tokenize_corpus(Corpus::load(dir.path(), "train"), t, cache);
  EXPECT_EQ(moved.cache, "written");
  EXPECT_EQ(moved.document_bytes(0), 9);
}

TEST(TokenStream, UnwritableCacheIsNoError) {
  const Folder dir;
  write_small(dir);
  const TokenStream s =
      tokenize_corpus(Corpus::load(dir.path(), "train"), shipped(), dir.file("no/such/folder.bin"));
  EXPECT_NE(s.cache.find("cannot write"), std::string::npos) << s.cache;
  EXPECT_EQ(s.num_documents(), 3);
}

// The real held-out split where scripts/build_corpus.py has run (scripts/test.sh runs it).
TEST(RealCorpus, HeldOut) {
  const std::string dir = std::string(V3B_SOURCE_DIR) + "/build/corpus";
  if (!fs::exists(dir + "/heldout.txt")) GTEST_SKIP() << "no " << dir;
  const Corpus c = Corpus::load(dir, "heldout");
  const TokenStream s = tokenize_corpus(c, shipped());  // throws unless all documents come back
  EXPECT_GT(c.text().size(), 900'000u);
  EXPECT_LT(c.text().size(), 1'600'000u);
  int long_prose = 0, long_code = 0;
  for (int64_t d = 0; d < s.num_documents(); ++d) {
    const bool is_long = s.document(d).size() > 16384;
    const std::string& domain = c.documents()[static_cast<size_t>(d)].domain;
    long_prose += is_long && domain == "prose";
    long_code += is_long && domain == "code";
  }
  EXPECT_GE(long_prose, 2);
  EXPECT_GE(long_code, 2);
  const double bytes_per_token =
      static_cast<double>(c.text().size()) / static_cast<double>(s.ids.size());
  EXPECT_GT(bytes_per_token, 3.0);
}

}  // namespace
