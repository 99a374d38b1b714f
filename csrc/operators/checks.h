// What operators are made of: a Call checks each tensor, registers it and launches the kernels.
//
// Operators use torch's stable ABI only, so that one build serves torch 2.10 and later. They are
// compiled twice: into `_C`, where they run on CUDA tensors, and with COGVIEW_HOST_MODEL into
// `_host_model`, where the same kernels run on CPU tensors. Python declares the schemas, allocates
// outputs and workspaces and checks arguments for people; operators check what memory safety needs.
// They run at every call: text is built where a check fails, and nowhere else.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../launch.h"

#ifndef COGVIEW_HOST_MODEL
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

// Defined in libtorch_cuda.so alone, which a CPU build of torch does not have.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace cogview::operators {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor argument that may be absent: a reference, as copies of optional tensors cost time.
class Argument {
 public:
  Argument(const Tensor& tensor) : tensor_(&tensor) {}
  Argument(const std::optional<Tensor>& tensor)
      : tensor_(tensor.has_value() ? &*tensor : nullptr) {}

  explicit operator bool() const { return tensor_ != nullptr; }
  const Tensor& operator*() const { return *tensor_; }
  const Tensor* operator->() const { return tensor_; }

 private:
  const Tensor* tensor_;
};

// What kernels do with a tensor: read it; write all of it, before any of it is read; or both.
enum class Access { kRead, kWriteAll, kWorkspace };

#ifdef COGVIEW_HOST_MODEL

#define COGVIEW_DISPATCH_KEY CPU
constexpr const char* kDevice = "the CPU";

// The device of a call: the host model, which checks that every access lies in a registered tensor.
class CallDevice {
 public:
  explicit CallDevice(const Tensor&) {}

  bool has(const Tensor& tensor) const { return tensor.is_cpu(); }

  void register_tensor(const char* name, const Tensor& tensor, Access access) {
    if (!host_model::launches_run() || tensor.numel() == 0) return;
    int64_t extent = 1;
    for (int64_t i = 0; i < tensor.dim(); ++i) {
      extent += (tensor.size(i) - 1) * tensor.stride(i);
    }
    const int64_t element_bytes = static_cast<int64_t>(tensor.element_size());
    // Of a tensor with gaps, the bytes between its elements need not be written.
    const bool must_write = access == Access::kWriteAll && extent == tensor.numel();
    buffers_.push_back(
        {name, tensor.data_ptr(), extent * element_bytes, must_write, access != Access::kRead});
  }

  template <typename Launch>
  void launch(const char* name, const Launch& launch) {
    cudaError_t status = cudaSuccess;
    if (host_model::launches_run()) {
      host_model::Operator call(name, std::move(buffers_));
      status = launch(cudaStream_t{});
      if (status == cudaSuccess) status = call.finish();
    } else if (host_model::launches_recorded()) {
      status = launch(cudaStream_t{});
    }
    STD_TORCH_CHECK(status == cudaSuccess, "cogview_kernels: ", cudaGetErrorString(status));
  }

 private:
  std::vector<host_model::Buffer> buffers_;
};

#else

#define COGVIEW_DISPATCH_KEY CUDA
constexpr const char* kDevice = "the CUDA device";

inline cudaStream_t current_stream(int32_t device_index) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    if (aoti_torch_get_current_cuda_stream != nullptr) {
      return static_cast<GetStream>(&aoti_torch_get_current_cuda_stream);
    }
    // libtorch_cuda.so may have been loaded after this module.
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr
               ? nullptr
               : reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(get_stream != nullptr,
                  "cogview_kernels: this torch has no CUDA streams (libtorch_cuda.so is not "
                  "loaded); install a CUDA build of torch");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

// The device of a call: a GPU, on torch's current stream. It has no use for registered tensors.
class CallDevice {
 public:
  explicit CallDevice(const Tensor& like) : index_(like.get_device_index()) {}

  bool has(const Tensor& tensor) const {
    return tensor.is_cuda() && tensor.get_device_index() == index_;
  }

  void register_tensor(const char*, const Tensor&, Access) {}

  template <typename Launch>
  void launch(const char* name, const Launch& launch) {
    const torch::stable::accelerator::DeviceGuard guard(index_);
    const cudaError_t status = launch(current_stream(index_));
    STD_TORCH_CHECK(status == cudaSuccess, "cogview_kernels: ", name,
                    ": kernel launch failed: ", cudaGetErrorString(status));
  }

 private:
  int32_t index_;
};

#endif

using Shape = std::initializer_list<int64_t>;

template <typename Sizes>
std::string shape_text(const Sizes& shape) {
  std::string text;
  for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "(" + text + ")";
}

// One call of an operator. Its methods check a tensor and register it for the kernels; launch() ends
// the call.
class Call {
 public:
  // All tensors must lie on the device of `like`.
  Call(const char* name, const Tensor& like) : name_(name), device_(like) {}

  // A tensor of any shape. The data.
  void* tensor(const char* name, const Tensor& tensor, Access access) {
    STD_TORCH_CHECK(device_.has(tensor), name, ": expected a tensor on ", kDevice);
    device_.register_tensor(name, tensor, access);
    return tensor.data_ptr();
  }

  // The same, of this shape.
  void* tensor(const char* name, const Tensor& tensor, Access access, const Shape& shape) {
    void* data = this->tensor(name, tensor, access);
    const IntHeaderOnlyArrayRef sizes = tensor.sizes();
    STD_TORCH_CHECK(
        sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin()), name,
        ": expected shape ", shape_text(shape), ", got ", shape_text(sizes));
    return data;
  }

  // The same, contiguous.
  void* contiguous(const char* name, const Tensor& tensor, Access access, const Shape& shape) {
    void* data = this->tensor(name, tensor, access, shape);
    STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
    return data;
  }

  template <typename Launch>
  void launch(const Launch& launch) {
    device_.launch(name_, launch);
  }

 private:
  const char* name_;
  CallDevice device_;
};

inline void check_float32(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, ": expected float32");
}

inline void check_int32(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int, name, ": expected int32");
}

// Kernels access sixteen bytes at once.
inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

inline void check_aligned(const char* name, const void* data) {
  STD_TORCH_CHECK(is_aligned(data), name, ": expected to begin at a multiple of 16 bytes");
}

inline int to_int(const char* name, int64_t value) {
  STD_TORCH_CHECK(value <= std::numeric_limits<int32_t>::max(), name, ": too large, got ", value);
  return static_cast<int>(value);
}

inline DType dtype_of(const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float16 or bfloat16");
  }
}

}  // namespace cogview::operators
