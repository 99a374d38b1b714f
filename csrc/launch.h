// What every launch interface shares. Plain C++: no torch, no device code.
#pragma once

#ifdef COGVIEW_HOST_MODEL
#include "host_model/runtime.h"
#else
#include <cuda_runtime_api.h>
#endif

#include <cstdint>

namespace cogview {

// The most shared memory that a kernel has in arrays of its own, in bytes; what it asks for at launch
// comes on top.
constexpr int kMaxArrayBytes = 3072;

// Left unused of the shared memory that a device allows a block: from compute capability 9.0 on,
// compilers count 1 KB of the system's among a kernel's arrays.
constexpr int kReservedSharedBytes = 1024;

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

}  // namespace cogview
