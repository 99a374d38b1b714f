// Gradients of weights and biases, as the backward kernels collect them.
#pragma once

#include "row_pipeline.cuh"
#include "statistics.cuh"

namespace cogview {

// Two sums for each warp, and again for the next call of reduce_row.
constexpr int kGradientScratchFloats = 2 * 2 * kMaxWarps;
static_assert(kGradientScratchFloats * sizeof(float) <= kRowArrayBytes);

// A thread's sums for its columns, one set for each gradient.
template <int kGradients, int kVectors>
struct ColumnSums {
  float value[kGradients][kVectors][kColumns] = {};

  // Adds up the sums of the rows that the block works on at once, in order, and stores them in the
  // block's rows of `partial` (kGradients, gridDim.x, hidden). Call it after the last round: it uses
  // the slots where rows arrived.
  __device__ __forceinline__ void store(float* partial, int64_t hidden, const RowThread& me) {
    uint4* slots = reinterpret_cast<uint4*>(dynamic_shared()) + me.in_row;
    const int rows = int(blockDim.x) / me.threads_per_row;
    for (int other = 1; other < rows; ++other) {
      bar_sync();
      uint4* slot = slots;
#pragma unroll
      for (int g = 0; g < kGradients; ++g) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          if (me.row_in_block == other) {
            const Vector<float> sums = pack<float>(value[g][i]);
            st_shared_v4(slot, sums.piece[0]);
            st_shared_v4(slot + me.threads_per_row, sums.piece[1]);
          }
          slot += 2 * me.threads_per_row;
        }
      }
      bar_sync();
      slot = slots;
#pragma unroll
      for (int g = 0; g < kGradients; ++g) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          if (me.row_in_block == 0) {
            float sums[kColumns];
            unpack(Vector<float>{{ld_shared_v4(slot), ld_shared_v4(slot + me.threads_per_row)}},
                   sums);
#pragma unroll
            for (int j = 0; j < kColumns; ++j) value[g][i][j] += sums[j];
          }
          slot += 2 * me.threads_per_row;
        }
      }
    }
    if (me.row_in_block > 0) return;
#pragma unroll
    for (int g = 0; g < kGradients; ++g) {
      float* row = partial + (int64_t{g} * gridDim.x + blockIdx.x) * hidden;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        store_vector_at(row, me.column(i), hidden, hidden % kColumns == 0,
                        pack<float>(value[g][i]));
      }
    }
  }
};

// x becomes xhat.
__device__ __forceinline__ void normalise(float (&x)[kColumns], const RowStatistics& row) {
  const float offset = row.shift * row.rstd;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    x[j] = (x[j] * row.scale - row.rough_mean) * row.rstd - offset;
  }
}

// What a thread adds to its row's sums of g and of g xhat, with g = dy weight, and to its columns'
// sums of dy xhat and dy. dy becomes g.
__device__ __forceinline__ void add_columns(const float (&xhat)[kColumns], float (&dy)[kColumns],
                                            const float (&weight)[kColumns], float (&row_sums)[2],
                                            float (&dweight)[kColumns], float (&dbias)[kColumns]) {
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    dweight[j] += dy[j] * xhat[j];
    dbias[j] += dy[j];
    dy[j] *= weight[j];
    row_sums[0] += dy[j];
    row_sums[1] += dy[j] * xhat[j];
  }
}

// The gradient for x, from a row's sums of g and of g xhat.
struct RowGradient {
  float mean_g_xhat, offset, rstd, scale;

  __device__ __forceinline__ RowGradient(const float (&row_sums)[2], float inverse_hidden,
                                         const RowStatistics& row)
      : mean_g_xhat(row_sums[1] * inverse_hidden),
        offset(row_sums[0] * inverse_hidden * row.rstd),
        rstd(row.rstd),
        scale(row.scale) {}

  // (g - mean(g) - xhat mean(g xhat)) rstd, in the units of x. rstd scale may exceed float32.
  __device__ __forceinline__ float operator()(float g, float xhat) const {
    return ((g - xhat * mean_g_xhat) * rstd - offset) * scale;
  }
};

}  // namespace cogview
