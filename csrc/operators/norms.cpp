// The operators of the norms: PB-relax LayerNorm and the sandwich residual.

#include "../sandwich_residual/sandwich_residual.h"
#include "checks.h"

namespace cogview::operators {
namespace {

// A call on rows: its methods return null where a tensor is absent.
class NormCall : public Call {
 public:
  NormCall(const char* name, const char* x_name, const Tensor& x) : Call(name, x) {
    const IntHeaderOnlyArrayRef sizes = x.sizes();
    STD_TORCH_CHECK(sizes.size() >= 2 && x.numel() > 0, x_name,
                    ": expected shape (..., hidden) with rows and elements");
    hidden_ = sizes.back();
    STD_TORCH_CHECK(hidden_ <= std::numeric_limits<int32_t>::max(), x_name,
                    ": hidden is too large");
    rows_ = x.numel() / hidden_;
  }

  int64_t rows() const { return rows_; }
  int64_t hidden() const { return hidden_; }

  // A matrix of contiguous rows, or a contiguous tensor of more dimensions.
  ConstRows read_rows(const char* name, Argument argument, ScalarType dtype) {
    if (!argument) return {};
    return rows(name, *argument, Access::kRead, dtype);
  }

  // The same, contiguous.
  void* write_rows(const char* name, Argument argument, ScalarType dtype) {
    if (!argument) return nullptr;
    rows(name, *argument, Access::kWriteAll, dtype);
    STD_TORCH_CHECK(argument->is_contiguous(), name, ": expected a contiguous tensor");
    return argument->data_ptr();
  }

  const RowStatistics* read_statistics(const char* name, Argument argument) {
    return statistics(name, argument, Access::kRead);
  }
  RowStatistics* write_statistics(const char* name, Argument argument) {
    return statistics(name, argument, Access::kWriteAll);
  }

  // A weight or a bias of a norm whose input has norm_dtype.
  const void* read_parameter(const char* name, Argument argument, ScalarType norm_dtype,
                             DType* dtype) {
    return parameter(name, argument, Access::kRead, norm_dtype, dtype);
  }
  void* write_parameter(const char* name, Argument argument, ScalarType norm_dtype, DType* dtype) {
    return parameter(name, argument, Access::kWriteAll, norm_dtype, dtype);
  }

  NormParameters read_parameters(const char* weight_name, Argument weight, const char* bias_name,
                                 Argument bias, ScalarType norm_dtype) {
    NormParameters norm = {nullptr, nullptr, dtype_of("the norm's input", norm_dtype)};
    norm.weight = read_parameter(weight_name, weight, norm_dtype, &norm.dtype);
    norm.bias = read_parameter(bias_name, bias, norm_dtype, &norm.dtype);
    STD_TORCH_CHECK(!weight || !bias || weight->scalar_type() == bias->scalar_type(), bias_name,
                    ": expected the dtype of ", weight_name);
    return norm;
  }

  // `number` float32 maxima that are zero; given if and only if one maximum is taken over the whole
  // tensor.
  float* peaks(const char* name, Argument argument, Relax relax, int64_t number) {
    STD_TORCH_CHECK((relax == Relax::kTensor) == bool(argument), name,
                    ": expected with relax = 2, and only then");
    if (!argument) return nullptr;
    void* data = contiguous(name, *argument, Access::kWorkspace, {number});
    check_float32(name, *argument);
    return static_cast<float*>(data);
  }

  Dropout read_dropout(Argument seed, int64_t dropout) {
    STD_TORCH_CHECK(dropout >= 0 && dropout <= 65536, "dropout: expected 0 to 65536, got ",
                    dropout);
    STD_TORCH_CHECK((dropout > 0) == bool(seed),
                    "seed: expected where elements are dropped, and only then");
    if (!seed) return {};
    const void* data = contiguous("seed", *seed, Access::kRead, {1});
    STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long, "seed: expected int64");
    return {static_cast<const int64_t*>(data), static_cast<int>(dropout)};
  }

 private:
  ConstRows rows(const char* name, const Tensor& tensor, Access access, ScalarType dtype) {
    if (tensor.dim() > 2) {
      const void* data = this->tensor(name, tensor, access);
      STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": unexpected dtype");
      STD_TORCH_CHECK(tensor.sizes().back() == hidden_ && tensor.numel() == rows_ * hidden_ &&
                          tensor.is_contiguous(),
                      name, ": expected a contiguous tensor with ", rows_, " rows of ", hidden_);
      return {data, hidden_};
    }
    const void* data = this->tensor(name, tensor, access, {rows_, hidden_});
    const IntHeaderOnlyArrayRef strides = tensor.strides();
    STD_TORCH_CHECK(hidden_ <= 1 || strides[1] == 1, name, ": expected contiguous rows");
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": unexpected dtype");
    return {data, strides[0]};
  }

  RowStatistics* statistics(const char* name, Argument argument, Access access) {
    if (!argument) return nullptr;
    void* data = contiguous(name, *argument, access, {rows_, 4});
    check_float32(name, *argument);
    check_aligned(name, data);
    return static_cast<RowStatistics*>(data);
  }

  void* parameter(const char* name, Argument argument, Access access, ScalarType norm_dtype,
                  DType* dtype) {
    if (!argument) return nullptr;
    void* data = contiguous(name, *argument, access, {hidden_});
    const ScalarType own = argument->scalar_type();
    STD_TORCH_CHECK(own == norm_dtype || own == ScalarType::Float, name,
                    ": expected the dtype of the norm's input or float32");
    *dtype = dtype_of(name, own);
    return data;
  }

  int64_t rows_, hidden_;
};

void check_residual_dtype(ScalarType f_dtype, ScalarType h_dtype) {
  STD_TORCH_CHECK(h_dtype == f_dtype || h_dtype == ScalarType::Float,
                  "residual: expected the dtype of f or float32");
}

Relax relax_of(int64_t relax) {
  STD_TORCH_CHECK(relax >= 0 && relax <= 2, "relax: expected 0, 1 or 2");
  return static_cast<Relax>(relax);
}

int num_blocks_of(int64_t num_blocks) {
  STD_TORCH_CHECK(num_blocks >= 1, "num_blocks: expected at least 1, got ", num_blocks);
  return to_int("num_blocks", num_blocks);
}

Epsilon eps_of(double eps, const Dropout& dropout) {
  // Where all elements are dropped, none is divided by 1 - p.
  const double kept = dropout.threshold == 65536 ? 1.0 : 1 - dropout.threshold / 65536.0;
  return {static_cast<float>(eps), static_cast<float>(eps * kept * kept)};
}

// The gradients of weights and biases that are wanted, and the rows of their partial sums.
class ParameterGradients {
 public:
  ParameterGradients(NormCall& call, int num_blocks) : call_(call) {
    sums_.num_blocks = num_blocks;
    sums_.hidden = call.hidden();
  }

  void add(const char* name, Argument gradient, ScalarType norm_dtype) {
    ParameterGradient& last = sums_.gradients[sums_.num_gradients++];
    last.data = call_.write_parameter(name, gradient, norm_dtype, &last.dtype);
    wanted_ |= last.data != nullptr;
  }

  // The workspace, after the last `add`.
  float* partial(Argument argument) {
    STD_TORCH_CHECK(wanted_ == bool(argument),
                    "partial: expected with gradients of parameters, and only then");
    if (!argument) return nullptr;
    void* data = call_.contiguous("partial", *argument, Access::kWorkspace,
                                  {sums_.num_gradients, sums_.num_blocks, sums_.hidden});
    check_float32("partial", *argument);
    check_aligned("partial", data);
    sums_.partial = static_cast<float*>(data);
    return static_cast<float*>(data);
  }

  cudaError_t add_up(cudaStream_t stream) const {
    return wanted_ ? pb_relax_layer_norm_partial_sums(sums_, stream) : cudaSuccess;
  }

 private:
  NormCall& call_;
  PartialSumsParams sums_ = {};
  bool wanted_ = false;
};

// y and statistics are written; peak becomes max|x|.
void pb_relax_layer_norm_forward_out(const Tensor& x, const std::optional<Tensor>& weight,
                                     const std::optional<Tensor>& bias, double eps, int64_t relax,
                                     int64_t num_blocks, const std::optional<Tensor>& peak,
                                     const Tensor& y, const Tensor& statistics) {
  NormCall call("pb_relax_layer_norm_forward_out", "x", x);
  const ScalarType dtype = x.scalar_type();
  PbRelaxLayerNormForwardParams params = {};
  params.rows = call.rows();
  params.hidden = call.hidden();
  params.x_dtype = params.y_dtype = dtype_of("x", dtype);
  params.x = call.read_rows("x", x, dtype);
  params.parameters = call.read_parameters("weight", weight, "bias", bias, dtype);
  params.relax = relax_of(relax);
  params.eps = eps_of(eps, {});
  params.num_blocks = num_blocks_of(num_blocks);
  params.peak = call.peaks("peak", peak, params.relax, 1);
  params.y = call.write_rows("y", y, dtype);
  params.statistics = call.write_statistics("statistics", statistics);
  call.launch([&](cudaStream_t stream) { return pb_relax_layer_norm_forward(params, stream); });
}

// dx, partial and, where given, dweight and dbias are written.
void pb_relax_layer_norm_backward_out(const Tensor& dy, const Tensor& x,
                                      const std::optional<Tensor>& weight, const Tensor& statistics,
                                      int64_t num_blocks, const Tensor& dx,
                                      const std::optional<Tensor>& partial,
                                      const std::optional<Tensor>& dweight,
                                      const std::optional<Tensor>& dbias) {
  NormCall call("pb_relax_layer_norm_backward_out", "x", x);
  const ScalarType dtype = x.scalar_type();
  PbRelaxLayerNormBackwardParams params = {};
  params.rows = call.rows();
  params.hidden = call.hidden();
  params.x_dtype = params.dy_dtype = dtype_of("x", dtype);
  params.dy = call.read_rows("dy", dy, dtype);
  params.x = call.read_rows("x", x, dtype);
  params.weight = call.read_parameter("weight", weight, dtype, &params.weight_dtype);
  params.statistics = call.read_statistics("statistics", statistics);
  params.num_blocks = num_blocks_of(num_blocks);
  params.dx = call.write_rows("dx", dx, dtype);
  ParameterGradients gradients(call, params.num_blocks);
  gradients.add("dweight", dweight, dtype);
  gradients.add("dbias", dbias, dtype);
  params.partial = gradients.partial(partial);
  call.launch([&](cudaStream_t stream) {
    const cudaError_t status = pb_relax_layer_norm_backward(params, stream);
    return status == cudaSuccess ? gradients.add_up(stream) : status;
  });
}

// h, z and their statistics are written; peaks become max|f| and max|h|. Without z: h alone.
void sandwich_residual_forward_out(
    const Tensor& f, const Tensor& residual, const std::optional<Tensor>& post_weight,
    const std::optional<Tensor>& post_bias, const std::optional<Tensor>& pre_weight,
    const std::optional<Tensor>& pre_bias, const std::optional<Tensor>& seed, int64_t dropout,
    double eps, int64_t relax, int64_t num_blocks, const std::optional<Tensor>& peaks,
    const Tensor& h, const std::optional<Tensor>& z, const Tensor& f_statistics,
    const std::optional<Tensor>& h_statistics) {
  NormCall call("sandwich_residual_forward_out", "f", f);
  const ScalarType f_dtype = f.scalar_type(), h_dtype = h.scalar_type();
  SandwichResidualForwardParams params = {};
  params.rows = call.rows();
  params.hidden = call.hidden();
  params.f_dtype = dtype_of("f", f_dtype);
  params.h_dtype = dtype_of("h", h_dtype);
  check_residual_dtype(f_dtype, h_dtype);
  params.f = call.read_rows("f", f, f_dtype);
  params.residual = call.read_rows("residual", residual, h_dtype);
  params.post = call.read_parameters("post_weight", post_weight, "post_bias", post_bias, f_dtype);
  params.pre = call.read_parameters("pre_weight", pre_weight, "pre_bias", pre_bias, h_dtype);
  params.dropout = call.read_dropout(seed, dropout);
  params.relax = relax_of(relax);
  params.post_eps = eps_of(eps, params.dropout);
  params.pre_eps = eps_of(eps, {});
  params.num_blocks = num_blocks_of(num_blocks);
  params.peaks = call.peaks("peaks", peaks, params.relax, 2);
  params.h = call.write_rows("h", h, h_dtype);
  params.z = call.write_rows("z", z, h_dtype);
  params.f_statistics = call.write_statistics("f_statistics", f_statistics);
  params.h_statistics = call.write_statistics("h_statistics", h_statistics);
  STD_TORCH_CHECK(z.has_value() == h_statistics.has_value(), "h_statistics: expected with z");
  call.launch([&](cudaStream_t stream) { return sandwich_residual_forward(params, stream); });
}

// df, dresidual, partial and the wanted gradients are written. Without a final norm, dz, h,
// h_statistics and dresidual, which would equal dh, are absent.
void sandwich_residual_backward_out(
    const Tensor& dh, const std::optional<Tensor>& dz, const Tensor& f,
    const std::optional<Tensor>& h, const std::optional<Tensor>& post_weight,
    const std::optional<Tensor>& pre_weight, const Tensor& f_statistics,
    const std::optional<Tensor>& h_statistics, const std::optional<Tensor>& seed, int64_t dropout,
    int64_t num_blocks, const Tensor& df, const std::optional<Tensor>& dresidual,
    const std::optional<Tensor>& partial, const std::optional<Tensor>& dpost_weight,
    const std::optional<Tensor>& dpost_bias, const std::optional<Tensor>& dpre_weight,
    const std::optional<Tensor>& dpre_bias) {
  NormCall call("sandwich_residual_backward_out", "f", f);
  const ScalarType f_dtype = f.scalar_type(), h_dtype = dh.scalar_type();
  SandwichResidualBackwardParams params = {};
  params.rows = call.rows();
  params.hidden = call.hidden();
  params.f_dtype = dtype_of("f", f_dtype);
  params.h_dtype = dtype_of("dh", h_dtype);
  check_residual_dtype(f_dtype, h_dtype);
  params.dh = call.read_rows("dh", dh, h_dtype);
  params.dz = call.read_rows("dz", dz, h_dtype);
  params.f = call.read_rows("f", f, f_dtype);
  params.h = call.read_rows("h", h, h_dtype);
  params.post_weight = call.read_parameter("post_weight", post_weight, f_dtype, &params.post_dtype);
  params.pre_weight = call.read_parameter("pre_weight", pre_weight, h_dtype, &params.pre_dtype);
  params.dropout = call.read_dropout(seed, dropout);
  params.f_statistics = call.read_statistics("f_statistics", f_statistics);
  params.h_statistics = call.read_statistics("h_statistics", h_statistics);
  params.num_blocks = num_blocks_of(num_blocks);
  params.df = call.write_rows("df", df, f_dtype);
  params.dresidual = call.write_rows("dresidual", dresidual, h_dtype);
  const bool has_z = dz.has_value();
  STD_TORCH_CHECK(
      h.has_value() == has_z && h_statistics.has_value() == has_z && dresidual.has_value() == has_z,
      "h, h_statistics, dresidual: expected with dz, and only then");
  ParameterGradients gradients(call, params.num_blocks);
  gradients.add("dpost_weight", dpost_weight, f_dtype);
  gradients.add("dpost_bias", dpost_bias, f_dtype);
  if (has_z) {
    gradients.add("dpre_weight", dpre_weight, h_dtype);
    gradients.add("dpre_bias", dpre_bias, h_dtype);
  }
  params.partial = gradients.partial(partial);
  call.launch([&](cudaStream_t stream) {
    const cudaError_t status = sandwich_residual_backward(params, stream);
    return status == cudaSuccess ? gradients.add_up(stream) : status;
  });
}

}  // namespace
}  // namespace cogview::operators

STABLE_TORCH_LIBRARY_IMPL(cogview_kernels, COGVIEW_DISPATCH_KEY, m) {
  namespace operators = cogview::operators;
  m.impl("pb_relax_layer_norm_forward_out", TORCH_BOX(&operators::pb_relax_layer_norm_forward_out));
  m.impl("pb_relax_layer_norm_backward_out",
         TORCH_BOX(&operators::pb_relax_layer_norm_backward_out));
  m.impl("sandwich_residual_forward_out", TORCH_BOX(&operators::sandwich_residual_forward_out));
  m.impl("sandwich_residual_backward_out", TORCH_BOX(&operators::sandwich_residual_backward_out));
}
