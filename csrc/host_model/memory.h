// Who may touch what: the memory of a launch, and the checks of every access to it.
//
// Accesses. Kernels are compiled with -fsanitize=thread but not linked with its runtime: memory.cpp
// defines the hooks that the compiler puts before each load and store. (It puts none where a call
// returns a struct straight to memory: such functions must be inlined.) A `Cell` for each two bytes
// of shared memory holds who wrote and read them last, and when.
//
// Time. `Worker::now` counts the synchronisations of a worker. Every access is stamped with it. A
// barrier increments `now`. One of the block keeps it as the base of the block. Each warp has a stamp
// `known` for each warp, itself too: what that warp did before this time happened before what the warp
// does now. Barriers of the warp, or of some warps, raise these stamps: all who meet learn what each
// of them knew, and what it did. An access happened before what thread t does now if t made it, or if
// its stamp is below the base of the block, or below what the warp of t knows of the access's warp. As
// whole warps come to each barrier, this is the whole happens-before relation. Synchronisation of
// single threads (mbarrier) would need such stamps of threads. Engines that work beside the threads
// (TMA, wgmma) would be agents with numbers behind those of the threads. Their writes would stay
// `kPending`, as those of cp.async do, until the thread that waits for them takes them over.
//
// Of several reads that a write must not overtake, a cell keeps the warps and the time of the last.
// So a write may be called a race that is none, where its warp learns of the reads of several warps at
// different barriers, and of an early one not again.
//
// With AddressSanitizer instead (__SANITIZE_ADDRESS__), it checks plain accesses, and the functions
// here see only those of instructions.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "runtime.h"

namespace host_model {

struct Fiber;

#ifdef __SANITIZE_ADDRESS__
constexpr bool kSeesPlainAccesses = false;
#else
constexpr bool kSeesPlainAccesses = true;
#endif
constexpr size_t kSectorBytes = 32;

// Two bytes of shared memory.
struct Cell {
  uint32_t write_time = 0, read_time = 0;
  uint32_t reading_warps = 0;  // one bit for each: all that later writes may race
  uint16_t reader = 0;         // thread, or kManyThreads
  uint16_t writer = 0;         // thread, with kPending: by a cp.async that was not waited for
};
constexpr uint16_t kPending = 0x8000, kManyThreads = 0xffff;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// A piece of a block's shared memory: dynamic_shared(), or one shared_array.
struct SharedArray {
  const void* key;  // null: dynamic_shared()
  size_t bytes;
  std::unique_ptr<char, Free> memory;
  char* data;
  std::vector<Cell> cells;

  SharedArray(const void* key, size_t bytes);
  std::string name() const { return key == nullptr ? "dynamic_shared" : "shared_array"; }
};

// Global memory, the same for all workers.
struct GlobalBuffer {
  Buffer buffer;
  uintptr_t begin, end;
  // Of a writable buffer, who wrote each two bytes: 0 nobody, else a block of this launch plus one, or
  // kByAtomics or kEarlier.
  std::vector<uint32_t> writers;
  std::vector<uint8_t> loaded, stored;                // sectors touched in this launch,
  std::vector<uint8_t> loaded_before, stored_before;  // in the operator's earlier launches

  explicit GlobalBuffer(const Buffer& given);
  void touch(std::vector<uint8_t>& sectors, uintptr_t first, uintptr_t last) {
    for (uintptr_t s = first / kSectorBytes; s <= (last - 1) / kSectorBytes; ++s) {
      std::atomic_ref(sectors[s - begin / kSectorBytes]).store(1, std::memory_order_relaxed);
    }
  }
};
constexpr uint32_t kByAtomics = 0xfffffffe;  // in this launch
constexpr uint32_t kEarlier = 0xffffffff;    // in an earlier launch

struct OperatorState {
  std::string name;
  std::vector<GlobalBuffer> buffers;
  cudaError_t status = cudaSuccess;

  // What the launch wrote counts as written earlier from now on.
  void end_launch();
};

// The operator that launches, or one without memory. One launch asks at a time.
OperatorState& current_operator();

// A read or write of one thread, or of one lane of an instruction.
struct Access {
  const char* verb;  // "read" or "write"
  size_t bytes;
  const char* instruction;  // null: plain C++
  const Where* where;       // of the instruction
  const void* code;         // the return address
  bool is_write;

  std::string text() const;
};

// The block's array of this key; made where the first thread asks for it.
void* array_of_block(Fiber& fiber, const void* key, int bytes);

// Checks of one access. They end the block with an error, or return.
void check_aligned(const Fiber& fiber, const Access& access, uintptr_t address);
SharedArray& shared_operand(const Fiber& fiber, const Access& access, const void* pointer);
void read_shared(const Fiber& fiber, const Access& access, SharedArray& array, size_t offset);
// `flag` is kPending for a write that has only begun.
void write_shared(const Fiber& fiber, const Access& access, SharedArray& array, size_t offset,
                  uint16_t flag = 0);
// Counted too.
void access_global(const Fiber& fiber, const Access& access, const void* pointer,
                   bool atomic = false);

}  // namespace host_model
