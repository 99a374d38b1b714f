// How rows reach the groups of threads that own them: the copies into shared memory, the loop over
// rows, and the weights and biases beside them.
//
// A row lies in shared memory as it lies in global memory, but that of 32 neighbouring vectors of
// float32 the first pieces stand together, and behind them the second ones: the lanes of a warp reach
// into different banks. A thread copies, reads and overwrites its own vectors alone: waiting for its
// own copies is all the synchronisation that rows need.
#pragma once

#include <type_traits>

#include "../instructions/sm80.cuh"
#include "plan.h"
#include "vector.cuh"

namespace cogview {

constexpr int kVectorStep = kWarpSize * kColumns;  // columns from a thread's vector to its next one

// A thread among those of its row. Each warp has a part of the row, and deals it out to its lanes, so
// that a thread's vectors are a constant apart.
struct RowThread {
  int in_row;           // number of this thread among those of its row
  int threads_per_row;  // whole warps
  int row_in_block;     // number of the group
  int lanes_for_warps;  // a power of two that is not less than the number of the row's warps
  int first_vector;     // of this thread's vectors, which are kWarpSize apart
  int num_full;         // of them: those that all lanes of the warp have, with eight columns
  bool has_tail;        // whether a lane of the warp has one behind those
  int tail;             // how many columns of it this thread has
  int num_vectors;      // that this thread has

  __device__ __forceinline__ RowThread(const RowPlan& plan, int64_t hidden)
      : in_row(int(threadIdx.x) % plan.threads_per_row),
        threads_per_row(plan.threads_per_row),
        // Of lane 0: the compiler learns that a warp's threads go through the same rows.
        row_in_block(shfl_idx(int(threadIdx.x) / plan.threads_per_row, 0)),
        lanes_for_warps(1) {
    while (lanes_for_warps * kWarpSize < threads_per_row) lanes_for_warps *= 2;
    const int most = plan.vectors_per_thread;
    const int of_lane_0 = shfl_idx(in_row / kWarpSize * kWarpSize * most, 0);
    const int columns = max(0, int(hidden) - of_lane_0 * kColumns);  // from there on
    num_full = min(most, columns / kVectorStep);
    has_tail = num_full < most && columns > num_full * kVectorStep;
    first_vector = of_lane_0 + in_row % kWarpSize;
    tail = has_tail ? max(0, min(kColumns, int(hidden) - column(num_full))) : 0;
    num_vectors = num_full + int(tail > 0);
  }

  // Of this thread's vectors.
  __device__ __forceinline__ int vector_idx(int i) const { return first_vector + i * kWarpSize; }
  __device__ __forceinline__ int column(int i) const { return vector_idx(i) * kColumns; }

  // Waits for all threads of the row.
  __device__ __forceinline__ void sync() const {
    if (threads_per_row == kWarpSize) {
      bar_warp_sync();
    } else {
      bar_sync(1 + row_in_block, threads_per_row);
    }
  }
};

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
  __host__ __device__ constexpr operator int() const { return kValue; }
};

// f(n, columns) for this thread's vectors, n of them at once, which have so many columns: eight, but
// in the last call perhaps fewer, or none where other lanes of the warp have some. n, and columns in
// all calls but the last, are Constants. Warps stay together.
template <typename Function>
__device__ __forceinline__ void for_each_vector(const RowThread& me, const Function& f) {
  int left = me.num_full;
#pragma unroll 1
  for (; left >= 2; left -= 2) f(Constant<2>(), Constant<kColumns>());
  if (left > 0) f(Constant<1>(), Constant<kColumns>());
  if (me.has_tail) f(Constant<1>(), me.tail);
}

// A thread's vectors of a row of T in shared memory, from one of them on.
template <typename T>
struct SharedRow {
  static constexpr int kStep = kWarpSize * kPieces<T>;  // from one to the next
  uint4* first;

  __device__ __forceinline__ SharedRow(void* row, int first_vector)
      : first(static_cast<uint4*>(row) + first_vector / kWarpSize * kStep +
              first_vector % kWarpSize) {}
  __device__ __forceinline__ SharedRow(void* row, const RowThread& me)
      : SharedRow(row, me.first_vector) {}

  // The next vectors. Where loops move on what they read and write, no address is computed again.
  __device__ __forceinline__ void skip(int vectors) { first += vectors * kStep; }

  __device__ __forceinline__ uint4* piece(int i, int p) const {
    return first + (i * kStep + p * kWarpSize);
  }
  __device__ __forceinline__ Vector<T> load(int i) const {
    Vector<T> vector;
#pragma unroll
    for (int p = 0; p < kPieces<T>; ++p) vector.piece[p] = ld_shared_v4(piece(i, p));
    return vector;
  }
  __device__ __forceinline__ void store(int i, const Vector<T>& vector) const {
#pragma unroll
    for (int p = 0; p < kPieces<T>; ++p) st_shared_v4(piece(i, p), vector.piece[p]);
  }
  // Begins to copy this thread's vectors of a row.
  __device__ __forceinline__ void copy(const ConstRows& rows, int64_t row, int hidden, bool aligned,
                                       const RowThread& me) const {
    const T* source = static_cast<const T*>(rows.data) + row * rows.row_stride + me.column(0);
    SharedRow to = *this;
    if (aligned) {
      constexpr int kAtOnce = 4;
#pragma unroll 1
      for (int left = me.num_vectors; left > 0; left -= kAtOnce) {
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) {
          if (v >= left) continue;
#pragma unroll
          for (int p = 0; p < kPieces<T>; ++p) {
            cp_async_16(to.piece(v, p), source + (v * kVectorStep + p * kVector<T>), true);
          }
        }
        source += kAtOnce * kVectorStep;
        to.skip(kAtOnce);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < me.num_vectors; ++i) {
        to.store(0, load_vector_at(source, 0, hidden - me.column(i), false));
        source += kVectorStep;
        to.skip(1);
      }
    }
  }
};

// For each row of this thread's group: copy(row, stage), ahead, then compute(row, stage); `stage` is
// where the row lies in shared memory. prepare() is called behind the first copies.
// A row goes to block row % gridDim.x, so that multiprocessors differ by one row at most.
template <typename Copy, typename Prepare, typename Compute>
__device__ __forceinline__ void for_each_row(const RowPlan& plan, const RowMemory& shared,
                                             int64_t rows, const RowThread& me, const Copy& copy,
                                             const Prepare& prepare, const Compute& compute) {
  const int64_t step = int64_t{gridDim.x} * plan.rows_per_block;
  int64_t row = blockIdx.x + int64_t{gridDim.x} * me.row_in_block;
  int64_t ahead = row;  // the next row to copy
  unsigned char* now = dynamic_shared() + shared.stage(me.row_in_block, 0);
  unsigned char* next = plan.stages == 2 ? now + shared.stage_bytes : now;
#pragma unroll 1
  for (int stage = 0; stage < plan.stages; ++stage) {
    if (ahead < rows) copy(ahead, stage == 0 ? now : next);
    cp_async_commit_group();
    ahead += step;
  }
  prepare();
#pragma unroll 1
  for (; row < rows; row += step) {
    if (plan.stages == 2) {
      cp_async_wait_group<1>();
    } else {
      cp_async_wait_group<0>();
    }
    compute(row, now);
    if (ahead < rows) copy(ahead, now);
    cp_async_commit_group();
    ahead += step;
    unsigned char* other = now;
    now = next;
    next = other;
  }
  cp_async_wait_group<0>();
}

// A weight or a bias as it is given.
struct Parameter {
  const void* data;  // (hidden), may be null: all elements are `absent`
  DType dtype;
  float absent;
};

// Eight elements from `column` on; zero beyond `hidden`.
__device__ __forceinline__ void load_parameter(const Parameter& given, int64_t column,
                                               int64_t hidden, float (&out)[kColumns]) {
  const bool aligned =
      hidden % kColumns == 0 && reinterpret_cast<uintptr_t>(given.data) % kPieceBytes == 0;
  if (given.data == nullptr) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) out[j] = given.absent;
  } else if (given.dtype == DType::kFloat32) {
    unpack(load_vector_at(static_cast<const float*>(given.data), column, hidden, aligned), out);
  } else {
    Vector<Half> vector =
        load_vector_at(static_cast<const Half*>(given.data), column, hidden, aligned);
    float other[kColumns];
    unpack(vector, out);
    unpack(Vector<BFloat16>{vector.piece[0]}, other);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (given.dtype == DType::kBFloat16) out[j] = other[j];
    }
  }
}

// The whole block fills shared memory with rows of float32. A barrier must follow.
template <int kCount>
__device__ __forceinline__ void fill_parameters(const RowMemory& shared,
                                                const Parameter (&given)[kCount], int64_t hidden) {
  for (int64_t v = threadIdx.x; v * kColumns < hidden; v += blockDim.x) {
    float value[kCount][kColumns];
#pragma unroll
    for (int n = 0; n < kCount; ++n) load_parameter(given[n], v * kColumns, hidden, value[n]);
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      SharedRow<float>(dynamic_shared() + shared.parameter(n), int(v))
          .store(0, pack<float>(value[n]));
    }
  }
}

}  // namespace cogview
