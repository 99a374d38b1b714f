// PB-relax LayerNorm, backward.
//
// Math, c being detached, with xhat = (x - mean) * rstd and g = dy * weight:
//   dx = [add +] rstd * (g - mean(g) - xhat * mean(g * xhat))      means over the row's columns
//   dweight = sum over rows of dy * xhat;  dbias = sum over rows of dy
// Dropped elements of x count as zero, and their dx is `add`.
//
// Phases     1 the weight to shared memory. 2 in rounds: copy the next rows; sums of g and g xhat;
//            dx. 3 the block's column sums to `partial`, whose rows
//            pb_relax_layer_norm_partial_sums.cu adds up; that kernel may start when phase 3 does.
// Layout     dy, x, add: rows at a stride; dx contiguous; partial (2, num_blocks, hidden) float32.
// Grid       num_blocks blocks, each rows_per_block rows at a time (RowPlan).
// Warps      threads_per_row threads, whole warps, own a row: dy, x and add are read once, dx is
//            written once. Column sums stay in registers until phase 3. Rows that are wider, or do
//            not fit into shared memory, take the `wide` kernel: a row at a time, two passes over
//            it, column sums in `partial`.
// Smem       of 2560 float16 columns, 160 threads a row, 3 rows, without `add`:
//              2 stages   statistics, x, dy  38 400 bytes each; phase 3 uses them for column sums
//              parameters weight             12 800 bytes
//              scratch    of the sums           512 bytes   in all 90 112
// Barriers   bar.sync: the weight is there; a warp's sums are there (reduce_row); in phase 3, the
//            slots are free, and column sums of another row are there.
// Writers    one thread writes each element of dx and of `partial`. No atomics: deterministic.
// Rounding   float32 throughout; dx, dweight and dbias rounded once.
// Reference  gradient of cogview_kernels.norm.reference.pb_relax_layer_norm

#include "dropout.cuh"
#include "gradients.cuh"
#include "plan.h"
#include "row_pipeline.cuh"

namespace cogview {
namespace {

constexpr int kMaxThreads = 512;

template <typename X, typename Y, int kVectors>
__global__ void __launch_bounds__(kMaxThreads, 1)
    pb_relax_layer_norm_backward_kernel(const PbRelaxLayerNormBackwardParams params) {
  constexpr int kXSlots = 1, kYSlots = kXSlots + kVectors * kPieces<X>;
  constexpr int kAddSlots = kYSlots + kVectors * kPieces<Y>;
  constexpr int kSlots = kAddSlots + kVectors * kPieces<X>;
  const RowPlan& plan = params.plan;
  const RowThread me(plan);
  const int hidden = int(params.hidden);
  const float inverse_hidden = 1.f / float(hidden);
  const bool has_add = params.add.data != nullptr;
  float* scratch = shared_array<float, kGradientScratchFloats>();
  using Parameters = SharedParameters<1, kVectors>;  // weight
  const SharedMemoryPlan shared = {plan.stages, int(blockDim.x), plan.threads_per_row,
                                   has_add ? kSlots : kAddSlots, Parameters::kSlots};
  const Parameters parameters(shared, me);
  parameters.template fill<X>(0, params.weight, params.weight_dtype, 1.f, hidden, me);
  bar_sync();

  ColumnSums<2, kVectors> sums;  // of dy * xhat, of dy
  const auto copy = [&](int64_t row, bool is_row, const Slots& slots) {
    cp_async_16(slots.first, params.statistics + row, is_row);
    copy_row<X, kVectors>(params.x, row, is_row, hidden, plan.aligned, me, slots, kXSlots);
    copy_row<Y, kVectors>(params.dy, row, is_row, hidden, plan.aligned, me, slots, kYSlots);
    if (has_add) {
      copy_row<X, kVectors>(params.add, row, is_row, hidden, plan.aligned, me, slots, kAddSlots);
    }
  };
  const auto compute = [&](int64_t row, bool is_row, const Slots& slots, int round) {
    const RowStatistics statistics = slots.load_statistics(0);
    uint32_t kept[kVectors] = {};
    float xhat[kVectors][kColumns], g[kVectors][kColumns], weight[kColumns];
    const auto load = [&](int i) {  // g is still dy
      Vector<X> x = slots.load<X>(kXSlots + i * kPieces<X>);
      if (params.dropout.seed != nullptr) keep_columns(kept[i], x);
      unpack(x, xhat[i]);
      normalise(xhat[i], statistics);
      unpack(slots.load<Y>(kYSlots + i * kPieces<Y>), g[i]);
      parameters.load(0, i, weight);
    };
    float row_sums[2] = {0.f, 0.f};  // of g, of g * xhat
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (me.column(i) >= hidden) continue;
      if (params.dropout.seed != nullptr) {
        kept[i] = kept_columns(params.dropout, row, me.vector_idx(i));
      }
      load(i);
      add_columns(xhat[i], g[i], weight, row_sums, sums.value[0][i], sums.value[1][i]);
    }
    reduce_row(row_sums, scratch + round % 2 * 2 * kMaxWarps, me, Add());
    const RowGradient gradient(row_sums, inverse_hidden, statistics);
    if (!is_row) return;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (me.column(i) >= hidden) continue;
      if constexpr (kVectors > 2) {  // too few registers to keep them
        load(i);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) g[i][j] *= weight[j];
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        g[i][j] = gradient(g[i][j], xhat[i][j]);
        if (params.dropout.seed != nullptr && (kept[i] >> j & 1u) == 0) g[i][j] = 0.f;
      }
      if (has_add) add_vector(slots.load<X>(kAddSlots + i * kPieces<X>), g[i]);
      store_vector_at(static_cast<X*>(params.dx) + row * hidden, me.column(i), hidden, plan.aligned,
                      pack<X>(g[i]));
    }
  };
  for_each_row(plan, shared, params.rows, me, copy, compute);
  if (params.partial != nullptr) sums.store(params.partial, hidden, me);
}

// Any width: a block works on a row at a time; each thread adds to columns of `partial` that no
// other thread touches.
template <typename X, typename Y>
__global__ void __launch_bounds__(kMaxThreads, 1)
    pb_relax_layer_norm_backward_wide_kernel(const PbRelaxLayerNormBackwardParams params) {
  const RowPlan& plan = params.plan;
  const RowThread me(plan);
  const int64_t hidden = params.hidden, num_vectors = (hidden + kColumns - 1) / kColumns;
  const float inverse_hidden = 1.f / float(hidden);
  float* scratch = shared_array<float, kGradientScratchFloats>();
  float* dweight = nullptr;
  float* dbias = nullptr;
  if (params.partial != nullptr) {
    dweight = params.partial + int64_t(blockIdx.x) * hidden;
    dbias = params.partial + (int64_t(gridDim.x) + blockIdx.x) * hidden;
    for (int64_t v = threadIdx.x; v < num_vectors; v += kMaxThreads) {
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
      load_parameter<X>(params.weight, params.weight_dtype, 1.f, v * kColumns, hidden, weight);
    };
    float row_sums[2] = {0.f, 0.f};
    for (int64_t v = threadIdx.x; v < num_vectors; v += kMaxThreads) {
      load(v);
      float dweight_here[kColumns] = {}, dbias_here[kColumns] = {};
      add_columns(xhat, g, weight, row_sums, dweight_here, dbias_here);
      if (dweight == nullptr) continue;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (v * kColumns + j >= hidden) continue;
        dweight[v * kColumns + j] += dweight_here[j];
        dbias[v * kColumns + j] += dbias_here[j];
      }
    }
    reduce_row(row_sums, scratch + round % 2 * 2 * kMaxWarps, me, Add());
    const RowGradient gradient(row_sums, inverse_hidden, statistics);
    for (int64_t v = threadIdx.x; v < num_vectors; v += kMaxThreads) {
      load(v);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        g[j] = gradient(g[j] * weight[j], xhat[j]);
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

struct BackwardKernels {
  static constexpr int kMaxVectors = 4;
  template <typename X, typename Y, int kVectors>
  static cudaError_t launch(const PbRelaxLayerNormBackwardParams& params, cudaStream_t stream) {
    return launch_planned<pb_relax_layer_norm_backward_kernel<X, Y, kVectors>>(params, stream);
  }
};

}  // namespace

cudaError_t pb_relax_layer_norm_backward(const PbRelaxLayerNormBackwardParams& given,
                                         cudaStream_t stream) {
  PbRelaxLayerNormBackwardParams params = given;
  RowNeeds needs = {};
  needs.aligned = all_aligned(params.hidden, {{params.x, params.x_dtype},
                                              {params.dy, params.dy_dtype},
                                              {params.add, params.x_dtype},
                                              {{params.dx, params.hidden}, params.x_dtype}});
  needs.every_block = true;  // each writes its row of `partial`
  needs.max_threads = kMaxThreads;
  needs.stage_pieces = pieces_of(params.x_dtype) + pieces_of(params.dy_dtype);
  if (params.add.data != nullptr) needs.stage_pieces += pieces_of(params.x_dtype);
  needs.thread_pieces = 1;  // the row's statistics
  needs.num_parameters = 1;
  const auto launch_wide = [&](auto x, auto dy) {
    params.plan.aligned = needs.aligned;
    params.plan.threads_per_row = kMaxThreads;
    return launch<pb_relax_layer_norm_backward_wide_kernel<typename decltype(x)::Type,
                                                           typename decltype(dy)::Type>>(
        params.num_blocks, 1, kMaxThreads, 0, stream, params);
  };
  return plan_and_launch<BackwardKernels>(needs, params, params.x_dtype, params.dy_dtype, stream,
                                          launch_wide);
}

}  // namespace cogview
