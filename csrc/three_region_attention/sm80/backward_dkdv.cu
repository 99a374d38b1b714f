// Three-region attention, backward: dk and dv. The math stands in backward.cuh.
//
// Every later query sees a far key (text or pivot); only the queries of its window see another one.
// Queries i with j <= i < last(j) see key j: last(j) is k_len for far keys, else
// first_far_query(j). From first_far_query(j) on, the logit of a far key carries its bias.
//
// Phases     1. work_of: which tile of keys, which split of the queries, which head.
//            2. Find the keys of the tile and who sees them; copy the k and v tiles.
//            3. For each tile of queries that see them, head after head of the group: wait for q,
//               dout and the statistics, start the copy of the next tile, then in steps of kStep
//               queries: p, ds, dv += p^T dout, dk += ds^T q.
//            4. Scale dk and dv; write them through the k and v tiles, or as float32 to `partial`.
//            5. Compute keys again that have a NaN of a query that does not see them (exact.cuh).
// Layout     as the forward; row_max, row_log_sum, delta (batch, num_heads, q_len).
// Grid       one block per tile of kBlockN keys, split and (batch, kv head). The tiles with long
//            loops come first: the packed pivots, and the first kPartialKeys keys, which may be
//            text; `num_splits` blocks share the queries of each. The other keys follow in order.
// Warps      kWarps; each owns 16 * kRowTiles keys, whose dk and dv stay in registers. Scores are
//            computed transposed (keys x queries), so that p^T and ds^T are A fragments of the next
//            products without a shuffle.
// Smem       head_dim                         32     64     96    128
//            k                              8192  16384  12288  16384
//            v                              8192  16384  12288  16384
//            stages: 2 x (q, dout)         16384  32768  24576  32768
//                    2 x statistics         1536   1536    768    768
//            total, dynamic                34304  67072  49920  66304
//            static: KeyTile
// Barriers   bar_sync in find_keys           the keys of the tile; those that are no pivots; who
//                                            sees them; the views; the range of queries
//            bar_sync in QueryStages::wait   the tile has arrived for all threads, and all warps
//                                            have left the stage that is filled next
//            bar_sync before the epilogue    k and v have arrived, and all warps have left them
// Writers    the block that owns a key writes its dk and dv: for a pivot the block of the packed
//            pivots, not that of its neighbours. With several splits each writes float32 sums to
//            `partial`, and the partial kernel adds them in order. No atomics: deterministic.
// Rounding   float32 logits, p and sums; p and ds rounded to the element type (float16: scaled, see
//            backward.cuh and kBackwardShift) before p^T dout and ds^T q; dk and dv once.
// Reference  gradient of cogview_kernels.attention.reference.three_region_attention

#include <climits>

#include "backward.cuh"

namespace cogview::sm80 {
namespace {

// A tile of queries in shared memory, with their gradients and their statistics.
template <int kHeadDim, int kBlockM>
struct QueryStage {
  unsigned char q[kTileBytes<kHeadDim, kBlockM>];
  unsigned char dout[kTileBytes<kHeadDim, kBlockM>];
  float statistics[3 * kBlockM];  // row_max, then row_log_sum, then delta
};

template <int kHeadDim_>
struct DkdvShape {
  static constexpr int kHeadDim = kHeadDim_;
  // Two row tiles halve a warp's reads of q and dout; beyond 64 they do not fit the registers.
  static constexpr int kRowTiles = kHeadDim <= 64 ? 2 : 1;
  // One warp for each quarter of a multiprocessor.
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
  static constexpr int kBlockN = 16 * kRowTiles * kWarps;
  // Two stages of 64 queries beside k and v would not fit kMaxSharedBytes at 128.
  static constexpr int kBlockM = kHeadDim <= 64 ? 64 : 32;
  static constexpr int kStep = 16;  // p and ds of more queries do not fit the registers
  // Blocks on a multiprocessor: 255 registers a thread leave room for two, 168 for three.
  static constexpr int kMinBlocks = kHeadDim == 32 ? 3 : 2;
  struct SharedMemoryPlan {
    unsigned char k[kTileBytes<kHeadDim, kBlockN>];  // later the rows of dk
    unsigned char v[kTileBytes<kHeadDim, kBlockN>];  // later the rows of dv
    QueryStage<kHeadDim, kBlockM> stages[2];
  };
};

// Who sees sixteen keys. Queries in [some_begin, some_end) may see some of them, those in
// [all_begin, all_end) see all. From some_far on some, from all_far on all are seen as far keys.
struct KeyView {
  int some_begin, all_begin;
  int all_end, some_end;
  int some_far, all_far;
};

// The keys of a block. No query sees a row without a key, and nobody writes it.
template <int kBlockN>
struct KeyTile {
  int key[kBlockN];  // -1: none
  int end[kBlockN];  // behind the last query that sees the key
  int far[kBlockN];  // first query that sees it as a far key
  KeyView view[kBlockN / 16];
  int first_query, last_query;  // positions [first, last) that see any of them
  int first_pivot;              // the first of the packed pivots; -1: the keys are neighbours

  __device__ __forceinline__ int num_query_tiles(int block_m) const {
    return (max(last_query - first_query, 0) + block_m - 1) / block_m;
  }
};

template <typename T, typename Shape>
struct DkdvWarp {
  static constexpr int kRowTiles = Shape::kRowTiles, kHeadDim = Shape::kHeadDim;
  static constexpr int kBlockM = Shape::kBlockM, kStep = Shape::kStep;

  const KeyTile<Shape::kBlockN>& keys;
  const unsigned char *sK, *sV;
  int warp_row;    // the warp's first row in the tile of keys
  float scale;     // from a product to a logit in bits
  float ds_scale;  // of ds before it is rounded
  float dk[kRowTiles][kHeadDim / 8][4], dv[kRowTiles][kHeadDim / 8][4];

  __device__ __forceinline__ void initialize() {
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) dk[rt][n][c] = dv[rt][n][c] = 0.f;
      }
    }
  }

  // Takes up the queries at positions [query, query + kStep), rows `row`.. of the tile of queries.
  // kMasked: some key is not seen by some query, or biases differ. live: groups of sixteen keys
  // that some query sees. far_bias: of far keys; of all keys where not kMasked.
  template <bool kMasked>
  __device__ __forceinline__ void step(const QueryStage<kHeadDim, kBlockM>& queries, int row,
                                       int query, uint32_t live, float far_bias) {
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
    const float* row_max = queries.statistics;
    const float* row_log_sum = row_max + kBlockM;
    const float* delta = row_max + 2 * kBlockM;

    float p[kRowTiles][kStep / 8][4] = {}, ds[kRowTiles][kStep / 8][4] = {};
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      uint32_t q[kStep / 16][4], dout[kStep / 16][4];
#pragma unroll
      for (int n = 0; n < kStep / 16; ++n) {
        load_b_transposed<kHeadDim>(q[n], queries.q, row + 16 * n, d);
        load_b_transposed<kHeadDim>(dout[n], queries.dout, row + 16 * n, d);
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
        load_b<kHeadDim>(q, queries.q, row + 16 * n, d);
        load_b<kHeadDim>(dout, queries.dout, row + 16 * n, d);
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

// What one block does: which tile of keys, and which share of the queries that see it.
struct DkdvWork {
  int pivot_tile;  // which kBlockN of the packed pivots; -1: the keys from first_key on
  int first_key;
  int split, num_splits;
  int64_t head_idx;  // batch * num_kv_heads + kv_head
  int batch, kv_head;
};

// Tiles of pivots, of the first keys and of the others.
template <int kBlockN>
struct DkdvGrid {
  int num_pivot_tiles, num_first_tiles, num_other_tiles, num_splits;
  int num_kv_heads;
  int64_t num_heads;  // batch * num_kv_heads

  __host__ __device__ explicit DkdvGrid(const ThreeRegionBackwardParams& params) {
    const ThreeRegionProblem& problem = params.problem;
    const int num_tiles = (problem.k_len + kBlockN - 1) / kBlockN;
    num_pivot_tiles = (problem.num_pivots + kBlockN - 1) / kBlockN;
    num_first_tiles = num_tiles < kPartialKeys / kBlockN ? num_tiles : kPartialKeys / kBlockN;
    num_other_tiles = num_tiles - num_first_tiles;
    num_splits = params.num_splits;
    num_kv_heads = problem.num_kv_heads;
    num_heads = int64_t(problem.batch) * problem.num_kv_heads;
  }
  __host__ __device__ int num_long_items() const {
    return (num_pivot_tiles + num_first_tiles) * num_splits;
  }
  __host__ __device__ int64_t num_blocks() const {
    return num_heads * (int64_t(num_long_items()) + num_other_tiles);
  }

  __device__ __forceinline__ DkdvWork work_of(int64_t block) const {
    DkdvWork work = {};
    work.pivot_tile = -1;
    work.num_splits = 1;
    const int64_t num_long_blocks = num_heads * num_long_items();
    if (block < num_long_blocks) {
      work.head_idx = block / num_long_items();
      int item = int(block % num_long_items());
      work.num_splits = num_splits;
      work.split = item % num_splits;
      item /= num_splits;
      if (item < num_pivot_tiles) {
        work.pivot_tile = item;
      } else {
        work.first_key = (item - num_pivot_tiles) * kBlockN;
      }
    } else {
      block -= num_long_blocks;
      work.head_idx = block / num_other_tiles;
      work.first_key = (num_first_tiles + int(block % num_other_tiles)) * kBlockN;
    }
    work.batch = int(work.head_idx / num_kv_heads);
    work.kv_head = int(work.head_idx % num_kv_heads);
    return work;
  }
};

// Fills the block's key tile. `pivot_tile`: which kBlockN of the packed pivots; -1: the keys from
// first_key on.
template <int kBlockN>
__device__ __forceinline__ void find_keys(KeyTile<kBlockN>& tile, const ThreeRegionProblem& problem,
                                          const FarKeys& far, int pivot_tile, int first_key) {
  const int row = threadIdx.x;
  // The pivots among the keys from first_key on belong to the blocks of the packed pivots.
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

// Computes dk and dv of the key in a row of the block's tile again (exact.cuh), from the block's
// tiles of queries [begin, end); writes to `partial_*` where the block is one of several. Leaves
// them alone where a query that sees the key has a NaN of its own.
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
  // f(head, where its statistics begin, begin, end) for the queries of a tile that see the key.
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

// The tiles of queries that see a block's keys, head after head of the group, in two stages.
template <typename Shape>
struct QueryStages {
  static constexpr int kHeadDim = Shape::kHeadDim, kBlockM = Shape::kBlockM;
  static constexpr int kThreads = Shape::kThreads;
  using Stage = QueryStage<kHeadDim, kBlockM>;

  const KeyTile<Shape::kBlockN>& keys;
  unsigned char* stages;
  int batch, first_head, num_query_tiles;
  int stage = 0;  // of the next tile

  __device__ __forceinline__ QueryStages(const KeyTile<Shape::kBlockN>& key_tile,
                                         Stage (&shared)[2], int batch_idx, int first_head_idx)
      : keys(key_tile),
        stages(shared[0].q),
        batch(batch_idx),
        first_head(first_head_idx),
        num_query_tiles(key_tile.num_query_tiles(kBlockM)) {}

  // Position of a tile's first query.
  __device__ __forceinline__ int query_of(int tile) const {
    return keys.first_query + tile % num_query_tiles * kBlockM;
  }

  __device__ __forceinline__ void copy(const ThreeRegionBackwardParams& params, int tile,
                                       int to_stage) {
    const ThreeRegionProblem& problem = params.problem;
    const int head = first_head + tile / num_query_tiles;
    const int query = query_of(tile), first = problem.k_len - problem.q_len;
    unsigned char* sQ = stages + to_stage * int(sizeof(Stage));
    Stage& to = *reinterpret_cast<Stage*>(sQ);
    const auto row_of = [&](int row) {
      return query + row < keys.last_query ? query + row - first : -1;
    };
    copy_rows<kHeadDim, kBlockM, kThreads>(to.q, head_of(params.q, batch, head),
                                           params.q.stride.row, row_of);
    copy_rows<kHeadDim, kBlockM, kThreads>(to.dout, head_of(params.dout, batch, head),
                                           params.dout.stride.row, row_of);
    const int64_t at = (int64_t(batch) * problem.num_heads + head) * problem.q_len;
    for (int i = threadIdx.x; i < 3 * kBlockM; i += kThreads) {
      const int row = row_of(i % kBlockM);
      const float* from = i < kBlockM       ? params.row_max
                          : i < 2 * kBlockM ? params.row_log_sum
                                            : params.delta;
      cp_async_4(to.statistics + i, from + at + max(row, 0), row >= 0);
    }
    cp_async_commit_group();
  }

  // The next tile; `next` is copied meanwhile, where it is below `end`.
  __device__ __forceinline__ const Stage& wait(const ThreeRegionBackwardParams& params, int next,
                                               int end) {
    cp_async_wait_group<0>();
    bar_sync();
    const unsigned char* tile = stages + stage * int(sizeof(Stage));
    stage ^= 1;
    if (next < end) copy(params, next, stage);
    return *reinterpret_cast<const Stage*>(tile);
  }
};

// Stores the block's dk and dv, and computes keys with a NaN again. [begin, end): its query tiles.
template <typename T, typename Shape>
__device__ __forceinline__ void epilogue(const ThreeRegionBackwardParams& params,
                                         DkdvWarp<T, Shape>& state, unsigned char* sK,
                                         unsigned char* sV, const DkdvWork& work, int64_t num_heads,
                                         int exponent, float far_bias, int begin, int end) {
  constexpr int kHeadDim = Shape::kHeadDim, kRowTiles = Shape::kRowTiles;
  const ThreeRegionProblem& problem = params.problem;
  const auto& keys = state.keys;
  const int batch = work.batch, kv_head = work.kv_head;
  const int num_splits = work.num_splits, warp_row = state.warp_row;
  const int lane = threadIdx.x % kWarpSize;
  const float dk_factor = problem.softmax_scale * exp2f(float(-exponent));
  const float dv_factor = exp2f(float(-kBackwardShift<T>));
  // (num_splits, 2, batch, num_kv_heads, rows, head_dim)
  const int64_t partial_stride = int64_t(partial_rows(problem)) * kHeadDim;
  const int64_t partial_begin = (2 * work.split * num_heads + work.head_idx) * partial_stride;
  float* partial_dk = num_splits > 1 ? params.partial + partial_begin : nullptr;
  float* partial_dv = num_splits > 1 ? partial_dk + num_heads * partial_stride : nullptr;
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
  const auto key_of = [&](int row) { return keys.key[row]; };
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

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kMinBlocks)
    three_region_attention_backward_dkdv_kernel(
        const __grid_constant__ ThreeRegionBackwardParams params) {
  constexpr int kHeadDim = Shape::kHeadDim, kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN;
  constexpr int kThreads = Shape::kThreads, kRowTiles = Shape::kRowTiles, kStep = Shape::kStep;
  const ThreeRegionProblem& problem = params.problem;
  auto& shared = shared_memory<typename Shape::SharedMemoryPlan>();

  const DkdvGrid<kBlockN> grid(params);
  const DkdvWork work = grid.work_of(blockIdx.x);
  const int batch = work.batch, kv_head = work.kv_head;
  const FarKeys far = far_keys_of(problem, batch, kv_head);
  if (work.pivot_tile >= 0 && work.pivot_tile * kBlockN >= far.num_pivots) return;  // all threads

  KeyTile<kBlockN>& keys = *shared_array<KeyTile<kBlockN>, 1>();
  find_keys(keys, problem, far, work.pivot_tile, work.first_key);
  const auto key_of = [&](int row) { return keys.key[row]; };
  copy_rows<kHeadDim, kBlockN, kThreads>(shared.k, head_of(params.k, batch, kv_head),
                                         params.k.stride.row, key_of);
  copy_rows<kHeadDim, kBlockN, kThreads>(shared.v, head_of(params.v, batch, kv_head),
                                         params.v.stride.row, key_of);

  // This block's tiles of queries are [begin, end).
  const int group = problem.num_heads / problem.num_kv_heads;
  QueryStages<Shape> stages(keys, shared.stages, batch, kv_head * group);
  const int64_t num_tiles = int64_t(group) * stages.num_query_tiles;
  const int begin = int(num_tiles * work.split / work.num_splits);
  const int end = int(num_tiles * (work.split + 1) / work.num_splits);
  if (begin < end) stages.copy(params, begin, 0);

  const int warp_row = int(threadIdx.x) / kWarpSize * 16 * kRowTiles;
  const float scale = problem.softmax_scale * kLog2e;
  const float far_bias = (work.pivot_tile >= 0 ? problem.pivot_bias : problem.text_bias) * kLog2e;
  int exponent = 0;  // one for all heads of the group: their sums meet in dk
  for (int i = 0; i < group; ++i) {
    const int of_head = ds_exponent<T>(params, batch, kv_head * group + i);
    exponent = i == 0 ? of_head : min(exponent, of_head);
  }
  const float ds_scale = exp2f(float(exponent - kBackwardShift<T>));

  DkdvWarp<T, Shape> state{keys, shared.k, shared.v, warp_row, scale, ds_scale};
  state.initialize();

  for (int tile = begin; tile < end; ++tile) {
    const auto& stage = stages.wait(params, tile + 1, end);
#pragma unroll 1
    for (int row = 0; row < kBlockM; row += kStep) {
      const int query = stages.query_of(tile) + row;
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
        state.template step<false>(stage, row, query, live, bias);
      } else {
        state.template step<true>(stage, row, query, live, far_bias);
      }
    }
  }

  // Where there was no query, k and v are still under way.
  cp_async_commit_group();
  cp_async_wait_group<0>();
  bar_sync();
  epilogue(params, state, shared.k, shared.v, work, grid.num_heads, exponent, far_bias, begin, end);
}

template <typename T, int kHeadDim>
cudaError_t launch_dkdv(const ThreeRegionBackwardParams& params, cudaStream_t stream) {
  using Shape = DkdvShape<kHeadDim>;
  const DkdvGrid<Shape::kBlockN> grid(params);
  return launch<three_region_attention_backward_dkdv_kernel<T, Shape>>(
      grid.num_blocks(), 1, Shape::kThreads, sizeof(typename Shape::SharedMemoryPlan), stream,
      params);
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

}  // namespace cogview::sm80
