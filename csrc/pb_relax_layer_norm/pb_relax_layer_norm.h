// Launch interface of the PB-relax LayerNorm kernels. Plain C++: no torch, no device code.
#pragma once

#include "../launch.h"

namespace cogview {

enum class Relax : int { kNone = 0, kRow = 1, kTensor = 2 };

// What every launch knows of the matrix it normalises.
struct RowsAndColumns {
  int64_t rows;
  int64_t hidden;
  DType dtype;         // of x, y, dy and dx
  DType weight_dtype;  // of weight, bias, dweight and dbias: `dtype` or float32
};

struct PbRelaxLayerNormForwardParams {
  RowsAndColumns shape;
  const void* x;         // (rows, hidden), rows x_row_stride elements apart
  int64_t x_row_stride;  // in elements
  const void* weight;    // (hidden), may be null: 1
  const void* bias;      // (hidden), may be null: 0
  const float* peak;     // (1), max|x| over the tensor; only for Relax::kTensor
  void* y;               // (rows, hidden), contiguous
  float* mean;           // (rows)
  float* rstd;           // (rows), 1 / sqrt(var + eps c^2)
  float eps;
  Relax relax;
};

struct PbRelaxLayerNormBackwardParams {
  RowsAndColumns shape;
  const void* dy;         // (rows, hidden), rows dy_row_stride elements apart
  int64_t dy_row_stride;  // in elements
  const void* x;          // (rows, hidden), rows x_row_stride elements apart
  int64_t x_row_stride;   // in elements
  const void* weight;     // (hidden), may be null: 1
  const float* mean;      // (rows)
  const float* rstd;      // (rows)
  void* dx;               // (rows, hidden), contiguous
  float* partial;         // (2, num_partials, hidden): sums of dy * xhat, sums of dy
  int64_t num_partials;   // at least 1; rows are dealt out to this many workers
  void* dweight;          // (hidden), may be null: not wanted
  void* dbias;            // (hidden), may be null: not wanted
};

// Both return the status of their launches; arguments were checked by the caller.
cudaError_t pb_relax_layer_norm_forward(const PbRelaxLayerNormForwardParams& params,
                                        cudaStream_t stream);
cudaError_t pb_relax_layer_norm_backward(const PbRelaxLayerNormBackwardParams& params,
                                         cudaStream_t stream);

}  // namespace cogview
