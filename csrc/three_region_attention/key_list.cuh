// Which keys a tile of queries attends to: the key list, and which query sees which of its entries.
//
// Keys of the queries [begin, end), with start(i) the first key of query i's window:
//
//   entry  0 ............ num_text ............ num_far ........................ size
//   key    text prefix    | pivots < start      | start(begin) .... end - 1 (the window)
//
// Far keys ascend, so a query sees two ranges of entries: the far keys below its window, which are
// entries 0 .. far_end - 1, and its window up to itself. The queries of one query block (query_window
// of them) share far_end and the beginning of the window. Where a tile holds queries of several
// query blocks, a key may have two entries: far key of one query, window key of another.
//
// KeyList and WarpView lie in shared memory: they are the same for a whole block or warp, and
// registers are scarce.
#pragma once

#include <climits>

#include "../instructions/common.cuh"
#include "three_region_attention.h"

namespace cogview {

constexpr float kLog2e = 1.44269504f;

__device__ __forceinline__ int divide(int n, const Divisor& divisor) {
  return int(uint64_t(uint32_t(n)) * divisor.multiplier >> divisor.shift);
}

// First key of the window of the query at `position`.
__device__ __forceinline__ int window_start(int position, const ThreeRegionProblem& problem) {
  const int block = divide(position, problem.window_divisor);
  return max(0, block - problem.num_windows + 1) * problem.query_window;
}

// First query position whose window begins after `key`; k_len if there is none.
__device__ __forceinline__ int first_far_query(int key, const ThreeRegionProblem& problem) {
  const int block = divide(key, problem.window_divisor);
  const int64_t query = (int64_t(block) + problem.num_windows) * problem.query_window;
  return int(min(query, int64_t(problem.k_len)));
}

// How many of `size` ascending numbers lie below each bound. All lanes of the warp must call it.
template <int kBounds>
__device__ __forceinline__ void count_below(const int32_t* sorted, int size,
                                            const int (&bounds)[kBounds], int (&counts)[kBounds]) {
  const int lane = threadIdx.x % kWarpSize;
  // 32 segments, one to a lane: the segments whose last number lies below come first. They are the
  // same for all bounds.
  int step = (size + kWarpSize - 1) / kWarpSize;
  const int segment = lane * step;
  const int last = segment < size ? sorted[min(segment + step, size) - 1] : INT_MAX;
#pragma unroll
  for (int i = 0; i < kBounds; ++i) {
    counts[i] = min(popc(vote_ballot(last < bounds[i])) * step, size);
  }
  // Then the numbers of one segment but its last, in segments again where they are more than 32.
  int length = step - 1;
  while (length > kWarpSize) {
    step = (length + kWarpSize - 1) / kWarpSize;
#pragma unroll
    for (int i = 0; i < kBounds; ++i) {
      const int begin = counts[i] + lane * step, end = min(counts[i] + length, size);
      const bool below = begin < end && sorted[min(begin + step, end) - 1] < bounds[i];
      counts[i] = min(counts[i] + popc(vote_ballot(below)) * step, end);
    }
    length = step - 1;
  }
#pragma unroll
  for (int i = 0; i < kBounds; ++i) {
    const int index = counts[i] + lane;
    const bool below = lane < length && index < size && sorted[index] < bounds[i];
    counts[i] += popc(vote_ballot(below));
  }
}

__device__ __forceinline__ int count_below(const int32_t* sorted, int size, int bound) {
  int counts[1];
  count_below(sorted, size, {bound}, counts);
  return counts[0];
}

// The same for a bound of the lane's own.
__device__ __forceinline__ int count_below_alone(const int32_t* sorted, int size, int bound) {
  int begin = 0, end = size;
  while (begin < end) {
    const int middle = (begin + end) / 2;
    if (sorted[middle] < bound) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// The text length and the pivots of a sample's key/value head, as packed by three_region_attention_far_keys.
struct FarKeys {
  const int32_t* pivots;
  int num_pivots;
  int text_len;
  int k_len;

  // A key inside k and v, whatever the table holds.
  __device__ __forceinline__ int clamp(int key) const { return min(max(key, 0), k_len - 1); }
  __device__ __forceinline__ int pivot(int index) const { return clamp(pivots[index]); }
};

__device__ __forceinline__ FarKeys far_keys_of(const ThreeRegionProblem& problem, int batch,
                                               int kv_head) {
  const int row = batch * problem.far_key_heads + min(kv_head, problem.far_key_heads - 1);
  const int32_t* packed = problem.far_keys + int64_t(row) * (2 + problem.num_pivots);
  return {packed + 2, min(max(packed[1], 0), problem.num_pivots),
          min(max(packed[0], 0), problem.k_len), problem.k_len};
}

struct KeyList {
  FarKeys far;
  int num_text;
  int num_far;
  int first_window;  // key of entry num_far
  int last_start;    // window_start of the last query
  int size;

  // Key at an entry in [0, size).
  __device__ __forceinline__ int key(int entry) const {
    int key = entry < num_text ? entry : first_window + entry - num_far;
    if (entry >= num_text && entry < num_far) key = far.pivots[entry - num_text];
    return far.clamp(key);
  }

  // The entry of a window key.
  __device__ __forceinline__ int entry_of(int key) const { return num_far - first_window + key; }
};

// The list of the queries at positions [begin, end), at least one. far_pivots: how many pivots lie in
// front of the window of the last one.
__device__ __forceinline__ KeyList key_list_of(const ThreeRegionProblem& problem,
                                               const FarKeys& far, int begin, int end,
                                               int far_pivots) {
  KeyList list;
  list.far = far;
  list.last_start = window_start(end - 1, problem);
  list.num_text = min(far.text_len, list.last_start);
  list.num_far = list.num_text + min(far_pivots, far.num_pivots);
  list.first_window = window_start(begin, problem);
  list.size = list.num_far + end - list.first_window;
  return list;
}

// The same, with a search for the pivots. Whole warps must call it.
__device__ __forceinline__ KeyList key_list_of(const ThreeRegionProblem& problem, int batch,
                                               int kv_head, int begin, int end) {
  const FarKeys far = far_keys_of(problem, batch, kv_head);
  const int start = window_start(end - 1, problem);
  return key_list_of(problem, far, begin, end, count_below(far.pivots, problem.num_pivots, start));
}

// What the queries of one warp see of a key list: entries that some and that all of them see.
struct WarpView {
  int far_some, far_all;  // from entry 0 on
  int window_some_begin, window_some_end;
  int window_all_begin, window_all_end;
  // First entries of pivots and window where the bias in front of them differs, else INT32_MIN.
  int pivot_edge, window_edge;
  float text_bias, pivot_bias;  // in bits
  bool is_uniform;              // the windows of all queries begin at the same key

  // Whether any of the queries sees any of the entries [begin, end).
  __device__ __forceinline__ bool any(int begin, int end) const {
    return (max(begin, 0) < min(end, far_some)) |
           (max(begin, window_some_begin) < min(end, window_some_end));
  }

  // Whether all of the queries see all of the entries.
  __device__ __forceinline__ bool all(int begin, int end) const {
    const auto overlap = [=](int from, int to) { return max(min(end, to) - max(begin, from), 0); };
    return overlap(0, far_all) + overlap(window_all_begin, window_all_end) == end - begin;
  }

  // Whether the entries have one bias.
  __device__ __forceinline__ bool has_one_bias(int begin, int end) const {
    const auto inside = [=](int edge) { return (begin < edge) & (edge < end); };
    return !(inside(pivot_edge) | inside(window_edge));
  }
};

// The biases of a key list's entries, in bits. In registers, since every column may ask for its own.
struct EntryBiases {
  int num_text, num_far;
  float text, pivot;

  __device__ __forceinline__ EntryBiases(const KeyList& list, const WarpView& view)
      : num_text(list.num_text),
        num_far(list.num_far),
        text(view.text_bias),
        pivot(view.pivot_bias) {}

  __device__ __forceinline__ float operator()(int entry) const {
    const float far = entry < num_text ? text : pivot;
    return entry < num_far ? far : 0.f;
  }
};

// A warp's own copy of list and view.
struct alignas(16) KeyContext {
  KeyList list;
  WarpView view;
};

// The view of the list's queries at positions [first, last]; they see nothing if first > last.
// far_pivots: how many pivots lie in front of the window of `last`. far_end: receives how many far
// keys the query nearest to the lane's `position` sees; positions are those of consecutive queries
// from `first` or before to `last` or behind. Whole warps must call it.
__device__ __forceinline__ WarpView warp_view_of(const ThreeRegionProblem& problem,
                                                 const KeyList& list, int first, int last,
                                                 int far_pivots, int position, int& far_end) {
  const int first_start = window_start(first, problem), last_start = window_start(last, problem);
  WarpView view;
  view.is_uniform = first_start == last_start;
  far_end = min(last_start, list.num_text) + min(far_pivots, list.num_far - list.num_text);
  view.far_some = view.far_all = far_end;
  if (!view.is_uniform && first <= last) {
    const int start = window_start(min(max(position, first), last), problem);
    far_end = min(start, list.num_text) +
              count_below_alone(list.far.pivots, list.num_far - list.num_text, start);
    view.far_all = shfl_idx(far_end, 0);
  }
  view.window_some_begin = list.entry_of(first_start);
  view.window_some_end = list.entry_of(last + 1);
  view.window_all_begin = list.entry_of(last_start);
  view.window_all_end = list.entry_of(first + 1);
  if (first > last) view = {};
  view.text_bias = problem.text_bias * kLog2e;
  view.pivot_bias = problem.pivot_bias * kLog2e;
  view.pivot_edge = view.text_bias == view.pivot_bias ? INT32_MIN : list.num_text;
  const bool has_bias = view.text_bias != 0.f || view.pivot_bias != 0.f;
  view.window_edge = has_bias ? list.num_far : INT32_MIN;
  return view;
}

}  // namespace cogview
