// Every instruction that a kernel uses beyond plain C++, one wrapper each, named after it.
//
// Kernels reach warp shuffles, barriers and wide memory accesses through this header alone, so
// that there is one place to read what the hardware is asked to do.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace cogview {

constexpr int kWarpSize = 32;

// Exchange a register with the lane whose number differs by `lane_mask` (shfl.sync.bfly.b32).
// All 32 lanes must arrive.
__device__ __forceinline__ float shfl_bfly(float value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

// Wait for all threads of the block and make their shared memory writes visible (bar.sync).
__device__ __forceinline__ void bar_sync() { __syncthreads(); }

// Sixteen bytes of global memory that the kernel never writes (ld.global.nc.v4).
__device__ __forceinline__ uint4 ld_global_nc_v4(const void* address) {
  return __ldg(static_cast<const uint4*>(address));
}

// Sixteen bytes to global memory (st.global.v4).
__device__ __forceinline__ void st_global_v4(void* address, uint4 value) {
  *static_cast<uint4*>(address) = value;
}

// Conversions, rounding to nearest even (cvt.rn).
__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Number of elements in a sixteen-byte access.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

// kVector<T> elements of global memory, as float32. The address is a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ void load_vector(const T* address, float (&out)[kVector<T>]) {
  const uint4 bits = ld_global_nc_v4(address);
  const T* elements = reinterpret_cast<const T*>(&bits);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) out[i] = to_float(elements[i]);
}

template <typename T>
__device__ __forceinline__ void store_vector(T* address, const float (&in)[kVector<T>]) {
  uint4 bits;
  T* elements = reinterpret_cast<T*>(&bits);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) elements[i] = from_float<T>(in[i]);
  st_global_v4(address, bits);
}

}  // namespace cogview
