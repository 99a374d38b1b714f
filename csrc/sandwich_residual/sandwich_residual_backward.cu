// Sandwich residual, backward.
//
// Math, with hhat and fhat the normalised rows of h and dropout(f):
//   dresidual = dh + the gradient of LN_pre for dz
//   df = the gradient of LN_post for dresidual, zero where f was dropped
//   dpre_weight = sum over rows of dz * hhat;          dpre_bias = sum over rows of dz
//   dpost_weight = sum over rows of dresidual * fhat;  dpost_bias = sum over rows of dresidual
// with the gradient of a norm as in pb_relax_layer_norm_backward.cu.
//
// Phases     1 the first rows are on their way; two weights to shared memory. 2 each group goes from
//            row to row: sums of h's norm; dresidual and sums of f's norm; df. 3 the block's column
//            sums to `partial`, whose rows pb_relax_layer_norm_partial_sums.cu adds up; that kernel
//            may start when phase 3 does.
// Layout     dh, dz, f, h: rows at a stride; df, dresidual contiguous; partial (4, num_blocks,
//            hidden) float32, the post weight's and bias's sums first.
// Grid       num_blocks blocks, each with rows_per_block groups of threads (RowPlan). Row r is of
//            block r % num_blocks.
// Warps      threads_per_row threads, whole warps, own a row: dh, dz, f and h are read once, df and
//            dresidual are written once. Two vectors of each thread, whose column sums stay in
//            registers until phase 3. Two launches of pb_relax_layer_norm_backward serve instead
//            where a row is too wide, and without z.
// Plain      rows of 16 bits that are aligned, with nothing dropped, have a kernel of their own: what
//            a pass computes stays in registers for the next one, and a row's stage is refilled
//            before the sums of f's norm are known. Other rows are read again in shared memory, where
//            dresidual, not rounded, takes the place of dh and dz.
// Smem       of 2560 float16 columns, 5 warps a row, 2 groups:
//              two weights  20 480 bytes
//              2 stages     f, h, dh, dz, statistics and sums of each warp  41 440 bytes each; phase
//                           3 uses them for column sums             in all 103 360
// Barriers   a group's bar.sync: its warps' sums are there (RowSums). bar.warp.sync: two lanes'
//            copies of the statistics are there; all lanes have read them. The block's bar.sync:
//            weights are there; in phase 3, the groups' column sums are there.
// Writers    one thread writes each element of df, dresidual and `partial`. No atomics:
//            deterministic.
// Rounding   float32 throughout; df is computed from dresidual before it is rounded, except where two
//            launches serve.
// Reference  gradient of cogview_kernels.norm.reference.sandwich_residual

#include "../pb_relax_layer_norm/dropout.cuh"
#include "../pb_relax_layer_norm/gradients.cuh"
#include "../pb_relax_layer_norm/plan.h"
#include "sandwich_residual.h"

namespace cogview {
namespace {

constexpr int kPost = 0, kPre = 1;  // the norms, in the order of their gradients
constexpr int kVectors = 2;  // of a thread: more column sums than these registers do not hold

// Of a block at most, where rows may be plain: three warps on a quarter of a multiprocessor have 168
// registers a thread, four have 128, which are too few for all that the kernel holds.
constexpr int kPlainThreads = 384;

// The slots of a row.
template <typename F, typename H>
struct BackwardSlots {
  static constexpr int kF = 0, kH = kF + kVectors * kPieces<F>, kDh = kH + kVectors * kPieces<H>;
  static constexpr int kDz = kDh + kVectors * kPieces<H>;
  // Piece p of the residual's gradient in float32, in the slots of dh, and of dz where that has one
  // piece.
  static __device__ constexpr int gradient(int i, int p) {
    return kPieces<H> == 2 ? kDh + 2 * i + p : (p == 0 ? kDh : kDz) + i;
  }
  static constexpr StageSlots kStage = {kDz + kVectors * kPieces<H>, 2};
};

// kPlain: rows are aligned, nothing is dropped, and int holds numbers of rows and strides.
template <typename F, typename H, bool kPlain>
__global__ void __launch_bounds__(kPlain ? kPlainThreads : kBackwardThreads, 1)
    sandwich_residual_backward_kernel(const SandwichResidualBackwardParams params) {
  using Own = BackwardSlots<F, H>;
  constexpr StageSlots kSlots = Own::kStage;
  const RowPlan& plan = params.plan;
  const RowThread me(plan, params.hidden);
  const int hidden = int(params.hidden);
  const Columns<kVectors> columns(me, hidden);
  const bool aligned = kPlain || plan.aligned;
  const bool drops = !kPlain && params.dropout.seed != nullptr;
  const SharedWeights<2, kVectors> weights(me);  // of post, of pre
  const WarpMemory memory(plan, kSlots, weights.bytes(me.threads_per_row));
  const RowSums<kPlain> exchange(memory, me);

  // A row at this thread's columns. Found anew for each row: no registers hold pointers.
  using Row = std::conditional_t<kPlain, uint32_t, int64_t>;
  using Wide = std::conditional_t<kPlain, uint64_t, int64_t>;
  const auto input = [&](const ConstRows& rows, Row row, auto tag) {
    return static_cast<const decltype(tag)*>(rows.data) +
           (Wide{row} * Row(rows.row_stride) + columns.first());
  };
  const auto output = [&](void* rows, Row row, auto tag) {
    return static_cast<decltype(tag)*>(rows) + (Wide{row} * Row(hidden) + columns.first());
  };
  const auto copy = [&](Row row, const Slots& stage) {
    kSlots.copy_statistics(
        stage, (threadIdx.x % kWarpSize == 0 ? params.f_statistics : params.h_statistics) + row);
    stage.copy(Own::kH, input(params.h, row, H()), columns, aligned);
    stage.copy(Own::kDz, input(params.dz, row, H()), columns, aligned);
    stage.copy(Own::kDh, input(params.dh, row, H()), columns, aligned);
    stage.copy(Own::kF, input(params.f, row, F()), columns, aligned);
  };
  const auto prepare = [&] {
    if (me.row_in_block == 0) {
      float post[kVectors][kColumns], pre[kVectors][kColumns];
      load_weight<F>(params.post_weight, params.post_dtype, columns, hidden, post);
      load_weight<H>(params.pre_weight, params.pre_dtype, columns, hidden, pre);
      weights.store(kPost, post);
      weights.store(kPre, pre);
    }
    bar_sync();
  };

  ColumnSums<4, kVectors> sums;  // dresidual * fhat, dresidual, dz * hhat, dz
  const auto compute = [&](Row row, const Slots& stage, int, const auto& refill) {
    // Of h's norm, then of f's: the normalised row, and g. Where nothing else needs registers they are
    // held from pass to pass, of f's norm dresidual for g; elsewhere they are computed again.
    constexpr int kHeld = kPlain ? kVectors : 1;
    float xhat[kHeld][kColumns], g[kHeld][kColumns], weight[kColumns];
    const auto add_gradients = [&](int norm, int i) {  // of its parameters; g is not weighed yet
      add_to_columns(xhat[i % kHeld], g[i % kHeld], sums.value[2 * norm][i],
                     sums.value[2 * norm + 1][i]);
    };
    const RowStatistics h_statistics = kSlots.load_statistics(stage, kPre);
    const auto load_h = [&](int i) {  // g is still dz
      bar_warp_sync();  // or ptxas loads all the vectors at once, and has no registers for them
      unpack(stage.load<H>(Own::kH + i * kPieces<H>), xhat[i % kHeld]);
      normalise(xhat[i % kHeld], h_statistics);
      unpack(stage.load<H>(Own::kDz + i * kPieces<H>), g[i % kHeld]);
      weights.load(kPre, i, weight);
    };
    float h_sums[2] = {0.f, 0.f};  // of g, of g * hhat, with g = dz * pre_weight
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      load_h(i);
      if constexpr (kPlain) add_gradients(kPre, i);
      weigh(weight, g[i % kHeld]);
      add_to_row(xhat[i % kHeld], g[i % kHeld], h_sums);
    }
    exchange.add(h_sums, 0, me);
    const RowGradient h_gradient(h_sums, params.steps.inverse_hidden, h_statistics);

    uint32_t kept = 0;  // a bit for each column
    if (drops) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const uint32_t of_vector = kept_columns(params.dropout, row, columns.vector_idx(i));
        stage.keep<F>(Own::kF + i * kPieces<F>, of_vector);
        kept |= of_vector << i * kColumns;
      }
    }
    const RowStatistics f_statistics = kSlots.load_statistics(stage, kPost);
    const auto load_f = [&](int i) {
      unpack(stage.load<F>(Own::kF + i * kPieces<F>), xhat[i % kHeld]);
      normalise(xhat[i % kHeld], f_statistics);
      weights.load(kPost, i, weight);
    };
    H* dresidual = output(params.dresidual, row, H());
    float f_sums[2] = {0.f, 0.f};  // of g, of g * fhat, with g = dresidual * post_weight
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if constexpr (kPlain) {
        bar_warp_sync();
      } else {
        load_h(i);
        add_gradients(kPre, i);
        weigh(weight, g[0]);
      }
      float gradient[kColumns];  // dresidual, unrounded
      unpack(stage.load<H>(Own::kDh + i * kPieces<H>), gradient);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const bool is_absent = i * columns.kApart + (kPlain ? 0 : j) >= columns.left;
        gradient[j] += h_gradient(g[i % kHeld][j], xhat[i % kHeld][j]);
        if (is_absent) gradient[j] = 0.f;
        g[i % kHeld][j] = gradient[j];
      }
      store_vector_at(dresidual, i * columns.kApart, columns.left, aligned, pack<H>(gradient));
      if constexpr (!kPlain) {
        const Vector<float> unrounded = pack<float>(gradient);
#pragma unroll
        for (int p = 0; p < 2; ++p) st_shared_v4(stage.at(Own::gradient(i, p)), unrounded.piece[p]);
      }
      load_f(i);
      if constexpr (kPlain) add_gradients(kPost, i);
      weigh(weight, gradient);
      add_to_row(xhat[i % kHeld], gradient, f_sums);
    }
    if constexpr (kPlain) refill();
    exchange.add(f_sums, 1, me);
    const RowGradient f_gradient(f_sums, params.steps.inverse_hidden, f_statistics);
    F* df = output(params.df, row, F());
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if constexpr (kPlain) {
        weights.load(kPost, i, weight);
      } else {
        Vector<float> unrounded;
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          unrounded.piece[p] = ld_shared_v4(stage.at(Own::gradient(i, p)));
        }
        unpack(unrounded, g[0]);
        load_f(i);
        add_gradients(kPost, i);
      }
      weigh(weight, g[i % kHeld]);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        g[i % kHeld][j] = f_gradient(g[i % kHeld][j], xhat[i % kHeld][j]);
      }
      Vector<F> packed = pack<F>(g[i % kHeld]);
      if (drops) keep_columns(kept >> i * kColumns, packed);
      store_vector_at(df, i * columns.kApart, columns.left, aligned, packed);
    }
    if constexpr (!kPlain) refill();
  };
  const Slots stages = for_each_row_ahead(plan, params.steps, kSlots, memory.own, Row(params.rows),
                                          Row(first_row(me)), copy, prepare, compute);
  if (params.partial != nullptr) {
    sums.store(params.partial, hidden, me, columns, stages, memory.bytes);
  }
}

// One norm after the other.
cudaError_t launch_norms(const SandwichResidualBackwardParams& params, cudaStream_t stream) {
  const int64_t gradient = int64_t{params.num_blocks} * params.hidden;  // of `partial`
  PbRelaxLayerNormBackwardParams norm = {};
  norm.rows = params.rows;
  norm.hidden = params.hidden;
  norm.num_blocks = params.num_blocks;
  norm.dy = params.dh;
  norm.dy_dtype = params.h_dtype;
  if (params.dresidual != nullptr) {
    norm.dy = params.dz;
    norm.x_dtype = params.h_dtype;
    norm.x = params.h;
    norm.add = params.dh;
    norm.weight = params.pre_weight;
    norm.weight_dtype = params.pre_dtype;
    norm.statistics = params.h_statistics;
    norm.dx = params.dresidual;
    norm.partial = params.partial == nullptr ? nullptr : params.partial + 2 * gradient;
    const cudaError_t status = pb_relax_layer_norm_backward(norm, stream);
    if (status != cudaSuccess) return status;
    norm.dy = {params.dresidual, params.hidden};
  }
  norm.x_dtype = params.f_dtype;
  norm.x = params.f;
  norm.add = {};
  norm.weight = params.post_weight;
  norm.weight_dtype = params.post_dtype;
  norm.dropout = params.dropout;
  norm.statistics = params.f_statistics;
  norm.dx = params.df;
  norm.partial = params.partial;
  return pb_relax_layer_norm_backward(norm, stream);
}

}  // namespace

cudaError_t sandwich_residual_backward(const SandwichResidualBackwardParams& given,
                                       cudaStream_t stream) {
  if (given.dresidual == nullptr) return launch_norms(given, stream);
  SandwichResidualBackwardParams params = given;
  const std::initializer_list<TypedRows> matrices = {
      {params.dh, params.h_dtype},
      {params.dz, params.h_dtype},
      {params.f, params.f_dtype},
      {params.h, params.h_dtype},
      {{params.df, params.hidden}, params.f_dtype},
      {{params.dresidual, params.hidden}, params.h_dtype}};
  BackwardNeeds needs = {};
  needs.matrices = matrices;
  needs.pieces = pieces_of(params.f_dtype) + 3 * pieces_of(params.h_dtype);
  needs.statistics = 2;
  needs.vectors = kVectors;
  needs.num_weights = 2;
  // Not by alignment: wherever a row lies, the same groups add up the same sums.
  const bool few = params.f_dtype == params.h_dtype && params.h_dtype != DType::kFloat32 &&
                   params.dropout.seed == nullptr &&
                   params.hidden <= kPlainThreads * kVectors * kColumns;
  needs.max_threads = few ? kPlainThreads : kBackwardThreads;
  bool fits = false;
  const cudaError_t status = plan_backward(needs, &params, &fits);
  if (status != cudaSuccess) return status;
  if (!fits) return launch_norms(params, stream);
  const bool plain = few && params.plan.aligned && int_holds(params.rows, params.steps, matrices);
  return with_dtypes(params.f_dtype, params.h_dtype, [&](auto f, auto h) {
    using F = typename decltype(f)::Type;
    using H = typename decltype(h)::Type;
    if constexpr (std::is_same_v<F, H> && kPieces<H> == 1) {
      if (plain) {
        return launch_planned<sandwich_residual_backward_kernel<F, H, true>>(params, stream);
      }
    }
    return launch_planned<sandwich_residual_backward_kernel<F, H, false>>(params, stream);
  });
}

}  // namespace cogview
