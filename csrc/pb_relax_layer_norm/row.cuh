// One row of a LayerNorm: who holds which columns, and sums over the row.
//
// A row belongs to kThreadsPerRow threads. Thread t holds, for each i < kVectorsPerThread, the
// kVector<T> columns that begin at (i * kThreadsPerRow + t) * kVector<T>: neighbours read
// neighbouring sixteen bytes. Columns beyond `hidden` hold zero.
#pragma once

#include "../primitives.cuh"
#include "pb_relax_layer_norm.h"

namespace cogview {

constexpr int kElementsPerThread = 16;  // of x, in registers as float32

template <typename T>
constexpr int kVectorsPerThread = kElementsPerThread / kVector<T>;

// Rows narrower than a block share it, one warp each.
template <int kThreadsPerRow>
constexpr int kBlockThreads = kThreadsPerRow < 128 ? 128 : kThreadsPerRow;

template <int kThreadsPerRow>
constexpr int kRowsPerBlock = kBlockThreads<kThreadsPerRow> / kThreadsPerRow;

// A row's registers.
template <typename T>
struct RowRegisters {
  float value[kVectorsPerThread<T>][kVector<T>];
};

template <typename T, int kThreadsPerRow>
__device__ __forceinline__ int column_of(int vector_idx) {
  return (vector_idx * kThreadsPerRow + int(threadIdx.x) % kThreadsPerRow) * kVector<T>;
}

template <typename T, int kThreadsPerRow>
__device__ __forceinline__ void load_row(const T* row, int64_t hidden, RowRegisters<T>& out) {
#pragma unroll
  for (int i = 0; i < kVectorsPerThread<T>; ++i) {
    const int column = column_of<T, kThreadsPerRow>(i);
    if (column < hidden) {
      load_vector(row + column, out.value[i]);
    } else {
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) out.value[i][j] = 0.f;
    }
  }
}

template <typename T, int kThreadsPerRow>
__device__ __forceinline__ void store_row(T* row, int64_t hidden, const RowRegisters<T>& in) {
#pragma unroll
  for (int i = 0; i < kVectorsPerThread<T>; ++i) {
    const int column = column_of<T, kThreadsPerRow>(i);
    if (column < hidden) store_vector(row + column, in.value[i]);
  }
}

// Weight or bias at `column` and the columns after it, whose dtype is T or float32.
template <typename T>
__device__ __forceinline__ void load_parameter(const void* parameter, bool is_float32, int column,
                                               float absent, float (&out)[kVector<T>]) {
  if (parameter == nullptr) {
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) out[j] = absent;
  } else if (is_float32) {
    const float* source = static_cast<const float*>(parameter) + column;
#pragma unroll
    for (int j = 0; j < kVector<T>; j += 4) {
      float four[4];
      load_vector(source + j, four);
#pragma unroll
      for (int l = 0; l < 4; ++l) out[j + l] = four[l];
    }
  } else {
    load_vector(static_cast<const T*>(parameter) + column, out);
  }
}

// One element of a weight or bias.
template <typename T>
__device__ __forceinline__ float load_parameter(const void* parameter, bool is_float32,
                                                int64_t column, float absent) {
  if (parameter == nullptr) return absent;
  if (is_float32) return static_cast<const float*>(parameter)[column];
  return to_float(static_cast<const T*>(parameter)[column]);
}

struct Sum {
  static __device__ __forceinline__ float combine(float a, float b) { return a + b; }
};
struct Max {
  static __device__ __forceinline__ float combine(float a, float b) { return fmaxf(a, b); }
};

// Reduce kCount numbers over the threads of a row; all of them get the same results.
// `scratch` is shared memory of kCount * kThreadsPerRow / 32 floats for each row of the block.
// Consecutive calls must use scratch of their own, or have a barrier between them.
template <typename Operation, int kThreadsPerRow, int kCount>
__device__ __forceinline__ void reduce_row(float (&number)[kCount], float* scratch) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      number[n] = Operation::combine(number[n], shfl_bfly(number[n], mask));
    }
  }
  if constexpr (kThreadsPerRow > kWarpSize) {
    constexpr int kWarps = kThreadsPerRow / kWarpSize;
    if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
      for (int n = 0; n < kCount; ++n) scratch[n * kWarps + threadIdx.x / kWarpSize] = number[n];
    }
    bar_sync();
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      number[n] = scratch[n * kWarps];
      for (int warp = 1; warp < kWarps; ++warp) {
        number[n] = Operation::combine(number[n], scratch[n * kWarps + warp]);
      }
    }
  }
}

}  // namespace cogview
