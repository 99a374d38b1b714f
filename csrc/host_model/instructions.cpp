// The instructions themselves.

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <iterator>
#include <utility>

#include "fibers.h"
#include "sm90.h"

namespace host_model {
namespace {

// The access of an instruction, in its function.
#define ACCESS(verb, bytes, is_write) \
  Access { verb, bytes, __func__, &where, __builtin_return_address(0), is_write }

void count_shared(const Access& access, const void* address) {
  const Fiber& fiber = *running;
  fiber.worker->counters.count_access(fiber.lane, access.code, access.bytes, access.is_write,
                                      reinterpret_cast<uintptr_t>(address), 0);
}

}  // namespace

// Indices

unsigned thread_idx() { return running->thread; }
unsigned block_idx_x() {
  return unsigned(running->worker->block % running->worker->launch->grid_x);
}
unsigned block_idx_y() {
  return unsigned(running->worker->block / running->worker->launch->grid_x);
}
unsigned block_dim() { return unsigned(running->worker->launch->num_threads); }
unsigned grid_dim_x() { return unsigned(running->worker->launch->grid_x); }
unsigned grid_dim_y() { return unsigned(running->worker->launch->grid_y); }

// Warps and blocks

uint32_t shfl(const char* instruction, uint32_t value, int source_lane, Where where) {
  Fiber& fiber = *running;
  Warp& warp = *fiber.warp;
  if (source_lane < 0 || source_lane >= kLanes) {
    fiber.worker->fail(fiber,
                       place(instruction, where) + format(": there is no lane %d", source_lane));
  }
  warp.value[fiber.lane] = value;
  warp.lane_argument[fiber.lane] = source_lane;
  fiber.worker->collective(fiber, instruction, where, [](Warp& warp) {
    for (int lane = 0; lane < kLanes; ++lane) {
      warp.shuffled[lane] = warp.value[warp.lane_argument[lane]];
    }
  });
  return warp.shuffled[fiber.lane];
}

uint32_t vote_ballot(bool predicate, Where where) {
  Fiber& fiber = *running;
  fiber.warp->ballot |= predicate ? fiber.bit() : 0;
  fiber.worker->collective(fiber, "vote_ballot", where,
                           [](Warp& warp) { warp.ballot_result = std::exchange(warp.ballot, 0); });
  return fiber.warp->ballot_result;
}

uint32_t redux_max(uint32_t value, Where where) {
  Fiber& fiber = *running;
  Warp& warp = *fiber.warp;
  warp.value[fiber.lane] = value;
  fiber.worker->collective(fiber, "redux_max", where, [](Warp& warp) {
    uint32_t largest = 0;
    for (const uint32_t value : warp.value) largest = std::max(largest, value);
    std::fill(std::begin(warp.shuffled), std::end(warp.shuffled), largest);
  });
  return warp.shuffled[fiber.lane];
}

void bar_warp_sync(Where where) {
  Worker& worker = *running->worker;
  worker.collective(*running, "bar_warp_sync", where,
                    [&worker](Warp& warp) { warp.known[warp.index()] = ++worker.now; });
}

void bar_sync(Where where) { running->worker->barrier(*running, where); }

void bar_sync(int id, int num_threads, Where where) {
  running->worker->barrier_of_warps(*running, id, num_threads, where);
}

// Memory

void* shared_array(const void* key, int bytes) { return array_of_block(*running, key, bytes); }

unsigned char* dynamic_shared() {
  Worker& worker = *running->worker;
  if (worker.launch->shared_bytes == 0) return nullptr;
  return reinterpret_cast<unsigned char*>(worker.arrays[0]->data);
}

uint4 ld_shared_v4(const void* address, Where where) {
  const Access access = ACCESS("read", 16, false);
  Fiber& fiber = *running;
  SharedArray& array = shared_operand(fiber, access, address);
  read_shared(fiber, access, array, size_t(static_cast<const char*>(address) - array.data));
  count_shared(access, address);
  return *static_cast<const uint4*>(address);
}

void st_shared_v4(void* address, uint4 value, Where where) {
  const Access access = ACCESS("write", 16, true);
  Fiber& fiber = *running;
  SharedArray& array = shared_operand(fiber, access, address);
  write_shared(fiber, access, array, size_t(static_cast<char*>(address) - array.data));
  count_shared(access, address);
  *static_cast<uint4*>(address) = value;
}

uint4 ld_global_v4(const void* address, Where where) {
  const Access access = ACCESS("read", 16, false);
  check_aligned(*running, access, reinterpret_cast<uintptr_t>(address));
  access_global(*running, access, address);
  return *static_cast<const uint4*>(address);
}

void st_global_v4(void* address, uint4 value, Where where) {
  const Access access = ACCESS("write", 16, true);
  check_aligned(*running, access, reinterpret_cast<uintptr_t>(address));
  access_global(*running, access, address);
  *static_cast<uint4*>(address) = value;
}

void red_global_max(uint32_t* address, uint32_t value, Where where) {
  const Access access = ACCESS("write", 4, true);
  check_aligned(*running, access, reinterpret_cast<uintptr_t>(address));
  access_global(*running, access, address, true);
  std::atomic_ref<uint32_t> largest(*address);
  uint32_t seen = largest.load();
  while (seen < value && !largest.compare_exchange_weak(seen, value)) {
  }
}

// Asynchronous copies

void cp_async(void* shared, const void* global, int bytes, bool valid, Where where) {
  Fiber& fiber = *running;
  const Access write = ACCESS("write", size_t(bytes), true);
  SharedArray& array = shared_operand(fiber, write, shared);
  const size_t offset = size_t(static_cast<char*>(shared) - array.data);
  write_shared(fiber, write, array, offset, kPending);
  count_shared(write, shared);
  const Access read = ACCESS("read", size_t(bytes), false);
  check_aligned(fiber, read, reinterpret_cast<uintptr_t>(global));
  if (valid) access_global(fiber, read, global);
  fiber.copies.push_back({&array, offset, valid ? global : nullptr, bytes});
}

void cp_async_commit_group() {
  Fiber& fiber = *running;
  size_t committed = 0;
  for (const size_t size : fiber.groups) committed += size;
  fiber.groups.push_back(fiber.copies.size() - committed);
}

// Makes the copies, as late as the program allows.
void cp_async_wait_group(int pending) {
  Fiber& fiber = *running;
  if (fiber.groups.size() <= size_t(pending)) return;
  const auto last_group = fiber.groups.end() - pending;
  size_t done = 0;
  for (auto group = fiber.groups.begin(); group != last_group; ++group) done += *group;
  fiber.groups.erase(fiber.groups.begin(), last_group);
  for (size_t i = 0; i < done; ++i) {
    const Copy& copy = fiber.copies[i];
    char* target = copy.array->data + copy.offset;
    if (copy.global != nullptr) {
      std::memcpy(target, copy.global, size_t(copy.bytes));
    } else {
      std::memset(target, 0, size_t(copy.bytes));
    }
    for (size_t index = copy.offset / 2; index < (copy.offset + size_t(copy.bytes)) / 2; ++index) {
      copy.array->cells[index].writer = uint16_t(fiber.thread);
      copy.array->cells[index].write_time = fiber.worker->now;
    }
  }
  fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + ptrdiff_t(done));
}

// Matrices

Registers4 ldmatrix(const void* row, bool transposed, Where where) {
  Fiber& fiber = *running;
  const char* instruction = transposed ? "ldmatrix_x4_trans" : "ldmatrix_x4";
  fiber.warp->row[fiber.lane] = row;
  fiber.worker->collective(fiber, instruction, where, [&](Warp& warp) {
    const Access access{"read", 16, instruction, &where, nullptr, false};
    uint16_t elements[kLanes][8];
    std::array<uintptr_t, kLanes> addresses;
    for (int lane = 0; lane < kLanes; ++lane) {
      const Fiber& owner = warp.fibers[lane];
      SharedArray& array = shared_operand(owner, access, warp.row[lane]);
      addresses[lane] = reinterpret_cast<uintptr_t>(warp.row[lane]);
      read_shared(owner, access, array, addresses[lane] - reinterpret_cast<uintptr_t>(array.data));
      std::memcpy(elements[lane], warp.row[lane], 16);
    }
    fiber.worker->counters.count_ldmatrix(addresses);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        const auto* matrix = &elements[8 * i];
        warp.a[lane].value[i] = transposed
                                    ? matrix[2 * t][g] | uint32_t(matrix[2 * t + 1][g]) << 16
                                    : matrix[g][2 * t] | uint32_t(matrix[g][2 * t + 1]) << 16;
      }
    }
  });
  return fiber.warp->a[fiber.lane];
}

template <typename T>
void multiply(Warp& warp) {
  uint16_t a_bits[16][16], b_bits[16][8];
  float a[16][16], b[16][8], c[16][8];
  const auto unpack = [](uint32_t pair, uint16_t& low, uint16_t& high) {
    low = uint16_t(pair);
    high = uint16_t(pair >> 16);
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      uint16_t* row = &a_bits[g + i % 2 * 8][2 * t + i / 2 * 8];
      unpack(warp.a[lane].value[i], row[0], row[1]);
      c[g + i / 2 * 8][2 * t + i % 2] = warp.c[lane].value[i];
    }
    for (int i = 0; i < 2; ++i) {
      unpack(uint32_t(warp.b[lane] >> 32 * i), b_bits[2 * t + 8 * i][g],
             b_bits[2 * t + 8 * i + 1][g]);
    }
  }
  for (int i = 0; i < 256; ++i) (&a[0][0])[i] = cogview::to_float(T{(&a_bits[0][0])[i]});
  for (int i = 0; i < 128; ++i) (&b[0][0])[i] = cogview::to_float(T{(&b_bits[0][0])[i]});
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) warp.c[lane].value[i] = c[g + i / 2 * 8][2 * t + i % 2];
  }
}

void griddepcontrol_wait() { running->waited_for_grids = true; }

Float4 mma(Element element, Float4 c, Registers4 a, uint64_t b, Where where) {
  Fiber& fiber = *running;
  Warp& warp = *fiber.warp;
  warp.c[fiber.lane] = c;
  warp.a[fiber.lane] = a;
  warp.b[fiber.lane] = b;
  fiber.worker->collective(fiber, "mma_m16n8k16", where, [&](Warp& warp) {
    ++fiber.worker->counters.mma;
    if (element == Element::kHalf) {
      multiply<cogview::Half>(warp);
    } else {
      multiply<cogview::BFloat16>(warp);
    }
  });
  return warp.c[fiber.lane];
}

}  // namespace host_model
