// The family of attention kernels for sm_80 and later: what it takes, and how it is launched.
// Plain C++: no torch, no device code.
#pragma once

#include <algorithm>
#include <iterator>
#include <optional>
#include <string>
#include <type_traits>

#include "../three_region_attention.h"

namespace cogview::sm80 {

// The head dimensions that the kernels are compiled for.
constexpr int kHeadDims[] = {32, 64, 96, 128};

// f(std::integral_constant<int, head_dim>()), if there are kernels for it.
template <size_t kIndex = 0, typename Function>
cudaError_t with_head_dim(int head_dim, Function f) {
  if constexpr (kIndex == std::size(kHeadDims)) {
    return cudaErrorInvalidValue;
  } else {
    if (head_dim == kHeadDims[kIndex]) {
      return f(std::integral_constant<int, kHeadDims[kIndex]>());
    }
    return with_head_dim<kIndex + 1>(head_dim, f);
  }
}

// Shared memory of a block: what sm_86, sm_89 and sm_120 allow, the least of all GPUs since sm_80.
constexpr int kMaxSharedBytes = 99 * 1024;

// Why these kernels do not take the problem on the device; none where they do.
inline std::optional<std::string> unsupported(const ThreeRegionProblem& problem,
                                              const Device& device) {
  const int* last = std::end(kHeadDims) - 1;
  if (std::find(kHeadDims, last + 1, problem.head_dim) > last) {
    std::string text = "the kernels take head dimensions of " + std::to_string(kHeadDims[0]);
    for (const int* dim = kHeadDims + 1; dim <= last; ++dim) {
      text += (dim < last ? ", " : " and ") + std::to_string(*dim);
    }
    return text + ", got " + std::to_string(problem.head_dim);
  }
  if (device.major < 8) {
    return "the kernels need compute capability 8.0 or later, got " + std::to_string(device.major) +
           "." + std::to_string(device.minor);
  }
  return std::nullopt;
}

// Whether the forward runs as decode.cu: few queries, or caches of fixed size.
constexpr int kMaxDecodeQueries = 8;
inline bool is_decode(const ThreeRegionProblem& problem, bool has_kv_lens) {
  return problem.q_len <= kMaxDecodeQueries || has_kv_lens;
}

cudaError_t three_region_attention_decode(const ThreeRegionForwardParams& params,
                                          cudaStream_t stream);
cudaError_t three_region_attention_forward(const ThreeRegionForwardParams& params,
                                           cudaStream_t stream);
cudaError_t three_region_attention_backward(const ThreeRegionBackwardParams& params,
                                            cudaStream_t stream);

}  // namespace cogview::sm80
