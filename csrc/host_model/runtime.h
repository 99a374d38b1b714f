// What the host model offers to launches and operators: the few names of the CUDA runtime that they
// use, the launch, and the registration of the memory that an operator's kernels may touch.
#pragma once

#include <cstdint>
#include <source_location>
#include <string_view>
#include <vector>

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorLaunchFailure = 719,
};
using cudaStream_t = struct CUstream_st*;

// The text of the calling thread's last failed launch or Operator, for cudaErrorLaunchFailure.
const char* cudaGetErrorString(cudaError_t status);

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace host_model {

using Where = std::source_location;

// The shared memory that a block may have, in bytes.
int max_shared_bytes();

// Runs kernel(params) for every thread. `name` is the compiler's name of cogview::launch with the
// kernel in it. A kernel that starts early must wait before it touches global memory (sm90.h).
cudaError_t launch(std::string_view name, void (*kernel)(const void*), const void* params,
                   size_t params_bytes, int64_t grid_x, int grid_y, int num_threads,
                   int shared_bytes, bool starts_early = false);

// Global memory that the kernels of an operator may touch, from the tensor's first element to its
// last. A buffer without bytes is ignored.
struct Buffer {
  const char* name;
  const void* data;
  int64_t bytes;
  bool must_write = false;  // holds no values before, and every byte must be written
  bool writable = false;    // implied by must_write
};

// One call of an operator, created before its first launch. Without one, every access to global
// memory is an error. One operator runs at a time; other threads wait in the constructor.
class Operator {
 public:
  Operator(const char* name, std::vector<Buffer> buffers);
  ~Operator();
  Operator(const Operator&) = delete;
  Operator& operator=(const Operator&) = delete;

  // Called after the last launch: the error of the first launch that failed, or of an output that
  // was not written completely.
  cudaError_t finish();
};

// What becomes of launches. One of both, or neither, for measuring host time: operators check their
// arguments, launch nothing and leave outputs as they were.
bool launches_run();
bool launches_recorded();  // launch() keeps what it was given and runs nothing (report.h)

}  // namespace host_model
