// Rows of a LayerNorm on the device: how they arrive, which threads hold them, their statistics.
// RowPlan tells how rows and columns are dealt out.
#pragma once

#include <type_traits>

#include "../instructions/sm80.cuh"
#include "pb_relax_layer_norm.h"

namespace cogview {

// Vectors: eight columns, as they are stored

constexpr int kColumns = 8;
constexpr int kPieceBytes = 16;  // of an access

template <typename T>
constexpr int kPieces = kColumns * int(sizeof(T)) / kPieceBytes;

template <typename T>
struct Vector {
  uint4 piece[kPieces<T>];
};

template <typename T>
__device__ __forceinline__ void unpack(const Vector<T>& vector, float (&out)[kColumns]) {
  const T* elements = reinterpret_cast<const T*>(vector.piece);
#pragma unroll
  for (int j = 0; j < kColumns; ++j) out[j] = to_float(elements[j]);
}

template <typename T>
__device__ __forceinline__ Vector<T> pack(const float (&in)[kColumns]) {
  Vector<T> vector;
  uint32_t* words = reinterpret_cast<uint32_t*>(vector.piece);
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    if constexpr (sizeof(T) == 4) {
      words[j] = float_as_uint(in[j]);
    } else if (j % 2 == 0) {
      words[j / 2] = cvt_rn_x2<T>(in[j], in[j + 1]);
    }
  }
  return vector;
}

// From global memory that the kernel never writes; zero at columns beyond `hidden`.
template <typename T>
__device__ __forceinline__ Vector<T> load_vector_at(const T* row, int64_t column, int64_t hidden,
                                                    bool aligned) {
  Vector<T> vector = {};
  if (aligned) {
    if (column < hidden) {
#pragma unroll
      for (int p = 0; p < kPieces<T>; ++p) {
        vector.piece[p] = ld_global_nc_v4(row + column + p * kVector<T>);
      }
    }
  } else {
    T* elements = reinterpret_cast<T*>(vector.piece);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (column + j < hidden) elements[j] = row[column + j];
    }
  }
  return vector;
}

template <typename T>
__device__ __forceinline__ void store_vector_at(T* row, int64_t column, int64_t hidden,
                                                bool aligned, const Vector<T>& vector) {
  if (aligned) {
    if (column < hidden) {
#pragma unroll
      for (int p = 0; p < kPieces<T>; ++p) {
        st_global_v4(row + column + p * kVector<T>, vector.piece[p]);
      }
    }
  } else {
    const T* elements = reinterpret_cast<const T*>(vector.piece);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (column + j < hidden) row[column + j] = elements[j];
    }
  }
}

// Dropout

// Philox4x32-10 (Salmon et al., 2011): four random words for each counter.
struct Philox {
  uint32_t word[4];
};
__device__ __forceinline__ Philox philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2,
                                         uint32_t c3) {
  uint32_t key0 = uint32_t(key), key1 = uint32_t(key >> 32);
#pragma unroll 1  // or all the rounds' keys are kept in registers from row to row
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0, product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = uint32_t(product1 >> 32) ^ c1 ^ key0;
    c1 = uint32_t(product1);
    c2 = uint32_t(product0 >> 32) ^ c3 ^ key1;
    c3 = uint32_t(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Bit j is set where column j of the vector is kept.
__device__ __forceinline__ uint32_t kept_columns(const Dropout& dropout, int64_t row,
                                                 int64_t vector_idx) {
  const Philox random = philox(uint64_t(*dropout.seed), uint32_t(vector_idx), uint32_t(row),
                               uint32_t(uint64_t(row) >> 32), 0);
  uint32_t kept = 0;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    const int bits = int(random.word[j / 2] >> 16 * (j % 2) & 0xffffu);
    kept |= uint32_t(bits >= dropout.threshold) << j;
  }
  return kept;
}

template <typename T>
__device__ __forceinline__ void keep_columns(uint32_t kept, Vector<T>& vector) {
  uint32_t* words = reinterpret_cast<uint32_t*>(vector.piece);
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    const uint32_t mask = 0u - (kept >> j & 1u);  // all bits or none
    if constexpr (sizeof(T) == 4) {
      words[j] &= mask;
    } else {
      words[j / 2] &= j % 2 == 0 ? mask | 0xffff0000u : mask | 0xffffu;
    }
  }
}

// The first `count` columns stay, the others become zero.
template <typename T>
__device__ __forceinline__ void clear_beyond(int64_t count, Vector<T>& vector) {
  if (count < kColumns) keep_columns((1u << count) - 1u, vector);
}

// Threads and columns

struct RowThread {
  int in_row;           // number of this thread among those of its row
  int threads_per_row;  // whole warps
  int row_in_block;

  __device__ __forceinline__ explicit RowThread(const RowPlan& plan)
      : in_row(int(threadIdx.x) % plan.threads_per_row),
        threads_per_row(plan.threads_per_row),
        row_in_block(int(threadIdx.x) / plan.threads_per_row) {}

  // Of this thread's vectors.
  __device__ __forceinline__ int vector_idx(int i) const { return i * threads_per_row + in_row; }
  __device__ __forceinline__ int column(int i) const { return vector_idx(i) * kColumns; }
};

// Reduce numbers over the threads of a row: `combine(n, a, b)` is what becomes of number n. All
// threads of the block take part, and those of a row get the same results.
// `scratch` is shared memory of kCount floats for each warp; consecutive calls use different ones.
template <int kCount, typename Combine>
__device__ __forceinline__ void reduce_row(float (&number)[kCount], float* scratch,
                                           const RowThread& me, const Combine& combine) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      number[n] = combine(n, number[n], shfl_bfly(number[n], mask));
    }
  }
  const int num_warps = me.threads_per_row / kWarpSize;
  if (num_warps == 1) return;  // the whole block
  float* of_row = scratch + me.row_in_block * num_warps * kCount;
  if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) of_row[me.in_row / kWarpSize * kCount + n] = number[n];
  }
  bar_sync();
#pragma unroll
  for (int n = 0; n < kCount; ++n) number[n] = of_row[n];
  for (int warp = 1; warp < num_warps; ++warp) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      number[n] = combine(n, number[n], of_row[warp * kCount + n]);
    }
  }
}

struct Add {
  __device__ __forceinline__ float operator()(int, float a, float b) const { return a + b; }
};
// Number 0 is a maximum, the others are sums.
struct MaxThenAdd {
  __device__ __forceinline__ float operator()(int n, float a, float b) const {
    return n == 0 ? fmaxf(a, b) : a + b;
  }
};

// Arrival

// A thread's own slots of sixteen bytes in shared memory, side by side. Threads are an odd number of
// slots apart, so that neighbours reach into different banks.
__host__ __device__ constexpr int slots_apart(int slots) { return slots | 1; }

struct Slots {
  uint4* first;

  template <typename T>
  __device__ __forceinline__ Vector<T> load(int slot) const {
    Vector<T> vector;
#pragma unroll
    for (int p = 0; p < kPieces<T>; ++p) vector.piece[p] = ld_shared_v4(first + slot + p);
    return vector;
  }
  __device__ __forceinline__ RowStatistics load_statistics(int slot) const {
    const uint4 bits = ld_shared_v4(first + slot);
    return *reinterpret_cast<const RowStatistics*>(&bits);
  }
  template <typename T>
  __device__ __forceinline__ void store(int slot, const Vector<T>& vector) const {
#pragma unroll
    for (int p = 0; p < kPieces<T>; ++p) st_shared_v4(first + slot + p, vector.piece[p]);
  }
};

// Begin to copy this thread's vectors of a row to its slots, vector i from first_slot + i * step
// on: zeros beyond `hidden`, and where there is no row.
template <typename T, int kVectors>
__device__ __forceinline__ void copy_row(const ConstRows& rows, int64_t row, bool is_row,
                                         int64_t hidden, bool aligned, const RowThread& me,
                                         const Slots& slots, int first_slot,
                                         int step = kPieces<T>) {
  const T* source = static_cast<const T*>(rows.data) + row * rows.row_stride;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int column = me.column(i);
    if (aligned) {
#pragma unroll
      for (int p = 0; p < kPieces<T>; ++p) {
        cp_async_16(slots.first + first_slot + i * step + p, source + column + p * kVector<T>,
                    is_row && column < hidden);
      }
    } else {
      T* elements = reinterpret_cast<T*>(slots.first + first_slot + i * step);
#pragma unroll 1
      for (int j = 0; j < kColumns; ++j) {
        elements[j] = is_row && column + j < hidden ? source[column + j] : from_float<T>(0.f);
      }
    }
  }
}

// For each row of this thread: copy(row, is_row, slots), ahead, and then
// compute(row, is_row, slots, round). All threads of a block make the same number of rounds.
template <typename Copy, typename Compute>
__device__ __forceinline__ void for_each_row(const RowPlan& plan, int64_t rows, int stage_slots,
                                             const RowThread& me, const Copy& copy,
                                             const Compute& compute) {
  const int64_t step = int64_t(gridDim.x) * plan.rows_per_block;
  const int64_t first = int64_t(blockIdx.x) * plan.rows_per_block;
  int64_t row = first + me.row_in_block;
  const int apart = slots_apart(stage_slots);
  Slots now = {reinterpret_cast<uint4*>(dynamic_shared()) + int(threadIdx.x) * apart};
  Slots next = {now.first + (plan.stages == 2 ? int(blockDim.x) * apart : 0)};
  copy(row, row < rows, now);
  cp_async_commit_group();
  int round = 0;
  for (int64_t begin = first; begin < rows; begin += step) {
    if (plan.stages == 2) {
      copy(row + step, row + step < rows, next);
      cp_async_commit_group();
      cp_async_wait_group<1>();
    } else {
      cp_async_wait_group<0>();
    }
    compute(row, row < rows, now, round);
    if (plan.stages == 1) {
      copy(row + step, row + step < rows, next);
      cp_async_commit_group();
    }
    const Slots other = now;
    now = next;
    next = other;
    row += step;
    ++round;
  }
  cp_async_wait_group<0>();
}

// Weights and biases

// Eight elements of dtype T or float32 from `column` on, `absent` where the parameter is not given;
// zero beyond `hidden`.
template <typename T>
__device__ __forceinline__ void load_parameter(const void* parameter, DType dtype, float absent,
                                               int64_t column, int64_t hidden,
                                               float (&out)[kColumns]) {
  const bool aligned =
      hidden % kColumns == 0 && reinterpret_cast<uintptr_t>(parameter) % kPieceBytes == 0;
  if (parameter == nullptr) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) out[j] = absent;
  } else if (dtype == DType::kFloat32) {
    unpack(load_vector_at(static_cast<const float*>(parameter), column, hidden, aligned), out);
  } else {
    unpack(load_vector_at(static_cast<const T*>(parameter), column, hidden, aligned), out);
  }
}

// Weights and biases in shared memory, float32, in slots of the threads that need them; the rows of a
// block share them.
template <int kCount, int kVectors>
struct SharedParameters {
  static constexpr int kApart = slots_apart(kCount * kVectors * kPieces<float>);
  uint4* slots;  // of the first thread of a row
  int in_row;

  // Behind the slots where rows arrive.
  __device__ __forceinline__ SharedParameters(const RowPlan& plan, int stage_slots,
                                              const RowThread& me)
      : slots(reinterpret_cast<uint4*>(dynamic_shared()) +
              plan.stages * int(blockDim.x) * slots_apart(stage_slots)),
        in_row(me.in_row) {}

  __device__ __forceinline__ Slots of_thread(int thread) const { return {slots + thread * kApart}; }

  // A barrier must follow the last one.
  template <typename T>
  __device__ __forceinline__ void fill(int which, const void* parameter, DType dtype, float absent,
                                       int64_t hidden, const RowThread& me) const {
    for (int64_t v = threadIdx.x; v * kColumns < hidden; v += blockDim.x) {
      float value[kColumns];
      load_parameter<T>(parameter, dtype, absent, v * kColumns, hidden, value);
      const int i = int(v) / me.threads_per_row;
      of_thread(int(v) % me.threads_per_row)
          .store((which * kVectors + i) * kPieces<float>, pack<float>(value));
    }
  }

  __device__ __forceinline__ void load(int which, int i, float (&out)[kColumns]) const {
    unpack(of_thread(in_row).template load<float>((which * kVectors + i) * kPieces<float>), out);
  }
};

// Statistics

// With s the power of two that brings the row's maximum to [1, 2), so that no square leaves
// float32's range and scaling is exact:
//   d = x s - rough_mean;  shift = mean(d);  var = mean(d^2) - shift^2
//   rstd = 1 / sqrt(var + eps (c s)^2);      xhat = (d - shift) rstd
// shift is the rounding error of the first mean, tiny: with it, large offsets stay exact.

constexpr float kSmallest = 1.175494351e-38f;  // normal: a constant row has no deviation to divide

// The power of two s with max|x| * s in [1, 2), as far as s itself is a normal number.
__device__ __forceinline__ float relaxing_scale(float peak, Relax relax) {
  if (!(peak > 0.f)) return 1.f;
  int exponent = min(max(ilogbf(peak), -126), 126);
  if (relax == Relax::kNone) exponent = max(exponent, -60);  // eps s^2 must stay finite
  return exp2f(float(-exponent));
}

// eps c^2 in the scaled row's units. Rows of zeros take c = 1.
__device__ __forceinline__ float scaled_epsilon(const Epsilon& eps, float peak, float scale,
                                                Relax relax) {
  const bool plain = relax == Relax::kNone || peak == 0.f;
  const float c = plain ? scale : peak * scale * 0.125f;
  return (plain ? eps.plain : eps.relaxed) * c * c;
}

// Keeps a NaN, which fmaxf would drop.
__device__ __forceinline__ float rstd_of(float variance) {
  return 1.f / sqrtf(variance < kSmallest ? kSmallest : variance);
}

// The maximum, and sums from which the mean comes before it is known how the row should be scaled:
// scaled down, as the sum could overflow, and up, for rows of denormal numbers. float16 has neither
// so large nor so small numbers that one sum would not do.
template <typename T>
struct RoughSums {
  static constexpr bool kOneSum = std::is_same_v<T, Half>;
  static constexpr float kDown = kOneSum ? 1.f : 0x1p-16f, kUp = 0x1p64f, kTiny = 0x1p-32f;
  float number[kOneSum ? 2 : 3] = {};  // max|x|, sum of x kDown, sum of x kUp

  __device__ __forceinline__ void add(const float (&x)[kColumns]) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      number[0] = fmaxf(number[0], fabsf(x[j]));
      number[1] += x[j] * kDown;
      if constexpr (!kOneSum) number[2] += x[j] * kUp;
    }
  }

  // Of a row in units of `scale`.
  __device__ __forceinline__ float sum(float scale) const {
    if constexpr (!kOneSum) {
      if (number[0] < kTiny) return number[2] * (scale / kUp);
    }
    return number[1] * (scale / kDown);
  }
};

// The rest of the statistics: sum and sum of squares of d.
struct Moments {
  float number[2] = {0.f, 0.f};
  float peak, scale, rough_mean;

  // `sums` are those of the whole row, tensor_peak is max|x| of the tensor for Relax::kTensor.
  template <typename T>
  __device__ __forceinline__ Moments(const RoughSums<T>& sums, float inverse_hidden, Relax relax,
                                     float tensor_peak) {
    peak = relax == Relax::kTensor ? tensor_peak : sums.number[0];
    scale = relaxing_scale(peak, relax);
    rough_mean = sums.sum(scale) * inverse_hidden;
  }

  // x becomes d. `count`: how many of these columns the row has.
  __device__ __forceinline__ void add(float (&x)[kColumns], int count) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) x[j] = x[j] * scale - rough_mean;
    if (count >= kColumns) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) add(x[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (j < count) add(x[j]);
      }
    }
  }
  __device__ __forceinline__ void add(float d) {
    number[0] += d;
    number[1] += d * d;
  }

  // After `number` became those of the whole row.
  __device__ __forceinline__ RowStatistics statistics(float inverse_hidden, const Epsilon& eps,
                                                      Relax relax) const {
    const float shift = number[0] * inverse_hidden;
    const float var = fmaxf(number[1] * inverse_hidden - shift * shift, 0.f);
    return {rough_mean, shift, rstd_of(var + scaled_epsilon(eps, peak, scale, relax)), scale};
  }
};

constexpr int kMaxWarps = 32;
constexpr int kScratchFloats = 5 * kMaxWarps;  // of statistics_of_row

// Statistics of a row of numbers of dtype T, whose columns become d.
template <typename T, int kVectors>
__device__ __forceinline__ RowStatistics statistics_of_row(float (&x)[kVectors][kColumns],
                                                           int hidden, const Epsilon& eps,
                                                           Relax relax, const float* tensor_peak,
                                                           const RowThread& me, float* scratch) {
  const float inverse_hidden = 1.f / float(hidden);
  RoughSums<T> rough;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) rough.add(x[i]);
  reduce_row(rough.number, scratch, me, MaxThenAdd());
  Moments moments(rough, inverse_hidden, relax, relax == Relax::kTensor ? *tensor_peak : 0.f);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) moments.add(x[i], hidden - me.column(i));
  reduce_row(moments.number, scratch + 3 * kMaxWarps, me, Add());
  return moments.statistics(inverse_hidden, eps, relax);
}

// d becomes LN(x).
__device__ __forceinline__ void normalise(float (&d)[kColumns], const RowStatistics& row,
                                          const float (&weight)[kColumns],
                                          const float (&bias)[kColumns]) {
  const float offset = row.shift * row.rstd;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) d[j] = (d[j] * row.rstd - offset) * weight[j] + bias[j];
}

template <typename T>
__device__ __forceinline__ void add_vector(const Vector<T>& vector, float (&to)[kColumns]) {
  float value[kColumns];
  unpack(vector, value);
#pragma unroll
  for (int j = 0; j < kColumns; ++j) to[j] += value[j];
}

// Dtypes

template <typename T>
struct TypeTag {
  using Type = T;
};

// Calls f(tag of the input's type, tag of the output's).
template <typename Function>
cudaError_t with_dtypes(DType input, DType output, const Function& f) {
  if (input == DType::kFloat32) return f(TypeTag<float>(), TypeTag<float>());
  if (input == DType::kFloat16) {
    return output == input ? f(TypeTag<Half>(), TypeTag<Half>())
                           : f(TypeTag<Half>(), TypeTag<float>());
  }
  return output == input ? f(TypeTag<BFloat16>(), TypeTag<BFloat16>())
                         : f(TypeTag<BFloat16>(), TypeTag<float>());
}

// Launch

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int pieces_of(DType dtype) { return dtype == DType::kFloat32 ? 2 : 1; }

// Whether sixteen bytes may be read at once from each row; true where there are none.
inline bool rows_aligned(const ConstRows& rows, DType dtype) {
  return reinterpret_cast<uintptr_t>(rows.data) % kPieceBytes == 0 &&
         (rows.data == nullptr || rows.row_stride % (kColumns / pieces_of(dtype)) == 0);
}

// What a kernel needs.
struct RowNeeds {
  int64_t rows, hidden;
  int num_blocks;      // at most
  int max_threads;     // of a block
  int stage_pieces;    // sixteen-byte pieces that arrive for each vector
  int extra_pieces;    // and for each thread
  int num_parameters;  // weights and biases that are kept in shared memory
};

inline int threads_for(int64_t hidden, int vectors) {
  return int(ceil_div(ceil_div(hidden, kColumns), int64_t{kWarpSize} * vectors)) * kWarpSize;
}

// How many vectors a thread should hold: 2, or 1 where that leaves fewer threads without work, or
// 4 where it takes them.
inline int vectors_for(int64_t hidden, int max_threads) {
  const int with_1 = threads_for(hidden, 1), with_2 = threads_for(hidden, 2);
  if (with_2 > max_threads) return 4;
  return with_1 < 2 * with_2 && with_1 <= max_threads ? 1 : 2;
}

// *fits: whether a block has the threads and the room for a row. Sets all of *plan but `aligned`.
inline cudaError_t plan_rows(const RowNeeds& needs, int vectors, RowPlan* plan, bool* fits) {
  int limit = 0;
  const cudaError_t status = max_shared_bytes(&limit);
  const int64_t threads = threads_for(needs.hidden, vectors);
  const int64_t stage_bytes =
      threads * slots_apart(vectors * needs.stage_pieces + needs.extra_pieces) * kPieceBytes;
  const int64_t parameter_bytes =
      threads * slots_apart(needs.num_parameters * vectors * kPieces<float>) * kPieceBytes;
  *fits = false;
  for (int stages = 2; stages > 0 && !*fits; --stages) {
    const int64_t rows =
        min(min(needs.max_threads / threads, ceil_div(needs.rows, needs.num_blocks)),
            (limit - kMaxArrayBytes - parameter_bytes) / (stages * stage_bytes));
    if (rows < 1) continue;
    plan->threads_per_row = int(threads);
    plan->rows_per_block = int(rows);
    plan->stages = stages;
    plan->shared_bytes = int(rows * stages * stage_bytes + parameter_bytes);
    plan->num_blocks = int(min(int64_t{needs.num_blocks}, ceil_div(needs.rows, rows)));
    *fits = true;
  }
  return status;
}

}  // namespace cogview
