// The Python module `cogview_kernels._C`: what was built, and what the CUDA driver offers here.
// Importing it registers the operators of csrc/operators/.

#include <pybind11/pybind11.h>

#ifdef COGVIEW_KERNELS_CUDA
#include "driver.h"
#include "three_region_attention/bindings.h"
#endif

// A JSON list, one entry per kernel and architecture, which the build writes.
extern const char* const kKernelResources;
// A digest of the sources that the kernels were compiled from.
extern const char* const kKernelSources;

PYBIND11_MODULE(_C, m) {
#ifdef COGVIEW_KERNELS_CUDA
  m.attr("cuda_architectures") = COGVIEW_KERNELS_ARCHITECTURES;
  m.attr("cuda_compiler") = CUDART_VERSION;
  m.def("cuda_driver", &cogview::cuda_driver,
        "The newest CUDA that the driver supports, such as 13000; 0 without a driver.");
  m.def("cuda_problem", &cogview::cuda_problem,
        "Why no kernel can be launched here; empty if one can.");
  cogview::define_three_region_attention(m);
#else
  m.attr("cuda_architectures") = "";
#endif
  m.attr("kernel_resources") = kKernelResources;
  m.attr("kernel_sources") = kKernelSources;
  m.attr("torch_built_with") = COGVIEW_KERNELS_TORCH;
}
