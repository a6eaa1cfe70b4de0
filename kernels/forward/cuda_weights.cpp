#include "kernels/forward/cuda_weights.h"

namespace v3b::kern {
namespace {

// [n_h, d_c, d_n]: W_UK of each head, rows of kv_b [n_h (d_n + d_v), d_c], transposed.
template <class T>
void transpose_uk(const model::ModelConfig& c, const uint8_t* kv_b, uint8_t* out) {
  const int64_t n_h = c.num_attention_heads, d_n = c.qk_nope_head_dim, d_v = c.v_head_dim,
                d_c = c.kv_lora_rank;
  const T* from = reinterpret_cast<const T*>(kv_b);
  T* to = reinterpret_cast<T*>(out);
#pragma omp parallel for schedule(static)
  for (int64_t h = 0; h < n_h; ++h)
    for (int64_t i = 0; i < d_c; ++i)
      for (int64_t r = 0; r < d_n; ++r)
        to[(h * d_c + i) * d_n + r] = from[(h * (d_n + d_v) + r) * d_c + i];
}
Linear make_uk_t(const model::ModelConfig& c, spec::DType dtype, const Linear& kv_b) {
  Linear l;
  l.out = c.num_attention_heads * c.kv_lora_rank, l.in = c.qk_nope_head_dim;
  l.data = Buffer<uint8_t>(l.out * l.in * spec::dtype_bytes(dtype));
  if (spec::dtype_bytes(dtype) == 2)
    transpose_uk<uint16_t>(c, kv_b.bytes(), l.data.data());
  else
    transpose_uk<uint32_t>(c, kv_b.bytes(), l.data.data());
  return l;
}

class Uploader {
 public:
  Uploader(const model::ModelConfig& c, DeviceModel& m) : c_(c), m_(m) {}
  const void* put(const void* host, int64_t bytes) {
    if (bytes == 0) return nullptr;
    m_.storage.emplace_back(bytes);
    m_.bytes += bytes;
    cuda_upload(m_.storage.back().data(), host, bytes, cuda_stream());
    return m_.storage.back().data();
  }
  const float* put(const Buffer<float>& b) {
    return static_cast<const float*>(put(b.data(), b.size() * 4));
  }
  DeviceLinear put(const Linear& l) { return {l.out, l.in, put(l.data.data(), l.data.size())}; }
  DeviceLayer put(const PackedLayer& p) {
    DeviceLayer l;
    l.input_norm = put(p.input_norm), l.post_norm = put(p.post_norm);
    l.q_a_norm = put(p.q_a_norm), l.kv_a_norm = put(p.kv_a_norm);
    l.a_proj = put(p.a_proj), l.q_b = put(p.q_b), l.kv_b = put(p.kv_b);
    l.uk_t = put(make_uk_t(c_, m_.dtype, p.kv_b));
    l.o_proj = put(p.o_proj);
    l.is_moe = p.is_moe;
    l.gate_up = put(p.gate_up), l.down = put(p.down);
    l.router = put(p.router), l.bias = put(p.bias);
    l.router_bf16 = put(p.router_bf16);
    if (!p.is_moe) return l;
    const auto* device = static_cast<const uint8_t*>(put(p.experts.data(), p.experts.size()));
    const auto moved = [&](const void* host) -> const void* {
      return host == nullptr ? nullptr
                             : device + (static_cast<const uint8_t*>(host) - p.experts.data());
    };
    const auto all = [&](spec::FfnPointers f) {
      f.gate = moved(f.gate), f.up = moved(f.up), f.down = moved(f.down);
      return f;
    };
    std::vector<spec::FfnPointers> table;
    for (const auto& f : p.expert_ptrs) table.push_back(all(f));
    l.experts = static_cast<const spec::FfnPointers*>(
        put(table.data(), static_cast<int64_t>(table.size() * sizeof(spec::FfnPointers))));
    l.shared = all(p.shared_ptrs);
    return l;
  }

 private:
  const model::ModelConfig& c_;
  DeviceModel& m_;
};

}  // namespace

DeviceModel upload_model(const model::ModelConfig& c, const PackedModel& p) {
  DeviceModel m;
  m.dtype = p.dtype;
  Uploader u(c, m);
  m.embed = u.put(p.embed), m.head = u.put(p.head);
  m.norm = u.put(p.norm);
  for (const auto& l : p.layers) m.layers.push_back(u.put(l));
  for (const auto& q : p.mtp) {
    DeviceMtp t;
    t.enorm = u.put(q.enorm), t.hnorm = u.put(q.hnorm), t.norm = u.put(q.norm);
    t.eh_proj = u.put(q.eh_proj);
    t.layer = u.put(q.layer);
    t.own_embed = u.put(q.own_embed), t.own_head = u.put(q.own_head);
    m.mtp.push_back(std::move(t));
  }
  return m;
}

}  // namespace v3b::kern
