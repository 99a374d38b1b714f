// Launch interface of the sandwich residual's kernels. Plain C++: no torch, no device code.
#pragma once

#include "../pb_relax_layer_norm/pb_relax_layer_norm.h"

namespace cogview {

// h = residual + LN_post(dropout(f)); z = LN_pre(h).
struct SandwichResidualForwardParams {
  int64_t rows, hidden;
  DType f_dtype, h_dtype;  // h_dtype also of residual and z; where they differ, float32
  ConstRows f;             // (rows, hidden)
  ConstRows residual;      // (rows, hidden)
  NormParameters post;     // of f's norm
  NormParameters pre;      // of h's norm
  Dropout dropout;
  Epsilon post_eps, pre_eps;
  Relax relax;
  int num_blocks;               // that the rows are dealt out to, at most
  float* peaks;                 // (2), zero: become max|f|, max|h|; for Relax::kTensor
  void* h;                      // (rows, hidden), contiguous
  void* z;                      // (rows, hidden), contiguous; null: h alone
  RowStatistics* f_statistics;  // (rows)
  RowStatistics* h_statistics;  // (rows); null without z
  RowPlan plan;                 // set by the launcher
};

struct SandwichResidualBackwardParams {
  int64_t rows, hidden;
  DType f_dtype, h_dtype;
  ConstRows dh;             // (rows, hidden)
  ConstRows dz;             // (rows, hidden); null without z, as h
  ConstRows f;              // (rows, hidden)
  ConstRows h;              // (rows, hidden)
  const void* post_weight;  // (hidden), may be null: 1
  const void* pre_weight;   // (hidden), may be null: 1
  DType post_dtype, pre_dtype;
  Dropout dropout;
  const RowStatistics* f_statistics;  // (rows)
  const RowStatistics* h_statistics;  // (rows)
  int num_blocks;   // that the rows are dealt out to: as many rows of `partial` are written
  void* df;         // (rows, hidden), contiguous
  void* dresidual;  // (rows, hidden), contiguous; null without z, where dh is it
  float* partial;   // (4, num_blocks, hidden): sums for the post weight and bias, then for those
                    // of pre, which are not there without z; may be null
  RowPlan plan;     // set by the launcher, as steps of dh, dz, f, h, df, dresidual
  RowSteps steps;
};

// Both return the status of their launches; arguments were checked by the caller.
cudaError_t sandwich_residual_forward(const SandwichResidualForwardParams& params,
                                      cudaStream_t stream);
cudaError_t sandwich_residual_backward(const SandwichResidualBackwardParams& params,
                                       cudaStream_t stream);

}  // namespace cogview
