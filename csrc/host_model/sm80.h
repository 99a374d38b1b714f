// The instructions of instructions/sm80.cuh on the CPU.
#pragma once

#include <type_traits>

#include "common.h"

namespace host_model {

// Fragments travel by value, so that the kernels' own stay in registers as they do on a GPU.
struct Float4 {
  float value[4];
};
struct Registers4 {
  uint32_t value[4];
};
enum class Element { kHalf, kBFloat16 };

void cp_async(void* shared, const void* global, int bytes, bool valid, Where where);
void cp_async_commit_group();
void cp_async_wait_group(int pending);
Registers4 ldmatrix(const void* row, bool transposed, Where where);
Float4 mma(Element element, Float4 c, Registers4 a, uint64_t b, Where where);

}  // namespace host_model

namespace cogview {

__forceinline__ void cp_async_16(void* shared, const void* global, bool valid,
                                 Where where = Where::current()) {
  host_model::cp_async(shared, global, 16, valid, where);
}
__forceinline__ void cp_async_4(void* shared, const void* global, bool valid,
                                Where where = Where::current()) {
  host_model::cp_async(shared, global, 4, valid, where);
}
__forceinline__ void cp_async_commit_group() { host_model::cp_async_commit_group(); }
template <int kPending>
__forceinline__ void cp_async_wait_group() {
  host_model::cp_async_wait_group(kPending);
}

__forceinline__ void ldmatrix_x4(uint32_t (&out)[4], const void* row,
                                 Where where = Where::current()) {
  const host_model::Registers4 loaded = host_model::ldmatrix(row, false, where);
  for (int i = 0; i < 4; ++i) out[i] = loaded.value[i];
}
__forceinline__ void ldmatrix_x4_trans(uint32_t (&out)[4], const void* row,
                                       Where where = Where::current()) {
  const host_model::Registers4 loaded = host_model::ldmatrix(row, true, where);
  for (int i = 0; i < 4; ++i) out[i] = loaded.value[i];
}

template <typename T>
__forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                  Where where = Where::current()) {
  constexpr auto kElement =
      std::is_same_v<T, Half> ? host_model::Element::kHalf : host_model::Element::kBFloat16;
  const host_model::Float4 sums = host_model::mma(
      kElement, {c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, uint64_t(b1) << 32 | b0, where);
  for (int i = 0; i < 4; ++i) c[i] = sums.value[i];
}

}  // namespace cogview
