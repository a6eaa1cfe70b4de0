// Which device a scenario runs on: that of its backend (CommonOptions::backend), and what happens where it is missing.
#pragma once
#include <string>

#include "scenarios/common.h"

namespace v3b::scen {

// --device: "cuda" takes the CUDA backend of the same dtype in place of a cpu one, "cpu" the other way round; "" keeps the
// backend. Throws Error(usage) for "cuda" with a reference backend and for other names.
void choose_device(CommonOptions& o, const std::string& device);
bool on_cuda(const CommonOptions& o);
// Rows' `device` column: "cpu", or what bench/harness/jobs.h says of CUDA jobs.
std::string device_column(const CommonOptions& o);

// False on the emulated device: its jobs are checked, its times mean nothing.
bool device_timed(const CommonOptions& o);

// "" where the device is here; else no_device or not_built, the `status` of rows that need it.
std::string device_missing(const CommonOptions& o);
// `status` and `reason` of such a row.
rep::Record& set_device_missing(rep::Record& r, const CommonOptions& o);
// Throws Error(nothing_ran) with the reason where the device is missing. Rows that say so stand in the file by then.
void finish_device(const CommonOptions& o);

}  // namespace v3b::scen
