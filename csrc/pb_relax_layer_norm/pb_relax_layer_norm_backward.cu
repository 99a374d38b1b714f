// PB-relax LayerNorm, backward.
//
// Math, c being detached, with xhat = (x - mean) * rstd and g = dy * weight:
//   dx = [add +] rstd * (g - mean(g) - xhat * mean(g * xhat))      means over the row's columns
//   dweight = sum over rows of dy * xhat;  dbias = sum over rows of dy
// Dropped elements of x count as zero, and their dx is `add`.
//
// Phases     1 the first rows are on their way; the weight. 2 each group goes from row to row: sums of
//            g and g xhat; dx. 3 the block's column sums to `partial`, whose rows
//            pb_relax_layer_norm_partial_sums.cu adds up; that kernel may start when phase 3 does.
// Layout     dy, x, add: rows at a stride; dx contiguous; partial (2, num_blocks, hidden) float32.
// Grid       num_blocks blocks, each with rows_per_block groups of threads (RowPlan). Row r is of
//            block r % num_blocks.
// Warps      threads_per_row threads, whole warps, own a row: dy, x and add are read once, dx is
//            written once. Two vectors of each thread, or four where 512 threads have too few with
//            two; their column sums stay in registers until phase 3. Rows that are wider, or do not
//            fit into shared memory, take the `wide` kernel: a block works on a row at a time, two
//            passes over it, column sums in `partial`.
// Plain      rows that are aligned, with nothing dropped or added, have a kernel of their own: the
//            weight stays in registers, and from pass to pass xhat and g; a row's stage is refilled
//            before its sums are known. Other rows are read again in shared memory.
// Smem       of 2560 float16 columns, 5 warps a row, 3 groups, without `add`:
//              weight    10 240 bytes
//              2 stages  x, dy, statistics and sums of each warp  31 200 bytes each; phase 3 uses
//                        them for column sums                     in all 72 640
// Barriers   a group's bar.sync: its warps' sums are there (RowSums). bar.warp.sync: one lane's copy
//            of the statistics is there; all lanes have read it. The block's bar.sync: the weight is
//            there; in phase 3, the groups' column sums are there.
// Writers    one thread writes each element of dx and of `partial`. No atomics: deterministic.
// Rounding   float32 throughout; dx, dweight and dbias rounded once.
// Reference  gradient of cogview_kernels.norm.reference.pb_relax_layer_norm

#include "dropout.cuh"
#include "gradients.cuh"
#include "plan.h"

namespace cogview {
namespace {

constexpr int kWideThreads = 512;

// The slots of a row: x, dy, add.
template <typename X, typename Y, int kVectors>
struct BackwardSlots {
  static constexpr int kX = 0, kY = kX + kVectors * kPieces<X>, kAdd = kY + kVectors * kPieces<Y>;

  static __host__ __device__ constexpr StageSlots stage(bool has_add) {
    return {kAdd + (has_add ? kVectors * kPieces<X> : 0), 1};
  }
};

// kPlain: rows are aligned, and nothing is dropped or added.
template <typename X, typename Y, int kVectors, bool kPlain>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    pb_relax_layer_norm_backward_kernel(const PbRelaxLayerNormBackwardParams params) {
  using Own = BackwardSlots<X, Y, kVectors>;
  const RowPlan& plan = params.plan;
  RowThread me(plan, params.hidden);
  if constexpr (kVectors > 2) {  // a row has most threads of a block: there is one group
    me.in_row = threadIdx.x;
    me.row_in_block = 0;
  }
  const int hidden = int(params.hidden);
  const Columns<kVectors> columns(me, hidden);
  const bool has_add = !kPlain && params.add.data != nullptr;
  const bool drops = !kPlain && params.dropout.seed != nullptr;
  const bool aligned = kPlain || plan.aligned;
  const StageSlots slots = Own::stage(has_add);
  const SharedWeights<1, kVectors> shared_weight(me);
  const WarpMemory memory(plan, slots, shared_weight.bytes(me.threads_per_row));
  const RowSums<kPlain> exchange(memory, me);

  // No memory has 2^32 rows of so many columns as four vectors are for.
  using Row = std::conditional_t<kPlain || (kVectors > 2), uint32_t, int64_t>;
  // Of the row that is copied next, at this thread's columns, and of dx. They go on from row to row
  // where rows are plain; elsewhere registers are scarce, and they are computed for each row.
  const X *x, *add;
  const Y* dy;
  const RowStatistics* statistics_of_row;
  X* dx;
  const auto find_input = [&](int64_t row) {
    dy = static_cast<const Y*>(params.dy.data) + row * params.dy.row_stride + columns.first();
    x = static_cast<const X*>(params.x.data) + row * params.x.row_stride + columns.first();
    add = static_cast<const X*>(params.add.data) + row * params.add.row_stride + columns.first();
    statistics_of_row = params.statistics + row;
  };
  const auto find_dx = [&](int64_t row) {
    dx = static_cast<X*>(params.dx) + row * hidden + columns.first();
  };
  const RowSteps& steps = params.steps;
  const int64_t first = first_row(me);
  find_input(first);
  find_dx(first);
  const auto copy = [&](Row row, const Slots& stage) {
    if constexpr (!kPlain) find_input(row);
    slots.copy_statistics(stage, statistics_of_row);
    stage.copy(Own::kX, x, columns, aligned);
    stage.copy(Own::kY, dy, columns, aligned);
    if (has_add) stage.copy(Own::kAdd, add, columns, aligned);
    if constexpr (kPlain) {
      statistics_of_row += steps.rows;
      dy = advanced(dy, steps.bytes[0]);
      x = advanced(x, steps.bytes[1]);
    }
  };

  float weight[kVectors][kColumns];
  const auto prepare = [&] {
    if (me.row_in_block == 0) {
      load_weight<X>(params.weight, params.weight_dtype, columns, hidden, weight);
      shared_weight.store(0, weight);
    }
    bar_sync();
    if constexpr (kPlain) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) shared_weight.load(0, i, weight[i]);
    }
  };

  ColumnSums<2, kVectors> sums;  // of dy * xhat, of dy
  const auto compute = [&](Row row, const Slots& stage, int turn, const auto& refill) {
    uint32_t kept = 0;  // a bit for each column
    if (drops) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const uint32_t of_vector = kept_columns(params.dropout, row, columns.vector_idx(i));
        stage.keep<X>(Own::kX + i * kPieces<X>, of_vector);
        kept |= of_vector << i * kColumns;
      }
    }
    const RowStatistics statistics = slots.load_statistics(stage, 0);
    float xhat[kVectors][kColumns], g[kVectors][kColumns];
    const auto load = [&](int i) {  // g is still dy
      // Or ptxas loads all the vectors before it works on the first, and has no registers for them.
      if constexpr (kVectors > 2) bar_warp_sync();
      unpack(stage.load<X>(Own::kX + i * kPieces<X>), xhat[i]);
      normalise(xhat[i], statistics);
      unpack(stage.load<Y>(Own::kY + i * kPieces<Y>), g[i]);
      if constexpr (!kPlain) shared_weight.load(0, i, weight[i]);
    };
    float row_sums[2] = {0.f, 0.f};  // of g, of g * xhat
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      load(i);
      if constexpr (kPlain) {
        add_to_columns(xhat[i], g[i], sums.value[0][i], sums.value[1][i]);
      }
      weigh(weight[i], g[i]);
      add_to_row(xhat[i], g[i], row_sums);
    }
    if constexpr (kPlain) refill();
    exchange.add(row_sums, turn, me);
    const RowGradient gradient(row_sums, params.steps.inverse_hidden, statistics);
    if constexpr (!kPlain) find_dx(row);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if constexpr (!kPlain) {
        load(i);
        add_to_columns(xhat[i], g[i], sums.value[0][i], sums.value[1][i]);
        weigh(weight[i], g[i]);
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) g[i][j] = gradient(g[i][j], xhat[i][j]);
      if (drops) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          if ((kept >> (i * kColumns + j) & 1u) == 0) g[i][j] = 0.f;
        }
      }
      if (has_add) add_vector(stage.load<X>(Own::kAdd + i * kPieces<X>), g[i]);
      store_vector_at(dx, i * columns.kApart, columns.left, aligned, pack<X>(g[i]));
    }
    if constexpr (!kPlain) refill();
    if constexpr (kPlain) dx = advanced(dx, steps.bytes[3]);
  };
  const Slots stages = for_each_row_ahead(plan, steps, slots, memory.own, Row(params.rows),
                                          Row(first), copy, prepare, compute);
  if (params.partial != nullptr) {
    sums.store(params.partial, hidden, me, columns, stages, memory.bytes);
  }
}

// Any width: a block works on a row at a time; each thread adds to columns of `partial` that no
// other thread touches.
template <typename X, typename Y>
__global__ void __launch_bounds__(kWideThreads, 1)
    pb_relax_layer_norm_backward_wide_kernel(const PbRelaxLayerNormBackwardParams params) {
  const RowPlan& plan = params.plan;
  const RowThread me(plan, params.hidden);
  const int64_t hidden = params.hidden, num_vectors = (hidden + kColumns - 1) / kColumns;
  const float inverse_hidden = 1.f / float(hidden);
  unsigned char* scratch =
      shared_array<unsigned char, kWideThreads / kWarpSize * RowSums<false>::kBytes>();
  const RowSums<false> exchange(scratch, 0, RowSums<false>::kBytes, me);
  float* dweight = nullptr;
  float* dbias = nullptr;
  if (params.partial != nullptr) {
    dweight = params.partial + int64_t(blockIdx.x) * hidden;
    dbias = params.partial + (int64_t(gridDim.x) + blockIdx.x) * hidden;
    for (int64_t v = threadIdx.x; v < num_vectors; v += kWideThreads) {
      for (int64_t column = v * kColumns; column < min(hidden, (v + 1) * kColumns); ++column) {
        dweight[column] = dbias[column] = 0.f;
      }
    }
  }

  int round = 0;
  for (int64_t row = blockIdx.x; row < params.rows; row += gridDim.x, ++round) {
    const RowStatistics statistics = params.statistics[row];
    float xhat[kColumns], g[kColumns], weight[kColumns];
    uint32_t kept = 0;
    const auto load = [&](int64_t v) {  // g is still dy
      const X* x_row = static_cast<const X*>(params.x.data) + row * params.x.row_stride;
      const Y* dy_row = static_cast<const Y*>(params.dy.data) + row * params.dy.row_stride;
      Vector<X> x = load_vector_at(x_row, v * kColumns, hidden, plan.aligned);
      if (params.dropout.seed != nullptr) {
        kept = kept_columns(params.dropout, row, v);
        keep_columns(kept, x);
      }
      unpack(x, xhat);
      normalise(xhat, statistics);
      unpack(load_vector_at(dy_row, v * kColumns, hidden, plan.aligned), g);
      load_parameter({params.weight, params.weight_dtype, 1.f}, v * kColumns, hidden, weight);
    };
    float row_sums[2] = {0.f, 0.f};
    for (int64_t v = threadIdx.x; v < num_vectors; v += kWideThreads) {
      load(v);
      float dweight_here[kColumns] = {}, dbias_here[kColumns] = {};
      add_to_columns(xhat, g, dweight_here, dbias_here);
      weigh(weight, g);
      add_to_row(xhat, g, row_sums);
      if (dweight == nullptr) continue;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (v * kColumns + j >= hidden) continue;
        dweight[v * kColumns + j] += dweight_here[j];
        dbias[v * kColumns + j] += dbias_here[j];
      }
    }
    exchange.add(row_sums, round % 2, me);
    const RowGradient gradient(row_sums, inverse_hidden, statistics);
    for (int64_t v = threadIdx.x; v < num_vectors; v += kWideThreads) {
      load(v);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        g[j] = gradient(mul_rn(g[j], weight[j]), xhat[j]);
        if (params.dropout.seed != nullptr && (kept >> j & 1u) == 0) g[j] = 0.f;
      }
      if (params.add.data != nullptr) {
        const X* add_row = static_cast<const X*>(params.add.data) + row * params.add.row_stride;
        add_vector(load_vector_at(add_row, v * kColumns, hidden, plan.aligned), g);
      }
      store_vector_at(static_cast<X*>(params.dx) + row * hidden, v * kColumns, hidden, plan.aligned,
                      pack<X>(g));
    }
  }
}

}  // namespace

cudaError_t pb_relax_layer_norm_backward(const PbRelaxLayerNormBackwardParams& given,
                                         cudaStream_t stream) {
  PbRelaxLayerNormBackwardParams params = given;
  const bool has_add = params.add.data != nullptr;
  const std::initializer_list<TypedRows> matrices = {{params.dy, params.dy_dtype},
                                                     {params.x, params.x_dtype},
                                                     {params.add, params.x_dtype},
                                                     {{params.dx, params.hidden}, params.x_dtype}};
  BackwardNeeds needs = {};
  needs.matrices = matrices;
  needs.pieces = pieces_of(params.dy_dtype) + (has_add ? 2 : 1) * pieces_of(params.x_dtype);
  needs.statistics = 1;
  needs.vectors = params.hidden <= kBackwardThreads * 2 * kColumns ? 2 : 4;
  needs.num_weights = 1;
  needs.max_threads = kBackwardThreads;
  bool fits = false;
  const cudaError_t status = plan_backward(needs, &params, &fits);
  if (status != cudaSuccess) return status;
  return with_dtypes(params.x_dtype, params.dy_dtype, [&](auto x, auto dy) {
    using X = typename decltype(x)::Type;
    using Y = typename decltype(dy)::Type;
    if (!fits) {
      params.plan.aligned = all_aligned(params.hidden, matrices);
      params.plan.threads_per_row = kWideThreads;
      return launch<pb_relax_layer_norm_backward_wide_kernel<X, Y>>(
          params.num_blocks, 1, kWideThreads, 0, stream, params);
    }
    if (needs.vectors > 2) {
      return launch_planned<pb_relax_layer_norm_backward_kernel<X, Y, 4, false>>(params, stream);
    }
    if constexpr (std::is_same_v<X, Y>) {
      if (params.plan.aligned && !has_add && params.dropout.seed == nullptr &&
          int_holds(params.rows, params.steps, matrices)) {
        return launch_planned<pb_relax_layer_norm_backward_kernel<X, Y, 2, true>>(params, stream);
      }
    }
    return launch_planned<pb_relax_layer_norm_backward_kernel<X, Y, 2, false>>(params, stream);
  });
}

}  // namespace cogview
