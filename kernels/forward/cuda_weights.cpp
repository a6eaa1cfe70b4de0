#include "kernels/forward/cuda_weights.h"

namespace v3b::kern {
namespace {

class Uploader {
 public:
  explicit Uploader(DeviceModel& m) : m_(m) {}
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
    l.a_proj = put(p.a_proj), l.q_b = put(p.q_b), l.kv_b = put(p.kv_b), l.uk_t = put(p.uk_t);
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
  DeviceModel& m_;
};

}  // namespace

DeviceModel upload_model(const PackedModel& p) {
  DeviceModel m;
  m.dtype = p.dtype;
  Uploader u(m);
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
