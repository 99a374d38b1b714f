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

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

}  // namespace cogview
