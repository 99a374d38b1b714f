// What the backward kernels share: a thread's columns and where they arrive in shared memory, the
// loop over rows, sums over a row and over columns, the gradient of a row.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "../instructions/sm80.cuh"
#include "../instructions/sm90.cuh"
#include "dropout.cuh"
#include "row_ring.cuh"

namespace cogview {

// Columns

// The columns of a thread, kVectors vectors of them, 32 vectors apart: a warp has those of 32
// kVectors vectors side by side. All that a thread reads and writes of a row is thus at distances
// known at compile time, in global as in shared memory.
template <int kVectors>
struct Columns {
  static constexpr int kApart = kWarpSize * kColumns;  // from vector to vector, in columns

  int hidden;
  int left;  // columns of the row from the first one on; none where it is not positive

  __device__ __forceinline__ Columns(const RowThread& me, int hidden)
      : hidden(hidden),
        left(hidden -
             (me.in_row / kWarpSize * kWarpSize * kVectors + me.in_row % kWarpSize) * kColumns) {}

  // Computed from `left`, lest it takes a register of its own.
  __device__ __forceinline__ int first() const { return hidden - left; }
  __device__ __forceinline__ int vector_idx(int i) const {
    return first() / kColumns + i * kWarpSize;
  }
  __device__ __forceinline__ bool has(int i) const { return i * kApart < left; }
};

// Sixteen-byte slots of a thread in shared memory; those of a warp's lanes are side by side, so that
// no access has bank conflicts.
struct Slots {
  static constexpr int kApart = kWarpSize * kPieceBytes;

  int first;  // from dynamic_shared() on: of an offset, one register holds all addresses

  // `memory`: where that of the warp begins.
  static __device__ __forceinline__ Slots of_warp(int memory) {
    return {memory + int(threadIdx.x) % kWarpSize * kPieceBytes};
  }
  __device__ __forceinline__ unsigned char* at(int slot) const {
    return dynamic_shared() + (first + slot * kApart);
  }

  template <typename T>
  __device__ __forceinline__ Vector<T> load(int slot) const {
    Vector<T> vector;
#pragma unroll
    for (int p = 0; p < kPieces<T>; ++p) vector.piece[p] = ld_shared_v4(at(slot + p));
    return vector;
  }
  template <typename T>
  __device__ __forceinline__ void store(int slot, const Vector<T>& vector) const {
#pragma unroll
    for (int p = 0; p < kPieces<T>; ++p) st_shared_v4(at(slot + p), vector.piece[p]);
  }

  // Begins to copy a thread's vectors to slots from `slot` on, zeros beyond the row's end. `from`:
  // its first column of the row.
  template <typename T, int kVectors>
  __device__ __forceinline__ void copy(int slot, const T* from, const Columns<kVectors>& columns,
                                       bool aligned) const {
    constexpr int kApart = Columns<kVectors>::kApart;
    if (aligned) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
#pragma unroll
        for (int p = 0; p < kPieces<T>; ++p) {
          cp_async_16(at(slot + i * kPieces<T> + p), from + i * kApart + p * kVector<T>,
                      columns.has(i));
        }
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kVectors; ++i) {
        store(slot + i * kPieces<T>, load_vector_at(from, i * kApart, columns.left, false));
      }
    }
  }

  // Drops columns of a vector, which only this thread reads.
  template <typename T>
  __device__ __forceinline__ void keep(int slot, uint32_t kept) const {
    Vector<T> vector = load<T>(slot);
    keep_columns(kept, vector);
    store(slot, vector);
  }
};

// Where a row arrives, for each of its warps: so many slots of each lane, and the row's statistics,
// of which each warp has its own: it need not wait for others. A warp's stages are side by side; of
// what is behind the last one's statistics, RowSums uses kSumBytes.
struct StageSlots {
  static constexpr int kSumBytes = 16;

  int slots, statistics;

  __host__ __device__ constexpr int bytes() const {
    return slots * Slots::kApart + statistics * int(sizeof(RowStatistics)) + kSumBytes;
  }
  // Begins to copy the statistics; `from`: of each lane below `statistics`.
  __device__ __forceinline__ void copy_statistics(const Slots& stage,
                                                  const RowStatistics* from) const {
    if (int(threadIdx.x % kWarpSize) < statistics) cp_async_16(stage.at(slots), from, true);
  }
  __device__ __forceinline__ RowStatistics load_statistics(const Slots& stage, int which) const {
    const int lane = threadIdx.x % kWarpSize;
    const uint4 bits = ld_shared_v4(stage.at(slots) + (which - lane) * kPieceBytes);
    return *reinterpret_cast<const RowStatistics*>(&bits);
  }
};

// Of the block's dynamic shared memory: weights, then for each group, for each of its warps, its
// stages.
struct WarpMemory {
  int bytes;  // of a warp
  int own;    // where that of this thread's warp begins

  __device__ __forceinline__ WarpMemory(const RowPlan& plan, const StageSlots& stage,
                                        int weight_bytes)
      : bytes(plan.stages * stage.bytes()),
        own(weight_bytes + int(threadIdx.x) / kWarpSize * bytes) {}

  __device__ __forceinline__ int of_first_warp(const RowThread& me) const {
    return own - me.in_row / kWarpSize * bytes;
  }
};

// Rows

// The first row of a group. A row goes to block row % gridDim.x, so that multiprocessors differ by
// one row at most.
__device__ __forceinline__ int64_t first_row(const RowThread& me) {
  return blockIdx.x + int64_t{gridDim.x} * me.row_in_block;
}

// A pointer so many bytes further on.
template <typename T>
__device__ __forceinline__ T* advanced(T* pointer, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const unsigned char, unsigned char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(pointer) + bytes);
}

// For each row of this thread's group, from `first` on: compute(row, stage, turn, refill), where turn
// is 0 and 1 in turn. copy(row, stage) begins to copy a row, as many rows ahead as there are stages:
// compute calls refill() once it has read all of `stage`. prepare() is called behind the first
// copies. `own`: where the memory of this thread's warp begins. Row: uint32_t where that holds all
// numbers of rows, else int64_t. Returns the slots of the first stage.
template <typename Row, typename Copy, typename Prepare, typename Compute>
__device__ __forceinline__ Slots for_each_row_ahead(const RowPlan& plan, const RowSteps& steps,
                                                    const StageSlots& slots, int own, Row rows,
                                                    Row first, const Copy& copy,
                                                    const Prepare& prepare,
                                                    const Compute& compute) {
  const Row step = Row(steps.rows);
  Row row = first;
  const Slots first_stage = Slots::of_warp(own);
  const int apart = plan.stages == 2 ? slots.bytes() : 0;
  int turn = 0;
  const auto stage = [&] { return Slots{first_stage.first + turn * apart}; };
  if (row < rows) copy(row, stage());
  cp_async_commit_group();
  if (plan.stages == 2) {
    turn = 1;
    if (row + step < rows) copy(row + step, stage());
    cp_async_commit_group();
    turn = 0;
  }
  prepare();
  for (; row < rows; row += step) {
    if (plan.stages == 2) {
      cp_async_wait_group<1>();
    } else {
      cp_async_wait_group<0>();
    }
    bar_warp_sync();  // lanes copied statistics for all
    compute(row, stage(), turn, [&] {
      bar_warp_sync();
      const Row next = row + Row(steps.ahead);
      if (next < rows) copy(next, stage());
      cp_async_commit_group();
    });
    turn ^= 1;
  }
  cp_async_wait_group<0>();
  return first_stage;
}

// A thread's elements of a weight, which has dtype T or float32.
template <typename T, int kVectors>
__device__ __forceinline__ void load_weight(const void* weight, DType dtype,
                                            const Columns<kVectors>& columns, int64_t hidden,
                                            float (&out)[kVectors][kColumns]) {
  const bool aligned =
      hidden % kColumns == 0 && reinterpret_cast<uintptr_t>(weight) % kPieceBytes == 0;
  const auto load = [&](auto tag) {
    const auto* from = static_cast<const decltype(tag)*>(weight) + columns.first();
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      unpack(load_vector_at(from, i * columns.kApart, columns.left, aligned), out[i]);
    }
  };
  if (weight == nullptr) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) out[i][j] = 1.f;
    }
  } else if (dtype == DType::kFloat32) {
    load(float());
  } else {
    load(T());
  }
}

// Weights of a row's columns in shared memory, float32; the groups of a block share them.
template <int kCount, int kVectors>
struct SharedWeights {
  static constexpr int kSlots = kVectors * kPieces<float>;  // of each weight

  Slots slots;

  static __host__ __device__ constexpr int bytes(int threads_per_row) {
    return kCount * kSlots * kPieceBytes * threads_per_row;
  }
  __device__ __forceinline__ explicit SharedWeights(const RowThread& me)
      : slots(Slots::of_warp(bytes(me.in_row / kWarpSize * kWarpSize))) {}

  // One group stores; a barrier must follow.
  __device__ __forceinline__ void store(int n, const float (&value)[kVectors][kColumns]) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      slots.store(n * kSlots + i * kPieces<float>, pack<float>(value[i]));
    }
  }
  __device__ __forceinline__ void load(int n, int i, float (&out)[kColumns]) const {
    unpack(slots.load<float>(n * kSlots + i * kPieces<float>), out);
  }
};

// Sums

// Adds up two numbers over the threads of a row, at most 16 warps. In shared memory each warp has
// two floats for its sums, and two more: consecutive calls use different ones. kKept: registers hold
// the addresses, or they are computed again for each row.
template <bool kKept>
class RowSums {
 public:
  static constexpr int kBytes = 4 * sizeof(float);  // of a warp
  static_assert(kBytes <= StageSlots::kSumBytes);

  // `first`: where the row's first warp has them in `memory`; the others' follow at a distance of
  // `apart` bytes.
  __device__ __forceinline__ RowSums(unsigned char* memory, int first, int apart,
                                     const RowThread& me)
      : memory_(memory),
        mine_(first + me.in_row / kWarpSize * apart + of_lane()),
        theirs_(first + lane() % kHalf * apart + of_lane()) {
    if constexpr (kKept) {
      mine_ = kept(mine_);
      theirs_ = kept(theirs_);
    }
  }

  __device__ __forceinline__ RowSums(const WarpMemory& memory, const RowThread& me)
      : RowSums(dynamic_shared(), memory.of_first_warp(me) + memory.bytes - StageSlots::kSumBytes,
                memory.bytes, me) {}

  // All threads of the row get the sums. `which`: 0 or 1, in turn.
  __device__ __forceinline__ void add(float (&number)[2], int which, const RowThread& me) const {
    const bool second = lane() >= kHalf;  // the upper lanes add up the second number
    float sum = second ? number[1] : number[0];
    sum = add_lanes(sum + shfl_bfly(second ? number[0] : number[1], kHalf));
    const int num_warps = me.threads_per_row / kWarpSize;
    if (num_warps > 1) {
      const auto place = [&](int offset) {
        return reinterpret_cast<float*>(memory_ + (offset + which * 2 * kFloatBytes));
      };
      if (lane() % kHalf == 0) *place(mine_) = sum;
      me.sync();
      sum = 0.f;
      if (lane() % kHalf < num_warps) sum = *place(theirs_);
      sum = add_lanes(sum);
    }
    const float other = shfl_bfly(sum, kHalf);
    number[0] = second ? other : sum;
    number[1] = second ? sum : other;
  }

 private:
  static constexpr int kHalf = kWarpSize / 2, kFloatBytes = sizeof(float);

  static __device__ __forceinline__ int lane() { return threadIdx.x % kWarpSize; }
  static __device__ __forceinline__ int of_lane() { return lane() / kHalf * kFloatBytes; }
  static __device__ __forceinline__ float add_lanes(float value) {
#pragma unroll
    for (int mask = kHalf / 2; mask > 0; mask /= 2) value += shfl_bfly(value, mask);
    return value;
  }

  unsigned char* memory_;
  int mine_;    // where this warp's lanes 0 and 16 store
  int theirs_;  // where this lane reads
};

// A thread's sums for its columns, one set for each gradient.
template <int kGradients, int kVectors>
struct ColumnSums {
  static constexpr int kSlots = kGradients * kVectors * kPieces<float>;

  float value[kGradients][kVectors][kColumns] = {};

  // Adds up the sums of the block's groups, in order, and stores them in the block's rows of
  // `partial` (kGradients, gridDim.x, hidden). Call it after the last row: with several groups it
  // uses the memory where rows arrived, kSlots slots from `slots` on. warp_bytes: of a warp there.
  // The kernel that adds up `partial` may start from now on.
  __device__ __forceinline__ void store(float* partial, int64_t hidden, const RowThread& me,
                                        const Columns<kVectors>& columns, const Slots& slots,
                                        int warp_bytes) {
    griddepcontrol_launch_dependents();
    float* row = partial + blockIdx.x * hidden + columns.first();
    const int64_t next_gradient = gridDim.x * hidden;
    const auto store_vector = [&](int n, const float (&sums)[kColumns]) {
      store_vector_at(row + n / kVectors * next_gradient, n % kVectors * columns.kApart,
                      columns.left, hidden % kColumns == 0, pack<float>(sums));
    };
    const int groups = int(blockDim.x) / me.threads_per_row;
    if (groups == 1) {
#pragma unroll
      for (int n = 0; n < kGradients * kVectors; ++n) {
        store_vector(n, value[n / kVectors][n % kVectors]);
      }
      return;
    }
    const int group_bytes = me.threads_per_row / kWarpSize * warp_bytes;
    bar_warp_sync();  // other lanes' rows lay there
#pragma unroll
    for (int n = 0; n < kGradients * kVectors; ++n) {
      slots.store(n * kPieces<float>, pack<float>(value[n / kVectors][n % kVectors]));
    }
    bar_sync();
    // Vectors are dealt out to the groups.
    const Slots of_first = {slots.first - me.row_in_block * group_bytes};
#pragma unroll 1
    for (int n = me.row_in_block; n < kGradients * kVectors; n += groups) {
      float sums[kColumns];
      unpack(of_first.load<float>(n * kPieces<float>), sums);
#pragma unroll 4
      for (int group = 1; group < groups; ++group) {
        const Slots of_group = {of_first.first + group * group_bytes};
        add_vector(of_group.load<float>(n * kPieces<float>), sums);
      }
      store_vector(n, sums);
    }
  }
};

// Gradients

// x becomes xhat.
__device__ __forceinline__ void normalise(float (&x)[kColumns], const RowStatistics& row) {
  const float offset = row.shift * row.rstd;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    x[j] = (x[j] * row.scale - row.rough_mean) * row.rstd - offset;
  }
}

// What a thread adds to its columns' sums of dy xhat and dy.
__device__ __forceinline__ void add_to_columns(const float (&xhat)[kColumns],
                                               const float (&dy)[kColumns],
                                               float (&dweight)[kColumns],
                                               float (&dbias)[kColumns]) {
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    dweight[j] += dy[j] * xhat[j];
    dbias[j] += dy[j];
  }
}

// g = dy weight in place of dy. The same to the bit wherever it is computed.
__device__ __forceinline__ void weigh(const float (&weight)[kColumns], float (&dy)[kColumns]) {
#pragma unroll
  for (int j = 0; j < kColumns; ++j) dy[j] = mul_rn(dy[j], weight[j]);
}

// What a thread adds to its row's sums of g and of g xhat.
__device__ __forceinline__ void add_to_row(const float (&xhat)[kColumns],
                                           const float (&g)[kColumns], float (&row_sums)[2]) {
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    row_sums[0] += g[j];
    row_sums[1] += g[j] * xhat[j];
  }
}

// The gradient for x, from a row's sums of g and of g xhat.
struct RowGradient {
  float mean_g_xhat, offset, rstd, scale;

  __device__ __forceinline__ RowGradient(const float (&row_sums)[2], float inverse_hidden,
                                         const RowStatistics& row)
      : mean_g_xhat(row_sums[1] * inverse_hidden),
        offset(row_sums[0] * inverse_hidden * row.rstd),
        rstd(row.rstd),
        scale(row.scale) {}

  // (g - mean(g) - xhat mean(g xhat)) rstd, in the units of x. rstd scale may exceed float32.
  __device__ __forceinline__ float operator()(float g, float xhat) const {
    return ((g - xhat * mean_g_xhat) * rstd - offset) * scale;
  }
};

// Plans

constexpr int kBackwardThreads = 512;  // of a block at most: 128 registers for each

// What a launch asks of plan_backward.
struct BackwardNeeds {
  std::initializer_list<TypedRows> matrices;  // that rows are read from and written to
  int pieces;                                 // sixteen-byte pieces that arrive for each vector
  int statistics;                             // and for each row
  int vectors;                                // of a thread
  int num_weights;
  int max_threads;  // of a block
};

// Whether int holds all numbers of rows, and strides.
inline bool int_holds(int64_t rows, const RowSteps& steps,
                      std::initializer_list<TypedRows> matrices) {
  int64_t largest = rows + steps.ahead;
  for (const TypedRows& matrix : matrices) largest = std::max(largest, matrix.rows.row_stride);
  return largest <= INT32_MAX;
}

// Whether a block has the threads and the memory for a row; then params->plan and steps are set.
template <typename Params>
cudaError_t plan_backward(const BackwardNeeds& needs, Params* params, bool* fits) {
  int most_bytes = 0;
  const cudaError_t status = max_shared_bytes(&most_bytes);
  if (status != cudaSuccess) return status;
  *fits = params->hidden <= int64_t{needs.max_threads} * needs.vectors * kColumns;
  if (!*fits) return cudaSuccess;
  const int threads = threads_for(params->hidden, needs.vectors);
  GroupNeeds group = {};
  group.rows = params->rows;
  group.hidden = int64_t{threads} * needs.vectors * kColumns;  // every thread has its slots
  group.num_blocks = params->num_blocks;
  group.aligned = all_aligned(params->hidden, needs.matrices);
  group.max_threads = needs.max_threads;
  const StageSlots stage = {needs.vectors * needs.pieces, needs.statistics};
  group.stage_bytes = threads / kWarpSize * stage.bytes();
  group.num_parameters = needs.num_weights;
  *fits = plan_groups(group, threads, most_bytes - kRowArrayBytes - kReservedSharedBytes,
                      &params->plan);
  if (!*fits) return cudaSuccess;
  RowSteps& steps = params->steps;
  steps.inverse_hidden = 1.f / float(params->hidden);
  steps.rows = int64_t{params->plan.num_blocks} * params->plan.rows_per_block;
  steps.ahead = steps.rows * params->plan.stages;
  int64_t* bytes = steps.bytes;
  for (const auto& [matrix, dtype] : needs.matrices) {
    *bytes++ = steps.rows * matrix.row_stride * kPieceBytes * pieces_of(dtype) / kColumns;
  }
  return cudaSuccess;
}

}  // namespace cogview
