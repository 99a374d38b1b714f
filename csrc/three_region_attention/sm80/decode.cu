// Three-region attention, forward of few queries: decoding, also in caches of fixed size (kv_lens).
//
// Math       As in forward.cu, for a tile of rows: the queries of all heads that share a head of k and
//            v. Blocks, and the warps of a block, share the key list of a tile. Of the parts' m, l, o:
//              m = max m_i;  l = sum l_i 2^(m_i - m);  out = sum o_i 2^(m_i - m) / l
// Phases     decode kernel        1. Start to copy q and, where the list is not split, its last tile
//                                    of keys; find the key list and the block's part of it.
//                                 2. For each tile of the part, from its end: wait for k and v, start a
//                                    copy kStages - 1 tiles ahead, look up the keys of the one behind
//                                    that; then per warp: 16 keys at a time, logits, online softmax,
//                                    o += p v.
//                                 3. Merge the warps' parts; write out and statistics, or `partial`.
//            decode merge kernel  only with num_splits > 1: merge the blocks' parts of rows that have
//                                 several, write likewise.
//            In both, rows with a NaN are computed again, over visible keys only (exact.cuh).
// Layout     q, out (batch, num_heads, q_len, head_dim); k, v (batch, num_kv_heads, k_len,
//            head_dim); any strides, rows contiguous and aligned to 16 bytes; partial (num_splits,
//            batch, num_heads, q_len, head_dim + 4) float32: o, m, l, number of parts, unused.
// Grid       decode kernel: one block per split, tile of rows, kv head and sample. A list has as many
//            parts as are worth a block, up to num_splits: only the device knows its length.
//            decode merge kernel: kRowLanes lanes per row.
// Warps      four; those of a tile with up to 16 or 32 rows share its keys.
// Smem       head_dim                         32     64     96    128
//            stages: 3, 3, 2, 2 x (k, v)   24576  49152  49152  65536   the last one holds q before,
//                                                                       the first ones o at the end
//            m, l of the warps               512    512    512    512
//            ends among the far keys         128    128    128    128
//            key list                         48     48     48     48
//            total, dynamic                25264  49840  49840  66224
// Barriers   bar_sync before the loop       the key list and the ends among the far keys are there;
//                                           then q, before its stage is filled
//            bar_sync in KeyRing::wait      the tile has arrived for all threads; all warps have left
//                                           the stage that is filled
//            bar_sync, twice at the end     all warps have left the stages, m and l of all warps are
//                                           there; their o are there
//            bar_warp_sync                  the stores of rows that are computed again
// Rounding   float32 logits, softmax and sums; p rounded to the element type before p v; out once.
//            Deterministic: parts are merged in their order, without atomics.
// Bytes      each row of k and v that some query sees is read once for each tile of rows. That bounds
//            the time: a product of the tensor cores takes less than the copy of its keys even where
//            one row of its sixteen is used.
// Reference  cogview_kernels.attention.reference.three_region_attention

#include "exact.cuh"

namespace cogview::sm80 {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
constexpr int kMaxRows = 16 * kWarps;  // of a tile
constexpr int kStepKeys = 16;          // that a warp takes at once
constexpr int kBlockN = kStepKeys * kWarps;
constexpr int kMaxSplits = 64;

template <int kHeadDim_>
struct DecodeShape {
  static constexpr int kHeadDim = kHeadDim_;
  // As many as 48 KB hold, so that four blocks fit a multiprocessor of sm_90, and two one of sm_86;
  // at least two.
  static constexpr int kStages = kHeadDim <= 64 ? 3 : 2;
  static constexpr int kMinBlocks = kHeadDim <= 64 ? 4 : 3;
  // Of the warps' o, in floats: eight rows of a fragment lie in different banks.
  static constexpr int kRowFloats = kHeadDim + 8;
  struct Stage {
    unsigned char k[kTileBytes<kHeadDim, kBlockN>];
    unsigned char v[kTileBytes<kHeadDim, kBlockN>];
  };
  struct SharedMemoryPlan {
    Stage stages[kStages];
    float m[kWarps][16], l[kWarps][16];
    int far_ends[kWarpSize];
    KeyList list;
  };
  static_assert(kMaxRows * kRowFloats * sizeof(float) <= sizeof(Stage[kStages]));
};

// How the rows of a kv head are dealt out.
struct DecodePlan {
  int tile_queries;    // queries of a tile
  int row_tiles;       // tiles that share these queries, each up to kMaxRows rows
  int tiles;           // of a kv head
  int row_warps_log2;  // warps with rows of their own
  int min_part;        // keys that are worth a block

  static DecodePlan of(const ThreeRegionProblem& problem) {
    DecodePlan plan;
    const int group = problem.num_heads / problem.num_kv_heads;
    // Beyond 32, lanes would not suffice for their ends among the far keys.
    plan.tile_queries = std::min(problem.q_len, std::clamp(kMaxRows / group, 8, kWarpSize));
    const int rows = group * plan.tile_queries;
    plan.row_tiles = (rows - 1) / kMaxRows + 1;
    plan.tiles = plan.row_tiles * ((problem.q_len - 1) / plan.tile_queries + 1);
    const int used = std::min(rows, kMaxRows);
    plan.row_warps_log2 = used <= 16 ? 0 : used <= 32 ? 1 : 2;
    // Shorter parts save less time than merging them takes. A part writes and reads 8 D bytes for a
    // row, and reads 4 D for a key: a ninth more at most.
    plan.min_part = std::max(256, 20 * used);
    return plan;
  }
};

struct DecodeParams {
  ThreeRegionForwardParams forward;
  DecodePlan plan;
  Divisor split_divisor, tile_divisor, row_tile_divisor, kv_head_divisor, query_divisor;
};

// How many keys a sample has.
__device__ __forceinline__ int k_len_of(const ThreeRegionForwardParams& params, int batch) {
  const int k_len = params.problem.k_len;
  return params.kv_lens == nullptr ? k_len : min(max(params.kv_lens[batch], 0), k_len);
}

__device__ __forceinline__ FarKeys keys_of(const ThreeRegionForwardParams& params, int batch,
                                           int kv_head) {
  FarKeys far = far_keys_of(params.problem, batch, kv_head);
  far.k_len = k_len_of(params, batch);
  return far;
}

// A row of q; none if query is negative.
struct DecodeRow {
  int head, query;
};

// The block's rows, and which part of their keys it takes.
struct DecodeTile {
  int split, batch, kv_head, first_query, first_row;
  int group;

  __device__ __forceinline__ explicit DecodeTile(const DecodeParams& params) {
    const ThreeRegionProblem& problem = params.forward.problem;
    const int item = divide(int(blockIdx.x), params.split_divisor);
    split = int(blockIdx.x) - item * params.forward.num_splits;
    const int kv_head_idx = divide(item, params.tile_divisor);
    const int tile = item - kv_head_idx * params.plan.tiles;
    batch = divide(kv_head_idx, params.kv_head_divisor);
    kv_head = kv_head_idx - batch * problem.num_kv_heads;
    const int query_tile = divide(tile, params.row_tile_divisor);
    first_query = query_tile * params.plan.tile_queries;
    first_row = (tile - query_tile * params.plan.row_tiles) * kMaxRows;
    group = divide(problem.num_heads, params.kv_head_divisor);
  }

  __device__ __forceinline__ int num_rows(const DecodeParams& params) const {
    return min(group * params.plan.tile_queries - first_row, kMaxRows);
  }

  // Row `index` of the tile: all queries of a head, then those of the next.
  __device__ __forceinline__ DecodeRow row(const DecodeParams& params, int index) const {
    const int at = first_row + index, of_group = divide(at, params.query_divisor);
    const int query = first_query + at - of_group * params.plan.tile_queries;
    const bool exists = of_group < group && query < params.forward.problem.q_len;
    return {kv_head * group + of_group, exists ? query : -1};
  }

  // Starts to copy the first `rows` rows of q.
  template <int kHeadDim>
  __device__ __forceinline__ void copy_rows(unsigned char* to, const DecodeParams& params,
                                            int rows) const {
    const ConstHeads& gQ = params.forward.q;
    for (int item = threadIdx.x; item < rows * kChunks<kHeadDim>; item += kThreads) {
      const int index = item / kChunks<kHeadDim>, chunk = item % kChunks<kHeadDim>;
      const DecodeRow from = row(params, index);
      const bool exists = from.query >= 0;
      const uint16_t* head = head_of(gQ, batch, exists ? from.head : 0);
      cp_async_16(to + tile_offset<kHeadDim>(index, chunk),
                  head + max(from.query, 0) * gQ.stride.row + chunk * 8, exists);
    }
  }
};

// Tiles of kBlockN entries of a key list in kStages stages, from entry `end` down to `begin`. While one
// is used, the next ones are copied, and the keys of the one behind them are looked up.
template <typename Shape>
struct KeyRing {
  static constexpr int kHeadDim = Shape::kHeadDim, kStages = Shape::kStages;
  using Items = TileItems<kHeadDim, kBlockN, kThreads>;

  typename Shape::Stage* stages;
  const unsigned char *k, *v;  // the thread's first chunk of row 0
  int64_t k_bytes, v_bytes;    // from row to row
  int first_row, offset;       // of a tile: the thread's first row and where its chunk lies
  int keys[Items::kSteps];     // of the thread's rows of the next tile to copy
  int to = 0, from = 0;        // stages to copy to and to read from

  __device__ __forceinline__ KeyRing(typename Shape::Stage* ring, const ConstHeads& gK,
                                     const ConstHeads& gV, int batch, int kv_head)
      : stages(ring),
        k(Items::first_chunk(head_of(gK, batch, kv_head))),
        v(Items::first_chunk(head_of(gV, batch, kv_head))),
        k_bytes(gK.stride.row * 2),
        v_bytes(gV.stride.row * 2),
        first_row(threadIdx.x / Items::kLanes),
        offset(Items::offset_of(threadIdx.x, 0)) {
    static_assert(Items::kPeriod == 1);
  }

  // Looks up the keys of the tile that begins at `entry`: loads that nothing waits for. Entries
  // below 0 may be any key.
  __device__ __forceinline__ void find(const KeyList& list, int entry) {
    const int num_pivots = list.num_far - list.num_text;
    const int beyond = list.first_window - list.num_far;  // from entries to keys of the window
    const bool has_pivots = (entry < list.num_far) & (entry + kBlockN > list.num_text);
    if (has_pivots & (num_pivots > 0)) {
#pragma unroll
      for (int step = 0; step < Items::kSteps; ++step) {
        const int at = entry + first_row + step * Items::kStepRows, index = at - list.num_text;
        keys[step] = list.far.pivots[min(max(index, 0), num_pivots - 1)];
        if (index < 0) keys[step] = at;
        if (index >= num_pivots) keys[step] = at + beyond;
      }
    } else {
      // No pivots: all text or all window, or both where there are no pivots between them.
#pragma unroll
      for (int step = 0; step < Items::kSteps; ++step) {
        const int at = entry + first_row + step * Items::kStepRows;
        keys[step] = at < list.num_text ? at : at + beyond;
      }
    }
  }

  // Starts to copy the keys that were found, and zeros for others.
  __device__ __forceinline__ void copy(int entry, int begin, const FarKeys& far) {
    copy(entry, begin, [&](int step) { return far.clamp(keys[step]); });
  }
  template <typename KeyOf>
  __device__ __forceinline__ void copy(int entry, int begin, KeyOf key_of) {
    auto& stage = stages[to];
    to = to + 1 == kStages ? 0 : to + 1;
    const auto first = [&](int) { return offset; };
    const auto wanted = [&](int step) {
      return entry + first_row + step * Items::kStepRows >= begin;
    };
    Items::for_each_from(first, [&](int at, int step, int chunk) {
      cp_async_16(stage.k + at, row_at(k, k_bytes, key_of(step)) + chunk * 16, wanted(step));
    });
    Items::for_each_from(first, [&](int at, int step, int chunk) {
      cp_async_16(stage.v + at, row_at(v, v_bytes, key_of(step)) + chunk * 16, wanted(step));
    });
  }

  // The next tile, in shared memory.
  __device__ __forceinline__ const typename Shape::Stage& wait() {
    cp_async_wait_group<kStages - 2>();
    bar_sync();
    const auto& stage = stages[from];
    from = from + 1 == kStages ? 0 : from + 1;
    return stage;
  }
};

// Which entries a row sees: [0, far_end) and [window_begin, window_end).
struct RowEntries {
  int far_end, window_begin, window_end;

  __device__ __forceinline__ bool operator()(int entry) const {
    return (entry < far_end) | ((entry >= window_begin) & (entry < window_end));
  }
};

// What the block takes of the key list, entries [begin, end), and what all its rows see of that:
// entries below far_all, and from window_begin on those below window_end.
struct Part {
  int begin, end;
  int far_all, window_begin, window_end;
  bool has_bias;

  __device__ __forceinline__ bool all_see(int entry, int number) const {
    const bool all_window = (entry >= window_begin) & (entry + number <= window_end);
    return (entry >= begin) & ((entry + number <= far_all) | all_window);
  }
};

// One warp's part of the online softmax: 16 rows, of which a lane has two.
template <typename T, int kHeadDim>
struct DecodeWarp {
  LaneRow<kHeadDim> k_row, v_row;  // of a stage's first sixteen rows
  int column;                      // of the lane's first element among those of a step
  uint32_t q[kHeadDim / 16][4];
  RowEntries sees[2];
  float m[2], l[2];  // l: of the lane's columns until the end
  float o[kHeadDim / 8][4];

  // The warp has rows 16 * row_tile and on of the tile `sQ`. far_ends: of the tile's queries from
  // the first one with a position on, see warp_view_of. first: position of query 0.
  __device__ __forceinline__ void initialize(const DecodeParams& params, const DecodeTile& tile,
                                             const unsigned char* sQ, const KeyList& list,
                                             const int* far_ends, int first, int row_tile) {
    const int lane = threadIdx.x % kWarpSize;
    k_row = {kept(lane_row_transposed<kHeadDim>().offset)};
    v_row = {kept(lane_row<kHeadDim>(0).offset)};
    column = kept(lane % 4 * 2);
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) load_a<kHeadDim>(q[d], sQ, 16 * row_tile, d);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const DecodeRow row = tile.row(params, 16 * row_tile + 8 * half + lane / 4);
      const int position = first + row.query;
      sees[half] = {0, 0, 0};
      if (row.query >= 0 && position >= 0) {
        const int start = window_start(position, params.forward.problem);
        const int far_end = far_ends[position - max(first + tile.first_query, 0)];
        sees[half] = {far_end, list.entry_of(start), list.entry_of(position + 1)};
      }
      m[half] = -INFINITY;
      l[half] = 0.f;
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.f;
  }

  // Takes up the 16 keys from entry `entry` on, which are rows `row` and on of the stage.
  template <typename Stage>
  __device__ __forceinline__ void step(const Stage& stage, const KeyList& list, const Part& part,
                                       const ThreeRegionProblem& problem, int entry, int row) {
    const int offset = row * kHeadDim * 2;
    float s[2][4] = {};
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      uint32_t b[4];
      ldmatrix_x4(b, stage.k + LaneRow<kHeadDim>{k_row.offset + offset}.at(0, d));
      mma_m16n8k16<T>(s[0], q[d], b[0], b[1]);
      mma_m16n8k16<T>(s[1], q[d], b[2], b[3]);
    }
    // Logits in bits, always rounded, unlike the forward's: memory bounds the time.
    const int first_column = entry + column;
    const float scale = problem.softmax_scale * kLog2e;
    const auto to_logits = [&](auto bias_of_column) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const float bias = bias_of_column(first_column + 8 * n + column);
          s[n][column] = fmaf(s[n][column], scale, bias);
          s[n][2 + column] = fmaf(s[n][2 + column], scale, bias);
        }
      }
    };
    if (part.has_bias) {
      to_logits([&](int at) { return bias_of(problem, list, at); });
    } else {
      to_logits([](int) { return 0.f; });
    }
    if (!part.all_see(entry, kStepKeys)) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int at = first_column + 8 * n + c % 2;
          if (at < part.begin || !sees[c / 2](at)) s[n][c] = -INFINITY;
        }
      }
    }
    float keep[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float new_m = m[half];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        new_m = fmaxf(new_m, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      }
      new_m = quad_max(new_m);
      // Before its first key a row has weights of zero.
      const float shift = new_m == -INFINITY ? 0.f : new_m;
      keep[half] = ex2_approx(m[half] - shift);
      m[half] = new_m;
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int c = 2 * half; c < 2 * half + 2; ++c) {
          s[n][c] = ex2_approx(s[n][c] - shift);
          sum += s[n][c];
        }
      }
      l[half] = l[half] * keep[half] + sum;
    }
    // After the first keys few rows find a larger logit.
    if (vote_ballot(keep[0] != 1.f || keep[1] != 1.f) != 0) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) o[n][c] *= keep[c / 2];
      }
    }
    uint32_t a[4];
    convert_c_to_a<T>(a, s[0], s[1]);
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, stage.v + LaneRow<kHeadDim>{v_row.offset + offset}.at(0, d));
      mma_m16n8k16<T>(o[2 * d], a, b[0], b[1]);
      mma_m16n8k16<T>(o[2 * d + 1], a, b[2], b[3]);
    }
  }
};

// Where a row's o of a split lies in `partial`, in floats; m and l stand behind it.
__device__ __forceinline__ int64_t partial_row(const ThreeRegionProblem& problem, int split,
                                               int batch, int head, int query) {
  const int64_t head_idx = (int64_t(split) * problem.batch + batch) * problem.num_heads + head;
  return (head_idx * problem.q_len + query) * (problem.head_dim + 4);
}

// The weight of a part whose largest logit is m, in bits, beside the largest of all.
__device__ __forceinline__ float weight_of(float m, float largest) {
  return m == -INFINITY ? 0.f : ex2_approx(m - largest);
}

struct alignas(8) Pair {
  float x, y;
};

// Whether a part holds no key that the row sees: its o is not written.
__device__ __forceinline__ bool is_empty(float m, float l) { return m == -INFINITY && l == 0.f; }

// Divides o by l, and writes a lane's part of a row; query is negative where there is no row. The
// whole warp must call it.
template <typename T, int kHeadDim>
__device__ __forceinline__ void finish_row(const ThreeRegionForwardParams& params, int batch,
                                           const DecodeRow& row, float m, float l, float (&o)[8]) {
  constexpr int kLanes = kRowLanes<kHeadDim>;
  const ThreeRegionProblem& problem = params.problem;
  const int lane = threadIdx.x % kWarpSize, chunk = lane % kLanes;
  const int k_len = k_len_of(params, batch);
  const int position = k_len - problem.q_len + row.query;
  const bool exists = row.query >= 0, has_position = position >= 0;
  const float factor = 1.f / l;
  // NaN where a number of the row is not finite, or l is 0: sums of bfloat16 may overflow.
  float zero = 0.f * factor;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    o[i] *= factor;
    zero += 0.f * o[i];
    // The mean of finite values may exceed float16, because p is rounded in o but not in l.
    if constexpr (kIsFloat16<T>) o[i] = fminf(fmaxf(o[i], -65504.f), 65504.f);
    if (!has_position) o[i] = 0.f;
  }
  const bool writes = exists && chunk < kChunks<kHeadDim>;
  if (writes) {
    uint16_t* to =
        head_of(params.out, batch, row.head) + row.query * params.out.stride.row + chunk * 8;
    store_vector(reinterpret_cast<T*>(to), o);
  }
  if (exists && chunk == 0) {
    const int64_t at = (int64_t(batch) * problem.num_heads + row.head) * problem.q_len + row.query;
    params.row_max[at] = has_position ? m : -INFINITY;
    params.row_log_sum[at] = has_position ? log2f(l) : 0.f;
  }
  uint32_t lanes = vote_ballot(writes && has_position && zero != 0.f);
  bar_warp_sync();
  while (lanes != 0) {
    const int source = popc((lanes & -lanes) - 1);
    const int of_batch = shfl_idx(batch, source), head = shfl_idx(row.head, source);
    forward_row<T, kHeadDim>(params, of_batch, head, shfl_idx(position, source),
                             shfl_idx(k_len, source));
    const int row_lanes = source / kLanes * kLanes;
    lanes &= ~(((1u << kLanes) - 1) << row_lanes);
  }
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(kThreads, Shape::kMinBlocks)
    three_region_attention_decode_kernel(const __grid_constant__ DecodeParams params) {
  constexpr int kHeadDim = Shape::kHeadDim, kStages = Shape::kStages;
  constexpr int kLanes = kRowLanes<kHeadDim>, kRowFloats = Shape::kRowFloats;
  const ThreeRegionForwardParams& forward = params.forward;
  const ThreeRegionProblem& problem = forward.problem;
  auto& shared = shared_memory<typename Shape::SharedMemoryPlan>();
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int row_warps = 1 << params.plan.row_warps_log2, row_tile = warp & (row_warps - 1);
  const DecodeTile tile(params);
  const FarKeys far = keys_of(forward, tile.batch, tile.kv_head);

  // Positions of the tile's queries; [0, 1) if none has one.
  const int first = far.k_len - problem.q_len;
  const int last_query = min(tile.first_query + params.plan.tile_queries, problem.q_len);
  const int begin = max(first + tile.first_query, 0), end = max(first + last_query, begin + 1);
  const bool has_keys = first + last_query > 0;

  KeyRing<Shape> ring(shared.stages, forward.k, forward.v, tile.batch, tile.kv_head);
  unsigned char* sQ = shared.stages[kStages - 1].k;
  const auto copy_q = [&] {
    tile.template copy_rows<kHeadDim>(sQ, params, 16 * row_warps);
    cp_async_commit_group();
  };
  // The first tile of a list that is not split: its last keys are those up to the last query.
  const int window_size = end - window_start(begin, problem);
  const bool has_started = has_keys && forward.num_splits == 1 && window_size >= kBlockN;
  if (forward.num_splits == 1) copy_q();
  if (has_started) {
    ring.copy(0, 0, [&](int step) {
      return end - kBlockN + ring.first_row + step * decltype(ring)::Items::kStepRows;
    });
    cp_async_commit_group();
  }
  const bool is_uniform = window_start(begin, problem) == window_start(end - 1, problem);
  if (warp == 0) {
    const int far_pivots =
        count_below(far.pivots, problem.num_pivots, window_start(end - 1, problem));
    const KeyList found = key_list_of(problem, far, begin, end, far_pivots);
    int far_end = found.num_far;
    if (!is_uniform) {
      const int start = window_start(min(begin + lane, end - 1), problem);
      far_end = min(start, found.num_text) +
                count_below_alone(far.pivots, found.num_far - found.num_text, start);
    }
    shared.far_ends[lane] = far_end;
    if (lane == 0) shared.list = found;
  }
  bar_sync();
  KeyList list = shared.list;
  list.far = far;  // pointers of parameters are known to be global
  Part part = {0, has_keys ? list.size : 0};
  int num_parts = 1;
  if (forward.num_splits > 1) {
    num_parts = min(max(part.end / params.plan.min_part, 1), forward.num_splits);
    if (tile.split >= num_parts) return;
    copy_q();
    const int size = ((part.end - 1) / num_parts / kStepKeys + 1) * kStepKeys;
    part.begin = min(tile.split * size, part.end);
    part.end = min(part.begin + size, part.end);
  }
  part.far_all = shared.far_ends[0];
  part.window_begin = list.entry_of(list.last_start);
  part.window_end = list.entry_of(begin + 1);
  if (is_uniform) part.window_begin = 0;  // it begins where their far keys end
  part.has_bias = problem.text_bias != 0.f || problem.pivot_bias != 0.f;

  int copied = part.end;  // everything from here on is copied
  const auto copy_next = [&] {
    copied -= kBlockN;
    if (copied > part.begin - kBlockN) ring.copy(copied, part.begin, far);
    cp_async_commit_group();
    if (copied > part.begin) ring.find(list, copied - kBlockN);
  };
  if (has_started) copied -= kBlockN;
  if (copied > part.begin) ring.find(list, copied - kBlockN);
  if (!has_started) copy_next();
#pragma unroll
  for (int stage = 1; stage < kStages - 1; ++stage) copy_next();
  cp_async_wait_group<kStages - 1>();
  bar_sync();
  DecodeWarp<T, kHeadDim> state;
  state.initialize(params, tile, sQ, list, shared.far_ends, first, row_tile);

  for (int entry = part.end - kBlockN; entry > part.begin - kBlockN; entry -= kBlockN) {
    const auto& stage = ring.wait();
    copy_next();
    for (int row = (warp >> params.plan.row_warps_log2) * kStepKeys; row < kBlockN;
         row += kBlockN >> params.plan.row_warps_log2) {
      if (entry + row + kStepKeys > part.begin) {
        state.step(stage, list, part, problem, entry + row, row);
      }
    }
  }

  // The warps' parts of a row, merged through the stages.
  cp_async_wait_group<0>();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float l = quad_sum(state.l[half]);
    if (lane % 4 == 0) {
      shared.m[warp][lane / 4 + 8 * half] = state.m[half];
      shared.l[warp][lane / 4 + 8 * half] = l;
    }
  }
  bar_sync();
  const auto largest_of = [&](int of_row_tile, int row) {
    float m = -INFINITY;
    for (int i = of_row_tile; i < kWarps; i += row_warps) m = fmaxf(m, shared.m[i][row]);
    return m;
  };
  float* parts = reinterpret_cast<float*>(shared.stages);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    const float weight = weight_of(state.m[half], largest_of(row_tile, row));
    float* to = parts + (warp * 16 + row) * kRowFloats + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      *reinterpret_cast<Pair*>(to + 8 * n) = {state.o[n][2 * half] * weight,
                                              state.o[n][2 * half + 1] * weight};
    }
  }
  bar_sync();
  const int num_rows = tile.num_rows(params), chunk = lane % kLanes;
  constexpr int kPassRows = kWarpSize / kLanes;
  for (int pass = warp * kPassRows; pass < num_rows; pass += kWarps * kPassRows) {
    const int index = pass + lane / kLanes, of_row_tile = index / 16, at = index % 16;
    DecodeRow row = {0, -1};
    float m = -INFINITY, l = 0.f, o[8] = {};
    if (index < num_rows) {
      row = tile.row(params, index);
      m = largest_of(of_row_tile, at);
      for (int i = of_row_tile; i < kWarps; i += row_warps) {
        l += shared.l[i][at] * weight_of(shared.m[i][at], m);
        if (chunk >= kChunks<kHeadDim>) continue;
        const float* from = parts + (i * 16 + at) * kRowFloats + chunk * 8;
        // Eight lanes that read at once take different halves, in different banks.
        const int own = lane / 4 % 2 * 4;
        const uint4 halves[] = {ld_shared_v4(from + own), ld_shared_v4(from + (own ^ 4))};
#pragma unroll
        for (int d = 0; d < 4; ++d) {
          const float one = reinterpret_cast<const float*>(&halves[0])[d];
          const float other = reinterpret_cast<const float*>(&halves[1])[d];
          o[d] += own == 0 ? one : other;
          o[4 + d] += own == 0 ? other : one;
        }
      }
    }
    if (forward.num_splits > 1 && row.query >= 0) {
      float* to =
          forward.partial + partial_row(problem, tile.split, tile.batch, row.head, row.query);
      if (num_parts > 1 && chunk < kChunks<kHeadDim> && !is_empty(m, l)) {
        store_vector(to + chunk * 8, {o[0], o[1], o[2], o[3]});
        store_vector(to + chunk * 8 + 4, {o[4], o[5], o[6], o[7]});
      }
      if (chunk == 0) store_vector(to + kHeadDim, {m, l, float(num_parts), 0.f});
    }
    if (num_parts == 1) finish_row<T, kHeadDim>(forward, tile.batch, row, m, l, o);
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) three_region_attention_decode_merge_kernel(
    const __grid_constant__ ThreeRegionForwardParams params) {
  constexpr int kLanes = kRowLanes<kHeadDim>;
  const ThreeRegionProblem& problem = params.problem;
  const int chunk = threadIdx.x % kLanes;
  const int64_t index = int64_t(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  const int64_t head_idx = index / problem.q_len;
  const bool exists = head_idx < int64_t(problem.batch) * problem.num_heads;
  const int batch = exists ? int(head_idx / problem.num_heads) : 0;
  DecodeRow row = {int(head_idx % problem.num_heads), int(index % problem.q_len)};
  const float* rows = params.partial + partial_row(problem, 0, batch, row.head, row.query);
  float first[4] = {};
  if (exists) load_vector(rows + kHeadDim, first);
  const int num_parts = int(first[2]);
  if (num_parts <= 1) row.query = -1;  // the decode kernel has finished it
  if (vote_ballot(row.query >= 0) == 0) return;
  float m = -INFINITY, l = 0.f, o[8] = {};
  if (row.query >= 0) {
    const int64_t stride = partial_row(problem, 1, 0, 0, 0);
#pragma unroll 4
    for (int part = 0; part < num_parts; ++part) {
      float statistics[4];
      load_vector(rows + part * stride + kHeadDim, statistics);
      m = fmaxf(m, statistics[0]);
    }
#pragma unroll 4
    for (int part = 0; part < num_parts; ++part) {
      float statistics[4];
      load_vector(rows + part * stride + kHeadDim, statistics);
      if (is_empty(statistics[0], statistics[1])) continue;
      const float weight = weight_of(statistics[0], m);
      l += statistics[1] * weight;
      if (chunk >= kChunks<kHeadDim>) continue;
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        float four[4];
        load_vector(rows + part * stride + chunk * 8 + i, four);
#pragma unroll
        for (int d = 0; d < 4; ++d) o[i + d] += four[d] * weight;
      }
    }
  }
  finish_row<T, kHeadDim>(params, batch, row, m, l, o);
}

template <typename T, int kHeadDim>
cudaError_t launch_decode(const ThreeRegionForwardParams& forward, cudaStream_t stream) {
  using Shape = DecodeShape<kHeadDim>;
  const ThreeRegionProblem& problem = forward.problem;
  DecodeParams params = {forward, DecodePlan::of(problem)};
  params.split_divisor = Divisor::of(forward.num_splits);
  params.tile_divisor = Divisor::of(params.plan.tiles);
  params.row_tile_divisor = Divisor::of(params.plan.row_tiles);
  params.kv_head_divisor = Divisor::of(problem.num_kv_heads);
  params.query_divisor = Divisor::of(params.plan.tile_queries);
  const int64_t num_blocks =
      int64_t(problem.batch) * problem.num_kv_heads * params.plan.tiles * forward.num_splits;
  cudaError_t status = launch<three_region_attention_decode_kernel<T, Shape>>(
      num_blocks, 1, kThreads, sizeof(typename Shape::SharedMemoryPlan), stream, params);
  if (status == cudaSuccess && forward.num_splits > 1) {
    constexpr int kRows = kThreads / kRowLanes<kHeadDim>;
    const int64_t num_rows = int64_t(problem.batch) * problem.num_heads * problem.q_len;
    status = launch<three_region_attention_decode_merge_kernel<T, kHeadDim>>(
        (num_rows + kRows - 1) / kRows, 1, kThreads, 0, stream, forward);
  }
  return status;
}

template <typename T>
cudaError_t launch_decode(const ThreeRegionForwardParams& params, cudaStream_t stream) {
  return with_head_dim(params.problem.head_dim, [&](auto head_dim) {
    return launch_decode<T, decltype(head_dim)::value>(params, stream);
  });
}

}  // namespace

cudaError_t three_region_attention_decode(const ThreeRegionForwardParams& params,
                                          cudaStream_t stream) {
  return params.problem.dtype == DType::kFloat16 ? launch_decode<Half>(params, stream)
                                                 : launch_decode<BFloat16>(params, stream);
}

}  // namespace cogview::sm80

// A block for each multiprocessor, if lists may have as many parts that are worth one: half as many
// copy as fast as the memory can. Blocks without a part cost little, but not nothing; so texts count
// up to 4096 keys, and longer ones have longer parts.
int cogview::three_region_attention_forward_splits(const ThreeRegionProblem& problem,
                                                   bool has_kv_lens, int num_sms) {
  using namespace sm80;
  const int64_t num_heads = int64_t(problem.batch) * problem.num_kv_heads;
  if (num_heads == 0 || problem.q_len == 0 || !is_decode(problem, has_kv_lens)) return 1;
  const DecodePlan plan = DecodePlan::of(problem);
  const int64_t window = int64_t(problem.query_window) * problem.num_windows + plan.tile_queries;
  const int64_t keys = std::min(window + problem.num_pivots + 4096, int64_t(problem.k_len));
  const int64_t parts = std::min(keys / plan.min_part, int64_t(kMaxSplits));
  return int(std::max(std::min(num_sms / (num_heads * plan.tiles), parts), int64_t{1}));
}
