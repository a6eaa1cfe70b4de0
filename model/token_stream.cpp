// tokenize_corpus of corpus.h and its cache file:
//   "V3BTOK01", key u64, documents u64, tokens u64, token_begin i64[D+1], byte_begin i64[D+1],
//   ids i32[T], checksum u64 of everything before it. Little endian.
#include <atomic>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <thread>

#include "model/corpus.h"
#include "model/error.h"
#include "model/hash.h"

namespace v3b::model {

namespace {

constexpr std::string_view kMagic = "V3BTOK01";
constexpr size_t kHeadBytes = 8 + 3 * sizeof(uint64_t);

template <typename T>
void append(std::string& out, std::span<const T> values) {
  out.append(reinterpret_cast<const char*>(values.data()), values.size_bytes());
}

template <typename T>
void take(std::string_view& in, std::span<T> values) {
  std::memcpy(values.data(), in.data(), values.size_bytes());
  in.remove_prefix(values.size_bytes());
}

// False for anything but exactly the file that write_cache writes for this key.
bool read_cache(const std::string& path, uint64_t key, const Corpus& corpus, TokenStream& s) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) return false;
  const std::streamoff size = file.tellg();
  if (size < static_cast<std::streamoff>(kHeadBytes + sizeof(uint64_t))) return false;
  std::string data(static_cast<size_t>(size), '\0');
  file.seekg(0);
  if (!file.read(data.data(), size)) return false;
  std::string_view in = data;
  if (in.substr(0, 8) != kMagic) return false;
  in.remove_prefix(8);
  uint64_t head[3];
  take(in, std::span<uint64_t>(head));
  const uint64_t docs = corpus.documents().size();
  if (head[0] != key || head[1] != docs || head[2] > data.size()) return false;
  const size_t want =
      kHeadBytes + 2 * (docs + 1) * sizeof(int64_t) + head[2] * sizeof(int32_t) + sizeof(uint64_t);
  if (data.size() != want) return false;
  uint64_t sum;
  std::memcpy(&sum, data.data() + data.size() - sizeof sum, sizeof sum);
  if (sum != fnv1a64(std::string_view(data).substr(0, data.size() - sizeof sum))) return false;
  s.token_begin.resize(docs + 1);
  s.byte_begin.resize(docs + 1);
  s.ids.resize(head[2]);
  take(in, std::span(s.token_begin));
  take(in, std::span(s.byte_begin));
  take(in, std::span(s.ids));
  return true;
}

std::string write_cache(const std::string& path, uint64_t key, const TokenStream& s) {
  std::string data(kMagic);
  const uint64_t head[3] = {key, s.token_begin.size() - 1, s.ids.size()};
  append(data, std::span<const uint64_t>(head));
  append(data, std::span<const int64_t>(s.token_begin));
  append(data, std::span<const int64_t>(s.byte_begin));
  append(data, std::span<const int32_t>(s.ids));
  const uint64_t sum[1] = {fnv1a64(data)};
  append(data, std::span<const uint64_t>(sum));
  const auto unique =
      std::hash<std::thread::id>{}(std::this_thread::get_id()) ^
      static_cast<size_t>(std::filesystem::file_time_type::clock::now().time_since_epoch().count());
  const std::string temporary = path + "." + hex64(unique) + ".tmp";
  std::error_code error;
  std::ofstream file(temporary, std::ios::binary);
  if (file) file.write(data.data(), static_cast<std::streamsize>(data.size()));
  if (file) file.close();
  if (!file) {
    std::filesystem::remove(temporary, error);
    return "cannot write " + temporary;
  }
  std::filesystem::rename(temporary, path, error);
  if (!error) return "written";
  const std::string reason = error.message();
  std::filesystem::remove(temporary, error);
  return "cannot rename to " + path + ": " + reason;
}

// encode of every document, in parallel; the first exception is thrown again here.
std::vector<std::vector<int32_t>> encode_all(const Corpus& corpus, const Tokenizer& tokenizer) {
  const auto& docs = corpus.documents();
  std::vector<std::vector<int32_t>> ids(docs.size());
  std::atomic<size_t> next{0};
  std::mutex guard;
  std::exception_ptr failure;
  const auto work = [&] {
    try {
      for (size_t d = next++; d < docs.size(); d = next++) {
        ids[d] = tokenizer.encode(docs[d].text, docs[d].id);
        if (tokenizer.decode(ids[d]) != docs[d].text)
          throw Error(ExitCode::bad_input, "tokens of document", docs[d].id,
                      "to decode to the same bytes", "different bytes");
      }
    } catch (...) {
      const std::lock_guard lock(guard);
      if (!failure) failure = std::current_exception();
      next = docs.size();
    }
  };
  const size_t threads =
      std::min<size_t>(docs.size(), std::max(1u, std::thread::hardware_concurrency()));
  std::vector<std::jthread> pool;
  for (size_t t = 1; t < threads; ++t) pool.emplace_back(work);
  work();
  pool.clear();
  if (failure) std::rethrow_exception(failure);
  return ids;
}

}  // namespace

TokenStream tokenize_corpus(const Corpus& corpus, const Tokenizer& tokenizer,
                            const std::string& cache_path) {
  if (tokenizer.bos() < 0)
    throw Error(ExitCode::bad_input, "tokenizer", corpus.path(), "a bos piece", "none");
  TokenStream s;
  const uint64_t key = fnv1a64(tokenizer.fingerprint(), corpus.hash());
  if (!cache_path.empty() && read_cache(cache_path, key, corpus, s)) {
    s.cache = "read";
    return s;
  }
  const auto ids = encode_all(corpus, tokenizer);
  size_t total = 0;
  for (const auto& part : ids) total += part.size() + 1;
  s.ids.reserve(total);
  for (size_t d = 0; d < ids.size(); ++d) {
    s.token_begin.push_back(static_cast<int64_t>(s.ids.size()));
    s.byte_begin.push_back(corpus.documents()[d].offset_bytes);
    s.ids.push_back(tokenizer.bos());
    s.ids.insert(s.ids.end(), ids[d].begin(), ids[d].end());
  }
  s.token_begin.push_back(static_cast<int64_t>(s.ids.size()));
  s.byte_begin.push_back(static_cast<int64_t>(corpus.text().size()));
  s.cache = cache_path.empty() ? "no cache path" : write_cache(cache_path, key, s);
  return s;
}

std::string default_cache_path(const Corpus& corpus) {
  const std::string& p = corpus.path();
  const bool txt = p.size() > 4 && p.ends_with(".txt");
  return (txt ? p.substr(0, p.size() - 4) : p) + ".tokens.bin";
}

}  // namespace v3b::model
