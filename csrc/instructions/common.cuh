// Instructions beyond plain C++ that every architecture we build for has: one wrapper each, named
// after the instruction.
//
// Kernels reach the hardware through the headers of this folder alone, one for each family of
// instructions. nvcc compiles the wrappers to the instructions. With COGVIEW_HOST_MODEL a host
// compiler takes the header of the same name in host_model/ instead, which models the same
// instructions on the CPU as the PTX manual describes them.
#pragma once

#include <cstdint>

#include "../launch.cuh"

#ifdef COGVIEW_HOST_MODEL
#include "../host_model/common.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace cogview {

using Half = __half;
using BFloat16 = __nv_bfloat16;

// Warps

// The value of lane `own lane ^ lane_mask` (shfl.sync.bfly.b32). All 32 lanes must call it; the same
// holds for the other instructions of a warp.
__device__ __forceinline__ float shfl_bfly(float value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}
__device__ __forceinline__ uint32_t shfl_bfly(uint32_t value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

// The value of lane `source_lane` (shfl.sync.idx.b32).
__device__ __forceinline__ int shfl_idx(int value, int source_lane) {
  return __shfl_sync(0xffffffffu, value, source_lane);
}
__device__ __forceinline__ float shfl_idx(float value, int source_lane) {
  return __shfl_sync(0xffffffffu, value, source_lane);
}

// Bit l is set if the predicate of lane l holds (vote.sync.ballot.b32).
__device__ __forceinline__ uint32_t vote_ballot(bool predicate) {
  return __ballot_sync(0xffffffffu, predicate);
}

// The largest value of the warp (redux.sync.max.u32).
__device__ __forceinline__ uint32_t redux_max(uint32_t value) {
  return __reduce_max_sync(0xffffffffu, value);
}

// Waits for all lanes and makes their memory writes visible to each other (bar.warp.sync).
__device__ __forceinline__ void bar_warp_sync() { __syncwarp(); }

// Blocks

// Waits for all threads of the block and makes their writes to shared memory visible (bar.sync).
__device__ __forceinline__ void bar_sync() { __syncthreads(); }

// Waits at barrier `id` for so many threads and makes their writes to shared memory visible to each
// other (bar.sync); other threads go on. 1 to 15: barrier 0 is that of bar_sync() above. Whole warps
// come to it, all to the same place.
__device__ __forceinline__ void bar_sync(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(num_threads) : "memory");
}

// An array in the block's shared memory, one for each instantiation.
template <typename T, int kSize>
__device__ __forceinline__ T* shared_array() {
  __shared__ T array[kSize];
  return array;
}

// The shared memory whose size the launch gives, aligned to 128 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

// Loads sixteen bytes of shared memory (ld.shared.v4).
__device__ __forceinline__ uint4 ld_shared_v4(const void* address) {
  return *static_cast<const uint4*>(address);
}

// Stores sixteen bytes to shared memory (st.shared.v4).
__device__ __forceinline__ void st_shared_v4(void* address, uint4 value) {
  *static_cast<uint4*>(address) = value;
}

// Global memory

// Loads sixteen bytes that no thread of the kernel writes (ld.global.nc.v4).
__device__ __forceinline__ uint4 ld_global_nc_v4(const void* address) {
  return __ldg(static_cast<const uint4*>(address));
}

// Loads sixteen bytes (ld.global.v4).
__device__ __forceinline__ uint4 ld_global_v4(const void* address) {
  return *static_cast<const uint4*>(address);
}

// Stores sixteen bytes to global memory (st.global.v4).
__device__ __forceinline__ void st_global_v4(void* address, uint4 value) {
  asm volatile(
      "st.global.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"l"(__cvta_generic_to_global(address)),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
      : "memory");
}

// Atomically stores the larger of *address and value to *address (red.global.max.u32).
__device__ __forceinline__ void red_global_max(uint32_t* address, uint32_t value) {
  atomicMax(address, value);
}

// Arithmetic

// 2^x with an error up to 2 ulp; denormal results become zero (ex2.approx.ftz.f32).
__device__ __forceinline__ float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// 1 / sqrt(x) of a normal number with an error up to 2^-22.9 of it (rsqrt.approx.ftz.f32).
__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// a b, rounded: not contracted with a sum that it is part of (mul.rn.f32).
__device__ __forceinline__ float mul_rn(float a, float b) { return __fmul_rn(a, b); }

// The bits of a float, and the float that has these bits (mov.b32).
__device__ __forceinline__ uint32_t float_as_uint(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float uint_as_float(uint32_t bits) { return __uint_as_float(bits); }

// The number of set bits (popc.b32).
__device__ __forceinline__ int popc(uint32_t bits) { return __popc(bits); }

// bits << count; zero where count is 32 or more (shl.b32).
__device__ __forceinline__ uint32_t shl(uint32_t bits, uint32_t count) {
  uint32_t out;
  asm("shl.b32 %0, %1, %2;\n" : "=r"(out) : "r"(bits), "r"(count));
  return out;
}

// Conversions, rounded to nearest even (cvt.rn).
__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(Half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(BFloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ Half from_float<Half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Two numbers in one register, `low` in the low half (cvt.rn.f16x2.f32, cvt.rn.bf16x2.f32).
template <typename T>
__device__ __forceinline__ uint32_t cvt_rn_x2(float low, float high);
template <>
__device__ __forceinline__ uint32_t cvt_rn_x2<Half>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
template <>
__device__ __forceinline__ uint32_t cvt_rn_x2<BFloat16>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

// The larger and the smaller number of each half; of a number and a NaN the number (max.f16x2,
// max.bf16x2, min.f16x2, min.bf16x2).
template <typename T>
__device__ __forceinline__ uint32_t max_x2(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t max_x2<Half>(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("max.f16x2 %0, %1, %2;\n" : "=r"(out) : "r"(a), "r"(b));
  return out;
}
template <>
__device__ __forceinline__ uint32_t max_x2<BFloat16>(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("max.bf16x2 %0, %1, %2;\n" : "=r"(out) : "r"(a), "r"(b));
  return out;
}
template <typename T>
__device__ __forceinline__ uint32_t min_x2(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t min_x2<Half>(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("min.f16x2 %0, %1, %2;\n" : "=r"(out) : "r"(a), "r"(b));
  return out;
}
template <>
__device__ __forceinline__ uint32_t min_x2<BFloat16>(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("min.bf16x2 %0, %1, %2;\n" : "=r"(out) : "r"(a), "r"(b));
  return out;
}

}  // namespace cogview

#endif

namespace cogview {

constexpr int kWarpSize = 32;

// The value, kept in a register. ptxas would rather compute an address again, wherever it is used,
// than keep it through a loop; what a shuffle gives it cannot compute again. Whole warps must call it.
__device__ __forceinline__ int kept(int value) { return shfl_idx(value, threadIdx.x % kWarpSize); }

template <typename T>
__device__ __forceinline__ T* kept(T* pointer) {
  const uint64_t bits = reinterpret_cast<uint64_t>(pointer);
  const uint32_t low = kept(int(bits)), high = kept(int(bits >> 32));
  return reinterpret_cast<T*>(uint64_t(high) << 32 | low);
}

// Vectors

// The number of elements in a sixteen-byte access.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

// Loads kVector<T> elements of global memory as float32. The address is a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ void load_vector(const T* address, float (&out)[kVector<T>]) {
  const uint4 bits = ld_global_nc_v4(address);
  const T* elements = reinterpret_cast<const T*>(&bits);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) out[i] = to_float(elements[i]);
}

// Rounds kVector<T> numbers and stores them, likewise.
template <typename T>
__device__ __forceinline__ void store_vector(T* address, const float (&in)[kVector<T>]) {
  uint4 bits;
  T* elements = reinterpret_cast<T*>(&bits);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) elements[i] = from_float<T>(in[i]);
  st_global_v4(address, bits);
}

}  // namespace cogview
