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

  static int64_t num_blocks(const ThreeRegionProblem& problem) {
    const int first_tile = (problem.k_len - problem.q_len) / kBlockM;
    const int num_tiles = (problem.k_len - 1) / kBlockM - first_tile + 1;
    return int64_t(problem.batch) * problem.num_heads * num_tiles;
  }

  __device__ __forceinline__ explicit QueryTile(const ThreeRegionProblem& problem) {
    first = problem.k_len - problem.q_len;
    const int last_tile = (problem.k_len - 1) / kBlockM;
    const unsigned num_tiles = last_tile - first / kBlockM + 1;
    origin = (last_tile - int(blockIdx.x % num_tiles)) * kBlockM;
    begin = max(origin, first);
    end = min(origin + kBlockM, problem.k_len);
    head_idx = int(blockIdx.x / num_tiles);
    batch = head_idx / problem.num_heads;
    head = head_idx % problem.num_heads;
    kv_head = head / (problem.num_heads / problem.num_kv_heads);
  }

  // Row of q and out; -1 where the tile's row holds no query.
  __device__ __forceinline__ int row(int tile_row) const {
    const int position = origin + tile_row;
    return position >= begin && position < end ? position - first : -1;
  }
};

// The key list of a block's tile and what a warp sees of it: a warp's own copy in shared memory.
template <int kWarps, int kBlockM>
__device__ __forceinline__ const WarpContext& warp_context(const ThreeRegionProblem& problem,
                                                           const QueryTile<kBlockM>& tile) {
  constexpr int kWarpRows = kBlockM / kWarps;
  const int warp = threadIdx.x / kWarpSize, row = tile.origin + warp * kWarpRows;
  WarpContext& context = shared_array<WarpContext, kWarps>()[warp];
  const KeyList list = key_list_of(problem, tile.batch, tile.begin, tile.end);
  const WarpView view =
      warp_view_of(problem, list, max(row, tile.begin), min(row + kWarpRows, tile.end) - 1);
  if (threadIdx.x % kWarpSize == 0) context = {list, view};
  bar_warp_sync();
  return context;
}

// A tile of keys and its values in shared memory.
template <int kHeadDim, int kBlockN>
struct KeyStage {
  unsigned char k[kTileBytes<kHeadDim, kBlockN>];
  unsigned char v[kTileBytes<kHeadDim, kBlockN>];
};

// Tiles of kBlockN entries of a key list, in two stages. Tiles are taken from the end of the list.
// While one is used, the next is copied, and the keys of the one after it are looked up.
template <int kHeadDim, int kBlockN, int kThreads>
struct KeyStages {
  using Stage = KeyStage<kHeadDim, kBlockN>;

  const KeyList& list;
  static constexpr int kTile = kTileBytes<kHeadDim, kBlockN>;
  unsigned char* stages;
  int* keys;  // of both stages
  const uint16_t *k, *v;
  int64_t k_stride, v_stride;
  int stage = 0;  // of the next tile

  __device__ __forceinline__ KeyStages(const KeyList& key_list, Stage (&shared)[2],
                                       const ConstHeads& gK, const ConstHeads& gV, int batch,
                                       int kv_head)
      : list(key_list),
        stages(shared[0].k),
        keys(shared_array<int, 2 * kBlockN>()),
        k(head_of(gK, batch, kv_head)),
        v(head_of(gV, batch, kv_head)),
        k_stride(gK.stride.row),
        v_stride(gV.stride.row) {}

  // Look up the keys of the tile that begins at `entry`.
  __device__ __forceinline__ void find(int of_stage, int entry) {
    const int row = threadIdx.x;
    if (row < kBlockN) keys[of_stage * kBlockN + row] = list.key(entry + row);
  }

  __device__ __forceinline__ void copy(int of_stage) {
    const auto key_of = [&](int row) { return keys[of_stage * kBlockN + row]; };
    unsigned char* tile = stages + of_stage * 2 * kTile;
    copy_rows<kHeadDim, kBlockN, kThreads>(tile, k, k_stride, key_of);
    copy_rows<kHeadDim, kBlockN, kThreads>(tile + kTile, v, v_stride, key_of);
    cp_async_commit_group();
  }

  __device__ __forceinline__ void start() {
    find(0, list.size - kBlockN);
    bar_sync();
    copy(0);
    find(1, list.size - 2 * kBlockN);
  }

  // The tile that begins at `entry`.
  __device__ __forceinline__ const Stage& wait(int entry) {
    cp_async_wait_group<0>();
    bar_sync();
    const unsigned char* tile = stages + stage * 2 * kTile;
    stage ^= 1;
    if (entry > 0) {
      copy(stage);
      find(stage ^ 1, entry - 2 * kBlockN);
    }
    return *reinterpret_cast<const Stage*>(tile);
  }
};

}  // namespace cogview::sm80
