// Three-region attention, backward: dk and dv. The math stands in backward.cuh.
//
// A far key (text or pivot) is seen by every later query, others by those of their window only:
// key j is seen by queries i with j <= i < last(j), last(j) = k_len for far keys, else
// first_far_query(j). From first_far_query(j) on, the logit of a far key carries its bias.
//
// Layout     as the forward; row_max, row_log_sum, delta (batch, num_heads, q_len).
// Grid       one block per tile of kBlockN keys, split and (batch, kv head). First the tiles whose
//            loops are long: the packed pivots, and the first kPartialKeys keys, which may be
//            text; `num_splits` blocks share the queries of each. Then the other keys in order.
// Warps      kWarps, each with 16 * kRowTiles keys, whose dk and dv stay in registers; the block
//            walks the queries that see its keys, head after head of the group, kBlockM rows at a
//            time, in steps of kStep. Scores are computed transposed (keys x queries), so that p^T
//            and ds^T are A fragments of the next products where they stand.
// Smem       k tile (later: dk) and v tile (dv)       4 kBlockN kHeadDim bytes
//            two stages of a q and a dout tile        8 kBlockM kHeadDim bytes
//            and of row_max, row_log_sum and delta    24 kBlockM bytes
//            in all: 33.5, 65.5, 48.8, 64.8 KB at head dim 32, 64, 96, 128; static: KeyTile
// Barriers   as the forward.
// Writers    a key's dk and dv by the one block that owns it: a pivot by the block of the packed
//            pivots, not by that of its neighbours. With several splits each writes float32 sums
//            to `partial`, which a last kernel adds in order. No atomics: deterministic.
// Rounding   float32 logits, p and sums; p and ds rounded to the element type (float16: scaled, see
//            backward.cuh and kBackwardShift) before p^T dout and ds^T q; dk and dv once.
// NaN        keys that end with a NaN of a query that does not see them are computed again (exact.cuh).
// Reference  gradient of cogview_kernels.reference.three_region_attention

#include <climits>

#include "backward.cuh"

namespace cogview {
namespace {

template <int kHeadDim_>
struct DkdvShape {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRowTiles = kHeadDim <= 64 ? 2 : 1;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
  static constexpr int kBlockN = 16 * kRowTiles * kWarps;
  static constexpr int kBlockM = kHeadDim <= 64 ? 64 : 32;
  static constexpr int kStep = 16;
  static constexpr int kStageBytes = 2 * kTileBytes<kHeadDim, kBlockM> + 3 * 4 * kBlockM;
  static constexpr int kMinBlocks =
      kHeadDim == 32 ? 3 : 2;  // to a multiprocessor, as far as registers go
  static constexpr int kSharedBytes = 2 * kTileBytes<kHeadDim, kBlockN> + 2 * kStageBytes;
  static_assert(kSharedBytes + kStaticSharedBytes <= kMaxSharedBytes);
};

// Who sees sixteen keys: from where on some and all of them are seen, and until where; from where
// on some and all carry a bias.
struct KeyView {
  int some_begin, all_begin;
  int all_end, some_end;
  int some_far, all_far;
};

// The keys of a block. Rows that hold no key of the block's own are never seen and never written.
template <int kBlockN>
struct KeyTile {
  int key[kBlockN];  // -1: none
  int end[kBlockN];  // behind the last query that sees the key
  int far[kBlockN];  // first query that sees it as a far key
  KeyView view[kBlockN / 16];
  int first_query, last_query;  // of all of them, as positions [first, last)
  int first_pivot;              // where they stand in `partial`: pivots from here on, or the key

  __device__ __forceinline__ int num_query_tiles(int block_m) const {
    return (max(last_query - first_query, 0) + block_m - 1) / block_m;
  }
};

template <typename T, typename Shape>
struct DkdvWarp {
  static constexpr int kRowTiles = Shape::kRowTiles, kHeadDim = Shape::kHeadDim;
  static constexpr int kStep = Shape::kStep;

  float dk[kRowTiles][kHeadDim / 8][4], dv[kRowTiles][kHeadDim / 8][4];

  // Queries at positions [query, query + kStep), rows `row`.. of their tiles. kMasked: some key is
  // not seen by some query, or biases differ.
  template <bool kMasked, typename Tile>
  __device__ __forceinline__ void step(const Tile& keys, int warp_row, const unsigned char* sK,
                                       const unsigned char* sV, const unsigned char* sQ,
                                       const unsigned char* sDout, const float* row_max,
                                       const float* row_log_sum, const float* delta, int row,
                                       int query, uint32_t live, float scale, float far_bias,
                                       float ds_scale) {
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;

    float p[kRowTiles][kStep / 8][4] = {}, ds[kRowTiles][kStep / 8][4] = {};
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      uint32_t q[kStep / 16][4], dout[kStep / 16][4];
#pragma unroll
      for (int n = 0; n < kStep / 16; ++n) {
        load_b_transposed<kHeadDim>(q[n], sQ, row + 16 * n, d);
        load_b_transposed<kHeadDim>(dout[n], sDout, row + 16 * n, d);
      }
#pragma unroll
      for (int rt = 0; rt < kRowTiles; ++rt) {
        if (kMasked && !(live >> rt & 1)) continue;
        uint32_t k[4], v[4];
        load_a<kHeadDim>(k, sK, warp_row + 16 * rt, d);
        load_a<kHeadDim>(v, sV, warp_row + 16 * rt, d);
#pragma unroll
        for (int n = 0; n < kStep / 16; ++n) {
          mma_m16n8k16<T>(p[rt][2 * n], k, q[n][0], q[n][1]);
          mma_m16n8k16<T>(p[rt][2 * n + 1], k, q[n][2], q[n][3]);
          mma_m16n8k16<T>(ds[rt][2 * n], v, dout[n][0], dout[n][1]);
          mma_m16n8k16<T>(ds[rt][2 * n + 1], v, dout[n][2], dout[n][3]);
        }
      }
    }

#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int at = row + 8 * n + 2 * t + column, i = query + 8 * n + 2 * t + column;
        const float max_here = row_max[at], delta_here = delta[at];
        const float log_sum_here = row_log_sum[at] - float(kBackwardShift<T>);
#pragma unroll
        for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int c = 2 * half + column;
            bool visible = true;
            float bias = far_bias;  // of a plain step: of all its keys
            if constexpr (kMasked) {
              const int key_row = warp_row + 16 * rt + 8 * half + g;
              visible = i >= keys.key[key_row] && i < keys.end[key_row];
              bias = i >= keys.far[key_row] ? far_bias : 0.f;
            }
            const float weight =
                ex2_approx(fmaf(p[rt][n][c], scale, bias) - max_here - log_sum_here);
            const float gradient = weight * ((ds[rt][n][c] - delta_here) * ds_scale);
            p[rt][n][c] = visible ? weight : 0.f;
            ds[rt][n][c] = visible ? gradient : 0.f;
          }
        }
      }
    }

#pragma unroll
    for (int n = 0; n < kStep / 16; ++n) {
      uint32_t a_p[kRowTiles][4], a_ds[kRowTiles][4];
#pragma unroll
      for (int rt = 0; rt < kRowTiles; ++rt) {
        convert_c_to_a<T>(a_p[rt], p[rt][2 * n], p[rt][2 * n + 1]);
        convert_c_to_a<T>(a_ds[rt], ds[rt][2 * n], ds[rt][2 * n + 1]);
      }
#pragma unroll
      for (int d = 0; d < kHeadDim / 16; ++d) {
        uint32_t q[4], dout[4];
        load_b<kHeadDim>(q, sQ, row + 16 * n, d);
        load_b<kHeadDim>(dout, sDout, row + 16 * n, d);
#pragma unroll
        for (int rt = 0; rt < kRowTiles; ++rt) {
          if (kMasked && !(live >> rt & 1)) continue;
          mma_m16n8k16<T>(dk[rt][2 * d], a_ds[rt], q[0], q[1]);
          mma_m16n8k16<T>(dk[rt][2 * d + 1], a_ds[rt], q[2], q[3]);
          mma_m16n8k16<T>(dv[rt][2 * d], a_p[rt], dout[0], dout[1]);
          mma_m16n8k16<T>(dv[rt][2 * d + 1], a_p[rt], dout[2], dout[3]);
        }
      }
    }
  }
};

// Tiles of pivots, of the first keys and of the others.
template <int kBlockN>
struct DkdvGrid {
  int num_pivot_tiles, num_first_tiles, num_other_tiles, num_splits;
  int64_t num_heads;  // batch * num_kv_heads

  __host__ __device__ explicit DkdvGrid(const ThreeRegionBackwardParams& params) {
    const ThreeRegionProblem& problem = params.problem;
    const int num_tiles = (problem.k_len + kBlockN - 1) / kBlockN;
    num_pivot_tiles = (problem.num_pivots + kBlockN - 1) / kBlockN;
    num_first_tiles = num_tiles < kPartialKeys / kBlockN ? num_tiles : kPartialKeys / kBlockN;
    num_other_tiles = num_tiles - num_first_tiles;
    num_splits = params.num_splits;
    num_heads = int64_t(problem.batch) * problem.num_kv_heads;
  }
  __host__ __device__ int num_long_items() const {
    return (num_pivot_tiles + num_first_tiles) * num_splits;
  }
  __host__ __device__ int64_t num_blocks() const {
    return num_heads * (int64_t(num_long_items()) + num_other_tiles);
  }
};

// Fill the block's key tile. `pivot_tile`: which kBlockN of the packed pivots, or -1; else the
// keys from first_key on.
template <int kBlockN>
__device__ __forceinline__ void find_keys(KeyTile<kBlockN>& tile, const ThreeRegionProblem& problem,
                                          const FarKeys& far, int pivot_tile, int first_key) {
  const int row = threadIdx.x;
  // Pivots among the keys from first_key on: they belong to the blocks of the packed pivots.
  const int first_pivot =
      pivot_tile >= 0 ? pivot_tile * kBlockN : count_below(far.pivots, far.num_pivots, first_key);
  if (row < kBlockN) {
    int key = first_key + row;
    if (pivot_tile >= 0) {
      key = first_pivot + row < far.num_pivots ? far.pivot(first_pivot + row) : -1;
    } else if (key >= problem.k_len) {
      key = -1;
    }
    tile.key[row] = key;
  }
  bar_sync();
  if (pivot_tile < 0 && row < kBlockN && first_pivot + row < far.num_pivots) {
    const int pivot = far.pivot(first_pivot + row) - first_key;
    if (pivot >= 0 && pivot < kBlockN && pivot + first_key >= far.text_len) tile.key[pivot] = -1;
  }
  bar_sync();
  if (row < kBlockN) {
    const int key = tile.key[row];
    const int first_far = key < 0 ? 0 : first_far_query(key, problem);
    const bool is_far = pivot_tile >= 0 || key < far.text_len;
    tile.far[row] = first_far;
    tile.end[row] = key < 0 ? 0 : is_far ? problem.k_len : first_far;
  }
  bar_sync();
  if (row < kBlockN / 16) {
    KeyView view = {INT_MAX, 0, INT_MAX, 0, INT_MAX, 0};
    for (int i = 16 * row; i < 16 * row + 16; ++i) {
      if (tile.key[i] < 0) continue;
      view.some_begin = min(view.some_begin, tile.key[i]);
      view.all_begin = max(view.all_begin, tile.key[i]);
      view.all_end = min(view.all_end, tile.end[i]);
      view.some_end = max(view.some_end, tile.end[i]);
      view.some_far = min(view.some_far, tile.far[i]);
      view.all_far = max(view.all_far, tile.far[i]);
    }
    tile.view[row] = view;
  }
  bar_sync();
  if (row == 0) {
    int begin = INT_MAX, end = 0;
    for (int i = 0; i < kBlockN / 16; ++i) {
      begin = min(begin, tile.view[i].some_begin);
      end = max(end, tile.view[i].some_end);
    }
    tile.first_query = max(begin, problem.k_len - problem.q_len);
    tile.last_query = end;
    tile.first_pivot = pivot_tile >= 0 ? first_pivot : -1;
  }
  bar_sync();
}

// dk and dv of the key in a row of the block's tile once more (exact.cuh), from the block's tiles of
// queries [begin, end); to `partial_*` where the block is one of several. Left alone where a query
// that sees the key has a NaN of its own.
template <typename T, typename Shape>
__device__ __noinline__ void dkdv_row(const ThreeRegionBackwardParams& params,
                                      const KeyTile<Shape::kBlockN>& keys, int row, int batch,
                                      int kv_head, float far_bias, int begin, int end,
                                      float* partial_dk, float* partial_dv) {
  constexpr int kHeadDim = Shape::kHeadDim, kPerLane = kHeadDim / kWarpSize;
  const ThreeRegionProblem& problem = params.problem;
  const int lane = threadIdx.x % kWarpSize, first = problem.k_len - problem.q_len;
  const int key = keys.key[row], num_query_tiles = keys.num_query_tiles(Shape::kBlockM);
  const T* k = row_of_head<T>(params.k, batch, kv_head, key);
  const T* v = row_of_head<T>(params.v, batch, kv_head, key);
  // f(head, its first row in the statistics, begin, end) for the queries of a tile that see the key.
  const auto for_tile = [&](int tile, auto f) {
    const int group = problem.num_heads / problem.num_kv_heads;
    const int head = kv_head * group + tile / num_query_tiles;
    const int from = keys.first_query + tile % num_query_tiles * Shape::kBlockM;
    f(head, (int64_t(batch) * problem.num_heads + head) * problem.q_len - first, max(from, key),
      min(from + Shape::kBlockM, keys.end[row]));
  };
  bool finite = true;
  for (int tile = begin; tile < end; ++tile) {
    for_tile(tile, [&](int, int64_t statistics, int from, int to) {
      for (int i = from + lane; i < to; i += kWarpSize) {
        const int64_t at = statistics + i;
        const float sum = params.row_max[at] + params.row_log_sum[at] + params.delta[at];
        finite = finite && fabsf(sum) <= kLargestFloat;
      }
    });
  }
  if (vote_ballot(!finite) != 0) return;

  float dk[kPerLane] = {}, dv[kPerLane] = {};
  for (int tile = begin; tile < end; ++tile) {
    for_tile(tile, [&](int head, int64_t statistics, int from, int to) {
      for (int i = from; i < to; ++i) {
        const int64_t at = statistics + i;
        const float row_max = params.row_max[at], row_log_sum = params.row_log_sum[at];
        const float delta = params.delta[at];
        const T* q = row_of_head<T>(params.q, batch, head, i - first);
        const T* dout = row_of_head<T>(params.dout, batch, head, i - first);
        const float s = exact_logit<T, kHeadDim>(q, k, problem.softmax_scale * kLog2e,
                                                 i >= keys.far[row] ? far_bias : 0.f);
        const float p = exp2f(s - row_max - row_log_sum);
        const float ds = p * (exact_dot<T, kHeadDim>(dout, v) - delta);
#pragma unroll
        for (int d = 0; d < kPerLane; ++d) {
          dk[d] += ds * to_float(q[lane + d * kWarpSize]);
          dv[d] += p * to_float(dout[lane + d * kWarpSize]);
        }
      }
    });
  }
  T* to_dk = reinterpret_cast<T*>(head_of(params.dk, batch, kv_head) + key * params.dk.stride.row);
  T* to_dv = reinterpret_cast<T*>(head_of(params.dv, batch, kv_head) + key * params.dv.stride.row);
#pragma unroll
  for (int d = 0; d < kPerLane; ++d) {
    const int column = lane + d * kWarpSize;
    dk[d] *= problem.softmax_scale;
    if (partial_dk != nullptr) {
      partial_dk[column] = dk[d];
      partial_dv[column] = dv[d];
    } else {
      to_dk[column] = from_float<T>(dk[d]);
      to_dv[column] = from_float<T>(dv[d]);
    }
  }
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kMinBlocks)
    three_region_attention_backward_dkdv_kernel(
        const __grid_constant__ ThreeRegionBackwardParams params) {
  constexpr int kHeadDim = Shape::kHeadDim, kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN;
  constexpr int kThreads = Shape::kThreads, kRowTiles = Shape::kRowTiles, kStep = Shape::kStep;
  constexpr int kTile = kTileBytes<kHeadDim, kBlockM>;
  const ThreeRegionProblem& problem = params.problem;
  unsigned char* sK = dynamic_shared();
  unsigned char* sV = sK + kTileBytes<kHeadDim, kBlockN>;
  unsigned char* stages = sV + kTileBytes<kHeadDim, kBlockN>;

  // Which keys, which split, which head.
  const DkdvGrid<kBlockN> grid(params);
  int64_t block = blockIdx.x;
  const int64_t num_long_blocks = grid.num_heads * grid.num_long_items();
  int pivot_tile = -1, first_key = 0, split = 0, num_splits = 1;
  int64_t head_idx;
  if (block < num_long_blocks) {
    head_idx = block / grid.num_long_items();
    int item = int(block % grid.num_long_items());
    num_splits = grid.num_splits;
    split = item % num_splits;
    item /= num_splits;
    if (item < grid.num_pivot_tiles) {
      pivot_tile = item;
    } else {
      first_key = (item - grid.num_pivot_tiles) * kBlockN;
    }
  } else {
    block -= num_long_blocks;
    head_idx = block / grid.num_other_tiles;
    first_key = (grid.num_first_tiles + int(block % grid.num_other_tiles)) * kBlockN;
  }
  const int batch = int(head_idx / problem.num_kv_heads);
  const int kv_head = int(head_idx % problem.num_kv_heads);
  const FarKeys far = far_keys_of(problem, batch);
  if (pivot_tile >= 0 && pivot_tile * kBlockN >= far.num_pivots) return;  // the whole block

  KeyTile<kBlockN>& keys = *shared_array<KeyTile<kBlockN>, 1>();
  find_keys(keys, problem, far, pivot_tile, first_key);
  const auto key_of = [&](int row) { return keys.key[row]; };
  copy_rows<kHeadDim, kBlockN, kThreads>(sK, head_of(params.k, batch, kv_head), params.k.stride.row,
                                         key_of);
  copy_rows<kHeadDim, kBlockN, kThreads>(sV, head_of(params.v, batch, kv_head), params.v.stride.row,
                                         key_of);

  // Tiles of queries, head after head of the group; this block's are [begin, end).
  const int group = problem.num_heads / problem.num_kv_heads;
  const int first = problem.k_len - problem.q_len;
  const int num_query_tiles = keys.num_query_tiles(kBlockM);
  const int64_t num_tiles = int64_t(group) * num_query_tiles;
  const int begin = int(num_tiles * split / num_splits);
  const int end = int(num_tiles * (split + 1) / num_splits);

  const auto query_of = [&](int tile) {
    return keys.first_query + tile % num_query_tiles * kBlockM;
  };
  const auto copy_queries = [&](int tile, int stage) {
    const int head = kv_head * group + tile / num_query_tiles;
    const int query = query_of(tile);
    unsigned char* sQ = stages + stage * Shape::kStageBytes;
    const auto row_of = [&](int row) {
      return query + row < keys.last_query ? query + row - first : -1;
    };
    copy_rows<kHeadDim, kBlockM, kThreads>(sQ, head_of(params.q, batch, head), params.q.stride.row,
                                           row_of);
    copy_rows<kHeadDim, kBlockM, kThreads>(sQ + kTile, head_of(params.dout, batch, head),
                                           params.dout.stride.row, row_of);
    const int64_t at = (int64_t(batch) * problem.num_heads + head) * problem.q_len;
    for (int i = threadIdx.x; i < 3 * kBlockM; i += kThreads) {
      const int row = row_of(i % kBlockM);
      const float* from = i < kBlockM       ? params.row_max
                          : i < 2 * kBlockM ? params.row_log_sum
                                            : params.delta;
      cp_async_4(sQ + 2 * kTile + 4 * i, from + at + max(row, 0), row >= 0);
    }
    cp_async_commit_group();
  };
  if (begin < end) copy_queries(begin, 0);

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warp_row = warp * 16 * kRowTiles;
  const float scale = problem.softmax_scale * kLog2e;
  const float far_bias = (pivot_tile >= 0 ? problem.pivot_bias : problem.text_bias) * kLog2e;
  int exponent = 0;  // one for all heads of the group: their sums meet in dk
  for (int i = 0; i < group; ++i) {
    const int of_head = ds_exponent<T>(params, batch, kv_head * group + i);
    exponent = i == 0 ? of_head : min(exponent, of_head);
  }
  const float ds_scale = exp2f(float(exponent - kBackwardShift<T>));

  DkdvWarp<T, Shape> state;
#pragma unroll
  for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) state.dk[rt][n][c] = state.dv[rt][n][c] = 0.f;
    }
  }

  int stage = 0;
  for (int tile = begin; tile < end; ++tile) {
    cp_async_wait_group<0>();
    bar_sync();
    const unsigned char* sQ = stages + stage * Shape::kStageBytes;
    const float* row_max = reinterpret_cast<const float*>(sQ + 2 * kTile);
    stage ^= 1;
    if (tile + 1 < end) copy_queries(tile + 1, stage);
#pragma unroll 1
    for (int row = 0; row < kBlockM; row += kStep) {
      const int query = query_of(tile) + row;
      uint32_t live = 0;  // groups of sixteen keys that some query sees
      bool plain = true;
      float bias = 0.f;
#pragma unroll
      for (int rt = 0; rt < kRowTiles; ++rt) {
        const KeyView& view = keys.view[warp_row / 16 + rt];
        if (query + kStep > view.some_begin && query < view.some_end) live |= 1u << rt;
        plain = plain && query >= view.all_begin && query + kStep <= view.all_end;
        const bool all_far = query >= view.all_far, none_far = query + kStep <= view.some_far;
        if (far_bias != 0.f) {
          plain = plain && (all_far || none_far) && (rt == 0 || bias == (all_far ? far_bias : 0.f));
          bias = all_far ? far_bias : 0.f;
        }
      }
      if (live == 0) continue;
      if (plain) {
        state.template step<false>(keys, warp_row, sK, sV, sQ, sQ + kTile, row_max,
                                   row_max + kBlockM, row_max + 2 * kBlockM, row, query, live,
                                   scale, bias, ds_scale);
      } else {
        state.template step<true>(keys, warp_row, sK, sV, sQ, sQ + kTile, row_max,
                                  row_max + kBlockM, row_max + 2 * kBlockM, row, query, live, scale,
                                  far_bias, ds_scale);
      }
    }
  }

  // Where there was no query, k and v are still under way.
  cp_async_commit_group();
  cp_async_wait_group<0>();
  bar_sync();
  const float dk_factor = problem.softmax_scale * exp2f(float(-exponent));
  const float dv_factor = exp2f(float(-kBackwardShift<T>));
  // (num_splits, 2, batch, num_kv_heads, rows, head_dim)
  const int64_t partial_stride = int64_t(partial_rows(problem)) * kHeadDim;
  const int64_t partial_begin = (2 * split * grid.num_heads + head_idx) * partial_stride;
  float* partial_dk = num_splits > 1 ? params.partial + partial_begin : nullptr;
  float* partial_dv = num_splits > 1 ? partial_dk + grid.num_heads * partial_stride : nullptr;
  const auto partial_row = [&](int row) {
    return keys.first_pivot >= 0 ? keys.first_pivot + row
                                 : partial_pivot_rows(problem) + keys.key[row];
  };
  bool has_nan[kRowTiles][2];
#pragma unroll
  for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * rt + 8 * half + lane / 4;
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          float& dk = state.dk[rt][n][2 * half + column];
          float& dv = state.dv[rt][n][2 * half + column];
          dk *= dk_factor;
          dv *= dv_factor;
          sum += 0.f * (dk + dv);
          if (num_splits > 1 && keys.key[row] >= 0) {
            const int64_t at = int64_t(partial_row(row)) * kHeadDim + 8 * n + lane % 4 * 2 + column;
            partial_dk[at] = dk;
            partial_dv[at] = dv;
          }
        }
      }
      has_nan[rt][half] = keys.key[row] >= 0 && sum != 0.f;
    }
  }
  uint16_t* gDk = head_of(params.dk, batch, kv_head);
  uint16_t* gDv = head_of(params.dv, batch, kv_head);
  if (num_splits == 1) {
    store_rows<T, kHeadDim, kRowTiles>(sK, warp_row, state.dk, gDk, params.dk.stride.row, key_of);
    store_rows<T, kHeadDim, kRowTiles>(sV, warp_row, state.dv, gDv, params.dv.stride.row, key_of);
  }
  bar_warp_sync();
  for_rows_with_nan(has_nan, [&](int warp_key) {
    const int row = warp_row + warp_key;
    const int64_t at = num_splits > 1 ? int64_t(partial_row(row)) * kHeadDim : 0;
    dkdv_row<T, Shape>(params, keys, row, batch, kv_head, far_bias, begin, end,
                       num_splits > 1 ? partial_dk + at : nullptr,
                       num_splits > 1 ? partial_dv + at : nullptr);
  });
}

template <typename T, int kHeadDim>
cudaError_t launch_dkdv(const ThreeRegionBackwardParams& params, cudaStream_t stream) {
  using Shape = DkdvShape<kHeadDim>;
  const DkdvGrid<Shape::kBlockN> grid(params);
  return launch<three_region_attention_backward_dkdv_kernel<T, Shape>>(
      grid.num_blocks(), 1, Shape::kThreads, Shape::kSharedBytes, stream, params);
}

template <typename T>
cudaError_t launch_dkdv(const ThreeRegionBackwardParams& params, cudaStream_t stream) {
  return with_head_dim(params.problem.head_dim, [&](auto head_dim) {
    return launch_dkdv<T, decltype(head_dim)::value>(params, stream);
  });
}

}  // namespace

cudaError_t three_region_attention_backward_dkdv(const ThreeRegionBackwardParams& params,
                                                 cudaStream_t stream) {
  return params.problem.dtype == DType::kFloat16 ? launch_dkdv<Half>(params, stream)
                                                 : launch_dkdv<BFloat16>(params, stream);
}

}  // namespace cogview
