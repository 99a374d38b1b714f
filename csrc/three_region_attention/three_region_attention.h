// Launch interface of the three-region attention kernels. Plain C++: no torch, no device code.
#pragma once

#include <optional>
#include <string>

#include "../launch.h"

namespace cogview {

// Element strides of a tensor (batch, heads, rows, head_dim) whose last dimension is contiguous.
struct HeadStrides {
  int64_t batch;
  int64_t head;
  int64_t row;
};

// A tensor (batch, heads, rows, head_dim); rows begin at multiples of 16 bytes.
struct ConstHeads {
  const void* data;
  HeadStrides stride;
};
struct Heads {
  void* data;
  HeadStrides stride;
};

// Divides numbers in [0, 2^31) by a positive number that the host knows, with a product and a shift
// (divide() in key_list.cuh).
struct Divisor {
  uint32_t multiplier;
  int shift;

  // With 2^(bits - 1) < divisor <= 2^bits, n multiplier / 2^(31 + bits) exceeds n / divisor by less
  // than 1 / divisor.
  static Divisor of(int divisor) {
    int bits = 0;
    while (int64_t{1} << bits < divisor) ++bits;
    const uint64_t power = uint64_t{1} << (31 + bits);
    return {uint32_t((power + divisor - 1) / divisor), 31 + bits};
  }
};

// What every launch knows of the problem.
struct ThreeRegionProblem {
  int batch;
  int num_heads;
  int num_kv_heads;  // divides num_heads
  int q_len;         // queries are the last q_len positions of the keys
  int k_len;         // at most 2^30
  int head_dim;      // one that a family takes: three_region_attention_unsupported
  DType dtype;       // of q, k, v, out and their gradients: float16 or bfloat16
  int num_pivots;    // columns of the pivot table, the largest number of pivots in a sample
  int query_window;  // w, at most max(k_len, 1)
  Divisor window_divisor, head_divisor;  // of query_window, num_heads
  Divisor group_divisor;                 // of num_heads / num_kv_heads
  Divisor tile_divisor;  // of a head's tiles: set by the launch of kernels that own query rows
  int num_windows;       // n, key_window_times, at most k_len / w + 1
  float softmax_scale;
  float text_bias;    // nats
  float pivot_bias;   // nats
  int far_key_heads;  // num_kv_heads, or 1 where they share far_keys
  // (batch, far_key_heads, 2 + num_pivots): text length in [0, k_len], number of pivots, then the
  // pivots, ascending, unique, in [text length, k_len). Written by three_region_attention_far_keys.
  const int32_t* far_keys;
};

// Packs the text lengths and the pivots that count. Any values are safe. An entry counts if it lies
// in [text_len, k_len) and above all entries before it that count.
struct ThreeRegionFarKeysParams {
  int batch;
  int num_heads;         // 1, or that of keys and values where each has pivots of its own
  Divisor head_divisor;  // of num_heads
  int num_pivots;
  int k_len;
  const int32_t* text_len;  // (batch), text_len_stride apart
  int64_t text_len_stride;
  const int32_t* pivot_idx;  // (batch, num_heads, num_pivots)
  int64_t pivot_batch_stride;
  int64_t pivot_head_stride;
  int64_t pivot_stride;
  int32_t* far_keys;  // (batch, num_heads, 2 + num_pivots)
};

struct ThreeRegionForwardParams {
  ThreeRegionProblem problem;
  ConstHeads q;        // (batch, num_heads, q_len, head_dim)
  ConstHeads k;        // (batch, num_kv_heads, k_len, head_dim)
  ConstHeads v;        // as k
  Heads out;           // as q
  float* row_max;      // (batch, num_heads, q_len): largest logit of the row, in bits (log2)
  float* row_log_sum;  // as row_max: log2 of the sum of 2^(logit - row_max)
  // (batch), may be null: the first kv_lens[b] rows of k and v are the keys of sample b, and its
  // queries are the last of their positions. Rows without a position get zeros and an lse of -inf.
  // Any values are safe.
  const int32_t* kv_lens;
  // Up to `num_splits` blocks share the keys of few queries. Their float32 sums go to `partial`
  // (num_splits, batch, num_heads, q_len, head_dim + 4). May be null where num_splits is 1.
  int num_splits;
  float* partial;
};

// The num_splits of a forward that make use of a GPU with num_sms multiprocessors.
int three_region_attention_forward_splits(const ThreeRegionProblem& problem, bool has_kv_lens,
                                          int num_sms);

struct ThreeRegionBackwardParams {
  ThreeRegionProblem problem;
  ConstHeads q, k, v, out;   // as in the forward
  ConstHeads dout;           // as q
  const float* dlse;         // (batch, num_heads, q_len), may be null: zero
  const float* row_max;      // from the forward
  const float* row_log_sum;  // from the forward
  Heads dq, dk, dv;          // as q, k, v
  float* delta;              // (batch, num_heads, q_len), workspace: sum(dout * out) - dlse
  // float16 only, workspace, zeroed by the caller: bits of the largest |row| of dout and the
  // largest |delta| (batch, num_heads, 2), then of the largest |row| of v (batch, num_kv_heads).
  uint32_t* bounds;
  // `num_splits` blocks share the queries of the keys that many queries see. Their float32 sums of
  // dk and dv go to `partial` (num_splits, 2, batch, num_kv_heads, num_split_rows, head_dim), where
  // num_split_rows = three_region_attention_split_rows(...). May be null where num_splits is 1.
  int num_splits;
  float* partial;
};

// Rows of `partial` for each split, batch and head.
int three_region_attention_split_rows(const ThreeRegionProblem& problem);

// Compute capability of a GPU.
struct Device {
  int major;
  int minor;
};

// Of the GPU with this index; zeros where the runtime does not know it.
Device device_of(int index);

// Why no family of kernels takes the problem on the device; none if one does. Depends on head_dim.
std::optional<std::string> three_region_attention_unsupported(const ThreeRegionProblem& problem,
                                                              const Device& device);

// Launches on the current device. All return the status of their launches; the caller has checked
// the arguments, three_region_attention_unsupported included.
cudaError_t three_region_attention_far_keys(const ThreeRegionFarKeysParams& params,
                                            cudaStream_t stream);
cudaError_t three_region_attention_forward(const ThreeRegionForwardParams& params,
                                           cudaStream_t stream);
cudaError_t three_region_attention_backward(const ThreeRegionBackwardParams& params,
                                            cudaStream_t stream);

}  // namespace cogview
