// The operators of three-region attention.

#include "../three_region_attention/three_region_attention.h"
#include "checks.h"

namespace cogview::operators {
namespace {

class AttentionCall : public Call {
 public:
  AttentionCall(const char* name, const Tensor& q) : Call(name, q), dtype_(q.scalar_type()) {}

  // A tensor (batch, heads, rows, head_dim) whose rows begin at multiples of 16 bytes.
  ConstHeads read_heads(const char* name, const Tensor& tensor, const Shape& shape) {
    const Heads heads = this->heads(name, tensor, Access::kRead, shape);
    return {heads.data, heads.stride};
  }
  Heads write_heads(const char* name, const Tensor& tensor, const Shape& shape) {
    return heads(name, tensor, Access::kWriteAll, shape);
  }

  // A float32 number for each row of q.
  const float* read_row_numbers(const char* name, const Tensor& tensor,
                                const ThreeRegionProblem& problem) {
    return row_numbers(name, tensor, Access::kRead, problem);
  }
  float* write_row_numbers(const char* name, const Tensor& tensor,
                           const ThreeRegionProblem& problem) {
    return row_numbers(name, tensor, Access::kWriteAll, problem);
  }

  // The workspace of splits.
  float* write_partial(const Tensor& tensor, const Shape& shape) {
    void* data = contiguous("partial", tensor, Access::kWorkspace, shape);
    check_float32("partial", tensor);
    check_aligned("partial", data);
    return static_cast<float*>(data);
  }

  // Sets what forward and backward share: problem, q, k and v.
  template <typename Params>
  void read_problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& far_keys,
                    int64_t query_window, int64_t key_window_times, double text_bias,
                    double pivot_bias, double softmax_scale, Params& params) {
    const IntHeaderOnlyArrayRef q_sizes = q.sizes(), k_sizes = k.sizes();
    STD_TORCH_CHECK(q_sizes.size() == 4 && q.numel() > 0,
                    "q: expected a tensor (batch, num_heads, q_len, head_dim) with elements");
    STD_TORCH_CHECK(k_sizes.size() == 4 && k.numel() > 0,
                    "k: expected a tensor (batch, num_kv_heads, k_len, head_dim) with elements");
    const int64_t batch = q_sizes[0], num_heads = q_sizes[1], q_len = q_sizes[2];
    const int64_t head_dim = q_sizes[3], num_kv_heads = k_sizes[1], k_len = k_sizes[2];
    ThreeRegionProblem& problem = params.problem;
    problem.dtype = dtype_of("q", dtype_);
    STD_TORCH_CHECK(problem.dtype != DType::kFloat32, "q: expected float16 or bfloat16");
    problem.head_dim = to_int("head_dim", head_dim);
    const std::optional<std::string> unsupported =
        three_region_attention_unsupported(problem, device_of(q.get_device_index()));
    STD_TORCH_CHECK(!unsupported.has_value(), "q: ", *unsupported);
    STD_TORCH_CHECK(k_len <= int64_t{1} << 30, "k: expected at most 2^30 keys, got ", k_len);
    STD_TORCH_CHECK(q_len <= k_len, "q: expected at most ", k_len, " rows as k, got ", q_len);
    STD_TORCH_CHECK(num_heads % num_kv_heads == 0, "k: expected a number of heads that divides ",
                    num_heads, ", got ", num_kv_heads);
    params.q = read_heads("q", q, {batch, num_heads, q_len, head_dim});
    params.k = read_heads("k", k, {batch, num_kv_heads, k_len, head_dim});
    params.v = read_heads("v", v, {batch, num_kv_heads, k_len, head_dim});
    // (batch, columns) for all heads of k and v, or (batch, num_kv_heads, columns).
    const int64_t dims = far_keys.dim(), columns = dims >= 2 ? far_keys.size(dims - 1) : 2;
    STD_TORCH_CHECK(columns >= 2, "far_keys: expected at least two columns, got ", columns);
    problem.far_keys = static_cast<const int32_t*>(
        dims == 3 ? contiguous("far_keys", far_keys, Access::kRead, {batch, num_kv_heads, columns})
                  : contiguous("far_keys", far_keys, Access::kRead, {batch, columns}));
    problem.far_key_heads = dims == 3 ? to_int("num_kv_heads", num_kv_heads) : 1;
    check_int32("far_keys", far_keys);
    STD_TORCH_CHECK(query_window >= 1 && key_window_times >= 1,
                    "query_window, key_window_times: expected at least 1");

    problem.batch = to_int("batch", batch);
    problem.num_heads = to_int("num_heads", num_heads);
    problem.num_kv_heads = to_int("num_kv_heads", num_kv_heads);
    problem.q_len = to_int("q_len", q_len);
    problem.k_len = to_int("k_len", k_len);
    problem.num_pivots = to_int("far_keys", columns) - 2;
    // Given windows may be as large as an int64; beyond k_len they allow no more keys.
    problem.query_window = static_cast<int>(std::min(query_window, k_len));
    problem.window_divisor = Divisor::of(problem.query_window);
    problem.head_divisor = Divisor::of(problem.num_heads);
    problem.group_divisor = Divisor::of(problem.num_heads / problem.num_kv_heads);
    problem.num_windows =
        static_cast<int>(std::min(key_window_times, k_len / problem.query_window + 1));
    problem.softmax_scale = static_cast<float>(softmax_scale);
    problem.text_bias = static_cast<float>(text_bias);
    problem.pivot_bias = static_cast<float>(pivot_bias);
  }

 private:
  Heads heads(const char* name, const Tensor& tensor, Access access, const Shape& shape) {
    void* data = this->tensor(name, tensor, access, shape);
    const int64_t* sizes = shape.begin();
    const IntHeaderOnlyArrayRef strides = tensor.strides();
    STD_TORCH_CHECK(tensor.scalar_type() == dtype_, name, ": expected the dtype of q");
    STD_TORCH_CHECK(strides[3] == 1, name, ": expected a contiguous last dimension");
    // A dimension of size one may have any stride; none is used.
    const auto stride = [&](int i) { return sizes[i] <= 1 ? 0 : strides[i]; };
    const HeadStrides used = {stride(0), stride(1), stride(2)};
    STD_TORCH_CHECK(is_aligned(data) && (used.batch | used.head | used.row) % 8 == 0, name,
                    ": expected rows at multiples of 16 bytes");
    return {data, used};
  }

  float* row_numbers(const char* name, const Tensor& tensor, Access access,
                     const ThreeRegionProblem& problem) {
    void* data =
        contiguous(name, tensor, access, {problem.batch, problem.num_heads, problem.q_len});
    check_float32(name, tensor);
    return static_cast<float*>(data);
  }

  ScalarType dtype_;
};

int read_splits(int64_t num_splits, const std::optional<Tensor>& partial) {
  STD_TORCH_CHECK(num_splits >= 1, "num_splits: expected at least 1, got ", num_splits);
  STD_TORCH_CHECK((num_splits > 1) == partial.has_value(),
                  "partial: expected with more than one split, and only then");
  return to_int("num_splits", num_splits);
}

// far_keys is written.
void three_region_attention_far_keys_out(const Tensor& text_len, const Tensor& pivot_idx,
                                         int64_t k_len, const Tensor& far_keys) {
  const int64_t dims = pivot_idx.dim();
  STD_TORCH_CHECK(
      (dims == 2 || (dims == 3 && pivot_idx.size(1) > 0)) && pivot_idx.size(0) > 0,
      "pivot_idx: expected a tensor (batch, num_pivots) or (batch, num_kv_heads, num_pivots) "
      "with rows");
  STD_TORCH_CHECK(k_len >= 0 && k_len <= int64_t{1} << 30,
                  "k_len: expected at most 2^30 keys, got ", k_len);
  const bool by_head = dims == 3;
  const int64_t batch = pivot_idx.size(0), num_pivots = pivot_idx.size(dims - 1);
  const int64_t num_heads = by_head ? pivot_idx.size(1) : 1;
  Call call("three_region_attention_far_keys_out", text_len);
  ThreeRegionFarKeysParams params = {};
  params.batch = to_int("batch", batch);
  params.num_heads = to_int("num_heads", num_heads);
  params.head_divisor = Divisor::of(params.num_heads);
  params.num_pivots = to_int("pivot_idx", num_pivots + 2) - 2;
  params.k_len = static_cast<int>(k_len);
  params.text_len =
      static_cast<const int32_t*>(call.tensor("text_len", text_len, Access::kRead, {batch}));
  params.text_len_stride = text_len.stride(0);
  params.pivot_idx =
      static_cast<const int32_t*>(call.tensor("pivot_idx", pivot_idx, Access::kRead));
  params.pivot_batch_stride = pivot_idx.stride(0);
  params.pivot_head_stride = by_head ? pivot_idx.stride(1) : 0;
  params.pivot_stride = pivot_idx.stride(dims - 1);
  const int64_t columns = num_pivots + 2;
  params.far_keys = static_cast<int32_t*>(
      by_head
          ? call.contiguous("far_keys", far_keys, Access::kWriteAll, {batch, num_heads, columns})
          : call.contiguous("far_keys", far_keys, Access::kWriteAll, {batch, columns}));
  check_int32("text_len", text_len);
  check_int32("pivot_idx", pivot_idx);
  check_int32("far_keys", far_keys);
  call.launch([&](cudaStream_t stream) { return three_region_attention_far_keys(params, stream); });
}

// out, row_max and row_log_sum are written; partial is a workspace.
void three_region_attention_forward_out(const Tensor& q, const Tensor& k, const Tensor& v,
                                        const Tensor& far_keys, int64_t query_window,
                                        int64_t key_window_times, double text_bias,
                                        double pivot_bias, double softmax_scale,
                                        const std::optional<Tensor>& kv_lens, const Tensor& out,
                                        const Tensor& row_max, const Tensor& row_log_sum,
                                        int64_t num_splits, const std::optional<Tensor>& partial) {
  AttentionCall call("three_region_attention_forward_out", q);
  ThreeRegionForwardParams params = {};
  call.read_problem(q, k, v, far_keys, query_window, key_window_times, text_bias, pivot_bias,
                    softmax_scale, params);
  const ThreeRegionProblem& problem = params.problem;
  params.out = call.write_heads(
      "out", out, {problem.batch, problem.num_heads, problem.q_len, problem.head_dim});
  params.row_max = call.write_row_numbers("row_max", row_max, problem);
  params.row_log_sum = call.write_row_numbers("row_log_sum", row_log_sum, problem);
  if (kv_lens.has_value()) {
    params.kv_lens = static_cast<const int32_t*>(
        call.contiguous("kv_lens", *kv_lens, Access::kRead, {problem.batch}));
    check_int32("kv_lens", *kv_lens);
  }
  params.num_splits = read_splits(num_splits, partial);
  if (partial.has_value()) {
    params.partial = call.write_partial(*partial, {num_splits, problem.batch, problem.num_heads,
                                                   problem.q_len, problem.head_dim + 4});
  }
  call.launch([&](cudaStream_t stream) { return three_region_attention_forward(params, stream); });
}

// dq, dk, dv and delta are written; bounds and partial are workspaces.
void three_region_attention_backward_out(const Tensor& dout, const std::optional<Tensor>& dlse,
                                         const Tensor& q, const Tensor& k, const Tensor& v,
                                         const Tensor& out, const Tensor& row_max,
                                         const Tensor& row_log_sum, const Tensor& far_keys,
                                         int64_t query_window, int64_t key_window_times,
                                         double text_bias, double pivot_bias, double softmax_scale,
                                         const Tensor& dq, const Tensor& dk, const Tensor& dv,
                                         const Tensor& delta, const std::optional<Tensor>& bounds,
                                         int64_t num_splits, const std::optional<Tensor>& partial) {
  AttentionCall call("three_region_attention_backward_out", q);
  ThreeRegionBackwardParams params = {};
  call.read_problem(q, k, v, far_keys, query_window, key_window_times, text_bias, pivot_bias,
                    softmax_scale, params);
  const ThreeRegionProblem& problem = params.problem;
  const int64_t batch = problem.batch, num_heads = problem.num_heads, q_len = problem.q_len;
  const int64_t num_kv_heads = problem.num_kv_heads, k_len = problem.k_len;
  const int64_t head_dim = problem.head_dim;
  const Shape q_shape = {batch, num_heads, q_len, head_dim};
  const Shape k_shape = {batch, num_kv_heads, k_len, head_dim};
  params.dout = call.read_heads("dout", dout, q_shape);
  params.out = call.read_heads("out", out, q_shape);
  params.dq = call.write_heads("dq", dq, q_shape);
  params.dk = call.write_heads("dk", dk, k_shape);
  params.dv = call.write_heads("dv", dv, k_shape);
  if (dlse.has_value()) params.dlse = call.read_row_numbers("dlse", *dlse, problem);
  params.row_max = call.read_row_numbers("row_max", row_max, problem);
  params.row_log_sum = call.read_row_numbers("row_log_sum", row_log_sum, problem);
  params.delta = call.write_row_numbers("delta", delta, problem);
  STD_TORCH_CHECK((problem.dtype == DType::kFloat16) == bounds.has_value(),
                  "bounds: expected with float16, and only then");
  if (bounds.has_value()) {
    void* data = call.contiguous("bounds", *bounds, Access::kWorkspace,
                                 {batch * (2 * num_heads + num_kv_heads)});
    check_int32("bounds", *bounds);
    params.bounds = static_cast<uint32_t*>(data);
  }
  params.num_splits = read_splits(num_splits, partial);
  if (partial.has_value()) {
    params.partial = call.write_partial(
        *partial,
        {num_splits, 2, batch, num_kv_heads, three_region_attention_split_rows(problem), head_dim});
  }
  call.launch([&](cudaStream_t stream) { return three_region_attention_backward(params, stream); });
}

}  // namespace
}  // namespace cogview::operators

STABLE_TORCH_LIBRARY_IMPL(cogview_kernels, COGVIEW_DISPATCH_KEY, m) {
  namespace operators = cogview::operators;
  m.impl("three_region_attention_far_keys_out",
         TORCH_BOX(&operators::three_region_attention_far_keys_out));
  m.impl("three_region_attention_forward_out",
         TORCH_BOX(&operators::three_region_attention_forward_out));
  m.impl("three_region_attention_backward_out",
         TORCH_BOX(&operators::three_region_attention_backward_out));
}
