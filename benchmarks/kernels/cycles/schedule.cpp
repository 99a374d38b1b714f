// A cycle model of multiprocessors of compute capability 9.0: warps issue the instructions that
// walk.cpp found for them and obey the control words of the machine code.
//
// A multiprocessor has four partitions, which share its shared memory. Each issues at most one
// instruction a cycle, of a warp whose stall count has passed and whose scoreboards are clear, if
// the pipe takes it. DRAM is one queue for all that is streamed, and from L2 each multiprocessor has
// a queue of its own, where dram_bytes says so; otherwise only copies queue. Not modelled: the
// instruction cache, power.
#include <algorithm>
#include <cstdint>
#include <deque>
#include <vector>

namespace {

// In the order of sass.PIPES.
enum Pipe {
  kTensor,
  kSpecial,
  kFloat,
  kHeavy,
  kShared,
  kCopy,
  kCommit,
  kWaitCopies,
  kBarrier,
  kLoad,
  kStore,
  kOther,
  kInteger
};

// Facts of an instruction, as sass.py finds them.
struct Static {
  int32_t pipe, stall, write_barrier, read_barrier, wait, latency, pending;
};

// machine.py says where the numbers come from.
struct Machine {
  double tensor, special, pair;            // cycles between two instructions of a pipe
  double special_queue, shared_queue;      // cycles of work that may wait in front of the pipe
  double copy_bytes_cycles, copy_latency;  // one LDGSTS of a warp
  double barrier, jump, launch, stagger;
  // Of kernels that stream: bytes a cycle, for all multiprocessors of the simulation from and to
  // DRAM (0: not modelled), for one of them to or from L2; and cycles until they are there.
  double dram_bytes, l2_bytes, dram_latency, l2_latency;
};

constexpr int kBarriers = 16;  // of a block

struct Warp {
  const uint32_t* next = nullptr;
  const uint32_t* end = nullptr;
  int block = -1;
  double ready = 0, copies = 0;  // when it may issue; when its copies have arrived
  double scoreboard[6] = {};
  std::vector<double> groups;  // when the copies of each commit have arrived
  int barrier = -1;            // where it waits
};

struct Slot {
  int block = -1, alive = 0;
  int arrived[kBarriers] = {}, expected[kBarriers] = {};  // warps; 0 are expected: all that live
  std::vector<Warp*> warps;
};

struct Partition {
  std::vector<Warp*> warps;
  int last = 0;
  double tensor = 0, special = 0, integer = 0, light = 0, heavy = 0;
};

struct Sm {
  double now = 0;
  double shared = 0, fill = 0, drain = 0;  // until when the pipe, loads and stores are busy
  std::vector<Slot> slots;
  std::deque<Warp> warps;
  Partition partitions[4];
  int live = 0;
};

struct Simulation {
  const Static* code;
  const uint32_t* events;
  const int64_t* ends;  // of each warp of each block
  int num_blocks, warps_per_block, policy;
  Machine machine;
  double* times;  // of each block: start, end
  int next_block = 0;
  double dram = 0;  // until when it is busy
  std::vector<Sm> sms;

  void dispatch(Sm& sm, int slot_index, double at) {
    Slot& slot = sm.slots[slot_index];
    slot.block = -1;
    if (next_block >= num_blocks) return;
    const int block = next_block++;
    slot.block = block;
    slot.alive = warps_per_block;
    std::fill_n(slot.arrived, kBarriers, 0);
    times[2 * block] = at;
    ++sm.live;
    for (int w = 0; w < warps_per_block; ++w) {
      const int64_t index = int64_t(block) * warps_per_block + w;
      Warp& warp = *slot.warps[w];
      warp = Warp{};
      warp.next = events + (index == 0 ? 0 : ends[index - 1]);
      warp.end = events + ends[index];
      warp.block = slot_index;
      warp.ready = at + w;
    }
  }

  // When the bytes of an access to global memory have passed the queues.
  double moved(uint32_t event, double t, double& link) {
    const double bytes = 32 * ((event >> 18 & 31) + 1);
    link = std::max(link, t) + bytes / machine.l2_bytes;
    if (!(event >> 23 & 1)) return link + machine.l2_latency;
    dram = std::max(dram, t) + bytes / machine.dram_bytes;
    return std::max(link, dram) + machine.dram_latency;
  }

  // Whether the pipe takes the instruction now; if not, `wake` becomes the time when it may.
  bool take(Sm& sm, Partition& p, Warp& warp, const Static& in, uint32_t event, double& done,
            double& read, double& wake) {
    const double t = sm.now;
    const auto later = [&](double at) {
      wake = std::min(wake, at);
      return false;
    };
    const int cycles = event >> 24;
    const bool streams = machine.dram_bytes > 0;
    switch (in.pipe) {
      case kTensor:
        if (p.tensor > t) return later(p.tensor);
        p.tensor = (p.tensor > t - 1 ? p.tensor : t) + machine.tensor;
        done = t + in.latency;
        break;
      case kSpecial: {
        if (p.special - t > machine.special_queue) return later(p.special - machine.special_queue);
        const double start = std::max(t, p.special);
        p.special = start + machine.special;
        done = start + in.latency;
        read = start + 6;
        break;
      }
      case kFloat: {
        double& half = p.light <= p.heavy ? p.light : p.heavy;
        if (half > t) return later(half);
        half = t + machine.pair;
        break;
      }
      case kHeavy:
        if (p.heavy > t) return later(p.heavy);
        p.heavy = t + machine.pair;
        break;
      case kInteger:
        if (p.integer > t) return later(p.integer);
        p.integer = t + machine.pair;
        break;
      case kShared:
      case kCopy: {
        if (sm.shared - t > machine.shared_queue) return later(sm.shared - machine.shared_queue);
        const double start = std::max(t, sm.shared);
        sm.shared = start + cycles;
        done = start + cycles + in.latency;
        read = start + 10;
        if (in.pipe == kCopy && streams) {
          warp.copies = std::max(warp.copies, moved(event, t, sm.fill));
          read = done = start + 12;
        } else if (in.pipe == kCopy) {
          sm.fill = std::max(sm.fill, t) + machine.copy_bytes_cycles;
          warp.copies = std::max(warp.copies, sm.fill + machine.copy_latency);
          read = done = start + 12;
        }
        break;
      }
      case kCommit:
        warp.groups.push_back(warp.copies);
        break;
      case kWaitCopies: {
        double arrived = 0;
        for (size_t i = 0; i + in.pending < warp.groups.size(); ++i) {
          arrived = std::max(arrived, warp.groups[i]);
        }
        if (arrived > t) return later(arrived);
        break;
      }
      case kStore:
        sm.shared = std::max(sm.shared, t) + cycles;
        done = t + in.latency;
        if (streams) moved(event, t, sm.drain);
        break;
      case kLoad:
        done = streams ? moved(event, t, sm.fill) : t + in.latency;
        break;
      default:
        done = t + in.latency;
    }
    return true;
  }

  void wake_if_complete(Slot& slot, int number, double t) {
    int& arrived = slot.arrived[number];
    const int expected = slot.expected[number] > 0 ? slot.expected[number] : slot.alive;
    if (arrived == 0 || arrived < expected) return;
    arrived = 0;
    for (Warp* other : slot.warps) {
      if (other->barrier != number) continue;
      other->barrier = -1;
      other->ready = std::max(other->ready, t + machine.barrier);
    }
  }

  // One cycle of a partition. Returns whether it issued.
  bool issue(Sm& sm, Partition& p, double& wake) {
    const int size = int(p.warps.size());
    const double t = sm.now;
    for (int k = 0; k < size; ++k) {
      int i = (p.last + 1 + k) % size;                                 // in turn
      if (policy == 1) i = k == 0 ? p.last : k <= p.last ? k - 1 : k;  // the last one, then by age
      Warp& warp = *p.warps[i];
      if (warp.next == warp.end || warp.barrier >= 0) continue;
      if (warp.ready > t) {
        wake = std::min(wake, warp.ready);
        continue;
      }
      const uint32_t event = *warp.next;
      const Static& in = code[event & 0xffff];
      double blocked = 0;
      for (int b = 0; b < 6; ++b) {
        if (in.wait >> b & 1) blocked = std::max(blocked, warp.scoreboard[b]);
      }
      if (blocked > t) {
        wake = std::min(wake, blocked);
        continue;
      }
      double done = t + 20, read = t + 8;
      const bool idle = event >> 17 & 1;
      if (!idle && !take(sm, p, warp, in, event, done, read, wake)) continue;
      p.last = i;
      if (in.write_barrier < 6) {
        double& board = warp.scoreboard[in.write_barrier];
        board = std::max(board, done);
      }
      if (in.read_barrier < 6) {
        double& board = warp.scoreboard[in.read_barrier];
        board = std::max(board, read);
      }
      warp.ready = t + std::max(in.stall, 1) + (event >> 16 & 1 ? machine.jump : 0);
      ++warp.next;
      Slot& slot = sm.slots[warp.block];
      if (in.pipe == kBarrier && !idle) {
        const int number = event >> 18 & (kBarriers - 1);
        if (!in.pending) warp.barrier = number;
        slot.expected[number] = event >> 24;
        ++slot.arrived[number];
        wake_if_complete(slot, number, t);
      }
      if (warp.next == warp.end) {
        --slot.alive;
        for (int number = 0; number < kBarriers; ++number) wake_if_complete(slot, number, t);
      }
      if (slot.alive == 0) {
        times[2 * slot.block + 1] = std::max({t, sm.drain, dram});
        --sm.live;
        dispatch(sm, warp.block, t + machine.launch);
      }
      return true;
    }
    return false;
  }

  void run(int num_sms, int num_slots) {
    sms = std::vector<Sm>(num_sms);
    for (int s = 0; s < num_slots; ++s) {
      for (Sm& sm : sms) {
        sm.slots.resize(num_slots);
        for (int w = 0; w < warps_per_block; ++w) {
          sm.warps.emplace_back();
          sm.slots[s].warps.push_back(&sm.warps.back());
          sm.partitions[(s * warps_per_block + w) % 4].warps.push_back(&sm.warps.back());
        }
        dispatch(sm, s, s * machine.stagger);
      }
    }
    while (true) {
      Sm* first = nullptr;  // the multiprocessor whose clock is behind the others'
      for (Sm& sm : sms) {
        if (sm.live > 0 && (first == nullptr || sm.now < first->now)) first = &sm;
      }
      if (first == nullptr) return;
      Sm& sm = *first;
      const double until = sm.now + 64;
      while (sm.live > 0 && sm.now < until) {
        bool any = false;
        double wake = 1e18;
        for (Partition& p : sm.partitions) any |= issue(sm, p, wake);
        sm.now = any || wake > 1e17 ? sm.now + 1 : std::max(sm.now + 1, double(int64_t(wake)));
      }
    }
  }
};

}  // namespace

// `events`: of all warps, of all blocks in the order of their launch; `ends`: where each warp's
// end. Writes when each block began and ended, in cycles. policy: 0 loose round robin, 1 greedy
// then oldest.
extern "C" void simulate(const Static* code, const uint32_t* events, const int64_t* ends,
                         int num_blocks, int warps_per_block, int num_sms, int slots, int policy,
                         const Machine* machine, double* times) {
  Simulation simulation{code, events, ends, num_blocks, warps_per_block, policy, *machine, times};
  simulation.run(num_sms, slots);
}
