#include "scenarios/backend_factory.h"

#include "kernels/forward/cpu_backend.h"
#include "kernels/forward/cuda_backend.h"
#include "model/error.h"
#include "reference/forward.h"

namespace v3b::scen {

std::vector<std::string> backend_names() {
  return {"reference_f64", "reference_f32", "cpu_bf16", "cpu_f32", "cuda_bf16", "cuda_f32"};
}

std::unique_ptr<model::Backend> make_backend(const std::string& name, model::WeightsPtr weights,
                                             const model::BackendOptions& options) {
  if (name == "reference_f64")
    return ref::make_reference_backend<double>(std::move(weights), options);
  if (name == "reference_f32")
    return ref::make_reference_backend<float>(std::move(weights), options);
  if (name == "cpu_bf16")
    return kern::make_cpu_backend(std::move(weights), spec::DType::bf16, options);
  if (name == "cpu_f32")
    return kern::make_cpu_backend(std::move(weights), spec::DType::f32, options);
  if (name == "cuda_bf16")
    return kern::make_cuda_backend(std::move(weights), spec::DType::bf16, options);
  if (name == "cuda_f32")
    return kern::make_cuda_backend(std::move(weights), spec::DType::f32, options);
  std::string names;
  for (const auto& n : backend_names()) names += (names.empty() ? "" : ", ") + n;
  throw Error(ExitCode::usage, "unknown backend", "--backend", names, name);
}

std::string backend_name(const std::string& backend, const std::string& dtype) {
  for (const auto& n : backend_names())
    if (backend == n && (dtype.empty() || n.ends_with("_" + dtype))) return n;
  const std::string d = !dtype.empty() ? dtype : backend == "reference" ? "f64" : "bf16";
  const std::string name = backend + "_" + d;
  for (const auto& n : backend_names())
    if (name == n) return n;
  throw Error(ExitCode::usage, "no such backend and dtype", "--backend, --dtype",
              "reference with f64 or f32, cpu or cuda with bf16 or f32", backend + " with " + d);
}

}  // namespace v3b::scen
