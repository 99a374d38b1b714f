// How rows are dealt out to threads and blocks (RowPlan), and the launch that follows.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "../instructions/common.cuh"
#include "pb_relax_layer_norm.h"
#include "vector.cuh"

namespace cogview {

// Shared memory that a kernel of rows has at most in arrays of its own (kScratchFloats).
constexpr int kRowArrayBytes = 1024;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int threads_for(int64_t hidden, int vectors) {
  return int(ceil_div(ceil_div(hidden, kColumns), int64_t{kWarpSize} * vectors)) * kWarpSize;
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
  int num_blocks;       // not more than rows
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
    plan->num_blocks = needs.num_blocks;
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
  needs.rows = int64_t{needs.num_blocks} * needs.max_threads;
  *fits = false;
  *plan = {};
  for (int threads = kWarpSize; threads <= needs.max_threads; threads *= 2) {
    if (threads > kWarpSize && threads > vectors_of(needs.hidden)) break;
    for (needs.max_stages = 2; needs.max_stages > 0; --needs.max_stages) {
      RowPlan found = {};
      if (!plan_groups(needs, threads, limit, &found)) return cudaSuccess;
      if (found.num_threads() > plan->num_threads()) *plan = found;
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

}  // namespace cogview
