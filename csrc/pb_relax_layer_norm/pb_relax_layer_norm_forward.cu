// PB-relax LayerNorm, forward.
//
// Math, for each row x of `hidden` columns, with c = max|x| / 8 over the row or the tensor:
//   y = (x - mean) / sqrt(var + eps c^2) * weight + bias
// computed on xs = x * s, with s the power of two that brings the maximum to [1, 2), so that no
// square leaves float32's range and scaling is exact:
//   d = xs - mean(xs);  shift = mean(d);  var = mean(d^2) - shift^2
//   y = (d - shift) / sqrt(var + eps (c s)^2) * weight + bias
// shift is the rounding error of the first mean, tiny: with it, large offsets stay exact.
//
// Layout     x: rows x_row_stride apart; y contiguous; mean, rstd: float32, one per row.
// Grid       one block per kRowsPerBlock rows, striding over the rows.
// Threads    row.cuh: kThreadsPerRow threads own a row and keep it in registers, so that x is read
//            once and y written once. Rows that do not fit or are not aligned to 16 bytes take the
//            `any` kernel: one block per row, three passes over x.
// Smem       scratch of reduce_row: 4 floats per warp.
// Barriers   bar.sync inside reduce_row, each reduction with scratch of its own; one more between
//            the last read of a row's scratch and the next row's first write.
// Rounding   float32 throughout, y rounded once.
// Reference  cogview_kernels.reference.pb_relax_layer_norm

#include "row.cuh"

namespace cogview {
namespace {

constexpr float kLargest = 3.402823466e+38f;   // of float32
constexpr float kSmallest = 1.175494351e-38f;  // normal: a constant row has no deviation to divide

// The power of two s with max|x| * s in [1, 2), as far as s itself is a normal number.
__device__ __forceinline__ float relaxing_scale(float peak, Relax relax) {
  if (!(peak > 0.f)) return 1.f;
  int exponent = min(max(ilogbf(peak), -126), 126);
  if (relax == Relax::kNone) exponent = max(exponent, -60);  // eps s^2 must stay finite
  return exp2f(float(-exponent));
}

// c * s, the relaxing constant in the scaled row's units. Rows of zeros take c = 1.
__device__ __forceinline__ float scaled_constant(float peak, float scale, Relax relax) {
  return relax == Relax::kNone || peak == 0.f ? scale : peak * scale * 0.125f;
}

// Both keep a NaN, which fminf and fmaxf would drop.
__device__ __forceinline__ float rstd_of(float variance) {
  return 1.f / sqrtf(variance < kSmallest ? kSmallest : variance);
}
__device__ __forceinline__ float finite_rstd(float rstd_of_scaled, float scale) {
  const float rstd = rstd_of_scaled * scale;
  return rstd > kLargest ? kLargest : rstd;
}

template <typename T, int kThreadsPerRow>
__global__ void __launch_bounds__(kBlockThreads<kThreadsPerRow>, 1)
    pb_relax_layer_norm_forward_kernel(const PbRelaxLayerNormForwardParams params) {
  constexpr int kWarps = kBlockThreads<kThreadsPerRow> / kWarpSize;
  float* scratch = shared_array<float, 4 * kWarps>();
  const int64_t hidden = params.shape.hidden;
  const float inverse_hidden = 1.f / float(hidden);
  const bool weight_is_float32 = params.shape.weight_dtype == DType::kFloat32;
  const int64_t first_row = int64_t(blockIdx.x) * kRowsPerBlock<kThreadsPerRow>;
  const int64_t row_step = int64_t(gridDim.x) * kRowsPerBlock<kThreadsPerRow>;

  for (int64_t block_row = first_row; block_row < params.shape.rows; block_row += row_step) {
    const int64_t row = block_row + threadIdx.x / kThreadsPerRow;
    const bool is_row = row < params.shape.rows;  // the same for all threads of a row
    RowRegisters<T> x;
    load_row<T, kThreadsPerRow>(static_cast<const T*>(params.x) + row * params.x_row_stride,
                                is_row ? hidden : 0, x);

    float peak[1] = {0.f};
    if (params.relax == Relax::kTensor) {
      peak[0] = params.peak[0];
    } else {
#pragma unroll
      for (int i = 0; i < kVectorsPerThread<T>; ++i) {
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) peak[0] = fmaxf(peak[0], fabsf(x.value[i][j]));
      }
      reduce_row<Max, kThreadsPerRow>(peak, scratch);
    }
    const float scale = relaxing_scale(peak[0], params.relax);

    float sum[1] = {0.f};
#pragma unroll
    for (int i = 0; i < kVectorsPerThread<T>; ++i) {
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) sum[0] += x.value[i][j] *= scale;
    }
    reduce_row<Sum, kThreadsPerRow>(sum, scratch + kWarps);
    const float rough_mean = sum[0] * inverse_hidden;

    float moments[2] = {0.f, 0.f};  // of what is left: sum, sum of squares
#pragma unroll
    for (int i = 0; i < kVectorsPerThread<T>; ++i) {
      if (column_of<T, kThreadsPerRow>(i) < hidden) {
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) {
          const float d = x.value[i][j] -= rough_mean;
          moments[0] += d;
          moments[1] += d * d;
        }
      }
    }
    reduce_row<Sum, kThreadsPerRow>(moments, scratch + 2 * kWarps);
    const float shift = moments[0] * inverse_hidden;
    const float var = fmaxf(moments[1] * inverse_hidden - shift * shift, 0.f);
    const float c = scaled_constant(peak[0], scale, params.relax);
    const float rstd = rstd_of(var + params.eps * c * c);

#pragma unroll
    for (int i = 0; i < kVectorsPerThread<T>; ++i) {
      const int column = column_of<T, kThreadsPerRow>(i);
      if (column < hidden) {
        float weight[kVector<T>], bias[kVector<T>];
        load_parameter<T>(params.weight, weight_is_float32, column, 1.f, weight);
        load_parameter<T>(params.bias, weight_is_float32, column, 0.f, bias);
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) {
          x.value[i][j] = (x.value[i][j] - shift) * rstd * weight[j] + bias[j];
        }
      }
    }
    store_row<T, kThreadsPerRow>(static_cast<T*>(params.y) + row * hidden, is_row ? hidden : 0, x);
    if (is_row && threadIdx.x % kThreadsPerRow == 0) {
      params.mean[row] = (rough_mean + shift) / scale;
      params.rstd[row] = finite_rstd(rstd, scale);
    }
    bar_sync();
  }
}

// Any width and alignment: one block per row, which is read again for each step.
template <typename T>
__global__ void __launch_bounds__(256)
    pb_relax_layer_norm_forward_any_kernel(const PbRelaxLayerNormForwardParams params) {
  constexpr int kWarps = 256 / kWarpSize;
  float* scratch = shared_array<float, 4 * kWarps>();
  const int64_t hidden = params.shape.hidden;
  const bool weight_is_float32 = params.shape.weight_dtype == DType::kFloat32;

  for (int64_t row = blockIdx.x; row < params.shape.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(params.x) + row * params.x_row_stride;
    T* y = static_cast<T*>(params.y) + row * hidden;

    float peak[1] = {0.f};
    if (params.relax == Relax::kTensor) {
      peak[0] = params.peak[0];
    } else {
      for (int64_t column = threadIdx.x; column < hidden; column += 256) {
        peak[0] = fmaxf(peak[0], fabsf(to_float(x[column])));
      }
      reduce_row<Max, 256>(peak, scratch);
    }
    const float scale = relaxing_scale(peak[0], params.relax);

    float sum[1] = {0.f};
    for (int64_t column = threadIdx.x; column < hidden; column += 256) {
      sum[0] += to_float(x[column]) * scale;
    }
    reduce_row<Sum, 256>(sum, scratch + kWarps);
    const float rough_mean = sum[0] / float(hidden);

    float moments[2] = {0.f, 0.f};
    for (int64_t column = threadIdx.x; column < hidden; column += 256) {
      const float d = to_float(x[column]) * scale - rough_mean;
      moments[0] += d;
      moments[1] += d * d;
    }
    reduce_row<Sum, 256>(moments, scratch + 2 * kWarps);
    const float shift = moments[0] / float(hidden);
    const float var = fmaxf(moments[1] / float(hidden) - shift * shift, 0.f);
    const float c = scaled_constant(peak[0], scale, params.relax);
    const float rstd = rstd_of(var + params.eps * c * c);

    for (int64_t column = threadIdx.x; column < hidden; column += 256) {
      const float d = to_float(x[column]) * scale - rough_mean - shift;
      const float weight = load_parameter<T>(params.weight, weight_is_float32, column, 1.f);
      const float bias = load_parameter<T>(params.bias, weight_is_float32, column, 0.f);
      y[column] = from_float<T>(d * rstd * weight + bias);
    }
    if (threadIdx.x == 0) {
      params.mean[row] = (rough_mean + shift) / scale;
      params.rstd[row] = finite_rstd(rstd, scale);
    }
    bar_sync();
  }
}

template <typename T>
bool is_aligned(const PbRelaxLayerNormForwardParams& params) {
  const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
  return params.shape.hidden % kVector<T> == 0 && params.x_row_stride % kVector<T> == 0 &&
         (address(params.x) | address(params.y) | address(params.weight) | address(params.bias)) %
                 16 ==
             0;
}

template <typename T, int kThreadsPerRow>
cudaError_t launch_rows(const PbRelaxLayerNormForwardParams& params, cudaStream_t stream) {
  constexpr int kRows = kRowsPerBlock<kThreadsPerRow>;
  const int64_t blocks = (params.shape.rows + kRows - 1) / kRows;
  return launch<pb_relax_layer_norm_forward_kernel<T, kThreadsPerRow>>(
      blocks < INT32_MAX ? blocks : INT32_MAX, 1, kBlockThreads<kThreadsPerRow>, 0, stream, params);
}

template <typename T>
cudaError_t launch_forward(const PbRelaxLayerNormForwardParams& params, cudaStream_t stream) {
  const int64_t rows = params.shape.rows, hidden = params.shape.hidden;
  if (is_aligned<T>(params)) {
    if (hidden <= 32 * kElementsPerThread) return launch_rows<T, 32>(params, stream);
    if (hidden <= 128 * kElementsPerThread) return launch_rows<T, 128>(params, stream);
    if (hidden <= 256 * kElementsPerThread) return launch_rows<T, 256>(params, stream);
    if (hidden <= 512 * kElementsPerThread) return launch_rows<T, 512>(params, stream);
    if (hidden <= 1024 * kElementsPerThread) return launch_rows<T, 1024>(params, stream);
  }
  return launch<pb_relax_layer_norm_forward_any_kernel<T>>(rows < INT32_MAX ? rows : INT32_MAX, 1,
                                                           256, 0, stream, params);
}

}  // namespace

cudaError_t pb_relax_layer_norm_forward(const PbRelaxLayerNormForwardParams& params,
                                        cudaStream_t stream) {
  if (params.shape.rows == 0) return cudaSuccess;
  switch (params.shape.dtype) {
    case DType::kFloat32:
      return launch_forward<float>(params, stream);
    case DType::kFloat16:
      return launch_forward<Half>(params, stream);
    case DType::kBFloat16:
      return launch_forward<BFloat16>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cogview
