// What the CUDA driver offers to kernels of the toolkit that this is compiled with. Plain C++.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

namespace cogview {

// A version of CUDA as people write it: 13.0 for 13000.
inline std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// The newest CUDA that the installed driver supports, 0 where there is no driver.
inline int cuda_driver() {
  int version = 0;
  if (cudaDriverGetVersion(&version) == cudaSuccess) return version;
  cudaGetLastError();  // this was a question: the next caller must not find its error
  return 0;
}

// Why no kernel can be launched here, or an empty string. Within a major version a driver runs the
// machine code of newer toolkits; the driver of an older major version runs nothing of them.
inline std::string cuda_problem() {
  const std::string toolkit = version_text(CUDART_VERSION),
                    major = toolkit.substr(0, toolkit.find('.'));
  const int driver = cuda_driver();
  if (driver == 0) return "there is no NVIDIA driver; install one that supports CUDA " + major;
  if (driver / 1000 < CUDART_VERSION / 1000) {
    return "the driver supports CUDA up to " + version_text(driver) +
           ", and the kernels were built with CUDA " + toolkit +
           "; update the driver to one for CUDA " + major +
           ", or rebuild the kernels with a CUDA " + std::to_string(driver / 1000) + " toolkit";
  }
  int num_devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&num_devices);
  if (status == cudaSuccess && num_devices > 0) return "";
  if (status != cudaSuccess) cudaGetLastError();
  switch (status) {
    case cudaSuccess:
    case cudaErrorNoDevice:
      return "no CUDA device is visible; look at nvidia-smi and CUDA_VISIBLE_DEVICES";
    case cudaErrorInsufficientDriver:
      return "the driver (CUDA " + version_text(driver) + ") is too old for CUDA " + toolkit +
             ", which the kernels were built with; update the driver";
    case cudaErrorSystemDriverMismatch:
      return "the driver's kernel module and its library differ in version; restart the machine, "
             "or install the driver again";
    case cudaErrorCompatNotSupportedOnDevice:
      return "CUDA's forward compatibility package does not support this GPU; remove it and update "
             "the driver";
    default:
      return std::string(cudaGetErrorString(status)) + " (" + cudaGetErrorName(status) + ")";
  }
}

}  // namespace cogview
