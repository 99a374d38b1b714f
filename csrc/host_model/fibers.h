// Runs the threads of a block as fibers, and blocks on a few workers (threads of the CPU).
//
// A thread of a block has a stack of its own. It runs until it waits, and hands over to the next lane
// of its warp, or else to another warp. Each worker runs one block after another.
#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <cstdarg>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "counters.h"
#include "memory.h"
#include "sm80.h"
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace host_model {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kLanes;
constexpr int kBarriers = 16;  // 0: that of the block

// Texts of errors

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
// An instruction and its place in the source.
std::string place(const char* instruction, const Where& where);
bool same_place(const Where& a, const Where& b);

// Fibers

struct Context {
#ifdef __x86_64__
  void* stack_pointer = nullptr;
#else
  ucontext_t machine;
#endif
  char* stack = nullptr;  // its lowest byte
  size_t stack_bytes = 0;
};

struct Worker;
struct Warp;

struct Copy {  // a cp.async that was not waited for
  SharedArray* array;
  size_t offset;
  const void* global;  // null: zeros
  int bytes;
};

struct Fiber {
  Context context;
  Worker* worker = nullptr;
  Warp* warp = nullptr;
  unsigned thread = 0, lane = 0;
  const char* instruction = nullptr;  // where it waits
  Where where;
  bool waited_for_grids = false;  // by griddepcontrol_wait
  std::vector<Copy> copies;       // oldest first
  std::vector<size_t> groups;     // sizes of the committed groups, oldest first

  uint32_t bit() const { return 1u << lane; }
};

// The fiber that this thread of the CPU runs.
extern constinit thread_local Fiber* running __attribute__((tls_model("initial-exec")));

// Lanes leave operands here; the last lane to arrive at an instruction leaves the results.
struct Warp {
  Fiber* fibers = nullptr;  // 32 of them
  uint32_t runnable = 0, arrived = 0, exited = 0;
  std::array<uint32_t, kMaxWarps> known;  // of each warp of the block; memory.h: Time
  uint32_t value[kLanes], shuffled[kLanes];
  int lane_argument[kLanes];
  uint32_t ballot = 0, ballot_result = 0;
  const void* row[kLanes];
  alignas(16) Registers4 a[kLanes];
  uint64_t b[kLanes];
  alignas(16) Float4 c[kLanes];

  unsigned index() const { return fibers->thread / kLanes; }
};

// A barrier at which some warps of the block meet.
struct BarrierOfWarps {
  int num_threads = 0;
  uint32_t warps = 0;  // that wait: one bit for each
  const Fiber* first = nullptr;
  uint32_t last_warps = 0, last_time = 0;  // that met here last, and when
};

struct Launch {
  std::string kernel_name;
  void (*kernel)(const void*);
  const void* params;
  size_t params_bytes;
  int64_t grid_x;
  int grid_y, num_threads, shared_bytes;
  bool starts_early;
  OperatorState* op;
  std::atomic<int64_t> next_block = 0;
  std::atomic<bool> failed = false;
  std::mutex mutex;
  std::string error;  // the first
};

struct Worker {
  Launch* launch = nullptr;
  Context scheduler;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<SharedArray>> arrays;
  Counters counters;

  int64_t block = 0;
  uint32_t now = 0, block_start = 0, block_base = 0;  // memory.h: Time

  ~Worker();
  void prepare(Launch& new_launch);
  void run_block(int64_t new_block);
  [[noreturn]] void exit(Fiber& fiber);

  // An error of the running fiber; its block ends here.
  [[noreturn]] void fail(const Fiber& fiber, const std::string& text);

  // All lanes must come to the same place; the last one does the work for the warp.
  template <typename Work>
  void collective(Fiber& fiber, const char* instruction, const Where& where, const Work& work) {
    Warp& warp = *fiber.warp;
    if (warp.exited != 0 || warp.arrived != 0) check_arrival(fiber, instruction, where);
    warp.arrived |= fiber.bit();
    if (warp.arrived != kAllLanes) return wait(fiber, instruction, where);
    counters.flush();
    warp.arrived = 0;
    warp.runnable = kAllLanes;
    work(warp);
  }

  // All threads must come to the same place.
  void barrier(Fiber& fiber, const Where& where);
  // So many threads, of whole warps, must come to the same place.
  void barrier_of_warps(Fiber& fiber, int id, int num_threads, const Where& where);

 private:
  void make_fibers(size_t num_threads);
  int num_warps() const { return launch->num_threads / kLanes; }
  void leave(Fiber& fiber);
  void wait(Fiber& fiber, const char* instruction, const Where& where);
  void check_arrival(const Fiber& fiber, const char* instruction, const Where& where);
  void record(const Fiber& fiber, const std::string& text);
  [[noreturn]] void abandon();
  [[noreturn]] void fail_at_barrier(const Fiber& returned);
  void check_arrival_of_warp(const Fiber& fiber, int id, int num_threads, const Where& where);
  void report_deadlock();

  char* stacks_ = nullptr;
  size_t stacks_bytes_ = 0;
  int num_exited_ = 0, num_at_barrier_ = 0;
  Where barrier_where_;
  unsigned barrier_first_ = 0;  // the first thread there
  std::array<BarrierOfWarps, kBarriers> barriers_of_warps_;
  bool abandoned_ = false;  // the block failed, and its fibers did not end
};

// The text of this thread's error, for cudaGetErrorString.
cudaError_t set_error(const std::string& text);

}  // namespace host_model
