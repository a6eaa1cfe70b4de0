// cuDNN's attention graph through its frontend (headers alone), symbols by dlopen. Without the headers
// (scripts/install_deps.sh --cudnn) everything here says so.
#include "kernels/attention/attention_cudnn.h"
#include "model/error.h"

#if defined(V3B_HAVE_CUDNN)
#define NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING
#define CUDNN_FRONTEND_SKIP_JSON_LIB
#include <cudnn_frontend.h>
#include <dlfcn.h>

#include <memory>
#include <unordered_map>

namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;
}

namespace v3b::kern {
namespace {

namespace fe = cudnn_frontend;

struct Library {
  std::string missing;
  cudnnHandle_t handle = nullptr;
  Library() {
    fe::cudnn_dlhandle = dlopen("libcudnn.so.9", RTLD_NOW);
    if (fe::cudnn_dlhandle == nullptr)
      fe::cudnn_dlhandle = dlopen("/usr/local/cuda/lib64/libcudnn.so.9", RTLD_NOW);
    if (fe::cudnn_dlhandle == nullptr) missing = "no libcudnn.so.9 on this machine";
  }
  // The handle needs a device.
  cudnnHandle_t get() {
    if (handle == nullptr && fe::detail::create_handle(&handle) != CUDNN_STATUS_SUCCESS)
      throw Error(ExitCode::usage, "cuDNN makes no handle", "cudnnCreate");
    return handle;
  }
};
Library& library() {
  static Library l;
  return l;
}

enum Uid : int64_t { kQ = 1, kK, kV, kO, kStats };

void check(fe::error_t e, const char* where) {
  if (e.is_bad()) throw Error(ExitCode::usage, "cuDNN: " + e.get_message(), where);
}

}  // namespace

struct CudnnSdpa {
  std::shared_ptr<fe::graph::Graph> graph;
  int64_t bytes = 0;
  bool lse = false;
};

std::string cudnn_missing() { return library().missing; }

CudnnSdpa* cudnn_plan(const SdpaShape& s) {
  if (!library().missing.empty()) throw Error(ExitCode::usage, library().missing, "cuDNN");
  auto g = std::make_shared<fe::graph::Graph>();
  g->set_io_data_type(fe::DataType_t::BFLOAT16)
      .set_intermediate_data_type(fe::DataType_t::FLOAT)
      .set_compute_data_type(fe::DataType_t::FLOAT);
  const auto input = [&](const char* name, Uid uid, int64_t heads, int64_t T, int64_t d,
                         const SdpaShape::Strides& st) {
    return g->tensor(fe::graph::Tensor_attributes()
                         .set_name(name)
                         .set_uid(uid)
                         .set_dim({s.B, heads, T, d})
                         .set_stride({st.batch, st.head, st.token, 1}));
  };
  auto q = input("q", kQ, s.n_h, s.T_q, s.d_qk, s.q);
  auto k = input("k", kK, s.n_kv, s.T_k, s.d_qk, s.k);
  auto v = input("v", kV, s.n_kv, s.T_k, s.d_v, s.v);
  auto attributes =
      fe::graph::SDPA_attributes().set_name("sdpa").set_generate_stats(s.lse).set_attn_scale(
          static_cast<float>(s.scale));
  if (s.causal) attributes.set_causal_mask_bottom_right(true);
  auto [o, stats] = g->sdpa(q, k, v, attributes);
  o->set_output(true).set_uid(kO).set_dim({s.B, s.n_h, s.T_q, s.d_v});
  o->set_stride({s.o.batch, s.o.head, s.o.token, 1});
  if (s.lse) stats->set_output(true).set_uid(kStats).set_data_type(fe::DataType_t::FLOAT);
  check(g->build(library().get(), {fe::HeurMode_t::A}), "cuDNN attention");
  auto plan = std::make_unique<CudnnSdpa>();
  check(g->get_workspace_size(plan->bytes), "cuDNN attention");
  plan->graph = std::move(g);
  plan->lse = s.lse;
  return plan.release();
}

std::string cudnn_refuses(const SdpaShape& s) {
  if (!library().missing.empty()) return library().missing;
  try {
    cudnn_free(cudnn_plan(s));
  } catch (const std::exception&
               e) {  // the frontend itself throws where a symbol or libcudart is missing
    return e.what();
  }
  return "";
}
void cudnn_free(CudnnSdpa* plan) { delete plan; }
int64_t cudnn_scratch_bytes(const CudnnSdpa& plan) { return plan.bytes; }

void cudnn_sdpa(const CudnnSdpa& plan, const SdpaPointers& p, void* scratch, CudaStream stream) {
  cudnnHandle_t handle = library().get();
  if (fe::detail::set_stream(handle, stream) != CUDNN_STATUS_SUCCESS)
    throw Error(ExitCode::usage, "cuDNN takes no stream", "cudnnSetStream");
  std::unordered_map<int64_t, void*> pack = {{kQ, const_cast<void*>(p.q)},
                                             {kK, const_cast<void*>(p.k)},
                                             {kV, const_cast<void*>(p.v)},
                                             {kO, p.o}};
  if (plan.lse) pack[kStats] = p.lse;
  check(plan.graph->execute(handle, pack, scratch), "cuDNN attention");
}

}  // namespace v3b::kern

#else

namespace v3b::kern {
namespace {
constexpr const char* kReason = "built without cuDNN's headers (scripts/install_deps.sh --cudnn)";
[[noreturn]] void absent() { throw Error(ExitCode::usage, kReason, "cuDNN"); }
}  // namespace

struct CudnnSdpa {};
std::string cudnn_missing() { return kReason; }
std::string cudnn_refuses(const SdpaShape&) { return kReason; }
CudnnSdpa* cudnn_plan(const SdpaShape&) { absent(); }
void cudnn_free(CudnnSdpa* plan) { delete plan; }
int64_t cudnn_scratch_bytes(const CudnnSdpa&) { absent(); }
void cudnn_sdpa(const CudnnSdpa&, const SdpaPointers&, void*, CudaStream) { absent(); }

}  // namespace v3b::kern
#endif
