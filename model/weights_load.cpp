// A checkpoint folder -> ModelWeights: one file or shards with an index.
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <set>

#include "model/all_cores.h"
#include "model/error.h"
#include "model/json_util.h"
#include "model/weights.h"
#include "model/weights_bind.h"
#include "model/weights_walk.h"

namespace v3b::model {

namespace {

constexpr int64_t kWidenChunk = 1 << 20;  // elements that a thread takes at a time

struct Checkpoint {
  std::map<std::string, TensorView> table;
  std::map<std::string, std::string> file_of;
  std::vector<std::string> warnings;
};
struct Storage {
  std::vector<std::shared_ptr<void>> parts;
};

bool exists(const std::string& path) {
  struct stat st {};
  return ::stat(path.c_str(), &st) == 0;
}

void add_file(Checkpoint& c, const std::string& path, Storage& storage) {
  SafetensorsFile f = open_safetensors(path);
  for (auto& [name, view] : f.tensors) {
    if (!c.table.emplace(name, view).second)
      throw Error(ExitCode::bad_input, "duplicate tensor", path + ", tensor \"" + name + "\"",
                  "each tensor once", "also in " + c.file_of[name]);
    c.file_of[name] = path;
  }
  storage.parts.push_back(f.storage);
}

void add_sharded(Checkpoint& c, const std::string& dir, const std::string& index,
                 Storage& storage) {
  const nlohmann::json j = parse_json(read_text_file(index, 256 << 20), index);
  const auto map = j.is_object() ? j.find("weight_map") : j.end();
  if (!j.is_object() || map == j.end() || !map->is_object() || map->empty())
    throw Error(ExitCode::bad_input, "weight_map", index, "an object tensor -> shard",
                !j.is_object() || map == j.end() ? "none" : brief(*map));
  std::map<std::string, std::string> listed;
  std::set<std::string> shards;
  for (const auto& [name, file] : map->items()) {
    if (!file.is_string() || file.get_ref<const std::string&>().empty() ||
        file.get_ref<const std::string&>().find('/') != std::string::npos)
      throw Error(ExitCode::bad_input, "shard name", index + ", weight_map \"" + name + "\"",
                  "a file name without folders", brief(file));
    listed[name] = file.get<std::string>();
    shards.insert(file.get<std::string>());
  }
  for (const std::string& s : shards) {
    if (!exists(dir + "/" + s))
      throw Error(ExitCode::not_found, "missing shard", index, dir + "/" + s, "no such file");
    add_file(c, dir + "/" + s, storage);
  }
  for (const auto& [name, file] : listed) {
    const auto it = c.file_of.find(name);
    if (it == c.file_of.end() || it->second != dir + "/" + file)
      throw Error(ExitCode::bad_input, "tensor in the index but not in its shard",
                  index + ", weight_map \"" + name + "\"", "in " + dir + "/" + file,
                  it == c.file_of.end() ? "nowhere" : "in " + it->second);
  }
  for (const auto& [name, file] : c.file_of)
    if (!listed.count(name) && c.warnings.size() < 20)
      c.warnings.push_back(file + ": tensor \"" + name + "\" is not in the index");
}

}  // namespace

WeightsPtr load_weights(const std::string& dir, const LoadOptions& options) {
  const ModelConfig config = load_config(dir);
  auto storage = std::make_shared<Storage>();
  Checkpoint c;
  const std::string single = dir + "/model.safetensors", index = single + ".index.json";
  if (exists(single))
    add_file(c, single, *storage);
  else if (exists(index))
    add_sharded(c, dir, index, *storage);
  else
    throw Error(ExitCode::not_found, "no weights", dir,
                "model.safetensors or model.safetensors.index.json", "neither");
  auto w = std::make_shared<ModelWeights>(
      bind_weights_from(config, c.table, options, [&](const std::string& name) -> std::string {
        const auto it = c.file_of.find(name.substr(0, name.find('[')));
        return it == c.file_of.end() ? dir : it->second;
      }));
  storage->parts.push_back(w->storage);
  w->storage = storage;
  w->warnings.insert(w->warnings.begin(), c.warnings.begin(), c.warnings.end());
  w->warnings.insert(w->warnings.begin(), config.warnings.begin(), config.warnings.end());
  return w;
}

std::vector<float> to_float_vector(const TensorView& t) {
  const int64_t n = t.numel(), cols = t.cols();
  std::vector<float> out(static_cast<size_t>(n));
  const auto* p = static_cast<const uint8_t*>(t.data);
  switch (t.dtype) {
    case spec::DType::f32:
      std::memcpy(out.data(), p, static_cast<size_t>(n) * 4);
      break;
    case spec::DType::bf16:
      on_all_cores(n, kWidenChunk, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
          spec::bf16 v;
          std::memcpy(&v, p + 2 * i, 2);
          out[static_cast<size_t>(i)] = spec::to_float(v);
        }
      });
      break;
    case spec::DType::f16:
      for (int64_t i = 0; i < n; ++i) {
        spec::f16 v;
        std::memcpy(&v, p + 2 * i, 2);
        out[static_cast<size_t>(i)] = spec::to_float(v);
      }
      break;
    case spec::DType::f8e4m3: {
      std::array<float, 256> value{};
      for (size_t c = 0; c < value.size(); ++c)
        value[c] = spec::to_float(spec::f8e4m3{static_cast<uint8_t>(c)});
      const int64_t blocks = (cols + 127) / 128, rows = n / std::max<int64_t>(1, cols);
      on_all_cores(rows, std::max<int64_t>(1, kWidenChunk / std::max<int64_t>(1, cols)),
                   [&](int64_t from, int64_t to) {
                     for (int64_t r = from; r < to; ++r)
                       for (int64_t j = 0; j < cols; ++j) {
                         const float s =
                             t.scale_inv ? t.scale_inv[r / 128 * blocks + j / 128] : 1.0f;
                         out[static_cast<size_t>(r * cols + j)] =
                             spec::to_float(spec::to_bf16(value[p[r * cols + j]] * s));
                       }
                   });
      break;
    }
    default:
      throw Error(ExitCode::bad_input, "dtype", "tensor \"" + t.name + "\"",
                  "a float type of at most 32 bits", spec::dtype_name(t.dtype));
  }
  return out;
}

std::vector<std::pair<std::string, TensorView>> named_tensors(const ModelWeights& w) {
  ModelWeights copy =
      w;  // views only; walk_weights wants to size the vectors, which changes nothing here
  std::vector<std::pair<std::string, TensorView>> out;
  walk_weights(copy, w.config, !w.mtp.empty(),
               [&](TensorView& t, const std::string& name, const Shape&, Role role) {
                 if (!t.present()) return;
                 if (role == Role::mtp_embed && t.data == w.embed_tokens.data)
                   return;  // not stored apart
                 if (role == Role::mtp_head && t.data == w.lm_head.data) return;
                 if (role == Role::head && w.config.tie_word_embeddings) return;
                 out.emplace_back(name, t);
                 if (t.scale_inv) {
                   TensorView s;
                   s.name = name + "_scale_inv";
                   s.dtype = spec::DType::f32;
                   s.shape = {(t.rows() + 127) / 128, (t.cols() + 127) / 128};
                   s.data = t.scale_inv;
                   out.emplace_back(s.name, s);
                 }
               });
  return out;
}

}  // namespace v3b::model
