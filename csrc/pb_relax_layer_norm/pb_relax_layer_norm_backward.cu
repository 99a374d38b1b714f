// PB-relax LayerNorm, backward.
//
// Math, c being detached, with xhat = (x - mean) * rstd and g = dy * weight:
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat))       means over the row's columns
//   dweight = sum over rows of dy * xhat;  dbias = sum over rows of dy
//
// Layout     dy, x: rows at a stride; dx contiguous; partial (2, num_partials, hidden) float32.
// Grid       num_partials workers of kThreadsPerRow threads; worker w takes rows w,
//            w + num_partials, ... and keeps its columns' sums in registers until the end.
// Threads    row.cuh, so that dy and x are read once and dx is written once. Wide or unaligned rows
//            take the `any` kernel: a block per worker, two passes, sums kept in `partial`.
// Smem       scratch of reduce_row: 2 floats per warp.
// Barriers   bar.sync inside reduce_row; one more before scratch is written for the next row.
// Writers    each element of dx and of `partial` by one thread; a second kernel adds the partial
//            rows in a fixed order. No atomics: deterministic.
// Rounding   float32 throughout; dx, dweight and dbias rounded once.
// Reference  gradient of cogview_kernels.reference.pb_relax_layer_norm

#include "row.cuh"

namespace cogview {
namespace {

template <typename T, int kThreadsPerRow>
__global__ void __launch_bounds__(kBlockThreads<kThreadsPerRow>, 1)
    pb_relax_layer_norm_backward_kernel(const PbRelaxLayerNormBackwardParams params) {
  constexpr int kWarps = kBlockThreads<kThreadsPerRow> / kWarpSize;
  float* scratch = shared_array<float, 2 * kWarps>();
  const int64_t hidden = params.shape.hidden;
  const float inverse_hidden = 1.f / float(hidden);
  const bool weight_is_float32 = params.shape.weight_dtype == DType::kFloat32;
  const int64_t first_worker = int64_t(blockIdx.x) * kRowsPerBlock<kThreadsPerRow>;
  const int64_t worker = first_worker + threadIdx.x / kThreadsPerRow;

  RowRegisters<T> dweight = {}, dbias = {};
  // All threads of a block walk the same number of rows: the first worker has the most.
  for (int64_t begin = 0; first_worker + begin < params.shape.rows; begin += params.num_partials) {
    const int64_t row = worker + begin;
    const bool is_row = worker < params.num_partials && row < params.shape.rows;
    RowRegisters<T> x, g;
    load_row<T, kThreadsPerRow>(static_cast<const T*>(params.x) + row * params.x_row_stride,
                                is_row ? hidden : 0, x);
    load_row<T, kThreadsPerRow>(static_cast<const T*>(params.dy) + row * params.dy_row_stride,
                                is_row ? hidden : 0, g);
    const float mean = is_row ? params.mean[row] : 0.f;
    const float rstd = is_row ? params.rstd[row] : 0.f;

    float sums[2] = {0.f, 0.f};  // of g, of g * xhat
#pragma unroll
    for (int i = 0; i < kVectorsPerThread<T>; ++i) {
      const int column = column_of<T, kThreadsPerRow>(i);
      if (column < hidden) {
        float weight[kVector<T>];
        load_parameter<T>(params.weight, weight_is_float32, column, 1.f, weight);
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) {
          const float dy = g.value[i][j];
          const float xhat = x.value[i][j] = (x.value[i][j] - mean) * rstd;
          dweight.value[i][j] += dy * xhat;
          dbias.value[i][j] += dy;
          g.value[i][j] = dy * weight[j];
          sums[0] += g.value[i][j];
          sums[1] += g.value[i][j] * xhat;
        }
      }
    }
    reduce_row<Sum, kThreadsPerRow>(sums, scratch);
    const float mean_g = sums[0] * inverse_hidden, mean_g_xhat = sums[1] * inverse_hidden;
#pragma unroll
    for (int i = 0; i < kVectorsPerThread<T>; ++i) {
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) {
        g.value[i][j] = rstd * (g.value[i][j] - mean_g - x.value[i][j] * mean_g_xhat);
      }
    }
    store_row<T, kThreadsPerRow>(static_cast<T*>(params.dx) + row * hidden, is_row ? hidden : 0, g);
    bar_sync();
  }

  if (worker < params.num_partials) {
    float* sum_dweight = params.partial + worker * hidden;
    float* sum_dbias = params.partial + (params.num_partials + worker) * hidden;
#pragma unroll
    for (int i = 0; i < kVectorsPerThread<T>; ++i) {
      const int column = column_of<T, kThreadsPerRow>(i);
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) {
        if (column + j < hidden) {
          sum_dweight[column + j] = dweight.value[i][j];
          sum_dbias[column + j] = dbias.value[i][j];
        }
      }
    }
  }
}

// Any width and alignment: a block per worker; each thread adds to columns of `partial` that no
// other thread touches.
template <typename T>
__global__ void __launch_bounds__(256)
    pb_relax_layer_norm_backward_any_kernel(const PbRelaxLayerNormBackwardParams params) {
  constexpr int kWarps = 256 / kWarpSize;
  float* scratch = shared_array<float, 2 * kWarps>();
  const int64_t hidden = params.shape.hidden;
  const bool weight_is_float32 = params.shape.weight_dtype == DType::kFloat32;
  float* sum_dweight = params.partial + blockIdx.x * hidden;
  float* sum_dbias = params.partial + (params.num_partials + blockIdx.x) * hidden;
  for (int64_t column = threadIdx.x; column < hidden; column += 256) {
    sum_dweight[column] = 0.f;
    sum_dbias[column] = 0.f;
  }

  for (int64_t row = blockIdx.x; row < params.shape.rows; row += params.num_partials) {
    const T* x = static_cast<const T*>(params.x) + row * params.x_row_stride;
    const T* dy = static_cast<const T*>(params.dy) + row * params.dy_row_stride;
    T* dx = static_cast<T*>(params.dx) + row * hidden;
    const float mean = params.mean[row], rstd = params.rstd[row];

    float sums[2] = {0.f, 0.f};
    for (int64_t column = threadIdx.x; column < hidden; column += 256) {
      const float gradient = to_float(dy[column]);
      const float xhat = (to_float(x[column]) - mean) * rstd;
      const float g = gradient * load_parameter<T>(params.weight, weight_is_float32, column, 1.f);
      sum_dweight[column] += gradient * xhat;
      sum_dbias[column] += gradient;
      sums[0] += g;
      sums[1] += g * xhat;
    }
    reduce_row<Sum, 256>(sums, scratch);
    const float mean_g = sums[0] / float(hidden), mean_g_xhat = sums[1] / float(hidden);
    for (int64_t column = threadIdx.x; column < hidden; column += 256) {
      const float xhat = (to_float(x[column]) - mean) * rstd;
      const float g =
          to_float(dy[column]) * load_parameter<T>(params.weight, weight_is_float32, column, 1.f);
      dx[column] = from_float<T>(rstd * (g - mean_g - xhat * mean_g_xhat));
    }
    bar_sync();
  }
}

constexpr int kReduceColumns = 32, kReduceRows = 8;

// dweight and dbias: block x adds 32 columns of the partial sums, blockIdx.y tells which of both.
template <typename W>
__global__ void __launch_bounds__(kReduceColumns* kReduceRows)
    pb_relax_layer_norm_backward_reduce_kernel(const PbRelaxLayerNormBackwardParams params) {
  float* scratch = shared_array<float, kReduceRows * kReduceColumns>();
  const int64_t hidden = params.shape.hidden;
  const int column_in_block = threadIdx.x % kReduceColumns;
  const int row_in_block = threadIdx.x / kReduceColumns;
  const int64_t column = int64_t(blockIdx.x) * kReduceColumns + column_in_block;
  W* out = static_cast<W*>(blockIdx.y == 0 ? params.dweight : params.dbias);
  if (out == nullptr) return;  // the whole block

  float sum = 0.f;
  if (column < hidden) {
    const float* source = params.partial + blockIdx.y * params.num_partials * hidden + column;
    for (int64_t row = row_in_block; row < params.num_partials; row += kReduceRows) {
      sum += source[row * hidden];
    }
  }
  scratch[row_in_block * kReduceColumns + column_in_block] = sum;
  bar_sync();
  if (row_in_block == 0 && column < hidden) {
    for (int row = 1; row < kReduceRows; ++row) {
      sum += scratch[row * kReduceColumns + column_in_block];
    }
    out[column] = from_float<W>(sum);
  }
}

template <typename W>
cudaError_t launch_reduce(const PbRelaxLayerNormBackwardParams& params, cudaStream_t stream) {
  const int64_t blocks = (params.shape.hidden + kReduceColumns - 1) / kReduceColumns;
  return launch<pb_relax_layer_norm_backward_reduce_kernel<W>>(
      blocks, 2, kReduceColumns * kReduceRows, 0, stream, params);
}

template <typename T>
bool is_aligned(const PbRelaxLayerNormBackwardParams& params) {
  const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
  return params.shape.hidden % kVector<T> == 0 && params.x_row_stride % kVector<T> == 0 &&
         params.dy_row_stride % kVector<T> == 0 &&
         (address(params.x) | address(params.dy) | address(params.dx) | address(params.weight)) %
                 16 ==
             0;
}

template <typename T, int kThreadsPerRow>
cudaError_t launch_rows(const PbRelaxLayerNormBackwardParams& params, cudaStream_t stream) {
  constexpr int kWorkers = kRowsPerBlock<kThreadsPerRow>;
  return launch<pb_relax_layer_norm_backward_kernel<T, kThreadsPerRow>>(
      (params.num_partials + kWorkers - 1) / kWorkers, 1, kBlockThreads<kThreadsPerRow>, 0, stream,
      params);
}

// dx and the partial sums.
template <typename T>
cudaError_t launch_rows(const PbRelaxLayerNormBackwardParams& params, cudaStream_t stream) {
  const int64_t hidden = params.shape.hidden;
  if (is_aligned<T>(params)) {
    if (hidden <= 32 * kElementsPerThread) return launch_rows<T, 32>(params, stream);
    if (hidden <= 128 * kElementsPerThread) return launch_rows<T, 128>(params, stream);
    if (hidden <= 256 * kElementsPerThread) return launch_rows<T, 256>(params, stream);
    if (hidden <= 512 * kElementsPerThread) return launch_rows<T, 512>(params, stream);
  }
  return launch<pb_relax_layer_norm_backward_any_kernel<T>>(params.num_partials, 1, 256, 0, stream,
                                                            params);
}

template <typename T>
cudaError_t launch_backward(const PbRelaxLayerNormBackwardParams& params, cudaStream_t stream) {
  const cudaError_t status = launch_rows<T>(params, stream);
  if (status != cudaSuccess || (params.dweight == nullptr && params.dbias == nullptr)) {
    return status;
  }
  return params.shape.weight_dtype == DType::kFloat32 ? launch_reduce<float>(params, stream)
                                                      : launch_reduce<T>(params, stream);
}

}  // namespace

cudaError_t pb_relax_layer_norm_backward(const PbRelaxLayerNormBackwardParams& params,
                                         cudaStream_t stream) {
  switch (params.shape.dtype) {
    case DType::kFloat32:
      return launch_backward<float>(params, stream);
    case DType::kFloat16:
      return launch_backward<Half>(params, stream);
    case DType::kBFloat16:
      return launch_backward<BFloat16>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cogview
