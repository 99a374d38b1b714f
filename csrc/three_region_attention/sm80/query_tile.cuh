// Shared by the kernels that own query rows: the tile of queries of a block, and its keys.
#pragma once

#include "../key_list.cuh"
#include "tile.cuh"

namespace cogview::sm80 {

// The tile of queries of a block: positions [begin, end) of [origin, origin + kBlockM). Tiles begin
// at multiples of kBlockM, so that they coincide with query blocks. Blocks are ordered by head, and
// within a head from the last tile, whose list is the longest.
template <int kBlockM>
struct QueryTile {
  int first;  // position of row 0
  int origin, begin, end;
  int head_idx, batch, head, kv_head;

  // Blocks of a launch; and sets what the kernel divides its block's number by.
  static int64_t plan(ThreeRegionProblem& problem) {
    const int first_tile = (problem.k_len - problem.q_len) / kBlockM;
    const int num_tiles = (problem.k_len - 1) / kBlockM - first_tile + 1;
    problem.tile_divisor = Divisor::of(num_tiles);
    return int64_t(problem.batch) * problem.num_heads * num_tiles;
  }

  __device__ __forceinline__ explicit QueryTile(const ThreeRegionProblem& problem) {
    first = problem.k_len - problem.q_len;
    const int last_tile = (problem.k_len - 1) / kBlockM;
    const int num_tiles = last_tile - first / kBlockM + 1;
    head_idx = divide(int(blockIdx.x), problem.tile_divisor);
    origin = (last_tile - int(blockIdx.x) + head_idx * num_tiles) * kBlockM;
    begin = max(origin, first);
    end = min(origin + kBlockM, problem.k_len);
    batch = divide(head_idx, problem.head_divisor);
    head = head_idx - batch * problem.num_heads;
    kv_head = divide(head, problem.group_divisor);
  }

  // Row of q and out; -1 where the tile's row holds no query.
  __device__ __forceinline__ int row(int tile_row) const {
    const int position = origin + tile_row;
    return position >= begin && position < end ? position - first : -1;
  }

  // Starts to copy the tile's rows of q or dout.
  template <int kHeadDim, int kThreads>
  __device__ __forceinline__ void copy(unsigned char* to, const ConstHeads& from) const {
    copy_tile<kHeadDim, kBlockM, kThreads>(to, head_of(from, batch, head), from.stride.row,
                                           origin - first, begin - first, end - first);
  }
};

// Finds the key list of a block's tile and what a warp sees of it: its own copy, in shared memory.
// far_end: of the lane's row of the warp, see warp_view_of.
template <int kWarpRows, int kBlockM>
__device__ __forceinline__ void find_context(const ThreeRegionProblem& problem,
                                             const QueryTile<kBlockM>& tile, const FarKeys& far,
                                             KeyContext& context, int& far_end) {
  static_assert(kWarpRows <= kWarpSize);
  const int lane = threadIdx.x % kWarpSize;
  const int row = tile.origin + int(threadIdx.x / kWarpSize) * kWarpRows;
  const int first = max(row, tile.begin), last = min(row + kWarpRows, tile.end) - 1;
  const int starts[] = {window_start(tile.end - 1, problem), window_start(last, problem)};
  int far_pivots[2];
  count_below(far.pivots, problem.num_pivots, starts, far_pivots);
  const KeyList list = key_list_of(problem, far, tile.begin, tile.end, far_pivots[0]);
  const WarpView view =
      warp_view_of(problem, list, first, last, far_pivots[1], row + lane, far_end);
  if (lane == 0) context = {list, view};
  bar_warp_sync();
}

// Which of kEntries entries the rows of a lane's fragments see, a bit for each.
template <int kRowTiles, int kEntries>
struct VisibleEntries {
  static constexpr int kWords = (kEntries + 31) / 32;
  uint32_t words[kRowTiles][2][kWords];

  // The entries from `entry` on. position: of the lane's first row. far_end: see find_context.
  __device__ __forceinline__ VisibleEntries(const ThreeRegionProblem& problem, const KeyList& list,
                                            const WarpView& view, int far_end, int position,
                                            int entry) {
    const int lane = threadIdx.x % kWarpSize;
    const int base = entry + lane % 4 * 2;  // of the lane's columns; the entry of bit 0
    // The entries from `first` on.
    const auto from = [=](int first, int word) {
      return shl(~0u, max(first - base - 32 * word, 0));
    };
    const auto of_rows = [&](auto seen) {
#pragma unroll
      for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = 16 * rt + 8 * half, end = list.entry_of(position + row + 1);
          const auto bits = seen(row);
#pragma unroll
          for (int word = 0; word < kWords; ++word) {
            words[rt][half][word] = bits(word) & ~from(end, word);
          }
        }
      }
    };
    // Far keys, and the window up to the end of the list: no far key lies behind a row's own.
    const auto seen = [=](int far_end, int window_begin) {
      return [=](int word) {
        return (from(0, word) & ~from(far_end, word)) | from(window_begin, word);
      };
    };
    if (view.is_uniform) {
      const auto bits = seen(view.far_all, view.window_all_begin);
      of_rows([&](int) { return bits; });
    } else {
      of_rows([&](int row) {
        const int start = window_start(position + row, problem);
        return seen(shfl_idx(far_end, row + lane / 4), list.entry_of(start));
      });
    }
  }

  // Calls f(sees, rt, n, c) for element c of each fragment: row tile rt, columns 8 n .. 8 n + 7.
  template <typename Function>
  __device__ __forceinline__ void for_each(Function f) const {
#pragma unroll
    for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < kEntries / 8; ++n) {
          const uint32_t bits = words[rt][half][n / 4];
          f(bits & 1u << 8 * (n % 4), rt, n, 2 * half);
          f(bits & 2u << 8 * (n % 4), rt, n, 2 * half + 1);
        }
      }
    }
  }
};

// Weights are 2^(product scale + bias - max) in one multiply-add, which does not round the logit.
// The row's largest logit is rounded, though: beyond this, logits are rounded as well, so that no
// weight is far above one.
__device__ __forceinline__ bool is_large_logit(float logit) { return !(fabsf(logit) < 1024.f); }

// Products become logits in bits. column: the entry of the lane's first column.
template <int kRowTiles, int kColumns>
__device__ __forceinline__ void to_logits(float (&s)[kRowTiles][kColumns][4], float scale,
                                          const EntryBiases& biases, int column) {
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float bias = biases(column + 8 * n + c % 2);
#pragma unroll
      for (int rt = 0; rt < kRowTiles; ++rt) s[rt][n][c] = fmaf(s[rt][n][c], scale, bias);
    }
  }
}

// A tile of keys and its values in shared memory.
template <int kHeadDim, int kBlockN>
struct KeyStage {
  unsigned char k[kTileBytes<kHeadDim, kBlockN>];
  unsigned char v[kTileBytes<kHeadDim, kBlockN>];
};

// Two stages, and the positions of their keys.
template <int kHeadDim, int kBlockN>
struct KeyBuffers {
  KeyStage<kHeadDim, kBlockN> stages[2];
  int keys[2][kBlockN];
};

// Whether plain steps of a tile make one straight line, and q stays in registers. It takes all of
// them: at a head dim of 32, and on other architectures than sm_90, some would be spilled.
template <int kHeadDim>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr bool kMixesSteps = false;
#else
constexpr bool kMixesSteps = kHeadDim == 64;
#endif

// What a warp sees of the tiles of its block's list. Each lane knows it for one of 32 tiles.
template <int kBlockN>
struct SeenTiles {
  // A bit for each sixteen entries, of which some row sees one; and one more where all rows see all
  // entries of the tile, and these have one bias.
  static constexpr int kParts = kBlockN / 16, kWhole = (1 << kParts) - 1, kPlain = 1 << kParts;

  const WarpView& view;
  int of_lane;

  // The first one asked for begins at `entry`.
  __device__ __forceinline__ SeenTiles(const WarpView& warp_view, int entry) : view(warp_view) {
    find(entry);
  }

  // Of the tile that begins at `entry`, in front of the one asked for before.
  __device__ __forceinline__ int operator()(int entry) {
    const int turn = (entry >> kShift) & (kWarpSize - 1);
    if (turn == kWarpSize - 1) find(entry);
    return shfl_idx(of_lane, turn);
  }

 private:
  static constexpr int kShift = kBlockN == 64 ? 6 : 5;
  static_assert(1 << kShift == kBlockN);

  // Of the tile that begins at `entry`, and those in front of it.
  __device__ __forceinline__ void find(int entry) {
    const int lane = threadIdx.x % kWarpSize;
    const int begin = entry - (((entry >> kShift) - lane) & (kWarpSize - 1)) * kBlockN;
    const int end = begin + kBlockN;
    of_lane = view.all(begin, end) && view.has_one_bias(begin, end) ? kPlain : 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (view.any(begin + 16 * part, begin + 16 * part + 16)) of_lane |= 1 << part;
    }
  }
};

// Takes up what a warp sees of the tile that begins at `entry`, `tile` bytes behind the first stage:
// step(entries, is_plain, tile, entry) with the constants how many entries, and whether all rows see
// all of them, which have one bias. kMost, kFewest: entries of a step.
template <int kHeadDim, int kBlockN, int kMost, int kFewest, typename Step>
__device__ __forceinline__ void step_over(int seen, int tile, int entry, Step step) {
  constexpr int kHalf = 32;
  const auto masked_step = [&](auto entries, int first) {
    step(entries, std::false_type(), tile + first * kHeadDim * 2, entry + first);
  };
  const auto sees = [=](int first, int entries) {
    return (seen >> first / 16 & ((1 << entries / 16) - 1)) != 0;
  };
  if (seen & SeenTiles<kBlockN>::kPlain) {
    // In one line ptxas mixes the products of a step with those of the one before.
#pragma unroll(kMixesSteps<kHeadDim> ? kBlockN / kMost : 1)
    for (int first = 0; first < kBlockN; first += kMost) {
      if (first > 0) bar_warp_sync();
      step(std::integral_constant<int, kMost>(), std::true_type(), tile + first * kHeadDim * 2,
           entry + first);
    }
  } else if (kMost > kHalf && sees(0, kHalf) && sees(kHalf, kHalf)) {
    masked_step(std::integral_constant<int, kMost>(), 0);
  } else {
#pragma unroll 1
    for (int first = 0; first < kBlockN; first += kHalf) {
      if (!sees(first, kHalf)) continue;
      if (kFewest == kHalf || (sees(first, kFewest) && sees(first + kFewest, kFewest))) {
        masked_step(std::integral_constant<int, kHalf>(), first);
      } else {
        masked_step(std::integral_constant<int, kFewest>(),
                    sees(first, kFewest) ? first : first + kFewest);
      }
    }
  }
}

// Tiles of kBlockN entries of a key list, in two stages. Tiles are taken from the end of the list.
// While one is used, the next is copied, and the keys of the one after it are looked up.
template <int kHeadDim, int kBlockN, int kThreads>
struct KeyStages {
  using Items = TileItems<kHeadDim, kBlockN, kThreads>;
  using Buffers = KeyBuffers<kHeadDim, kBlockN>;

  const KeyList& list;
  Buffers& shared;
  const unsigned char *k, *v;  // the thread's first chunk of row 0
  int64_t k_bytes, v_bytes;    // from row to row
  int thread, first_row;       // in the block; of a tile, of those that the thread copies
  int offset;                  // of the thread's first chunk in a tile
  int stage = 0;               // of the next tile

  __device__ __forceinline__ KeyStages(const KeyList& key_list, Buffers& buffers,
                                       const ConstHeads& gK, const ConstHeads& gV, int batch,
                                       int kv_head)
      : list(key_list),
        shared(buffers),
        k(kept(Items::first_chunk(head_of(gK, batch, kv_head)))),
        v(kept(Items::first_chunk(head_of(gV, batch, kv_head)))),
        k_bytes(gK.stride.row * 2),
        v_bytes(gV.stride.row * 2),
        thread(int(threadIdx.x)),
        first_row(threadIdx.x / Items::kLanes),
        offset(Items::offset_of(threadIdx.x, 0)) {
    static_assert(Items::kPeriod == 1);
  }

  // Starts to look up the keys of the tile that begins at `entry`.
  __device__ __forceinline__ void find(int of_stage, int entry) {
    if (thread >= kBlockN) return;
    int& key = shared.keys[of_stage][thread];
    const int own = entry + thread;
    if (own >= list.num_text && own < list.num_far) {
      cp_async_4(&key, list.far.pivots + own - list.num_text, true);
    } else {
      key = own < list.num_text ? own : list.first_window + own - list.num_far;
    }
  }

  // Copies the tile whose row r holds key key_of(r). The first `absent` rows become zeros.
  template <bool kHasAbsent, typename KeyOf>
  __device__ __forceinline__ void copy(int of_stage, int absent, KeyOf key_of) {
    int keys[Items::kSteps];
#pragma unroll
    for (int step = 0; step < Items::kSteps; ++step) {
      keys[step] = key_of(first_row + step * Items::kStepRows);
    }
    auto& to = shared.stages[of_stage];
    const auto first = [&](int) { return offset; };
    const auto exists = [&](int step) {
      return !kHasAbsent || first_row + step * Items::kStepRows >= absent;
    };
    Items::for_each_from(first, [&](int at, int step, int chunk) {
      cp_async_16(to.k + at, row_at(k, k_bytes, keys[step]) + chunk * 16, exists(step));
    });
    Items::for_each_from(first, [&](int at, int step, int chunk) {
      cp_async_16(to.v + at, row_at(v, v_bytes, keys[step]) + chunk * 16, exists(step));
    });
  }

  // Of the tile that begins at `entry`.
  __device__ __forceinline__ void copy_found(int of_stage, int entry) {
    const auto key_of = [&](int row) { return list.far.clamp(shared.keys[of_stage][row]); };
    if (entry >= 0) {
      copy<false>(of_stage, 0, key_of);
    } else {
      copy<true>(of_stage, -entry, key_of);
    }
  }

  // The first tile: `size` entries of the list at its end are the keys up to `end`. Where they fill
  // the tile, it is copied before the list is known.
  __device__ __forceinline__ bool start_in_window(int size, int end) {
    if (size < kBlockN) return false;
    copy<false>(0, 0, [&](int row) { return end - kBlockN + row; });
    return true;
  }

  // Takes the list. has_started: what start_in_window gave.
  __device__ __forceinline__ void start(bool has_started) {
    if (!has_started) {
      find(0, list.size - kBlockN);
      cp_async_commit_group();
      cp_async_wait_group<0>();
      bar_sync();
      copy_found(0, list.size - kBlockN);
    }
    find(1, list.size - 2 * kBlockN);
    cp_async_commit_group();
  }

  // The tile that begins at `entry`: how far behind the first stage it lies, in bytes.
  __device__ __forceinline__ int wait(int entry) {
    const int tile = stage * int(sizeof(shared.stages[0]));
    stage ^= 1;
    cp_async_wait_group<0>();
    bar_sync();
    if (entry > 0) {
      copy_found(stage, entry - kBlockN);
      find(stage ^ 1, entry - 2 * kBlockN);
      cp_async_commit_group();
    }
    return tile;
  }
};

}  // namespace cogview::sm80
