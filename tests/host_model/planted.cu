// Kernels for test_host_model.py. The first ones have one bug each, which the host model must find. The
// others are right, and show that instructions do what the PTX manual says.
//
// `in` and `out` hold 64 floats, unless a kernel says otherwise.

#include <cstring>
#include <map>
#include <string>

#include "host_model/report.h"
#include "instructions/sm80.cuh"
#include "instructions/sm90.cuh"

namespace cogview::sm80 {
namespace {

// As kernels of a family are named.
template <typename Params>
__global__ void kernel_of_a_family(const Params p) {
  p.out[64] = 1.f;
}

}  // namespace
}  // namespace cogview::sm80

namespace cogview {
namespace {

struct Params {
  const void* a;
  const void* b;
  float* out;
  __device__ const float* in() const { return static_cast<const float*>(a); }
};

#define KERNEL(name) __global__ void name(const Params p)

// Races

KERNEL(race_read) {  // two warps, no barrier
  float* s = shared_array<float, 64>();
  s[threadIdx.x] = 1.f;
  p.out[threadIdx.x] = s[threadIdx.x % 32];
}

KERNEL(race_write) {  // two warps write the same number
  float* s = shared_array<float, 64>();
  s[threadIdx.x % 32] = 1.f;
  bar_sync();
  p.out[threadIdx.x] = s[threadIdx.x % 32];
}

KERNEL(race_write_after_read) {
  float* s = shared_array<float, 64>();
  s[threadIdx.x] = 1.f;
  bar_sync();
  if (threadIdx.x >= 32) p.out[threadIdx.x] = s[threadIdx.x - 32];
  if (threadIdx.x < 32) s[threadIdx.x] = 2.f;
}

KERNEL(race_write_after_reads_of_warps) {
  float* s = shared_array<float, 64>();
  s[threadIdx.x] = 1.f;
  bar_sync();
  p.out[threadIdx.x] = s[0];
  if (threadIdx.x == 31) s[0] = 2.f;
}

KERNEL(race_write_after_reads_of_a_warp) {
  float* s = shared_array<float, 64>();
  s[threadIdx.x] = 1.f;
  bar_sync();
  p.out[threadIdx.x] = s[threadIdx.x / 32];
  if (threadIdx.x == 62) s[1] = 2.f;
}

KERNEL(race_in_warp) {  // a shuffle does not order memory accesses
  float* s = shared_array<float, 64>();
  s[threadIdx.x] = 1.f;
  const float one = shfl_bfly(1.f, 1);
  p.out[threadIdx.x] = s[threadIdx.x ^ 1] * one;
}

KERNEL(race_between_warps) {  // bar.warp.sync orders one warp only
  float* s = shared_array<float, 64>();
  s[threadIdx.x] = 1.f;
  bar_warp_sync();
  p.out[threadIdx.x] = s[threadIdx.x / 32 == 0 ? threadIdx.x ^ 1 : threadIdx.x - 32];
}

KERNEL(race_between_groups) {  // a barrier of some warps orders these alone
  float* s = shared_array<float, 128>();
  s[threadIdx.x] = 1.f;
  bar_sync(1 + int(threadIdx.x) / 64, 64);
  if (threadIdx.x == 64) p.out[0] = s[32];
}

KERNEL(race_in_group) {  // one buffer, and one barrier in each turn
  float* s = shared_array<float, 128>();
  for (int i = 0; i < 2; ++i) {
    s[threadIdx.x] = 1.f;
    bar_sync(1 + int(threadIdx.x) / 64, 64);
    p.out[threadIdx.x] = s[threadIdx.x ^ 32];
  }
}

KERNEL(race_write_after_reads_of_groups) {
  float* s = shared_array<float, 128>();
  s[threadIdx.x] = 1.f;
  bar_sync();
  p.out[threadIdx.x % 64] = s[0];
  bar_sync(1 + int(threadIdx.x) / 64, 64);
  if (threadIdx.x == 127) s[0] = 2.f;
}

KERNEL(race_after_other_group) {  // warp 1 knows what warp 2 did before barrier 1, and no more
  float* s = shared_array<float, 96>();
  const unsigned warp = threadIdx.x / 32;
  if (warp != 0) bar_sync(1, 64);
  s[threadIdx.x] = 1.f;
  if (warp != 2) bar_sync(2, 64);
  if (threadIdx.x == 0) p.out[0] = s[32] + s[64];
}

// Collectives

KERNEL(barrier_at_two_places) {
  if (threadIdx.x < 32) {
    bar_sync();
  } else {
    bar_sync();
  }
  p.out[threadIdx.x] = 1.f;
}

KERNEL(barrier_after_return) {
  if (threadIdx.x < 32) return;
  bar_sync();
}

KERNEL(barrier_in_loop) {
  const int turns = threadIdx.x < 32 ? 2 : 3;
  for (int i = 0; i < turns; ++i) bar_sync();
}

KERNEL(barrier_for_half_a_warp) {
  if (threadIdx.x % 32 < 16) bar_sync();
  p.out[threadIdx.x] = shfl_bfly(1.f, 1);
}

KERNEL(group_of_half_a_warp) {
  if (threadIdx.x % 32 < 16) bar_sync(1, 64);
  p.out[threadIdx.x] = shfl_bfly(1.f, 1);
}

KERNEL(group_of_lanes_that_return) {
  if (threadIdx.x % 32 < 16) bar_sync(1, 64);
}

KERNEL(group_of_odd_lanes) { bar_sync(1 + int(threadIdx.x) % 2, 32); }

KERNEL(group_at_two_places) {
  if (threadIdx.x < 32) {
    bar_sync(1, 64);
  } else {
    bar_sync(1, 64);
  }
}

KERNEL(group_of_two_counts) { bar_sync(1, threadIdx.x < 32 ? 64 : 96); }

KERNEL(group_of_half_warps) { bar_sync(1, 48); }

KERNEL(group_larger_than_the_block) { bar_sync(1, 96); }

KERNEL(group_at_the_barrier_of_the_block) { bar_sync(0, 64); }

KERNEL(group_at_barrier_16) { bar_sync(16, 64); }

KERNEL(groups_at_one_barrier) {  // warps 0 and 1, 2 and 3; but 0 might meet 2
  bar_sync(1, 64);
}

KERNEL(group_without_a_warp) {
  if (threadIdx.x < 32) bar_sync(3, 64);
}

KERNEL(group_with_a_warp_elsewhere) {
  if (threadIdx.x < 32) bar_sync(3, 64);
  bar_sync();
}

KERNEL(group_with_a_warp_in_another) {
  if (threadIdx.x < 32) {
    bar_sync(3, 64);
  } else {
    bar_sync(4, 64);
  }
}

KERNEL(shuffle_after_return) {
  if (threadIdx.x % 32 >= 16) return;
  p.out[threadIdx.x] = shfl_bfly(1.f, 1);
}

KERNEL(return_before_shuffle) {
  if (threadIdx.x % 32 < 16) p.out[threadIdx.x] = shfl_bfly(1.f, 1);
}

KERNEL(shuffle_at_two_places) {
  float value;
  if (threadIdx.x % 2 == 0) {
    value = shfl_bfly(1.f, 1);
  } else {
    value = shfl_bfly(1.f, 1);
  }
  p.out[threadIdx.x] = value;
}

KERNEL(shuffle_from_nowhere) { p.out[threadIdx.x] = float(shfl_idx(1, threadIdx.x + 1)); }

// Bounds

KERNEL(global_read_out_of_bounds) { p.out[threadIdx.x] = p.in()[threadIdx.x + 1]; }

KERNEL(global_write_out_of_bounds) { p.out[int(threadIdx.x) - 1] = 1.f; }

KERNEL(global_vector_out_of_bounds) {
  float four[4];
  load_vector(p.in() + 4 * threadIdx.x, four);
  p.out[threadIdx.x] = four[0];
}

KERNEL(input_written) { const_cast<float*>(p.in())[threadIdx.x] = 1.f; }

KERNEL(cp_async_out_of_bounds) {
  float* s = shared_array<float, 64>();
  cp_async_4(s + threadIdx.x, p.in() + threadIdx.x + 1, true);
}

KERNEL(shared_out_of_bounds) {
  float* s = shared_array<float, 64>();
  s[threadIdx.x + 1] = 1.f;
}

KERNEL(dynamic_shared_out_of_bounds) {
  float* s = reinterpret_cast<float*>(dynamic_shared());
  s[threadIdx.x + 1] = 1.f;
}

KERNEL(shared_straddled) {  // the last four bytes lie half inside
  Half* s = shared_array<Half, 129>();
  reinterpret_cast<float*>(s)[threadIdx.x + 1] = 1.f;
}

// Values that nobody wrote

KERNEL(shared_never_written) {
  float* s = shared_array<float, 64>();
  if (threadIdx.x != 7) s[threadIdx.x] = 1.f;
  bar_sync();
  p.out[threadIdx.x] = s[threadIdx.x];
}

KERNEL(shared_of_the_block_before) {
  float* s = shared_array<float, 64>();
  if (blockIdx.x == 0) s[threadIdx.x] = 1.f;
  bar_sync();
  const float value = s[threadIdx.x];
  if (blockIdx.x == 0 || value != 1.f) p.out[threadIdx.x] = value;
}

KERNEL(output_never_written) {
  if (threadIdx.x != 9) p.out[threadIdx.x] = 1.f;
}

KERNEL(output_read_before_written) { p.out[threadIdx.x] += 1.f; }

KERNEL(two_blocks_write) {
  if (blockIdx.x == 0 || threadIdx.x == 5) p.out[threadIdx.x] = 1.f;
}

KERNEL(two_blocks_share) {
  if (blockIdx.x == 0) p.out[threadIdx.x] = 1.f;
  if (blockIdx.x == 1 && p.out[3] == 0.f) bar_sync();
}

// Copies

KERNEL(copy_not_waited_for) {
  float* s = shared_array<float, 64>();
  cp_async_4(s + threadIdx.x, p.in() + threadIdx.x, true);
  cp_async_commit_group();
  cp_async_wait_group<1>();
  p.out[threadIdx.x] = s[threadIdx.x];
}

KERNEL(copy_not_committed) {
  float* s = shared_array<float, 64>();
  cp_async_4(s + threadIdx.x, p.in() + threadIdx.x, true);
  cp_async_wait_group<0>();
  p.out[threadIdx.x] = s[threadIdx.x];
}

KERNEL(copy_of_another_thread) {  // each thread waits for its own copies only
  float* s = shared_array<float, 64>();
  cp_async_4(s + threadIdx.x, p.in() + threadIdx.x, true);
  cp_async_commit_group();
  const float one = shfl_bfly(1.f, 1);
  cp_async_wait_group<0>();
  p.out[threadIdx.x] = s[threadIdx.x ^ 1] * one;
}

KERNEL(copy_without_barrier) {  // warp 0 waits, and warp 1 does not wait for warp 0
  float* s = shared_array<float, 64>();
  if (threadIdx.x < 32) {
    cp_async_4(s + threadIdx.x, p.in() + threadIdx.x, true);
    cp_async_commit_group();
    cp_async_wait_group<0>();
  }
  p.out[threadIdx.x] = s[threadIdx.x % 32];
}

KERNEL(copy_over_a_read) {  // a copy starts while another warp may still read
  float* s = shared_array<float, 64>();
  s[threadIdx.x] = 1.f;
  bar_sync();
  if (threadIdx.x >= 32) p.out[threadIdx.x] = s[threadIdx.x - 32];
  if (threadIdx.x < 32) cp_async_4(s + threadIdx.x, p.in() + threadIdx.x, true);
}

KERNEL(write_over_a_copy) {
  float* s = shared_array<float, 64>();
  cp_async_4(s + threadIdx.x, p.in() + threadIdx.x, true);
  s[threadIdx.x] = 1.f;
}

// Alignment

KERNEL(misaligned_load) {
  float four[4];
  load_vector(p.in() + threadIdx.x % 32 + 1, four);
  p.out[threadIdx.x] = four[0];
}

KERNEL(misaligned_store) {
  if (threadIdx.x == 0) st_global_v4(p.out + 2, {});
}

KERNEL(misaligned_copy_source) {
  float* s = shared_array<float, 512>();
  cp_async_16(s + 4 * threadIdx.x, p.in() + 1, false);
}

KERNEL(misaligned_copy_target) {
  float* s = shared_array<float, 512>();
  cp_async_16(s + 4 * threadIdx.x + 2, p.in(), true);
}

KERNEL(misaligned_row) {
  float* s = shared_array<float, 64>();
  s[threadIdx.x] = 1.f;
  bar_sync();
  uint32_t matrix[4];
  ldmatrix_x4(matrix, s + threadIdx.x % 16 * 2);
  p.out[threadIdx.x] = float(matrix[0]);
}

KERNEL(misaligned_plain) {
  p.out[threadIdx.x] = *reinterpret_cast<const float*>(static_cast<const char*>(p.a) + 2);
}

// Bank conflicts, of one warp

template <int kStride>
KERNEL(shared_stride) {
  float* s = reinterpret_cast<float*>(dynamic_shared());
  s[kStride * threadIdx.x] = 1.f;
}

KERNEL(shared_broadcast) {
  float* s = shared_array<float, 64>();
  if (threadIdx.x == 0) s[0] = 1.f;
  bar_sync();
  p.out[threadIdx.x] = s[0];
}

// Eight 128-byte rows, written with uint4 and read by ldmatrix; swizzled: column ^ row.
template <bool kSwizzled>
KERNEL(shared_rows) {
  uint4* s = reinterpret_cast<uint4*>(dynamic_shared());
  for (int i = threadIdx.x; i < 64; i += 32) s[i] = {};
  bar_sync();
  const int row = threadIdx.x % 8, column = threadIdx.x / 8;
  uint32_t matrix[4];
  ldmatrix_x4(matrix, s + row * 8 + (kSwizzled ? column ^ row : column));
  p.out[threadIdx.x] = float(matrix[0]);
}

// Kernels without a bug

KERNEL(barriers) {  // 64 threads; warp 0 waits for warp 1, and warp 1 for warp 0
  float* s = shared_array<float, 64>();
  float value = float(threadIdx.x);
  for (int i = 0; i < 3; ++i) {
    s[threadIdx.x] = value;
    bar_sync();
    value = s[(threadIdx.x + 1) % 64];
    bar_sync();
  }
  s[threadIdx.x] = value;
  bar_warp_sync();
  p.out[threadIdx.x] = s[threadIdx.x ^ 1];
}

// Three groups of two warps, of which each makes its own number of turns, with two buffers that its
// warps exchange values through; then the block. out: 192 floats.
KERNEL(barriers_of_groups) {
  float* s = shared_array<float, 384>();
  const int group = threadIdx.x / 64, thread = threadIdx.x % 64;
  float value = float(threadIdx.x);
  for (int i = 0; i < 1 + 3 * (2 - group); ++i) {
    float* buffer = s + 128 * group + 64 * (i % 2);
    buffer[thread] = value;
    bar_sync(15 - group, 64);
    value = buffer[(thread + 33) % 64] + buffer[0];
  }
  bar_sync();
  s[threadIdx.x] = value;
  bar_sync();
  p.out[threadIdx.x] = s[191 - threadIdx.x];
}

// The first groups return while the others go on.
KERNEL(groups_that_return) {
  float* s = shared_array<float, 192>();
  const int group = threadIdx.x / 64, thread = threadIdx.x % 64;
  for (int i = 0; i < group; ++i) {
    s[threadIdx.x] = float(thread);
    bar_sync(1 + group, 64);
    if (i == 1) p.out[thread] = s[threadIdx.x ^ 63];
    bar_sync(1 + group, 64);
  }
}

// Warps 0, 1 and 2 meet in pairs: what warp 0 did reaches warp 2 by warp 1, and the barrier of 0 and
// 1 becomes that of 0 and 2.
KERNEL(groups_in_a_chain) {
  float* s = shared_array<float, 96>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == 0) s[lane] = float(lane);
  if (warp != 2) bar_sync(1, 64);
  if (warp != 0) bar_sync(2, 64);
  if (warp == 2) s[lane] += 100.f;
  if (warp != 1) bar_sync(1, 64);
  if (warp == 0) p.out[lane] = s[31 - lane];
}

KERNEL(collectives) {
  const int lane = threadIdx.x % 32;
  const float neighbour = shfl_bfly(float(threadIdx.x), 5);
  const int first = shfl_idx(int(threadIdx.x), 3);
  const uint32_t thirds = vote_ballot(lane % 3 == 0);
  const bool right = neighbour == float(threadIdx.x ^ 5) &&
                     first == int(threadIdx.x / 32 * 32 + 3) && thirds == 0x49249249u &&
                     popc(thirds) == 11;
  p.out[threadIdx.x] = right ? 1.f : 0.f;
}

KERNEL(copies) {  // two groups; the copy that is not valid writes zeros and reads nothing
  float* s = shared_array<float, 64>();
  float* t = shared_array<float, 65>();
  cp_async_4(s + threadIdx.x, p.in() + threadIdx.x, true);
  cp_async_commit_group();
  cp_async_4(t + threadIdx.x, nullptr, false);
  cp_async_commit_group();
  cp_async_wait_group<1>();
  const float first = s[threadIdx.x];
  cp_async_wait_group<0>();
  p.out[threadIdx.x] = first + t[threadIdx.x];
}

KERNEL(atomic_max) {  // out: zeros before
  red_global_max(reinterpret_cast<uint32_t*>(p.out) + threadIdx.x, blockIdx.x * 10 + blockIdx.y);
}

// out (16 x 8) = 2 a (16 x 16) b, one warp. b is stored as (k, n), for kFromRows as (n, k). kByHand
// puts the fragments together as in the manual's tables, without ldmatrix.
enum class Load { kFromColumns, kFromRows, kByHand };
template <typename T, Load kLoad>
KERNEL(product) {
  T* sA = shared_array<T, 256>();
  T* sB = shared_array<T, 128>();
  const T* a = static_cast<const T*>(p.a);
  const T* b = static_cast<const T*>(p.b);
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  cp_async_16(sA + 8 * lane, a + 8 * lane, true);
  if (lane < 16) cp_async_16(sB + 8 * lane, b + 8 * lane, true);
  cp_async_commit_group();
  cp_async_wait_group<0>();
  bar_warp_sync();
  uint32_t rA[4], rB[4];
  if constexpr (kLoad == Load::kByHand) {
    const auto pair = [](T low, T high) { return cvt_rn_x2<T>(to_float(low), to_float(high)); };
    for (int i = 0; i < 4; ++i) {
      const int m = g + i % 2 * 8, k = 2 * t + i / 2 * 8;
      rA[i] = pair(sA[16 * m + k], sA[16 * m + k + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      const int k = 2 * t + 8 * i;
      rB[i] = pair(sB[8 * k + g], sB[8 * (k + 1) + g]);
    }
  } else {
    ldmatrix_x4(rA, sA + lane % 16 * 16 + lane / 16 * 8);
    if constexpr (kLoad == Load::kFromColumns) {
      ldmatrix_x4_trans(rB, sB + lane % 16 * 8);
    } else {
      ldmatrix_x4(rB, sB + lane % 8 * 16 + lane / 8 % 2 * 8);
    }
  }
  float c[4] = {};
  for (int i = 0; i < 2; ++i) mma_m16n8k16<T>(c, rA, rB[0], rB[1]);
  for (int i = 0; i < 4; ++i) p.out[8 * (g + i / 2 * 8) + 2 * t + i % 2] = c[i];
}

// Launches

// Kernels that start early

KERNEL(early_read_before_wait) {
  const float value = p.in()[threadIdx.x];
  griddepcontrol_wait();
  p.out[threadIdx.x] = value;
}

KERNEL(early_write_before_wait) {
  p.out[threadIdx.x] = 1.f;
  griddepcontrol_wait();
}

KERNEL(early_vector_before_wait) {
  float four[4];
  load_vector(p.in(), four);
  griddepcontrol_wait();
  p.out[threadIdx.x] = four[0];
}

KERNEL(early_return_before_wait) {
  if (threadIdx.x == 5) return;
  griddepcontrol_wait();
}

KERNEL(early) {
  float* s = shared_array<float, 64>();
  s[threadIdx.x] = 1.f;
  griddepcontrol_wait();
  p.out[threadIdx.x] = p.in()[threadIdx.x] + s[threadIdx.x];
}

struct Case {
  cudaError_t (*launch)(const Params& params);
  bool must_write = true;
};

template <auto kKernel, int kBlocks = 1, int kThreads = 64, int kShared = 0, int kGridY = 1>
cudaError_t run_kernel(const Params& params) {
  return launch<kKernel>(kBlocks, kGridY, kThreads, kShared, nullptr, params);
}

template <auto kKernel>
cudaError_t run_early(const Params& params) {
  return launch<kKernel, Start::kEarly>(1, 1, 64, 0, nullptr, params);
}

#define CASE(name)              \
  {                             \
    #name, { run_kernel<name> } \
  }
#define PARTIAL(name, ...)                                        \
  {                                                               \
    #name, { run_kernel<name __VA_OPT__(, ) __VA_ARGS__>, false } \
  }

const std::map<std::string, Case> kCases = {
    CASE(race_read),
    CASE(race_write),
    CASE(race_write_after_read),
    CASE(race_write_after_reads_of_warps),
    CASE(race_write_after_reads_of_a_warp),
    CASE(race_in_warp),
    CASE(race_between_warps),
    PARTIAL(race_between_groups, 1, 128),
    PARTIAL(race_in_group),
    PARTIAL(race_write_after_reads_of_groups, 1, 128),
    PARTIAL(race_after_other_group, 1, 96),
    CASE(barrier_at_two_places),
    PARTIAL(barrier_after_return),
    PARTIAL(barrier_in_loop),
    CASE(barrier_for_half_a_warp),
    CASE(group_of_half_a_warp),
    PARTIAL(group_of_lanes_that_return),
    PARTIAL(group_of_odd_lanes),
    PARTIAL(group_at_two_places),
    PARTIAL(group_of_two_counts, 1, 96),
    PARTIAL(group_of_half_warps),
    PARTIAL(group_larger_than_the_block),
    PARTIAL(group_at_the_barrier_of_the_block),
    PARTIAL(group_at_barrier_16),
    PARTIAL(groups_at_one_barrier, 1, 128),
    PARTIAL(group_without_a_warp),
    PARTIAL(group_with_a_warp_elsewhere),
    PARTIAL(group_with_a_warp_in_another),
    CASE(shuffle_after_return),
    CASE(return_before_shuffle),
    CASE(shuffle_at_two_places),
    CASE(shuffle_from_nowhere),
    CASE(global_read_out_of_bounds),
    CASE(global_write_out_of_bounds),
    CASE(global_vector_out_of_bounds),
    PARTIAL(input_written),
    PARTIAL(cp_async_out_of_bounds),
    PARTIAL(shared_out_of_bounds),
    PARTIAL(dynamic_shared_out_of_bounds, 1, 64, 256),
    PARTIAL(shared_straddled),
    CASE(shared_never_written),
    PARTIAL(shared_of_the_block_before, 2),
    CASE(output_never_written),
    CASE(output_read_before_written),
    PARTIAL(two_blocks_write, 2),
    PARTIAL(two_blocks_share, 2),
    CASE(copy_not_waited_for),
    CASE(copy_not_committed),
    CASE(copy_of_another_thread),
    CASE(copy_without_barrier),
    CASE(copy_over_a_read),
    PARTIAL(write_over_a_copy),
    CASE(misaligned_load),
    PARTIAL(misaligned_store),
    PARTIAL(misaligned_copy_source),
    PARTIAL(misaligned_copy_target),
    CASE(misaligned_row),
    CASE(misaligned_plain),
    {"shared_stride_1", {run_kernel<shared_stride<1>, 1, 32, 4096>, false}},
    {"shared_stride_2", {run_kernel<shared_stride<2>, 1, 32, 4096>, false}},
    {"shared_stride_32", {run_kernel<shared_stride<32>, 1, 32, 4096>, false}},
    PARTIAL(shared_broadcast, 1, 32),
    {"shared_rows", {run_kernel<shared_rows<false>, 1, 32, 1024>, false}},
    {"shared_rows_swizzled", {run_kernel<shared_rows<true>, 1, 32, 1024>, false}},
    CASE(barriers),
    PARTIAL(barriers_of_groups, 1, 192),
    PARTIAL(groups_that_return, 1, 192),
    PARTIAL(groups_in_a_chain, 1, 96),
    CASE(collectives),
    CASE(copies),
    PARTIAL(atomic_max, 3, 64, 0, 2),
    {"product_half_columns", {run_kernel<product<Half, Load::kFromColumns>, 1, 32>}},
    {"product_half_rows", {run_kernel<product<Half, Load::kFromRows>, 1, 32>}},
    {"product_half_by_hand", {run_kernel<product<Half, Load::kByHand>, 1, 32>}},
    {"product_bfloat16_columns", {run_kernel<product<BFloat16, Load::kFromColumns>, 1, 32>}},
    {"product_bfloat16_rows", {run_kernel<product<BFloat16, Load::kFromRows>, 1, 32>}},
    {"product_bfloat16_by_hand", {run_kernel<product<BFloat16, Load::kByHand>, 1, 32>}},
    {"kernel_of_a_family", {run_kernel<sm80::kernel_of_a_family<Params>, 1, 32>}},
    {"early_read_before_wait", {run_early<early_read_before_wait>}},
    {"early_write_before_wait", {run_early<early_write_before_wait>}},
    {"early_vector_before_wait", {run_early<early_vector_before_wait>}},
    {"early_return_before_wait", {run_early<early_return_before_wait>}},
    {"early", {run_early<early>}},
    {"early_but_launched_in_order", {run_kernel<early_read_before_wait>}},
    {"too_much_shared", {run_kernel<barriers, 1, 64, 228 * 1024>}},
};

}  // namespace
}  // namespace cogview

#define EXPORT extern "C" __attribute__((visibility("default")))

std::string last_error;

// Runs a kernel on arrays of the caller. Returns the error's text, or nothing.
EXPORT const char* run(const char* name, const void* a, int64_t a_bytes, const void* b,
                       int64_t b_bytes, float* out, int64_t out_bytes) {
  const cogview::Case& planted = cogview::kCases.at(name);
  host_model::Operator call(
      name,
      {{"a", a, a_bytes}, {"b", b, b_bytes}, {"out", out, out_bytes, planted.must_write, true}});
  cudaError_t status = planted.launch({a, b, out});
  if (status == cudaSuccess) status = call.finish();
  last_error = status == cudaSuccess ? "" : cudaGetErrorString(status);
  return last_error.c_str();
}

// Counts of the last launch: mma, barriers, shared accesses, bank conflicts, bytes loaded of a and
// stored to out, unique bytes loaded of a and stored to out.
EXPORT void counts(int64_t (&numbers)[8]) {
  const host_model::LaunchReport report = host_model::take_report().back();
  const host_model::Traffic &a = report.buffers.front(), &out = report.buffers.back();
  const int64_t all[] = {
      report.mma,     report.barriers,  report.shared_accesses, report.bank_conflicts,
      a.bytes_loaded, out.bytes_stored, a.unique_loaded,        out.unique_stored};
  std::copy(std::begin(all), std::end(all), numbers);
}

EXPORT void convert(const char* kind, const void* in, void* out, int64_t size) {
  using namespace cogview;
  const std::string_view name = kind;
  const auto apply = [&]<typename From, typename To>(From, To, auto function) {
    for (int64_t i = 0; i < size; ++i) {
      static_cast<To*>(out)[i] = function(static_cast<const From*>(in)[i]);
    }
  };
  if (name == "half_to_float") apply(Half{}, 0.f, [](Half x) { return to_float(x); });
  if (name == "bfloat16_to_float") apply(BFloat16{}, 0.f, [](BFloat16 x) { return to_float(x); });
  if (name == "float_to_half") apply(0.f, Half{}, [](float x) { return from_float<Half>(x); });
  if (name == "float_to_bfloat16")
    apply(0.f, BFloat16{}, [](float x) { return from_float<BFloat16>(x); });
  if (name == "ex2") apply(0.f, 0.f, [](float x) { return ex2_approx(x); });
}
