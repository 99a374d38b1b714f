// What every launch interface shares. Plain C++: no torch, no device code.
#pragma once

#ifdef COGVIEW_HOST_MODEL
#include "host_model/runtime.h"
#else
#include <cuda_runtime_api.h>
#endif

#include <cstdint>

namespace cogview {

// Shared memory that a kernel has at most in arrays of its own, beside what is asked for at launch.
constexpr int kMaxArrayBytes = 2048;

// Shared memory of a block that is left for what the system reserves, which some drivers count
// among the kernel's own.
constexpr int kReservedBytes = 1024;

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

}  // namespace cogview
