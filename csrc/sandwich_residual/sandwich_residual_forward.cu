// Sandwich residual, forward.
//
// Math  h = residual + LN_post(dropout(f));  z = LN_pre(h), of the rounded h
// with both norms as pb_relax_layer_norm_forward.cu computes them.
//
// Phases     1 four parameters to shared memory. 2 in rounds: copy the next rows; statistics of f,
//            h; statistics of h, z.
// Layout     f, residual: rows at a stride; h, z contiguous; statistics: sixteen bytes a row.
// Grid       at most num_blocks blocks, each rows_per_block rows at a time (RowPlan).
// Warps      threads_per_row threads, whole warps, own a row: f and residual are read once, h and z
//            are written once. Two launches of pb_relax_layer_norm_forward serve instead where a row
//            is too wide, without z, and for Relax::kTensor, whose second norm needs the maximum
//            over all of h.
// Smem       of 2560 float16 columns, 160 threads a row, 5 rows:
//              2 stages   f, residual                  64 000 bytes each
//              parameters two weights, two biases      43 520 bytes
//              scratch    of the sums                     640 bytes   in all 172 160
// Barriers   bar.sync: parameters are there; a warp's sums are there (reduce_row).
// Rounding   float32 throughout, h and z rounded once each.
// Reference  cogview_kernels.norm.reference.sandwich_residual

#include "../pb_relax_layer_norm/dropout.cuh"
#include "../pb_relax_layer_norm/plan.h"
#include "../pb_relax_layer_norm/row_pipeline.cuh"
#include "../pb_relax_layer_norm/statistics.cuh"
#include "sandwich_residual.h"

namespace cogview {
namespace {

constexpr int kMaxThreads = 896;  // 72 registers each: 64 do not hold two rows of columns

template <typename F, typename H, int kVectors>
__global__ void __launch_bounds__(kMaxThreads, 1)
    sandwich_residual_forward_kernel(const SandwichResidualForwardParams params) {
  constexpr int kFSlots = kVectors * kPieces<F>, kStageSlots = kFSlots + kVectors * kPieces<H>;
  const RowPlan& plan = params.plan;
  const RowThread me(plan);
  const int hidden = int(params.hidden);
  float* scratch = shared_array<float, kScratchFloats>();
  const NormParameters &post = params.post, &pre = params.pre;
  using Parameters = SharedParameters<4, kVectors>;  // weight and bias of post, of pre
  const SharedMemoryPlan shared = {plan.stages, int(blockDim.x), plan.threads_per_row, kStageSlots,
                                   Parameters::kSlots};
  const Parameters parameters(shared, me);
  parameters.template fill<F>(0, post.weight, post.dtype, 1.f, hidden, me);
  parameters.template fill<F>(1, post.bias, post.dtype, 0.f, hidden, me);
  parameters.template fill<H>(2, pre.weight, pre.dtype, 1.f, hidden, me);
  parameters.template fill<H>(3, pre.bias, pre.dtype, 0.f, hidden, me);
  bar_sync();

  const auto copy = [&](int64_t row, bool is_row, const Slots& slots) {
    copy_row<F, kVectors>(params.f, row, is_row, hidden, plan.aligned, me, slots, 0);
    copy_row<H, kVectors>(params.residual, row, is_row, hidden, plan.aligned, me, slots, kFSlots);
  };
  const auto compute = [&](int64_t row, bool is_row, const Slots& slots, int) {
    float x[kVectors][kColumns], weight[kColumns], bias[kColumns];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      Vector<F> f = slots.load<F>(i * kPieces<F>);
      if (params.dropout.seed != nullptr) {
        keep_columns(kept_columns(params.dropout, row, me.vector_idx(i)), f);
      }
      unpack(f, x[i]);
    }
    const RowStatistics f_statistics =
        statistics_of_row<F>(x, hidden, params.post_eps, params.relax, nullptr, me, scratch);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      Vector<H> h = {};  // zero beyond the row's end
      if (me.column(i) < hidden) {
        parameters.load(0, i, weight);
        parameters.load(1, i, bias);
        normalise(x[i], f_statistics, weight, bias);
        add_vector(slots.load<H>(kFSlots + i * kPieces<H>), x[i]);
        h = pack<H>(x[i]);
        clear_beyond(hidden - me.column(i), h);
        if (is_row) {
          store_vector_at(static_cast<H*>(params.h) + row * hidden, me.column(i), hidden,
                          plan.aligned, h);
        }
      }
      unpack(h, x[i]);
    }
    const RowStatistics h_statistics =
        statistics_of_row<H>(x, hidden, params.pre_eps, params.relax, nullptr, me, scratch);
    if (!is_row) return;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (me.column(i) >= hidden) continue;
      parameters.load(2, i, weight);
      parameters.load(3, i, bias);
      normalise(x[i], h_statistics, weight, bias);
      store_vector_at(static_cast<H*>(params.z) + row * hidden, me.column(i), hidden, plan.aligned,
                      pack<H>(x[i]));
    }
    if (me.in_row == 0) {
      params.f_statistics[row] = f_statistics;
      params.h_statistics[row] = h_statistics;
    }
  };
  for_each_row(plan, shared, params.rows, me, copy, compute);
}

struct ForwardKernels {
  static constexpr int kMaxVectors = 2;  // more columns than registers hold
  template <typename F, typename H, int kVectors>
  static cudaError_t launch(const SandwichResidualForwardParams& params, cudaStream_t stream) {
    return launch_planned<sandwich_residual_forward_kernel<F, H, kVectors>>(params, stream);
  }
};

// One norm after the other.
cudaError_t launch_norms(const SandwichResidualForwardParams& params, cudaStream_t stream) {
  PbRelaxLayerNormForwardParams norm = {};
  norm.rows = params.rows;
  norm.hidden = params.hidden;
  norm.x_dtype = params.f_dtype;
  norm.y_dtype = params.h_dtype;
  norm.x = params.f;
  norm.residual = params.residual;
  norm.parameters = params.post;
  norm.dropout = params.dropout;
  norm.eps = params.post_eps;
  norm.relax = params.relax;
  norm.num_blocks = params.num_blocks;
  norm.peak = params.peaks;
  norm.y_peak = params.z == nullptr || params.peaks == nullptr ? nullptr : params.peaks + 1;
  norm.y = params.h;
  norm.statistics = params.f_statistics;
  const cudaError_t status = pb_relax_layer_norm_forward(norm, stream);
  if (status != cudaSuccess || params.z == nullptr) return status;

  norm.x_dtype = params.h_dtype;
  norm.x = {params.h, params.hidden};
  norm.residual = {};
  norm.parameters = params.pre;
  norm.dropout = {};
  norm.eps = params.pre_eps;
  norm.peak = norm.y_peak;
  norm.peak_is_known = true;
  norm.y_peak = nullptr;
  norm.y = params.z;
  norm.statistics = params.h_statistics;
  return pb_relax_layer_norm_forward(norm, stream);
}

}  // namespace

cudaError_t sandwich_residual_forward(const SandwichResidualForwardParams& params,
                                      cudaStream_t stream) {
  if (params.z == nullptr || params.relax == Relax::kTensor) return launch_norms(params, stream);
  RowNeeds needs = {};
  needs.aligned = all_aligned(params.hidden, {{params.f, params.f_dtype},
                                              {params.residual, params.h_dtype},
                                              {{params.h, params.hidden}, params.h_dtype},
                                              {{params.z, params.hidden}, params.h_dtype}});
  needs.max_threads = kMaxThreads;
  needs.stage_pieces = pieces_of(params.f_dtype) + pieces_of(params.h_dtype);
  needs.num_parameters = 4;
  return plan_and_launch<ForwardKernels>(needs, params, params.f_dtype, params.h_dtype, stream,
                                         [&](auto, auto) { return launch_norms(params, stream); });
}

}  // namespace cogview
