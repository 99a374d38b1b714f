// Launch interface of the PB-relax LayerNorm kernels. Plain C++: no torch, no device code.
#pragma once

#include "../launch.h"

namespace cogview {

enum class Relax : int { kNone = 0, kRow = 1, kTensor = 2 };

// What is added to the variance, in units of c^2. Where elements are dropped, those that are kept
// would be divided by 1 - p; they are not, as the norm undoes it, but where c is 1: without
// relaxation and for rows of zeros. There eps is multiplied by (1 - p)^2.
struct Epsilon {
  float relaxed, plain;
};

// A matrix of contiguous rows, row_stride elements apart; null where it is not given.
struct ConstRows {
  const void* data;
  int64_t row_stride;
};

// The weight and bias of a norm.
struct NormParameters {
  const void* weight;  // (hidden), may be null: 1
  const void* bias;    // (hidden), may be null: 0
  DType dtype;         // of both
};

// Elements of the input that count as zero: those whose 16 random bits are less than `threshold`.
struct Dropout {
  const int64_t* seed;  // (1); null: none are dropped
  int threshold;        // of 65536
};

// What the backward needs of a row, beside the row: with all in scaled units,
// xhat = ((x * scale - rough_mean) - shift) * rstd.
struct alignas(16) RowStatistics {
  float rough_mean, shift, rstd, scale;
};

// How rows are dealt out to threads and blocks, in all kernels of rows (plan.h). Columns go in vectors
// of eight. Each warp of a row has a part of them: vectors_per_thread for each lane, lane l's are l,
// l + 32, ... from the part's beginning on.
struct RowPlan {
  // Whole warps: no warp works on two rows, so that shuffles add up a row's columns.
  int threads_per_row;
  // Groups of so many threads in a block. Each goes from row to row on its own. One block fills a
  // multiprocessor.
  int rows_per_block;
  // 2: a group's next row arrives in shared memory while it works on one. 1: it arrives afterwards,
  // while other groups work.
  int stages;
  // Rows are moved sixteen bytes at once. Needs hidden % 8 == 0, and rows that begin at multiples of
  // 16 bytes.
  bool aligned;
  // At most, of a row.
  int vectors_per_thread;

  // From here on: of the launch, not read by kernels.

  // Of RowMemory.
  int shared_bytes;
  // One for each multiprocessor, but not more than rows.
  int num_blocks;

  int num_threads() const { return threads_per_row * rows_per_block; }
};

// How far the backward kernels go from a group's row to its next one, and what else the host
// computes for them: they read it where they need it, and no register holds it.
struct RowSteps {
  float inverse_hidden;
  int64_t rows;
  int64_t ahead;     // how far ahead rows are copied: a row for each stage
  int64_t bytes[6];  // of each matrix, in the order of the parameters
};

// y = LN(x), or y = residual + LN(dropout(x)).
struct PbRelaxLayerNormForwardParams {
  int64_t rows, hidden;
  DType x_dtype, y_dtype;  // where they differ, y is float32
  ConstRows x;             // (rows, hidden)
  ConstRows residual;      // (rows, hidden) of y_dtype, may be null: 0
  NormParameters parameters;
  Dropout dropout;
  Epsilon eps;
  Relax relax;
  int num_blocks;             // that the rows are dealt out to, at most
  float* peak;                // (1), zero: becomes max|x|; for Relax::kTensor
  bool peak_is_known;         // peak holds max|x|
  float* y_peak;              // (1), may be null: becomes the larger of itself and max|y|
  void* y;                    // (rows, hidden), contiguous
  RowStatistics* statistics;  // (rows)
  RowPlan plan;               // set by the launcher
};

// dx = add + the gradient of LN(dropout(x)).
struct PbRelaxLayerNormBackwardParams {
  int64_t rows, hidden;
  DType x_dtype, dy_dtype;  // where they differ, dy is float32; dx has x_dtype
  ConstRows dy;             // (rows, hidden)
  ConstRows x;              // (rows, hidden)
  ConstRows add;            // (rows, hidden) of x_dtype, may be null: 0
  const void* weight;       // (hidden), may be null: 1
  DType weight_dtype;
  Dropout dropout;
  const RowStatistics* statistics;  // (rows)
  int num_blocks;  // that the rows are dealt out to: exactly as many rows of `partial` are written
  void* dx;        // (rows, hidden), contiguous
  float* partial;  // (2, num_blocks, hidden): sums of dy * xhat, sums of dy; may be null
  RowPlan plan;    // set by the launcher, as steps of dy, x, add, dx
  RowSteps steps;
};

// A weight's or bias's gradient, the sum of its rows of `partial`.
struct ParameterGradient {
  void* data;  // (hidden), may be null: not wanted
  DType dtype;
};
constexpr int kMaxGradients = 4;

struct PartialSumsParams {
  const float* partial;  // (num_gradients, num_blocks, hidden)
  int num_gradients;
  int num_blocks;
  int64_t hidden;
  ParameterGradient gradients[kMaxGradients];
};

// All return the status of their launches; arguments were checked by the caller.
cudaError_t pb_relax_layer_norm_forward(const PbRelaxLayerNormForwardParams& params,
                                        cudaStream_t stream);
cudaError_t pb_relax_layer_norm_backward(const PbRelaxLayerNormBackwardParams& params,
                                         cudaStream_t stream);
cudaError_t pb_relax_layer_norm_partial_sums(const PartialSumsParams& params, cudaStream_t stream);

}  // namespace cogview
