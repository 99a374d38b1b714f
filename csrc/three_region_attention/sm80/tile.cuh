// Tiles of 16-bit elements in shared memory, and products of them on the tensor cores.
//
// A tile has rows of kHeadDim elements. Its 16-byte chunks are swizzled, so that the eight rows of
// an 8 x 8 matrix lie in different banks: chunk c of row r lies at c ^ (r % 8) where a row is a
// multiple of 128 bytes, else at c ^ (r / 2 % 4).
#pragma once

#include <type_traits>

#include "../../instructions/sm80.cuh"
#include "family.h"

namespace cogview::sm80 {

template <int kHeadDim>
constexpr int kChunks = kHeadDim / 8;

// Lanes that share a row where each has a chunk of it: a power of two, the first kChunks of which work.
template <int kHeadDim>
constexpr int kRowLanes = kHeadDim <= 32   ? 4
                          : kHeadDim <= 64 ? 8
                                           : 16;

template <int kHeadDim, int kRows>
constexpr int kTileBytes = kHeadDim * kRows * 2;

// The block's dynamic shared memory, laid out as a kernel's plan. A launch asks for sizeof(Plan).
template <typename Plan>
__device__ __forceinline__ Plan& shared_memory() {
  static_assert(sizeof(Plan) + kMaxArrayBytes + kReservedSharedBytes <= kMaxSharedBytes);
  return *reinterpret_cast<Plan*>(dynamic_shared());
}

template <int kHeadDim>
__device__ __forceinline__ int tile_offset(int row, int chunk) {
  const int swizzle = kHeadDim % 64 == 0 ? row & 7 : row >> 1 & 3;
  return row * (kHeadDim * 2) + (chunk ^ swizzle) * 16;
}

// Row `row` of those that lie `row_bytes` apart.
template <typename Byte>
__device__ __forceinline__ Byte* row_at(Byte* rows, int64_t row_bytes, int row) {
  return rows + uint64_t(uint32_t(row)) * uint64_t(row_bytes);
}

// How threads share the 16-byte chunks of a tile: a thread takes the chunks kLanes apart of every
// kStepRows-th row. The swizzle repeats after eight rows, so that a thread's addresses in the tile
// are one or two addresses and constants.
template <int kHeadDim, int kRows, int kThreads>
struct TileItems {
  static constexpr int kLanes = kHeadDim % 64 == 0 ? 8 : 4;
  static constexpr int kRowChunks = kChunks<kHeadDim> / kLanes;
  static constexpr int kStepRows = kThreads / kLanes, kSteps = kRows / kStepRows;
  static constexpr int kPeriod = kStepRows < 8 ? 8 / kStepRows : 1;  // steps
  static_assert(kChunks<kHeadDim> % kLanes == 0 && kRows % kStepRows == 0);
  static_assert(kStepRows * kPeriod % 8 == 0);

  // The thread's first chunk of a row.
  template <typename Element>
  static __device__ __forceinline__ auto first_chunk(Element* row) {
    using Byte = std::conditional_t<std::is_const_v<Element>, const unsigned char, unsigned char>;
    return reinterpret_cast<Byte*>(row) + threadIdx.x % kLanes * 16;
  }

  // Where the thread's chunk of a step lies in the tile, for the steps of a period.
  static __device__ __forceinline__ int offset_of(unsigned thread, int step) {
    return tile_offset<kHeadDim>(int(thread / kLanes) + step * kStepRows, int(thread % kLanes));
  }

  // Calls f(offset in the tile, step, chunk) for the items of a thread in [0, kThreads). The second
  // form takes what offset_of gives.
  template <typename Function>
  static __device__ __forceinline__ void for_each(unsigned thread, Function f) {
    for_each_from([=](int step) { return offset_of(thread, step); }, f);
  }
  template <typename OffsetOf, typename Function>
  static __device__ __forceinline__ void for_each_from(OffsetOf offset_of_step, Function f) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int offset =
          offset_of_step(step % kPeriod) + (step - step % kPeriod) * kStepRows * kHeadDim * 2;
#pragma unroll
      for (int i = 0; i < kRowChunks; ++i) f(offset + i * kLanes * 16, step, i * kLanes);
    }
  }
};

// Starts to copy consecutive rows of a head to a tile, the first of which is row `first`: those in
// [begin, end), and zeros for the others.
template <int kHeadDim, int kRows, int kThreads>
__device__ __forceinline__ void copy_tile(unsigned char* tile, const uint16_t* head,
                                          int64_t row_stride, int first, int begin, int end) {
  using Items = TileItems<kHeadDim, kRows, kThreads>;
  const unsigned thread = threadIdx.x;
  const unsigned char* rows = Items::first_chunk(head);
  Items::for_each(thread, [&](int offset, int step, int chunk) {
    const int row = first + int(thread / Items::kLanes) + step * Items::kStepRows;
    const int near = min(max(row, begin), end - 1);
    cp_async_16(tile + offset, row_at(rows, row_stride * 2, near) + chunk * 16, row == near);
  });
}

// Where a head begins, in 16-bit elements.
template <typename Tensor>
__device__ __forceinline__ auto head_of(const Tensor& tensor, int batch, int head) {
  using Element = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(tensor.data)>>,
                                     const uint16_t, uint16_t>;
  return static_cast<Element*>(tensor.data) + batch * tensor.stride.batch +
         head * tensor.stride.head;
}

// A fragment: rows row.. + 15, columns 16 * k.. + 15 of a tile. For one use; LaneRow for many.
template <int kHeadDim>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const unsigned char* tile, int row,
                                       int k) {
  const int lane = threadIdx.x % kWarpSize;
  ldmatrix_x4(a, tile + tile_offset<kHeadDim>(row + lane % 16, 2 * k + lane / 16));
}

// A lane's part in loading fragments of a tile: where in the tile lies the row that it gives to
// ldmatrix. All other fragments are at this offset with two bits of the chunk changed, and a constant.
template <int kHeadDim>
struct LaneRow {
  int offset;

  // Of the fragment 16 * n rows and 16 * k columns further on. n and k are constants.
  __device__ __forceinline__ int at(int n, int k) const {
    constexpr int kPeriod = kHeadDim % 64 == 0 ? 4 : 2;  // of the swizzle
    return (offset ^ k % kPeriod * 32) + n * 16 * kHeadDim * 2 + k / kPeriod * kPeriod * 32;
  }
};

// For A fragments from row `row` on; with ldmatrix_x4_trans, for two B fragments of the tile itself:
// sixteen of its rows are k, sixteen of its columns are n.
template <int kHeadDim>
__device__ __forceinline__ LaneRow<kHeadDim> lane_row(int row) {
  const int lane = threadIdx.x % kWarpSize;
  return {tile_offset<kHeadDim>(row + lane % 16, lane / 16)};
}

// For two B fragments of the transposed tile: sixteen of its rows are n, sixteen of its columns are
// k. b[0], b[1]: the first eight n; b[2], b[3]: the others.
template <int kHeadDim>
__device__ __forceinline__ LaneRow<kHeadDim> lane_row_transposed() {
  const int lane = threadIdx.x % kWarpSize;
  return {tile_offset<kHeadDim>(lane % 8 + lane / 16 * 8, lane / 8 % 2)};
}

// Sixteen columns of an accumulator (two C fragments) become an A fragment.
template <typename T>
__device__ __forceinline__ void convert_c_to_a(uint32_t (&a)[4], const float (&left)[4],
                                               const float (&right)[4]) {
  a[0] = cvt_rn_x2<T>(left[0], left[1]);
  a[1] = cvt_rn_x2<T>(left[2], left[3]);
  a[2] = cvt_rn_x2<T>(right[0], right[1]);
  a[3] = cvt_rn_x2<T>(right[2], right[3]);
}

// Sums over the four lanes that share a row of a C fragment.
__device__ __forceinline__ float quad_sum(float value) {
  value += shfl_bfly(value, 1);
  return value + shfl_bfly(value, 2);
}
__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, shfl_bfly(value, 1));
  return fmaxf(value, shfl_bfly(value, 2));
}

// A warp writes its 16 * kRowTiles rows of an accumulator, from row `row` of the tile on; then its
// rows of the tile go to global memory in 16-byte stores. row_of: the global row of a tile row,
// negative where there is none to store. No other warp may use these rows of the tile meanwhile.
template <typename T, int kHeadDim, int kRowTiles, typename RowOf>
__device__ __forceinline__ void store_rows(unsigned char* tile, int row,
                                           const float (&c)[kRowTiles][kHeadDim / 8][4],
                                           uint16_t* head, int64_t row_stride, RowOf row_of) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  bar_warp_sync();
#pragma unroll
  for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int offset = tile_offset<kHeadDim>(row + rt * 16 + half * 8 + g, n) + t * 4;
        *reinterpret_cast<uint32_t*>(tile + offset) =
            cvt_rn_x2<T>(c[rt][n][2 * half], c[rt][n][2 * half + 1]);
      }
    }
  }
  bar_warp_sync();
  using Items = TileItems<kHeadDim, 16 * kRowTiles, kWarpSize>;
  const unsigned char* from = tile + row * kHeadDim * 2;
  unsigned char* rows = Items::first_chunk(head);
  Items::for_each(lane, [&](int offset, int step, int chunk) {
    const int to = row_of(row + lane / Items::kLanes + step * Items::kStepRows);
    if (to >= 0) {
      st_global_v4(row_at(rows, row_stride * 2, to) + chunk * 16, ld_shared_v4(from + offset));
    }
  });
}

template <typename T>
constexpr bool kIsFloat16 = std::is_same_v<T, Half>;

}  // namespace cogview::sm80
