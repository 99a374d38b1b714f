// Instructions from compute capability 8.0 on: asynchronous copies to shared memory, and products of
// 16-bit matrices by one warp. Includes common.cuh.
//
// Fragments of m16n8k16, with g = lane / 4 and t = lane % 4, two 16-bit elements to a register:
//   A (16 x 16)  a0: (g, 2t..)   a1: (g + 8, 2t..)   a2: (g, 2t + 8..)   a3: (g + 8, 2t + 8..)
//   B (16 x 8)   b0: (2t.., g)   b1: (2t + 8.., g)                       as (k, n)
//   C (16 x 8)   c0, c1: (g, 2t), (g, 2t + 1)        c2, c3: (g + 8, 2t), (g + 8, 2t + 1)
#pragma once

#include "common.cuh"

#ifdef COGVIEW_HOST_MODEL
#include "../host_model/sm80.h"
#else

namespace cogview {

// Asynchronous copies from global to shared memory

// Copies sixteen bytes (cp.async.cg.shared.global, src-size 0 or 16). Where not `valid` it writes
// zeros and reads nothing. Both addresses are multiples of 16, `global` even where it is not read.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Copies four bytes, likewise (cp.async.ca.shared.global, src-size 0 or 4).
__device__ __forceinline__ void cp_async_4(void* shared, const void* global, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(address), "l"(global),
               "r"(valid ? 4 : 0)
               : "memory");
}

// Makes a group of the calling thread's copies since its last commit (cp.async.commit_group).
__device__ __forceinline__ void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most kPending of the calling thread's groups are still running
// (cp.async.wait_group). Other threads see the copied bytes after a barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Matrices

// Loads four 8 x 8 matrices of 16-bit elements (ldmatrix.sync.aligned.m8n8.x4.shared.b16). Lanes
// 8i..8i+7 give the addresses of the rows of matrix i. Lane l gets elements 2 (l % 4) and
// 2 (l % 4) + 1 of row l / 4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// The same with each matrix transposed (.trans): lane l gets rows 2 (l % 4) and 2 (l % 4) + 1 of
// column l / 4.
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

}  // namespace cogview

#endif
