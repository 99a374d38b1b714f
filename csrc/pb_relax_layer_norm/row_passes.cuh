// Passes over a row in shared memory: dropout and the statistics.
#pragma once

#include "dropout.cuh"
#include "row_ring.cuh"
#include "statistics.cuh"

namespace cogview {

// f(vector, count) for each of this thread's vectors of a row, `count` of whose columns there are.
template <typename T, typename Function>
__device__ __forceinline__ void for_each_vector(const SharedRow<T>& row, int hidden,
                                                const RowThread& me, const Function& f) {
  in_batches<2>(me.num_whole, [&](int i, auto n) {
    const SharedRow<T> from = row.from(i);
    Vector<T> vector[n.value];
#pragma unroll
    for (int v = 0; v < n.value; ++v) vector[v] = from.load(v);
#pragma unroll
    for (int v = 0; v < n.value; ++v) f(vector[v], kColumns);
  });
  if (me.num_whole < me.num_vectors) f(row.load(me.num_whole), hidden - me.column(me.num_whole));
}

// f(i, n, aligned) for this thread's vectors, which f writes: n of them at once, from i on. n is an
// integral_constant, `aligned` a bool_constant.
template <typename Function>
__device__ __forceinline__ void write_row(bool aligned, const RowThread& me, const Function& f) {
  if (aligned) {
    in_batches<2>(me.num_vectors, [&](int i, auto n) { f(i, n, std::true_type()); });
  } else {
    in_batches<1>(me.num_vectors, [&](int i, auto n) { f(i, n, std::false_type()); });
  }
}

// Stores vector v from `first` on, of whose columns and those behind it `rest` are there.
template <bool kAligned, typename T>
__device__ __forceinline__ void store_vector_of_row(T* first, int v, int rest,
                                                    const Vector<T>& vector) {
  first += v * kWarpSize * kColumns;
  if constexpr (kAligned) {
#pragma unroll
    for (int p = 0; p < kPieces<T>; ++p) st_global_v4(first + p * kVector<T>, vector.piece[p]);
  } else {
    store_vector_at(first, 0, rest - v * kWarpSize * kColumns, false, vector);
  }
}

// Dropped columns become zero. A pass of its own, so that the others are the same with and without it.
template <typename T>
__device__ __forceinline__ void drop_columns(const SharedRow<T>& x, const Dropout& dropout,
                                             int64_t row, const RowThread& me) {
#pragma unroll 1
  for (int i = 0; i < me.num_vectors; ++i) {
    Vector<T> vector = x.load(i);
    keep_columns(kept_columns(dropout, row, me.vector_idx(i)), vector);
    x.store(i, vector);
  }
}

// Statistics of a row whose `rough` sums are known.
template <typename T>
__device__ __forceinline__ RowStatistics statistics_of_row(const RoughSums<T>& rough,
                                                           const SharedRow<T>& x, int hidden,
                                                           float inverse_hidden, const Epsilon& eps,
                                                           Relax relax, const float* tensor_peak,
                                                           const RowThread& me, float* scratch) {
  const auto visit = [&](const auto& f) { for_each_vector(x, hidden, me, f); };
  return statistics_of_row(rough, visit, inverse_hidden, eps, relax, tensor_peak, me, scratch);
}

}  // namespace cogview
