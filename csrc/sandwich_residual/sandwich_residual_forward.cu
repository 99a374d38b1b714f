// Sandwich residual, forward.
//
// Math  h = residual + LN_post(dropout(f));  z = LN_pre(h), of the rounded h
// with both norms as pb_relax_layer_norm_forward.cu computes them.
//
// Phases     1 four parameters to shared memory, behind the first copies. 2 for each row, in shared
//            memory: drop; statistics of f; h, which takes the residual's place; statistics of h; z.
//            Then the row's place is free for the copy of a later one.
// Layout     f, residual: rows at a stride; h, z contiguous; statistics: sixteen bytes a row.
// Grid       at most num_blocks blocks; row r goes to block r % gridDim.x.
// Warps      a group of threads_per_row threads, whole warps, owns a row, as in
//            pb_relax_layer_norm_forward.cu: f and residual are read once, h and z are written once.
//            Two launches of pb_relax_layer_norm_forward serve instead where shared memory holds
//            fewer than two rows, without z, and for Relax::kTensor, whose second norm needs the
//            maximum over all of h.
// Smem       of 2560 16-bit columns, one warp a row, 18 rows:
//              parameters two weights, two biases   40 960 bytes
//              1 stage    f, residual              184 320 bytes
//              scratch    of the sums                  640 bytes   in all 225 920
// Barriers   bar.sync: parameters are there; a warp's sums are there (reduce_row, for rows of more
//            than one warp: a barrier for each group).
// Rounding   float32 throughout, h and z rounded once each.
// Reference  cogview_kernels.norm.reference.sandwich_residual

#include "../pb_relax_layer_norm/row_passes.cuh"
#include "sandwich_residual.h"

namespace cogview {
namespace {

constexpr int kMaxThreads = 640;  // 96 registers each

template <typename F, typename H>
__global__ void __launch_bounds__(kMaxThreads, 1)
    sandwich_residual_forward_kernel(const SandwichResidualForwardParams params) {
  const RowPlan& plan = params.plan;
  const int hidden = int(params.hidden);
  const RowThread me(plan, hidden);
  const int f_bytes = row_bytes(hidden, kPieces<F>);
  const RowMemory shared = {4, row_bytes(hidden, kPieces<float>), plan.stages,
                            f_bytes + row_bytes(hidden, kPieces<H>), plan.rows_per_block};
  const auto parameter = [&](int idx) {
    return SharedRow<float>(dynamic_shared() + shared.parameter(idx), me);
  };
  float* scratch = shared_array<float, kScratchFloats>();
  const float inverse_hidden = 1.f / float(hidden);

  const auto copy = [&](int64_t row, unsigned char* stage) {
    SharedRow<F>(stage, me).copy(params.f, row, hidden, plan.aligned, me);
    SharedRow<H>(stage + f_bytes, me).copy(params.residual, row, hidden, plan.aligned, me);
  };
  const auto prepare = [&] {
    const NormParameters &post = params.post, &pre = params.pre;
    const Parameter parameters[] = {{post.weight, post.dtype, 1.f},
                                    {post.bias, post.dtype, 0.f},
                                    {pre.weight, pre.dtype, 1.f},
                                    {pre.bias, pre.dtype, 0.f}};
    fill_parameters(shared, parameters, hidden);
    bar_sync();
  };
  const auto compute = [&](int64_t row, unsigned char* stage) {
    const SharedRow<F> f(stage, me);
    const SharedRow<H> h(stage + f_bytes, me);  // the residual, until h takes its place
    if (params.dropout.seed != nullptr) drop_columns(f, params.dropout, row, me);
    RoughSums<F> rough_f;
    for_each_vector(f, me, [&](const Vector<F>& vector, int) { rough_f.add(vector); });
    const RowStatistics f_statistics = statistics_of_row(
        rough_f, f, inverse_hidden, params.post_eps, params.relax, nullptr, me, scratch);
    if (me.in_row == 0) params.f_statistics[row] = f_statistics;

    RoughSums<H> rough_h;
    const auto write_h = [&](auto aligned) {
      WrittenRow<H, aligned.value> to(params.h, row, hidden, me);
      SharedRow<F> from = f;
      SharedRow<H> residual = h;
      SharedRow<float> post_weight = parameter(0), post_bias = parameter(1);
      for_each_vector(me, [&](auto n, auto columns) {
#pragma unroll
        for (int v = 0; v < n; ++v) {
          Vector<H> rounded = {};
          if (columns > 0) {
            float x[kColumns], weight[kColumns], bias[kColumns];
            unpack(from.load(v), x);
            unpack(post_weight.load(v), weight);
            unpack(post_bias.load(v), bias);
            normalise(x, f_statistics, weight, bias);
            add_vector(residual.load(v), x);
            rounded = pack<H>(x);
            clear_beyond(columns, rounded);
            residual.store(v, rounded);
            to.store(v, columns, rounded);
          }
          rough_h.add(rounded);
        }
        from.skip(n);
        residual.skip(n);
        post_weight.skip(n);
        post_bias.skip(n);
        to.skip(n);
      });
    };
    if (plan.aligned) {
      write_h(std::true_type());
    } else {
      write_h(std::false_type());
    }
    const RowStatistics h_statistics = statistics_of_row(rough_h, h, inverse_hidden, params.pre_eps,
                                                         params.relax, nullptr, me, scratch);
    if (me.in_row == 0) params.h_statistics[row] = h_statistics;

    const auto write_z = [&](auto aligned) {
      WrittenRow<H, aligned.value> to(params.z, row, hidden, me);
      SharedRow<H> from = h;
      SharedRow<float> pre_weight = parameter(2), pre_bias = parameter(3);
      for_each_vector(me, [&](auto n, auto columns) {
        if (columns == 0) return;
#pragma unroll
        for (int v = 0; v < n; ++v) {
          float x[kColumns], weight[kColumns], bias[kColumns];
          unpack(from.load(v), x);
          unpack(pre_weight.load(v), weight);
          unpack(pre_bias.load(v), bias);
          normalise(x, h_statistics, weight, bias);
          to.store(v, columns, pack<H>(x));
        }
        from.skip(n);
        pre_weight.skip(n);
        pre_bias.skip(n);
        to.skip(n);
      });
    };
    if (plan.aligned) {
      write_z(std::true_type());
    } else {
      write_z(std::false_type());
    }
  };
  for_each_row(plan, shared, params.rows, me, copy, prepare, compute);
}

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
  GroupNeeds needs = {};
  needs.rows = params.rows;
  needs.hidden = params.hidden;
  needs.num_blocks = params.num_blocks;
  needs.aligned = all_aligned(params.hidden, {{params.f, params.f_dtype},
                                              {params.residual, params.h_dtype},
                                              {{params.h, params.hidden}, params.h_dtype},
                                              {{params.z, params.hidden}, params.h_dtype}});
  needs.max_threads = kMaxThreads;
  needs.stage_bytes =
      row_bytes(params.hidden, pieces_of(params.f_dtype) + pieces_of(params.h_dtype));
  needs.num_parameters = 4;
  SandwichResidualForwardParams planned = params;
  bool fits = false;
  const cudaError_t status = plan_by_warps(needs, &planned.plan, &fits);
  if (status != cudaSuccess) return status;
  // Memory would be idle while a block computes on its only row.
  if (!fits || planned.plan.rows_per_block * planned.plan.stages < 2) {
    return launch_norms(params, stream);
  }
  return with_dtypes(params.f_dtype, params.h_dtype, [&](auto f, auto h) {
    using F = typename decltype(f)::Type;
    using H = typename decltype(h)::Type;
    return launch_planned<sandwich_residual_forward_kernel<F, H>>(planned, stream);
  });
}

}  // namespace cogview
