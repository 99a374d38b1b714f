// Picks the family of kernels that runs a problem. A new family is one more entry of kFamilies.

#include "sm80/family.h"

namespace cogview {
namespace {

struct Family {
  std::optional<std::string> (*unsupported)(const ThreeRegionProblem&, const Device&);
  cudaError_t (*forward)(const ThreeRegionForwardParams&, cudaStream_t);
  cudaError_t (*backward)(const ThreeRegionBackwardParams&, cudaStream_t);
};

// The first that takes a problem runs it. The last takes the most: its reason is the one to tell.
constexpr Family kFamilies[] = {
    {sm80::unsupported, sm80::three_region_attention_forward,
     sm80::three_region_attention_backward},
};

#ifdef COGVIEW_HOST_MODEL
int current_device() { return 0; }
#else
int current_device() {
  int index = 0;
  if (cudaGetDevice(&index) != cudaSuccess) cudaGetLastError();  // clear it: launches fail too
  return index;
}
#endif

// The family for a problem on the current device; null where there is none.
const Family* family_for(const ThreeRegionProblem& problem) {
  const Device device = device_of(current_device());
  for (const Family& family : kFamilies) {
    if (!family.unsupported(problem, device).has_value()) return &family;
  }
  return nullptr;
}

}  // namespace

#ifdef COGVIEW_HOST_MODEL
Device device_of(int) { return {8, 0}; }  // the instructions that it models
#else
Device device_of(int index) {
  Device device = {};
  const auto read = [&](int* value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(value, attribute, index) == cudaSuccess;
  };
  if (read(&device.major, cudaDevAttrComputeCapabilityMajor) &&
      read(&device.minor, cudaDevAttrComputeCapabilityMinor)) {
    return device;
  }
  cudaGetLastError();  // clear it, or the next launch would report it
  return {};
}
#endif

std::optional<std::string> three_region_attention_unsupported(const ThreeRegionProblem& problem,
                                                              const Device& device) {
  std::optional<std::string> reason;
  for (const Family& family : kFamilies) {
    reason = family.unsupported(problem, device);
    if (!reason.has_value()) break;
  }
  return reason;
}

cudaError_t three_region_attention_forward(const ThreeRegionForwardParams& params,
                                           cudaStream_t stream) {
  const Family* family = family_for(params.problem);
  return family == nullptr ? cudaErrorInvalidValue : family->forward(params, stream);
}

cudaError_t three_region_attention_backward(const ThreeRegionBackwardParams& params,
                                            cudaStream_t stream) {
  const Family* family = family_for(params.problem);
  return family == nullptr ? cudaErrorInvalidValue : family->backward(params, stream);
}

}  // namespace cogview
