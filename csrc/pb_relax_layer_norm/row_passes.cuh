// Passes over a row in shared memory: dropout and the statistics.
#pragma once

#include "dropout.cuh"
#include "row_ring.cuh"
#include "statistics.cuh"

namespace cogview {

// f(vector, columns) for each of this thread's vectors of a row; zeros in columns that are not there.
template <typename T, typename Function>
__device__ __forceinline__ void for_each_vector(SharedRow<T> row, const RowThread& me,
                                                const Function& f) {
  for_each_vector(me, [&](auto n, auto columns) {
    Vector<T> vector[n.value] = {};
    if (columns > 0) {
#pragma unroll
      for (int v = 0; v < n; ++v) vector[v] = row.load(v);
    }
#pragma unroll
    for (int v = 0; v < n; ++v) f(vector[v], columns);
    row.skip(n);
  });
}

// A thread's vectors of a row in global memory that is written, from one of them on.
template <typename T, bool kAligned>
struct WrittenRow {
  T* first;

  __device__ __forceinline__ WrittenRow(void* rows, int64_t row, int hidden, const RowThread& me)
      : first(static_cast<T*>(rows) + row * hidden + me.column(0)) {}

  __device__ __forceinline__ void skip(int vectors) { first += vectors * kVectorStep; }

  // Vector i, so many columns of it: all eight where rows are aligned.
  __device__ __forceinline__ void store(int i, int columns, const Vector<T>& vector) const {
    T* to = first + i * kVectorStep;
    if constexpr (kAligned) {
#pragma unroll
      for (int p = 0; p < kPieces<T>; ++p) st_global_v4(to + p * kVector<T>, vector.piece[p]);
    } else {
      store_vector_at(to, 0, columns, false, vector);
    }
  }
};

// Dropped columns become zero. A pass of its own, so that the others are the same with and without it.
template <typename T>
__device__ __forceinline__ void drop_columns(SharedRow<T> x, const Dropout& dropout, int64_t row,
                                             const RowThread& me) {
#pragma unroll 1
  for (int i = 0; i < me.num_vectors; ++i) {
    Vector<T> vector = x.load(0);
    keep_columns(kept_columns(dropout, row, me.vector_idx(i)), vector);
    x.store(0, vector);
    x.skip(1);
  }
}

// Statistics of a row whose `rough` sums are known.
template <typename T>
__device__ __forceinline__ RowStatistics statistics_of_row(const RoughSums<T>& rough,
                                                           const SharedRow<T>& x,
                                                           float inverse_hidden, const Epsilon& eps,
                                                           Relax relax, const float* tensor_peak,
                                                           const RowThread& me, float* scratch) {
  const auto visit = [&](const auto& f) { for_each_vector(x, me, f); };
  return statistics_of_row(rough, visit, inverse_hidden, eps, relax, tensor_peak, me, scratch);
}

}  // namespace cogview
