// Gradients of weights and biases from the partial sums that the blocks of a backward leave.
//
// Math       gradient = sum over the rows of its part of `partial`
// Phases     1 the wait for the backward's end; the launch may start before it (Start::kEarly).
//            2 a thread's rows, all loaded before the first is added. 3 sums over the block's rows.
// Layout     partial (num_gradients, num_blocks, hidden) float32; a gradient (hidden).
// Grid       (hidden / 32, num_gradients) blocks of 4 warps; of hidden / 8 where hidden % 4 != 0
// Warps      the columns of a block lie side by side in 8 threads, 4 in each (or one). Thread t takes
//            rows t / 8, t / 8 + 16, ...: a warp reads 128 bytes of each of 4 rows.
// Smem       sums of warps 512 bytes
// Barriers   griddepcontrol.wait: `partial` is there. bar.sync: the sums of warps are there.
// Writers    one thread writes each element, and adds in an order that num_blocks alone determines:
//            deterministic.
// Rounding   float32 throughout; gradients rounded once.
// Reference  torch.sum(partial, 1)

#include "../instructions/sm90.cuh"
#include "pb_relax_layer_norm.h"

namespace cogview {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarpSize;
constexpr int kThreadsAcross = 8, kThreadsDown = kThreads / kThreadsAcross;
// Rows that a thread loads at once: all of them, up to 192 blocks. (A block of the backward fills a
// multiprocessor.)
constexpr int kLoads = 12;
// Blocks of a multiprocessor. For more of them ptxas would save registers: a load, its sum, a load.
constexpr int kBlocksPerSm = 4;

// Zeros where not `valid`.
template <int kWidth>
__device__ __forceinline__ void load(const float* source, bool valid, float (&value)[kWidth]) {
  if constexpr (kWidth == 4) {
    const uint4 bits = valid ? ld_global_v4(source) : uint4{};
    const float* columns = reinterpret_cast<const float*>(&bits);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) value[j] = columns[j];
  } else {
    static_assert(kWidth == 1);
    value[0] = valid ? *source : 0.f;
  }
}

// kWidth: columns of a thread.
template <int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    pb_relax_layer_norm_partial_sums_kernel(const __grid_constant__ PartialSumsParams params) {
  constexpr int kColumns = kThreadsAcross * kWidth;
  float* scratch = shared_array<float, kWarps * kColumns>();
  const ParameterGradient gradient = params.gradients[blockIdx.y];
  const int64_t hidden = params.hidden, first_column = int64_t{blockIdx.x} * kColumns;
  const int across = int(threadIdx.x % kThreadsAcross) * kWidth;
  const int down = int(threadIdx.x / kThreadsAcross);
  const int num_rows = first_column + across < hidden ? params.num_blocks : 0;
  const float* source = params.partial + first_column + across +
                        (int64_t{blockIdx.y} * params.num_blocks + down) * hidden;
  griddepcontrol_wait();
  if (gradient.data == nullptr) return;  // the whole block

  float sum[kWidth] = {};
#pragma unroll 1
  for (int row = down; row < num_rows; row += kLoads * kThreadsDown) {
    float value[kLoads][kWidth];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      load(source, row + i * kThreadsDown < num_rows, value[i]);
      source += kThreadsDown * hidden;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum[j] += value[i][j];
    }
  }
  const int warp = int(threadIdx.x / kWarpSize);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    sum[j] += shfl_bfly(sum[j], kThreadsAcross);
    sum[j] += shfl_bfly(sum[j], 2 * kThreadsAcross);
    if (threadIdx.x % kWarpSize < kThreadsAcross) scratch[warp * kColumns + across + j] = sum[j];
  }
  bar_sync();
  const int64_t column = first_column + threadIdx.x;
  if (threadIdx.x >= kColumns || column >= hidden) return;
  float total = 0.f;
#pragma unroll
  for (int other = 0; other < kWarps; ++other) total += scratch[other * kColumns + threadIdx.x];
  switch (gradient.dtype) {
    case DType::kFloat32:
      static_cast<float*>(gradient.data)[column] = total;
      return;
    case DType::kFloat16:
      static_cast<Half*>(gradient.data)[column] = from_float<Half>(total);
      return;
    case DType::kBFloat16:
      static_cast<BFloat16*>(gradient.data)[column] = from_float<BFloat16>(total);
      return;
  }
}

template <int kWidth>
cudaError_t launch_sums(const PartialSumsParams& params, cudaStream_t stream) {
  constexpr int kColumns = kThreadsAcross * kWidth;
  return launch<pb_relax_layer_norm_partial_sums_kernel<kWidth>, Start::kEarly>(
      (params.hidden + kColumns - 1) / kColumns, params.num_gradients, kThreads, 0, stream, params);
}

}  // namespace

cudaError_t pb_relax_layer_norm_partial_sums(const PartialSumsParams& params, cudaStream_t stream) {
  return params.hidden % 4 == 0 ? launch_sums<4>(params, stream) : launch_sums<1>(params, stream);
}

}  // namespace cogview
