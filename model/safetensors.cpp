// The safetensors container: u64 little-endian header length, JSON header, payload. Reading maps
// the file and trusts nothing: known dtypes, size = elements * width, offsets inside the file, no
// hole and no overlap (the official format allows neither). Writing goes to a temporary file that
// is renamed.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "model/error.h"
#include "model/json_util.h"
#include "model/save_weights.h"
#include "model/weights.h"

namespace v3b::model {

namespace {

using nlohmann::json;
using spec::DType;

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the official reader's limit
constexpr size_t kMaxRank = 16;

struct KnownDType {
  const char* name;
  DType dtype;
};
constexpr KnownDType kDTypes[] = {
    {"F64", DType::f64},        {"F32", DType::f32}, {"BF16", DType::bf16}, {"F16", DType::f16},
    {"F8_E4M3", DType::f8e4m3}, {"I64", DType::i64}, {"I32", DType::i32},   {"U8", DType::u8}};

struct Mapping {
  const std::byte* data = nullptr;
  size_t size = 0;
  ~Mapping() {
    if (data) ::munmap(const_cast<std::byte*>(data), size);
  }
};

std::shared_ptr<Mapping> map_file(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0)
    throw Error(errno == ENOENT || errno == ENOTDIR ? ExitCode::not_found : ExitCode::bad_input,
                "cannot open", path, "a readable file", std::strerror(errno));
  struct stat st {};
  if (::fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
    ::close(fd);
    throw Error(ExitCode::bad_input, "cannot open", path, "a regular file",
                S_ISDIR(st.st_mode) ? "a directory" : "a special file");
  }
  auto m = std::make_shared<Mapping>();
  m->size = static_cast<size_t>(st.st_size);
  if (m->size < 8) {
    ::close(fd);
    throw Error(ExitCode::bad_input, "header length", path + ", byte 0", "8 bytes",
                std::to_string(m->size));
  }
  void* p = ::mmap(nullptr, m->size, PROT_READ, MAP_PRIVATE, fd, 0);
  const int err = errno;
  ::close(fd);
  if (p == MAP_FAILED) {
    m->data = nullptr;
    throw Error(ExitCode::bad_input, "cannot map into memory", path,
                std::to_string(m->size) + " bytes", std::strerror(err));
  }
  m->data = static_cast<const std::byte*>(p);
  return m;
}

struct Span {
  uint64_t begin, end;
  std::string name;
};

uint64_t unsigned_of(const json& v, const std::string& what, const std::string& where) {
  if (!v.is_number_unsigned())
    throw Error(ExitCode::bad_input, what, where, "an integer >= 0", brief(v));
  return v.get<uint64_t>();
}

TensorView parse_entry(const std::string& name, const json& e, const std::string& where,
                       uint64_t payload, Span* span) {
  if (!e.is_object() || !e.contains("dtype") || !e.contains("shape") || !e.contains("data_offsets"))
    throw Error(ExitCode::bad_input, "header entry", where,
                "an object with dtype, shape and data_offsets", brief(e));
  for (const auto& [key, value] : e.items())
    if (key != "dtype" && key != "shape" && key != "data_offsets")
      throw Error(ExitCode::bad_input, "header entry", where, "dtype, shape and data_offsets only",
                  "key \"" + key + "\"");
  TensorView t;
  t.name = name;
  const json &dt = e["dtype"], &shape = e["shape"], &off = e["data_offsets"];
  const KnownDType* known = nullptr;
  for (const KnownDType& k : kDTypes)
    if (dt.is_string() && dt.get_ref<const std::string&>() == k.name) known = &k;
  if (!known)
    throw Error(ExitCode::bad_input, "dtype", where, "F64, F32, BF16, F16, F8_E4M3, I64, I32 or U8",
                brief(dt));
  t.dtype = known->dtype;
  if (!shape.is_array() || shape.size() > kMaxRank)
    throw Error(ExitCode::bad_input, "shape", where, "a list of at most 16 integers", brief(shape));
  uint64_t bytes = static_cast<uint64_t>(spec::dtype_bytes(t.dtype));
  bool zero = false, overflow = false;
  for (const json& s : shape) {
    const uint64_t n = unsigned_of(s, "shape", where);
    if (n > static_cast<uint64_t>(INT64_MAX)) overflow = true;
    if (n == 0) zero = true;
    t.shape.push_back(static_cast<int64_t>(n));
  }
  if (!overflow && !zero)
    for (const int64_t n : t.shape)
      if (__builtin_mul_overflow(bytes, static_cast<uint64_t>(n), &bytes)) overflow = true;
  if (overflow || bytes > static_cast<uint64_t>(INT64_MAX))
    throw Error(ExitCode::bad_input, "shape", where, "fewer than 2^63 bytes", brief(shape));
  if (zero) bytes = 0;
  if (!off.is_array() || off.size() != 2)
    throw Error(ExitCode::bad_input, "data_offsets", where, "two integers", brief(off));
  span->begin = unsigned_of(off[0], "data_offsets", where);
  span->end = unsigned_of(off[1], "data_offsets", where);
  span->name = name;
  if (span->begin > span->end || span->end > payload)
    throw Error(ExitCode::bad_input, "data_offsets", where,
                "0 <= begin <= end <= " + std::to_string(payload) + " (payload bytes)", brief(off));
  if (span->end - span->begin != bytes)
    throw Error(ExitCode::bad_input, "data_offsets", where,
                std::to_string(bytes) + " bytes for " + brief(dt) + " " + brief(shape),
                std::to_string(span->end - span->begin));
  return t;
}

}  // namespace

SafetensorsFile open_safetensors(const std::string& path) {
  const std::shared_ptr<Mapping> m = map_file(path);
  uint64_t n = 0;
  for (int i = 7; i >= 0; --i) n = n << 8 | static_cast<uint64_t>(m->data[i]);
  const uint64_t room = std::min<uint64_t>(m->size - 8, kMaxHeaderBytes);
  if (n < 2 || n > room)
    throw Error(
        ExitCode::bad_input, "header length", path + ", byte 0",
        "2 to " + std::to_string(room) + " bytes (file has " + std::to_string(m->size) + ")",
        std::to_string(n));
  const std::string text(reinterpret_cast<const char*>(m->data + 8), n);
  if (text[0] != '{')
    throw Error(ExitCode::bad_input, "header", path + ", byte 8", "\"{\"",
                "byte " + std::to_string(static_cast<unsigned char>(text[0])));
  const json header = parse_json(text, path + ", header");
  const uint64_t payload = m->size - 8 - n;
  SafetensorsFile f;
  f.storage = m;
  std::vector<Span> spans;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") {
      if (!entry.is_object())
        throw Error(ExitCode::bad_input, "__metadata__", path, "an object of strings",
                    brief(entry));
      for (const auto& [k, v] : entry.items()) {
        if (!v.is_string())
          throw Error(ExitCode::bad_input, "__metadata__." + k, path, "a string", brief(v));
        f.metadata[k] = v.get<std::string>();
      }
      continue;
    }
    Span s;
    TensorView t = parse_entry(name, entry, path + ", tensor \"" + name + "\"", payload, &s);
    t.data = m->data + 8 + n + s.begin;
    spans.push_back(std::move(s));
    f.tensors.emplace(name, std::move(t));
  }
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  uint64_t at = 0;
  for (const Span& s : spans) {
    if (s.begin != at)
      throw Error(ExitCode::bad_input, s.begin < at ? "tensors overlap" : "hole between tensors",
                  path + ", tensor \"" + s.name + "\"",
                  "data from payload byte " + std::to_string(at),
                  "byte " + std::to_string(s.begin));
    at = s.end;
  }
  if (at != payload)
    throw Error(ExitCode::bad_input, "payload length", path,
                std::to_string(at) + " bytes (end of the last tensor)", std::to_string(payload));
  return f;
}

namespace {

struct TempFile {  // removed unless renamed
  std::string path;
  int fd = -1;
  bool keep = false;
  ~TempFile() {
    if (fd >= 0) ::close(fd);
    if (!keep) ::unlink(path.c_str());
  }
};

void write_all(int fd, const void* data, size_t size, const std::string& path) {
  const char* p = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t n = ::write(fd, p, std::min<size_t>(size, size_t{1} << 30));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0)
      throw Error(ExitCode::cannot_write, "cannot write", path,
                  std::to_string(size) + " more bytes",
                  n == 0 ? "no progress" : std::strerror(errno));
    p += n;
    size -= static_cast<size_t>(n);
  }
}

// What is written: views of somebody's bytes, so that a model of gigabytes needs no copy.
struct Piece {
  const std::string* name;
  DType dtype;
  const std::vector<int64_t>* shape;
  const void* data;
  uint64_t bytes;
};

void save_pieces(const std::string& path, std::vector<Piece> order,
                 const std::map<std::string, std::string>& metadata) {
  // As the official writer: wide types first, then by name.
  std::sort(order.begin(), order.end(), [](const Piece& a, const Piece& b) {
    const int64_t wa = spec::dtype_bytes(a.dtype), wb = spec::dtype_bytes(b.dtype);
    return wa != wb ? wa > wb : *a.name < *b.name;
  });
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  uint64_t at = 0;
  for (const Piece& t : order) {
    int64_t numel = 1;
    for (const int64_t s : *t.shape) numel *= s;
    const auto bytes = static_cast<uint64_t>(numel * spec::dtype_bytes(t.dtype));
    if (bytes != t.bytes)
      throw Error(ExitCode::cannot_write, "tensor size", path + ", tensor \"" + *t.name + "\"",
                  std::to_string(bytes) + " bytes", std::to_string(t.bytes));
    if (header.contains(*t.name))
      throw Error(ExitCode::cannot_write, "duplicate tensor", path + ", tensor \"" + *t.name + "\"",
                  "each name once", "twice");
    const char* dtype = "?";
    for (const KnownDType& k : kDTypes)
      if (k.dtype == t.dtype) dtype = k.name;
    header[*t.name] = {{"dtype", dtype}, {"shape", *t.shape}, {"data_offsets", {at, at + bytes}}};
    at += bytes;
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  if (text.size() > kMaxHeaderBytes)
    throw Error(ExitCode::cannot_write, "header length", path, "at most 100000000 bytes",
                std::to_string(text.size()));
  TempFile tmp{path + ".tmp." + std::to_string(::getpid())};
  tmp.fd = ::open(tmp.path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (tmp.fd < 0)
    throw Error(ExitCode::cannot_write, "cannot create", tmp.path, "a writable folder",
                std::strerror(errno));
  unsigned char length[8];
  for (int i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(text.size() >> (8 * i));
  write_all(tmp.fd, length, 8, path);
  write_all(tmp.fd, text.data(), text.size(), path);
  for (const Piece& t : order) write_all(tmp.fd, t.data, t.bytes, path);
  if (::fsync(tmp.fd) != 0)
    throw Error(ExitCode::cannot_write, "cannot write", path, "data on disk", std::strerror(errno));
  if (::rename(tmp.path.c_str(), path.c_str()) != 0)
    throw Error(ExitCode::cannot_write, "cannot rename", tmp.path, path, std::strerror(errno));
  tmp.keep = true;
}

}  // namespace

void save_safetensors(const std::string& path, const std::vector<OwnedTensor>& tensors,
                      const std::map<std::string, std::string>& metadata) {
  std::vector<Piece> pieces;
  pieces.reserve(tensors.size());
  for (const OwnedTensor& t : tensors)
    pieces.push_back({&t.name, t.dtype, &t.shape, t.bytes.data(), t.bytes.size()});
  save_pieces(path, std::move(pieces), metadata);
}

void save_weights(const std::string& path, const ModelWeights& w) {
  const auto named = named_tensors(w);
  std::vector<Piece> pieces;
  pieces.reserve(named.size());
  for (const auto& [name, t] : named) {
    if (t.dtype == DType::f8e4m3)
      throw Error(ExitCode::usage, "only bf16, f16 and f32 matrices are written", path,
                  "no FP8 matrix", name);
    const auto bytes = static_cast<uint64_t>(t.numel() * spec::dtype_bytes(t.dtype));
    pieces.push_back({&name, t.dtype, &t.shape, t.data, bytes});
  }
  save_pieces(path, std::move(pieces), {{"format", "pt"}});
}

}  // namespace v3b::model
