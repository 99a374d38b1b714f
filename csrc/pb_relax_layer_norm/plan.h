// How rows are dealt out to threads and blocks (RowPlan), and the launch that follows.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "../instructions/common.cuh"
#include "pb_relax_layer_norm.h"
#include "vector.cuh"

namespace cogview {

// Dynamic shared memory of a block, in slots of sixteen bytes. Host and device compute with it.
//   stages      `stages` times, for each of num_threads threads: stage_slots, where rows arrive
//   parameters  once, for each of threads_per_row threads: parameter_slots, float32
struct SharedMemoryPlan {
  int stages, num_threads, threads_per_row, stage_slots, parameter_slots;

  // Threads are an odd number of slots apart, so that neighbours reach into different banks.
  __host__ __device__ static constexpr int apart(int slots) { return slots | 1; }

  // Where a stage, and the parameters, begin.
  __host__ __device__ constexpr int stage(int idx) const {
    return idx * num_threads * apart(stage_slots);
  }
  __host__ __device__ constexpr int parameters() const { return stage(stages); }
  __host__ __device__ constexpr int bytes() const {
    return (parameters() + threads_per_row * apart(parameter_slots)) * kPieceBytes;
  }
};

// Shared memory that a kernel of rows has at most in arrays of its own (kScratchFloats).
constexpr int kRowArrayBytes = 1024;

// What a launch asks of plan_rows.
struct RowNeeds {
  int64_t rows, hidden;
  int num_blocks;      // at most
  bool every_block;    // launch num_blocks blocks even where fewer have rows
  bool aligned;        // as in RowPlan
  int max_threads;     // of a block: the kernel's launch bound
  int max_vectors;     // of a thread: 2 or 4, what the kernel is compiled for
  int stage_pieces;    // sixteen-byte pieces that arrive for each vector
  int thread_pieces;   // and for each thread
  int num_parameters;  // weights and biases that are kept in shared memory
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int threads_for(int64_t hidden, int vectors) {
  return int(ceil_div(ceil_div(hidden, kColumns), int64_t{kWarpSize} * vectors)) * kWarpSize;
}

// 2 vectors to a thread, or 1 where 2 would leave more threads without columns, or 4 where a block
// has too few threads for 2.
inline int vectors_for(int64_t hidden, int max_threads) {
  const int with_1 = threads_for(hidden, 1), with_2 = threads_for(hidden, 2);
  if (with_2 > max_threads) return 4;
  return with_1 < 2 * with_2 && with_1 <= max_threads ? 1 : 2;
}

// Whether a block with so much dynamic shared memory has the threads and the room for a row; then
// *plan is set. Prefers two stages to more rows: one block fills a multiprocessor, and copies that
// run ahead are all that covers its barriers.
inline bool plan_rows(const RowNeeds& needs, int shared_limit, RowPlan* plan) {
  const int vectors = vectors_for(needs.hidden, needs.max_threads);
  const int threads = threads_for(needs.hidden, vectors);
  if (vectors > needs.max_vectors || threads > needs.max_threads) return false;
  const int most_rows =
      int(std::min(int64_t{needs.max_threads / threads}, ceil_div(needs.rows, needs.num_blocks)));
  for (int stages = 2; stages > 0; --stages) {
    for (int rows = most_rows; rows > 0; --rows) {
      const SharedMemoryPlan shared = {stages, rows * threads, threads,
                                       vectors * needs.stage_pieces + needs.thread_pieces,
                                       vectors * needs.num_parameters * kPieces<float>};
      if (shared.bytes() > shared_limit) continue;
      plan->threads_per_row = threads;
      plan->rows_per_block = rows;
      plan->stages = stages;
      plan->aligned = needs.aligned;
      plan->vectors_per_thread = vectors;
      plan->shared_bytes = shared.bytes();
      plan->num_blocks = needs.num_blocks;
      if (!needs.every_block) {
        plan->num_blocks =
            int(std::min(int64_t{needs.num_blocks}, ceil_div(needs.rows, int64_t{rows})));
      }
      return true;
    }
  }
  return false;
}

// Groups

// Dynamic shared memory of a block whose rows are owned by groups of threads, in bytes. Host and
// device compute with it.
//   parameters  num_parameters rows of float32
//   stages      for each group, `stages` times: what arrives of a row
struct RowMemory {
  int num_parameters, parameter_bytes, stages, stage_bytes, rows_per_block;

  __host__ __device__ constexpr int parameter(int idx) const { return idx * parameter_bytes; }
  __host__ __device__ constexpr int stage(int group, int idx) const {
    return parameter(num_parameters) + (group * stages + idx) * stage_bytes;
  }
  __host__ __device__ constexpr int bytes() const { return stage(rows_per_block, 0); }
};

template <typename Int>
__host__ __device__ constexpr Int vectors_of(Int hidden) {
  return (hidden + kColumns - 1) / kColumns;
}

// Of a row in shared memory: whole vectors of a warp. Int is int where a row is known to fit there.
template <typename Int>
__host__ __device__ constexpr Int row_bytes(Int hidden, int pieces) {
  return (vectors_of(hidden) + kWarpSize - 1) / kWarpSize * kWarpSize * pieces * kPieceBytes;
}

// What a launch asks of plan_groups.
struct GroupNeeds {
  int64_t rows, hidden;
  int num_blocks;       // at most
  bool every_block;     // launch num_blocks blocks even where fewer have rows
  bool aligned;         // as in RowPlan
  int max_threads;      // of a block
  int64_t stage_bytes;  // what arrives of a row
  int num_parameters;   // weights and biases that are kept in shared memory
  int max_stages = 2;   // 1: more rows at once rather than copies that run ahead
};

constexpr int kMaxGroups = 15;  // of several warps: each has a named barrier

// Whether a block with so much dynamic shared memory has room for one group of threads_per_row or
// more; then *plan is set.
inline bool plan_groups(const GroupNeeds& needs, int threads_per_row, int shared_limit,
                        RowPlan* plan) {
  if (needs.stage_bytes > shared_limit) return false;  // from here on, int holds all bytes
  int64_t most = std::min(int64_t{needs.max_threads / threads_per_row},
                          (needs.rows + needs.num_blocks - 1) / needs.num_blocks);
  if (threads_per_row > kWarpSize) most = std::min(most, int64_t{kMaxGroups});
  for (int stages = needs.max_stages; stages > 0; --stages) {
    RowMemory shared = {needs.num_parameters, row_bytes(int(needs.hidden), kPieces<float>), stages,
                        int(needs.stage_bytes), 0};
    const int free_bytes = shared_limit - shared.bytes();
    shared.rows_per_block =
        int(std::min(most, int64_t{free_bytes / (stages * shared.stage_bytes)}));
    if (free_bytes < 0 || shared.rows_per_block < 1) continue;
    plan->threads_per_row = threads_per_row;
    plan->rows_per_block = shared.rows_per_block;
    plan->stages = stages;
    plan->aligned = needs.aligned;
    plan->vectors_per_thread = int(ceil_div(vectors_of(needs.hidden), int64_t{threads_per_row}));
    plan->shared_bytes = shared.bytes();
    plan->num_blocks =
        needs.every_block ? needs.num_blocks : int(std::min(int64_t{needs.num_blocks}, needs.rows));
    return true;
  }
  return false;
}

// So many warps hide each other's latency: in the cycle model of benchmarks/kernels/cycles, fewer
// leave memory idle, and more are not faster.
constexpr int kEnoughWarps = 12;

// Plans the fewest warps to a row that give a block kEnoughWarps, with two stages if that is enough
// rows; else the most warps. False where no row fits. A row of one warp needs no barrier, and fewer
// warps add up fewer sums.
// The number of rows does not matter: a row's columns are added in the same order whatever rows are
// beside it. Groups without a row help to load the parameters.
inline cudaError_t plan_by_warps(GroupNeeds needs, RowPlan* plan, bool* fits) {
  int limit = 0;
  const cudaError_t status = max_shared_bytes(&limit);
  if (status != cudaSuccess) return status;
  limit -= kRowArrayBytes + kReservedSharedBytes;
  const int num_blocks = int(std::min(int64_t{needs.num_blocks}, needs.rows));
  needs.rows = int64_t{needs.num_blocks} * needs.max_threads;
  *fits = false;
  *plan = {};
  for (int threads = kWarpSize; threads <= needs.max_threads; threads *= 2) {
    if (threads > kWarpSize && threads > vectors_of(needs.hidden)) break;
    for (needs.max_stages = 2; needs.max_stages > 0; --needs.max_stages) {
      RowPlan found = {};
      if (!plan_groups(needs, threads, limit, &found)) return cudaSuccess;
      if (found.num_threads() > plan->num_threads()) *plan = found;
      plan->num_blocks = num_blocks;
      *fits = true;
      if (plan->num_threads() >= kEnoughWarps * kWarpSize) return cudaSuccess;
    }
  }
  return cudaSuccess;
}

// Dtypes

inline int pieces_of(DType dtype) { return dtype == DType::kFloat32 ? 2 : 1; }

struct TypedRows {
  ConstRows rows;
  DType dtype;
};

// Whether sixteen bytes may be accessed at once in all of these; no rows do not matter.
inline bool all_aligned(int64_t hidden, std::initializer_list<TypedRows> all) {
  bool aligned = hidden % kColumns == 0;
  for (const auto& [rows, dtype] : all) {
    aligned &= reinterpret_cast<uintptr_t>(rows.data) % kPieceBytes == 0;
    aligned &= rows.data == nullptr || rows.row_stride % (kColumns / pieces_of(dtype)) == 0;
  }
  return aligned;
}

template <typename T>
struct TypeTag {
  using Type = T;
};

// Calls f(tag of the input's type, tag of the output's).
template <typename Function>
cudaError_t with_dtypes(DType input, DType output, const Function& f) {
  if (input == DType::kFloat32) return f(TypeTag<float>(), TypeTag<float>());
  if (input == DType::kFloat16) {
    return output == input ? f(TypeTag<Half>(), TypeTag<Half>())
                           : f(TypeTag<Half>(), TypeTag<float>());
  }
  return output == input ? f(TypeTag<BFloat16>(), TypeTag<BFloat16>())
                         : f(TypeTag<BFloat16>(), TypeTag<float>());
}

// Launch

template <auto kKernel, typename Params>
cudaError_t launch_planned(const Params& params, cudaStream_t stream) {
  return launch<kKernel>(params.plan.num_blocks, 1, params.plan.num_threads(),
                         params.plan.shared_bytes, stream, params, kRowArrayBytes);
}

// Plans the rows and calls Kernels::launch<X, Y, vectors>, with at most Kernels::kMaxVectors; where
// no plan fits, calls otherwise(tag of X, tag of Y).
template <typename Kernels, typename Params, typename Otherwise>
cudaError_t plan_and_launch(RowNeeds needs, Params params, DType x_dtype, DType y_dtype,
                            cudaStream_t stream, const Otherwise& otherwise) {
  needs.rows = params.rows;
  needs.hidden = params.hidden;
  needs.num_blocks = params.num_blocks;
  needs.max_vectors = Kernels::kMaxVectors;
  int most_bytes = 0;
  const cudaError_t status = max_shared_bytes(&most_bytes);
  if (status != cudaSuccess) return status;
  RowPlan& plan = params.plan;
  const bool fits = plan_rows(needs, most_bytes - kRowArrayBytes - kReservedSharedBytes, &plan);
  return with_dtypes(x_dtype, y_dtype, [&](auto x, auto y) {
    if (!fits) return otherwise(x, y);
    using X = typename decltype(x)::Type;
    using Y = typename decltype(y)::Type;
    switch (plan.vectors_per_thread) {
      case 1:
        return Kernels::template launch<X, Y, 1>(params, stream);
      case 2:
        return Kernels::template launch<X, Y, 2>(params, stream);
      default:
        return Kernels::template launch<X, Y, Kernels::kMaxVectors>(params, stream);
    }
  });
}

}  // namespace cogview
