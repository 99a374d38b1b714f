// Three-region attention, backward: dq. The math stands in backward.cuh.
//
// Phases     1. Copy the q and dout tiles and, where they are keys of the window, the first tile of
//               keys; find the key list, and each warp's view of it.
//            2. For each tile of the list, from its end: wait for k and v, start the copy of the
//               next tile, then per warp: logits, p, ds, dq += ds k.
//            3. Scale dq and write it through the q tile.
//            4. Compute rows again that have a NaN which is not their own (exact.cuh).
// Layout     as the forward; dout, dq as q; row_max, row_log_sum, delta (batch, num_heads, q_len).
// Grid       as the forward.
// Warps      kWarps; each owns 16 * kRowTiles query rows, whose dout and dq stay in registers, and
//            their q where kKeepsQueries says so. What a warp skips and masks is as in the forward; a
//            step has 32 entries, or 16 where a warp sees no others of the 32.
// Smem       head_dim                         32     64     96    128
//            q                              8192  16384  12288  16384
//            dout                           8192  16384  12288  16384
//            stages: 2 x (k, v)            16384  32768  24576  32768
//            keys of the stages              512    512    256    256
//            key lists and views of warps    384    384    384    384
//            total, dynamic                33664  66432  49792  66176
// Barriers   those of KeyStages, as the forward; bar_sync: q and dout have arrived; bar_warp_sync: a
//            warp's key list, its rows of dq
// Writers    one thread writes each element of dq: deterministic.
// Rounding   float32 products, p and sums, logits as in the forward; ds rounded to the element type
//            (scaled, see backward.cuh) before ds k; dq once.
// Reference  gradient of cogview_kernels.attention.reference.three_region_attention

#include "backward.cuh"
#include "query_tile.cuh"

namespace cogview::sm80 {
namespace {

template <int kHeadDim_>
struct DqShape {
  static constexpr int kHeadDim = kHeadDim_;
  // Two row tiles halve a warp's reads of k and v; beyond 64 they do not fit the registers.
  static constexpr int kRowTiles = kHeadDim <= 64 ? 2 : 1;
  // One warp for each quarter of a multiprocessor.
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
  static constexpr int kBlockM = 16 * kRowTiles * kWarps;
  // Beyond 64, tiles of 32 keys let two blocks fit sm_86 at 96, and sm_80 at 128.
  static constexpr int kBlockN = kHeadDim <= 64 ? 64 : 32;
  // Blocks on a multiprocessor: 255 registers a thread, the most there are, leave room for two.
  static constexpr int kMinBlocks = 2;
  // In registers for all tiles, as dout is, or read again in each step.
  static constexpr bool kKeepsQueries = kHeadDim > 64 || kMixesSteps<kHeadDim>;
  struct SharedMemoryPlan {
    unsigned char q[kTileBytes<kHeadDim, kBlockM>];  // later the rows of dq
    unsigned char dout[kTileBytes<kHeadDim, kBlockM>];
    KeyBuffers<kHeadDim, kBlockN> keys;
    KeyContext contexts[kWarps];
  };
};

// Computes the row at position i again (exact.cuh).
template <typename T, int kHeadDim>
__device__ __noinline__ void dq_row(const ThreeRegionBackwardParams& params, int batch, int head,
                                    int i) {
  constexpr int kPerLane = kHeadDim / kWarpSize;
  const ThreeRegionProblem& problem = params.problem;
  const int lane = threadIdx.x % kWarpSize, row = i - (problem.k_len - problem.q_len);
  const int kv_head = head / (problem.num_heads / problem.num_kv_heads);
  const int64_t at = (int64_t(batch) * problem.num_heads + head) * problem.q_len + row;
  const KeyList list = key_list_of(problem, batch, kv_head, i, i + 1);  // exactly what the row sees
  const T* q = row_of_head<T>(params.q, batch, head, row);
  const T* dout = row_of_head<T>(params.dout, batch, head, row);
  float dq[kPerLane] = {};
  for (int entry = 0; entry < list.size; ++entry) {
    const int key = list.key(entry);
    const T* k = row_of_head<T>(params.k, batch, kv_head, key);
    const float s = exact_logit<T, kHeadDim>(q, k, problem.softmax_scale * kLog2e,
                                             bias_of(problem, list, entry));
    const float p = exp2f(s - params.row_max[at] - params.row_log_sum[at]);
    const float dp = exact_dot<T, kHeadDim>(dout, row_of_head<T>(params.v, batch, kv_head, key));
    const float ds = p * (dp - params.delta[at]);
#pragma unroll
    for (int d = 0; d < kPerLane; ++d) dq[d] += ds * to_float(k[lane + d * kWarpSize]);
  }
  T* to = reinterpret_cast<T*>(head_of(params.dq, batch, head) + row * params.dq.stride.row);
#pragma unroll
  for (int d = 0; d < kPerLane; ++d) {
    to[lane + d * kWarpSize] = from_float<T>(dq[d] * problem.softmax_scale);
  }
}

template <typename T, typename Shape>
struct DqWarp {
  static constexpr int kRowTiles = Shape::kRowTiles, kHeadDim = Shape::kHeadDim;
  static constexpr int kBlockN = Shape::kBlockN;

  const KeyList& list;
  const WarpView& view;
  const unsigned char *sQ, *sDout;
  const KeyStage<kHeadDim, kBlockN>* stages;
  LaneRow<kHeadDim> q_row, key_row, ds_row;
  int far_end;            // of the lane's row of the warp, see find_context
  int position;           // of the lane's first row
  float scale;            // from a product to a logit in bits
  bool has_fused_logits;  // see is_large_logit; and hidden ones are products of -inf
  float row_max[kRowTiles][2];
  float factor[kRowTiles][2];       // 2^-row_log_sum, and what ds is multiplied by
  float minus_delta[kRowTiles][2];  // times factor
  float dq[kRowTiles][kHeadDim / 8][4];
  uint32_t q[kRowTiles][kHeadDim / 16][4], dout[kRowTiles][kHeadDim / 16][4];

  __device__ __forceinline__ void load_rows() {
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
#pragma unroll
      for (int rt = 0; rt < kRowTiles; ++rt) {
        if (Shape::kKeepsQueries) ldmatrix_x4(q[rt][d], sQ + q_row.at(rt, d));
        ldmatrix_x4(dout[rt][d], sDout + q_row.at(rt, d));
      }
    }
  }

  __device__ __forceinline__ void initialize(const ThreeRegionBackwardParams& params,
                                             const QueryTile<Shape::kBlockM>& tile,
                                             float ds_scale) {
    bool large = false;
    const ThreeRegionProblem& problem = params.problem;
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile.row(position - tile.origin + 16 * rt + 8 * half);
        const int64_t at = int64_t(tile.head_idx) * problem.q_len + row;
        row_max[rt][half] = row < 0 ? 0.f : params.row_max[at];
        factor[rt][half] = row < 0 ? 0.f : exp2f(-params.row_log_sum[at]) * ds_scale;
        minus_delta[rt][half] = row < 0 ? 0.f : -params.delta[at] * factor[rt][half];
        large = large || is_large_logit(row_max[rt][half]);
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          dq[rt][n][2 * half] = dq[rt][n][2 * half + 1] = 0.f;
        }
      }
    }
    has_fused_logits = scale > 0.f && vote_ballot(large) == 0;
  }

  // Takes up the kEntries entries of keys from `entry` on, `tile` bytes behind the first stage.
  template <int kEntries, bool kIsPlain>
  __device__ __forceinline__ void step(const ThreeRegionProblem& problem, int tile, int entry) {
    const int lane = threadIdx.x % kWarpSize;
    float s[kRowTiles][kEntries / 8][4] = {}, ds[kRowTiles][kEntries / 8][4] = {};
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
#pragma unroll
      for (int rt = 0; rt < kRowTiles; ++rt) {
        if (!Shape::kKeepsQueries) ldmatrix_x4(q[rt][d], sQ + q_row.at(rt, d));
      }
#pragma unroll
      for (int n = 0; n < kEntries / 16; ++n) {
        uint32_t k[4], v[4];
        const LaneRow<kHeadDim> key{key_row.offset + tile};
        ldmatrix_x4(k, stages[0].k + key.at(n, d));
        ldmatrix_x4(v, stages[0].v + key.at(n, d));
#pragma unroll
        for (int rt = 0; rt < kRowTiles; ++rt) {
          mma_m16n8k16<T>(s[rt][2 * n], q[rt][d], k[0], k[1]);
          mma_m16n8k16<T>(s[rt][2 * n + 1], q[rt][d], k[2], k[3]);
          mma_m16n8k16<T>(ds[rt][2 * n], dout[rt][d], v[0], v[1]);
          mma_m16n8k16<T>(ds[rt][2 * n + 1], dout[rt][d], v[2], v[3]);
        }
      }
    }

    float of_product = scale, bias = 0.f;
    const EntryBiases biases(list, view);
    if (kIsPlain || (has_fused_logits && view.has_one_bias(entry, entry + kEntries))) {
      bias = biases(entry);
    } else {
      to_logits(s, scale, biases, entry + lane % 4 * 2);
      of_product = 1.f;
    }
    if (!kIsPlain && !view.all(entry, entry + kEntries)) {
      const VisibleEntries<kRowTiles, kEntries> visible(problem, list, view, far_end, position,
                                                        entry);
      visible.for_each([&](bool sees, int rt, int n, int c) {
        if (!sees) s[rt][n][c] = -INFINITY;
      });
    }
    float shift[kRowTiles][2];
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) shift[rt][half] = bias - row_max[rt][half];
    }

    // Sixteen entries at a time, so that some become gradients while others are multiplied by k.
#pragma unroll
    for (int n = 0; n < kEntries / 16; ++n) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int half = i / 2 % 2;
          const float p =
              ex2_approx(fmaf(s[rt][2 * n + i / 4][i % 4], of_product, shift[rt][half]));
          float& product = ds[rt][2 * n + i / 4][i % 4];
          product = p * fmaf(product, factor[rt][half], minus_delta[rt][half]);
        }
        convert_c_to_a<T>(a[rt], ds[rt][2 * n], ds[rt][2 * n + 1]);
      }
#pragma unroll
      for (int d = 0; d < kHeadDim / 16; ++d) {
        uint32_t k[4];
        ldmatrix_x4_trans(k, stages[0].k + LaneRow<kHeadDim>{ds_row.offset + tile}.at(n, d));
#pragma unroll
        for (int rt = 0; rt < kRowTiles; ++rt) {
          mma_m16n8k16<T>(dq[rt][2 * d], a[rt], k[0], k[1]);
          mma_m16n8k16<T>(dq[rt][2 * d + 1], a[rt], k[2], k[3]);
        }
      }
    }
  }
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kMinBlocks)
    three_region_attention_backward_dq_kernel(
        const __grid_constant__ ThreeRegionBackwardParams params) {
  constexpr int kHeadDim = Shape::kHeadDim, kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN;
  constexpr int kThreads = Shape::kThreads, kRowTiles = Shape::kRowTiles;
  const ThreeRegionProblem& problem = params.problem;
  auto& shared = shared_memory<typename Shape::SharedMemoryPlan>();
  const QueryTile<kBlockM> tile(problem);
  const FarKeys far = far_keys_of(problem, tile.batch, tile.kv_head);
  const auto row_of = [&](int tile_row) { return tile.row(tile_row); };
  tile.template copy<kHeadDim, kThreads>(shared.q, params.q);
  tile.template copy<kHeadDim, kThreads>(shared.dout, params.dout);
  cp_async_commit_group();
  KeyContext& context = shared.contexts[kept(int(threadIdx.x / kWarpSize))];
  const auto& [list, view] = context;
  KeyStages<kHeadDim, kBlockN, kThreads> stages(list, shared.keys, params.k, params.v, tile.batch,
                                                tile.kv_head);
  const bool has_started =
      stages.start_in_window(tile.end - window_start(tile.begin, problem), tile.end);
  int far_end;
  find_context<16 * kRowTiles>(problem, tile, far, context, far_end);
  stages.start(has_started);

  const float scale = problem.softmax_scale * kLog2e;
  const int exponent = ds_exponent<T>(params, tile.batch, tile.head);
  const float ds_scale = exp2f(float(exponent));
  const int lane = threadIdx.x % kWarpSize;
  const int warp_row = int(threadIdx.x / kWarpSize) * 16 * kRowTiles;
  DqWarp<T, Shape> state{list,
                         view,
                         shared.q,
                         shared.dout,
                         shared.keys.stages,
                         {kept(lane_row<kHeadDim>(warp_row).offset)},
                         {kept(lane_row_transposed<kHeadDim>().offset)},
                         {kept(lane_row<kHeadDim>(0).offset)},
                         far_end,
                         tile.origin + warp_row + lane / 4,
                         scale};
  state.initialize(params, tile, ds_scale);

  SeenTiles<kBlockN> seen_tiles(view, list.size - kBlockN);
  cp_async_wait_group<1>();
  bar_sync();
  state.load_rows();
  for (int entry = list.size - kBlockN; entry > -kBlockN; entry -= kBlockN) {
    const int stage = stages.wait(entry);
    int seen = seen_tiles(entry);
    if (!state.has_fused_logits) seen &= ~seen_tiles.kPlain;
    step_over<kHeadDim, kBlockN, 32, 16>(
        seen, stage, entry, [&](auto entries, auto is_plain, int at, int from) {
          state.template step<decltype(entries)::value, decltype(is_plain)::value>(problem, at,
                                                                                   from);
        });
  }

  const float factor =
      problem.softmax_scale * exp2f(float(-ds_exponent<T>(params, tile.batch, tile.head)));
  bool has_nan[kRowTiles][2];
#pragma unroll
  for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        sum += 0.f * (state.dq[rt][n][2 * half] *= factor);
        sum += 0.f * (state.dq[rt][n][2 * half + 1] *= factor);
      }
      // A row that sees a NaN has one in its own statistics.
      const float own =
          state.row_max[rt][half] + state.factor[rt][half] + state.minus_delta[rt][half];
      has_nan[rt][half] = row_of(warp_row + 16 * rt + 8 * half + lane / 4) >= 0 &&
                          fabsf(own) <= kLargestFloat && sum != 0.f;
    }
  }
  store_rows<T, kHeadDim, kRowTiles>(shared.q, warp_row, state.dq,
                                     head_of(params.dq, tile.batch, tile.head),
                                     params.dq.stride.row, row_of);
  bar_warp_sync();
  for_rows_with_nan(has_nan, [&](int row) {
    dq_row<T, kHeadDim>(params, tile.batch, tile.head, tile.origin + warp_row + row);
  });
}

template <typename T, int kHeadDim>
cudaError_t launch_dq(ThreeRegionBackwardParams params, cudaStream_t stream) {
  using Shape = DqShape<kHeadDim>;
  const int64_t num_blocks = QueryTile<Shape::kBlockM>::plan(params.problem);
  return launch<three_region_attention_backward_dq_kernel<T, Shape>>(
      num_blocks, 1, Shape::kThreads, sizeof(typename Shape::SharedMemoryPlan), stream, params);
}

template <typename T>
cudaError_t launch_dq(const ThreeRegionBackwardParams& params, cudaStream_t stream) {
  return with_head_dim(params.problem.head_dim, [&](auto head_dim) {
    return launch_dq<T, decltype(head_dim)::value>(params, stream);
  });
}

}  // namespace

cudaError_t three_region_attention_backward_dq(const ThreeRegionBackwardParams& params,
                                               cudaStream_t stream) {
  return params.problem.dtype == DType::kFloat16 ? launch_dq<Half>(params, stream)
                                                 : launch_dq<BFloat16>(params, stream);
}

}  // namespace cogview::sm80
