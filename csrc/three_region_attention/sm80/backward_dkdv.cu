// Three-region attention, backward: dk and dv. The math stands in backward.cuh.
//
// Every later query sees a far key (text or pivot); only the queries of its window see another one.
// Queries i with j <= i < end(j) see key j: end(j) is k_len for far keys, else first_far_query(j).
// From first_far_query(j) on, the logit of a far key carries its bias.
//
// Phases     1. work_of: which tile of keys, which split of the queries, which head.
//            2. Find the queries that see the tile and start to copy the first ones. Each warp finds
//               its keys and who sees them, and copies their rows of k and v.
//            3. For each tile of queries, head after head of the group: wait for q, dout and the
//               statistics, start the copy of the next tile, then per warp in steps of kStep queries:
//               p, dout v^T, dv += p^T dout, ds, dk += ds^T q. The scalar work of one sum can run
//               beside the products of the next one.
//            4. Scale dk and dv; write them through the k and v tiles, or as float32 to `partial`.
//            5. Compute keys again that have a NaN of a query that does not see them (exact.cuh).
// Layout     as the forward; row_max, row_log_sum, delta (batch, num_heads, q_len).
// Grid       one block per tile of kBlockN keys, split and (batch, kv head). The tiles of the FarList
//            come first, since their loops are long; `num_splits` blocks share the queries of each.
//            Tiles of neighbouring keys follow, which leave out the keys of that list. Which tiles
//            hold keys is known on the device alone: some blocks end at once.
// Warps      kWarps; each owns 16 * kRowTiles keys, whose dk and dv stay in registers. Scores are
//            computed transposed (keys x queries), so that p^T and ds^T are A fragments of the next
//            products without a shuffle. A step with queries that see none of the warp's keys is
//            skipped; one whose queries see the first row tile alone leaves out the others.
// Smem       head_dim                         32     64     96    128
//            k                              8192  16384  12288  16384
//            v                              8192  16384  12288  16384
//            stages: 2 x (q, dout)         16384  32768  24576  32768
//                    2 x statistics         1536   1536    768    768
//            total, dynamic                34304  67072  49920  66304
//            static: contexts of warps      2688   2688   1536   1536
// Barriers   bar_sync in QueryTiles::for_each   the tile has arrived for all threads, and all warps
//                                               have left the stage that is filled next
//            bar_warp_sync                      a warp's context, and its rows of k, v, dk and dv:
//                                               no other warp touches these
// Writers    the block that owns a key writes its dk and dv. With several splits each writes float32
//            sums to `partial`, and the partial kernel adds them in order. No atomics: deterministic.
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
  float maxima_and_sums[kBlockM / 2][4];  // of two queries: both row_max, then both row_log_sum
  float delta[kBlockM];
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
  // Whether the fragments of k and v stay in registers. Up to 64 it takes less time to read them
  // again, for more queries at once.
  static constexpr bool kKeepsKeys = kHeadDim > 64;
  static constexpr int kStep = kHeadDim == 64 ? 32 : 16;  // queries; what the registers allow
  // Blocks on a multiprocessor: 255 registers a thread leave room for two, 168 for three.
  static constexpr int kMinBlocks = kHeadDim == 32 ? 3 : 2;
  struct SharedMemoryPlan {
    unsigned char k[kTileBytes<kHeadDim, kBlockN>];  // later the rows of dk
    unsigned char v[kTileBytes<kHeadDim, kBlockN>];  // later the rows of dv
    QueryStage<kHeadDim, kBlockM> stages[2];
  };
};

// The key of a row: the queries [key, end) see it. No query sees a row without a key, and nobody
// writes it.
struct alignas(16) KeyRow {
  int key;     // -1: none
  int end;     // 0: none
  int far;     // first query that sees it with a bias; INT_MAX: none does
  float bias;  // in bits
};

// The keys of a warp, and who sees them.
template <int kRowTiles>
struct alignas(16) WarpKeys {
  KeyRow rows[16 * kRowTiles];
  // Queries [some_begin, some_end) see some key of a row tile, [all_begin, all_end) all keys.
  int some_begin[kRowTiles], some_end[kRowTiles];
  int all_begin, all_end;
  // From some_far on some keys have a bias, from all_far on all have `bias`.
  int some_far, all_far;
  float bias;
};

// What one block does: which tile of keys, and which share of the queries that see it.
struct DkdvWork {
  bool is_far;  // the rows are entries of the FarList, else neighbouring keys
  int first;    // entry or key of row 0
  int split, num_splits;
  int head_idx;  // batch * num_kv_heads + kv_head
  int batch, kv_head;
};

// Tiles of far keys, and of the others.
struct DkdvGrid {
  int num_other_tiles, num_splits, num_kv_heads;
  int num_far_items;       // tiles times splits
  int64_t num_heads;       // of all samples
  int64_t num_far_blocks;  // below num_blocks(), which a launch limits to 2^31 - 1
  Divisor far_items, splits, other_tiles, kv_heads;

  DkdvGrid(const ThreeRegionBackwardParams& params, int block_n) {
    const ThreeRegionProblem& problem = params.problem;
    num_other_tiles = (problem.k_len + block_n - 1) / block_n;
    num_splits = params.num_splits;
    num_kv_heads = problem.num_kv_heads;
    num_far_items = (partial_rows(problem) + block_n - 1) / block_n * num_splits;
    num_heads = int64_t(problem.batch) * num_kv_heads;
    num_far_blocks = num_heads * num_far_items;
    far_items = Divisor::of(num_far_items);
    splits = Divisor::of(num_splits);
    other_tiles = Divisor::of(num_other_tiles);
    kv_heads = Divisor::of(num_kv_heads);
  }
  int64_t num_blocks() const { return num_far_blocks + num_heads * num_other_tiles; }

  __device__ __forceinline__ DkdvWork work_of(int block, int block_n) const {
    DkdvWork work = {};
    work.is_far = block < int(num_far_blocks);
    if (work.is_far) {
      work.head_idx = divide(block, far_items);
      const int item = block - work.head_idx * num_far_items, tile = divide(item, splits);
      work.first = tile * block_n;
      work.split = item - tile * num_splits;
      work.num_splits = num_splits;
    } else {
      block -= int(num_far_blocks);
      work.head_idx = divide(block, other_tiles);
      work.first = (block - work.head_idx * num_other_tiles) * block_n;
      work.num_splits = 1;
    }
    work.batch = divide(work.head_idx, kv_heads);
    work.kv_head = work.head_idx - work.batch * num_kv_heads;
    return work;
  }
};

struct DkdvParams {
  ThreeRegionBackwardParams backward;
  DkdvGrid grid;
};

// The queries that see a block's keys: positions [begin, end) of each head of the group. The block
// takes up tiles [first_tile, last_tile) of them, head after head.
struct QueryRange {
  int begin, end;
  int num_tiles;  // of a head
  int first_tile, last_tile;
  int batch, first_head;
  // Of the head whose tiles are copied: its number, and where the query at `begin` lies.
  int head;
  const unsigned char *q, *dout;
  int64_t statistic;
};

// A warp's own copy of what it works on. In shared memory, since registers are scarce.
template <int kRowTiles>
struct WarpContext {
  WarpKeys<kRowTiles> keys;
  QueryRange queries;
  DkdvWork work;
  float ds_scale;   // of ds before it is rounded; one but for float16
  float dk_factor;  // from the sums to dk
};

// Finds the keys of a warp, the first of which is entry or key `first`. Returns the key of the lane's
// row, which is lane % (16 * kRowTiles).
template <int kRowTiles>
__device__ __forceinline__ int find_keys(WarpKeys<kRowTiles>& keys,
                                         const ThreeRegionProblem& problem, const FarList& list,
                                         bool is_far, int first) {
  constexpr int kRows = 16 * kRowTiles;
  const int lane = threadIdx.x % kWarpSize, row = lane % kRows;
  const FarKeys& far = list.far;
  int key = first + row;
  if (is_far) {
    key = key < list.size ? list.key(key) : -1;
  } else {
    // The pivots among the keys belong to the blocks of far keys.
    const int index = count_below(far.pivots, far.num_pivots, first) + row;
    if (lane < kRows) keys.rows[row].key = key < list.num_text || key >= problem.k_len ? -1 : key;
    bar_warp_sync();
    if (index < far.num_pivots) {
      const int pivot = far.pivot(index);
      if (pivot >= max(first, far.text_len) && pivot < first + kRows && lane < kRows) {
        keys.rows[pivot - first].key = -1;
      }
    }
    bar_warp_sync();
    key = keys.rows[row].key;
  }
  const bool has_key = key >= 0, is_text = key < far.text_len;
  const float far_bias = is_text ? problem.text_bias : problem.pivot_bias;
  const float bias = is_far || is_text ? far_bias * kLog2e : 0.f;
  const int first_far = first_far_query(max(key, 0), problem);
  const int end = is_far || is_text ? problem.k_len : first_far;
  const KeyRow own = {key, has_key ? end : 0, bias == 0.f ? INT_MAX : first_far, bias};

  // Minima and maxima over the rows with a key, of a row tile, then of the warp.
  constexpr uint32_t kNone = INT_MAX;
  uint32_t low[] = {has_key ? uint32_t(key) : kNone, has_key ? uint32_t(own.end) : kNone,
                    has_key ? uint32_t(own.far) : kNone};
  uint32_t high[] = {uint32_t(max(key, 0)), uint32_t(own.end), has_key ? uint32_t(own.far) : 0};
  const auto combine = [&](int mask) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      low[i] = min(low[i], shfl_bfly(low[i], mask));
      high[i] = max(high[i], shfl_bfly(high[i], mask));
    }
  };
#pragma unroll
  for (int mask = 1; mask < 16; mask *= 2) combine(mask);
  bar_warp_sync();
  if (lane < kRows) keys.rows[row] = own;
  if (lane < kRows && lane % 16 == 0) {
    keys.some_begin[lane / 16] = int(low[0]);
    keys.some_end[lane / 16] = int(high[1]);
  }
  if (kRowTiles == 2) combine(16);
  const float first_bias = shfl_idx(bias, 0);
  const bool one_bias = vote_ballot(has_key && bias != first_bias) == 0;
  if (lane == 0) {
    keys.all_begin = int(high[0]);
    keys.all_end = int(low[1]);
    keys.some_far = int(low[2]);
    keys.all_far = one_bias ? int(high[2]) : INT_MAX;
    keys.bias = bias;
  }
  return key;  // who sees it can be read behind the next barrier
}

template <typename T, typename Shape>
struct DkdvWarp {
  static constexpr int kRowTiles = Shape::kRowTiles, kHeadDim = Shape::kHeadDim;
  static constexpr int kBlockM = Shape::kBlockM, kStep = Shape::kStep;

  const WarpContext<kRowTiles>& context;
  const unsigned char *sK, *sV;
  LaneRow<kHeadDim> key_row, query_row, query_row_transposed;
  float scale;  // from a product to a logit in bits
  float dk[kRowTiles][kHeadDim / 8][4], dv[kRowTiles][kHeadDim / 8][4];
  uint32_t k[kRowTiles][kHeadDim / 16][4], v[kRowTiles][kHeadDim / 16][4];  // where kKeepsKeys

  // The tiles of k and v have arrived.
  __device__ __forceinline__ void initialize() {
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) dk[rt][n][c] = dv[rt][n][c] = 0.f;
      }
      if constexpr (Shape::kKeepsKeys) {
#pragma unroll
        for (int d = 0; d < kHeadDim / 16; ++d) {
          ldmatrix_x4(k[rt][d], sK + key_row.at(rt, d));
          ldmatrix_x4(v[rt][d], sV + key_row.at(rt, d));
        }
      }
    }
  }

  // Takes up the queries at positions [query, query + kStep), rows `row`.. of the tile of queries.
  __device__ __forceinline__ void step(const QueryStage<kHeadDim, kBlockM>& queries, int row,
                                       int query) {
    const auto& keys = context.keys;
    const auto sees = [&](int rt) {
      return query + kStep > keys.some_begin[rt] && query < keys.some_end[rt];
    };
    if (sees(kRowTiles - 1)) {
      step<kRowTiles>(queries, row, query);
    } else if (kRowTiles > 1 && sees(0)) {  // keys ascend: the first queries see the first alone
      step<1>(queries, row, query);
    }
  }

  // The same, with the keys of the first kLive row tiles.
  template <int kLive>
  __device__ __forceinline__ void step(const QueryStage<kHeadDim, kBlockM>& queries, int row,
                                       int query) {
    const auto& keys = context.keys;
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
    const int at = row * kHeadDim * 2;
    const LaneRow<kHeadDim> transposed{query_row_transposed.offset + at};
    const LaneRow<kHeadDim> straight{query_row.offset + at};

    float p[kLive][kStep / 8][4] = {}, ds[kLive][kStep / 8][4] = {};
    // c += keys queries^T. fragments: of the keys.
    const auto multiply = [&](auto& c, const unsigned char* keys, auto& fragments,
                              const unsigned char* of_queries) {
#pragma unroll
      for (int d = 0; d < kHeadDim / 16; ++d) {
        if constexpr (!Shape::kKeepsKeys) {
#pragma unroll
          for (int rt = 0; rt < kLive; ++rt)
            ldmatrix_x4(fragments[rt][d], keys + key_row.at(rt, d));
        }
#pragma unroll
        for (int n = 0; n < kStep / 16; ++n) {
          uint32_t b[4];
          ldmatrix_x4(b, of_queries + transposed.at(n, d));
#pragma unroll
          for (int rt = 0; rt < kLive; ++rt) {
            mma_m16n8k16<T>(c[rt][2 * n], fragments[rt][d], b[0], b[1]);
            mma_m16n8k16<T>(c[rt][2 * n + 1], fragments[rt][d], b[2], b[3]);
          }
        }
      }
    };
    multiply(p, sK, k, queries.q);

    // f(rt, half, n, column) for the lane's elements.
    const auto for_each = [&](auto f) {
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
#pragma unroll
          for (int rt = 0; rt < kLive; ++rt) {
#pragma unroll
            for (int half = 0; half < 2; ++half) f(rt, half, n, column);
          }
        }
      }
    };
    const auto to_logits = [&](auto bias_of) {
      for_each([&](int rt, int half, int n, int column) {
        float& logit = p[rt][n][2 * half + column];
        logit = fmaf(logit, scale, bias_of(rt, half, 8 * n + column));
      });
    };
    const bool all_far = query >= keys.all_far;
    const bool has_one_bias = all_far || query + kStep <= keys.some_far;
    const float one_bias = all_far ? keys.bias : 0.f;
    const bool all_visible = query >= keys.all_begin && query + kStep <= keys.all_end;
    if (has_one_bias && all_visible) {
      to_logits([=](int, int, int) { return one_bias; });
    } else {
      const int first = query + 2 * t;  // of the lane's queries
      if (has_one_bias) {
        to_logits([=](int, int, int) { return one_bias; });
      } else {
        to_logits([&](int rt, int half, int column) {
          const KeyRow& own = keys.rows[16 * rt + 8 * half + g];
          return first + column >= own.far ? own.bias : 0.f;
        });
      }
      uint32_t visible[kLive][2];  // a bit for each query; bit 0 is the lane's first
#pragma unroll
      for (int rt = 0; rt < kLive; ++rt) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const KeyRow& own = keys.rows[16 * rt + 8 * half + g];
          visible[rt][half] =
              shl(~0u, max(own.key - first, 0)) & ~shl(~0u, max(own.end - first, 0));
        }
      }
      for_each([&](int rt, int half, int n, int column) {
        if (!(visible[rt][half] & 1u << (8 * n + column))) {
          p[rt][n][2 * half + column] = -INFINITY;
        }
      });
    }
    multiply(ds, sV, v, queries.dout);
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
      const float* statistics = queries.maxima_and_sums[row / 2 + 4 * n + t];
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const float max_here = statistics[column];
        const float log_sum_here = statistics[2 + column] - float(kBackwardShift<T>);
#pragma unroll
        for (int rt = 0; rt < kLive; ++rt) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& weight = p[rt][n][2 * half + column];
            weight = ex2_approx(weight - max_here - log_sum_here);
          }
        }
      }
    }
    // c += weights queries
    const auto accumulate = [&](auto& c, const auto& weights, const unsigned char* of_queries) {
#pragma unroll
      for (int n = 0; n < kStep / 16; ++n) {
        uint32_t a[kLive][4];
#pragma unroll
        for (int rt = 0; rt < kLive; ++rt) {
          convert_c_to_a<T>(a[rt], weights[rt][2 * n], weights[rt][2 * n + 1]);
        }
#pragma unroll
        for (int d = 0; d < kHeadDim / 16; ++d) {
          uint32_t b[4];
          ldmatrix_x4_trans(b, of_queries + straight.at(n, d));
#pragma unroll
          for (int rt = 0; rt < kLive; ++rt) {
            mma_m16n8k16<T>(c[rt][2 * d], a[rt], b[0], b[1]);
            mma_m16n8k16<T>(c[rt][2 * d + 1], a[rt], b[2], b[3]);
          }
        }
      }
    };
    accumulate(dv, p, queries.dout);
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
      const float* delta = queries.delta + row + 8 * n + 2 * t;
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        // The scale is a power of two: the same as (ds - delta) scale.
        const float ds_scale = kIsFloat16<T> ? context.ds_scale : 1.f;
        const float minus_delta = -delta[column] * ds_scale;
#pragma unroll
        for (int rt = 0; rt < kLive; ++rt) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int c = 2 * half + column;
            const float gradient = kIsFloat16<T> ? fmaf(ds[rt][n][c], ds_scale, minus_delta)
                                                 : ds[rt][n][c] + minus_delta;
            ds[rt][n][c] = p[rt][n][c] * gradient;
          }
        }
      }
    }
    accumulate(dk, ds, queries.q);
  }
};

// Tiles of the queries, head after head of the group, in two stages.
template <typename Shape>
struct QueryTiles {
  static constexpr int kHeadDim = Shape::kHeadDim, kBlockM = Shape::kBlockM;
  using Stage = QueryStage<kHeadDim, kBlockM>;
  using Items = TileItems<kHeadDim, kBlockM, Shape::kThreads>;

  QueryRange& range;
  Stage* stages;
  int left;   // tiles from the next one on; the stage of a tile is left % 2
  int query;  // first one of the tile that was copied last

  __device__ __forceinline__ QueryTiles(QueryRange& queries, Stage (&shared)[2])
      : range(queries), stages(shared) {}

  // Finds the block's tiles, and starts to copy the first one.
  __device__ __forceinline__ void start(const ThreeRegionBackwardParams& params,
                                        const DkdvWork& work, const FarList& list) {
    const ThreeRegionProblem& problem = params.problem;
    int begin, end = problem.k_len;
    if (work.is_far) {
      // Windows end at multiples of powers of two more often than not.
      begin = list.key(work.first) / Shape::kStep * Shape::kStep;
    } else {
      begin = max(work.first, list.num_text);
      const int last = min(work.first + Shape::kBlockN, problem.k_len) - 1;
      if (begin >= list.far.text_len) end = first_far_query(last, problem);
    }
    begin = max(begin, problem.k_len - problem.q_len);
    const int group = problem.num_heads / problem.num_kv_heads;
    const int first_head = work.kv_head * group;
    const int num_tiles = (max(end - begin, 0) + kBlockM - 1) / kBlockM;
    int first_tile = 0, last_tile = group * num_tiles;
    if (work.num_splits > 1) {
      first_tile = int(int64_t(last_tile) * work.split / work.num_splits);
      last_tile = int(int64_t(last_tile) * (work.split + 1) / work.num_splits);
    }
    if (threadIdx.x % kWarpSize == 0) {
      range.begin = begin;
      range.end = end;
      range.num_tiles = num_tiles;
      range.first_tile = first_tile;
      range.last_tile = last_tile;
      range.batch = work.batch;
      range.first_head = first_head;
    }
    left = last_tile - first_tile;
    query = begin;
    if (left > 0) {
      const int of_group = first_tile < num_tiles ? 0 : first_tile / num_tiles;
      query += (first_tile - of_group * num_tiles) * kBlockM;
      find_head(params, first_head + of_group);
      bar_warp_sync();
      copy(params, left % 2);
    }
  }

  // The next tiles to be copied are those of this head.
  __device__ __forceinline__ void find_head(const ThreeRegionBackwardParams& params, int head) {
    if (threadIdx.x % kWarpSize == 0) {
      const int batch = range.batch;
      const int row = range.begin - (params.problem.k_len - params.problem.q_len);
      const auto row_of = [&](const ConstHeads& tensor) {
        const auto* rows = reinterpret_cast<const unsigned char*>(head_of(tensor, batch, head));
        return row_at(rows, tensor.stride.row * 2, row);
      };
      range.head = head;
      range.q = row_of(params.q);
      range.dout = row_of(params.dout);
      range.statistic =
          (int64_t(batch) * params.problem.num_heads + head) * params.problem.q_len + row;
    }
  }

  // Starts to copy the tile whose first query is `query`.
  __device__ __forceinline__ void copy(const ThreeRegionBackwardParams& params, int to_stage) {
    Stage& to = stages[to_stage];
    const int first = query - range.begin, inside = range.end - query;
    const int row = int(threadIdx.x / Items::kLanes);
    const auto copy_rows = [&](unsigned char* tile, const unsigned char* head, int64_t row_bytes,
                               auto is_inside) {
      const unsigned char* rows =
          row_at(head, row_bytes, first + row) + threadIdx.x % Items::kLanes * 16;
      const int64_t step_bytes = Items::kStepRows * row_bytes;
      Items::for_each(threadIdx.x, [&](int offset, int step, int chunk) {
        cp_async_16(tile + offset, rows + chunk * 16 + step * step_bytes, is_inside(step));
      });
    };
    const int64_t q_bytes = params.q.stride.row * 2, dout_bytes = params.dout.stride.row * 2;
    if (inside >= kBlockM) {
      const auto always = [](int) { return true; };
      copy_rows(to.q, range.q, q_bytes, always);
      copy_rows(to.dout, range.dout, dout_bytes, always);
    } else {
      const auto is_inside = [=](int step) { return row + step * Items::kStepRows < inside; };
      copy_rows(to.q, range.q, q_bytes, is_inside);
      copy_rows(to.dout, range.dout, dout_bytes, is_inside);
    }
    if (const int word = threadIdx.x; word < 2 * kBlockM) {
      const int i = word / 4 * 2 + word % 2;
      const int64_t statistic = range.statistic + first + i;
      if (word / 2 % 2 == 0) {
        cp_async_4(to.maxima_and_sums[0] + word, params.row_max + statistic, i < inside);
        cp_async_4(to.delta + i, params.delta + statistic, i < inside);
      } else {
        cp_async_4(to.maxima_and_sums[0] + word, params.row_log_sum + statistic, i < inside);
      }
    }
    cp_async_commit_group();
  }

  // f(tile, position of its first query) for each tile; the next one is copied meanwhile.
  template <typename Function>
  __device__ __forceinline__ void for_each(const ThreeRegionBackwardParams& params, Function f) {
    for (; left > 0; --left) {
      cp_async_wait_group<0>();
      bar_sync();
      const int first_query = query;
      if (left > 1) {
        query += kBlockM;
        if (query >= range.end) {
          const int next = range.head + 1;
          query = range.begin;
          bar_warp_sync();
          find_head(params, next);
          bar_warp_sync();
        }
        copy(params, (left - 1) % 2);
      }
      f(stages[left % 2], first_query);
    }
  }
};

// Computes dk and dv of a key again (exact.cuh), from the block's queries; writes to `partial_*`
// where the block is one of several. Leaves them alone where a query that sees the key has a NaN of
// its own.
template <typename T, typename Shape>
__device__ __noinline__ void dkdv_row(const ThreeRegionBackwardParams& params,
                                      const QueryRange& queries, const KeyRow& own, int kv_head,
                                      float* partial_dk, float* partial_dv) {
  constexpr int kHeadDim = Shape::kHeadDim, kPerLane = kHeadDim / kWarpSize;
  const ThreeRegionProblem& problem = params.problem;
  const int lane = threadIdx.x % kWarpSize, first = problem.k_len - problem.q_len;
  const int batch = queries.batch, key = own.key;
  const T* k = row_of_head<T>(params.k, batch, kv_head, key);
  const T* v = row_of_head<T>(params.v, batch, kv_head, key);
  // f(head, where its statistics begin, begin, end) for the queries of a tile that see the key.
  const auto for_tile = [&](int tile, auto f) {
    const int head = queries.first_head + tile / queries.num_tiles;
    const int from = queries.begin + tile % queries.num_tiles * Shape::kBlockM;
    f(head, (int64_t(batch) * problem.num_heads + head) * problem.q_len - first, max(from, key),
      min(from + Shape::kBlockM, own.end));
  };
  bool finite = true;
  for (int tile = queries.first_tile; tile < queries.last_tile; ++tile) {
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
  for (int tile = queries.first_tile; tile < queries.last_tile; ++tile) {
    for_tile(tile, [&](int head, int64_t statistics, int from, int to) {
      for (int i = from; i < to; ++i) {
        const int64_t at = statistics + i;
        const float row_max = params.row_max[at], row_log_sum = params.row_log_sum[at];
        const float delta = params.delta[at];
        const T* q = row_of_head<T>(params.q, batch, head, i - first);
        const T* dout = row_of_head<T>(params.dout, batch, head, i - first);
        const float s = exact_logit<T, kHeadDim>(q, k, problem.softmax_scale * kLog2e,
                                                 i >= own.far ? own.bias : 0.f);
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

// Stores a warp's dk and dv, and computes keys with a NaN again.
template <typename T, typename Shape>
__device__ __forceinline__ void epilogue(const DkdvParams& params, DkdvWarp<T, Shape>& state,
                                         const WarpContext<Shape::kRowTiles>& context,
                                         unsigned char* sK, unsigned char* sV) {
  constexpr int kHeadDim = Shape::kHeadDim, kRowTiles = Shape::kRowTiles;
  const ThreeRegionBackwardParams& backward = params.backward;
  const DkdvWork& work = context.work;
  const auto& rows = context.keys.rows;
  const int lane = threadIdx.x % kWarpSize;
  const int warp_row = int(threadIdx.x / kWarpSize) * 16 * kRowTiles;
  const float dk_factor = context.dk_factor, dv_factor = exp2f(float(-kBackwardShift<T>));
  bool has_nan[kRowTiles][2];
#pragma unroll
  for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int c = 2 * half; c < 2 * half + 2; ++c) {
          sum += 0.f * (state.dk[rt][n][c] *= dk_factor);
          sum += 0.f * (state.dv[rt][n][c] *= dv_factor);
        }
      }
      has_nan[rt][half] = rows[16 * rt + 8 * half + lane / 4].key >= 0 && sum != 0.f;
    }
  }
  float *partial_dk = nullptr, *partial_dv = nullptr;  // of the warp's first row
  if (work.num_splits > 1) {
    // (num_splits, 2, batch, num_kv_heads, partial_rows, head_dim)
    const int64_t num_heads = params.grid.num_heads, num_rows = partial_rows(backward.problem);
    const int64_t head = 2 * work.split * num_heads + work.head_idx;
    partial_dk = backward.partial + (head * num_rows + work.first + warp_row) * kHeadDim;
    partial_dv = partial_dk + num_heads * num_rows * kHeadDim;
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * rt + 8 * half + lane / 4;
        if (rows[row].key < 0) continue;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
          for (int column = 0; column < 2; ++column) {
            const int at = row * kHeadDim + 8 * n + lane % 4 * 2 + column;
            partial_dk[at] = state.dk[rt][n][2 * half + column];
            partial_dv[at] = state.dv[rt][n][2 * half + column];
          }
        }
      }
    }
  } else {
    const auto key_of = [&](int row) { return rows[row - warp_row].key; };
    store_rows<T, kHeadDim, kRowTiles>(sK, warp_row, state.dk,
                                       head_of(backward.dk, work.batch, work.kv_head),
                                       backward.dk.stride.row, key_of);
    store_rows<T, kHeadDim, kRowTiles>(sV, warp_row, state.dv,
                                       head_of(backward.dv, work.batch, work.kv_head),
                                       backward.dv.stride.row, key_of);
  }
  bar_warp_sync();
  for_rows_with_nan(has_nan, [&](int row) {
    const int at = work.num_splits > 1 ? row * kHeadDim : 0;
    dkdv_row<T, Shape>(backward, context.queries, rows[row], work.kv_head, partial_dk + at,
                       partial_dv + at);
  });
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kMinBlocks)
    three_region_attention_backward_dkdv_kernel(const __grid_constant__ DkdvParams params) {
  constexpr int kHeadDim = Shape::kHeadDim, kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN;
  constexpr int kRowTiles = Shape::kRowTiles, kStep = Shape::kStep, kRows = 16 * kRowTiles;
  const ThreeRegionBackwardParams& backward = params.backward;
  const ThreeRegionProblem& problem = backward.problem;
  auto& shared = shared_memory<typename Shape::SharedMemoryPlan>();

  const DkdvWork work = params.grid.work_of(int(blockIdx.x), kBlockN);
  const FarList list(far_keys_of(problem, work.batch, work.kv_head));
  // All threads of a block without keys.
  if (work.is_far ? work.first >= list.size : work.first + kBlockN <= list.num_text) return;

  static_assert(sizeof(WarpContext<kRowTiles>[Shape::kWarps]) <= kMaxArrayBytes);
  auto* contexts = shared_array<WarpContext<kRowTiles>, Shape::kWarps>();
  auto& context = contexts[kept(int(threadIdx.x / kWarpSize))];
  QueryTiles<Shape> queries(context.queries, shared.stages);
  queries.start(backward, work, list);

  // Otherwise offsets that the epilogue needs again would stay in registers.
  const int lane = kept(int(threadIdx.x % kWarpSize));
  const int warp_row = int(threadIdx.x / kWarpSize) * kRows;
  const int own_key = find_keys(context.keys, problem, list, work.is_far, work.first + warp_row);
  using Items = TileItems<kHeadDim, kRows, kWarpSize>;
  int copied[Items::kSteps];
#pragma unroll
  for (int step = 0; step < Items::kSteps; ++step) {
    copied[step] = shfl_idx(own_key, lane / Items::kLanes + step * Items::kStepRows);
  }
  const auto copy_keys = [&](unsigned char* tile, const ConstHeads& tensor) {
    const auto* rows = reinterpret_cast<const unsigned char*>(
        head_of(tensor, work.batch, work.kv_head) + lane % Items::kLanes * 8);
    Items::for_each(lane, [&](int offset, int step, int chunk) {
      const int key = copied[step];
      cp_async_16(tile + warp_row * kHeadDim * 2 + offset,
                  row_at(rows, tensor.stride.row * 2, max(key, 0)) + chunk * 16, key >= 0);
    });
  };
  copy_keys(shared.k, backward.k);
  copy_keys(shared.v, backward.v);
  cp_async_commit_group();

  int exponent = 0;  // one for all heads of the group: their sums meet in dk
  if constexpr (kIsFloat16<T>) {
    const int group = problem.num_heads / problem.num_kv_heads;
    for (int i = 0; i < group; ++i) {
      const int of_head = ds_exponent<T>(backward, work.batch, work.kv_head * group + i);
      exponent = i == 0 ? of_head : min(exponent, of_head);
    }
  }
  if (lane == 0) {
    context.work = work;
    context.ds_scale = exp2f(float(exponent - kBackwardShift<T>));
    context.dk_factor = problem.softmax_scale * exp2f(float(-exponent));
  }
  DkdvWarp<T, Shape> state{context,
                           shared.k,
                           shared.v,
                           {kept(lane_row<kHeadDim>(warp_row).offset)},
                           {kept(lane_row<kHeadDim>(0).offset)},
                           {kept(lane_row_transposed<kHeadDim>().offset)},
                           problem.softmax_scale * kLog2e};
  if constexpr (Shape::kKeepsKeys) {
    cp_async_wait_group<0>();
    bar_warp_sync();
  }
  state.initialize();

  queries.for_each(backward, [&](const auto& tile, int query) {
#pragma unroll 1
    for (int row = 0; row < kBlockM; row += kStep) state.step(tile, row, query + row);
  });

  // Where there was no query, k and v are still under way.
  cp_async_wait_group<0>();
  bar_warp_sync();
  epilogue<T, Shape>(params, state, contexts[threadIdx.x / kWarpSize], shared.k, shared.v);
}

template <typename T, int kHeadDim>
cudaError_t launch_dkdv(const ThreeRegionBackwardParams& params, cudaStream_t stream) {
  using Shape = DkdvShape<kHeadDim>;
  const DkdvGrid grid(params, Shape::kBlockN);
  return launch<three_region_attention_backward_dkdv_kernel<T, Shape>>(
      grid.num_blocks(), 1, Shape::kThreads, sizeof(typename Shape::SharedMemoryPlan), stream,
      DkdvParams{params, grid});
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
