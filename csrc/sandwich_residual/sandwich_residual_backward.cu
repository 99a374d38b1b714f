// Sandwich residual, backward.
//
// Math, with hhat and fhat the normalised rows of h and dropout(f):
//   dresidual = dh + the gradient of LN_pre for dz
//   df = the gradient of LN_post for dresidual, zero where f was dropped
//   dpre_weight = sum over rows of dz * hhat;          dpre_bias = sum over rows of dz
//   dpost_weight = sum over rows of dresidual * fhat;  dpost_bias = sum over rows of dresidual
// with the gradient of a norm as in pb_relax_layer_norm_backward.cu.
//
// Phases     1 two weights to shared memory. 2 in rounds: copy the next rows; sums of h's norm;
//            dresidual and sums of f's norm; df. 3 the block's column sums to `partial`, whose rows
//            pb_relax_layer_norm_partial_sums.cu adds up; that kernel may start when phase 3 does.
// Layout     dh, dz, f, h: rows at a stride; df, dresidual contiguous; partial (4, num_blocks,
//            hidden) float32, the post weight's and bias's sums first.
// Grid       num_blocks blocks, each rows_per_block rows at a time (RowPlan).
// Warps      threads_per_row threads, whole warps, own a row: dh, dz, f and h are read once, df and
//            dresidual are written once. Two launches of pb_relax_layer_norm_backward serve instead
//            where a row is too wide, and without z.
// Smem       of 2560 float16 columns, 160 threads a row, 3 rows:
//              2 stages   statistics of f and h, f, h, dh, dz   84 480 bytes each; dresidual
//                         replaces dh and dz, and phase 3 uses them for column sums
//              parameters two weights                           23 040 bytes
//              scratch    of the sums                              512 bytes   in all 192 512
// Barriers   bar.sync: weights are there; a warp's sums are there (reduce_row); in phase 3, the
//            slots are free, and column sums of another row are there.
// Writers    one thread writes each element of df, dresidual and `partial`. No atomics:
//            deterministic.
// Rounding   float32 throughout; df is computed from dresidual before it is rounded, except where two
//            launches serve.
// Reference  gradient of cogview_kernels.norm.reference.sandwich_residual

#include "../pb_relax_layer_norm/dropout.cuh"
#include "../pb_relax_layer_norm/gradients.cuh"
#include "../pb_relax_layer_norm/plan.h"
#include "../pb_relax_layer_norm/row_pipeline.cuh"
#include "sandwich_residual.h"

namespace cogview {
namespace {

constexpr int kMaxThreads = 512;

template <typename F, typename H, int kVectors>
__global__ void __launch_bounds__(kMaxThreads, 1)
    sandwich_residual_backward_kernel(const SandwichResidualBackwardParams params) {
  // Slots: statistics of f and of h, then f, h, and for each vector dh and dz side by side.
  constexpr int kFSlots = 2, kHSlots = kFSlots + kVectors * kPieces<F>;
  constexpr int kDhSlots = kHSlots + kVectors * kPieces<H>, kDzSlots = kDhSlots + kPieces<H>;
  constexpr int kGradientStep = 2 * kPieces<H>;
  constexpr int kStageSlots = kDhSlots + kVectors * kGradientStep;
  const RowPlan& plan = params.plan;
  const RowThread me(plan);
  const int64_t hidden = params.hidden;
  const float inverse_hidden = 1.f / float(hidden);
  float* scratch = shared_array<float, kGradientScratchFloats>();
  using Parameters = SharedParameters<2, kVectors>;  // weight of post, of pre
  const SharedMemoryPlan shared = {plan.stages, int(blockDim.x), plan.threads_per_row, kStageSlots,
                                   Parameters::kSlots};
  const Parameters parameters(shared, me);
  parameters.template fill<F>(0, params.post_weight, params.post_dtype, 1.f, hidden, me);
  parameters.template fill<H>(1, params.pre_weight, params.pre_dtype, 1.f, hidden, me);
  bar_sync();

  ColumnSums<4, kVectors> sums;  // dresidual * fhat, dresidual, dz * hhat, dz
  const auto copy = [&](int64_t row, bool is_row, const Slots& slots) {
    cp_async_16(slots.first, params.f_statistics + row, is_row);
    cp_async_16(slots.first + 1, params.h_statistics + row, is_row);
    copy_row<F, kVectors>(params.f, row, is_row, hidden, plan.aligned, me, slots, kFSlots);
    copy_row<H, kVectors>(params.h, row, is_row, hidden, plan.aligned, me, slots, kHSlots);
    copy_row<H, kVectors>(params.dh, row, is_row, hidden, plan.aligned, me, slots, kDhSlots,
                          kGradientStep);
    copy_row<H, kVectors>(params.dz, row, is_row, hidden, plan.aligned, me, slots, kDzSlots,
                          kGradientStep);
  };
  const auto compute = [&](int64_t row, bool is_row, const Slots& slots, int) {
    const RowStatistics f_statistics = slots.load_statistics(0);
    const RowStatistics h_statistics = slots.load_statistics(1);

    float h_sums[2] = {0.f, 0.f};  // of g, of g * hhat, with g = dz * pre_weight
    float weight[kColumns];
    const auto load_h = [&](int i, float (&hhat)[kColumns], float (&dz)[kColumns]) {
      unpack(slots.load<H>(kHSlots + i * kPieces<H>), hhat);
      normalise(hhat, h_statistics);
      unpack(slots.load<H>(kDzSlots + i * kGradientStep), dz);
      parameters.load(1, i, weight);
    };
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (me.column(i) >= hidden) continue;
      float hhat[kColumns], dz[kColumns];
      load_h(i, hhat, dz);
      add_columns(hhat, dz, weight, h_sums, sums.value[2][i], sums.value[3][i]);
    }
    reduce_row(h_sums, scratch, me, Add());
    const RowGradient h_gradient(h_sums, inverse_hidden, h_statistics);

    uint32_t kept[kVectors] = {};
    float f_sums[2] = {0.f, 0.f};  // of g, of g * fhat, with g = dresidual * post_weight
    const auto load_f = [&](int i, float (&fhat)[kColumns]) {
      Vector<F> f = slots.load<F>(kFSlots + i * kPieces<F>);
      if (params.dropout.seed != nullptr) keep_columns(kept[i], f);
      unpack(f, fhat);
      normalise(fhat, f_statistics);
      parameters.load(0, i, weight);
    };
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (me.column(i) >= hidden) continue;
      float xhat[kColumns], dz[kColumns], dresidual[kColumns];
      load_h(i, xhat, dz);
      unpack(slots.load<H>(kDhSlots + i * kGradientStep), dresidual);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        dresidual[j] += h_gradient(dz[j] * weight[j], xhat[j]);
        if (me.column(i) + j >= hidden) dresidual[j] = 0.f;
      }
      if (is_row) {
        store_vector_at(static_cast<H*>(params.dresidual) + row * hidden, me.column(i), hidden,
                        plan.aligned, pack<H>(dresidual));
      }
      // Kept unrounded for df, in the slots of dh, and of dz too where that has sixteen bits.
      slots.store(kDhSlots + i * kGradientStep, pack<float>(dresidual));
      if (params.dropout.seed != nullptr) {
        kept[i] = kept_columns(params.dropout, row, me.vector_idx(i));
      }
      load_f(i, xhat);
      add_columns(xhat, dresidual, weight, f_sums, sums.value[0][i], sums.value[1][i]);
    }
    reduce_row(f_sums, scratch + 2 * kMaxWarps, me, Add());
    const RowGradient f_gradient(f_sums, inverse_hidden, f_statistics);

    if (!is_row) return;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (me.column(i) >= hidden) continue;
      float fhat[kColumns], dresidual[kColumns];
      load_f(i, fhat);
      unpack(slots.load<float>(kDhSlots + i * kGradientStep), dresidual);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        fhat[j] = f_gradient(dresidual[j] * weight[j], fhat[j]);
      }
      Vector<F> df = pack<F>(fhat);
      if (params.dropout.seed != nullptr) keep_columns(kept[i], df);
      store_vector_at(static_cast<F*>(params.df) + row * hidden, me.column(i), hidden, plan.aligned,
                      df);
    }
  };
  for_each_row(plan, shared, params.rows, me, copy, compute);
  if (params.partial != nullptr) sums.store(params.partial, hidden, me);
}

struct BackwardKernels {
  static constexpr int kMaxVectors = 2;  // more column sums than registers hold
  template <typename F, typename H, int kVectors>
  static cudaError_t launch(const SandwichResidualBackwardParams& params, cudaStream_t stream) {
    return launch_planned<sandwich_residual_backward_kernel<F, H, kVectors>>(params, stream);
  }
};

// One norm after the other.
cudaError_t launch_norms(const SandwichResidualBackwardParams& params, cudaStream_t stream) {
  const int64_t gradient = int64_t{params.num_blocks} * params.hidden;  // of `partial`
  PbRelaxLayerNormBackwardParams norm = {};
  norm.rows = params.rows;
  norm.hidden = params.hidden;
  norm.num_blocks = params.num_blocks;
  norm.dy = params.dh;
  norm.dy_dtype = params.h_dtype;
  if (params.dresidual != nullptr) {
    norm.dy = params.dz;
    norm.x_dtype = params.h_dtype;
    norm.x = params.h;
    norm.add = params.dh;
    norm.weight = params.pre_weight;
    norm.weight_dtype = params.pre_dtype;
    norm.statistics = params.h_statistics;
    norm.dx = params.dresidual;
    norm.partial = params.partial == nullptr ? nullptr : params.partial + 2 * gradient;
    const cudaError_t status = pb_relax_layer_norm_backward(norm, stream);
    if (status != cudaSuccess) return status;
    norm.dy = {params.dresidual, params.hidden};
  }
  norm.x_dtype = params.f_dtype;
  norm.x = params.f;
  norm.add = {};
  norm.weight = params.post_weight;
  norm.weight_dtype = params.post_dtype;
  norm.dropout = params.dropout;
  norm.statistics = params.f_statistics;
  norm.dx = params.df;
  norm.partial = params.partial;
  return pb_relax_layer_norm_backward(norm, stream);
}

}  // namespace

cudaError_t sandwich_residual_backward(const SandwichResidualBackwardParams& params,
                                       cudaStream_t stream) {
  if (params.dresidual == nullptr) return launch_norms(params, stream);
  RowNeeds needs = {};
  needs.aligned = all_aligned(params.hidden, {{params.f, params.f_dtype},
                                              {params.h, params.h_dtype},
                                              {params.dh, params.h_dtype},
                                              {params.dz, params.h_dtype},
                                              {{params.df, params.hidden}, params.f_dtype},
                                              {{params.dresidual, params.hidden}, params.h_dtype}});
  needs.every_block = true;  // each writes its rows of `partial`
  needs.max_threads = kMaxThreads;
  needs.stage_pieces = pieces_of(params.f_dtype) + 3 * pieces_of(params.h_dtype);
  needs.thread_pieces = 2;  // statistics
  needs.num_parameters = 2;
  return plan_and_launch<BackwardKernels>(needs, params, params.f_dtype, params.h_dtype, stream,
                                          [&](auto, auto) { return launch_norms(params, stream); });
}

}  // namespace cogview
