// Kernels for test_primitives.py, each with one primitive: it takes operands from global memory and
// writes its result there. nvcc compiles them for the device. With COGVIEW_HOST_MODEL a host compiler
// compiles the same kernels and the same entry `run` for the model.
//
// Element i of an operand belongs to thread i of all blocks, unless a kernel says otherwise.

#include <map>
#include <string>

#include "instructions/sm80.cuh"
#include "instructions/sm90.cuh"

#ifndef COGVIEW_HOST_MODEL
#include <cuda_runtime.h>
#endif

namespace cogview {
namespace {

struct Params {
  const void* a;
  const void* b;
  const void* c;
  void* out;
};

#define KERNEL(name) __global__ void name(const Params p)

template <typename T>
__device__ __forceinline__ T load(const void* operand, int i) {
  return static_cast<const T*>(operand)[i];
}
template <typename T>
__device__ __forceinline__ void store(const Params& p, int i, T value) {
  static_cast<T*>(p.out)[i] = value;
}
__device__ __forceinline__ int thread_number() {
  return int(blockIdx.x) * int(blockDim.x) + int(threadIdx.x);
}

// Warps and blocks

KERNEL(shfl_bfly_kernel) {  // b: the mask, one for each block
  const int i = thread_number();
  store(p, i, shfl_bfly(load<float>(p.a, i), load<int>(p.b, blockIdx.x)));
}

KERNEL(shfl_idx_kernel) {  // b: the source lane
  const int i = thread_number();
  store(p, i, shfl_idx(load<int>(p.a, i), load<int>(p.b, i)));
}

KERNEL(vote_ballot_kernel) {
  const int i = thread_number();
  store(p, i, vote_ballot(load<int>(p.a, i) != 0));
}

KERNEL(redux_max_kernel) {
  const int i = thread_number();
  store(p, i, redux_max(load<uint32_t>(p.a, i)));
}

KERNEL(popc_kernel) {
  const int i = thread_number();
  store(p, i, popc(load<uint32_t>(p.a, i)));
}

KERNEL(shl_kernel) {  // b: the count
  const int i = thread_number();
  store(p, i, shl(load<uint32_t>(p.a, i), load<uint32_t>(p.b, i)));
}

// Groups of two warps exchange words in as many turns as b says for each group, with two buffers.
KERNEL(bar_sync_of_groups_kernel) {
  const int i = thread_number(), group = int(threadIdx.x) / 64, thread = int(threadIdx.x) % 64;
  uint32_t* buffers = reinterpret_cast<uint32_t*>(dynamic_shared()) + 128 * group;
  const int turns = load<int>(p.b, i / 64);
  uint32_t value = load<uint32_t>(p.a, i);
  for (int turn = 0; turn < turns; ++turn) {
    uint32_t* buffer = buffers + 64 * (turn % 2);
    buffer[thread] = value;
    bar_sync(1 + group, 64);
    value = 3 * buffer[(thread + 33) % 64] + uint32_t(turn);
  }
  store(p, i, value);
}

// Memory

KERNEL(copy_v4_kernel) {  // sixteen bytes for each thread
  const int i = thread_number();
  const uint4 bits = ld_global_nc_v4(static_cast<const char*>(p.a) + 16 * i);
  st_global_v4(static_cast<char*>(p.out) + 16 * i, bits);
}

KERNEL(shared_v4_kernel) {  // the neighbour's sixteen bytes, through shared memory
  const int i = thread_number();
  unsigned char* shared = dynamic_shared();
  st_shared_v4(shared + 16 * threadIdx.x, ld_global_nc_v4(static_cast<const char*>(p.a) + 16 * i));
  bar_sync();
  st_global_v4(static_cast<char*>(p.out) + 16 * i, ld_shared_v4(shared + 16 * (threadIdx.x ^ 1)));
}

// Two kernels, sixteen bytes for each thread: the first writes them late, the second starts early and
// copies them, in reverse, behind the first ones.
KERNEL(late_kernel) {
  griddepcontrol_launch_dependents();
  int i = thread_number();
  for (int turn = 0; turn < 1000; ++turn) i = shfl_idx(i, threadIdx.x);  // its own
  const uint4 bits = ld_global_nc_v4(static_cast<const char*>(p.a) + 16 * i);
  st_global_v4(static_cast<char*>(p.out) + 16 * i, bits);
}
KERNEL(early_kernel) {
  const int i = thread_number(), size = int(gridDim.x * blockDim.x);
  griddepcontrol_wait();
  char* out = static_cast<char*>(p.out);
  st_global_v4(out + 16 * (size + i), ld_global_v4(out + 16 * (size - 1 - i)));
}

KERNEL(red_global_max_kernel) {  // a: the value, b: its place in out
  const int i = thread_number();
  red_global_max(static_cast<uint32_t*>(p.out) + load<int>(p.b, i), load<uint32_t>(p.a, i));
}

// Copies element b of a, kBytes long, where c holds. Shared memory is not zero before.
template <int kBytes>
KERNEL(cp_async_kernel) {
  constexpr int kWords = kBytes / 4;
  uint32_t* shared = reinterpret_cast<uint32_t*>(dynamic_shared()) + kWords * threadIdx.x;
  const int i = thread_number();
  for (int word = 0; word < kWords; ++word) shared[word] = 0xdeadbeefu;
  bar_sync();
  const void* source = static_cast<const char*>(p.a) + kBytes * load<int>(p.b, i);
  const bool valid = load<int>(p.c, i) != 0;
  if constexpr (kBytes == 16) {
    cp_async_16(shared, source, valid);
  } else {
    cp_async_4(shared, source, valid);
  }
  cp_async_commit_group();
  cp_async_wait_group<0>();
  for (int word = 0; word < kWords; ++word) store(p, kWords * i + word, shared[word]);
}

// a: 64 rows of 16 bytes for each block; b: the row whose address a lane gives. Each lane gets four
// words.
template <bool kTransposed>
KERNEL(ldmatrix_kernel) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(dynamic_shared());
  const int i = thread_number();
  for (int word = threadIdx.x; word < 256; word += 32) {
    shared[word] = load<uint32_t>(p.a, 256 * int(blockIdx.x) + word);
  }
  bar_sync();
  const uint32_t* row = shared + 4 * load<int>(p.b, i);
  uint32_t matrix[4];
  if constexpr (kTransposed) {
    ldmatrix_x4_trans(matrix, row);
  } else {
    ldmatrix_x4(matrix, row);
  }
  for (int word = 0; word < 4; ++word) store(p, 4 * i + word, matrix[word]);
}

// Matrices: a, b and c as the fragments of a lane, four, two and four registers.

template <typename T>
KERNEL(mma_kernel) {
  const int i = thread_number();
  uint32_t rA[4];
  float rC[4];
  for (int r = 0; r < 4; ++r) rA[r] = load<uint32_t>(p.a, 4 * i + r);
  for (int r = 0; r < 4; ++r) rC[r] = load<float>(p.c, 4 * i + r);
  mma_m16n8k16<T>(rC, rA, load<uint32_t>(p.b, 2 * i), load<uint32_t>(p.b, 2 * i + 1));
  for (int r = 0; r < 4; ++r) store(p, 4 * i + r, rC[r]);
}

// Numbers

KERNEL(ex2_approx_kernel) {
  const int i = thread_number();
  store(p, i, ex2_approx(load<float>(p.a, i)));
}

KERNEL(rsqrt_approx_kernel) {
  const int i = thread_number();
  store(p, i, rsqrt_approx(load<float>(p.a, i)));
}

template <typename T>
KERNEL(max_x2_kernel) {
  const int i = thread_number();
  store(p, i, max_x2<T>(load<uint32_t>(p.a, i), load<uint32_t>(p.b, i)));
}

template <typename T>
KERNEL(min_x2_kernel) {
  const int i = thread_number();
  store(p, i, min_x2<T>(load<uint32_t>(p.a, i), load<uint32_t>(p.b, i)));
}

KERNEL(uint_as_float_kernel) {
  const int i = thread_number();
  store(p, i, uint_as_float(load<uint32_t>(p.a, i)));
}

KERNEL(float_as_uint_kernel) {
  const int i = thread_number();
  store(p, i, float_as_uint(load<float>(p.a, i)));
}

template <typename T>
KERNEL(to_float_kernel) {
  const int i = thread_number();
  store(p, i, to_float(load<T>(p.a, i)));
}

template <typename T>
KERNEL(from_float_kernel) {
  const int i = thread_number();
  store(p, i, from_float<T>(load<float>(p.a, i)));
}

template <typename T>
KERNEL(cvt_rn_x2_kernel) {  // a: the low number, b: the high one
  const int i = thread_number();
  store(p, i, cvt_rn_x2<T>(load<float>(p.a, i), load<float>(p.b, i)));
}

using Launch = cudaError_t (*)(int num_blocks, const Params& params);

template <auto kKernel, int kThreads, int kShared>
cudaError_t launch_blocks(int num_blocks, const Params& params) {
  return launch<kKernel>(num_blocks, 1, kThreads, kShared, nullptr, params);
}

template <auto kKernel, int kThreads = 32, int kShared = 0>
constexpr Launch kLaunch = launch_blocks<kKernel, kThreads, kShared>;

cudaError_t launch_early(int num_blocks, const Params& params) {
  const cudaError_t status = launch<late_kernel>(num_blocks, 1, 32, 0, nullptr, params);
  if (status != cudaSuccess) return status;
  return launch<early_kernel, Start::kEarly>(num_blocks, 1, 32, 0, nullptr, params);
}

const std::map<std::string, Launch> kPrimitives = {
    {"shfl_bfly", kLaunch<shfl_bfly_kernel>},
    {"shfl_idx", kLaunch<shfl_idx_kernel>},
    {"vote_ballot", kLaunch<vote_ballot_kernel>},
    {"redux_max", kLaunch<redux_max_kernel>},
    {"popc", kLaunch<popc_kernel>},
    {"shl", kLaunch<shl_kernel>},
    {"bar_sync_of_groups", kLaunch<bar_sync_of_groups_kernel, 960, 960 * 8>},
    {"copy_v4", kLaunch<copy_v4_kernel>},
    {"shared_v4", kLaunch<shared_v4_kernel, 32, 32 * 16>},
    {"griddepcontrol", launch_early},
    {"red_global_max", kLaunch<red_global_max_kernel>},
    {"cp_async_16", kLaunch<cp_async_kernel<16>, 32, 32 * 16>},
    {"cp_async_4", kLaunch<cp_async_kernel<4>, 32, 32 * 4>},
    {"ldmatrix_x4", kLaunch<ldmatrix_kernel<false>, 32, 1024>},
    {"ldmatrix_x4_trans", kLaunch<ldmatrix_kernel<true>, 32, 1024>},
    {"mma_float16", kLaunch<mma_kernel<Half>>},
    {"mma_bfloat16", kLaunch<mma_kernel<BFloat16>>},
    {"ex2_approx", kLaunch<ex2_approx_kernel>},
    {"rsqrt_approx", kLaunch<rsqrt_approx_kernel>},
    {"max_x2_float16", kLaunch<max_x2_kernel<Half>>},
    {"max_x2_bfloat16", kLaunch<max_x2_kernel<BFloat16>>},
    {"min_x2_float16", kLaunch<min_x2_kernel<Half>>},
    {"min_x2_bfloat16", kLaunch<min_x2_kernel<BFloat16>>},
    {"float_as_uint", kLaunch<float_as_uint_kernel>},
    {"uint_as_float", kLaunch<uint_as_float_kernel>},
    {"to_float_float16", kLaunch<to_float_kernel<Half>>},
    {"to_float_bfloat16", kLaunch<to_float_kernel<BFloat16>>},
    {"from_float_float16", kLaunch<from_float_kernel<Half>>},
    {"from_float_bfloat16", kLaunch<from_float_kernel<BFloat16>>},
    {"cvt_rn_x2_float16", kLaunch<cvt_rn_x2_kernel<Half>>},
    {"cvt_rn_x2_bfloat16", kLaunch<cvt_rn_x2_kernel<BFloat16>>},
};

struct Array {
  void* data;
  int64_t bytes;
};

#ifdef COGVIEW_HOST_MODEL

cudaError_t run_on(const std::string& name, int num_blocks, const Array (&arrays)[4]) {
  const auto& [a, b, c, out] = arrays;
  host_model::Operator call(name.c_str(), {{"a", a.data, a.bytes},
                                           {"b", b.data, b.bytes},
                                           {"c", c.data, c.bytes},
                                           {"out", out.data, out.bytes, false, true}});
  const cudaError_t status = kPrimitives.at(name)(num_blocks, {a.data, b.data, c.data, out.data});
  return status == cudaSuccess ? call.finish() : status;
}

#else

cudaError_t run_on(const std::string& name, int num_blocks, const Array (&arrays)[4]) {
  void* on_device[4] = {};
  cudaError_t status = cudaSuccess;
  const auto then = [&](auto call) {
    if (status == cudaSuccess) status = call();
  };
  for (int i = 0; i < 4; ++i) {
    if (arrays[i].bytes == 0) continue;
    then([&] { return cudaMalloc(&on_device[i], arrays[i].bytes); });
    then([&] {
      return cudaMemcpy(on_device[i], arrays[i].data, arrays[i].bytes, cudaMemcpyHostToDevice);
    });
  }
  then([&] {
    return kPrimitives.at(name)(num_blocks,
                                {on_device[0], on_device[1], on_device[2], on_device[3]});
  });
  then([] { return cudaDeviceSynchronize(); });
  then([&] {
    return cudaMemcpy(arrays[3].data, on_device[3], arrays[3].bytes, cudaMemcpyDeviceToHost);
  });
  for (void* memory : on_device) cudaFree(memory);
  return status;
}

#endif

}  // namespace
}  // namespace cogview

std::string error;

// Runs a primitive on arrays of the host: operands a, b, c, then out with its initial values. Returns
// the error's text, or nothing.
extern "C" __attribute__((visibility("default"))) const char* run(const char* name, int num_blocks,
                                                                  void* const* data,
                                                                  const int64_t* bytes) {
  cogview::Array arrays[4];
  for (int i = 0; i < 4; ++i) arrays[i] = {data[i], bytes[i]};
  const cudaError_t status = cogview::run_on(name, num_blocks, arrays);
  error = status == cudaSuccess ? "" : cudaGetErrorString(status);
  return error.c_str();
}
