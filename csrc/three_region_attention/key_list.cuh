// Which keys a tile of queries attends to: the key list, and which query sees which of its entries.
//
// Keys of the queries [begin, end), with start(i) the first key of query i's window:
//
//   entry  0 ............ num_text ............ num_far ........................ size
//   key    text prefix    | pivots < start      | start(begin) .... end - 1 (the window)
//
// All queries of one query block (query_window of them) see all text and pivot entries. Where a
// tile holds queries of several query blocks, some entries are seen by a part of them only, and a
// key may have two entries: far key of one query, window key of another.
//
// KeyList and WarpView lie in shared memory: they are the same for a whole block or warp, and
// registers are scarce.
#pragma once

#include "../instructions/common.cuh"
#include "three_region_attention.h"

namespace cogview {

constexpr float kLog2e = 1.44269504f;

// First key of the window of the query at `position`.
__device__ __forceinline__ int window_start(int position, const ThreeRegionProblem& problem) {
  const int block = int(unsigned(position) / unsigned(problem.query_window));
  return max(0, block - problem.num_windows + 1) * problem.query_window;
}

// First query position whose window begins after `key`; k_len if there is none.
__device__ __forceinline__ int first_far_query(int key, const ThreeRegionProblem& problem) {
  const int block = int(unsigned(key) / unsigned(problem.query_window));
  const int64_t query = (int64_t(block) + problem.num_windows) * problem.query_window;
  return int(min(query, int64_t(problem.k_len)));
}

// How many of `size` ascending numbers lie below `bound`. All lanes of the warp must call it.
__device__ __forceinline__ int count_below(const int32_t* sorted, int size, int bound) {
  const int lane = threadIdx.x % kWarpSize;
  int begin = 0, end = size;  // the answer lies in [begin, end]
  while (begin < end) {
    // 32 segments, one to a lane: the segments whose last number lies below come first.
    const int step = (end - begin + kWarpSize - 1) / kWarpSize;
    const int segment = begin + lane * step;
    const bool below = segment < end && sorted[min(segment + step, end) - 1] < bound;
    begin = min(begin + popc(vote_ballot(below)) * step, end);
    end = min(begin + step, end) - (begin < end ? 1 : 0);
  }
  return begin;
}

// The text length and the pivots of a sample, as packed by three_region_attention_far_keys.
struct FarKeys {
  const int32_t* pivots;
  int num_pivots;
  int text_len;
  int k_len;

  // A key inside k and v, whatever the table holds.
  __device__ __forceinline__ int pivot(int index) const {
    return min(max(pivots[index], 0), k_len - 1);
  }
};

__device__ __forceinline__ FarKeys far_keys_of(const ThreeRegionProblem& problem, int batch) {
  const int32_t* packed = problem.far_keys + int64_t(batch) * (2 + problem.num_pivots);
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

  // Key at an entry; -1 in front of the list.
  __device__ __forceinline__ int key(int entry) const {
    if (entry < num_text) return max(entry, -1);
    if (entry < num_far) return far.pivot(entry - num_text);
    return first_window + entry - num_far;
  }
};

// The list of the queries at positions [begin, end), at least one. Whole warps must call it.
__device__ __forceinline__ KeyList key_list_of(const ThreeRegionProblem& problem, int batch,
                                               int begin, int end) {
  KeyList list;
  list.far = far_keys_of(problem, batch);
  list.last_start = window_start(end - 1, problem);
  list.num_text = min(list.far.text_len, list.last_start);
  list.num_far = list.num_text + count_below(list.far.pivots, list.far.num_pivots, list.last_start);
  list.first_window = window_start(begin, problem);
  list.size = list.num_far + end - list.first_window;
  return list;
}

// What the queries of one warp see of a key list: entries that some and that all of them see.
struct WarpView {
  int text_some, text_all;      // from entry 0 on
  int pivots_some, pivots_all;  // from entry num_text on
  int window_some_begin, window_some_end;
  int window_all_begin, window_all_end;
  float text_bias, pivot_bias;  // in bits

  // Whether any of the queries sees any of the entries [begin, end).
  __device__ __forceinline__ bool any(const KeyList& list, int begin, int end) const {
    const auto meets = [=](int from, int to) { return max(begin, from) < min(end, to); };
    return meets(0, text_some) || meets(list.num_text, pivots_some) ||
           meets(window_some_begin, window_some_end);
  }

  // Whether all of the queries see all of the entries, with one bias.
  __device__ __forceinline__ bool plain(const KeyList& list, int begin, int end) const {
    const auto overlap = [=](int from, int to) { return max(min(end, to) - max(begin, from), 0); };
    const int text = overlap(0, text_all), pivots = overlap(list.num_text, pivots_all);
    const int window = overlap(window_all_begin, window_all_end);
    const int size = end - begin;
    return text + pivots + window == size &&
           ((text_bias == 0.f && pivot_bias == 0.f) || text == size || window == size ||
            pivots == size || (text_bias == pivot_bias && window == 0));
  }

  __device__ __forceinline__ float bias(const KeyList& list, int entry) const {
    if (entry >= list.num_far) return 0.f;
    return entry < list.num_text ? text_bias : pivot_bias;
  }
};

// A warp's own copy of list and view.
struct WarpContext {
  KeyList list;
  WarpView view;
};

// The view of the list's queries at positions [first, last]; they see nothing if first > last.
// Whole warps must call it.
__device__ __forceinline__ WarpView warp_view_of(const ThreeRegionProblem& problem,
                                                 const KeyList& list, int first, int last) {
  const int first_start = window_start(first, problem), last_start = window_start(last, problem);
  const auto pivots_before = [&](int start) {
    if (start == list.last_start) return list.num_far;
    return list.num_text + count_below(list.far.pivots, list.num_far - list.num_text, start);
  };
  WarpView view;
  view.text_some = min(list.num_text, last_start);
  view.text_all = min(list.num_text, first_start);
  view.pivots_some = pivots_before(last_start);
  view.pivots_all = first_start == last_start ? view.pivots_some : pivots_before(first_start);
  const int window = list.num_far - list.first_window;  // from key to entry
  view.window_some_begin = window + first_start;
  view.window_some_end = window + last + 1;
  view.window_all_begin = window + last_start;
  view.window_all_end = window + first + 1;
  if (first > last) view = {};
  view.text_bias = problem.text_bias * kLog2e;
  view.pivot_bias = problem.pivot_bias * kLog2e;
  return view;
}

}  // namespace cogview
