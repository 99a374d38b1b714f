// PB-relax LayerNorm, forward; also the first half of the sandwich: its residual and dropout.
//
// Math, for each row x of `hidden` columns, with c = max|x| / 8 over the row or the tensor:
//   y = [residual +] (x - mean) / sqrt(var + eps c^2) * weight + bias
// computed as statistics.cuh says. Dropped elements of x count as zero; Epsilon says what becomes of
// the factor 1 / (1 - p) of the others.
//
// Phases     0 (relax = tensor) `peak`: max|x|. 1 weight and bias to shared memory, behind the first
//            copies. 2 for each row, in shared memory: drop; sum and maximum of x; sums of its
//            deviations; y. Then the row's place is free for the copy of a later one.
// Layout     x, residual: rows at a stride; y contiguous; statistics: sixteen bytes a row.
// Grid       at most num_blocks blocks; row r goes to block r % gridDim.x.
// Warps      a group of threads_per_row threads, whole warps, owns a row and goes from row to row
//            without waiting for other groups: x and residual are read once, y is written once. Most
//            rows have one warp, wide ones more (plan_by_warps). Rows that do not fit into shared
//            memory take the `wide` kernel: one block per row, three passes over x.
// Smem       of 2560 16-bit columns without residual, one warp a row, 20 rows:
//              parameters weight, bias   20 480 bytes
//              2 stages   x             102 400 bytes each
//              scratch    of the sums       640 bytes   in all 225 920
// Barriers   bar.sync: parameters are there; a warp's sums are there (reduce_row, for rows of more
//            than one warp: a barrier for each group).
// Rounding   float32 throughout, y rounded once.
// Reference  cogview_kernels.norm.reference.pb_relax_layer_norm

#include "plan.h"
#include "row_passes.cuh"

namespace cogview {
namespace {

constexpr int kMaxThreads = 640;  // 96 registers each
constexpr int kWideThreads = 512;

// *peak becomes the larger of itself and the warp's max|value|, given as bits. Those of a NaN are
// larger than all others.
__device__ __forceinline__ void join_peak(float* peak, uint32_t bits) {
  bits = redux_max(bits);
  if (threadIdx.x % kWarpSize == 0) red_global_max(reinterpret_cast<uint32_t*>(peak), bits);
}

// `count`: how many of the columns there are.
template <typename T>
__device__ __forceinline__ uint32_t peak_bits(uint32_t bits, Vector<T> vector, int64_t count) {
  float value[kColumns];
  clear_beyond(count, vector);
  unpack(vector, value);
#pragma unroll
  for (int j = 0; j < kColumns; ++j) bits = max(bits, float_as_uint(fabsf(value[j])));
  return bits;
}

template <typename X, typename Y, bool kResidual>
__global__ void __launch_bounds__(kMaxThreads, 1)
    pb_relax_layer_norm_forward_kernel(const PbRelaxLayerNormForwardParams params) {
  const RowPlan& plan = params.plan;
  const int hidden = int(params.hidden);
  const RowThread me(plan, hidden);
  const int x_bytes = row_bytes(hidden, kPieces<X>);
  const RowMemory shared = {2, row_bytes(hidden, kPieces<float>), plan.stages,
                            x_bytes + (kResidual ? row_bytes(hidden, kPieces<Y>) : 0),
                            plan.rows_per_block};
  float* scratch = shared_array<float, kScratchFloats>();
  const float inverse_hidden = 1.f / float(hidden);

  uint32_t y_peak = 0;
  const auto copy = [&](int64_t row, unsigned char* stage) {
    SharedRow<X>(stage, me).copy(params.x, row, hidden, plan.aligned, me);
    if constexpr (kResidual) {
      SharedRow<Y>(stage + x_bytes, me).copy(params.residual, row, hidden, plan.aligned, me);
    }
  };
  const auto prepare = [&] {
    const NormParameters& given = params.parameters;
    const Parameter parameters[] = {{given.weight, given.dtype, 1.f},
                                    {given.bias, given.dtype, 0.f}};
    fill_parameters(shared, parameters, hidden);
    bar_sync();
  };
  const auto compute = [&](int64_t row, unsigned char* stage) {
    const SharedRow<X> x(stage, me);
    if (params.dropout.seed != nullptr) drop_columns(x, params.dropout, row, me);
    RoughSums<X> rough;
    for_each_vector(x, me, [&](const Vector<X>& vector, int) { rough.add(vector); });
    const RowStatistics statistics = statistics_of_row(rough, x, inverse_hidden, params.eps,
                                                       params.relax, params.peak, me, scratch);
    const auto write = [&](auto aligned) {
      WrittenRow<Y, aligned.value> to(params.y, row, hidden, me);
      SharedRow<X> from = x;
      SharedRow<Y> residual(stage + x_bytes, me);
      SharedRow<float> weight(dynamic_shared() + shared.parameter(0), me);
      SharedRow<float> bias(dynamic_shared() + shared.parameter(1), me);
      for_each_vector(me, [&](auto n, auto columns) {
        if (columns == 0) return;
#pragma unroll
        for (int v = 0; v < n; ++v) {
          float y[kColumns], w[kColumns], b[kColumns];
          unpack(from.load(v), y);
          unpack(weight.load(v), w);
          unpack(bias.load(v), b);
          normalise(y, statistics, w, b);
          if constexpr (kResidual) add_vector(residual.load(v), y);
          const Vector<Y> rounded = pack<Y>(y);
          to.store(v, columns, rounded);
          if (kResidual && params.y_peak != nullptr) y_peak = peak_bits(y_peak, rounded, columns);
        }
        from.skip(n);
        residual.skip(n);
        weight.skip(n);
        bias.skip(n);
        to.skip(n);
      });
    };
    if (plan.aligned) {
      write(std::true_type());
    } else {
      write(std::false_type());
    }
    if (me.in_row == 0) params.statistics[row] = statistics;
  };
  for_each_row(plan, shared, params.rows, me, copy, prepare, compute);
  if (kResidual && params.y_peak != nullptr) join_peak(params.y_peak, y_peak);
}

// Any width: one block per row; each pass reads the row again.
template <typename X, typename Y>
__global__ void __launch_bounds__(kWideThreads, 1)
    pb_relax_layer_norm_forward_wide_kernel(const PbRelaxLayerNormForwardParams params) {
  const RowPlan& plan = params.plan;
  const int64_t hidden = params.hidden, num_vectors = (hidden + kColumns - 1) / kColumns;
  const RowThread me(plan, hidden);
  float* scratch = shared_array<float, kScratchFloats>();
  const NormParameters& given = params.parameters;
  const Parameter weight = {given.weight, given.dtype, 1.f}, bias = {given.bias, given.dtype, 0.f};

  const float inverse_hidden = 1.f / float(hidden);
  uint32_t y_peak = 0;
  for (int64_t row = blockIdx.x; row < params.rows; row += gridDim.x) {
    const X* x_row = static_cast<const X*>(params.x.data) + row * params.x.row_stride;
    const auto load_x = [&](int64_t vector_idx) {
      Vector<X> x = load_vector_at(x_row, vector_idx * kColumns, hidden, plan.aligned);
      if (params.dropout.seed != nullptr) {
        keep_columns(kept_columns(params.dropout, row, vector_idx), x);
      }
      return x;
    };
    // Warps stay together.
    const auto for_each_vector = [&](const auto& f) {
      for (int64_t first = 0; first < num_vectors; first += kWideThreads) {
        const int64_t v = first + threadIdx.x;
        f(load_x(v), int(max(min(hidden - v * kColumns, int64_t{kColumns}), int64_t{0})));
      }
    };
    RoughSums<X> rough;
    for_each_vector([&](const Vector<X>& x, int) { rough.add(x); });
    const RowStatistics statistics = statistics_of_row(
        rough, for_each_vector, inverse_hidden, params.eps, params.relax, params.peak, me, scratch);

    const Y* residual_row =
        static_cast<const Y*>(params.residual.data) + row * params.residual.row_stride;
    Y* y_row = static_cast<Y*>(params.y) + row * hidden;
    for (int64_t v = threadIdx.x; v < num_vectors; v += kWideThreads) {
      float x[kColumns], w[kColumns], b[kColumns];
      load_parameter(weight, v * kColumns, hidden, w);
      load_parameter(bias, v * kColumns, hidden, b);
      unpack(load_x(v), x);
      normalise(x, statistics, w, b);
      if (params.residual.data != nullptr) {
        add_vector(load_vector_at(residual_row, v * kColumns, hidden, plan.aligned), x);
      }
      const Vector<Y> y = pack<Y>(x);
      store_vector_at(y_row, v * kColumns, hidden, plan.aligned, y);
      if (params.y_peak != nullptr) y_peak = peak_bits(y_peak, y, hidden - v * kColumns);
    }
    if (threadIdx.x == 0) params.statistics[row] = statistics;
  }
  if (params.y_peak != nullptr) join_peak(params.y_peak, y_peak);
}

// *peak becomes max|x| over the tensor. A maximum is exact in any order.
template <typename X>
__global__ void __launch_bounds__(kWideThreads, 1)
    pb_relax_layer_norm_peak_kernel(const PbRelaxLayerNormForwardParams params) {
  const RowPlan& plan = params.plan;
  const RowThread me(plan, params.hidden);
  const int64_t num_vectors = (params.hidden + kColumns - 1) / kColumns;
  const int64_t step = int64_t(gridDim.x) * plan.rows_per_block;
  uint32_t bits = 0;
  for (int64_t row = int64_t(blockIdx.x) * plan.rows_per_block + me.row_in_block; row < params.rows;
       row += step) {
    const X* x_row = static_cast<const X*>(params.x.data) + row * params.x.row_stride;
    for (int64_t v = me.in_row; v < num_vectors; v += me.threads_per_row) {
      Vector<X> x = load_vector_at(x_row, v * kColumns, params.hidden, plan.aligned);
      if (params.dropout.seed != nullptr) keep_columns(kept_columns(params.dropout, row, v), x);
      bits = peak_bits(bits, x, kColumns);
    }
  }
  join_peak(params.peak, bits);
}

// params.peak becomes max|x| of all elements that are not dropped.
cudaError_t launch_peak(const PbRelaxLayerNormForwardParams& given, cudaStream_t stream) {
  PbRelaxLayerNormForwardParams params = given;
  RowPlan& plan = params.plan;
  plan.aligned = all_aligned(params.hidden, {{params.x, params.x_dtype}});
  plan.threads_per_row = std::min(threads_for(params.hidden, 1), kWideThreads);
  plan.rows_per_block = kWideThreads / plan.threads_per_row;
  constexpr int64_t kBlocksPerSm = 4;  // a thread waits for one load at a time: many threads
  plan.num_blocks =
      int(std::min(ceil_div(params.rows, plan.rows_per_block), kBlocksPerSm * params.num_blocks));
  return with_dtypes(params.x_dtype, params.x_dtype, [&](auto x, auto) {
    return launch<pb_relax_layer_norm_peak_kernel<typename decltype(x)::Type>>(
        plan.num_blocks, 1, plan.num_threads(), 0, stream, params);
  });
}

}  // namespace

cudaError_t pb_relax_layer_norm_forward(const PbRelaxLayerNormForwardParams& given,
                                        cudaStream_t stream) {
  PbRelaxLayerNormForwardParams params = given;
  if (params.relax == Relax::kTensor && !params.peak_is_known) {
    const cudaError_t status = launch_peak(params, stream);
    if (status != cudaSuccess) return status;
  }
  GroupNeeds needs = {};
  needs.rows = params.rows;
  needs.hidden = params.hidden;
  needs.num_blocks = params.num_blocks;
  needs.aligned = all_aligned(params.hidden, {{params.x, params.x_dtype},
                                              {params.residual, params.y_dtype},
                                              {{params.y, params.hidden}, params.y_dtype}});
  needs.max_threads = kMaxThreads;
  needs.stage_bytes = row_bytes(params.hidden, pieces_of(params.x_dtype));
  if (params.residual.data != nullptr) {
    needs.stage_bytes += row_bytes(params.hidden, pieces_of(params.y_dtype));
  }
  needs.num_parameters = 2;
  bool fits = false;
  const cudaError_t status = plan_by_warps(needs, &params.plan, &fits);
  if (status != cudaSuccess) return status;
  return with_dtypes(params.x_dtype, params.y_dtype, [&](auto x, auto y) {
    using X = typename decltype(x)::Type;
    using Y = typename decltype(y)::Type;
    if (fits && params.residual.data != nullptr) {
      return launch_planned<pb_relax_layer_norm_forward_kernel<X, Y, true>>(params, stream);
    }
    if constexpr (std::is_same_v<X, Y>) {
      if (fits) {
        return launch_planned<pb_relax_layer_norm_forward_kernel<X, Y, false>>(params, stream);
      }
    }
    params.plan.aligned = needs.aligned;
    params.plan.threads_per_row = kWideThreads;
    return launch<pb_relax_layer_norm_forward_wide_kernel<X, Y>>(
        std::min(params.rows, int64_t{INT32_MAX}), 1, kWideThreads, 0, stream, params);
  });
}

}  // namespace cogview
