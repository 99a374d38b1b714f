// What the host model shows to launch headers and operators: the few names of the CUDA runtime that
// they use, and the registration of the memory that an operator's kernels may touch.
#pragma once

#include <cstdint>
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

// Global memory that the kernels of an operator may touch, from the tensor's first element to its
// last. A buffer without bytes is ignored.
struct Buffer {
  const char* name;
  const void* data;
  int64_t bytes;
  bool must_write = false;  // uninitialised before, every byte written at the end
  bool writable = false;    // implied by must_write
};

// One call of an operator, from before its first launch on: without one, every access to global
// memory is an error. One operator runs at a time; other threads wait in the constructor.
class Operator {
 public:
  Operator(const char* name, std::vector<Buffer> buffers);
  ~Operator();
  Operator(const Operator&) = delete;
  Operator& operator=(const Operator&) = delete;

  // After the last launch: the first launch's error, or that of an output that is not complete.
  cudaError_t finish();
};

}  // namespace host_model
