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
  const int swizzle = kHeadDim % 64 == 0 ? row % 8 : row / 2 % 4;
  return row * (kHeadDim * 2) + (chunk ^ swizzle) * 16;
}

// Starts to copy rows of a head to a tile: row r of the tile is row row_of(r) of the head, zeros
// where that is negative.
template <int kHeadDim, int kRows, int kThreads, typename RowOf>
__device__ __forceinline__ void copy_rows(unsigned char* tile, const uint16_t* head,
                                          int64_t row_stride, RowOf row_of) {
  static_assert(kRows * kChunks<kHeadDim> % kThreads == 0);
#pragma unroll 4
  for (int i = 0; i < kRows * kChunks<kHeadDim> / kThreads; ++i) {
    const int item = int(threadIdx.x) + i * kThreads;
    const int row = item / kChunks<kHeadDim>, chunk = item % kChunks<kHeadDim>;
    const int from = row_of(row);
    cp_async_16(tile + tile_offset<kHeadDim>(row, chunk),
                head + max(from, 0) * row_stride + chunk * 8, from >= 0);
  }
}

// Where a head begins, in 16-bit elements.
template <typename Tensor>
__device__ __forceinline__ auto head_of(const Tensor& tensor, int batch, int head) {
  using Element = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(tensor.data)>>,
                                     const uint16_t, uint16_t>;
  return static_cast<Element*>(tensor.data) + batch * tensor.stride.batch +
         head * tensor.stride.head;
}

// A fragment: rows row.. + 15, columns 16 * k.. + 15 of a tile.
template <int kHeadDim>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const unsigned char* tile, int row,
                                       int k) {
  const int lane = threadIdx.x % kWarpSize;
  ldmatrix_x4(a, tile + tile_offset<kHeadDim>(row + lane % 16, 2 * k + lane / 16));
}

// Two B fragments of the transposed tile: its rows row.. + 15 are n, its columns 16 * k.. + 15 are
// k. b[0], b[1]: the first eight n; b[2], b[3]: the others.
template <int kHeadDim>
__device__ __forceinline__ void load_b_transposed(uint32_t (&b)[4], const unsigned char* tile,
                                                  int row, int k) {
  const int lane = threadIdx.x % kWarpSize;
  const int n = lane % 8 + lane / 16 * 8;
  ldmatrix_x4(b, tile + tile_offset<kHeadDim>(row + n, 2 * k + lane / 8 % 2));
}

// Two B fragments of the tile itself: its rows row.. + 15 are k, its columns 16 * n.. + 15 are n.
template <int kHeadDim>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const unsigned char* tile, int row,
                                       int n) {
  const int lane = threadIdx.x % kWarpSize;
  ldmatrix_x4_trans(b, tile + tile_offset<kHeadDim>(row + lane % 16, 2 * n + lane / 16));
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
#pragma unroll 4
  for (int item = lane; item < 16 * kRowTiles * kChunks<kHeadDim>; item += kWarpSize) {
    const int tile_row = row + item / kChunks<kHeadDim>, chunk = item % kChunks<kHeadDim>;
    const int64_t to = row_of(tile_row);
    if (to >= 0) {
      st_global_v4(head + to * row_stride + chunk * 8,
                   *reinterpret_cast<const uint4*>(tile + tile_offset<kHeadDim>(tile_row, chunk)));
    }
  }
}

template <typename T>
constexpr bool kIsFloat16 = std::is_same_v<T, Half>;

}  // namespace cogview::sm80
