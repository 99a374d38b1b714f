// The operators' CUDA side: torch's stable ABI only, so that one build serves torch 2.10 and later.
//
// Python allocates every output and workspace and checks arguments for people; here stands what
// memory safety needs.

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>

#include <limits>
#include <optional>
#include <utility>

#include "pb_relax_layer_norm/pb_relax_layer_norm.h"

// Defined in libtorch_cuda.so alone, which a CPU build of torch does not have.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cudaStream_t current_stream(int32_t device_index) {
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

cogview::DType dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return cogview::DType::kFloat32;
    case ScalarType::Half:
      return cogview::DType::kFloat16;
    case ScalarType::BFloat16:
      return cogview::DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float16 or bfloat16");
  }
}

// A CUDA tensor (rows, columns) with contiguous rows.
void check_matrix(const char* name, const Tensor& tensor, const Tensor& like, int64_t rows,
                  int64_t columns, bool contiguous) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
                  ": expected a tensor on the CUDA device of x");
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name,
                  ": expected shape (", rows, ", ", columns, ")");
  STD_TORCH_CHECK(columns <= 1 || tensor.stride(1) == 1, name, ": expected contiguous rows");
  STD_TORCH_CHECK(!contiguous || rows <= 1 || tensor.stride(0) == columns, name,
                  ": expected a contiguous tensor");
}

void check_vector(const char* name, const Tensor& tensor, const Tensor& like, int64_t size) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
                  ": expected a tensor on the CUDA device of x");
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, name, ": expected shape (", size,
                  ")");
  STD_TORCH_CHECK(size <= 1 || tensor.stride(0) == 1, name, ": expected a contiguous tensor");
}

void check_float32(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, ": expected float32");
}

void check_parameter(const char* name, const std::optional<Tensor>& parameter, const Tensor& x,
                     cogview::RowsAndColumns& shape, bool& seen) {
  if (!parameter.has_value()) return;
  check_vector(name, *parameter, x, shape.hidden);
  const cogview::DType dtype = dtype_of(name, *parameter);
  STD_TORCH_CHECK(dtype == shape.dtype || dtype == cogview::DType::kFloat32, name,
                  ": expected the dtype of x or float32");
  STD_TORCH_CHECK(!seen || dtype == shape.weight_dtype, name,
                  ": expected the dtype of the other parameters");
  shape.weight_dtype = dtype;
  seen = true;
}

const void* pointer_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->data_ptr() : nullptr;
}

cogview::RowsAndColumns shape_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0, "x: expected shape (rows, hidden)");
  STD_TORCH_CHECK(x.size(1) <= std::numeric_limits<int32_t>::max(), "x: hidden is too large");
  const cogview::DType dtype = dtype_of("x", x);
  return {x.size(0), x.size(1), dtype, dtype};
}

void check_launch(cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess,
                  "cogview_kernels: kernel launch failed: ", cudaGetErrorString(status));
}

// y, mean and rstd are written.
void pb_relax_layer_norm_forward_out(const Tensor& x, std::optional<Tensor> weight,
                                     std::optional<Tensor> bias, std::optional<Tensor> peak,
                                     double eps, int64_t relax, Tensor y, Tensor mean,
                                     Tensor rstd) {
  cogview::PbRelaxLayerNormForwardParams params = {};
  params.shape = shape_of(x);
  const auto [rows, hidden] = std::pair(params.shape.rows, params.shape.hidden);
  check_matrix("x", x, x, rows, hidden, false);
  check_matrix("y", y, x, rows, hidden, true);
  STD_TORCH_CHECK(y.scalar_type() == x.scalar_type(), "y: expected the dtype of x");
  bool seen = false;
  check_parameter("weight", weight, x, params.shape, seen);
  check_parameter("bias", bias, x, params.shape, seen);
  for (const auto& [name, statistic] : {std::pair("mean", &mean), std::pair("rstd", &rstd)}) {
    check_vector(name, *statistic, x, rows);
    check_float32(name, *statistic);
  }
  STD_TORCH_CHECK(relax >= 0 && relax <= 2, "relax: expected 0, 1 or 2");
  params.relax = static_cast<cogview::Relax>(relax);
  STD_TORCH_CHECK((params.relax == cogview::Relax::kTensor) == peak.has_value(),
                  "peak: expected with relax = 2, and only then");
  if (peak.has_value()) {
    check_vector("peak", *peak, x, 1);
    check_float32("peak", *peak);
  }

  params.x = x.data_ptr();
  params.x_row_stride = x.stride(0);
  params.weight = pointer_or_null(weight);
  params.bias = pointer_or_null(bias);
  params.peak = static_cast<const float*>(pointer_or_null(peak));
  params.y = y.data_ptr();
  params.mean = static_cast<float*>(mean.data_ptr());
  params.rstd = static_cast<float*>(rstd.data_ptr());
  params.eps = static_cast<float>(eps);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(pb_relax_layer_norm_forward(params, current_stream(x.get_device_index())));
}

// dx, partial and, where given, dweight and dbias are written.
void pb_relax_layer_norm_backward_out(const Tensor& dy, const Tensor& x,
                                      std::optional<Tensor> weight, const Tensor& mean,
                                      const Tensor& rstd, Tensor dx, Tensor partial,
                                      std::optional<Tensor> dweight, std::optional<Tensor> dbias) {
  cogview::PbRelaxLayerNormBackwardParams params = {};
  params.shape = shape_of(x);
  const auto [rows, hidden] = std::pair(params.shape.rows, params.shape.hidden);
  check_matrix("x", x, x, rows, hidden, false);
  check_matrix("dy", dy, x, rows, hidden, false);
  check_matrix("dx", dx, x, rows, hidden, true);
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type() && dx.scalar_type() == x.scalar_type(),
                  "dy, dx: expected the dtype of x");
  bool seen = false;
  check_parameter("weight", weight, x, params.shape, seen);
  check_parameter("dweight", dweight, x, params.shape, seen);
  check_parameter("dbias", dbias, x, params.shape, seen);
  for (const auto& [name, statistic] : {std::pair("mean", &mean), std::pair("rstd", &rstd)}) {
    check_vector(name, *statistic, x, rows);
    check_float32(name, *statistic);
  }
  STD_TORCH_CHECK(partial.dim() == 3 && partial.size(0) == 2 && partial.size(1) >= 1 &&
                      partial.size(1) <= std::numeric_limits<int32_t>::max() &&
                      partial.size(2) == hidden && partial.is_contiguous() && partial.is_cuda() &&
                      partial.get_device_index() == x.get_device_index(),
                  "partial: expected a contiguous tensor (2, num_partials, ", hidden,
                  ") on the CUDA device of x");
  check_float32("partial", partial);

  params.dy = dy.data_ptr();
  params.dy_row_stride = dy.stride(0);
  params.x = x.data_ptr();
  params.x_row_stride = x.stride(0);
  params.weight = pointer_or_null(weight);
  params.mean = static_cast<const float*>(mean.data_ptr());
  params.rstd = static_cast<const float*>(rstd.data_ptr());
  params.dx = dx.data_ptr();
  params.partial = static_cast<float*>(partial.data_ptr());
  params.num_partials = partial.size(1);
  params.dweight = const_cast<void*>(pointer_or_null(dweight));
  params.dbias = const_cast<void*>(pointer_or_null(dbias));
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(pb_relax_layer_norm_backward(params, current_stream(x.get_device_index())));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cogview_kernels, m) {
  m.def(
      "pb_relax_layer_norm_forward_out(Tensor x, Tensor? weight, Tensor? bias, Tensor? peak, "
      "float eps, int relax, Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd) -> ()");
  m.def(
      "pb_relax_layer_norm_backward_out(Tensor dy, Tensor x, Tensor? weight, Tensor mean, "
      "Tensor rstd, Tensor(a!) dx, Tensor(b!) partial, Tensor(c!)? dweight, Tensor(d!)? dbias) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cogview_kernels, CUDA, m) {
  m.impl("pb_relax_layer_norm_forward_out", TORCH_BOX(&pb_relax_layer_norm_forward_out));
  m.impl("pb_relax_layer_norm_backward_out", TORCH_BOX(&pb_relax_layer_norm_backward_out));
}
