// Which columns of a row are dropped: a function of the seed, the row and the column alone.
#pragma once

#include "pb_relax_layer_norm.h"
#include "vector.cuh"

namespace cogview {

// Philox4x32-10 (Salmon et al., 2011): four random words for each counter.
struct Philox {
  uint32_t word[4];
};
__device__ __forceinline__ Philox philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2,
                                         uint32_t c3) {
  uint32_t key0 = uint32_t(key), key1 = uint32_t(key >> 32);
#pragma unroll 5  // of 10, or all the rounds' keys are kept in registers from row to row
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

}  // namespace cogview
