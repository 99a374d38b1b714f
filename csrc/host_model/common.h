// The instructions of instructions/common.cuh on the CPU, and the few names of CUDA C++ that kernels
// use.
//
// Threads of a block are fibers. An instruction of a whole warp, or a barrier, waits until all of its
// threads have reached the same place in the source. For a barrier of some warps this is stricter than
// the manual, which has no use for the place. The hooks that -fsanitize=thread compiles in
// report what a kernel does in plain C++ (memory.cpp).
//
// Modelled exactly: fragments, rounding of conversions, what each instruction reads and writes, and
// when others see it. Not modelled: the order and width in which a tensor core adds (here float32,
// one k after the other, 16-bit products exact), the last bits of ex2.approx, and time.
//
// The checks have two limits. Where tensors share memory (q, k and v of one packed projection), an
// address counts as the first tensor's that spans it: an access meant for another tensor is not told
// apart. Dynamic shared memory is one region: an index that leaves one of its arrays for the next is
// found only as a race, or as a read of memory that nobody wrote.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "runtime.h"

// Included behind all standard headers, which use some of these words.
#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __noinline__ __attribute__((noinline))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

namespace host_model {

__attribute__((const)) unsigned thread_idx();
__attribute__((const)) unsigned block_idx_x();
__attribute__((const)) unsigned block_idx_y();
__attribute__((const)) unsigned block_dim();
__attribute__((const)) unsigned grid_dim_x();
__attribute__((const)) unsigned grid_dim_y();

uint32_t shfl(const char* primitive, uint32_t value, int source_lane, Where where);
uint32_t vote_ballot(bool predicate, Where where);
uint32_t redux_max(uint32_t value, Where where);
void bar_warp_sync(Where where);
void bar_sync(Where where);
void bar_sync(int id, int num_threads, Where where);
void* shared_array(const void* key, int bytes);
unsigned char* dynamic_shared();
uint4 ld_shared_v4(const void* address, Where where);
void st_shared_v4(void* address, uint4 value, Where where);
uint4 ld_global_v4(const void* address, Where where);
void st_global_v4(void* address, uint4 value, Where where);
void red_global_max(uint32_t* address, uint32_t value, Where where);

// A component of threadIdx and its like.
template <unsigned (*kRead)()>
struct Index {
  operator unsigned() const { return kRead(); }
};

}  // namespace host_model

namespace cogview {

using host_model::Where;
using std::max;
using std::min;

inline constexpr struct {
  host_model::Index<host_model::thread_idx> x;
} threadIdx;
inline constexpr struct {
  host_model::Index<host_model::block_idx_x> x;
  host_model::Index<host_model::block_idx_y> y;
} blockIdx;
inline constexpr struct {
  host_model::Index<host_model::block_dim> x;
} blockDim;
inline constexpr struct {
  host_model::Index<host_model::grid_dim_x> x;
  host_model::Index<host_model::grid_dim_y> y;
} gridDim;

// Everything below is inlined: where a call returns a struct straight to memory, the compiler puts no
// hook before the store.

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

__forceinline__ float shfl_bfly(float value, int lane_mask, Where where = Where::current()) {
  return std::bit_cast<float>(host_model::shfl("shfl_bfly", std::bit_cast<uint32_t>(value),
                                               int(threadIdx.x % 32) ^ lane_mask, where));
}
__forceinline__ uint32_t shfl_bfly(uint32_t value, int lane_mask, Where where = Where::current()) {
  return host_model::shfl("shfl_bfly", value, int(threadIdx.x % 32) ^ lane_mask, where);
}
__forceinline__ int shfl_idx(int value, int source_lane, Where where = Where::current()) {
  return int(host_model::shfl("shfl_idx", uint32_t(value), source_lane, where));
}
__forceinline__ float shfl_idx(float value, int source_lane, Where where = Where::current()) {
  return std::bit_cast<float>(
      host_model::shfl("shfl_idx", std::bit_cast<uint32_t>(value), source_lane, where));
}
__forceinline__ uint32_t vote_ballot(bool predicate, Where where = Where::current()) {
  return host_model::vote_ballot(predicate, where);
}
__forceinline__ uint32_t redux_max(uint32_t value, Where where = Where::current()) {
  return host_model::redux_max(value, where);
}
__forceinline__ void bar_warp_sync(Where where = Where::current()) {
  host_model::bar_warp_sync(where);
}
__forceinline__ void bar_sync(Where where = Where::current()) { host_model::bar_sync(where); }
__forceinline__ void bar_sync(int id, int num_threads, Where where = Where::current()) {
  host_model::bar_sync(id, num_threads, where);
}

// Its address stands for the instantiation.
template <typename T, int kSize>
inline char shared_array_key;

template <typename T, int kSize>
__forceinline__ T* shared_array() {
  return static_cast<T*>(
      host_model::shared_array(&shared_array_key<T, kSize>, int(sizeof(T)) * kSize));
}
__forceinline__ unsigned char* dynamic_shared() { return host_model::dynamic_shared(); }

__forceinline__ uint4 ld_shared_v4(const void* address, Where where = Where::current()) {
  return host_model::ld_shared_v4(address, where);
}
__forceinline__ void st_shared_v4(void* address, uint4 value, Where where = Where::current()) {
  host_model::st_shared_v4(address, value, where);
}
__forceinline__ uint4 ld_global_nc_v4(const void* address, Where where = Where::current()) {
  return host_model::ld_global_v4(address, where);
}
__forceinline__ uint4 ld_global_v4(const void* address, Where where = Where::current()) {
  return host_model::ld_global_v4(address, where);
}
__forceinline__ void st_global_v4(void* address, uint4 value, Where where = Where::current()) {
  host_model::st_global_v4(address, value, where);
}
__forceinline__ void red_global_max(uint32_t* address, uint32_t value,
                                    Where where = Where::current()) {
  host_model::red_global_max(address, value, where);
}

__forceinline__ float ex2_approx(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.f : y;
}

__forceinline__ float rsqrt_approx(float x) { return 1.f / std::sqrt(x); }

__forceinline__ float mul_rn(float a, float b) { return a * b; }

__forceinline__ uint32_t float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
__forceinline__ float uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }

__forceinline__ int popc(uint32_t bits) { return std::popcount(bits); }

__forceinline__ uint32_t shl(uint32_t bits, uint32_t count) {
  return count < 32 ? bits << count : 0;
}

__forceinline__ float to_float(float value) { return value; }
__forceinline__ float to_float(BFloat16 value) {
  return std::bit_cast<float>(uint32_t(value.bits) << 16);
}
__forceinline__ float to_float(Half value) {
  // The exponent's bias is put right by a multiplication, which also makes denormals normal.
  const uint32_t magnitude = value.bits & 0x7fffu;
  float number = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  if (magnitude >= 0x7c00u) number = std::bit_cast<float>(magnitude << 13 | 0x7f800000u);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(number) | (value.bits & 0x8000u) << 16);
}

template <typename T>
__forceinline__ T from_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    if (magnitude > 0x7f800000u) return {0x7fff};
    return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
  } else {
    static_assert(std::is_same_v<T, Half>);
    if (magnitude > 0x7f800000u) return {0x7fff};
    uint32_t rounded;
    if (magnitude >= 0x477ff000u) {  // 65520 and above
      rounded = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: the last bit is worth 2^-24
      rounded = uint32_t(std::nearbyint(std::bit_cast<float>(magnitude) * 0x1p24f));
    } else {
      rounded = (magnitude + 0xfffu + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    }
    return {uint16_t(rounded | (bits >> 16 & 0x8000u))};
  }
}

template <typename T>
__forceinline__ uint32_t cvt_rn_x2(float low, float high) {
  return uint32_t(from_float<T>(low).bits) | uint32_t(from_float<T>(high).bits) << 16;
}

// Of a number and a NaN the number; std::fmax takes signalling NaNs for more.
template <typename T, typename Before>
__forceinline__ uint32_t choose_x2(uint32_t a, uint32_t b, const Before& before) {
  const auto of_half = [&](uint16_t a, uint16_t b) {
    const float x = to_float(T{a}), y = to_float(T{b});
    return uint32_t(from_float<T>(x != x || before(y, x) ? y : x).bits);
  };
  return of_half(uint16_t(a), uint16_t(b)) | of_half(uint16_t(a >> 16), uint16_t(b >> 16)) << 16;
}
template <typename T>
__forceinline__ uint32_t max_x2(uint32_t a, uint32_t b) {
  return choose_x2<T>(a, b, [](float one, float other) { return one > other; });
}
template <typename T>
__forceinline__ uint32_t min_x2(uint32_t a, uint32_t b) {
  return choose_x2<T>(a, b, [](float one, float other) { return one < other; });
}

}  // namespace cogview
