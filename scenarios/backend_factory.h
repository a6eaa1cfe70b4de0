// A backend by name. Scenarios include no kernel header; this is where reference and kernels meet
// for them.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "model/backend.h"

namespace v3b::scen {

// reference_f64, reference_f32, cpu_bf16, cpu_f32, cuda_bf16, cuda_f32. Throws v3b::Error(usage) listing the names.
std::unique_ptr<model::Backend> make_backend(const std::string& name, model::WeightsPtr weights,
                                             const model::BackendOptions& options = {});
std::vector<std::string> backend_names();
// "reference", "cpu" or "cuda" with "f64", "f32" or "bf16" (empty: f64 for reference, else bf16) ->
// backend name. A full name passes through. Throws v3b::Error(usage) on combinations that do not
// exist.
std::string backend_name(const std::string& backend, const std::string& dtype);

}  // namespace v3b::scen
