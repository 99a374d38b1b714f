// How a kernel is launched, on a GPU or on the host model.
#pragma once

#include <cstdint>

#include "launch.h"

namespace cogview {

// When a kernel starts: behind all earlier work of its stream, or early, while the kernel before it is
// still running (instructions/sm90.cuh), where the device and the compiled code allow it. Each thread
// of a kernel that may start early calls griddepcontrol_wait before it touches global memory, and
// before it returns: what comes later on the stream waits for this kernel alone.
enum class Start { kInOrder, kEarly };

}  // namespace cogview

#ifdef COGVIEW_HOST_MODEL

namespace cogview {

inline cudaError_t max_shared_bytes(int* bytes) {
  *bytes = host_model::max_shared_bytes();
  return cudaSuccess;
}

template <auto kKernel, Start kStart = Start::kInOrder, typename Params>
cudaError_t launch(int64_t num_blocks, int grid_y, int num_threads, int shared_bytes, cudaStream_t,
                   const Params& params, int = kMaxArrayBytes) {
  return host_model::launch(
      __PRETTY_FUNCTION__,
      [](const void* untyped) { kKernel(*static_cast<const Params*>(untyped)); }, &params,
      sizeof(Params), num_blocks, grid_y, num_threads, shared_bytes, kStart == Start::kEarly);
}

}  // namespace cogview

#else

#include <atomic>
#include <type_traits>

namespace cogview {

// The runtime keeps a failed call's error until somebody asks for it; torch asks after launches of
// its own. The error that we return ourselves is therefore cleared. Errors that end the context
// cannot be cleared: every later call returns them.
inline cudaError_t clear_if_failed(cudaError_t status) {
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

// A positive number for each device, found when it is first asked for. Threads that ask at the same
// time may all look for it; they find the same.
class PerDevice {
 public:
  template <typename Find>
  cudaError_t get(const Find& find, int* number) {
    int device = 0;
    const cudaError_t status = clear_if_failed(cudaGetDevice(&device));
    if (status != cudaSuccess) return status;
    if (device >= kMaxDevices) return find(device, number);
    *number = numbers_[device].load(std::memory_order_acquire);
    if (*number > 0) return cudaSuccess;
    const cudaError_t found = find(device, number);
    if (found == cudaSuccess) numbers_[device].store(*number, std::memory_order_release);
    return found;
  }

 private:
  static constexpr int kMaxDevices = 128;  // more than torch supports in one process
  std::atomic<int> numbers_[kMaxDevices] = {};
};

// The shared memory that the current device allows a block, in bytes: the kernel's arrays and what is
// asked for at launch.
inline cudaError_t max_shared_bytes(int* bytes) {
  static PerDevice known;
  const auto ask = [](int device, int* bytes) {
    return clear_if_failed(
        cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  };
  return known.get(ask, bytes);
}

// Whether the current device runs a kernel from code with griddepcontrol_wait in it: code that was
// compiled for compute capability 9.0 or later runs on no older device. Drivers older than CUDA 12.3
// cannot capture an early start.
template <auto kKernel>
cudaError_t may_start_early(bool* early) {
  constexpr int kInOrder = 1, kEarly = 2;  // PerDevice wants positive numbers
  static PerDevice known;
  const auto ask = [](int, int* start) {
    cudaFuncAttributes code;
    cudaError_t status =
        clear_if_failed(cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(kKernel)));
    if (status != cudaSuccess) return status;
    int driver = 0;
    status = clear_if_failed(cudaDriverGetVersion(&driver));
    *start = code.ptxVersion >= 90 && driver >= 12030 ? kEarly : kInOrder;
    return status;
  };
  int start = 0;
  const cudaError_t status = known.get(ask, &start);
  *early = start == kEarly;
  return status;
}

// Runs kKernel(params) on num_blocks x grid_y blocks with `shared_bytes` of dynamic_shared().
// `array_bytes`: what the kernel has at most in arrays of its own, the same in all its launches.
template <auto kKernel, Start kStart = Start::kInOrder, typename Params>
cudaError_t launch(int64_t num_blocks, int grid_y, int num_threads, int shared_bytes,
                   cudaStream_t stream, const Params& params, int array_bytes = kMaxArrayBytes) {
  static_assert(std::is_same_v<decltype(kKernel), void (*)(Params)>);
  if (num_blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const void* kernel = reinterpret_cast<const void*>(kKernel);
  if (shared_bytes > 0) {  // beyond 48 KB, arrays included, the kernel must be allowed to have them
    // A kernel has one limit on each device. It is set once, to the largest value that any launch
    // needs: a limit for each launch would be too low for launches of other threads and for captured
    // graphs.
    static PerDevice allowed;
    const auto allow = [=](int, int* bytes) {
      cudaError_t status = max_shared_bytes(bytes);
      if (status != cudaSuccess) return status;
      *bytes -= array_bytes + kReservedSharedBytes;
      return clear_if_failed(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, *bytes));
    };
    int bytes = 0;
    const cudaError_t status = allowed.get(allow, &bytes);
    if (status != cudaSuccess) return status;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(num_blocks), unsigned(grid_y), 1);
  config.blockDim = dim3(unsigned(num_threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute early_start = {};
  if constexpr (kStart == Start::kEarly) {
    bool early = false;
    const cudaError_t status = may_start_early<kKernel>(&early);
    if (status != cudaSuccess) return status;
    early_start.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early_start.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &early_start;
    config.numAttrs = early ? 1 : 0;
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  // Unlike cudaGetLastError behind <<<>>>, its status leaves out failures of others' earlier calls.
  return clear_if_failed(cudaLaunchKernelExC(&config, kernel, arguments));
}

}  // namespace cogview

#endif
