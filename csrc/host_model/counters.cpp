#include "counters.h"

#include <algorithm>
#include <bit>
#include <mutex>

#include "fibers.h"
#include "report.h"

namespace host_model {
namespace {

// Cycles beyond the first of each pass that the lanes need: 32 banks give one word of four bytes each
// in a cycle. The hardware takes eight-byte accesses in two passes of half a warp, sixteen-byte
// accesses in four.
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

void clear(Site& site) {
  for (size_t k = 0; k < site.num_accesses; ++k) site.accesses[k].lanes = 0;
  site.num_accesses = 0;
  site.count.fill(0);
  site.code = nullptr;
}

struct Reports {
  std::mutex mutex;
  std::vector<LaunchReport> launches;
};

Reports& reports() {
  static Reports& reports = *new Reports;  // threads may outlive the module's destructors
  return reports;
}

}  // namespace

void Counters::start(std::vector<GlobalBuffer>& buffers) {
  mma = barriers = shared_accesses = bank_conflicts = 0;
  bytes.assign(buffers.size(), {});
  buffers_ = &buffers;
}

void Counters::flush_sites() {
  for (Site* site : touched_) {
    for (size_t k = 0; k < site->num_accesses; ++k) {
      if (site->space == 0) {
        count_shared(site->accesses[k], site->bytes);
      } else {
        count_global(*site, site->accesses[k]);
      }
    }
    clear(*site);
  }
  touched_.clear();
}

void Counters::drop() {
  for (Site* site : touched_) clear(*site);
  touched_.clear();
}

void Counters::count_shared(const WarpAccess& access, size_t num_bytes) {
  ++shared_accesses;
  bank_conflicts += conflict_cycles(access.address.data(), access.lanes, num_bytes);
}

void Counters::count_ldmatrix(const std::array<uintptr_t, kLanes>& rows) {
  shared_accesses += 4;
  bank_conflicts += conflict_cycles(rows.data(), kAllLanes, 16);
}

void Counters::count_global(const Site& site, const WarpAccess& access) {
  std::array<uintptr_t, kLanes> begins;
  int num = 0;
  for (uint32_t lanes = access.lanes; lanes != 0; lanes &= lanes - 1) {
    begins[num++] = access.address[std::countr_zero(lanes)];
  }
  if (!std::is_sorted(begins.begin(), begins.begin() + num)) {
    std::sort(begins.begin(), begins.begin() + num);
  }
  GlobalBuffer& global = (*buffers_)[site.space - 1];
  auto& sectors = site.is_write ? global.stored : global.loaded;
  auto& [loaded, stored] = bytes[site.space - 1];
  int64_t& moved = site.is_write ? stored : loaded;
  for (int i = 0; i < num;) {
    const uintptr_t begin = begins[i];
    uintptr_t end = begin;
    for (; i < num && begins[i] <= end; ++i) end = begins[i] + site.bytes;
    moved += int64_t(end - begin);
    global.touch(sectors, begin, end);
  }
}

void add_report(const Launch& launch, const std::vector<std::unique_ptr<Worker>>& workers) {
  LaunchReport report{launch.op->name, launch.kernel_name, launch.grid_x, launch.grid_y,
                      launch.num_threads};
  report.dynamic_shared = launch.shared_bytes;
  for (const GlobalBuffer& global : launch.op->buffers) {
    report.buffers.push_back({global.buffer.name});
  }
  for (const auto& worker : workers) {
    if (worker->launch != &launch) continue;
    const Counters& counters = worker->counters;
    report.mma += counters.mma;
    report.barriers += counters.barriers;
    report.shared_accesses += counters.shared_accesses;
    report.bank_conflicts += counters.bank_conflicts;
    int static_shared = 0;
    for (const auto& array : worker->arrays) {
      if (array->key != nullptr) static_shared += int(array->bytes);
    }
    report.static_shared = std::max(report.static_shared, static_shared);
    for (size_t i = 0; i < counters.bytes.size(); ++i) {
      report.buffers[i].bytes_loaded += counters.bytes[i].first;
      report.buffers[i].bytes_stored += counters.bytes[i].second;
    }
  }
  for (size_t i = 0; i < launch.op->buffers.size(); ++i) {
    GlobalBuffer& global = launch.op->buffers[i];
    Traffic& traffic = report.buffers[i];
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
  const std::lock_guard lock(reports().mutex);
  reports().launches.push_back(std::move(report));
}

std::vector<LaunchReport> take_report() {
  const std::lock_guard lock(reports().mutex);
  return std::exchange(reports().launches, {});
}

}  // namespace host_model
