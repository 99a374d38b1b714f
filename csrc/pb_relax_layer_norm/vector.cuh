// Vectors: eight columns of a row, as they lie in memory.
#pragma once

#include <type_traits>

#include "../instructions/common.cuh"

namespace cogview {

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
  const uint32_t* words = reinterpret_cast<const uint32_t*>(vector.piece);
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    if constexpr (std::is_same_v<T, BFloat16>) {  // one instruction for each
      out[j] = uint_as_float(j % 2 == 0 ? words[j / 2] << 16 : words[j / 2] & 0xffff0000u);
    } else {
      out[j] = to_float(elements[j]);
    }
  }
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

template <typename T>
__device__ __forceinline__ void add_vector(const Vector<T>& vector, float (&to)[kColumns]) {
  float value[kColumns];
  unpack(vector, value);
#pragma unroll
  for (int j = 0; j < kColumns; ++j) to[j] += value[j];
}

// Columns whose bit is not set in `kept` become zero.
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

}  // namespace cogview
