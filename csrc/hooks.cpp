// The Python module `cogview_kernels._C`: what was built, and what the CUDA driver offers here.
// Importing it registers the operators of ops.cpp.

#include <pybind11/pybind11.h>

#include <string>

#ifdef COGVIEW_KERNELS_CUDA
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;

namespace {

#ifdef COGVIEW_KERNELS_CUDA
// Why no kernel can be launched here, or an empty string.
std::string cuda_problem() {
  int num_devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&num_devices);
  if (status != cudaSuccess) {
    cudaGetLastError();  // clear it: this was a question, not a failure
    return cudaGetErrorString(status);
  }
  return num_devices == 0 ? "no CUDA device is visible" : "";
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
#ifdef COGVIEW_KERNELS_CUDA
  m.attr("cuda_architectures") = COGVIEW_KERNELS_ARCHITECTURES;
  m.attr("cuda_compiler") = CUDART_VERSION;
  m.def("cuda_problem", &cuda_problem, "Why no kernel can be launched here; empty if one can.");
#else
  m.attr("cuda_architectures") = "";
#endif
  // A JSON list, one entry per kernel and architecture, written by the build.
  m.attr("kernel_resources") =
#include "kernel_resources.inc"
      ;
  m.attr("torch_built_with") = COGVIEW_KERNELS_TORCH;
}
