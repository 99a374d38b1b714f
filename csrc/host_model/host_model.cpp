// Runs kernels on the CPU and checks every access.
//
// Fibers. Each thread of a block has a stack of its own; a fiber runs until it waits, and hands
// over to the next lane of its warp, or else to another warp. Blocks run one after another on each
// of a few workers (threads of the CPU).
//
// Accesses. Kernels are compiled with -fsanitize=thread but not linked with its runtime: the hooks
// that the compiler puts before each load and store are defined here. (It puts none where a call
// returns a struct straight to memory: such functions must be inlined.) A `Cell` for each two bytes of
// shared memory knows who wrote and read them last, and when.
//
// Time. `now` counts the synchronisations of a worker. Every access is stamped with it; a barrier
// of a block (a warp) moves `now` on and keeps it as the block's (the warp's) base. An access
// happened before what thread t does now if t made it, or if its stamp is below the base of the
// block, or below that of the warp for threads of one warp: with barriers that all threads must
// reach, this is the whole happens-before relation. Synchronisation between some threads only
// (mbarrier) would add to `happened_before` a stamp for each pair of threads, raised when a waiting
// thread learns what the arriving ones knew. Engines that work beside the threads (TMA, wgmma)
// would be agents with numbers behind the threads', whose writes stay `kPending`, as those of
// cp.async do, until the thread that waits for them takes them over.
//
// With AddressSanitizer instead (__SANITIZE_ADDRESS__) plain accesses are checked by it, and here
// only those that pass through primitives.

#include <link.h>
#include <sys/mman.h>

#include <array>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "device.h"
#include "report.h"

#ifdef __SANITIZE_ADDRESS__
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace host_model {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr bool kSeesPlainAccesses = false;
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGapBytes = 0;  // AddressSanitizer guards what malloc returns
#else
constexpr bool kSeesPlainAccesses = true;
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kGapBytes = 4096;  // around shared memory, so that nothing lies next to it
#endif
constexpr size_t kPageBytes = 4096;
constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kMaxThreads = 1024;
std::atomic<int> max_shared{227 * 1024};  // bytes that a block may have
constexpr size_t kSectorBytes = 32;

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
std::string format(const char* pattern, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, pattern);
  vsnprintf(text, sizeof(text), pattern, arguments);
  va_end(arguments);
  return text;
}

bool same_place(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

std::string place(const char* primitive, const Where& where) {
  const char* slash = std::strrchr(where.file_name(), '/');
  return format("%s (%s:%u)", primitive, slash != nullptr ? slash + 1 : where.file_name(),
                unsigned(where.line()));
}

// ---- Stacks

struct Context {
#ifdef __x86_64__
  void* stack_pointer = nullptr;
#else
  ucontext_t machine;
#endif
  char* stack = nullptr;  // its lowest byte
  size_t stack_bytes = 0;
};

#ifdef __x86_64__
// Keeps the registers that a callee must keep on the stack of the one that leaves. swapcontext
// would do, but asks the kernel for the signal mask each time.
extern "C" __attribute__((visibility("hidden"))) void host_model_switch(void** from, void* to);
asm(R"(
.text
.hidden host_model_switch
.globl host_model_switch
.type host_model_switch, @function
host_model_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size host_model_switch, . - host_model_switch
)");
#endif

void switch_context(Context& from, Context& to) {
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef __x86_64__
  host_model_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.machine, &to.machine);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// `entry` begins on the context's stack; it never returns. Stacks of a warp start at different
// offsets in their pages, else their hot lines would meet in the same sets of the cache.
void prepare_context(Context& context, int lane, void (*entry)()) {
  char* top = context.stack + context.stack_bytes - size_t(lane) * 192 - 64;
#ifdef __x86_64__
  void** slots = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15));
  slots[0] = reinterpret_cast<void*>(entry);
  context.stack_pointer = slots - 6;  // the six registers
#else
  getcontext(&context.machine);
  context.machine.uc_stack.ss_sp = context.stack;
  context.machine.uc_stack.ss_size = size_t(top - context.stack);
  makecontext(&context.machine, entry, 0);
#endif
}

// ---- Memory

// Two bytes of shared memory.
struct Cell {
  uint32_t write_time = 0, read_time = 0;
  uint16_t writer = 0;  // thread, with kPending: by a cp.async that was not waited for
  uint16_t reader = 0;  // thread, or kLanesOf + warp, or kManyWarps: all that are still of interest
};
constexpr uint16_t kPending = 0x8000;
constexpr uint16_t kLanesOf = kMaxThreads;
constexpr uint16_t kManyWarps = 0xffff;

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

  SharedArray(const void* key, size_t bytes) : key(key), bytes(bytes), cells((bytes + 1) / 2) {
    void* address = nullptr;
    if (posix_memalign(&address, 128, bytes + 2 * kGapBytes) != 0) std::abort();
    memory.reset(static_cast<char*>(address));
    data = memory.get() + kGapBytes;
  }
  std::string name() const { return key == nullptr ? "dynamic_shared" : "shared_array"; }
};

// Who wrote two bytes of global memory: 0 nobody, else a block of this launch plus one, or
constexpr uint32_t kByAtomics = 0xfffffffe;  // in this launch
constexpr uint32_t kEarlier = 0xffffffff;

// Global memory, the same for all workers.
struct GlobalBuffer {
  Buffer buffer;
  uintptr_t begin, end;
  std::vector<uint32_t> writers;                      // of a writable buffer, for each two bytes
  std::vector<uint8_t> loaded, stored;                // sectors touched in this launch,
  std::vector<uint8_t> loaded_before, stored_before;  // in the operator's earlier launches

  explicit GlobalBuffer(const Buffer& given) : buffer(given) {
    buffer.writable |= buffer.must_write;
    begin = reinterpret_cast<uintptr_t>(given.data);
    end = begin + uintptr_t(given.bytes);
    if (buffer.writable) writers.resize(size_t(given.bytes + 1) / 2);
    const size_t sectors = (end - 1) / kSectorBytes - begin / kSectorBytes + 1;
    for (auto* touched : {&loaded, &stored, &loaded_before, &stored_before})
      touched->resize(sectors);
  }
  void touch(std::vector<uint8_t>& sectors, uintptr_t first, uintptr_t last) {
    for (uintptr_t s = first / kSectorBytes; s <= (last - 1) / kSectorBytes; ++s) {
      std::atomic_ref(sectors[s - begin / kSectorBytes]).store(1, std::memory_order_relaxed);
    }
  }
};

// What is read or written, for the text of an error.
struct Access {
  const char* verb;  // "read" or "write"
  size_t bytes;
  const char* primitive;  // null: plain C++
  const Where* where;
  const void* code;  // the return address
  bool is_write;

  std::string text() const {
    if (primitive != nullptr) return place(primitive, *where) + ": " + verb;
    return format("%s of %zu bytes", verb, bytes);
  }
};

// ---- Counting

// The k-th access of each lane at one place of the code is one instruction of the warp.
struct WarpAccess {
  uint32_t lanes = 0;
  std::array<uintptr_t, kLanes> address;
};
struct Site {
  const void* code = nullptr;
  int space = 0;  // 0: shared memory, else 1 + index of the buffer
  size_t bytes = 0;
  bool is_write = false;
  std::array<uint32_t, kLanes> count{};
  std::vector<WarpAccess> accesses;
  size_t num_accesses = 0;
};

// Cycles beyond one that lanes need for `words` words each from 32 banks of four bytes. The
// hardware takes eight-byte accesses in half warps, sixteen-byte ones in quarters.
int64_t conflict_cycles(const uintptr_t* address, uint32_t lanes, size_t bytes) {
  const int lanes_at_once = bytes <= 4 ? 32 : bytes <= 8 ? 16 : 8;
  int64_t cycles = 0;
  for (int first = 0; first < kLanes; first += lanes_at_once) {
    std::array<uintptr_t, 32> words[2];  // of each bank, where there are up to two words
    std::array<int, 32> depth{};
    std::vector<uintptr_t> more[32];
    int worst = 1;
    for (int lane = first; lane < first + lanes_at_once; ++lane) {
      if ((lanes >> lane & 1) == 0) continue;
      for (uintptr_t word = address[lane] / 4; word <= (address[lane] + bytes - 1) / 4; ++word) {
        const int bank = int(word % 32);
        const int known = depth[bank];
        bool seen = (known > 0 && words[0][bank] == word) || (known > 1 && words[1][bank] == word);
        for (uintptr_t other : more[bank]) seen = seen || other == word;
        if (seen) continue;
        if (known < 2) {
          words[known][bank] = word;
        } else {
          more[bank].push_back(word);
        }
        worst = std::max(worst, ++depth[bank]);
      }
    }
    cycles += worst - 1;
  }
  return cycles;
}

// ---- Launches, workers, fibers

struct Copy {  // a cp.async under way
  SharedArray* array;
  size_t offset;
  const void* global;  // null: zeros
  int bytes;
};

struct Worker;
struct Warp;

struct Fiber {
  Context context;
  Worker* worker = nullptr;
  Warp* warp = nullptr;
  unsigned thread = 0, lane = 0;
  const char* primitive = nullptr;  // where it waits
  Where where;
  std::vector<Copy> copies;    // oldest first
  std::vector<size_t> groups;  // sizes of the committed groups, oldest first

  uint32_t bit() const { return 1u << lane; }
};

// Lanes leave operands here; the last to arrive at an instruction leaves the results.
struct Warp {
  Fiber* fibers = nullptr;  // 32 of them
  uint32_t runnable = 0, arrived = 0, exited = 0;
  uint32_t base = 0;  // time of the last bar_warp_sync
  uint32_t value[kLanes], shuffled[kLanes];
  int lane_argument[kLanes];
  uint32_t ballot = 0, ballot_result = 0;
  const void* row[kLanes];
  alignas(16) Registers4 a[kLanes];
  uint64_t b[kLanes];
  alignas(16) Float4 c[kLanes];
};

struct Counts {
  int64_t mma = 0, barriers = 0, shared_accesses = 0, bank_conflicts = 0;
  std::vector<std::pair<int64_t, int64_t>> bytes;  // of each buffer: loaded, stored
};

struct OperatorState {
  std::string name;
  std::vector<GlobalBuffer> buffers;
  cudaError_t status = cudaSuccess;
};

struct Launch {
  std::string kernel_name;
  void (*kernel)(const void*);
  const void* params;
  size_t params_bytes;
  int64_t grid_x;
  int grid_y, num_threads, shared_bytes;
  OperatorState* op;
  std::atomic<int64_t> next_block = 0;
  std::atomic<bool> failed = false;
  std::mutex mutex;
  std::string error;  // the first
};

// The fiber that this thread of the CPU is running.
__attribute__((tls_model("initial-exec"))) thread_local Fiber* running = nullptr;
thread_local std::string last_error;

[[noreturn]] void fiber_main();

struct Worker {
  Launch* launch = nullptr;
  Context scheduler;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  char* stacks = nullptr;
  size_t stacks_bytes = 0;
  std::vector<std::unique_ptr<SharedArray>> arrays;

  int64_t block = 0;
  int num_exited = 0, num_at_barrier = 0;
  uint32_t now = 0, block_start = 0, block_base = 0;
  bool abandoned = false;  // fibers of the last block did not end

  std::array<Site, 512> sites;
  std::vector<Site*> touched_sites;
  Counts counts;

  ~Worker() {
    if (stacks != nullptr) munmap(stacks, stacks_bytes);
  }

  // Fibers

  void prepare(Launch& new_launch) {
    launch = &new_launch;
    const size_t num_threads = size_t(launch->num_threads);
    if (fibers.size() < num_threads) make_fibers(num_threads);
    std::erase_if(arrays, [&](const auto& array) {
      return array->key != nullptr || array->bytes != size_t(launch->shared_bytes);
    });
    if (now > 0xf0000000u) {
      arrays.clear();
      now = 0;
    }
    if (arrays.empty() && launch->shared_bytes > 0) {
      arrays.push_back(std::make_unique<SharedArray>(nullptr, size_t(launch->shared_bytes)));
    }
    counts = {};
    counts.bytes.resize(launch->op->buffers.size());
#ifdef __SANITIZE_ADDRESS__
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    void* stack;
    pthread_attr_getstack(&attributes, &stack, &scheduler.stack_bytes);
    pthread_attr_destroy(&attributes);
    scheduler.stack = static_cast<char*>(stack);
#endif
  }

  void make_fibers(size_t num_threads) {
    if (stacks != nullptr) munmap(stacks, stacks_bytes);
    const size_t step = kStackBytes + kPageBytes;  // a guard page below each stack
    stacks_bytes = num_threads * step;
    stacks = static_cast<char*>(
        mmap(nullptr, stacks_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks == MAP_FAILED) std::abort();
    fibers = std::vector<Fiber>(num_threads);
    warps = std::vector<Warp>(num_threads / kLanes);
    for (size_t thread = 0; thread < num_threads; ++thread) {
      Fiber& fiber = fibers[thread];
      fiber.context.stack = stacks + thread * step + kPageBytes;
      fiber.context.stack_bytes = kStackBytes;
      mprotect(fiber.context.stack, kStackBytes, PROT_READ | PROT_WRITE);
      fiber.worker = this;
      fiber.thread = unsigned(thread);
      fiber.lane = unsigned(thread % kLanes);
      fiber.warp = &warps[thread / kLanes];
      if (fiber.lane == 0) fiber.warp->fibers = &fiber;
    }
  }

  int num_warps() const { return launch->num_threads / kLanes; }

  void run_block(int64_t new_block) {
    block = new_block;
    num_exited = num_at_barrier = 0;
    block_start = block_base = ++now;
    for (auto& array : arrays) std::memset(array->data, 0xff, array->bytes);
#ifdef __SANITIZE_ADDRESS__
    // Fibers never return on their stacks: what their frames left poisoned must not stay so.
    __asan_unpoison_memory_region(stacks, stacks_bytes);
#endif
    abandoned = false;
    for (int w = 0; w < num_warps(); ++w) {
      warps[w].runnable = kAllLanes;
      warps[w].arrived = warps[w].exited = warps[w].ballot = 0;
      warps[w].base = now;
    }
    for (int thread = 0; thread < launch->num_threads; ++thread) {
      Fiber& fiber = fibers[thread];
      fiber.copies.clear();
      fiber.groups.clear();
      prepare_context(fiber.context, int(fiber.lane), fiber_main);
    }
    running = &fibers[0];
    switch_context(scheduler, running->context);
    running = nullptr;
    if (!abandoned && num_exited < launch->num_threads) report_deadlock();
    if (abandoned) {
      for (Site* site : touched_sites) clear_site(*site);
      touched_sites.clear();
    }
  }

  // Hand over to another fiber; null where all wait or have returned.
  void leave(Fiber& fiber) {
    Warp& warp = *fiber.warp;
    Fiber* next = nullptr;
    if (warp.runnable != 0) {
      const uint32_t later = warp.runnable & ~((fiber.bit() << 1) - 1);
      next = &warp.fibers[std::countr_zero(later != 0 ? later : warp.runnable)];
    } else {
      flush_sites();
      const int own = int(&warp - warps.data());
      for (int i = 1; i < num_warps() && next == nullptr; ++i) {
        Warp& other = warps[(own + i) % num_warps()];
        if (other.runnable != 0) next = &other.fibers[std::countr_zero(other.runnable)];
      }
    }
    if (next == &fiber) return;
    running = next;
    switch_context(fiber.context, next != nullptr ? next->context : scheduler);
  }

  void wait(Fiber& fiber, const char* primitive, const Where& where) {
    fiber.primitive = primitive;
    fiber.where = where;
    fiber.warp->runnable &= ~fiber.bit();
    leave(fiber);
    fiber.primitive = nullptr;
  }

  [[noreturn]] void exit(Fiber& fiber) {
    Warp& warp = *fiber.warp;
    if (warp.arrived != 0) {
      const Fiber& other = warp.fibers[std::countr_zero(warp.arrived)];
      fail(fiber, format("returned, and thread %u waits for the whole warp at ", other.thread) +
                      place(other.primitive, other.where));
    }
    warp.exited |= fiber.bit();
    warp.runnable &= ~fiber.bit();
    ++num_exited;
    if (num_at_barrier != 0) fail_at_barrier(fiber);
    leave(fiber);
    std::abort();
  }

  // Errors

  void record(const Fiber& fiber, const std::string& text) {
    const std::lock_guard lock(launch->mutex);
    if (launch->failed.exchange(true)) return;
    launch->error = format("%s, block (%lld, %lld), thread %u: ", launch->kernel_name.c_str(),
                           static_cast<long long>(block % launch->grid_x),
                           static_cast<long long>(block / launch->grid_x), fiber.thread) +
                    text;
  }

  // The block ends here: back to the scheduler for good.
  [[noreturn]] void abandon() {
    abandoned = true;
    Context nowhere;
    switch_context(nowhere, scheduler);
    std::abort();
  }

  [[noreturn]] void fail(const Fiber& fiber, const std::string& text) {
    record(fiber, text);
    abandon();
  }

  [[noreturn]] void fail_at_barrier(const Fiber& returned) {
    for (int thread = 0; thread < launch->num_threads; ++thread) {
      const Fiber& other = fibers[thread];
      const bool waits = other.primitive != nullptr && (other.warp->arrived & other.bit()) == 0;
      if (!waits) continue;
      record(other, "divergent barrier: " + place(other.primitive, other.where) +
                        format(", but thread %u has returned", returned.thread));
      break;
    }
    abandon();
  }

  // Nobody can go on: some lanes wait for the rest of their warp, which waits at a barrier.
  void report_deadlock() {
    abandoned = true;
    for (int w = 0; w < num_warps(); ++w) {
      Warp& warp = warps[w];
      if (warp.arrived == 0) continue;
      const Fiber& arrived = warp.fibers[std::countr_zero(warp.arrived)];
      const Fiber& missing = warp.fibers[std::countr_one(warp.arrived)];
      record(arrived, "divergent warp: waits at " + place(arrived.primitive, arrived.where) +
                          format(", but thread %u waits at ", missing.thread) +
                          place(missing.primitive, missing.where));
      return;
    }
  }

  // Collectives

  // All lanes must come to the same place; the last one does the work for the warp.
  template <typename Work>
  void collective(Fiber& fiber, const char* primitive, const Where& where, Work work) {
    Warp& warp = *fiber.warp;
    if (warp.exited != 0) {
      fail(fiber,
           place(primitive, where) + format(": thread %u of the warp has returned",
                                            warp.fibers[std::countr_zero(warp.exited)].thread));
    }
    if (warp.arrived != 0) {
      const Fiber& other = warp.fibers[std::countr_zero(warp.arrived)];
      if (other.primitive != primitive || !same_place(other.where, where)) {
        fail(fiber, "divergent warp: at " + place(primitive, where) +
                        format(", but thread %u waits at ", other.thread) +
                        place(other.primitive, other.where));
      }
    }
    warp.arrived |= fiber.bit();
    if (warp.arrived != kAllLanes) return wait(fiber, primitive, where);
    flush_sites();
    warp.arrived = 0;
    warp.runnable = kAllLanes;
    work(warp);
  }

  void barrier(Fiber& fiber, const Where& where) {
    if (num_exited != 0) {
      for (int thread = 0; thread < launch->num_threads; ++thread) {
        if ((fibers[thread].warp->exited & fibers[thread].bit()) == 0) continue;
        fail(fiber, "divergent barrier: " + place("bar_sync", where) +
                        format(", but thread %d has returned", thread));
      }
    }
    if (num_at_barrier == 0) {
      barrier_where = where;
      barrier_first = fiber.thread;
    } else if (!same_place(barrier_where, where)) {
      fail(fiber, "divergent barrier: " + place("bar_sync", where) +
                      format(", but thread %u waits at ", barrier_first) +
                      place("bar_sync", barrier_where));
    }
    if (++num_at_barrier < launch->num_threads) return wait(fiber, "bar_sync", where);
    flush_sites();
    ++counts.barriers;
    num_at_barrier = 0;
    block_base = ++now;
    for (int w = 0; w < num_warps(); ++w) warps[w].runnable = kAllLanes;
  }
  Where barrier_where;
  unsigned barrier_first = 0;

  // Shared memory

  SharedArray* find_shared(uintptr_t address, size_t bytes) {
    for (auto& array : arrays) {
      const uintptr_t offset = address - reinterpret_cast<uintptr_t>(array->data);
      if (offset < array->bytes && array->bytes - offset >= bytes) return array.get();
    }
    return nullptr;
  }

  void* shared_array(Fiber& fiber, const void* key, int bytes) {
    for (auto& array : arrays) {
      if (array->key == key) return array->data;
    }
    arrays.push_back(std::make_unique<SharedArray>(key, size_t(bytes)));
    size_t total = 0;
    for (auto& array : arrays) total += array->key != nullptr ? array->bytes : 0;
    if (total > 48 * 1024) fail(fiber, "more than 48 KB of shared arrays");
    std::memset(arrays.back()->data, 0xff, size_t(bytes));
    return arrays.back()->data;
  }

  bool happened_before(unsigned thread, uint32_t time, const Fiber& fiber) const {
    return thread == fiber.thread || time < block_base ||
           (thread / kLanes == fiber.thread / kLanes && time < fiber.warp->base);
  }

  bool reads_happened_before(const Cell& cell, const Fiber& fiber) const {
    if (cell.read_time < block_base) return true;
    if (cell.reader < kLanesOf) return happened_before(cell.reader, cell.read_time, fiber);
    return cell.reader != kManyWarps && cell.reader - kLanesOf == int(fiber.thread / kLanes) &&
           cell.read_time < fiber.warp->base;
  }

  [[noreturn]] void fail_race(const Fiber& fiber, const Access& access, const SharedArray& array,
                              size_t offset, const std::string& other) {
    fail(fiber,
         format("race: %s at %s+%zu, ", access.text().c_str(), array.name().c_str(), offset) +
             other + " with no barrier between" + code_text(access));
  }

  static std::string reader_text(uint16_t reader) {
    if (reader == kManyWarps) return "which threads of several warps read";
    if (reader < kLanesOf) return format("which thread %u read", unsigned(reader));
    return format("which several threads of warp %u read", unsigned(reader - kLanesOf));
  }

  void check_written(const Fiber& fiber, const Access& access, const SharedArray& array,
                     size_t index) {
    const Cell& cell = array.cells[index];
    if (cell.write_time < block_start) return;
    if ((cell.writer & kPending) != 0) {
      fail(fiber, access.text() +
                      format(" at %s+%zu before the cp.async of thread %u was waited for",
                             array.name().c_str(), 2 * index, unsigned(cell.writer & ~kPending)) +
                      code_text(access));
    }
    if (!happened_before(cell.writer, cell.write_time, fiber)) {
      fail_race(fiber, access, array, 2 * index,
                format("which thread %u wrote", unsigned(cell.writer)));
    }
  }

  void read_shared(const Fiber& fiber, const Access& access, SharedArray& array, size_t offset) {
    const size_t last = (offset + access.bytes - 1) / 2;
    for (size_t index = offset / 2; index <= last; ++index) {
      Cell& cell = array.cells[index];
      if (kSeesPlainAccesses && cell.write_time < block_start) {
        fail(fiber,
             access.text() +
                 format(" at %s+%zu, which nobody has written", array.name().c_str(), 2 * index) +
                 code_text(access));
      }
      check_written(fiber, access, array, index);
      const uint16_t warp = uint16_t(fiber.thread / kLanes);
      if (cell.read_time < block_start || reads_happened_before(cell, fiber)) {
        cell.reader = uint16_t(fiber.thread);
      } else if (cell.reader != fiber.thread) {
        const bool same_warp =
            cell.reader < kLanesOf ? cell.reader / kLanes == warp : cell.reader == kLanesOf + warp;
        cell.reader = same_warp ? uint16_t(kLanesOf + warp) : kManyWarps;
      }
      cell.read_time = now;
    }
  }

  // `flag` is kPending for a write that has only begun.
  void write_shared(const Fiber& fiber, const Access& access, SharedArray& array, size_t offset,
                    uint16_t flag = 0) {
    const size_t last = (offset + access.bytes - 1) / 2;
    for (size_t index = offset / 2; index <= last; ++index) {
      Cell& cell = array.cells[index];
      check_written(fiber, access, array, index);
      if (cell.read_time >= block_start && !reads_happened_before(cell, fiber)) {
        fail_race(fiber, access, array, 2 * index, reader_text(cell.reader));
      }
      cell.writer = uint16_t(fiber.thread | flag);
      cell.write_time = now;
    }
  }

  // Global memory

  int find_global(uintptr_t address, size_t bytes) const {
    const auto& buffers = launch->op->buffers;
    for (size_t i = 0; i < buffers.size(); ++i) {
      if (address >= buffers[i].begin && address < buffers[i].end &&
          buffers[i].end - address >= bytes) {
        return int(i);
      }
    }
    return -1;
  }

  void check_global(const Fiber& fiber, const Access& access, GlobalBuffer& global,
                    uintptr_t address, bool atomic) {
    const char* name = global.buffer.name;
    const size_t offset = address - global.begin;
    if (access.is_write && !global.buffer.writable) {
      fail(fiber, access.text() + format(" at %s+%zu, which is an input", name, offset) +
                      code_text(access));
    }
    if (global.writers.empty()) return;
    const uint32_t own = atomic ? kByAtomics : uint32_t(block) + 1;
    for (size_t index = offset / 2; index <= (offset + access.bytes - 1) / 2; ++index) {
      std::atomic_ref<uint32_t> cell(global.writers[index]);
      const uint32_t writer = access.is_write ? cell.exchange(own, std::memory_order_relaxed)
                                              : cell.load(std::memory_order_relaxed);
      if (writer == own || writer == kEarlier) continue;
      if (writer == 0) {
        if (!kSeesPlainAccesses || access.is_write || !global.buffer.must_write) continue;
        fail(fiber, access.text() +
                        format(" at %s+%zu, which nobody has written", name, 2 * index) +
                        code_text(access));
      }
      const std::string other =
          writer == kByAtomics
              ? "a red"
              : format("block (%lld, %lld)", static_cast<long long>((writer - 1) % launch->grid_x),
                       static_cast<long long>((writer - 1) / launch->grid_x));
      fail(fiber, access.text() +
                      format(" at %s+%zu, which %s wrote in the same launch", name, 2 * index,
                             other.c_str()) +
                      code_text(access));
    }
  }

  // Any access

  // Where the instruction stands, for addr2line.
  static std::string code_text(const Access& access) {
    if (access.primitive != nullptr) return "";
    struct Search {
      uintptr_t code;
      std::string text;
    } search{reinterpret_cast<uintptr_t>(access.code), ""};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
          Search& search = *static_cast<Search*>(data);
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const uintptr_t offset = search.code - info->dlpi_addr - info->dlpi_phdr[i].p_vaddr;
            if (info->dlpi_phdr[i].p_type != PT_LOAD || offset >= info->dlpi_phdr[i].p_memsz) {
              continue;
            }
            search.text = format(" [addr2line -e %s 0x%zx]", info->dlpi_name,
                                 size_t(search.code - info->dlpi_addr - 1));
            return 1;
          }
          return 0;
        },
        &search);
    return search.text;
  }

  [[noreturn]] void fail_outside(const Fiber& fiber, const Access& access, uintptr_t address) {
    std::string nearest;
    uintptr_t best = uintptr_t(1) << 20;
    const auto consider = [&](const std::string& name, uintptr_t begin, uintptr_t bytes) {
      const uintptr_t end = begin + bytes;
      const uintptr_t distance = address < begin                ? begin - address
                                 : address + access.bytes > end ? address + access.bytes - end
                                                                : 0;
      if (distance >= best) return;
      best = distance;
      nearest = address < begin
                    ? format(", %zu bytes before the begin of %s", size_t(distance), name.c_str())
                    : format(" at %s+%zu, which ends at %zu", name.c_str(), size_t(address - begin),
                             size_t(bytes));
    };
    for (auto& array : arrays) {
      consider(array->name(), reinterpret_cast<uintptr_t>(array->data), array->bytes);
    }
    for (auto& global : launch->op->buffers) {
      consider(global.buffer.name, global.begin, global.end - global.begin);
    }
    fail(fiber, "out of bounds: " + access.text() +
                    (nearest.empty() ? format(" at 0x%zx, outside every tensor", size_t(address))
                                     : nearest) +
                    code_text(access));
  }

  void check_aligned(const Fiber& fiber, const Access& access, uintptr_t address) {
    if (address % access.bytes == 0) return;
    fail(fiber, "misaligned: " + access.text() +
                    format(" at an address that is %zu more than a multiple of %zu",
                           size_t(address % access.bytes), access.bytes) +
                    code_text(access));
  }

  void access_global(const Fiber& fiber, const Access& access, const void* pointer,
                     bool atomic = false) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    const int index = find_global(address, access.bytes);
    if (index < 0) fail_outside(fiber, access, address);
    check_global(fiber, access, launch->op->buffers[index], address, atomic);
    count_access(fiber, access, address, 1 + index);
  }

  SharedArray& shared_operand(const Fiber& fiber, const Access& access, const void* pointer) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    check_aligned(fiber, access, address);
    SharedArray* array = find_shared(address, access.bytes);
    if (array == nullptr) fail_outside(fiber, access, address);
    return *array;
  }

  void access_plain(const Fiber& fiber, const Access& access, uintptr_t address) {
    if (SharedArray* array = find_shared(address, access.bytes)) {
      const size_t offset = address - reinterpret_cast<uintptr_t>(array->data);
      if (access.is_write) {
        write_shared(fiber, access, *array, offset);
      } else {
        read_shared(fiber, access, *array, offset);
      }
      count_access(fiber, access, address, 0);
    } else if (const int index = find_global(address, access.bytes); index >= 0) {
      check_global(fiber, access, launch->op->buffers[index], address, false);
      count_access(fiber, access, address, 1 + index);
    } else if (address - reinterpret_cast<uintptr_t>(launch->params) >= launch->params_bytes &&
               !is_constant(address)) {
      fail_outside(fiber, access, address);
    }
  }

  // In this module's own image: tables of constants.
  static bool is_constant(uintptr_t address) {
    static const std::pair<uintptr_t, uintptr_t> image = [] {
      std::pair<uintptr_t, uintptr_t> found{0, 0};
      dl_iterate_phdr(
          [](dl_phdr_info* info, size_t, void* data) {
            uintptr_t begin = ~uintptr_t(0), end = 0;
            for (int i = 0; i < info->dlpi_phnum; ++i) {
              const auto& header = info->dlpi_phdr[i];
              if (header.p_type != PT_LOAD) continue;
              begin = std::min(begin, uintptr_t(info->dlpi_addr + header.p_vaddr));
              end = std::max(end, uintptr_t(info->dlpi_addr + header.p_vaddr + header.p_memsz));
            }
            const uintptr_t here = reinterpret_cast<uintptr_t>(&fiber_main);
            if (here < begin || here >= end) return 0;
            *static_cast<std::pair<uintptr_t, uintptr_t>*>(data) = {begin, end};
            return 1;
          },
          &found);
      return found;
    }();
    return address >= image.first && address < image.second;
  }

  // Counting

  void count_access(const Fiber& fiber, const Access& access, uintptr_t address, int space) {
    size_t slot = (reinterpret_cast<uintptr_t>(access.code) * 31 + uintptr_t(space)) % sites.size();
    while (sites[slot].code != nullptr &&
           (sites[slot].code != access.code || sites[slot].space != space)) {
      slot = (slot + 1) % sites.size();
    }
    Site& site = sites[slot];
    if (site.code == nullptr) {
      if (touched_sites.size() + 1 == sites.size()) flush_sites();
      site.code = access.code;
      site.space = space;
      site.bytes = access.bytes;
      site.is_write = access.is_write;
      touched_sites.push_back(&site);
    }
    const uint32_t k = site.count[fiber.lane]++;
    if (k >= site.num_accesses) {
      site.num_accesses = k + 1;
      if (site.accesses.size() < site.num_accesses) site.accesses.resize(site.num_accesses);
    }
    WarpAccess& warp_access = site.accesses[k];
    warp_access.lanes |= fiber.bit();
    warp_access.address[fiber.lane] = address;
  }

  static void clear_site(Site& site) {
    for (size_t k = 0; k < site.num_accesses; ++k) site.accesses[k].lanes = 0;
    site.num_accesses = 0;
    site.count.fill(0);
    site.code = nullptr;
  }

  // The lanes of the running warp have done all accesses up to here.
  void flush_sites() {
    for (Site* site : touched_sites) {
      for (size_t k = 0; k < site->num_accesses; ++k) {
        if (site->space == 0) {
          count_shared(site->accesses[k].address.data(), site->accesses[k].lanes, site->bytes);
        } else {
          count_global(*site, site->accesses[k]);
        }
      }
      clear_site(*site);
    }
    touched_sites.clear();
  }

  void count_shared(const uintptr_t* address, uint32_t lanes, size_t bytes) {
    ++counts.shared_accesses;
    counts.bank_conflicts += conflict_cycles(address, lanes, bytes);
  }

  void count_global(const Site& site, const WarpAccess& access) {
    std::array<uintptr_t, kLanes> begins;
    int num = 0;
    for (uint32_t lanes = access.lanes; lanes != 0; lanes &= lanes - 1) {
      begins[num++] = access.address[std::countr_zero(lanes)];
    }
    if (!std::is_sorted(begins.begin(), begins.begin() + num)) {
      std::sort(begins.begin(), begins.begin() + num);
    }
    GlobalBuffer& global = launch->op->buffers[site.space - 1];
    auto& sectors = site.is_write ? global.stored : global.loaded;
    auto& [loaded, stored] = counts.bytes[site.space - 1];
    int64_t& bytes = site.is_write ? stored : loaded;
    for (int i = 0; i < num;) {
      const uintptr_t begin = begins[i];
      uintptr_t end = begin;
      for (; i < num && begins[i] <= end; ++i) end = begins[i] + site.bytes;
      bytes += int64_t(end - begin);
      global.touch(sectors, begin, end);
    }
  }
};

void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  Fiber& fiber = *running;
  const Launch& launch = *fiber.worker->launch;
  launch.kernel(launch.params);
  fiber.worker->exit(fiber);
}

// ---- The model's state

struct Model {
  std::mutex operator_mutex;
  std::mutex launch_mutex;
  OperatorState* op = nullptr;
  OperatorState no_operator;
  std::vector<std::unique_ptr<Worker>> workers;
  std::vector<LaunchReport> reports;
  size_t num_threads = std::clamp<size_t>(std::thread::hardware_concurrency(), 1, 8);
};

Model& model() {
  static Model& model = *new Model;  // threads may outlive the module's destructors
  return model;
}

// forward_kernel<Half, 64> from the signature of cogview::launch.
std::string kernel_name(std::string_view signature) {
  const std::string_view key = "kKernel = ";
  const size_t found = signature.find(key);
  std::string name(found == signature.npos ? signature : signature.substr(found + key.size()));
  name = name.substr(0, std::min(name.find("; Params"), name.find(", Params")));
  for (const std::string_view part :
       {"&", "cogview::", "{anonymous}::", "(anonymous namespace)::"}) {
    for (size_t at; (at = name.find(part)) != name.npos;) name.erase(at, part.size());
  }
  return name;
}

void add_report(const Launch& launch) {
  LaunchReport report{launch.op->name, launch.kernel_name, launch.grid_x, launch.grid_y,
                      launch.num_threads};
  report.dynamic_shared = launch.shared_bytes;
  for (const GlobalBuffer& global : launch.op->buffers) {
    report.buffers.push_back({global.buffer.name});
  }
  for (const auto& worker : model().workers) {
    if (worker->launch != &launch) continue;
    const Counts& counts = worker->counts;
    report.mma += counts.mma;
    report.barriers += counts.barriers;
    report.shared_accesses += counts.shared_accesses;
    report.bank_conflicts += counts.bank_conflicts;
    int static_shared = 0;
    for (const auto& array : worker->arrays) {
      if (array->key != nullptr) static_shared += int(array->bytes);
    }
    report.static_shared = std::max(report.static_shared, static_shared);
    for (size_t i = 0; i < counts.bytes.size(); ++i) {
      report.buffers[i].bytes_loaded += counts.bytes[i].first;
      report.buffers[i].bytes_stored += counts.bytes[i].second;
    }
  }
  for (size_t i = 0; i < launch.op->buffers.size(); ++i) {
    GlobalBuffer& global = launch.op->buffers[i];
    Traffic& traffic = report.buffers[i];
    for (auto& writer : global.writers) writer = writer != 0 ? kEarlier : 0;
    const auto close = [](std::vector<uint8_t>& touched, std::vector<uint8_t>& before,
                          int64_t& unique, int64_t& operator_unique) {
      for (size_t s = 0; s < touched.size(); ++s) {
        unique += touched[s] * int64_t(kSectorBytes);
        before[s] |= touched[s];
        operator_unique += before[s] * int64_t(kSectorBytes);
        touched[s] = 0;
      }
    };
    close(global.loaded, global.loaded_before, traffic.unique_loaded,
          traffic.operator_unique_loaded);
    close(global.stored, global.stored_before, traffic.unique_stored,
          traffic.operator_unique_stored);
  }
  model().reports.push_back(std::move(report));
}

cudaError_t set_error(const std::string& text) {
  last_error = text;
  return cudaErrorLaunchFailure;
}

}  // namespace

// ---- Launch

cudaError_t launch(std::string_view name, void (*kernel)(const void*), const void* params,
                   size_t params_bytes, int64_t grid_x, int grid_y, int num_threads,
                   int shared_bytes) {
  const std::lock_guard lock(model().launch_mutex);
  OperatorState* op = model().op != nullptr ? model().op : &model().no_operator;
  if (op->status != cudaSuccess) return op->status;
  if (grid_x < 1 || grid_x > INT32_MAX || grid_y < 1 || grid_y > 65535 || num_threads < 1 ||
      num_threads > kMaxThreads || num_threads % kLanes != 0 || shared_bytes < 0 ||
      shared_bytes > max_shared || grid_x * grid_y >= int64_t(kByAtomics)) {
    return op->status = set_error(
               kernel_name(name) +
               format(
                   ": cannot launch %lld x %d blocks of %d threads with %d bytes of shared memory",
                   static_cast<long long>(grid_x), grid_y, num_threads, shared_bytes));
  }
  Launch launch{.kernel_name = kernel_name(name),
                .kernel = kernel,
                .params = params,
                .params_bytes = params_bytes,
                .grid_x = grid_x,
                .grid_y = grid_y,
                .num_threads = num_threads,
                .shared_bytes = shared_bytes,
                .op = op};
  const int64_t num_blocks = grid_x * grid_y;
  const size_t num_workers = size_t(std::min(int64_t(model().num_threads), num_blocks));
  auto& workers = model().workers;
  while (workers.size() < num_workers) workers.push_back(std::make_unique<Worker>());
  const auto work = [&](Worker& worker) {
    worker.prepare(launch);
    for (int64_t block; !launch.failed && (block = launch.next_block++) < num_blocks;) {
      worker.run_block(block);
    }
  };
  std::vector<std::thread> threads;
  for (size_t i = 1; i < num_workers; ++i) threads.emplace_back(work, std::ref(*workers[i]));
  work(*workers[0]);
  for (std::thread& thread : threads) thread.join();
  if (!launch.failed) add_report(launch);
  for (auto& worker : workers) worker->launch = nullptr;
  if (!launch.failed) return cudaSuccess;
  const cudaError_t status = set_error(launch.error);
  if (model().op != nullptr) model().op->status = status;
  return status;
}

Operator::Operator(const char* name, std::vector<Buffer> buffers) {
  model().operator_mutex.lock();
  auto* state = new OperatorState{name, {}};
  for (const Buffer& buffer : buffers) {
    if (buffer.data != nullptr && buffer.bytes > 0) state->buffers.emplace_back(buffer);
  }
  model().op = state;
}

Operator::~Operator() {
  delete model().op;
  model().op = nullptr;
  model().operator_mutex.unlock();
}

cudaError_t Operator::finish() {
  OperatorState& state = *model().op;
  if (state.status != cudaSuccess || !kSeesPlainAccesses) return state.status;
  for (const GlobalBuffer& global : state.buffers) {
    if (!global.buffer.must_write) continue;
    const auto missing = std::find(global.writers.begin(), global.writers.end(), 0u);
    if (missing == global.writers.end()) continue;
    return state.status = set_error(
               format("%s: %s+%zu was never written (the buffer has %zu bytes)", state.name.c_str(),
                      global.buffer.name, size_t(missing - global.writers.begin()) * 2,
                      size_t(global.buffer.bytes)));
  }
  return cudaSuccess;
}

std::vector<LaunchReport> take_report() {
  const std::lock_guard lock(model().launch_mutex);
  return std::exchange(model().reports, {});
}

int max_shared_bytes() { return max_shared; }

void set_max_shared_bytes(int bytes) { max_shared = bytes; }

void set_num_threads(int num_threads) {
  const std::lock_guard lock(model().launch_mutex);
  model().num_threads = size_t(std::max(num_threads, 1));
}

// ---- Primitives

#define ACCESS(verb, bytes, is_write) \
  Access { verb, bytes, __func__, &where, __builtin_return_address(0), is_write }

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

uint32_t shfl(const char* primitive, uint32_t value, int source_lane, Where where) {
  Fiber& fiber = *running;
  Warp& warp = *fiber.warp;
  if (source_lane < 0 || source_lane >= kLanes) {
    fiber.worker->fail(fiber,
                       place(primitive, where) + format(": there is no lane %d", source_lane));
  }
  warp.value[fiber.lane] = value;
  warp.lane_argument[fiber.lane] = source_lane;
  fiber.worker->collective(fiber, primitive, where, [](Warp& warp) {
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

void bar_warp_sync(Where where) {
  Worker& worker = *running->worker;
  worker.collective(*running, "bar_warp_sync", where,
                    [&worker](Warp& warp) { warp.base = ++worker.now; });
}

void bar_sync(Where where) { running->worker->barrier(*running, where); }

void* shared_array(const void* key, int bytes) {
  return running->worker->shared_array(*running, key, bytes);
}

unsigned char* dynamic_shared() {
  Worker& worker = *running->worker;
  if (worker.launch->shared_bytes == 0) return nullptr;
  return reinterpret_cast<unsigned char*>(worker.arrays[0]->data);
}

uint4 ld_shared_v4(const void* address, Where where) {
  const Access access = ACCESS("read", 16, false);
  Fiber& fiber = *running;
  Worker& worker = *fiber.worker;
  SharedArray& array = worker.shared_operand(fiber, access, address);
  worker.read_shared(fiber, access, array, size_t(static_cast<const char*>(address) - array.data));
  worker.count_access(fiber, access, reinterpret_cast<uintptr_t>(address), 0);
  return *static_cast<const uint4*>(address);
}

void st_shared_v4(void* address, uint4 value, Where where) {
  const Access access = ACCESS("write", 16, true);
  Fiber& fiber = *running;
  Worker& worker = *fiber.worker;
  SharedArray& array = worker.shared_operand(fiber, access, address);
  worker.write_shared(fiber, access, array, size_t(static_cast<char*>(address) - array.data));
  worker.count_access(fiber, access, reinterpret_cast<uintptr_t>(address), 0);
  *static_cast<uint4*>(address) = value;
}

uint4 ld_global_v4(const void* address, Where where) {
  const Access access = ACCESS("read", 16, false);
  Worker& worker = *running->worker;
  worker.check_aligned(*running, access, reinterpret_cast<uintptr_t>(address));
  worker.access_global(*running, access, address);
  return *static_cast<const uint4*>(address);
}

void st_global_v4(void* address, uint4 value, Where where) {
  const Access access = ACCESS("write", 16, true);
  Worker& worker = *running->worker;
  worker.check_aligned(*running, access, reinterpret_cast<uintptr_t>(address));
  worker.access_global(*running, access, address);
  *static_cast<uint4*>(address) = value;
}

void red_global_max(uint32_t* address, uint32_t value, Where where) {
  const Access access = ACCESS("write", 4, true);
  Worker& worker = *running->worker;
  worker.check_aligned(*running, access, reinterpret_cast<uintptr_t>(address));
  worker.access_global(*running, access, address, true);
  std::atomic_ref<uint32_t> largest(*address);
  uint32_t seen = largest.load();
  while (seen < value && !largest.compare_exchange_weak(seen, value)) {
  }
}

void cp_async(void* shared, const void* global, int bytes, bool valid, Where where) {
  Fiber& fiber = *running;
  Worker& worker = *fiber.worker;
  const Access write = ACCESS("write", size_t(bytes), true);
  SharedArray& array = worker.shared_operand(fiber, write, shared);
  const size_t offset = size_t(static_cast<char*>(shared) - array.data);
  worker.write_shared(fiber, write, array, offset, kPending);
  worker.count_access(fiber, write, reinterpret_cast<uintptr_t>(shared), 0);
  const Access read = ACCESS("read", size_t(bytes), false);
  worker.check_aligned(fiber, read, reinterpret_cast<uintptr_t>(global));
  if (valid) worker.access_global(fiber, read, global);
  fiber.copies.push_back({&array, offset, valid ? global : nullptr, bytes});
}

void cp_async_commit_group() {
  Fiber& fiber = *running;
  size_t committed = 0;
  for (const size_t size : fiber.groups) committed += size;
  fiber.groups.push_back(fiber.copies.size() - committed);
}

// The copies are done here, as late as the program allows.
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

Registers4 ldmatrix(const void* row, bool transposed, Where where) {
  Fiber& fiber = *running;
  Worker& worker = *fiber.worker;
  const char* primitive = transposed ? "ldmatrix_x4_trans" : "ldmatrix_x4";
  fiber.warp->row[fiber.lane] = row;
  worker.collective(fiber, primitive, where, [&](Warp& warp) {
    const Access access{"read", 16, primitive, &where, nullptr, false};
    uint16_t elements[kLanes][8];
    std::array<uintptr_t, kLanes> addresses;
    for (int lane = 0; lane < kLanes; ++lane) {
      const Fiber& owner = warp.fibers[lane];
      SharedArray& array = worker.shared_operand(owner, access, warp.row[lane]);
      addresses[lane] = reinterpret_cast<uintptr_t>(warp.row[lane]);
      worker.read_shared(owner, access, array,
                         addresses[lane] - reinterpret_cast<uintptr_t>(array.data));
      std::memcpy(elements[lane], warp.row[lane], 16);
    }
    worker.counts.shared_accesses += 4;
    worker.counts.bank_conflicts += conflict_cycles(addresses.data(), kAllLanes, 16);
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

Float4 mma(Element element, Float4 c, Registers4 a, uint64_t b, Where where) {
  Fiber& fiber = *running;
  Warp& warp = *fiber.warp;
  warp.c[fiber.lane] = c;
  warp.a[fiber.lane] = a;
  warp.b[fiber.lane] = b;
  fiber.worker->collective(fiber, "mma_m16n8k16", where, [&](Warp& warp) {
    ++fiber.worker->counts.mma;
    if (element == Element::kHalf) {
      multiply<cogview::Half>(warp);
    } else {
      multiply<cogview::BFloat16>(warp);
    }
  });
  return warp.c[fiber.lane];
}

}  // namespace host_model

const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorLaunchFailure:
      break;
  }
  return host_model::last_error.c_str();
}

// ---- The compiler's hooks

#ifndef __SANITIZE_ADDRESS__
namespace host_model {
namespace {

inline void plain_access(void* address, size_t bytes, bool is_write, bool aligned,
                         const void* code) {
  Fiber* fiber = running;
  if (fiber == nullptr) return;  // code of the host
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  if (begin - reinterpret_cast<uintptr_t>(fiber->context.stack) < kStackBytes) return;
  const Access access{is_write ? "write" : "read", bytes, nullptr, nullptr, code, is_write};
  if (aligned) fiber->worker->check_aligned(*fiber, access, begin);
  fiber->worker->access_plain(*fiber, access, begin);
}

}  // namespace
}  // namespace host_model

#define HOOK __attribute__((visibility("hidden"), noinline)) void
#define HOOKS(bytes)                                                                     \
  HOOK __tsan_read##bytes(void* address) {                                               \
    host_model::plain_access(address, bytes, false, true, __builtin_return_address(0));  \
  }                                                                                      \
  HOOK __tsan_write##bytes(void* address) {                                              \
    host_model::plain_access(address, bytes, true, true, __builtin_return_address(0));   \
  }                                                                                      \
  HOOK __tsan_unaligned_read##bytes(void* address) {                                     \
    host_model::plain_access(address, bytes, false, false, __builtin_return_address(0)); \
  }                                                                                      \
  HOOK __tsan_unaligned_write##bytes(void* address) {                                    \
    host_model::plain_access(address, bytes, true, false, __builtin_return_address(0));  \
  }                                                                                      \
  HOOK __tsan_volatile_read##bytes(void* address) {                                      \
    host_model::plain_access(address, bytes, false, true, __builtin_return_address(0));  \
  }                                                                                      \
  HOOK __tsan_volatile_write##bytes(void* address) {                                     \
    host_model::plain_access(address, bytes, true, true, __builtin_return_address(0));   \
  }

extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
HOOK __tsan_read_range(void* address, size_t bytes) {
  host_model::plain_access(address, bytes, false, false, __builtin_return_address(0));
}
HOOK __tsan_write_range(void* address, size_t bytes) {
  host_model::plain_access(address, bytes, true, false, __builtin_return_address(0));
}
HOOK __tsan_init() {}
HOOK __tsan_func_entry(void*) {}
HOOK __tsan_func_exit() {}
}
#endif
