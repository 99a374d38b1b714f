// Instructions from compute capability 9.0 on: the overlap of a kernel with the one before it on its
// stream (Start::kEarly of launch.cuh). Includes common.cuh.
//
// In code for older architectures they are nothing. Such code starts early nowhere: launch.cuh asks.
#pragma once

#include "common.cuh"

#ifdef COGVIEW_HOST_MODEL
#include "../host_model/sm90.h"
#else

namespace cogview {

// Waits until the kernels before this one have ended and their writes are visible
// (griddepcontrol.wait). Nothing where the kernel did not start early.
__device__ __forceinline__ void griddepcontrol_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// The next kernel may start once a thread of each block has come here, or the block has ended
// (griddepcontrol.launch_dependents). It says nothing of memory: the next kernel must wait.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

}  // namespace cogview

#endif
