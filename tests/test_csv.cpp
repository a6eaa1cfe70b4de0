// CSV writer and reader: round trip, quoting, bad files, resume, full disk (DESIGN 5).
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>

#include "model/error.h"
#include "reports/csv.h"
#include "reports/machine.h"
#include "reports/row.h"
#include "reports/table.h"

namespace v3b::rep {
namespace {

struct Folder {
  std::string path =
      std::filesystem::temp_directory_path() / ("v3b_csv_" + std::to_string(getpid()));
  Folder() { std::filesystem::create_directories(path); }
  ~Folder() { std::filesystem::remove_all(path); }
  std::string operator/(const std::string& name) const { return path + "/" + name; }
};

void put(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}
std::string slurp(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream s;
  s << in.rdbuf();
  return s.str();
}

// The exit code and message of what `f` throws.
template <class F>
std::pair<int, std::string> error_of(F&& f) {
  try {
    f();
  } catch (const Error& e) {
    return {static_cast<int>(e.code()), e.what()};
  }
  return {0, ""};
}

void expect_error(const std::pair<int, std::string>& got, ExitCode code,
                  std::initializer_list<const char*> parts) {
  EXPECT_EQ(got.first, static_cast<int>(code)) << got.second;
  EXPECT_EQ(got.second.find('\n'), std::string::npos);
  for (const char* p : parts)
    EXPECT_NE(got.second.find(p), std::string::npos) << "no '" << p << "' in: " << got.second;
}

TEST(Csv, RoundTripKeepsTextAndNumbersExactly) {
  Folder dir;
  const std::vector<std::string> texts = {
      "plain", "comma, inside", "a \"quoted\" word", "\"",
      "",      " space ",       "\xc3\xa9t\xc3\xa9", "a,\"b\",c"};
  const std::vector<double> numbers = {
      0.1, 1e-300, 1.7976931348623157e308, 5e-324, -0.0, 123456789012345678.0, 1.0 / 3};
  {
    CsvWriter w(dir / "t.csv", {"text", "number", "count"});
    for (const auto& t : texts)
      for (double v : numbers) {
        Record r;
        r.set("text", t).set("number", v).set("count", int64_t{1} << 62);
        w.write(r);
      }
  }
  const CsvTable t = read_csv(dir / "t.csv");
  ASSERT_EQ(t.rows.size(), texts.size() * numbers.size());
  size_t i = 0;
  for (const auto& text : texts)
    for (double v : numbers) {
      EXPECT_EQ(t.cell(i, "text"), text);
      EXPECT_EQ(*t.number(i, "number"), v);
      EXPECT_EQ(t.cell(i, "count"), "4611686018427387904");
      ++i;
    }
}

TEST(Csv, BlankMeansNotMeasured) {
  Folder dir;
  {
    CsvWriter w(dir / "t.csv", {"a", "b", "c", "d"});
    Record r;
    r.set("a", std::nan(""))
        .set("b", std::numeric_limits<double>::infinity())
        .set("c", std::optional<double>());
    w.write(r);
  }
  EXPECT_EQ(slurp(dir / "t.csv"), "a,b,c,d\n,,,\n");
  const CsvTable t = read_csv(dir / "t.csv");
  EXPECT_FALSE(t.number(0, "a").has_value());
}

TEST(Csv, LineBreaksBecomeSpacesSoThatARowIsALine) {
  Folder dir;
  {
    CsvWriter w(dir / "t.csv", {"a"});
    w.write(Record().set("a", "one\ntwo\r\nthree"));
  }
  EXPECT_EQ(slurp(dir / "t.csv"), "a\none two  three\n");
}

TEST(Csv, RowsAreOnDiskAsTheyCome) {
  Folder dir;
  CsvWriter w(dir / "t.csv", {"a"});
  EXPECT_EQ(slurp(dir / "t.csv"), "a\n");
  w.write(Record().set("a", 1));
  EXPECT_EQ(slurp(dir / "t.csv"), "a\n1\n");
  for (const auto& f : std::filesystem::directory_iterator(dir.path))
    EXPECT_EQ(f.path().filename(), "t.csv");
}

TEST(Csv, UnknownColumnIsRefused) {
  Folder dir;
  CsvWriter w(dir / "t.csv", {"a"});
  expect_error(error_of([&] { w.write(Record().set("b", 1)); }), ExitCode::usage, {"t.csv", "'b'"});
}

TEST(Csv, ReorderedColumnsAreFoundByName) {
  Folder dir;
  put(dir / "t.csv", "b,\"a\"\n2,1\n");
  const CsvTable t = read_csv(dir / "t.csv", {.required = {"a", "b"}});
  EXPECT_EQ(*t.number(0, "a"), 1);
  EXPECT_EQ(*t.number(0, "b"), 2);
}

TEST(Csv, CrLfAndByteOrderMarkAndNoLastLineEnd) {
  Folder dir;
  put(dir / "t.csv",
      "\xef\xbb\xbf"
      "a,b\r\n1,2\r\n3,4");
  const CsvTable t = read_csv(dir / "t.csv", {.required = {"a", "b"}});
  ASSERT_EQ(t.rows.size(), 2u);
  EXPECT_EQ(t.cell(1, "b"), "4");
}

TEST(Csv, MissingColumnIsNamed) {
  Folder dir;
  put(dir / "t.csv", "a,b\n1,2\n");
  expect_error(error_of([&] {
                 read_csv(dir / "t.csv", {.required = {"a", "median_us"}});
               }),
               ExitCode::bad_input, {"t.csv", "line 1", "median_us", "found a, b"});
}

TEST(Csv, ExtraColumnIsAWarning) {
  Folder dir;
  put(dir / "t.csv", "a,new\n1,2\n");
  const CsvTable t = read_csv(dir / "t.csv", {.required = {"a"}, .known = {"a"}});
  ASSERT_EQ(t.warnings.size(), 1u);
  EXPECT_NE(t.warnings[0].find("'new'"), std::string::npos);
}

TEST(Csv, BadFilesAreNamedWithTheirLine) {
  Folder dir;
  put(dir / "few.csv", "a,b\n1,2\n3\n");
  expect_error(error_of([&] { read_csv(dir / "few.csv"); }), ExitCode::bad_input,
               {"few.csv, line 3", "expected 2", "found 1"});
  put(dir / "many.csv", "a,b\n1,2,3\n");
  expect_error(error_of([&] { read_csv(dir / "many.csv"); }), ExitCode::bad_input,
               {"many.csv, line 2", "expected 2", "found 3"});
  put(dir / "open.csv", "a,b\n1,\"2\n");
  expect_error(error_of([&] { read_csv(dir / "open.csv"); }), ExitCode::bad_input,
               {"open.csv, line 2", "quotation"});
  put(dir / "twice.csv", "a,a\n1,2\n");
  expect_error(error_of([&] { read_csv(dir / "twice.csv"); }), ExitCode::bad_input,
               {"twice.csv", "'a' twice"});
  put(dir / "empty.csv", "");
  expect_error(error_of([&] { read_csv(dir / "empty.csv"); }), ExitCode::bad_input,
               {"empty.csv", "empty"});
  put(dir / "zero.csv", std::string("a,b\n1,\0\n", 8));
  expect_error(error_of([&] { read_csv(dir / "zero.csv"); }), ExitCode::bad_input,
               {"zero.csv, byte 6"});
  expect_error(error_of([&] { read_csv(dir / "none.csv"); }), ExitCode::not_found, {"none.csv"});
  expect_error(error_of([&] { read_csv(dir.path); }), ExitCode::bad_input, {"folder"});
  put(dir / "word.csv", "a,b\n1,fast\n");
  const CsvTable t = read_csv(dir / "word.csv");
  expect_error(error_of([&] { (void)t.number(0, "b"); }), ExitCode::bad_input,
               {"word.csv, row 1", "'b'", "'fast'"});
}

TEST(Csv, ResumeKeepsWholeRowsAndForgetsATornOne) {
  Folder dir;
  put(dir / "t.csv", "a,b\nx,1\ny,2\nz");
  {
    CsvWriter w(dir / "t.csv", {"a", "b", "c"}, {"a"}, true);
    EXPECT_EQ(w.resumed_rows(), 2);
    EXPECT_TRUE(w.has(Record().set("a", "x")));
    EXPECT_FALSE(w.has(Record().set("a", "z")));
    w.write(Record().set("a", "z").set("c", 3));
    EXPECT_TRUE(w.has(Record().set("a", "z")));
  }
  EXPECT_EQ(slurp(dir / "t.csv"), "a,b,c\nx,1,\ny,2,\nz,,3\n");
  CsvWriter fresh(dir / "t.csv", {"a"}, {"a"}, false);
  EXPECT_EQ(slurp(dir / "t.csv"), "a\n");
}

TEST(Csv, UnwritableFolderIsSaid) {
  Folder dir;
  put(dir / "file", "x");
  expect_error(error_of([&] { CsvWriter w(dir / "file/t.csv", {"a"}); }), ExitCode::cannot_write,
               {"file/t.csv"});
  expect_error(error_of([&] { ensure_output_dir(dir / "file/sub"); }), ExitCode::cannot_write,
               {"file/sub"});
}

TEST(Csv, FullDiskLosesNoFinishedRow) {
  Folder dir;
  // A file size limit behaves like a full disk: write() stores a part, then fails.
  ASSERT_NE(::signal(SIGXFSZ, SIG_IGN), SIG_ERR);
  rlimit old{}, small{};
  getrlimit(RLIMIT_FSIZE, &old);
  small = old;
  small.rlim_cur = 1000;
  CsvWriter w(dir / "t.csv", {"number", "text"});
  setrlimit(RLIMIT_FSIZE, &small);
  int64_t written = 0;
  const auto error = error_of([&] {
    for (int64_t i = 0; i < 1000; ++i) {
      w.write(Record().set("number", i).set("text", std::string(37, 'x')));
      ++written;
    }
  });
  setrlimit(RLIMIT_FSIZE, &old);
  expect_error(error, ExitCode::cannot_write, {"t.csv", "row"});
  EXPECT_GT(written, 10);
  const CsvTable t = read_csv(dir / "t.csv");
  ASSERT_EQ(static_cast<int64_t>(t.rows.size()), written);
  EXPECT_EQ(t.cell(t.rows.size() - 1, "text"), std::string(37, 'x'));
}

TEST(Csv, BenchRowRoundTrip) {
  Folder dir;
  Row r;
  r.op = "gemm";
  r.impl = "gemm.cpu_onednn";
  r.case_text = "m=1,n=2";
  r.dtype = "bf16";
  r.status = "passed";
  r.cache_state = "cold";
  r.median_us = 1.5;
  r.q1_us = 1.25;
  r.q3_us = 2;
  r.samples = 10;
  r.route_flips = 0;
  {
    CsvWriter w(dir / "bench.csv", bench_columns(), bench_key_columns());
    w.write(r.record(identity("cpu")));
    EXPECT_TRUE(w.has(r.record(identity("cpu"))));
  }
  const auto rows = read_bench_csv(dir / "bench.csv");
  ASSERT_EQ(rows.size(), 1u);
  EXPECT_EQ(rows[0].machine, machine_card().id);
  EXPECT_EQ(rows[0].row.case_text, r.case_text);
  EXPECT_EQ(*rows[0].row.q1_us, 1.25);
  EXPECT_EQ(*rows[0].row.route_flips, 0);
  EXPECT_FALSE(rows[0].row.gb_s.has_value());
  EXPECT_EQ(read_csv(dir / "bench.csv").header.front(), "schema_version");
  EXPECT_NE(render_table(dir / "bench.csv").find("gemm.cpu_onednn"), std::string::npos);
}

TEST(Csv, PeersTableTakesTheFastestOfEachSide) {
  Folder dir;
  {
    CsvWriter w(dir / "bench.csv", bench_columns(), bench_key_columns());
    const auto put = [&](const std::string& how, double us, int64_t peer, const char* status) {
      Row r;
      r.op = "gemm";
      r.impl = "gemm." + how;
      r.case_text = "m=1";
      r.status = status;
      r.cache_state = "cold";
      r.median_us = us;
      r.peer = peer;
      w.write(r.record(identity("cpu")));
    };
    put("cpu_simd", 2, 0, "passed");
    put("cpu_other", 4, 0, "passed");
    put("cpu_simd@avx2", 8, 0, "passed");
    put("cpu_onednn", 5, 1, "passed");
    put("cpu_lib", 3, 1, "passed");
    put("cpu_wrong", 0.5, 1, "failed");
  }
  const std::string t = render_peers(dir / "bench.csv");
  EXPECT_NE(t.find("| cpu_simd |"), std::string::npos) << t;
  EXPECT_NE(t.find("| cpu_lib "), std::string::npos) << t;
  EXPECT_NE(t.find("1.50 |"), std::string::npos) << t;
  EXPECT_NE(t.find("8.00 us |"), std::string::npos) << t;
  EXPECT_EQ(t.find("cpu_wrong"), std::string::npos) << t;
  EXPECT_EQ(t.find("cpu_other"), std::string::npos) << t;
  EXPECT_NE(render_table(dir / "bench.csv").find("Ours against the fastest peer"),
            std::string::npos);
}

TEST(Csv, IdentityStandsFirst) {
  EXPECT_EQ(with_identity({"x"}),
            (std::vector<std::string>{"schema_version", "run_id", "utc_time", "commit", "dirty",
                                      "machine", "device", "x"}));
  const Identity id = identity("cpu");
  EXPECT_EQ(id.utc_time.size(), 20u);
  EXPECT_EQ(id.machine.size(), 8u);
  EXPECT_EQ(id.run_id, identity("cpu").run_id);
}

TEST(Csv, MachineCardIsWrittenWhole) {
  Folder dir;
  machine_card().peaks["read_gb_s"] = 12.5;
  write_machine_json(dir.path);
  const std::string text = slurp(dir / "machine.json");
  for (const char* key : {"cpu_model", "isa", "l3_bytes", "memory_bytes", "kernel", "compiler",
                          "flags", "\"read_gb_s\": 12.5"})
    EXPECT_NE(text.find(key), std::string::npos) << key;
  EXPECT_NE(text.find(machine_card().id), std::string::npos);
}

// Missing columns are said with the file; a copy under another name is still known by its columns.
TEST(Table, MissingColumnsAndOtherNames) {
  const Folder dir;
  for (const auto& kind : table_kinds()) {
    const auto text = [&](const std::string& without) {
      std::string header = "schema_version";
      for (const auto& c : kind.required)
        if (c != without) header += "," + c;
      return header + "\n";
    };
    const std::string path = dir / kind.file, copy = dir / "copy_of_it.csv";
    std::ofstream(path) << text("");
    std::ofstream(copy) << text("");
    EXPECT_NE(render_table(path).find(kind.title), std::string::npos);
    EXPECT_NE(render_table(path).find("No rows"), std::string::npos);
    EXPECT_NE(render_table(copy).find(kind.title), std::string::npos) << kind.file;
    ASSERT_FALSE(kind.required.empty()) << kind.file;
    for (const auto& c : kind.required) {
      std::ofstream(path) << text(c);
      try {
        (void)render_table(path);
        ADD_FAILURE() << kind.file << " without " << c;
      } catch (const Error& e) {
        EXPECT_EQ(e.code(), ExitCode::bad_input);
        EXPECT_NE(std::string(e.what()).find(path + ", line 1"), std::string::npos) << e.what();
        EXPECT_NE(std::string(e.what()).find("'" + c + "'"), std::string::npos) << e.what();
      }
    }
  }
}

TEST(Table, MarkdownIsPaddedAndEscaped) {
  using enum Align;
  EXPECT_EQ(markdown_table({"a", "long name"}, {{"x|y", "1"}, {"\xc3\xa9", "22"}}, {left, right}),
            "| a    | long name |\n|------|----------:|\n| x\\|y |         1 |\n| \xc3\xa9    |    "
            "    22 |\n");
  EXPECT_EQ(short_number(1234.6), "1235");
  EXPECT_EQ(short_number(0.012345), "0.0123");
  EXPECT_EQ(short_number(std::nullopt), "");
  EXPECT_EQ(short_time_us(1500.0), "1.50 ms");
  EXPECT_EQ(short_bytes(2.5e9), "2.50 GB");
}

}  // namespace
}  // namespace v3b::rep
