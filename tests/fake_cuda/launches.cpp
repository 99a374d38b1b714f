// A CUDA runtime that fails where a test says so, and launches on it, for test_launch.py.

#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "driver.h"
#include "launch.cuh"
#include "three_region_attention/sm80/family.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

std::mutex mutex;
std::map<std::string, int> failures;  // of each function: the error that it returns
std::map<std::string, int> num_calls;
std::map<std::pair<const void*, int>, int> limits;  // of a kernel on a device
int driver = CUDART_VERSION, device_limit = 227 * 1024, num_devices = 1;
thread_local int device = 0, last_error = 0;
bool sticky = false;
int sum = 0;                                      // of what the kernel was given
int num_early = 0;                                // launches that may start early
std::map<int, int> compiled_for;                  // of a device: the architecture of its code
std::map<int, std::pair<int, int>> capabilities;  // of a device: major, minor
int num_forwards = 0;

// The error that a test wants of this call, else `error`; kept as the runtime keeps it.
cudaError_t end(const char* function, cudaError_t error = cudaSuccess) {
  ++num_calls[function];
  if (failures[function] != 0) error = cudaError_t(failures[function]);
  if (error != cudaSuccess) last_error = error;
  return error;
}

struct Params {
  int a, b;
};
void kernel(Params params) { sum += 10 * params.a + params.b; }
void other_kernel(Params) {}

}  // namespace

cudaError_t cudaGetLastError() {
  return cudaError_t(sticky ? last_error : std::exchange(last_error, 0));
}
const char* cudaGetErrorString(cudaError_t) { return "the error's text"; }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorName"; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver;
  return end("cudaDriverGetVersion");
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = num_devices;
  return end("cudaGetDeviceCount");
}
cudaError_t cudaGetDevice(int* result) {
  const std::lock_guard lock(mutex);
  *result = device;
  return end("cudaGetDevice");
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int of_device) {
  const std::lock_guard lock(mutex);
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? capabilities[of_device].first
           : attribute == cudaDevAttrComputeCapabilityMinor ? capabilities[of_device].second
                                                            : device_limit - 1024 * of_device;
  return end("cudaDeviceGetAttribute");
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value) {
  const std::lock_guard lock(mutex);
  const cudaError_t status = end("cudaFuncSetAttribute");
  if (status == cudaSuccess) limits[{function, device}] = value;
  return status;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  const std::lock_guard lock(mutex);
  attributes->ptxVersion = compiled_for[device];
  return end("cudaFuncGetAttributes");
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** arguments) {
  const std::lock_guard lock(mutex);
  const auto& [grid, block, shared_bytes, stream, attributes, num_attributes] = *config;
  const auto limit = limits.find({function, device});
  const size_t allowed = limit == limits.end() ? 48 * 1024 : size_t(limit->second);
  const bool fits = shared_bytes <= allowed && grid.x == 3 && grid.y == 2 && block.x == 64;
  const cudaError_t status =
      end("cudaLaunchKernelExC", fits ? cudaSuccess : cudaErrorInvalidConfiguration);
  if (status == cudaSuccess) {
    for (unsigned i = 0; i < num_attributes; ++i) {
      num_early += attributes[i].id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                   attributes[i].val.programmaticStreamSerializationAllowed == 1;
    }
    reinterpret_cast<void (*)(Params)>(const_cast<void*>(function))(
        *static_cast<Params*>(arguments[0]));
  }
  return status;
}

EXPORT void fail(const char* function, int error) { failures[function] = error; }
EXPORT void set_machine(int driver_version, int devices) {
  driver = driver_version;
  num_devices = devices;
}
EXPORT void set_device(int current) { device = current; }
EXPORT void set_last_error(int error, bool stays) {
  last_error = error;
  sticky = stays;
}
EXPORT int get_last_error() { return last_error; }
EXPORT int calls(const char* function) { return num_calls[function]; }
EXPORT int limit_of_kernel() { return limits[{reinterpret_cast<const void*>(&kernel), device}]; }
EXPORT int kernel_sum() { return sum; }
EXPORT int launch(int shared_bytes) {
  return cogview::launch<kernel>(3, 2, 64, shared_bytes, nullptr, Params{4, 2});
}
EXPORT int launch_other(int shared_bytes) {
  return cogview::launch<other_kernel>(3, 2, 64, shared_bytes, nullptr, Params{4, 2});
}
EXPORT int launch_early() {
  return cogview::launch<kernel, cogview::Start::kEarly>(3, 2, 64, 0, nullptr, Params{4, 2});
}
EXPORT int early_launches() { return num_early; }
EXPORT void set_compiled_for(int of_device, int architecture) {
  compiled_for[of_device] = architecture;
}
EXPORT int launch_blocks(int64_t num_blocks) {
  return cogview::launch<kernel>(num_blocks, 2, 64, 0, nullptr, Params{4, 2});
}

// A family of attention kernels that launches nothing.
cudaError_t cogview::sm80::three_region_attention_forward(const ThreeRegionForwardParams&,
                                                          cudaStream_t) {
  ++num_forwards;
  return cudaSuccess;
}
cudaError_t cogview::sm80::three_region_attention_backward(const ThreeRegionBackwardParams&,
                                                           cudaStream_t) {
  return cudaSuccess;
}
EXPORT void set_capability(int of_device, int major, int minor) {
  capabilities[of_device] = {major, minor};
}
EXPORT const char* unsupported(int of_device) {
  static std::string reason;
  cogview::ThreeRegionProblem problem = {};
  problem.head_dim = 64;
  reason = cogview::three_region_attention_unsupported(problem, cogview::device_of(of_device))
               .value_or("");
  return reason.c_str();
}
EXPORT int forward() {
  cogview::ThreeRegionForwardParams params = {};
  params.problem.head_dim = 64;
  return cogview::three_region_attention_forward(params, nullptr);
}
EXPORT int forwards() { return num_forwards; }

EXPORT const char* problem() {
  static std::string text;
  text = cogview::cuda_problem();
  return text.c_str();
}
EXPORT int driver_version() { return cogview::cuda_driver(); }
