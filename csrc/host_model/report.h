// What the host model counts: one report for each launch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace host_model {

// An access of a warp counts each byte once. "Unique" counts the bytes of the 32-byte sectors that
// were touched.
struct Traffic {
  std::string name;
  int64_t bytes_loaded = 0, bytes_stored = 0;
  int64_t unique_loaded = 0, unique_stored = 0;
  // From the operator's first launch to the end of this one.
  int64_t operator_unique_loaded = 0, operator_unique_stored = 0;
};

struct LaunchReport {
  std::string operator_name, kernel;
  int64_t grid_x = 0, grid_y = 0;
  int threads = 0, static_shared = 0, dynamic_shared = 0;
  int64_t mma = 0;              // warp instructions m16n8k16
  int64_t barriers = 0;         // of blocks, and of some warps of them
  int64_t shared_accesses = 0;  // warp instructions; ldmatrix_x4 is four
  int64_t bank_conflicts = 0;   // cycles beyond those that the accesses need without conflicts
  std::vector<Traffic> buffers;
};

// The launches that ended without an error since the last call.
std::vector<LaunchReport> take_report();

// A launch that was recorded in place of being run.
struct RecordedLaunch {
  std::string kernel, params;  // params: the bytes of its parameters
  int64_t grid_x = 0, grid_y = 0;
  int threads = 0, dynamic_shared = 0;
};

// Whether launches are recorded and not run; at first they are run.
void record_launches(bool record);

// Those recorded since the last call.
std::vector<RecordedLaunch> take_recorded_launches();

// How many threads of the CPU run blocks, at least 1.
void set_num_threads(int num_threads);

// The shared memory that a block may have; at first 227 KB, as on sm_90.
void set_max_shared_bytes(int bytes);

}  // namespace host_model
