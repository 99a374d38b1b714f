// How rows reach their threads: who holds which columns, the copies into shared memory, the loop
// over rows, and the weights and biases beside them.
#pragma once

#include "../instructions/sm80.cuh"
#include "plan.h"
#include "vector.cuh"

namespace cogview {

// A thread among those of its row.
struct RowThread {
  int in_row;           // number of this thread among those of its row
  int threads_per_row;  // whole warps
  int row_in_block;
  int lanes_for_warps = 1;

  __device__ __forceinline__ explicit RowThread(const RowPlan& plan)
      : in_row(int(threadIdx.x) % plan.threads_per_row),
        threads_per_row(plan.threads_per_row),
        row_in_block(int(threadIdx.x) / plan.threads_per_row) {
    while (lanes_for_warps * kWarpSize < threads_per_row) lanes_for_warps *= 2;
  }

  // Of this thread's vectors.
  __device__ __forceinline__ int vector_idx(int i) const { return i * threads_per_row + in_row; }
  __device__ __forceinline__ int column(int i) const { return vector_idx(i) * kColumns; }

  // All threads of the block come.
  __device__ __forceinline__ void sync() const { bar_sync(); }
};

// A thread's own slots of sixteen bytes in shared memory, side by side.
struct Slots {
  uint4* first;

  template <typename T>
  __device__ __forceinline__ Vector<T> load(int slot) const {
    Vector<T> vector;
#pragma unroll
    for (int p = 0; p < kPieces<T>; ++p) vector.piece[p] = ld_shared_v4(first + slot + p);
    return vector;
  }
  __device__ __forceinline__ RowStatistics load_statistics(int slot) const {
    const uint4 bits = ld_shared_v4(first + slot);
    return *reinterpret_cast<const RowStatistics*>(&bits);
  }
  template <typename T>
  __device__ __forceinline__ void store(int slot, const Vector<T>& vector) const {
#pragma unroll
    for (int p = 0; p < kPieces<T>; ++p) st_shared_v4(first + slot + p, vector.piece[p]);
  }
};

// Begin to copy this thread's vectors of a row to its slots, vector i from first_slot + i * step
// on: zeros beyond `hidden`, and where there is no row.
template <typename T, int kVectors>
__device__ __forceinline__ void copy_row(const ConstRows& rows, int64_t row, bool is_row,
                                         int64_t hidden, bool aligned, const RowThread& me,
                                         const Slots& slots, int first_slot,
                                         int step = kPieces<T>) {
  const T* source = static_cast<const T*>(rows.data) + row * rows.row_stride;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int column = me.column(i);
    if (aligned) {
#pragma unroll
      for (int p = 0; p < kPieces<T>; ++p) {
        cp_async_16(slots.first + first_slot + i * step + p, source + column + p * kVector<T>,
                    is_row && column < hidden);
      }
    } else {
      T* elements = reinterpret_cast<T*>(slots.first + first_slot + i * step);
#pragma unroll 1
      for (int j = 0; j < kColumns; ++j) {
        elements[j] = is_row && column + j < hidden ? source[column + j] : from_float<T>(0.f);
      }
    }
  }
}

// For each row of this thread: copy(row, is_row, slots), ahead, and then
// compute(row, is_row, slots, round). All threads of a block make the same number of rounds.
template <typename Copy, typename Compute>
__device__ __forceinline__ void for_each_row(const RowPlan& plan, const SharedMemoryPlan& shared,
                                             int64_t rows, const RowThread& me, const Copy& copy,
                                             const Compute& compute) {
  const int64_t step = int64_t(gridDim.x) * plan.rows_per_block;
  const int64_t first = int64_t(blockIdx.x) * plan.rows_per_block;
  int64_t row = first + me.row_in_block;
  Slots now = {reinterpret_cast<uint4*>(dynamic_shared()) +
               int(threadIdx.x) * shared.apart(shared.stage_slots)};
  Slots next = {now.first + (plan.stages == 2 ? shared.stage(1) : 0)};
  copy(row, row < rows, now);
  cp_async_commit_group();
  int round = 0;
  for (int64_t begin = first; begin < rows; begin += step) {
    if (plan.stages == 2) {
      copy(row + step, row + step < rows, next);
      cp_async_commit_group();
      cp_async_wait_group<1>();
    } else {
      cp_async_wait_group<0>();
    }
    compute(row, row < rows, now, round);
    if (plan.stages == 1) {
      copy(row + step, row + step < rows, next);
      cp_async_commit_group();
    }
    const Slots other = now;
    now = next;
    next = other;
    row += step;
    ++round;
  }
  cp_async_wait_group<0>();
}

// Eight elements of dtype T or float32 from `column` on, `absent` where the parameter is not given;
// zero beyond `hidden`.
template <typename T>
__device__ __forceinline__ void load_parameter(const void* parameter, DType dtype, float absent,
                                               int64_t column, int64_t hidden,
                                               float (&out)[kColumns]) {
  const bool aligned =
      hidden % kColumns == 0 && reinterpret_cast<uintptr_t>(parameter) % kPieceBytes == 0;
  if (parameter == nullptr) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) out[j] = absent;
  } else if (dtype == DType::kFloat32) {
    unpack(load_vector_at(static_cast<const float*>(parameter), column, hidden, aligned), out);
  } else {
    unpack(load_vector_at(static_cast<const T*>(parameter), column, hidden, aligned), out);
  }
}

// Weights and biases in shared memory, float32, in slots of the threads that need them; the rows of
// a block share them.
template <int kCount, int kVectors>
struct SharedParameters {
  static constexpr int kSlots = kCount * kVectors * kPieces<float>;  // of a thread
  uint4* slots;                                                      // of the first thread of a row
  int in_row;

  __device__ __forceinline__ SharedParameters(const SharedMemoryPlan& shared, const RowThread& me)
      : slots(reinterpret_cast<uint4*>(dynamic_shared()) + shared.parameters()),
        in_row(me.in_row) {}

  __device__ __forceinline__ Slots of_thread(int thread) const {
    return {slots + thread * SharedMemoryPlan::apart(kSlots)};
  }

  // A barrier must follow the last one.
  template <typename T>
  __device__ __forceinline__ void fill(int which, const void* parameter, DType dtype, float absent,
                                       int64_t hidden, const RowThread& me) const {
    for (int64_t v = threadIdx.x; v * kColumns < hidden; v += blockDim.x) {
      float value[kColumns];
      load_parameter<T>(parameter, dtype, absent, v * kColumns, hidden, value);
      const int i = int(v) / me.threads_per_row;
      of_thread(int(v) % me.threads_per_row)
          .store((which * kVectors + i) * kPieces<float>, pack<float>(value));
    }
  }

  __device__ __forceinline__ void load(int which, int i, float (&out)[kColumns]) const {
    unpack(of_thread(in_row).template load<float>((which * kVectors + i) * kPieces<float>), out);
  }
};

}  // namespace cogview
