// The machine card behind the `machine` column; stands once a folder of results, in machine.json.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace v3b::rep {

struct MachineCard {
  std::string id;  // short hash of what does not change between two runs (see machine.cpp)
  std::string cpu_model, microarch;  // brand string; family/model/stepping
  std::vector<std::string> isa;      // the vector extensions that the kernel reports
  int sockets = 0, cores = 0, logical = 0, usable = 0;  // usable: this process's affinity
  int64_t l1d_bytes = 0, l2_bytes = 0, l3_bytes = 0;    // one instance each; 0 unknown
  int64_t memory_bytes = 0;
  std::string hypervisor, governor, os, kernel, huge_pages;
  std::string compiler, build_type, flags;
  std::map<std::string, std::string> libraries;  // name -> version, added by who links them
  std::map<std::string, double>
      peaks;  // measured in this run, SI units in the name (read_gb_s, ...)
  std::map<std::string, std::string> gpu;  // name, driver, ...; empty without one
};

// Collected once; libraries, peaks and gpu are added to it later by whoever knows them.
MachineCard& machine_card();

// Writes DIR/machine.json (temporary file and rename). Throws Error(cannot_write).
void write_machine_json(const std::string& dir);

// Makes DIR if needed and proves that a file can be made in it. Throws Error(cannot_write).
void ensure_output_dir(const std::string& dir);

}  // namespace v3b::rep
