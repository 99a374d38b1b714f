#include "memory.h"

#include <link.h>

#include <algorithm>
#include <bit>
#include <mutex>
#include <utility>

#include "fibers.h"

namespace host_model {
namespace {

constexpr size_t kGapBytes =        // around shared memory, so that nothing lies next to it
    kSeesPlainAccesses ? 4096 : 0;  // AddressSanitizer guards what malloc returns

// Texts of errors

// Where the compiled access lies, for addr2line.
std::string code_text(const Access& access) {
  if (access.instruction != nullptr) return "";
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

[[noreturn]] void fail(const Fiber& fiber, const Access& access, const std::string& text) {
  fiber.worker->fail(fiber, text + code_text(access));
}

[[noreturn]] void fail_race(const Fiber& fiber, const Access& access, const SharedArray& array,
                            size_t offset, const std::string& other) {
  fail(fiber, access,
       format("race: %s at %s+%zu, ", access.text().c_str(), array.name().c_str(), offset) + other +
           " with no barrier between");
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
  for (auto& array : fiber.worker->arrays) {
    consider(array->name(), reinterpret_cast<uintptr_t>(array->data), array->bytes);
  }
  for (auto& global : fiber.worker->launch->op->buffers) {
    consider(global.buffer.name, global.begin, global.end - global.begin);
  }
  fail(
      fiber, access,
      "out of bounds: " + access.text() +
          (nearest.empty() ? format(" at 0x%zx, outside every tensor", size_t(address)) : nearest));
}

std::string reader_text(const Cell& cell) {
  if (cell.reader != kManyThreads) return format("which thread %u read", unsigned(cell.reader));
  if (!std::has_single_bit(cell.reading_warps)) return "which threads of several warps read";
  return format("which several threads of warp %d read", std::countr_zero(cell.reading_warps));
}

// Shared memory

bool happened_before(unsigned thread, uint32_t time, const Fiber& fiber) {
  return thread == fiber.thread || time < fiber.worker->block_base ||
         time < fiber.warp->known[thread / kLanes];
}

bool reads_happened_before(const Cell& cell, const Fiber& fiber) {
  if (cell.read_time < fiber.worker->block_base) return true;
  if (cell.reader != kManyThreads) return happened_before(cell.reader, cell.read_time, fiber);
  for (uint32_t warps = cell.reading_warps; warps != 0; warps &= warps - 1) {
    if (cell.read_time >= fiber.warp->known[size_t(std::countr_zero(warps))]) return false;
  }
  return true;
}

void check_written(const Fiber& fiber, const Access& access, const SharedArray& array,
                   size_t index) {
  const Cell& cell = array.cells[index];
  if (cell.write_time < fiber.worker->block_start) return;
  if ((cell.writer & kPending) != 0) {
    fail(
        fiber, access,
        access.text() + format(" at %s+%zu before the cp.async of thread %u was waited for",
                               array.name().c_str(), 2 * index, unsigned(cell.writer & ~kPending)));
  }
  if (!happened_before(cell.writer, cell.write_time, fiber)) {
    fail_race(fiber, access, array, 2 * index,
              format("which thread %u wrote", unsigned(cell.writer)));
  }
}

SharedArray* find_shared(const Worker& worker, uintptr_t address, size_t bytes) {
  for (auto& array : worker.arrays) {
    const uintptr_t offset = address - reinterpret_cast<uintptr_t>(array->data);
    if (offset < array->bytes && array->bytes - offset >= bytes) return array.get();
  }
  return nullptr;
}

// Global memory

int find_global(const Worker& worker, uintptr_t address, size_t bytes) {
  const auto& buffers = worker.launch->op->buffers;
  for (size_t i = 0; i < buffers.size(); ++i) {
    if (address >= buffers[i].begin && address < buffers[i].end &&
        buffers[i].end - address >= bytes) {
      return int(i);
    }
  }
  return -1;
}

void check_global(const Fiber& fiber, const Access& access, GlobalBuffer& global, uintptr_t address,
                  bool atomic) {
  const char* name = global.buffer.name;
  const size_t offset = address - global.begin;
  if (fiber.worker->launch->starts_early && !fiber.waited_for_grids) {
    fail(fiber, access,
         access.text() + format(" at %s+%zu before griddepcontrol_wait", name, offset));
  }
  if (access.is_write && !global.buffer.writable) {
    fail(fiber, access, access.text() + format(" at %s+%zu, which is an input", name, offset));
  }
  if (global.writers.empty()) return;
  const uint32_t own = atomic ? kByAtomics : uint32_t(fiber.worker->block) + 1;
  for (size_t index = offset / 2; index <= (offset + access.bytes - 1) / 2; ++index) {
    std::atomic_ref<uint32_t> cell(global.writers[index]);
    const uint32_t writer = access.is_write ? cell.exchange(own, std::memory_order_relaxed)
                                            : cell.load(std::memory_order_relaxed);
    if (writer == own || writer == kEarlier) continue;
    if (writer == 0) {
      if (!kSeesPlainAccesses || access.is_write || !global.buffer.must_write) continue;
      fail(fiber, access,
           access.text() + format(" at %s+%zu, which nobody has written", name, 2 * index));
    }
    const int64_t grid_x = fiber.worker->launch->grid_x;
    const std::string other =
        writer == kByAtomics
            ? "an atomic instruction"
            : format("block (%lld, %lld)", static_cast<long long>((writer - 1) % grid_x),
                     static_cast<long long>((writer - 1) / grid_x));
    fail(fiber, access,
         access.text() + format(" at %s+%zu, which %s wrote in the same launch", name, 2 * index,
                                other.c_str()));
  }
}

void count(const Fiber& fiber, const Access& access, uintptr_t address, int space) {
  fiber.worker->counters.count_access(fiber.lane, access.code, access.bytes, access.is_write,
                                      address, space);
}

// Plain accesses

// Whether an address lies in this module's own image, where tables of constants lie.
bool is_constant(uintptr_t address) {
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
          const uintptr_t here = reinterpret_cast<uintptr_t>(&is_constant);
          if (here < begin || here >= end) return 0;
          *static_cast<std::pair<uintptr_t, uintptr_t>*>(data) = {begin, end};
          return 1;
        },
        &found);
    return found;
  }();
  return address >= image.first && address < image.second;
}

[[maybe_unused]] void access_plain(const Fiber& fiber, const Access& access, uintptr_t address) {
  const Worker& worker = *fiber.worker;
  if (SharedArray* array = find_shared(worker, address, access.bytes)) {
    const size_t offset = address - reinterpret_cast<uintptr_t>(array->data);
    if (access.is_write) {
      write_shared(fiber, access, *array, offset);
    } else {
      read_shared(fiber, access, *array, offset);
    }
    count(fiber, access, address, 0);
  } else if (const int index = find_global(worker, address, access.bytes); index >= 0) {
    check_global(fiber, access, worker.launch->op->buffers[index], address, false);
    count(fiber, access, address, 1 + index);
  } else if (address - reinterpret_cast<uintptr_t>(worker.launch->params) >=
                 worker.launch->params_bytes &&
             !is_constant(address)) {
    fail_outside(fiber, access, address);
  }
}

}  // namespace

SharedArray::SharedArray(const void* key, size_t bytes)
    : key(key), bytes(bytes), cells((bytes + 1) / 2) {
  void* address = nullptr;
  if (posix_memalign(&address, 128, bytes + 2 * kGapBytes) != 0) std::abort();
  memory.reset(static_cast<char*>(address));
  data = memory.get() + kGapBytes;
}

GlobalBuffer::GlobalBuffer(const Buffer& given) : buffer(given) {
  buffer.writable |= buffer.must_write;
  begin = reinterpret_cast<uintptr_t>(given.data);
  end = begin + uintptr_t(given.bytes);
  if (buffer.writable) writers.resize(size_t(given.bytes + 1) / 2);
  const size_t sectors = (end - 1) / kSectorBytes - begin / kSectorBytes + 1;
  for (auto* touched : {&loaded, &stored, &loaded_before, &stored_before}) touched->resize(sectors);
}

std::string Access::text() const {
  if (instruction != nullptr) return place(instruction, *where) + ": " + verb;
  return format("%s of %zu bytes", verb, bytes);
}

void* array_of_block(Fiber& fiber, const void* key, int bytes) {
  auto& arrays = fiber.worker->arrays;
  for (auto& array : arrays) {
    if (array->key == key) return array->data;
  }
  arrays.push_back(std::make_unique<SharedArray>(key, size_t(bytes)));
  size_t total = 0;
  for (auto& array : arrays) total += array->key != nullptr ? array->bytes : 0;
  if (total > 48 * 1024) fiber.worker->fail(fiber, "more than 48 KB of shared arrays");
  std::memset(arrays.back()->data, 0xff, size_t(bytes));
  return arrays.back()->data;
}

void check_aligned(const Fiber& fiber, const Access& access, uintptr_t address) {
  if (address % access.bytes == 0) return;
  fail(fiber, access,
       "misaligned: " + access.text() +
           format(" at an address that is %zu more than a multiple of %zu",
                  size_t(address % access.bytes), access.bytes));
}

SharedArray& shared_operand(const Fiber& fiber, const Access& access, const void* pointer) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  check_aligned(fiber, access, address);
  SharedArray* array = find_shared(*fiber.worker, address, access.bytes);
  if (array == nullptr) fail_outside(fiber, access, address);
  return *array;
}

void read_shared(const Fiber& fiber, const Access& access, SharedArray& array, size_t offset) {
  const uint32_t block_start = fiber.worker->block_start, now = fiber.worker->now;
  const size_t last = (offset + access.bytes - 1) / 2;
  for (size_t index = offset / 2; index <= last; ++index) {
    Cell& cell = array.cells[index];
    if (kSeesPlainAccesses && cell.write_time < block_start) {
      fail(fiber, access,
           access.text() +
               format(" at %s+%zu, which nobody has written", array.name().c_str(), 2 * index));
    }
    check_written(fiber, access, array, index);
    const uint32_t warp = 1u << fiber.thread / kLanes;
    if (cell.read_time < block_start || reads_happened_before(cell, fiber)) {
      cell.reader = uint16_t(fiber.thread);
      cell.reading_warps = warp;
    } else if (cell.reader != fiber.thread) {
      cell.reader = kManyThreads;
      cell.reading_warps |= warp;
    }
    cell.read_time = now;
  }
}

void write_shared(const Fiber& fiber, const Access& access, SharedArray& array, size_t offset,
                  uint16_t flag) {
  const uint32_t block_start = fiber.worker->block_start, now = fiber.worker->now;
  const size_t last = (offset + access.bytes - 1) / 2;
  for (size_t index = offset / 2; index <= last; ++index) {
    Cell& cell = array.cells[index];
    check_written(fiber, access, array, index);
    if (cell.read_time >= block_start && !reads_happened_before(cell, fiber)) {
      fail_race(fiber, access, array, 2 * index, reader_text(cell));
    }
    cell.writer = uint16_t(fiber.thread | flag);
    cell.write_time = now;
  }
}

void access_global(const Fiber& fiber, const Access& access, const void* pointer, bool atomic) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  const int index = find_global(*fiber.worker, address, access.bytes);
  if (index < 0) fail_outside(fiber, access, address);
  check_global(fiber, access, fiber.worker->launch->op->buffers[index], address, atomic);
  count(fiber, access, address, 1 + index);
}

// Operators

namespace {

std::mutex operator_mutex;  // held by the operator that runs
OperatorState* running_operator = nullptr;

}  // namespace

Operator::Operator(const char* name, std::vector<Buffer> buffers) {
  operator_mutex.lock();
  auto* state = new OperatorState{name, {}};
  for (const Buffer& buffer : buffers) {
    if (buffer.data != nullptr && buffer.bytes > 0) state->buffers.emplace_back(buffer);
  }
  running_operator = state;
}

Operator::~Operator() {
  delete running_operator;
  running_operator = nullptr;
  operator_mutex.unlock();
}

cudaError_t Operator::finish() {
  OperatorState& state = *running_operator;
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

OperatorState& current_operator() {
  static OperatorState none;
  if (running_operator != nullptr) return *running_operator;
  none = {};
  return none;
}

void OperatorState::end_launch() {
  for (GlobalBuffer& global : buffers) {
    for (auto& writer : global.writers) writer = writer != 0 ? kEarlier : 0;
  }
}

}  // namespace host_model

// The compiler's hooks

#ifndef __SANITIZE_ADDRESS__
namespace host_model {
namespace {

inline void plain_access(void* address, size_t bytes, bool is_write, bool aligned,
                         const void* code) {
  const Fiber* fiber = running;
  if (fiber == nullptr) return;  // code of the host
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  if (begin - reinterpret_cast<uintptr_t>(fiber->context.stack) < kStackBytes) return;
  const Access access{is_write ? "write" : "read", bytes, nullptr, nullptr, code, is_write};
  if (aligned) check_aligned(*fiber, access, begin);
  access_plain(*fiber, access, begin);
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
