// The operators: torch's stable ABI only, so that one build serves torch 2.10 and later.
//
// Compiled twice: into `_C`, where the operators run on CUDA tensors, and with COGVIEW_HOST_MODEL
// into `_host_model`, where the same kernels run on CPU tensors. Python declares the schemas,
// allocates every output and workspace and checks arguments for people; here stands what memory
// safety needs.

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

#include "../sandwich_residual/sandwich_residual.h"
#include "../three_region_attention/three_region_attention.h"

#ifndef COGVIEW_HOST_MODEL
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

// Defined in libtorch_cuda.so alone, which a CPU build of torch does not have.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor of an operator and what the kernels do with it; null where it was not given.
enum class Access { kRead, kWriteAll, kWorkspace };
struct Argument {
  const char* name;
  const Tensor* tensor;
  Access access;
};

const Tensor* tensor_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? &*tensor : nullptr;
}

#ifdef COGVIEW_HOST_MODEL

#define COGVIEW_DISPATCH_KEY CPU
constexpr const char* kDevice = "the CPU";

bool on_device_of(const Tensor& tensor, const Tensor&) { return tensor.is_cpu(); }

// Launch under the host model's eyes: every access lies in a tensor of this call.
template <typename Launch>
void run(const char* name, const Tensor&, std::initializer_list<Argument> arguments,
         const Launch& launch) {
  std::vector<host_model::Buffer> buffers;
  for (const auto& [argument, tensor, access] : arguments) {
    if (tensor == nullptr || tensor->numel() == 0) continue;
    int64_t extent = 1;
    for (int64_t i = 0; i < tensor->dim(); ++i) {
      extent += (tensor->size(i) - 1) * tensor->stride(i);
    }
    const int64_t element_bytes = static_cast<int64_t>(tensor->element_size());
    // Bytes between the elements of a tensor with gaps are nobody's.
    const bool must_write = access == Access::kWriteAll && extent == tensor->numel();
    buffers.push_back({argument, tensor->data_ptr(), extent * element_bytes, must_write,
                       access != Access::kRead});
  }
  host_model::Operator call(name, buffers);
  cudaError_t status = launch(cudaStream_t{});
  if (status == cudaSuccess) status = call.finish();
  STD_TORCH_CHECK(status == cudaSuccess, "cogview_kernels: ", cudaGetErrorString(status));
}

#else

#define COGVIEW_DISPATCH_KEY CUDA
constexpr const char* kDevice = "the CUDA device";

bool on_device_of(const Tensor& tensor, const Tensor& like) {
  return tensor.is_cuda() && tensor.get_device_index() == like.get_device_index();
}

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

// Launch on the device of `like`, on torch's current stream.
template <typename Launch>
void run(const char* name, const Tensor& like, std::initializer_list<Argument>,
         const Launch& launch) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const cudaError_t status = launch(current_stream(like.get_device_index()));
  STD_TORCH_CHECK(status == cudaSuccess, "cogview_kernels: ", name,
                  ": kernel launch failed: ", cudaGetErrorString(status));
}

#endif

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text;
  for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "(" + text + ")";
}

std::vector<int64_t> shape_of_tensor(const Tensor& tensor) {
  std::vector<int64_t> shape(tensor.dim());
  for (int64_t i = 0; i < tensor.dim(); ++i) shape[i] = tensor.size(i);
  return shape;
}

// A tensor of this shape on the device of `like`.
void check_tensor(const char* name, const Tensor& tensor, const Tensor& like,
                  const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(on_device_of(tensor, like), name, ": expected a tensor on ", kDevice);
  const std::vector<int64_t> came = shape_of_tensor(tensor);
  STD_TORCH_CHECK(came == shape, name, ": expected shape ", shape_text(shape), ", got ",
                  shape_text(came));
}

void check_contiguous(const char* name, const Tensor& tensor, const Tensor& like,
                      const std::vector<int64_t>& shape) {
  check_tensor(name, tensor, like, shape);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

void check_float32(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, ": expected float32");
}

void check_int32(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int, name, ": expected int32");
}

int to_int(const char* name, int64_t value) {
  STD_TORCH_CHECK(value <= std::numeric_limits<int32_t>::max(), name, ": too large, got ", value);
  return static_cast<int>(value);
}

cogview::DType dtype_of(const char* name, ScalarType dtype) {
  switch (dtype) {
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

cogview::DType dtype_of(const char* name, const Tensor& tensor) {
  return dtype_of(name, tensor.scalar_type());
}

// The kernels read and write sixteen bytes at once.
bool begins_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
}

// LayerNorms

// The rows that an operator works on.
struct Rows {
  const Tensor& like;  // for devices
  int64_t rows, hidden;
};

Rows rows_of(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) > 0 && x.size(1) > 0, name,
                  ": expected shape (rows, hidden) with elements");
  STD_TORCH_CHECK(x.size(1) <= std::numeric_limits<int32_t>::max(), name, ": hidden is too large");
  return {x, x.size(0), x.size(1)};
}

// A matrix of contiguous rows; null where it is not given.
cogview::ConstRows const_rows(const char* name, const Tensor* tensor, const Rows& shape,
                              ScalarType dtype) {
  if (tensor == nullptr) return {};
  check_tensor(name, *tensor, shape.like, {shape.rows, shape.hidden});
  STD_TORCH_CHECK(tensor->size(1) <= 1 || tensor->stride(1) == 1, name,
                  ": expected contiguous rows");
  STD_TORCH_CHECK(tensor->scalar_type() == dtype, name, ": unexpected dtype");
  return {tensor->data_ptr(), tensor->stride(0)};
}

// A contiguous matrix that is written; null where it is not given.
void* written_rows(const char* name, const Tensor* tensor, const Rows& shape, ScalarType dtype) {
  if (tensor == nullptr) return nullptr;
  const_rows(name, tensor, shape, dtype);
  STD_TORCH_CHECK(tensor->is_contiguous(), name, ": expected a contiguous tensor");
  return tensor->data_ptr();
}

cogview::RowStatistics* statistics_of(const char* name, const Tensor* tensor, const Rows& shape) {
  if (tensor == nullptr) return nullptr;
  check_contiguous(name, *tensor, shape.like, {shape.rows, 4});
  check_float32(name, *tensor);
  STD_TORCH_CHECK(begins_aligned(*tensor), name, ": expected to begin at a multiple of 16 bytes");
  return static_cast<cogview::RowStatistics*>(tensor->data_ptr());
}

// A weight, a bias or a gradient of them; null where it is not given. `norm_dtype`: of its input.
void* parameter_of(const char* name, const std::optional<Tensor>& parameter, const Rows& shape,
                   ScalarType norm_dtype, cogview::DType* dtype) {
  if (!parameter.has_value()) return nullptr;
  check_contiguous(name, *parameter, shape.like, {shape.hidden});
  STD_TORCH_CHECK(
      parameter->scalar_type() == norm_dtype || parameter->scalar_type() == ScalarType::Float, name,
      ": expected the dtype of the norm's input or float32");
  *dtype = dtype_of(name, *parameter);
  return parameter->data_ptr();
}

cogview::NormParameters norm_parameters(const char* weight_name,
                                        const std::optional<Tensor>& weight, const char* bias_name,
                                        const std::optional<Tensor>& bias, const Rows& shape,
                                        ScalarType norm_dtype) {
  cogview::NormParameters norm = {nullptr, nullptr, dtype_of("the norm's input", norm_dtype)};
  norm.weight = parameter_of(weight_name, weight, shape, norm_dtype, &norm.dtype);
  norm.bias = parameter_of(bias_name, bias, shape, norm_dtype, &norm.dtype);
  STD_TORCH_CHECK(
      !weight.has_value() || !bias.has_value() || weight->scalar_type() == bias->scalar_type(),
      bias_name, ": expected the dtype of ", weight_name);
  return norm;
}

void check_residual_dtype(ScalarType f_dtype, ScalarType h_dtype) {
  STD_TORCH_CHECK(h_dtype == f_dtype || h_dtype == ScalarType::Float,
                  "residual: expected the dtype of f or float32");
}

cogview::Relax relax_of(int64_t relax) {
  STD_TORCH_CHECK(relax >= 0 && relax <= 2, "relax: expected 0, 1 or 2");
  return static_cast<cogview::Relax>(relax);
}

int num_blocks_of(int64_t num_blocks) {
  STD_TORCH_CHECK(num_blocks >= 1, "num_blocks: expected at least 1, got ", num_blocks);
  return to_int("num_blocks", num_blocks);
}

// Float32 maxima, zero before; there if and only if one maximum is taken over the whole tensor.
float* peaks_of(const char* name, const std::optional<Tensor>& peaks, const Rows& shape,
                cogview::Relax relax, int64_t number) {
  STD_TORCH_CHECK((relax == cogview::Relax::kTensor) == peaks.has_value(), name,
                  ": expected with relax = 2, and only then");
  if (!peaks.has_value()) return nullptr;
  check_contiguous(name, *peaks, shape.like, {number});
  check_float32(name, *peaks);
  return static_cast<float*>(peaks->data_ptr());
}

cogview::Dropout dropout_of(const std::optional<Tensor>& seed, int64_t dropout, const Rows& shape) {
  STD_TORCH_CHECK(dropout >= 0 && dropout <= 65536, "dropout: expected 0 to 65536, got ", dropout);
  STD_TORCH_CHECK((dropout > 0) == seed.has_value(),
                  "seed: expected where elements are dropped, and only then");
  if (!seed.has_value()) return {};
  check_contiguous("seed", *seed, shape.like, {1});
  STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long, "seed: expected int64");
  return {static_cast<const int64_t*>(seed->data_ptr()), static_cast<int>(dropout)};
}

cogview::Epsilon eps_of(double eps, const cogview::Dropout& dropout) {
  // Where everything is dropped, nothing is there to be divided.
  const double kept = dropout.threshold == 65536 ? 1.0 : 1 - dropout.threshold / 65536.0;
  return {static_cast<float>(eps), static_cast<float>(eps * kept * kept)};
}

// The gradients of weights and biases that are wanted, and the rows of their partial sums.
class ParameterGradients {
 public:
  ParameterGradients(const std::optional<Tensor>& partial, int num_blocks, const Rows& shape)
      : partial_(partial), shape_(shape) {
    sums_.num_blocks = num_blocks;
    sums_.hidden = shape.hidden;
  }

  void add(const char* name, const std::optional<Tensor>& gradient, ScalarType norm_dtype) {
    cogview::ParameterGradient& last = sums_.gradients[sums_.num_gradients++];
    last.data = parameter_of(name, gradient, shape_, norm_dtype, &last.dtype);
    wanted_ |= last.data != nullptr;
  }

  // After the last `add`.
  float* partial() {
    STD_TORCH_CHECK(wanted_ == partial_.has_value(),
                    "partial: expected with gradients of parameters, and only then");
    if (!wanted_) return nullptr;
    check_contiguous("partial", *partial_, shape_.like,
                     {sums_.num_gradients, sums_.num_blocks, shape_.hidden});
    check_float32("partial", *partial_);
    STD_TORCH_CHECK(begins_aligned(*partial_),
                    "partial: expected to begin at a multiple of 16 bytes");
    return static_cast<float*>(partial_->data_ptr());
  }

  cudaError_t add_up(cudaStream_t stream) {
    sums_.partial = partial();
    return wanted_ ? pb_relax_layer_norm_partial_sums(sums_, stream) : cudaSuccess;
  }

 private:
  const std::optional<Tensor>& partial_;
  const Rows& shape_;
  cogview::PartialSumsParams sums_ = {};
  bool wanted_ = false;
};

// y and statistics are written; peak becomes max|x|.
void pb_relax_layer_norm_forward_out(const Tensor& x, std::optional<Tensor> weight,
                                     std::optional<Tensor> bias, double eps, int64_t relax,
                                     int64_t num_blocks, std::optional<Tensor> peak, Tensor y,
                                     Tensor statistics) {
  const Rows shape = rows_of("x", x);
  const ScalarType dtype = x.scalar_type();
  cogview::PbRelaxLayerNormForwardParams params = {};
  params.rows = shape.rows;
  params.hidden = shape.hidden;
  params.x_dtype = params.y_dtype = dtype_of("x", x);
  params.x = const_rows("x", &x, shape, dtype);
  params.parameters = norm_parameters("weight", weight, "bias", bias, shape, dtype);
  params.relax = relax_of(relax);
  params.eps = eps_of(eps, {});
  params.num_blocks = num_blocks_of(num_blocks);
  params.peak = peaks_of("peak", peak, shape, params.relax, 1);
  params.y = written_rows("y", &y, shape, dtype);
  params.statistics = statistics_of("statistics", &statistics, shape);
  run("pb_relax_layer_norm_forward_out", x,
      {{"x", &x, Access::kRead},
       {"weight", tensor_or_null(weight), Access::kRead},
       {"bias", tensor_or_null(bias), Access::kRead},
       {"peak", tensor_or_null(peak), Access::kWorkspace},
       {"y", &y, Access::kWriteAll},
       {"statistics", &statistics, Access::kWriteAll}},
      [&](cudaStream_t stream) { return pb_relax_layer_norm_forward(params, stream); });
}

// dx, partial and, where given, dweight and dbias are written.
void pb_relax_layer_norm_backward_out(const Tensor& dy, const Tensor& x,
                                      std::optional<Tensor> weight, const Tensor& statistics,
                                      int64_t num_blocks, Tensor dx, std::optional<Tensor> partial,
                                      std::optional<Tensor> dweight, std::optional<Tensor> dbias) {
  const Rows shape = rows_of("x", x);
  const ScalarType dtype = x.scalar_type();
  cogview::PbRelaxLayerNormBackwardParams params = {};
  params.rows = shape.rows;
  params.hidden = shape.hidden;
  params.x_dtype = params.dy_dtype = dtype_of("x", x);
  params.dy = const_rows("dy", &dy, shape, dtype);
  params.x = const_rows("x", &x, shape, dtype);
  params.weight = parameter_of("weight", weight, shape, dtype, &params.weight_dtype);
  params.statistics = statistics_of("statistics", &statistics, shape);
  params.num_blocks = num_blocks_of(num_blocks);
  params.dx = written_rows("dx", &dx, shape, dtype);
  ParameterGradients gradients(partial, params.num_blocks, shape);
  gradients.add("dweight", dweight, dtype);
  gradients.add("dbias", dbias, dtype);
  params.partial = gradients.partial();
  run("pb_relax_layer_norm_backward_out", x,
      {{"dy", &dy, Access::kRead},
       {"x", &x, Access::kRead},
       {"weight", tensor_or_null(weight), Access::kRead},
       {"statistics", &statistics, Access::kRead},
       {"dx", &dx, Access::kWriteAll},
       {"partial", tensor_or_null(partial), Access::kWorkspace},
       {"dweight", tensor_or_null(dweight), Access::kWriteAll},
       {"dbias", tensor_or_null(dbias), Access::kWriteAll}},
      [&](cudaStream_t stream) {
        const cudaError_t status = pb_relax_layer_norm_backward(params, stream);
        return status == cudaSuccess ? gradients.add_up(stream) : status;
      });
}

// h, z and their statistics are written; peaks become max|f| and max|h|. Without z: h alone.
void sandwich_residual_forward_out(const Tensor& f, const Tensor& residual,
                                   std::optional<Tensor> post_weight,
                                   std::optional<Tensor> post_bias,
                                   std::optional<Tensor> pre_weight, std::optional<Tensor> pre_bias,
                                   std::optional<Tensor> seed, int64_t dropout, double eps,
                                   int64_t relax, int64_t num_blocks, std::optional<Tensor> peaks,
                                   Tensor h, std::optional<Tensor> z, Tensor f_statistics,
                                   std::optional<Tensor> h_statistics) {
  const Rows shape = rows_of("f", f);
  const ScalarType f_dtype = f.scalar_type(), h_dtype = h.scalar_type();
  cogview::SandwichResidualForwardParams params = {};
  params.rows = shape.rows;
  params.hidden = shape.hidden;
  params.f_dtype = dtype_of("f", f);
  params.h_dtype = dtype_of("h", h);
  check_residual_dtype(f_dtype, h_dtype);
  params.f = const_rows("f", &f, shape, f_dtype);
  params.residual = const_rows("residual", &residual, shape, h_dtype);
  params.post = norm_parameters("post_weight", post_weight, "post_bias", post_bias, shape, f_dtype);
  params.pre = norm_parameters("pre_weight", pre_weight, "pre_bias", pre_bias, shape, h_dtype);
  params.dropout = dropout_of(seed, dropout, shape);
  params.relax = relax_of(relax);
  params.post_eps = eps_of(eps, params.dropout);
  params.pre_eps = eps_of(eps, {});
  params.num_blocks = num_blocks_of(num_blocks);
  params.peaks = peaks_of("peaks", peaks, shape, params.relax, 2);
  params.h = written_rows("h", &h, shape, h_dtype);
  params.z = written_rows("z", tensor_or_null(z), shape, h_dtype);
  params.f_statistics = statistics_of("f_statistics", &f_statistics, shape);
  params.h_statistics = statistics_of("h_statistics", tensor_or_null(h_statistics), shape);
  STD_TORCH_CHECK(z.has_value() == h_statistics.has_value(), "h_statistics: expected with z");
  run("sandwich_residual_forward_out", f,
      {{"f", &f, Access::kRead},
       {"residual", &residual, Access::kRead},
       {"post_weight", tensor_or_null(post_weight), Access::kRead},
       {"post_bias", tensor_or_null(post_bias), Access::kRead},
       {"pre_weight", tensor_or_null(pre_weight), Access::kRead},
       {"pre_bias", tensor_or_null(pre_bias), Access::kRead},
       {"seed", tensor_or_null(seed), Access::kRead},
       {"peaks", tensor_or_null(peaks), Access::kWorkspace},
       {"h", &h, Access::kWriteAll},
       {"z", tensor_or_null(z), Access::kWriteAll},
       {"f_statistics", &f_statistics, Access::kWriteAll},
       {"h_statistics", tensor_or_null(h_statistics), Access::kWriteAll}},
      [&](cudaStream_t stream) { return sandwich_residual_forward(params, stream); });
}

// df, dresidual, partial and the wanted gradients are written. Without a final norm there is no dz,
// h, h_statistics and dresidual, which is dh.
void sandwich_residual_backward_out(
    const Tensor& dh, std::optional<Tensor> dz, const Tensor& f, std::optional<Tensor> h,
    std::optional<Tensor> post_weight, std::optional<Tensor> pre_weight, const Tensor& f_statistics,
    std::optional<Tensor> h_statistics, std::optional<Tensor> seed, int64_t dropout,
    int64_t num_blocks, Tensor df, std::optional<Tensor> dresidual, std::optional<Tensor> partial,
    std::optional<Tensor> dpost_weight, std::optional<Tensor> dpost_bias,
    std::optional<Tensor> dpre_weight, std::optional<Tensor> dpre_bias) {
  const Rows shape = rows_of("f", f);
  const ScalarType f_dtype = f.scalar_type(), h_dtype = dh.scalar_type();
  cogview::SandwichResidualBackwardParams params = {};
  params.rows = shape.rows;
  params.hidden = shape.hidden;
  params.f_dtype = dtype_of("f", f);
  params.h_dtype = dtype_of("dh", dh);
  check_residual_dtype(f_dtype, h_dtype);
  params.dh = const_rows("dh", &dh, shape, h_dtype);
  params.dz = const_rows("dz", tensor_or_null(dz), shape, h_dtype);
  params.f = const_rows("f", &f, shape, f_dtype);
  params.h = const_rows("h", tensor_or_null(h), shape, h_dtype);
  params.post_weight = parameter_of("post_weight", post_weight, shape, f_dtype, &params.post_dtype);
  params.pre_weight = parameter_of("pre_weight", pre_weight, shape, h_dtype, &params.pre_dtype);
  params.dropout = dropout_of(seed, dropout, shape);
  params.f_statistics = statistics_of("f_statistics", &f_statistics, shape);
  params.h_statistics = statistics_of("h_statistics", tensor_or_null(h_statistics), shape);
  params.num_blocks = num_blocks_of(num_blocks);
  params.df = written_rows("df", &df, shape, f_dtype);
  params.dresidual = written_rows("dresidual", tensor_or_null(dresidual), shape, h_dtype);
  const bool has_z = dz.has_value();
  STD_TORCH_CHECK(
      h.has_value() == has_z && h_statistics.has_value() == has_z && dresidual.has_value() == has_z,
      "h, h_statistics, dresidual: expected with dz, and only then");
  ParameterGradients gradients(partial, params.num_blocks, shape);
  gradients.add("dpost_weight", dpost_weight, f_dtype);
  gradients.add("dpost_bias", dpost_bias, f_dtype);
  if (has_z) {
    gradients.add("dpre_weight", dpre_weight, h_dtype);
    gradients.add("dpre_bias", dpre_bias, h_dtype);
  }
  params.partial = gradients.partial();
  run("sandwich_residual_backward_out", f,
      {{"dh", &dh, Access::kRead},
       {"dz", tensor_or_null(dz), Access::kRead},
       {"f", &f, Access::kRead},
       {"h", tensor_or_null(h), Access::kRead},
       {"post_weight", tensor_or_null(post_weight), Access::kRead},
       {"pre_weight", tensor_or_null(pre_weight), Access::kRead},
       {"f_statistics", &f_statistics, Access::kRead},
       {"h_statistics", tensor_or_null(h_statistics), Access::kRead},
       {"seed", tensor_or_null(seed), Access::kRead},
       {"df", &df, Access::kWriteAll},
       {"dresidual", tensor_or_null(dresidual), Access::kWriteAll},
       {"partial", tensor_or_null(partial), Access::kWorkspace},
       {"dpost_weight", tensor_or_null(dpost_weight), Access::kWriteAll},
       {"dpost_bias", tensor_or_null(dpost_bias), Access::kWriteAll},
       {"dpre_weight", tensor_or_null(dpre_weight), Access::kWriteAll},
       {"dpre_bias", tensor_or_null(dpre_bias), Access::kWriteAll}},
      [&](cudaStream_t stream) {
        const cudaError_t status = sandwich_residual_backward(params, stream);
        return status == cudaSuccess ? gradients.add_up(stream) : status;
      });
}

// Three-region attention

// A tensor (batch, heads, rows, head_dim) whose rows begin at multiples of 16 bytes.
void check_heads(const char* name, const Tensor& tensor, const Tensor& q,
                 const std::vector<int64_t>& shape) {
  check_tensor(name, tensor, q, shape);
  STD_TORCH_CHECK(tensor.scalar_type() == q.scalar_type(), name, ": expected the dtype of q");
  STD_TORCH_CHECK(tensor.stride(3) == 1, name, ": expected a contiguous last dimension");
  bool aligned = begins_aligned(tensor);
  for (int64_t i = 0; i < 3; ++i) aligned &= tensor.size(i) <= 1 || tensor.stride(i) % 8 == 0;
  STD_TORCH_CHECK(aligned, name, ": expected rows at multiples of 16 bytes");
}

// The stride of a dimension of size one is anything, so none is used.
cogview::HeadStrides strides_of(const Tensor& tensor) {
  const auto stride = [&](int64_t i) { return tensor.size(i) <= 1 ? 0 : tensor.stride(i); };
  return {stride(0), stride(1), stride(2)};
}

cogview::ConstHeads const_heads(const Tensor& tensor) {
  return {tensor.data_ptr(), strides_of(tensor)};
}

cogview::Heads heads(const Tensor& tensor) { return {tensor.data_ptr(), strides_of(tensor)}; }

// Checks q, k, v and far_keys, and gathers what every launch knows.
cogview::ThreeRegionProblem problem_of(const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Tensor& far_keys, int64_t query_window,
                                       int64_t key_window_times, double text_bias,
                                       double pivot_bias, double softmax_scale) {
  STD_TORCH_CHECK(q.dim() == 4 && q.numel() > 0,
                  "q: expected a tensor (batch, num_heads, q_len, head_dim) with elements");
  STD_TORCH_CHECK(k.dim() == 4 && k.numel() > 0,
                  "k: expected a tensor (batch, num_kv_heads, k_len, head_dim) with elements");
  const int64_t batch = q.size(0), num_heads = q.size(1), q_len = q.size(2), head_dim = q.size(3);
  const int64_t num_kv_heads = k.size(1), k_len = k.size(2);
  const cogview::DType dtype = dtype_of("q", q);
  STD_TORCH_CHECK(dtype != cogview::DType::kFloat32, "q: expected float16 or bfloat16");
  STD_TORCH_CHECK(head_dim == 32 || head_dim == 64 || head_dim == 96 || head_dim == 128,
                  "q: expected a head_dim of 32, 64, 96 or 128, got ", head_dim);
  STD_TORCH_CHECK(k_len <= int64_t{1} << 30, "k: expected at most 2^30 keys, got ", k_len);
  STD_TORCH_CHECK(q_len <= k_len, "q: expected at most ", k_len, " rows as k, got ", q_len);
  STD_TORCH_CHECK(num_heads % num_kv_heads == 0, "k: expected a number of heads that divides ",
                  num_heads, ", got ", num_kv_heads);
  check_heads("q", q, q, {batch, num_heads, q_len, head_dim});
  check_heads("k", k, q, {batch, num_kv_heads, k_len, head_dim});
  check_heads("v", v, q, {batch, num_kv_heads, k_len, head_dim});
  const int64_t columns = far_keys.dim() == 2 ? far_keys.size(1) : 2;
  STD_TORCH_CHECK(columns >= 2, "far_keys: expected at least two columns, got ", columns);
  check_contiguous("far_keys", far_keys, q, {batch, columns});
  check_int32("far_keys", far_keys);
  STD_TORCH_CHECK(query_window >= 1 && key_window_times >= 1,
                  "query_window, key_window_times: expected at least 1");

  cogview::ThreeRegionProblem problem = {};
  problem.batch = to_int("batch", batch);
  problem.num_heads = to_int("num_heads", num_heads);
  problem.num_kv_heads = to_int("num_kv_heads", num_kv_heads);
  problem.q_len = to_int("q_len", q_len);
  problem.k_len = to_int("k_len", k_len);
  problem.head_dim = to_int("head_dim", head_dim);
  problem.dtype = dtype;
  problem.num_pivots = to_int("far_keys", columns) - 2;
  // Larger windows and more of them see nothing more, and may be as large as an int64.
  problem.query_window = static_cast<int>(std::min(query_window, k_len));
  problem.num_windows =
      static_cast<int>(std::min(key_window_times, k_len / problem.query_window + 1));
  problem.softmax_scale = static_cast<float>(softmax_scale);
  problem.text_bias = static_cast<float>(text_bias);
  problem.pivot_bias = static_cast<float>(pivot_bias);
  problem.far_keys = static_cast<const int32_t*>(far_keys.data_ptr());
  return problem;
}

// A float32 number for each row of q.
float* row_numbers(const char* name, const Tensor& tensor, const Tensor& q) {
  check_contiguous(name, tensor, q, {q.size(0), q.size(1), q.size(2)});
  check_float32(name, tensor);
  return static_cast<float*>(tensor.data_ptr());
}

// far_keys is written.
void three_region_attention_far_keys_out(const Tensor& text_len, const Tensor& pivot_idx,
                                         int64_t k_len, Tensor far_keys) {
  STD_TORCH_CHECK(pivot_idx.dim() == 2 && pivot_idx.size(0) > 0,
                  "pivot_idx: expected a tensor (batch, num_pivots) with rows");
  STD_TORCH_CHECK(k_len >= 0 && k_len <= int64_t{1} << 30,
                  "k_len: expected at most 2^30 keys, got ", k_len);
  const int64_t batch = pivot_idx.size(0), num_pivots = pivot_idx.size(1);
  check_tensor("text_len", text_len, text_len, {batch});
  check_tensor("pivot_idx", pivot_idx, text_len, {batch, num_pivots});
  check_contiguous("far_keys", far_keys, text_len, {batch, num_pivots + 2});
  check_int32("text_len", text_len);
  check_int32("pivot_idx", pivot_idx);
  check_int32("far_keys", far_keys);

  cogview::ThreeRegionFarKeysParams params = {};
  params.batch = to_int("batch", batch);
  params.num_pivots = to_int("pivot_idx", num_pivots + 2) - 2;
  params.k_len = static_cast<int>(k_len);
  params.text_len = static_cast<const int32_t*>(text_len.data_ptr());
  params.text_len_stride = text_len.stride(0);
  params.pivot_idx = static_cast<const int32_t*>(pivot_idx.data_ptr());
  params.pivot_batch_stride = pivot_idx.stride(0);
  params.pivot_stride = pivot_idx.stride(1);
  params.far_keys = static_cast<int32_t*>(far_keys.data_ptr());
  run("three_region_attention_far_keys_out", text_len,
      {{"text_len", &text_len, Access::kRead},
       {"pivot_idx", &pivot_idx, Access::kRead},
       {"far_keys", &far_keys, Access::kWriteAll}},
      [&](cudaStream_t stream) { return three_region_attention_far_keys(params, stream); });
}

// out, row_max and row_log_sum are written.
void three_region_attention_forward_out(const Tensor& q, const Tensor& k, const Tensor& v,
                                        const Tensor& far_keys, int64_t query_window,
                                        int64_t key_window_times, double text_bias,
                                        double pivot_bias, double softmax_scale, Tensor out,
                                        Tensor row_max, Tensor row_log_sum) {
  cogview::ThreeRegionForwardParams params = {};
  params.problem = problem_of(q, k, v, far_keys, query_window, key_window_times, text_bias,
                              pivot_bias, softmax_scale);
  check_heads("out", out, q, shape_of_tensor(q));
  params.q = const_heads(q);
  params.k = const_heads(k);
  params.v = const_heads(v);
  params.out = heads(out);
  params.row_max = row_numbers("row_max", row_max, q);
  params.row_log_sum = row_numbers("row_log_sum", row_log_sum, q);
  run("three_region_attention_forward_out", q,
      {{"q", &q, Access::kRead},
       {"k", &k, Access::kRead},
       {"v", &v, Access::kRead},
       {"far_keys", &far_keys, Access::kRead},
       {"out", &out, Access::kWriteAll},
       {"row_max", &row_max, Access::kWriteAll},
       {"row_log_sum", &row_log_sum, Access::kWriteAll}},
      [&](cudaStream_t stream) { return three_region_attention_forward(params, stream); });
}

// dq, dk, dv and delta are written; bounds and partial are workspaces.
void three_region_attention_backward_out(
    const Tensor& dout, std::optional<Tensor> dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& row_max, const Tensor& row_log_sum,
    const Tensor& far_keys, int64_t query_window, int64_t key_window_times, double text_bias,
    double pivot_bias, double softmax_scale, Tensor dq, Tensor dk, Tensor dv, Tensor delta,
    std::optional<Tensor> bounds, int64_t num_splits, std::optional<Tensor> partial) {
  cogview::ThreeRegionBackwardParams params = {};
  params.problem = problem_of(q, k, v, far_keys, query_window, key_window_times, text_bias,
                              pivot_bias, softmax_scale);
  const cogview::ThreeRegionProblem& problem = params.problem;
  const int64_t batch = problem.batch, num_kv_heads = problem.num_kv_heads;
  check_heads("dout", dout, q, shape_of_tensor(q));
  check_heads("out", out, q, shape_of_tensor(q));
  check_heads("dq", dq, q, shape_of_tensor(q));
  check_heads("dk", dk, q, shape_of_tensor(k));
  check_heads("dv", dv, q, shape_of_tensor(v));
  params.q = const_heads(q);
  params.k = const_heads(k);
  params.v = const_heads(v);
  params.out = const_heads(out);
  params.dout = const_heads(dout);
  params.dlse = dlse.has_value() ? row_numbers("dlse", *dlse, q) : nullptr;
  params.row_max = row_numbers("row_max", row_max, q);
  params.row_log_sum = row_numbers("row_log_sum", row_log_sum, q);
  params.dq = heads(dq);
  params.dk = heads(dk);
  params.dv = heads(dv);
  params.delta = row_numbers("delta", delta, q);
  STD_TORCH_CHECK((problem.dtype == cogview::DType::kFloat16) == bounds.has_value(),
                  "bounds: expected with float16, and only then");
  if (bounds.has_value()) {
    check_contiguous("bounds", *bounds, q, {batch * (2 * q.size(1) + num_kv_heads)});
    check_int32("bounds", *bounds);
    params.bounds = static_cast<uint32_t*>(bounds->data_ptr());
  }
  STD_TORCH_CHECK(num_splits >= 1, "num_splits: expected at least 1, got ", num_splits);
  params.num_splits = to_int("num_splits", num_splits);
  STD_TORCH_CHECK((num_splits > 1) == partial.has_value(),
                  "partial: expected with more than one split, and only then");
  if (partial.has_value()) {
    check_contiguous("partial", *partial, q,
                     {num_splits, 2, batch, num_kv_heads,
                      three_region_attention_split_rows(problem), problem.head_dim});
    check_float32("partial", *partial);
    STD_TORCH_CHECK(begins_aligned(*partial),
                    "partial: expected to begin at a multiple of 16 bytes");
    params.partial = static_cast<float*>(partial->data_ptr());
  }
  run("three_region_attention_backward_out", q,
      {{"dout", &dout, Access::kRead},
       {"dlse", tensor_or_null(dlse), Access::kRead},
       {"q", &q, Access::kRead},
       {"k", &k, Access::kRead},
       {"v", &v, Access::kRead},
       {"out", &out, Access::kRead},
       {"row_max", &row_max, Access::kRead},
       {"row_log_sum", &row_log_sum, Access::kRead},
       {"far_keys", &far_keys, Access::kRead},
       {"dq", &dq, Access::kWriteAll},
       {"dk", &dk, Access::kWriteAll},
       {"dv", &dv, Access::kWriteAll},
       {"delta", &delta, Access::kWriteAll},
       {"bounds", tensor_or_null(bounds), Access::kWorkspace},
       {"partial", tensor_or_null(partial), Access::kWorkspace}},
      [&](cudaStream_t stream) { return three_region_attention_backward(params, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cogview_kernels, COGVIEW_DISPATCH_KEY, m) {
  m.impl("pb_relax_layer_norm_forward_out", TORCH_BOX(&pb_relax_layer_norm_forward_out));
  m.impl("pb_relax_layer_norm_backward_out", TORCH_BOX(&pb_relax_layer_norm_backward_out));
  m.impl("sandwich_residual_forward_out", TORCH_BOX(&sandwich_residual_forward_out));
  m.impl("sandwich_residual_backward_out", TORCH_BOX(&sandwich_residual_backward_out));
  m.impl("three_region_attention_far_keys_out", TORCH_BOX(&three_region_attention_far_keys_out));
  m.impl("three_region_attention_forward_out", TORCH_BOX(&three_region_attention_forward_out));
  m.impl("three_region_attention_backward_out", TORCH_BOX(&three_region_attention_backward_out));
}
