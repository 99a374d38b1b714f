// Three-region attention, backward: the row pass before dk, dv and dq, and the sums of splits. The
// math stands in backward.cuh.
//
// Phases           1. row kernel: delta and bounds of dout; float16: once more for bounds of v.
//                  2. dk and dv (backward_dkdv.cu).
//                  3. partial kernel, only with num_splits > 1.
//                  4. dq (backward_dq.cu).
// row kernel       delta = sum(dout * out) - dlse for each query; for float16 also the bounds on
//                  |dout| and |delta| of each head, or on |v| of each kv head. kRowLanes lanes read a
//                  row in 16-byte vectors, each row once.
// partial kernel   adds the splits' float32 sums of a key in their order, and rounds them to dk and
//                  dv; 8 elements to a thread.
// Smem, barriers   none.
// Writers          one thread writes each element. The bounds are maxima of bits of positive
//                  floats: the order of the atomics does not change them. Deterministic.
// Rounding         float32 throughout; dk and dv once.
// Reference        gradient of cogview_kernels.attention.reference.three_region_attention

#include "backward.cuh"

namespace cogview::sm80 {
namespace {

constexpr int kThreads = 128;  // nine blocks or more fit a multiprocessor: their loads overlap

struct RowParams {
  ThreeRegionBackwardParams backward;
  bool of_v;  // rows of v, else of dout and out
};

// Of the row kernel.
template <int kHeadDim>
constexpr int kRows = kThreads / kRowLanes<kHeadDim>;

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    three_region_attention_backward_row_kernel(const __grid_constant__ RowParams params) {
  constexpr int kLanes = kRowLanes<kHeadDim>, kRows = sm80::kRows<kHeadDim>;
  const ThreeRegionBackwardParams& backward = params.backward;
  const ThreeRegionProblem& problem = backward.problem;
  const int num_heads = params.of_v ? problem.num_kv_heads : problem.num_heads;
  const int num_rows = params.of_v ? problem.k_len : problem.q_len;
  const int tiles = (num_rows + kRows - 1) / kRows;
  const unsigned head_idx = blockIdx.x / unsigned(tiles);
  const int batch = int(head_idx / unsigned(num_heads));
  const int head = int(head_idx % unsigned(num_heads));
  const int row = int(blockIdx.x % unsigned(tiles)) * kRows + int(threadIdx.x) / kLanes;
  const int chunk = threadIdx.x % kLanes;
  const bool reads = row < num_rows && chunk < kChunks<kHeadDim>;

  float square = 0.f, product = 0.f;
  if (reads) {
    const ConstHeads& tensor = params.of_v ? backward.v : backward.dout;
    float a[8];
    load_vector(reinterpret_cast<const T*>(head_of(tensor, batch, head) + row * tensor.stride.row +
                                           chunk * 8),
                a);
#pragma unroll
    for (int i = 0; i < 8; ++i) square += a[i] * a[i];
    if (!params.of_v) {
      float out[8];
      load_vector(reinterpret_cast<const T*>(head_of(backward.out, batch, head) +
                                             row * backward.out.stride.row + chunk * 8),
                  out);
#pragma unroll
      for (int i = 0; i < 8; ++i) product += a[i] * out[i];
    }
  }
#pragma unroll
  for (int mask = 1; mask < kLanes; mask *= 2) {
    square += shfl_bfly(square, mask);
    product += shfl_bfly(product, mask);
  }
  if (!params.of_v && reads) {
    const int64_t at = int64_t(head_idx) * num_rows + row;
    if (backward.dlse != nullptr) product -= backward.dlse[at];
    if (chunk == 0) backward.delta[at] = product;
  }

  if constexpr (kIsFloat16<T>) {
    // Rows that are not finite do not count: they have no bound, and must not spoil the others'.
    float norm = sqrtf(square), delta = reads ? fabsf(product) : 0.f;
    norm = norm <= kLargestFloat ? norm : 0.f;
    delta = delta <= kLargestFloat ? delta : 0.f;
#pragma unroll
    for (int mask = kLanes; mask < kWarpSize; mask *= 2) norm = fmaxf(norm, shfl_bfly(norm, mask));
#pragma unroll
    for (int mask = 1; mask < kWarpSize; mask *= 2) delta = fmaxf(delta, shfl_bfly(delta, mask));
    if (threadIdx.x % kWarpSize == 0) {
      uint32_t* bounds =
          params.of_v ? backward.bounds + 2 * int64_t(problem.batch) * problem.num_heads + head_idx
                      : backward.bounds + 2 * int64_t(head_idx);
      red_global_max(bounds, float_as_uint(norm));
      if (!params.of_v) red_global_max(bounds + 1, float_as_uint(delta));
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) three_region_attention_backward_partial_kernel(
    const __grid_constant__ ThreeRegionBackwardParams params) {
  const ThreeRegionProblem& problem = params.problem;
  const int chunks = problem.head_dim / 8, rows = partial_rows(problem);
  const int64_t num_heads = int64_t(problem.batch) * problem.num_kv_heads;
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int chunk = int(item % chunks), row = int(item / chunks % rows);
  const int64_t head_idx = item / chunks / rows;
  if (head_idx >= num_heads) return;
  const int batch = int(head_idx / problem.num_kv_heads);
  const int head = int(head_idx % problem.num_kv_heads);

  const FarList list(far_keys_of(problem, batch, head));
  if (row >= list.size) return;
  const int key = list.key(row);

#pragma unroll
  for (int which = 0; which < 2; ++which) {
    float sum[8] = {};
    for (int split = 0; split < params.num_splits; ++split) {
      const float* from =
          params.partial +
          (((2 * split + which) * num_heads + head_idx) * rows + row) * problem.head_dim +
          chunk * 8;
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        float four[4];
        load_vector(from + i, four);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i + j] += four[j];
      }
    }
    const Heads& to = which == 0 ? params.dk : params.dv;
    store_vector(reinterpret_cast<T*>(head_of(to, batch, head) + key * to.stride.row + chunk * 8),
                 sum);
  }
}

template <typename T, int kHeadDim>
cudaError_t launch_rows(const ThreeRegionBackwardParams& params, bool of_v, cudaStream_t stream) {
  constexpr int kRows = sm80::kRows<kHeadDim>;
  const ThreeRegionProblem& problem = params.problem;
  const int num_heads = of_v ? problem.num_kv_heads : problem.num_heads;
  const int num_rows = of_v ? problem.k_len : problem.q_len;
  return launch<three_region_attention_backward_row_kernel<T, kHeadDim>>(
      int64_t(problem.batch) * num_heads * ((num_rows + kRows - 1) / kRows), 1, kThreads, 0, stream,
      RowParams{params, of_v});
}

template <typename T>
cudaError_t launch_rows(const ThreeRegionBackwardParams& params, bool of_v, cudaStream_t stream) {
  return with_head_dim(params.problem.head_dim, [&](auto head_dim) {
    return launch_rows<T, decltype(head_dim)::value>(params, of_v, stream);
  });
}

template <typename T>
cudaError_t launch_backward(const ThreeRegionBackwardParams& params, cudaStream_t stream) {
  const ThreeRegionProblem& problem = params.problem;
  cudaError_t status = launch_rows<T>(params, false, stream);
  if (status == cudaSuccess && kIsFloat16<T>) status = launch_rows<T>(params, true, stream);
  if (status == cudaSuccess) status = three_region_attention_backward_dkdv(params, stream);
  if (status == cudaSuccess && params.num_splits > 1) {
    const int64_t items = int64_t(problem.batch) * problem.num_kv_heads * partial_rows(problem) *
                          (problem.head_dim / 8);
    status = launch<three_region_attention_backward_partial_kernel<T>>(
        (items + kThreads - 1) / kThreads, 1, kThreads, 0, stream, params);
  }
  if (status == cudaSuccess) status = three_region_attention_backward_dq(params, stream);
  return status;
}

}  // namespace

cudaError_t three_region_attention_backward(const ThreeRegionBackwardParams& params,
                                            cudaStream_t stream) {
  if (params.problem.batch == 0 || params.problem.q_len == 0) return cudaErrorInvalidValue;
  return params.problem.dtype == DType::kFloat16 ? launch_backward<Half>(params, stream)
                                                 : launch_backward<BFloat16>(params, stream);
}

}  // namespace cogview::sm80

int cogview::three_region_attention_split_rows(const ThreeRegionProblem& problem) {
  return sm80::partial_rows(problem);
}
