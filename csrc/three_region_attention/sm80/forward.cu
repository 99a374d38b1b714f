// Three-region attention, forward.
//
// Math       For each query row, over the tiles of its key list (key_list.cuh), in bits:
//              s = softmax_scale log2(e) q k^T + bias log2(e)     -inf where the row sees no key
//              m' = max(m, max s);  p = 2^(s - m');  l = l 2^(m - m') + sum p
//              o = o 2^(m - m') + p v
//            At the end out = o / l;  row_max = m;  row_log_sum = log2(l).
// Phases     1. Copy the q tile and, where they are keys of the window, the first tile of keys; find
//               the key list, and each warp's view of it.
//            2. For each tile of the list, from its end: wait for k and v, start the copy of the
//               next tile, then per warp: logits, online softmax, o += p v.
//            3. Divide by l; write the statistics, and out through the q tile.
//            4. Compute rows with a NaN again, over visible keys only (exact.cuh).
// Layout     q, out (batch, num_heads, q_len, head_dim); k, v (batch, num_kv_heads, k_len,
//            head_dim); any strides, rows contiguous and aligned to 16 bytes.
// Grid       one block per head and tile of kBlockM query positions (query_tile.cuh).
// Warps      kWarps; each owns 16 * kRowTiles query rows, whose o stays in registers, and their q
//            where kKeepsQueries says so. A warp skips each 32 entries of a tile that none of its rows
//            sees. A tile that all its rows see is one step without branches; in others hidden entries
//            are masked. Weights are computed sixteen entries at a time, among the products with v of
//            the sixteen before.
// Smem       head_dim                         32     64     96    128
//            q                              8192  16384  24576  32768
//            stages: 2 x (k, v)            16384  32768  24576  32768
//            keys of the stages              512    512    256    256
//            key lists and views of warps    384    384    384    384
//            total, dynamic                25472  50048  49792  66176
// Barriers   bar_sync in KeyStages::start    the keys of the first tile are looked up
//            bar_sync in KeyStages::wait     the tile has arrived for all threads, and the keys of
//                                            the next; all warps have left the stage and the keys
//                                            that are filled; before the first tile: q has arrived
//            bar_sync, negative scale only   the q tile has arrived, before its sign changes
//            bar_warp_sync                   a warp's key list; its rows of the out tile
// Rounding   float32 products, softmax and sums; below 1024 bits (is_large_logit) only the largest
//            logit of a row is rounded; p rounded to the element type before p v; out once.
// Reference  cogview_kernels.attention.reference.three_region_attention

#include "exact.cuh"
#include "query_tile.cuh"

namespace cogview::sm80 {
namespace {

template <int kHeadDim_>
struct ForwardShape {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRowTiles = 2;  // they halve a warp's reads of k and v
  // One warp for each quarter of a multiprocessor.
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
  static constexpr int kBlockM = 16 * kRowTiles * kWarps;
  // Beyond 64, tiles of 32 keys: two blocks fit the 100 KB of sm_86 and sm_120 at 96, and logits of
  // more keys do not fit the registers at 128.
  static constexpr int kBlockN = kHeadDim <= 64 ? 64 : 32;
  // Blocks on a multiprocessor: 255 registers a thread, the most there are, leave room for two.
  static constexpr int kMinBlocks = 2;
  // In registers for all tiles, or read again in each step.
  static constexpr bool kKeepsQueries = kHeadDim < 64 || kMixesSteps<kHeadDim>;
  struct SharedMemoryPlan {
    unsigned char q[kTileBytes<kHeadDim, kBlockM>];  // later the rows of out
    KeyBuffers<kHeadDim, kBlockN> keys;
    KeyContext contexts[kWarps];
  };
};

// One warp's part of the online softmax and its products with a tile of keys and values.
template <typename T, typename Shape>
struct ForwardWarp {
  static constexpr int kRowTiles = Shape::kRowTiles, kHeadDim = Shape::kHeadDim;
  static constexpr int kBlockN = Shape::kBlockN;

  const KeyList& list;
  const WarpView& view;
  const unsigned char* sQ;
  const KeyStage<kHeadDim, kBlockN>* stages;
  LaneRow<kHeadDim> q_row, k_row, v_row;
  int far_end;                             // of the lane's row of the warp, see find_context
  int position;                            // of the lane's first row
  float scale;                             // from a product to a logit in bits
  float m[kRowTiles][2], l[kRowTiles][2];  // l: of the lane's columns until the end
  float o[kRowTiles][kHeadDim / 8][4];
  uint32_t q[kRowTiles][Shape::kKeepsQueries ? kHeadDim / 16 : 1][4];

  __device__ __forceinline__ void load_queries(int d) {
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) {
      ldmatrix_x4(q[rt][Shape::kKeepsQueries ? d : 0], sQ + q_row.at(rt, d));
    }
  }

  __device__ __forceinline__ void initialize() {
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        m[rt][half] = -INFINITY;
        l[rt][half] = 0.f;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          o[rt][n][2 * half] = o[rt][n][2 * half + 1] = 0.f;
        }
      }
    }
  }

  // Takes up the kEntries entries of keys from `entry` on, `tile` bytes behind the first stage.
  template <int kEntries, bool kIsPlain>
  __device__ __forceinline__ void step(const ThreeRegionProblem& problem, int tile, int entry) {
    const int lane = threadIdx.x % kWarpSize;
    float s[kRowTiles][kEntries / 8][4] = {};
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      if (!Shape::kKeepsQueries) load_queries(d);
#pragma unroll
      for (int n = 0; n < kEntries / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4(b, stages[0].k + LaneRow<kHeadDim>{k_row.offset + tile}.at(n, d));
#pragma unroll
        for (int rt = 0; rt < kRowTiles; ++rt) {
          mma_m16n8k16<T>(s[rt][2 * n], q[rt][Shape::kKeepsQueries ? d : 0], b[0], b[1]);
          mma_m16n8k16<T>(s[rt][2 * n + 1], q[rt][Shape::kKeepsQueries ? d : 0], b[2], b[3]);
        }
      }
    }

    float of_product = scale, bias = 0.f;
    const EntryBiases biases(list, view);
    const int column = entry + lane % 4 * 2;
    const bool has_logits =
        !kIsPlain && !(scale > 0.f && view.has_one_bias(entry, entry + kEntries));
    if (has_logits) {
      to_logits(s, scale, biases, column);
      of_product = 1.f;
    } else {
      bias = biases(entry);
    }
    if (!kIsPlain && !view.all(entry, entry + kEntries)) {
      const VisibleEntries<kRowTiles, kEntries> visible(problem, list, view, far_end, position,
                                                        entry);
      visible.for_each([&](bool sees, int rt, int n, int c) {
        if (!sees) s[rt][n][c] = -INFINITY;
      });
    }

    float new_m[kRowTiles][2];
    bool is_large = false;
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = -INFINITY;
#pragma unroll
        for (int n = 0; n < kEntries / 8; ++n) {
          largest = fmaxf(largest, fmaxf(s[rt][n][2 * half], s[rt][n][2 * half + 1]));
        }
        new_m[rt][half] = fmaxf(m[rt][half], fmaf(largest, of_product, bias));
        is_large = is_large || is_large_logit(new_m[rt][half]);
      }
    }
    if (vote_ballot(is_large) != 0 && !has_logits) {
      to_logits(s, scale, biases, column);
      of_product = 1.f;
      bias = 0.f;
    }
    float shift[kRowTiles][2];
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float row_m = quad_max(new_m[rt][half]);
        // Before its first key a row has weights of zero.
        const float finite_m = row_m == -INFINITY ? 0.f : row_m;
        const float keep = ex2_approx(m[rt][half] - finite_m);
        m[rt][half] = row_m;
        shift[rt][half] = bias - finite_m;
        l[rt][half] *= keep;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          o[rt][n][2 * half] *= keep;
          o[rt][n][2 * half + 1] *= keep;
        }
      }
    }

    // Sixteen entries at a time, so that some become weights while others are multiplied by v.
#pragma unroll
    for (int n = 0; n < kEntries / 16; ++n) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float& p = s[rt][2 * n + i / 4][i % 4];
          p = ex2_approx(fmaf(p, of_product, shift[rt][i / 2 % 2]));
          l[rt][i / 2 % 2] += p;
        }
        convert_c_to_a<T>(a[rt], s[rt][2 * n], s[rt][2 * n + 1]);
      }
#pragma unroll
      for (int d = 0; d < kHeadDim / 16; ++d) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, stages[0].v + LaneRow<kHeadDim>{v_row.offset + tile}.at(n, d));
#pragma unroll
        for (int rt = 0; rt < kRowTiles; ++rt) {
          mma_m16n8k16<T>(o[rt][2 * d], a[rt], b[0], b[1]);
          mma_m16n8k16<T>(o[rt][2 * d + 1], a[rt], b[2], b[3]);
        }
      }
    }
  }
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kMinBlocks)
    three_region_attention_forward_kernel(const __grid_constant__ ThreeRegionForwardParams params) {
  constexpr int kHeadDim = Shape::kHeadDim, kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN;
  constexpr int kThreads = Shape::kThreads, kRowTiles = Shape::kRowTiles;
  const ThreeRegionProblem& problem = params.problem;
  auto& shared = shared_memory<typename Shape::SharedMemoryPlan>();
  unsigned char* sQ = shared.q;
  const QueryTile<kBlockM> tile(problem);
  const FarKeys far = far_keys_of(problem, tile.batch, tile.kv_head);
  const auto row_of = [&](int tile_row) { return tile.row(tile_row); };
  tile.template copy<kHeadDim, kThreads>(sQ, params.q);
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

  const float scale = fabsf(problem.softmax_scale) * kLog2e;
  if (problem.softmax_scale < 0.f) {
    // Move the sign to q, so that the largest product is the largest logit.
    cp_async_wait_group<0>();
    bar_sync();
    for (int i = threadIdx.x; i < kTileBytes<kHeadDim, kBlockM> / 4; i += kThreads) {
      reinterpret_cast<uint32_t*>(sQ)[i] ^= 0x80008000u;
    }
  }

  const int lane = threadIdx.x % kWarpSize;
  const int warp_row = int(threadIdx.x / kWarpSize) * 16 * kRowTiles;
  ForwardWarp<T, Shape> state{list,
                              view,
                              sQ,
                              shared.keys.stages,
                              {kept(lane_row<kHeadDim>(warp_row).offset)},
                              {kept(lane_row_transposed<kHeadDim>().offset)},
                              {kept(lane_row<kHeadDim>(0).offset)},
                              far_end,
                              tile.origin + warp_row + lane / 4,
                              scale};
  state.initialize();

  SeenTiles<kBlockN> seen_tiles(view, list.size - kBlockN);
  int entry = list.size - kBlockN, stage = stages.wait(entry);
  if (Shape::kKeepsQueries) {
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) state.load_queries(d);
  }
  while (true) {
    step_over<kHeadDim, kBlockN, kBlockN, 32>(
        seen_tiles(entry), stage, entry, [&](auto entries, auto is_plain, int at, int from) {
          state.template step<decltype(entries)::value, decltype(is_plain)::value>(problem, at,
                                                                                   from);
        });
    entry -= kBlockN;
    if (entry <= -kBlockN) break;
    stage = stages.wait(entry);
  }

  // Each of the four lanes that share rows finishes the sum of one of them, for all four.
  const int own = lane % (2 * kRowTiles);
  float own_l = 0.f, own_m = 0.f;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const float l = quad_sum(state.l[i / 2][i % 2]);
    if (own == i) own_l = l, own_m = state.m[i / 2][i % 2];
  }
  const float own_factor = 1.f / own_l;
  if (const int row = row_of(warp_row + 8 * own + lane / 4); row >= 0 && lane % 4 == own) {
    const int64_t at = int64_t(tile.head_idx) * problem.q_len + row;
    params.row_max[at] = own_m;
    params.row_log_sum[at] = log2f(own_l);
  }
  bool has_nan[kRowTiles][2];
#pragma unroll
  for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float factor = shfl_idx(own_factor, lane / 4 * 4 + 2 * rt + half);
      // NaN where a number of the row is not finite, or l is 0: sums of bfloat16 may overflow.
      float zero = 0.f * factor;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int c = 2 * half; c < 2 * half + 2; ++c) {
          float& o = state.o[rt][n][c];
          o *= factor;
          zero += 0.f * o;
          // The mean of finite values may exceed float16, because p is rounded in o but not in l.
          if constexpr (kIsFloat16<T>) o = fminf(fmaxf(o, -65504.f), 65504.f);
        }
      }
      has_nan[rt][half] = row_of(warp_row + 16 * rt + 8 * half + lane / 4) >= 0 && zero != 0.f;
    }
  }
  store_rows<T, kHeadDim, kRowTiles>(sQ, warp_row, state.o,
                                     head_of(params.out, tile.batch, tile.head),
                                     params.out.stride.row, row_of);
  bar_warp_sync();
  for_rows_with_nan(has_nan, [&](int row) {
    forward_row<T, kHeadDim>(params, tile.batch, tile.head, tile.origin + warp_row + row,
                             problem.k_len);
  });
}

template <typename T, int kHeadDim>
cudaError_t launch_forward(ThreeRegionForwardParams params, cudaStream_t stream) {
  using Shape = ForwardShape<kHeadDim>;
  const int64_t num_blocks = QueryTile<Shape::kBlockM>::plan(params.problem);
  return launch<three_region_attention_forward_kernel<T, Shape>>(
      num_blocks, 1, Shape::kThreads, sizeof(typename Shape::SharedMemoryPlan), stream, params);
}

template <typename T>
cudaError_t launch_forward(const ThreeRegionForwardParams& params, cudaStream_t stream) {
  return with_head_dim(params.problem.head_dim, [&](auto head_dim) {
    return launch_forward<T, decltype(head_dim)::value>(params, stream);
  });
}

}  // namespace

cudaError_t three_region_attention_forward(const ThreeRegionForwardParams& params,
                                           cudaStream_t stream) {
  if (params.problem.batch == 0 || params.problem.q_len == 0) return cudaSuccess;
  if (is_decode(params.problem, params.kv_lens != nullptr)) {
    return three_region_attention_decode(params, stream);
  }
  return params.problem.dtype == DType::kFloat16 ? launch_forward<Half>(params, stream)
                                                 : launch_forward<BFloat16>(params, stream);
}

}  // namespace cogview::sm80
