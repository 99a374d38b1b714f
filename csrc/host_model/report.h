// What the host model counted, one record for each launch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace host_model {

// A warp's access counts each byte once. "Unique" are the 32-byte sectors touched, in bytes.
struct Traffic {
  std::string name;
  int64_t bytes_loaded = 0, bytes_stored = 0;
  int64_t unique_loaded = 0, unique_stored = 0;
  // From the operator's first launch up to the end of this one.
  int64_t operator_unique_loaded = 0, operator_unique_stored = 0;
};

struct LaunchReport {
  std::string operator_name, kernel;
  int64_t grid_x = 0, grid_y = 0;
  int threads = 0, static_shared = 0, dynamic_shared = 0;
  int64_t mma = 0;              // warp instructions m16n8k16
  int64_t barriers = 0;         // of blocks
  int64_t shared_accesses = 0;  // warp instructions; ldmatrix_x4 is four
  int64_t bank_conflicts = 0;   // cycles beyond what the accesses need without conflicts
  std::vector<Traffic> buffers;
};

// The launches since the last call that ended without an error.
std::vector<LaunchReport> take_report();

// Blocks run on so many threads of the CPU, at least 1.
void set_num_threads(int num_threads);

// Shared memory that a block may have; 227 KB, as on sm_90, at first.
void set_max_shared_bytes(int bytes);

}  // namespace host_model
