// Counts what a worker's blocks execute and move, in instructions of a warp.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace host_model {

struct GlobalBuffer;
struct Launch;
struct Worker;

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

// The k-th access of each lane at one place of the code is one instruction of the warp.
struct WarpAccess {
  uint32_t lanes = 0;
  std::array<uintptr_t, kLanes> address;
};

// The accesses of the running warp at one place of the code to one memory.
struct Site {
  const void* code = nullptr;
  int space = 0;  // 0: shared memory, else 1 + index of the buffer
  size_t bytes = 0;
  bool is_write = false;
  std::array<uint32_t, kLanes> count{};
  std::vector<WarpAccess> accesses;
  size_t num_accesses = 0;
};

struct Counters {
  int64_t mma = 0, barriers = 0, shared_accesses = 0, bank_conflicts = 0;
  std::vector<std::pair<int64_t, int64_t>> bytes;  // of each buffer: loaded, stored

  // Set all counts to zero; `buffers` is the global memory that the launch may touch.
  void start(std::vector<GlobalBuffer>& buffers);

  // An access of one lane. It is counted when flush() puts the lanes of the warp together. Inlined:
  // every load and store of a kernel comes here.
  void count_access(unsigned lane, const void* code, size_t num_bytes, bool is_write,
                    uintptr_t address, int space) {
    size_t slot = (reinterpret_cast<uintptr_t>(code) * 31 + uintptr_t(space)) % sites_.size();
    while (sites_[slot].code != nullptr &&
           (sites_[slot].code != code || sites_[slot].space != space)) {
      slot = (slot + 1) % sites_.size();
    }
    Site& site = sites_[slot];
    if (site.code == nullptr) {
      if (touched_.size() + 1 == sites_.size()) flush();
      site.code = code;
      site.space = space;
      site.bytes = num_bytes;
      site.is_write = is_write;
      touched_.push_back(&site);
    }
    const uint32_t k = site.count[lane]++;
    if (k >= site.num_accesses) {
      site.num_accesses = k + 1;
      if (site.accesses.size() < site.num_accesses) site.accesses.resize(site.num_accesses);
    }
    WarpAccess& access = site.accesses[k];
    access.lanes |= 1u << lane;
    access.address[lane] = address;
  }

  // Eight lanes each give the 16-byte rows of a matrix; there are four.
  void count_ldmatrix(const std::array<uintptr_t, kLanes>& rows);

  // The lanes of the running warp have made all accesses up to here.
  void flush() {
    if (!touched_.empty()) flush_sites();
  }

  // Forget the accesses since the last flush: the block did not end.
  void drop();

 private:
  void flush_sites();
  void count_shared(const WarpAccess& access, size_t num_bytes);
  void count_global(const Site& site, const WarpAccess& access);

  std::array<Site, 512> sites_;
  std::vector<Site*> touched_;
  std::vector<GlobalBuffer>* buffers_ = nullptr;
};

// Keep the report of a launch that ended without an error, from the counts of the workers that took
// part in it.
void add_report(const Launch& launch, const std::vector<std::unique_ptr<Worker>>& workers);

}  // namespace host_model
