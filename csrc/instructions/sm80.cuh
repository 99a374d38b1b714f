// Every instruction that a kernel uses beyond plain C++, one wrapper each, named after it.
//
// Kernels reach the hardware through this header alone. nvcc compiles the wrappers to the
// instructions; with COGVIEW_HOST_MODEL a host compiler takes host_model/device.h instead, which
// models the same instructions on the CPU after the PTX manual.
//
// Fragments of m16n8k16, with g = lane / 4 and t = lane % 4, two 16-bit elements to a register:
//   A (16 x 16)  a0: (g, 2t..)   a1: (g + 8, 2t..)   a2: (g, 2t + 8..)   a3: (g + 8, 2t + 8..)
//   B (16 x 8)   b0: (2t.., g)   b1: (2t + 8.., g)                       as (k, n)
//   C (16 x 8)   c0, c1: (g, 2t), (g, 2t + 1)        c2, c3: (g + 8, 2t), (g + 8, 2t + 1)
#pragma once

#include <cstdint>

#include "../launch.h"

#ifdef COGVIEW_HOST_MODEL
#include "../host_model/device.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace cogview {

using Half = __half;
using BFloat16 = __nv_bfloat16;

// Warps

// A register of the lane whose number differs by `lane_mask` (shfl.sync.bfly.b32). All 32 lanes
// must arrive; so must they for all collectives below.
__device__ __forceinline__ float shfl_bfly(float value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}
__device__ __forceinline__ uint32_t shfl_bfly(uint32_t value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

// The register of lane `source_lane` (shfl.sync.idx.b32).
__device__ __forceinline__ int shfl_idx(int value, int source_lane) {
  return __shfl_sync(0xffffffffu, value, source_lane);
}

// Bit l is set where lane l's predicate holds (vote.sync.ballot.b32).
__device__ __forceinline__ uint32_t vote_ballot(bool predicate) {
  return __ballot_sync(0xffffffffu, predicate);
}

// Wait for all lanes and make their memory writes visible to each other (bar.warp.sync).
__device__ __forceinline__ void bar_warp_sync() { __syncwarp(); }

// Blocks

// Wait for all threads of the block and make their shared memory writes visible (bar.sync).
__device__ __forceinline__ void bar_sync() { __syncthreads(); }

// Shared memory: an array of the block's own, one for each instantiation.
template <typename T, int kSize>
__device__ __forceinline__ T* shared_array() {
  __shared__ T array[kSize];
  return array;
}

// Shared memory of the size given at launch, aligned to 128 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

// Sixteen bytes of shared memory (ld.shared.v4).
__device__ __forceinline__ uint4 ld_shared_v4(const void* address) {
  return *static_cast<const uint4*>(address);
}

// Sixteen bytes to shared memory (st.shared.v4).
__device__ __forceinline__ void st_shared_v4(void* address, uint4 value) {
  *static_cast<uint4*>(address) = value;
}

// Global memory

// Sixteen bytes that the kernel never writes (ld.global.nc.v4).
__device__ __forceinline__ uint4 ld_global_nc_v4(const void* address) {
  return __ldg(static_cast<const uint4*>(address));
}

// Sixteen bytes to global memory (st.global.v4).
__device__ __forceinline__ void st_global_v4(void* address, uint4 value) {
  asm volatile(
      "st.global.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"l"(__cvta_generic_to_global(address)),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
      : "memory");
}

// The larger of *address and value, to *address (red.global.max.u32).
__device__ __forceinline__ void red_global_max(uint32_t* address, uint32_t value) {
  atomicMax(address, value);
}

// Global to shared memory, asynchronous

// Sixteen bytes (cp.async.cg.shared.global, src-size 0 or 16): zeros where not `valid`, and then
// nothing is read. Both addresses are multiples of 16, `global` also where it is not read.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Four bytes (cp.async.ca.shared.global, src-size 0 or 4).
__device__ __forceinline__ void cp_async_4(void* shared, const void* global, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(address), "l"(global),
               "r"(valid ? 4 : 0)
               : "memory");
}

// The calling thread's copies since the last commit become a group (cp.async.commit_group).
__device__ __forceinline__ void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Wait until at most kPending of the calling thread's groups are under way (cp.async.wait_group).
// Other threads see what they copied after a barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Matrices

// Four 8 x 8 matrices of 16-bit elements; lanes 8i..8i+7 give the addresses of the rows of matrix
// i (ldmatrix.sync.aligned.m8n8.x4.shared.b16). Lane l gets elements 2 (l % 4), + 1 of row l / 4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// The same, each matrix transposed (.trans): rows 2 (l % 4), + 1 of column l / 4.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&out)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// c += A B with float32 sums (mma.sync.aligned.m16n8k16.row.col.f32).
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);
template <>
__device__ __forceinline__ void mma_m16n8k16<Half>(float (&c)[4], const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<BFloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                       uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Arithmetic

// 2^x, error up to 2 ulp, denormal results flushed to zero (ex2.approx.ftz.f32).
__device__ __forceinline__ float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// The bits of a float (mov.b32).
__device__ __forceinline__ uint32_t float_as_uint(float value) { return __float_as_uint(value); }

// Number of bits set (popc.b32).
__device__ __forceinline__ int popc(uint32_t bits) { return __popc(bits); }

// Conversions, rounding to nearest even (cvt.rn).
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

// Launch

// Shared memory that a block may have, in bytes: its arrays and what is asked for at launch.
inline cudaError_t max_shared_bytes(int* bytes) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  return cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// Run kKernel(params) on num_blocks x grid_y blocks with `shared_bytes` of dynamic_shared(), beside
// at most `array_bytes` of shared_array.
template <auto kKernel, typename Params>
cudaError_t launch(int64_t num_blocks, int grid_y, int num_threads, int shared_bytes,
                   cudaStream_t stream, const Params& params,
                   int array_bytes = kMaxArrayBytes) {
  if (num_blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared_bytes > 0) {  // needed where it exceeds 48 KB together with shared_array
    // The attribute is the kernel's: the same for all its launches, or one of another thread, or of
    // a captured graph, could find it too small.
    int most = 0;
    cudaError_t status = max_shared_bytes(&most);
    if (status != cudaSuccess) return status;
    most -= array_bytes + kReservedBytes;
    if (most < shared_bytes) most = shared_bytes;
    status = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (status != cudaSuccess) return status;
  }
  const dim3 grid(unsigned(num_blocks), unsigned(grid_y), 1);
  // clang-format off: it reads >>> as three brackets
  kKernel<<<grid, num_threads, shared_bytes, stream>>>(params);
  // clang-format on
  return cudaGetLastError();
}

}  // namespace cogview

#endif

namespace cogview {

constexpr int kWarpSize = 32;

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
