#include "fibers.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string_view>
#include <thread>
#include <utility>

#include "report.h"

#ifdef __SANITIZE_ADDRESS__
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace host_model {

constinit thread_local Fiber* running = nullptr;

namespace {

constexpr size_t kPageBytes = 4096;

thread_local std::string last_error;

// Contexts

#ifdef __x86_64__
// Pushes the registers that a callee must keep onto the stack that it leaves. swapcontext would do,
// but it asks the kernel for the signal mask each time.
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

// `entry` begins on the context's stack and never returns. The stacks of a warp start at different
// offsets in their pages: otherwise their hot lines would meet in the same sets of the cache.
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

void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  Fiber& fiber = *running;
  const Launch& launch = *fiber.worker->launch;
  launch.kernel(launch.params);
  fiber.worker->exit(fiber);
}

}  // namespace

// Texts of errors

std::string format(const char* pattern, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, pattern);
  vsnprintf(text, sizeof(text), pattern, arguments);
  va_end(arguments);
  return text;
}

std::string place(const char* instruction, const Where& where) {
  const char* slash = std::strrchr(where.file_name(), '/');
  return format("%s (%s:%u)", instruction, slash != nullptr ? slash + 1 : where.file_name(),
                unsigned(where.line()));
}

bool same_place(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

cudaError_t set_error(const std::string& text) {
  last_error = text;
  return cudaErrorLaunchFailure;
}

// Workers

Worker::~Worker() {
  if (stacks_ != nullptr) munmap(stacks_, stacks_bytes_);
}

void Worker::prepare(Launch& new_launch) {
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
  counters.start(launch->op->buffers);
#ifdef __SANITIZE_ADDRESS__
  pthread_attr_t attributes;
  pthread_getattr_np(pthread_self(), &attributes);
  void* stack;
  pthread_attr_getstack(&attributes, &stack, &scheduler.stack_bytes);
  pthread_attr_destroy(&attributes);
  scheduler.stack = static_cast<char*>(stack);
#endif
}

void Worker::make_fibers(size_t num_threads) {
  if (stacks_ != nullptr) munmap(stacks_, stacks_bytes_);
  const size_t step = kStackBytes + kPageBytes;  // a guard page below each stack
  stacks_bytes_ = num_threads * step;
  stacks_ = static_cast<char*>(
      mmap(nullptr, stacks_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (stacks_ == MAP_FAILED) std::abort();
  fibers = std::vector<Fiber>(num_threads);
  warps = std::vector<Warp>(num_threads / kLanes);
  for (size_t thread = 0; thread < num_threads; ++thread) {
    Fiber& fiber = fibers[thread];
    fiber.context.stack = stacks_ + thread * step + kPageBytes;
    fiber.context.stack_bytes = kStackBytes;
    mprotect(fiber.context.stack, kStackBytes, PROT_READ | PROT_WRITE);
    fiber.worker = this;
    fiber.thread = unsigned(thread);
    fiber.lane = unsigned(thread % kLanes);
    fiber.warp = &warps[thread / kLanes];
    if (fiber.lane == 0) fiber.warp->fibers = &fiber;
  }
}

void Worker::run_block(int64_t new_block) {
  block = new_block;
  num_exited_ = num_at_barrier_ = 0;
  barriers_of_warps_ = {};
  block_start = block_base = ++now;
  for (auto& array : arrays) std::memset(array->data, 0xff, array->bytes);
#ifdef __SANITIZE_ADDRESS__
  // Fibers never return on their stacks, so that their frames leave memory poisoned.
  __asan_unpoison_memory_region(stacks_, stacks_bytes_);
#endif
  abandoned_ = false;
  for (int w = 0; w < num_warps(); ++w) {
    warps[w].runnable = kAllLanes;
    warps[w].arrived = warps[w].exited = warps[w].ballot = 0;
    warps[w].known.fill(now);
  }
  for (int thread = 0; thread < launch->num_threads; ++thread) {
    Fiber& fiber = fibers[thread];
    fiber.waited_for_grids = false;
    fiber.copies.clear();
    fiber.groups.clear();
    prepare_context(fiber.context, int(fiber.lane), fiber_main);
  }
  running = &fibers[0];
  switch_context(scheduler, running->context);
  running = nullptr;
  if (!abandoned_ && num_exited_ < launch->num_threads) report_deadlock();
  if (abandoned_) counters.drop();
}

// Hand over to another fiber, or to the scheduler where all wait or have returned.
void Worker::leave(Fiber& fiber) {
  Warp& warp = *fiber.warp;
  Fiber* next = nullptr;
  if (warp.runnable != 0) {
    const uint32_t later = warp.runnable & ~((fiber.bit() << 1) - 1);
    next = &warp.fibers[std::countr_zero(later != 0 ? later : warp.runnable)];
  } else {
    counters.flush();
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

void Worker::wait(Fiber& fiber, const char* instruction, const Where& where) {
  fiber.instruction = instruction;
  fiber.where = where;
  fiber.warp->runnable &= ~fiber.bit();
  leave(fiber);
  fiber.instruction = nullptr;
}

void Worker::exit(Fiber& fiber) {
  Warp& warp = *fiber.warp;
  if (launch->starts_early && !fiber.waited_for_grids) {
    fail(fiber, "returned without griddepcontrol_wait, though the kernel starts early");
  }
  if (warp.arrived != 0) {
    const Fiber& other = warp.fibers[std::countr_zero(warp.arrived)];
    fail(fiber, format("returned, and thread %u waits for the whole warp at ", other.thread) +
                    place(other.instruction, other.where));
  }
  warp.exited |= fiber.bit();
  warp.runnable &= ~fiber.bit();
  ++num_exited_;
  if (num_at_barrier_ != 0) fail_at_barrier(fiber);
  leave(fiber);
  std::abort();
}

// Errors

void Worker::record(const Fiber& fiber, const std::string& text) {
  const std::lock_guard lock(launch->mutex);
  if (launch->failed.exchange(true)) return;
  launch->error = format("%s, block (%lld, %lld), thread %u: ", launch->kernel_name.c_str(),
                         static_cast<long long>(block % launch->grid_x),
                         static_cast<long long>(block / launch->grid_x), fiber.thread) +
                  text;
}

// Ends the block: back to the scheduler for good.
void Worker::abandon() {
  abandoned_ = true;
  Context nowhere;
  switch_context(nowhere, scheduler);
  std::abort();
}

void Worker::fail(const Fiber& fiber, const std::string& text) {
  record(fiber, text);
  abandon();
}

void Worker::fail_at_barrier(const Fiber& returned) {
  fail(fibers[barrier_first_], "divergent barrier: " + place("bar_sync", barrier_where_) +
                                   format(", but thread %u has returned", returned.thread));
}

// No fiber can go on: some lanes wait for the rest of their warp, which waits at a barrier; or some
// warps wait for others, which wait elsewhere or have returned.
void Worker::report_deadlock() {
  abandoned_ = true;
  for (int w = 0; w < num_warps(); ++w) {
    Warp& warp = warps[w];
    if (warp.arrived == 0) continue;
    const Fiber& arrived = warp.fibers[std::countr_zero(warp.arrived)];
    const Fiber& missing = warp.fibers[std::countr_one(warp.arrived)];
    record(arrived, "divergent warp: waits at " + place(arrived.instruction, arrived.where) +
                        format(", but thread %u waits at ", missing.thread) +
                        place(missing.instruction, missing.where));
    return;
  }
  for (int id = 1; id < kBarriers; ++id) {
    const BarrierOfWarps& barrier = barriers_of_warps_[id];
    if (barrier.warps == 0) continue;
    // Of the warps that do not wait here, one that waits elsewhere tells more than one that returned.
    const Warp* other = nullptr;
    for (int w = 0; w < num_warps(); ++w) {
      if ((barrier.warps >> w & 1) != 0) continue;
      if (other == nullptr || other->exited != 0) other = &warps[w];
    }
    const Fiber& missing = *other->fibers;
    record(
        *barrier.first,
        "divergent barrier: " + place(barrier.first->instruction, barrier.first->where) +
            format(": %d of %d threads wait at barrier %d, but thread %u ",
                   std::popcount(barrier.warps) * kLanes, barrier.num_threads, id, missing.thread) +
            (other->exited != 0 ? "has returned"
                                : "waits at " + place(missing.instruction, missing.where)));
    return;
  }
}

// Collectives

void Worker::check_arrival(const Fiber& fiber, const char* instruction, const Where& where) {
  const Warp& warp = *fiber.warp;
  if (warp.exited != 0) {
    fail(fiber,
         place(instruction, where) + format(": thread %u of the warp has returned",
                                            warp.fibers[std::countr_zero(warp.exited)].thread));
  }
  const Fiber& other = warp.fibers[std::countr_zero(warp.arrived)];
  if (other.instruction != instruction || !same_place(other.where, where)) {
    fail(fiber, "divergent warp: at " + place(instruction, where) +
                    format(", but thread %u waits at ", other.thread) +
                    place(other.instruction, other.where));
  }
}

void Worker::barrier(Fiber& fiber, const Where& where) {
  if (num_exited_ != 0) {
    for (int thread = 0; thread < launch->num_threads; ++thread) {
      if ((fibers[thread].warp->exited & fibers[thread].bit()) == 0) continue;
      fail(fiber, "divergent barrier: " + place("bar_sync", where) +
                      format(", but thread %d has returned", thread));
    }
  }
  if (num_at_barrier_ == 0) {
    barrier_where_ = where;
    barrier_first_ = fiber.thread;
  } else if (!same_place(barrier_where_, where)) {
    fail(fiber, "divergent barrier: " + place("bar_sync", where) +
                    format(", but thread %u waits at ", barrier_first_) +
                    place("bar_sync", barrier_where_));
  }
  if (++num_at_barrier_ < launch->num_threads) return wait(fiber, "bar_sync", where);
  counters.flush();
  ++counters.barriers;
  num_at_barrier_ = 0;
  block_base = ++now;
  for (int w = 0; w < num_warps(); ++w) warps[w].runnable = kAllLanes;
}

void Worker::check_arrival_of_warp(const Fiber& fiber, int id, int num_threads,
                                   const Where& where) {
  const BarrierOfWarps& barrier = barriers_of_warps_[id];
  if (barrier.warps != 0 &&
      (num_threads != barrier.num_threads || !same_place(where, barrier.first->where))) {
    fail(fiber, "divergent barrier: " + place("bar_sync", where) +
                    format(" for %d threads at barrier %d, but thread %u waits at ", num_threads,
                           id, barrier.first->thread) +
                    place("bar_sync", barrier.first->where) +
                    format(" for %d", barrier.num_threads));
  }
  // A warp must know of the last meeting here. Otherwise it might have come earlier and have met some
  // of those warps.
  if (barrier.last_time <= block_base) return;
  const auto& known = fiber.warp->known;
  for (uint32_t warps = barrier.last_warps; warps != 0; warps &= warps - 1) {
    if (known[size_t(std::countr_zero(warps))] >= barrier.last_time) return;
  }
  fail(fiber, "divergent barrier: " + place("bar_sync", where) +
                  format(": warp %u and others met at barrier %d, with no barrier between",
                         unsigned(std::countr_zero(barrier.last_warps)), id));
}

void Worker::barrier_of_warps(Fiber& fiber, int id, int num_threads, const Where& where) {
  const char* const instruction = "bar_sync";
  if (id < 1 || id >= kBarriers) {
    fail(fiber, place(instruction, where) + format(": there is no barrier %d for warps", id));
  }
  if (num_threads < kLanes || num_threads % kLanes != 0 || num_threads > launch->num_threads) {
    fail(fiber, place(instruction, where) +
                    format(": %d threads cannot be whole warps of the block, which has %d threads",
                           num_threads, launch->num_threads));
  }
  Warp& warp = *fiber.warp;
  if (warp.exited != 0 || warp.arrived != 0) check_arrival(fiber, instruction, where);
  const int operands = num_threads * kBarriers + id;
  if (warp.arrived != 0 && warp.lane_argument[std::countr_zero(warp.arrived)] != operands) {
    fail(fiber, "divergent warp: " + place(instruction, where) +
                    format(": thread %u gave other numbers",
                           warp.fibers[std::countr_zero(warp.arrived)].thread));
  }
  warp.lane_argument[fiber.lane] = operands;
  warp.arrived |= fiber.bit();
  if (warp.arrived != kAllLanes) return wait(fiber, instruction, where);
  warp.arrived = 0;
  check_arrival_of_warp(fiber, id, num_threads, where);
  BarrierOfWarps& barrier = barriers_of_warps_[id];
  if (barrier.warps == 0) {
    barrier.num_threads = num_threads;
    barrier.first = warp.fibers;
  }
  barrier.warps |= 1u << warp.index();
  if (std::popcount(barrier.warps) * kLanes < num_threads) return wait(fiber, instruction, where);
  counters.flush();
  ++counters.barriers;
  const uint32_t met = barrier.last_warps = std::exchange(barrier.warps, 0);
  barrier.last_time = ++now;
  // Each learns what all of them knew, and what they did.
  std::array<uint32_t, kMaxWarps> known{};
  for (int w = 0; w < num_warps(); ++w) {
    if ((met >> w & 1) == 0) continue;
    for (int v = 0; v < num_warps(); ++v) known[v] = std::max(known[v], warps[w].known[v]);
  }
  for (int w = 0; w < num_warps(); ++w) {
    if ((met >> w & 1) != 0) known[w] = now;
  }
  for (int w = 0; w < num_warps(); ++w) {
    if ((met >> w & 1) == 0) continue;
    warps[w].known = known;
    warps[w].runnable = kAllLanes;
  }
}

// Launches

namespace {

std::atomic<int> block_shared_bytes{227 * 1024};

struct Workers {
  std::mutex mutex;  // one launch at a time
  std::vector<std::unique_ptr<Worker>> list;
  size_t num_threads = std::clamp<size_t>(std::thread::hardware_concurrency(), 1, 8);
};

Workers& workers() {
  static Workers& workers = *new Workers;  // threads may outlive the module's destructors
  return workers;
}

// sm80::forward_kernel<Half, 64> from the signature of cogview::launch.
std::string kernel_name(std::string_view signature) {
  const std::string_view key = "kKernel = ";
  const size_t found = signature.find(key);
  std::string name(found == signature.npos ? signature : signature.substr(found + key.size()));
  name = name.substr(0, std::min(name.find("; "), name.find(", kStart")));
  for (const std::string_view part :
       {"&", "cogview::", "{anonymous}::", "(anonymous namespace)::"}) {
    for (size_t at; (at = name.find(part)) != name.npos;) name.erase(at, part.size());
  }
  return name;
}

std::atomic<bool> recording{false};
std::mutex recorded_mutex;
std::vector<RecordedLaunch> recorded;

}  // namespace

void record_launches(bool record) { recording = record; }

bool launches_recorded() { return recording; }

std::vector<RecordedLaunch> take_recorded_launches() {
  const std::lock_guard lock(recorded_mutex);
  return std::exchange(recorded, {});
}

cudaError_t launch(std::string_view name, void (*kernel)(const void*), const void* params,
                   size_t params_bytes, int64_t grid_x, int grid_y, int num_threads,
                   int shared_bytes, bool starts_early) {
  if (launches_recorded()) {
    const std::lock_guard lock(recorded_mutex);
    recorded.push_back({kernel_name(name),
                        {static_cast<const char*>(params), params_bytes},
                        grid_x,
                        grid_y,
                        num_threads,
                        shared_bytes});
    return cudaSuccess;
  }
  const std::lock_guard lock(workers().mutex);
  OperatorState& op = current_operator();
  if (op.status != cudaSuccess) return op.status;
  if (grid_x < 1 || grid_x > INT32_MAX || grid_y < 1 || grid_y > 65535 || num_threads < 1 ||
      num_threads > kMaxThreads || num_threads % kLanes != 0 || shared_bytes < 0 ||
      shared_bytes > max_shared_bytes() || grid_x * grid_y >= int64_t(kByAtomics)) {
    return op.status = set_error(
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
                .starts_early = starts_early,
                .op = &op};
  const int64_t num_blocks = grid_x * grid_y;
  const size_t num_workers = size_t(std::min(int64_t(workers().num_threads), num_blocks));
  auto& list = workers().list;
  while (list.size() < num_workers) list.push_back(std::make_unique<Worker>());
  const auto work = [&](Worker& worker) {
    worker.prepare(launch);
    for (int64_t block; !launch.failed && (block = launch.next_block++) < num_blocks;) {
      worker.run_block(block);
    }
  };
  std::vector<std::thread> threads;
  for (size_t i = 1; i < num_workers; ++i) threads.emplace_back(work, std::ref(*list[i]));
  work(*list[0]);
  for (std::thread& thread : threads) thread.join();
  if (!launch.failed) {
    add_report(launch, list);
    op.end_launch();
  }
  for (auto& worker : list) worker->launch = nullptr;
  return launch.failed ? op.status = set_error(launch.error) : cudaSuccess;
}

int max_shared_bytes() { return block_shared_bytes; }

void set_max_shared_bytes(int bytes) { block_shared_bytes = bytes; }

void set_num_threads(int num_threads) {
  const std::lock_guard lock(workers().mutex);
  workers().num_threads = size_t(std::max(num_threads, 1));
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
