// Runs the machine code of a kernel (SASS of compute capability 9.0) on the CPU and keeps the
// instructions that each warp issues. schedule.cpp predicts how long they take on a GPU.
//
// NVIDIA does not document SASS. What an instruction computes was inferred from the PTX that it
// comes from; tests compare the kernels' results with those of the host model. An instruction that
// is not known here is an error that shows its text.
//
// Simplified: an asynchronous copy arrives at once; the warps of a block run one after the other,
// each up to its next barrier. A uniform instruction (UIADD3) is run as the plain one (IADD3), by
// one lane, on uniform registers.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

using std::string;

constexpr int kLanes = 32, kZero = 255, kTrue = 7;  // RZ and URZ; PT and UPT
constexpr uint32_t kAll = 0xffffffffu;
constexpr uint32_t kSharedWindow = 0x7fff0000u;  // upper half of generic addresses in shared memory
constexpr size_t kMostEvents = size_t{1} << 25;  // of a warp
constexpr int kSharedBytes = 228 * 1024, kLocalBytes = 4096, kConstantBytes = 0x1400;
using Lanes = std::array<uint32_t, kLanes>;

// clang-format off
#define COMMA(x) x,
#define NAME(x) #x,
#define OPS(X) \
  X(IADD3) X(IMAD) X(VIADD) X(VIADDMNMX) X(VIMNMX) X(VIMNMX3) X(IMNMX) X(IABS) X(LEA) X(LOP3) \
  X(PLOP3) X(SHF) X(PRMT) X(SEL) X(MOV) X(ISETP) X(POPC) X(FLO) X(BREV) X(P2R) X(R2P) X(R2UR) \
  X(S2R) X(S2UR) X(CS2R) X(VOTE) X(VOTEU) X(SHFL) X(REDUX) X(FADD) X(FMUL) X(FFMA) X(FMNMX) \
  X(FSEL) X(FSETP) X(FCHK) X(MUFU) X(I2F) X(I2FP) X(F2I) X(F2FP) X(HADD2) X(HMUL2) X(HFMA2) X(HMNMX2) X(VHMNMX) X(HMMA) \
  X(LDC) \
  X(LDG) X(LD) X(LDS) X(LDL) X(STG) X(ST) X(STS) X(STL) X(LDSM) X(LDGSTS) X(RED) X(REDG) X(ATOMG) \
  X(BRA) \
  X(CALL) X(RET) X(EXIT) X(BSSY) X(BSYNC) X(BREAK) X(WARPSYNC) X(BAR) X(NOP) X(YIELD) X(DEPBAR) \
  X(LDGDEPBAR) X(MEMBAR) X(ERRBAR) X(CGAERRBAR) X(CCTL) X(ACQBULK) X(PREEXIT)
#define MODIFIERS(M) \
  M(U8) M(S8) M(U16) M(S16) M(U32) M(U64) M(S64) M(WIDE) M(HI) M(X) M(EX) M(SX32) M(R) M(OR) \
  M(XOR) M(BF16) M(EX2) M(RCP) M(RSQ) M(LG2) M(SQRT) M(RP) M(ALL) M(IDX) M(UP) M(DOWN) M(MAX) \
  M(MIN) M(ADD) M(F32) M(MT88) M(DIV) M(SH) M(NAN_) M(BF16_V2) M(D8) M(FTZ) \
  M(RELU)
enum Op { OPS(COMMA) kUnknown };
enum Modifier { MODIFIERS(COMMA) kNumModifiers };
enum class Kind { kRegister, kUniform, kPredicate, kUniformPredicate, kImmediate, kConstant,
                  kAddress, kName };
// clang-format on
const char* const kOps[] = {OPS(NAME)};
const char* const kModifiers[] = {MODIFIERS(NAME)};

[[noreturn]] void fail(const string& text) { throw std::runtime_error(text); }

struct Operand {
  Kind kind = Kind::kName;
  bool negate = false, invert = false, absolute = false;
  bool wide = false;    // of an address: its register is a pair
  int index = kZero;    // register or predicate; of an address and a constant the register added
  int uniform = kZero;  // of an address and a constant: the uniform register added
  uint32_t value = 0;   // immediate, offset
  int part = 0;         // .H1_H1: 1; .B1: 1
  string name;
};

struct Instruction {
  Op op = kUnknown;
  bool uniform = false;
  uint64_t modifiers = 0;
  int bytes = 4, matrices = 1;
  string text, compare;
  Operand guard;
  std::vector<Operand> operands;
  bool has(Modifier m) const { return modifiers >> m & 1; }
};

std::vector<string> split(const string& text, char by) {
  std::vector<string> parts(1);
  int depth = 0;
  for (char c : text) {
    depth += (c == '[') - (c == ']');
    if (c == by && depth == 0) {
      parts.emplace_back();
    } else if (c != ' ') {
      parts.back() += c;
    }
  }
  return parts;
}

bool starts(const string& text, const char* with) { return text.rfind(with, 0) == 0; }

// What stands between the last brackets: registers and an offset.
void parse_address(const string& inside, Operand& operand) {
  string term;
  const auto add = [&] {
    if (term.empty()) return;
    const bool minus = term[0] == '-';
    const string plain = minus ? term.substr(1) : term;
    if (starts(plain, "UR")) {
      operand.uniform = plain == "URZ" ? kZero : std::stoi(plain.substr(2));
    } else if (plain[0] == 'R') {
      operand.index = starts(plain, "RZ") ? kZero : std::stoi(plain.substr(1));
      operand.wide = plain.find(".64") != plain.npos;
      if (const size_t scale = plain.find(".X"); scale != plain.npos) {
        operand.part = std::stoi(plain.substr(scale + 2));
      }
    } else {
      const uint32_t offset = uint32_t(std::stoul(plain, nullptr, 0));
      operand.value += minus ? 0 - offset : offset;
    }
    term.clear();
  };
  for (char c : inside) {
    if (c == '+') {
      add();
    } else {
      term += c;
    }
  }
  add();
}

Operand parse_operand(string text, bool is_float) {
  Operand operand;
  operand.name = text;
  if (const size_t at = text.find(".reuse"); at != text.npos) text.erase(at, 6);
  if (text.empty()) return operand;
  if (text[0] == '!' || text[0] == '~') {
    operand.invert = true;
    text.erase(0, 1);
  }
  const bool digits = text.size() > 1 && text[0] == '-' && isdigit(text[1]);
  if (text[0] == '-' && !digits && text != "-INF" && text != "-QNAN") {
    operand.negate = true;
    text.erase(0, 1);
  }
  if (text[0] == '|') {
    operand.absolute = true;
    text = text.substr(1, text.find('|', 1) - 1);
  }
  const auto register_of = [&](size_t prefix, const char* zero, int none) {
    return starts(text.substr(prefix), zero) ? none : std::stoi(text.substr(prefix));
  };
  if (text.size() > 1 && text[0] == 'U' && text[1] == 'R') {
    operand.kind = Kind::kUniform;
    operand.index = register_of(2, "Z", kZero);
  } else if (text.size() > 1 && text[0] == 'U' && text[1] == 'P' &&
             (isdigit(text[2]) || text[2] == 'T')) {
    operand.kind = Kind::kUniformPredicate;
    operand.index = register_of(2, "T", kTrue);
  } else if (text[0] == 'R' && text.size() > 1 && (isdigit(text[1]) || text[1] == 'Z')) {
    operand.kind = Kind::kRegister;
    operand.index = register_of(1, "Z", kZero);
  } else if (text[0] == 'P' && text.size() == 2 && (isdigit(text[1]) || text[1] == 'T')) {
    operand.kind = Kind::kPredicate;
    operand.index = register_of(1, "T", kTrue);
  } else if (starts(text, "c[")) {
    operand.kind = Kind::kConstant;
    parse_address(text.substr(text.rfind('[') + 1, text.rfind(']') - text.rfind('[') - 1), operand);
  } else if (text.back() == ']') {
    operand.kind = Kind::kAddress;
    parse_address(text.substr(text.rfind('[') + 1, text.size() - text.rfind('[') - 2), operand);
  } else if (text.find("INF") != text.npos || text.find("QNAN") != text.npos) {
    operand.kind = Kind::kImmediate;
    const float value = text.find("INF") != text.npos ? INFINITY : NAN;
    operand.value = std::bit_cast<uint32_t>(text[0] == '-' ? -value : value);
  } else if (isdigit(text[0]) || text[0] == '-') {
    operand.kind = Kind::kImmediate;
    const bool hex = text.find("0x") != text.npos;
    if (!hex && (is_float || text.find('.') != text.npos)) {
      operand.value = std::bit_cast<uint32_t>(std::stof(text));
    } else {
      operand.value = uint32_t(std::stoll(text, nullptr, 0));
    }
  }
  if (const size_t at = text.find(".H1"); at != text.npos) operand.part = 1;
  if (const size_t at = text.find(".B"); at != text.npos && operand.kind == Kind::kRegister) {
    operand.part = text[at + 2] - '0';
  }
  return operand;
}

Instruction parse(const string& guard, const string& opcode, const string& operands) {
  Instruction in;
  in.text = opcode + " " + operands;
  in.guard = parse_operand(guard.empty() ? "PT" : guard, false);
  std::vector<string> parts = split(opcode, '.');
  string name = parts[0];
  const auto find = [&] {
    for (int i = 0; i < kUnknown; ++i) {
      if (name == kOps[i]) in.op = Op(i);
    }
  };
  find();
  if (in.op == kUnknown && name[0] == 'U') {
    in.uniform = true;
    name.erase(0, 1);
    find();
  }
  for (size_t i = 1; i < parts.size(); ++i) {
    const string& part = parts[i];
    for (int m = 0; m < kNumModifiers; ++m) {
      if (part == (m == NAN_ ? "NAN" : kModifiers[m])) in.modifiers |= uint64_t{1} << m;
    }
    if (part == "64") in.bytes = 8;
    if (part == "128") in.bytes = 16;
    if (part == "2" || part == "4") in.matrices = part[0] - '0';
    if (i == 1) in.compare = part;
  }
  if (in.has(U8) || in.has(S8)) in.bytes = 1;
  if (in.has(U16) || in.has(S16)) in.bytes = 2;
  const bool is_float = name[0] == 'F' && in.op != FLO;
  if (!operands.empty()) {
    const size_t end = in.op == RET ? operands.find(' ') : operands.npos;  // R30 0x0
    for (const string& text : split(operands.substr(0, end), ',')) {
      in.operands.push_back(parse_operand(text, is_float));
    }
  }
  return in;
}

float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
uint32_t as_bits(float value) { return std::bit_cast<uint32_t>(value); }

float half_to_float(uint16_t bits) { return float(std::bit_cast<_Float16>(bits)); }
uint16_t float_to_half(float value) { return std::bit_cast<uint16_t>(_Float16(value)); }
float bfloat_to_float(uint16_t bits) { return as_float(uint32_t(bits) << 16); }
uint16_t float_to_bfloat(float value) {
  if (value != value) return 0x7fff;
  const uint32_t bits = as_bits(value);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <typename T>
bool compare(const string& how, T a, T b) {
  if (a != a || b != b) return how.back() == 'U' || how == "NAN" || how == "NEU";
  const string plain = how.size() == 3 && how.back() == 'U' ? how.substr(0, 2) : how;
  if (plain == "LT") return a < b;
  if (plain == "LE") return a <= b;
  if (plain == "GT") return a > b;
  if (plain == "GE") return a >= b;
  if (plain == "EQ") return a == b;
  if (plain == "NE") return a != b;
  if (plain == "T" || plain == "NUM") return true;
  if (plain == "F" || plain == "NAN") return false;
  fail("comparison " + how);
}

// Shared memory serves 128 bytes a cycle from 32 banks of four bytes.
int shared_cycles(const uint32_t* address, uint32_t lanes, int bytes) {
  const int at_once = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  int cycles = 0;
  for (int first = 0; first < kLanes; first += at_once) {
    std::array<std::array<uint32_t, 32>, 32> words;
    std::array<int, 32> depth{};
    int worst = 0;
    for (int lane = first; lane < first + at_once; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      for (uint32_t word = address[lane] / 4; word <= (address[lane] + bytes - 1) / 4; ++word) {
        auto& in_bank = words[word % 32];
        int& known = depth[word % 32];
        if (std::find(in_bank.begin(), in_bank.begin() + known, word) != in_bank.begin() + known)
          continue;
        in_bank[known++] = word;
        worst = std::max(worst, known);
      }
    }
    cycles += worst;
  }
  return std::min(std::max(cycles, 1), 255);
}

struct Range {
  uint64_t begin, end;
  bool streamed;  // from and to DRAM
};

struct Launch {
  std::vector<uint8_t> constants;
  std::vector<Range> ranges;  // of global memory
  int x, y;                   // the block's index
  int threads_x;              // of a block with two dimensions
};

struct Kernel {
  std::vector<Instruction> code;
};

// One step of a warp: the index of the instruction, whether the warp jumped, whether no lane
// executed it, and the cycles for which it occupies shared memory. `detail`, six bits: of an access
// to global memory the number of 32-byte sectors less one, and 32 where they are streamed; of a
// barrier its number, and then `cycles` are the warps that it waits for, 0 for all.
uint32_t event(int at, bool jumped, bool idle, int detail, int cycles) {
  return uint32_t(at) | uint32_t(jumped) << 16 | uint32_t(idle) << 17 | uint32_t(detail) << 18 |
         uint32_t(cycles) << 24;
}

struct Group {  // lanes at the same instruction
  int pc;
  uint32_t lanes;
  int barrier;  // the convergence barrier at which they wait; -1: none, they can run
};

class Warp {
 public:
  enum Status { kRunning, kAtBarrier, kDone };
  std::vector<uint32_t> events;
  int64_t bytes_moved = 0;  // from and to global memory
  Status status = kRunning;
  int barrier = 0, expected = 0;  // where it waits, and for how many warps; 0: all
  std::vector<int> arrived;       // barriers at which it arrived without waiting

  Warp(const Kernel& kernel, const Launch& launch, uint8_t* shared, int warp)
      : kernel_(kernel), launch_(launch), shared_(shared), warp_(warp) {
    for (auto& lanes : registers_) lanes.fill(0);
    uniform_.fill(0);
    predicates_.fill(0);
    uniform_predicates_.fill(0);
    predicates_[kTrue] = uniform_predicates_[kTrue] = kAll;
    groups_.push_back({0, kAll, -1});
  }

  // Until a barrier, or the end.
  void run() {
    while (status == kRunning) step();
  }

 private:
  static constexpr int kWarpSync = 16;  // the barrier of WARPSYNC, beside the sixteen of BSSY

  const Kernel& kernel_;
  const Launch& launch_;
  uint8_t* shared_;
  int warp_;
  int detail_ = 0, expected_now_ = 0;  // of the event of this step
  std::array<Lanes, 256> registers_;
  std::array<uint32_t, 256> uniform_;
  std::array<uint32_t, 8> predicates_, uniform_predicates_;
  std::array<Lanes, kWarpSync + 1> members_{};  // lanes of a convergence barrier, kept by each lane
  std::vector<uint8_t> local_;
  uint32_t alive_ = kAll;
  std::vector<Group> groups_;  // the last one that does not wait runs

  // Operands

  Lanes bits(const Operand& o, int plus = 0) const {
    Lanes out;
    if (o.kind == Kind::kRegister) {
      out = o.index == kZero ? Lanes{} : registers_[o.index + plus];
    } else if (o.kind == Kind::kUniform) {
      out.fill(o.index == kZero ? 0 : uniform_[o.index + plus]);
    } else if (o.kind == Kind::kImmediate) {
      out.fill(plus == 0 ? o.value : 0);
    } else if (o.kind == Kind::kConstant) {
      out.fill(constant(o.value + uniform(o.uniform) + 4 * plus));
    } else {
      fail("operand " + o.name);
    }
    return out;
  }
  Lanes ints(const Operand& o) const {
    Lanes out = bits(o);
    for (uint32_t& x : out) x = o.negate ? 0 - x : o.invert ? ~x : x;
    return out;
  }
  std::array<float, kLanes> floats(const Operand& o) const {
    const Lanes in = bits(o);
    std::array<float, kLanes> out;
    for (int l = 0; l < kLanes; ++l) {
      uint32_t x = o.absolute ? in[l] & 0x7fffffffu : in[l];
      out[l] = as_float(o.negate ? x ^ 0x80000000u : x);
    }
    return out;
  }
  std::array<uint64_t, kLanes> pairs(const Operand& o) const {
    const Lanes low = bits(o), high = bits(o, 1);
    std::array<uint64_t, kLanes> out;
    for (int l = 0; l < kLanes; ++l) {
      out[l] = low[l] | uint64_t(high[l]) << 32;
      if (o.negate) out[l] = 0 - out[l];
      if (o.invert) out[l] = ~out[l];
    }
    return out;
  }
  uint32_t predicate(const Operand& o) const {
    uint32_t p;
    if (o.kind == Kind::kPredicate) {
      p = predicates_[o.index];
    } else if (o.kind == Kind::kUniformPredicate) {
      p = uniform_predicates_[o.index];
    } else {
      fail("predicate " + o.name);
    }
    return o.invert ? ~p : p;
  }
  uint32_t uniform(int index) const { return index == kZero ? 0 : uniform_[index]; }
  uint32_t constant(uint32_t offset) const {
    if (offset + 4 > launch_.constants.size()) fail("constant " + std::to_string(offset));
    uint32_t value;
    std::memcpy(&value, launch_.constants.data() + offset, 4);
    return value;
  }

  void set(const Operand& o, const Lanes& value, uint32_t lanes, int plus = 0) {
    if (o.index == kZero) return;
    if (o.kind == Kind::kUniform) {
      uniform_[o.index + plus] = value[std::countr_zero(lanes)];
    } else {
      Lanes& to = registers_[o.index + plus];
      for (int l = 0; l < kLanes; ++l) to[l] = lanes >> l & 1 ? value[l] : to[l];
    }
  }
  void set_pair(const Operand& o, const std::array<uint64_t, kLanes>& value, uint32_t lanes) {
    Lanes low, high;
    for (int l = 0; l < kLanes; ++l) {
      low[l] = uint32_t(value[l]);
      high[l] = uint32_t(value[l] >> 32);
    }
    set(o, low, lanes);
    set(o, high, lanes, 1);
  }
  void set_predicate(const Operand& o, uint32_t value, uint32_t lanes) {
    if (o.index == kTrue) return;
    if (o.kind == Kind::kUniformPredicate) {
      uniform_predicates_[o.index] = value >> std::countr_zero(lanes) & 1 ? kAll : 0;
    } else {
      uint32_t& to = predicates_[o.index];
      to = (to & ~lanes) | (value & lanes);
    }
  }

  // Memory

  uint64_t address(const Operand& o, int lane) const {
    uint64_t base = 0;
    if (o.index != kZero) {
      base = registers_[o.index][lane];
      if (o.wide) base |= uint64_t(registers_[o.index + 1][lane]) << 32;
      if (o.part > 0) base *= o.part;
    }
    const int64_t offset = int32_t(o.value);
    return base + uniform(o.uniform) + (o.wide ? uint64_t(offset) : uint64_t(uint32_t(offset)));
  }
  uint8_t* global(uint64_t at, int bytes) const {
    if ((at >> 32) == kSharedWindow) return in_shared(uint32_t(at), bytes);
    for (const Range& range : launch_.ranges) {
      if (at >= range.begin && at + bytes <= range.end) return reinterpret_cast<uint8_t*>(at);
    }
    std::ostringstream text;
    text << "an access outside the operator's tensors, at " << std::hex << at;
    fail(text.str());
  }
  // Notes what an access to global memory moves: the sectors that its lanes touch.
  void note_sectors(const Operand& o, uint32_t lanes, int bytes) {
    std::array<uint64_t, kLanes + 1> sectors;
    int number = 0;
    bool streamed = false;
    for (int l = 0; l < kLanes; ++l) {
      if (!(lanes >> l & 1)) continue;
      const uint64_t at = address(o, l), sector = at / 32;
      if (std::find(sectors.begin(), sectors.begin() + number, sector) != sectors.begin() + number)
        continue;
      if (number == 0) {
        streamed = std::any_of(launch_.ranges.begin(), launch_.ranges.end(), [&](const Range& r) {
          return r.streamed && at >= r.begin && at < r.end;
        });
      }
      sectors[number++] = sector;
    }
    bytes_moved += bytes * std::popcount(lanes);
    if (number > 0) detail_ = (number - 1) | int(streamed) << 5;
  }
  uint8_t* in_shared(uint32_t at, int bytes) const {
    if (at + bytes > uint32_t(kSharedBytes)) fail("an access outside shared memory");
    return shared_ + at;
  }
  uint8_t* in_local(uint32_t at, int bytes, int lane) {
    if (local_.empty()) local_.resize(kLanes * kLocalBytes);
    if (at + bytes > uint32_t(kLocalBytes)) fail("an access outside local memory");
    return local_.data() + lane * kLocalBytes + at;
  }
  uint8_t* memory(Op op, const Operand& o, int bytes, int lane) {
    const uint64_t at = address(o, lane);
    if (op == LDS || op == STS || op == LDSM) return in_shared(uint32_t(at), bytes);
    if (op == LDL || op == STL) return in_local(uint32_t(at), bytes, lane);
    return global(at, bytes);
  }
  int cycles_of(const Operand& o, uint32_t lanes, int bytes) const {
    Lanes at{};
    for (int l = 0; l < kLanes; ++l) at[l] = uint32_t(address(o, l));
    return shared_cycles(at.data(), lanes, bytes);
  }

  int load(const Instruction& in, uint32_t lanes) {
    const Operand &to = in.operands[0], &from = in.operands[1];
    if (in.op == LDG || in.op == LD) note_sectors(from, lanes, in.bytes);
    const int cycles = in.op == LDS ? cycles_of(from, lanes, in.bytes) : 0;
    std::array<Lanes, 4> words{};
    for (int l = 0; l < kLanes; ++l) {
      if (!(lanes >> l & 1)) continue;
      uint32_t value[4] = {};
      std::memcpy(value, memory(in.op, from, in.bytes, l), in.bytes);
      if (in.has(S8)) value[0] = uint32_t(int8_t(value[0]));
      if (in.has(S16)) value[0] = uint32_t(int16_t(value[0]));
      for (int w = 0; w < 4; ++w) words[w][l] = value[w];
    }
    for (int w = 0; w < std::max(in.bytes / 4, 1); ++w) set(to, words[w], lanes, w);
    if (in.op == LDL) return std::max(in.bytes / 4, 1);  // each lane's words lie in its own bank
    return cycles;
  }

  int store(const Instruction& in, uint32_t lanes) {
    const Operand &to = in.operands[0], &from = in.operands[1];
    for (int w = 0; w < std::max(in.bytes / 4, 1); ++w) {
      const Lanes value = bits(from, w);
      for (int l = 0; l < kLanes; ++l) {
        if (lanes >> l & 1) {
          std::memcpy(memory(in.op, to, in.bytes, l) + 4 * w, &value[l], std::min(in.bytes, 4));
        }
      }
    }
    if (in.op == STG || in.op == ST) note_sectors(to, lanes, in.bytes);
    if (in.op == STL) return std::max(in.bytes / 4, 1);
    return in.op == STS ? cycles_of(to, lanes, in.bytes) : 4;
  }

  int load_matrices(const Instruction& in) {
    int cycles = 0;
    Lanes at{};
    for (int l = 0; l < kLanes; ++l) at[l] = uint32_t(address(in.operands[1], l));
    for (int m = 0; m < in.matrices; ++m) {
      uint16_t rows[8][8];
      for (int r = 0; r < 8; ++r) std::memcpy(rows[r], in_shared(at[8 * m + r], 16), 16);
      Lanes out;
      for (int l = 0; l < kLanes; ++l) {
        const int g = l / 4, t = l % 4;
        const bool transposed = in.has(MT88);
        const uint16_t low = transposed ? rows[2 * t][g] : rows[g][2 * t];
        const uint16_t high = transposed ? rows[2 * t + 1][g] : rows[g][2 * t + 1];
        out[l] = low | uint32_t(high) << 16;
      }
      set(in.operands[0], out, kAll, m);
      cycles += shared_cycles(at.data(), 0xffu << 8 * m, 16);
    }
    return cycles;
  }

  void copy_async(const Instruction& in, uint32_t lanes) {
    const bool conditional = in.operands.size() > 2;
    const uint32_t valid = conditional ? predicate(in.operands[2]) : kAll;
    for (int l = 0; l < kLanes; ++l) {
      if (!(lanes >> l & 1)) continue;
      uint8_t* to = in_shared(uint32_t(address(in.operands[0], l)), in.bytes);
      if (valid >> l & 1) {
        std::memcpy(to, global(address(in.operands[1], l), in.bytes), in.bytes);
      } else {
        std::memset(to, 0, in.bytes);
      }
    }
    note_sectors(in.operands[1], lanes & valid, in.bytes);
  }

  // Fragments as in instructions/sm80.cuh.
  void multiply_matrices(const Instruction& in) {
    float a[16][16], b[16][8], c[16][8];
    const auto number = [&](uint32_t word, int half) {
      const uint16_t bits = uint16_t(word >> 16 * half);
      return in.has(BF16) ? bfloat_to_float(bits) : half_to_float(bits);
    };
    if (!starts(in.text, "HMMA.16816.F32")) fail(in.text);
    for (int i = 0; i < 4; ++i) {
      const Lanes words = bits(in.operands[1], i), sums = bits(in.operands[3], i);
      const Lanes others = i < 2 ? bits(in.operands[2], i) : Lanes{};
      for (int l = 0; l < kLanes; ++l) {
        const int g = l / 4, t = l % 4;
        c[g + i / 2 * 8][2 * t + i % 2] = as_float(sums[l]);
        for (int half = 0; half < 2; ++half) {
          a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = number(words[l], half);
          if (i < 2) b[2 * t + 8 * i + half][g] = number(others[l], half);
        }
      }
    }
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
      }
    }
    for (int i = 0; i < 4; ++i) {
      Lanes out;
      for (int l = 0; l < kLanes; ++l) out[l] = as_bits(c[l / 4 + i / 2 * 8][2 * (l % 4) + i % 2]);
      set(in.operands[0], out, kAll, i);
    }
  }

  // Arithmetic

  // a + b + c and the carries, which go to the predicates behind the result.
  void add(const Instruction& in, uint32_t lanes) {
    size_t first = 1;
    while (is_predicate(in.operands[first])) ++first;
    uint64_t carry_in[kLanes] = {};
    if (in.has(X)) {
      for (size_t i = first + 3; i < in.operands.size(); ++i) {
        const uint32_t p = predicate(in.operands[i]);
        for (int l = 0; l < kLanes; ++l) carry_in[l] += p >> l & 1;
      }
    }
    std::array<uint64_t, kLanes> sum{};
    for (int l = 0; l < kLanes; ++l) sum[l] = carry_in[l];
    for (size_t i = first; i < first + 3 && i < in.operands.size(); ++i) {
      const Operand& o = in.operands[i];
      const Lanes x = bits(o);
      for (int l = 0; l < kLanes; ++l) {
        sum[l] += o.negate ? uint64_t(~x[l]) + 1 : o.invert ? ~x[l] : x[l];
      }
    }
    finish_sum(in, sum, first, lanes);
  }

  void finish_sum(const Instruction& in, const std::array<uint64_t, kLanes>& sum, size_t first,
                  uint32_t lanes) {
    Lanes out;
    uint32_t carries[2] = {};
    for (int l = 0; l < kLanes; ++l) {
      out[l] = uint32_t(sum[l]);
      for (uint32_t i = 0; i < 2; ++i) carries[i] |= uint32_t(sum[l] >> 32 > i) << l;
    }
    for (size_t i = 1; i < first; ++i) set_predicate(in.operands[i], carries[i - 1], lanes);
    set(in.operands[0], out, lanes);
  }

  void multiply_add(const Instruction& in, uint32_t lanes) {
    const size_t first = is_predicate(in.operands[1]) ? 2 : 1;
    const Lanes a = ints(in.operands[first]), b = ints(in.operands[first + 1]);
    const Operand& addend = in.operands[first + 2];
    uint32_t carry = 0, carry_out = 0;
    if (in.has(X)) carry = predicate(in.operands[first + 3]);
    const bool is_long = in.has(WIDE) || in.has(HI);
    const auto c = is_long ? pairs(addend) : std::array<uint64_t, kLanes>{};
    const Lanes c32 = is_long ? Lanes{} : ints(addend);
    std::array<uint64_t, kLanes> out;
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t product = in.has(U32) || in.has(U64)
                                   ? uint64_t(a[l]) * b[l]
                                   : uint64_t(int64_t(int32_t(a[l])) * int32_t(b[l]));
      if (is_long) {
        const unsigned __int128 sum = (unsigned __int128)product + c[l] + (carry >> l & 1);
        out[l] = uint64_t(sum);
        carry_out |= uint32_t(sum >> 64 != 0) << l;
        if (in.has(HI)) out[l] >>= 32;
      } else {
        out[l] = uint32_t(product) + c32[l] + (carry >> l & 1);
      }
    }
    if (first == 2) set_predicate(in.operands[1], carry_out, lanes);
    if (in.has(WIDE)) {
      set_pair(in.operands[0], out, lanes);
    } else {
      Lanes low;
      for (int l = 0; l < kLanes; ++l) low[l] = uint32_t(out[l]);
      set(in.operands[0], low, lanes);
    }
  }

  // (a << shift) + b, or with .HI the upper half of the 64-bit c:a << shift.
  void shift_add(const Instruction& in, uint32_t lanes) {
    const size_t first = is_predicate(in.operands[1]) ? 2 : 1;
    const Lanes a = ints(in.operands[first]);
    const Operand& addend = in.operands[first + 1];
    const Lanes b = bits(addend);
    const bool has_c = in.has(HI) && !in.has(SX32);
    const Lanes c = has_c ? bits(in.operands[first + 2]) : Lanes{};
    const size_t at = first + (has_c ? 3 : 2);
    const uint32_t shift = at < in.operands.size() ? bits(in.operands[at])[0] : 0;
    const uint32_t carry = in.has(X) ? predicate(in.operands[at + 1]) : 0;
    std::array<uint64_t, kLanes> sum;
    for (int l = 0; l < kLanes; ++l) {
      uint64_t value = a[l] | uint64_t(c[l]) << 32;
      if (in.has(SX32)) value = uint64_t(int64_t(int32_t(a[l])));
      const uint32_t part = in.has(HI) ? uint32_t(value << shift >> 32) : uint32_t(value << shift);
      sum[l] = uint64_t(part) + (carry >> l & 1);
      sum[l] += addend.negate ? uint64_t(~b[l]) + 1 : addend.invert ? ~b[l] : b[l];
    }
    finish_sum(in, sum, first, lanes);
  }

  void shift(const Instruction& in, uint32_t lanes) {
    const Lanes low = ints(in.operands[1]), by = ints(in.operands[2]), high = ints(in.operands[3]);
    const bool right = in.has(R), is_signed = in.text.find(".S") != string::npos;
    Lanes out;
    for (int l = 0; l < kLanes; ++l) {
      const uint32_t s = in.text.find(".W.") != string::npos ? by[l] & 31 : std::min(by[l], 63u);
      const bool narrow = !in.has(U64) && !in.has(S64);
      uint64_t value = low[l] | uint64_t(high[l]) << 32;
      if (narrow && !right) value = low[l];
      value = !right ? value << s : is_signed ? uint64_t(int64_t(value) >> s) : value >> s;
      out[l] = uint32_t(in.has(HI) ? value >> 32 : value);
    }
    set(in.operands[0], out, lanes);
  }

  void set_compared(const Instruction& in, uint32_t result, uint32_t lanes) {
    const Operand& other = in.operands[4];
    const auto combine = [&](uint32_t p) {
      const uint32_t with = predicate(other);
      return in.has(OR) ? p | with : in.has(XOR) ? p ^ with : p & with;
    };
    const uint32_t first = combine(result), second = combine(~result);
    set_predicate(in.operands[0], first, lanes);
    set_predicate(in.operands[1], second, lanes);
  }

  void compare_ints(const Instruction& in, uint32_t lanes) {
    const Lanes a = ints(in.operands[2]), b = ints(in.operands[3]);
    const uint32_t lower = in.has(EX) ? predicate(in.operands[5]) : 0;
    uint32_t result = 0;
    for (int l = 0; l < kLanes; ++l) {
      bool p = in.has(U32) ? compare(in.compare, a[l], b[l])
                           : compare(in.compare, int32_t(a[l]), int32_t(b[l]));
      if (in.has(EX)) {  // the upper halves of 64 bits decide unless they are equal
        const bool low = lower >> l & 1;
        if (in.compare == "EQ") {
          p = p && low;
        } else if (in.compare == "NE") {
          p = p || low;
        } else if (a[l] == b[l]) {
          p = low;
        }
      }
      result |= uint32_t(p) << l;
    }
    set_compared(in, result, lanes);
  }

  static float extreme(const Instruction& in, float a, float b, bool least) {
    if (in.has(NAN_) && (a != a || b != b)) return std::bit_cast<float>(0x7fffffffu);
    return least ? std::fmin(a, b) : std::fmax(a, b);
  }

  // Arithmetic on two halves: an immediate is two numbers, the upper one first.
  void packed(const Instruction& in, uint32_t lanes) {
    const size_t wanted = in.op == HFMA2 || in.op == VHMNMX ? 3 : 2;
    std::array<std::array<float, kLanes>, 2> numbers[3];
    size_t at = 1;
    for (size_t n = 0; n < wanted; ++n) {
      const Operand& o = in.operands[at++];
      if (o.kind == Kind::kImmediate) {
        numbers[n][1].fill(std::stof(o.name));
        numbers[n][0].fill(std::stof(in.operands[at++].name));
        continue;
      }
      const Lanes words = bits(o);
      const bool one = o.name.find(".H0_H0") != string::npos || o.part == 1;
      for (int half = 0; half < 2; ++half) {
        for (int l = 0; l < kLanes; ++l) {
          const uint16_t word = uint16_t(words[l] >> 16 * (one ? o.part : half));
          float x = in.has(BF16_V2) ? bfloat_to_float(word) : half_to_float(word);
          x = o.absolute ? std::fabs(x) : x;
          numbers[n][half][l] = o.negate ? -x : x;
        }
      }
    }
    const bool is_extreme = in.op == HMNMX2 || in.op == VHMNMX;
    const uint32_t take_min = is_extreme ? predicate(in.operands[at]) : 0;
    each(in, lanes, [&](int l) {
      uint32_t word = 0;
      for (int half = 0; half < 2; ++half) {
        const float a = numbers[0][half][l], b = numbers[1][half][l];
        const float x = in.op == HADD2    ? a + b
                        : in.op == HMUL2  ? a * b
                        : in.op == HFMA2  ? std::fma(a, b, numbers[2][half][l])
                        : in.op == VHMNMX ? extreme(in, extreme(in, a, b, take_min >> l & 1),
                                                    numbers[2][half][l], take_min >> l & 1)
                                          : extreme(in, a, b, take_min >> l & 1);
        word |= uint32_t(in.has(BF16_V2) ? float_to_bfloat(x) : float_to_half(x)) << 16 * half;
      }
      return word;
    });
  }

  static bool is_predicate(const Operand& o) {
    return o.kind == Kind::kPredicate || o.kind == Kind::kUniformPredicate;
  }

  template <typename F>
  void each(const Instruction& in, uint32_t lanes, const F& f) {
    Lanes out;
    for (int l = 0; l < kLanes; ++l) out[l] = f(l);
    set(in.operands[0], out, lanes);
  }

  uint32_t special(const Operand& o, int lane) const {
    const int thread = kLanes * warp_ + lane;
    if (o.name == "SR_TID.X") return uint32_t(thread % launch_.threads_x);
    if (o.name == "SR_TID.Y") return uint32_t(thread / launch_.threads_x);
    if (o.name == "SR_LANEID") return uint32_t(lane);
    if (o.name == "SR_CTAID.X") return uint32_t(launch_.x);
    if (o.name == "SR_CTAID.Y") return uint32_t(launch_.y);
    if (o.name == "SR_SWINHI") return kSharedWindow;
    for (const char* zero : {"SR_CTAID.", "SR_TID.", "SR_CgaCtaId", "SRZ"}) {
      if (starts(o.name, zero)) return 0;
    }
    fail("special register " + o.name);
  }

  static float special_function(const Instruction& in, float x) {
    if (in.has(EX2)) return std::exp2(x);
    if (in.has(RCP)) return 1.f / x;
    if (in.has(RSQ)) return 1.f / std::sqrt(x);
    if (in.has(LG2)) return std::log2(x);
    if (in.has(SQRT)) return std::sqrt(x);
    fail(in.text);
  }

  // Rounded up, as the divisions of integers want it.
  static float round_up(const Instruction& in, long double x) {
    float f = float(x);
    if (in.has(RP) && f < x) f = std::nextafter(f, INFINITY);
    return f;
  }

  // Whether a division needs its slow path: where the quotient or the remainder may be denormal.
  static bool is_extreme(float a, float b) {
    const int ea = std::ilogb(a), eb = std::ilogb(b);
    return !std::isnormal(b) || !std::isfinite(a) || std::abs(eb) > 120 ||
           (a != 0 && (ea < -100 || ea - eb > 120 || ea - eb < -120));
  }

  // Control

  Group& current() {
    for (auto group = groups_.rbegin(); group != groups_.rend(); ++group) {
      if (group->barrier < 0) return *group;
    }
    fail("lanes that wait for each other");
  }

  // Joins the groups that wait at a barrier once all of its lanes that have not exited are there.
  void release() {
    for (size_t i = 0; i < groups_.size(); ++i) {
      const Group waiting = groups_[i];
      if (waiting.barrier < 0) continue;
      const uint32_t wanted =
          waiting.barrier == kWarpSync
              ? alive_
              : members_[waiting.barrier][std::countr_zero(waiting.lanes)] & alive_;
      uint32_t here = 0;
      for (const Group& other : groups_) {
        if (other.barrier == waiting.barrier && other.pc == waiting.pc) here |= other.lanes;
      }
      if ((wanted & ~here) != 0) continue;
      std::erase_if(groups_, [&](const Group& other) {
        return other.barrier == waiting.barrier && other.pc == waiting.pc;
      });
      groups_.push_back({waiting.pc, here, -1});
      return;
    }
  }

  void leave(uint32_t lanes) {
    alive_ &= ~lanes;
    for (Group& group : groups_) group.lanes &= alive_;
    std::erase_if(groups_, [](const Group& group) { return group.lanes == 0; });
    if (alive_ == 0) {
      status = kDone;
    } else {
      release();
    }
  }

  int target(const Instruction& in) const { return int(in.operands.back().value / 16); }

  void step() {
    Group& group = current();
    const int at = group.pc;
    if (events.size() > kMostEvents) fail("no end at " + std::to_string(16 * at));
    if (at >= int(kernel_.code.size())) fail("the end of the code");
    const Instruction& in = kernel_.code[at];
    const uint32_t lanes = group.lanes & predicate(in.guard);
    int cycles = 0;
    bool jumped = false;
    detail_ = 0;
    group.pc = at + 1;
    if (lanes != 0) {
      if (is_control(in.op)) {
        jumped = control(in, group, lanes);
        if (in.op == BAR) cycles = expected_now_;
      } else {
        try {
          cycles = execute(in, in.uniform ? lanes & (0 - lanes) : lanes);
        } catch (const std::exception& error) {
          fail(string(error.what()) + " in " + in.text);
        }
      }
    }
    events.push_back(event(at, jumped, lanes == 0, detail_, cycles));
  }

  static bool is_control(Op op) {
    return op == BRA || op == CALL || op == RET || op == EXIT || op == BSSY || op == BSYNC ||
           op == BREAK || op == WARPSYNC || op == BAR;
  }

  // bar.sync and bar.arrive: a barrier's number, and how many threads it waits for if not all. With
  // both in registers one register holds both.
  void arrive(const Instruction& in, uint32_t all) {
    const bool waits = starts(in.text, "BAR.SYNC");
    if ((!waits && !starts(in.text, "BAR.ARV")) || all != alive_) fail(in.text);
    const auto value = [&](size_t i) { return bits(in.operands[i])[std::countr_zero(all)]; };
    const bool counted = in.operands.size() > 1;
    const bool packed = counted && in.operands[1].kind == Kind::kRegister;
    const uint32_t threads = !counted ? 0 : packed ? value(1) >> 16 & 0xfff : value(1);
    detail_ = int(value(0) & 15);
    expected_now_ = int(threads / kLanes);
    if (waits) {
      status = kAtBarrier;
      barrier = detail_;
      expected = expected_now_;
    } else {
      arrived.push_back(detail_);
    }
  }

  // Whether the warp jumps. `group` must not be used behind a change of groups_.
  bool control(const Instruction& in, Group& group, uint32_t lanes) {
    const uint32_t all = group.lanes;
    switch (in.op) {
      case BRA: {
        uint32_t taken = lanes;
        if (in.has(DIV)) taken = uniform(in.operands[0].index) == all ? 0 : lanes;
        if (!in.has(DIV) && in.operands.size() > 1) taken &= predicate(in.operands[0]);
        if (taken == 0) return false;
        if (taken == all) {
          group.pc = target(in);
        } else {
          const Group stays = {group.pc, all & ~taken, -1};
          group.pc = target(in);
          group.lanes = taken;
          groups_.push_back(stays);
        }
        return true;
      }
      case CALL:
        if (lanes != all || in.text.find(".REL") == string::npos) fail(in.text);
        group.pc = target(in);
        return true;
      case RET:
        if (lanes != all) fail(in.text);
        group.pc = int(registers_[in.operands[0].index][std::countr_zero(all)] / 16);
        return true;
      case EXIT: {
        uint32_t leaving = lanes;
        if (!in.operands.empty() && is_predicate(in.operands[0]))
          leaving &= predicate(in.operands[0]);
        leave(leaving);
        return false;
      }
      case BSSY:
        for (int l = 0; l < kLanes; ++l) {
          if (all >> l & 1) members_[in.operands[0].name[1] - '0'][l] = all;
        }
        return false;
      case BREAK: {
        Lanes& members = members_[in.operands.back().name[1] - '0'];
        uint32_t leaving = lanes;
        if (in.operands.size() > 1) leaving &= predicate(in.operands[0]);
        for (uint32_t& mask : members) mask &= ~leaving;
        release();
        return false;
      }
      case BSYNC:
        group.barrier = in.operands[0].name[1] - '0';
        release();
        return false;
      case WARPSYNC:
        if (all == alive_) return false;
        group.barrier = kWarpSync;
        release();
        return false;
      default:  // BAR
        arrive(in, all);
        return false;
    }
  }

  // The cycles that the instruction occupies shared memory.
  int execute(const Instruction& in, uint32_t lanes) {
    const auto& o = in.operands;
    switch (in.op) {
      case IADD3:
        add(in, lanes);
        break;
      case IMAD:
        multiply_add(in, lanes);
        break;
      case VIADD: {
        const Lanes a = ints(o[1]), b = ints(o[2]);
        each(in, lanes, [&](int l) { return a[l] + b[l]; });
        break;
      }
      case VIADDMNMX:
      case VIMNMX3:
      case VIMNMX:
      case IMNMX: {
        const bool three = in.op == VIADDMNMX || in.op == VIMNMX3;
        const Lanes a = ints(o[1]), b = ints(o[2]), c = three ? ints(o[3]) : Lanes{};
        const uint32_t take_min = predicate(o[three ? 4 : 3]);
        const auto pick = [&](uint32_t x, uint32_t y, int l) {
          const bool less = in.has(U32) ? x < y : int32_t(x) < int32_t(y);
          return less == bool(take_min >> l & 1) ? x : y;
        };
        each(in, lanes, [&](int l) {
          const uint32_t first = in.op == VIADDMNMX ? a[l] + b[l] : a[l];
          uint32_t result = pick(first, in.op == VIADDMNMX ? c[l] : b[l], l);
          if (in.op == VIMNMX3) result = pick(result, c[l], l);
          return in.has(RELU) && int32_t(result) < 0 ? 0u : result;
        });
        break;
      }
      case IABS: {
        const Lanes a = ints(o[1]);
        each(in, lanes, [&](int l) { return int32_t(a[l]) < 0 ? 0 - a[l] : a[l]; });
        break;
      }
      case LEA:
        shift_add(in, lanes);
        break;
      case LOP3: {
        const size_t first = is_predicate(o[0]) ? 1 : 0;
        const Lanes a = ints(o[first + 1]), b = ints(o[first + 2]), c = ints(o[first + 3]);
        const uint32_t table = o[first + 4].value;
        Lanes out{};
        uint32_t any = 0;
        for (int l = 0; l < kLanes; ++l) {
          for (int i = 0; i < 8; ++i) {
            if (table >> i & 1) {
              out[l] |= (i & 4 ? a[l] : ~a[l]) & (i & 2 ? b[l] : ~b[l]) & (i & 1 ? c[l] : ~c[l]);
            }
          }
          any |= uint32_t(out[l] != 0) << l;
        }
        set(o[first], out, lanes);
        if (first == 1) set_predicate(o[0], any | predicate(o.back()), lanes);
        break;
      }
      case PLOP3: {
        const uint32_t a = predicate(o[2]), b = predicate(o[3]), c = predicate(o[4]);
        uint32_t out[2] = {};
        for (int which = 0; which < 2; ++which) {
          for (int i = 0; i < 8; ++i) {
            if (o[5 + which].value >> i & 1)
              out[which] |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
          }
        }
        set_predicate(o[0], out[0], lanes);
        set_predicate(o[1], out[1], lanes);
        break;
      }
      case SHF:
        shift(in, lanes);
        break;
      case PRMT: {
        const Lanes a = bits(o[1]), selector = bits(o[2]), c = bits(o[3]);
        each(in, lanes, [&](int l) {
          const uint64_t bytes = a[l] | uint64_t(c[l]) << 32;
          uint32_t out = 0;
          for (int i = 0; i < 4; ++i) {
            const uint32_t pick = selector[l] >> 4 * i & 15;
            uint32_t byte = uint32_t(bytes >> 8 * (pick & 7)) & 255;
            if (pick & 8) byte = byte & 128 ? 255 : 0;
            out |= byte << 8 * i;
          }
          return out;
        });
        break;
      }
      case SEL:
      case FSEL: {
        const Lanes a = modified(in, o[1]), b = modified(in, o[2]);
        const uint32_t p = predicate(o[3]);
        each(in, lanes, [&](int l) { return p >> l & 1 ? a[l] : b[l]; });
        break;
      }
      case MOV:
        set(o[0], ints(o[1]), lanes);
        break;
      case ISETP:
        compare_ints(in, lanes);
        break;
      case POPC: {
        const Lanes a = ints(o[1]);
        each(in, lanes, [&](int l) { return uint32_t(std::popcount(a[l])); });
        break;
      }
      case BREV: {
        const Lanes a = ints(o[1]);
        each(in, lanes, [&](int l) {
          uint32_t out = 0;
          for (int i = 0; i < 32; ++i) out |= (a[l] >> i & 1) << (31 - i);
          return out;
        });
        break;
      }
      case FLO: {
        const Lanes a = ints(o[1]);
        each(in, lanes, [&](int l) {
          if (a[l] == 0) return kAll;
          return uint32_t(in.has(SH) ? std::countl_zero(a[l]) : 31 - std::countl_zero(a[l]));
        });
        break;
      }
      case P2R: {
        const Lanes a = ints(o[2]), mask = ints(o[3]);
        each(in, lanes, [&](int l) {
          uint32_t packed = 0;
          for (int p = 0; p < 7; ++p) packed |= (predicates_[p] >> l & 1) << p;
          return (packed & mask[l]) | (a[l] & ~mask[l]);
        });
        break;
      }
      case R2P: {
        const Lanes a = bits(o[1]);
        const uint32_t mask = bits(o[2])[0];
        for (int p = 0; p < 7; ++p) {
          if (!(mask >> p & 1)) continue;
          uint32_t value = 0;
          for (int l = 0; l < kLanes; ++l) value |= (a[l] >> (8 * o[1].part + p) & 1) << l;
          predicates_[p] = (predicates_[p] & ~lanes) | (value & lanes);
        }
        break;
      }
      case R2UR:
        set(o[0], ints(o[1]), lanes);
        break;
      case S2R:
      case S2UR:
      case CS2R:
        each(in, lanes, [&](int l) { return special(o[1], l); });
        if (in.op == CS2R && in.text.find("CS2R.32") != 0) {
          set(o[0], Lanes{}, lanes, 1);
        }
        break;
      case VOTE:
      case VOTEU: {
        const uint32_t full = groups_.empty() ? kAll : current().lanes;
        const uint32_t votes = predicate(o.back()) & full;
        if (o.size() > 2) {  // the register may be missing
          Lanes out;
          out.fill(votes);
          set(o[0], out, lanes);
        }
        const bool result = in.has(ALL) ? votes == full : votes != 0;
        set_predicate(o[o.size() - 2], result ? kAll : 0, lanes);
        break;
      }
      case SHFL: {
        const Lanes a = bits(o[2]), b = bits(o[3]), c = bits(o[4]);
        uint32_t found = 0;
        Lanes out;
        for (int l = 0; l < kLanes; ++l) {
          const int mask = int(c[l] >> 8 & 31), clamp = int(c[l] & 31);
          const int least = l & mask, most = least | (clamp & ~mask), by = int(b[l] & 31);
          const int source = in.has(IDX)    ? least | (by & ~mask)
                             : in.has(UP)   ? l - by
                             : in.has(DOWN) ? l + by
                                            : l ^ by;
          const bool inside = in.has(UP) ? source >= most : source <= most;
          out[l] = a[inside ? source : l];
          found |= uint32_t(inside) << l;
        }
        set(o[1], out, lanes);
        set_predicate(o[0], found, lanes);
        return 2;
      }
      case REDUX: {
        const Lanes a = ints(o[1]);
        uint32_t sum = 0;
        bool first = true;
        for (int l = 0; l < kLanes; ++l) {
          if (!(lanes >> l & 1)) continue;
          const bool less = in.has(U32) ? a[l] < sum : int32_t(a[l]) < int32_t(sum);
          const uint32_t best = first || less == in.has(MIN) ? a[l] : sum;
          sum = in.has(MAX) || in.has(MIN) ? best : in.has(OR) ? sum | a[l] : sum + a[l];
          first = false;
        }
        Lanes out;
        out.fill(sum);
        set(o[0], out, lanes);
        break;
      }
      case FADD:
      case FMUL: {
        const auto a = floats(o[1]), b = floats(o[2]);
        const float factor = in.has(D8) ? 0.125f : 1.f;
        each(in, lanes,
             [&](int l) { return as_bits(in.op == FADD ? a[l] + b[l] : a[l] * b[l] * factor); });
        break;
      }
      case FFMA: {
        const auto a = floats(o[1]), b = floats(o[2]), c = floats(o[3]);
        each(in, lanes, [&](int l) { return as_bits(std::fma(a[l], b[l], c[l])); });
        break;
      }
      case FMNMX: {
        const auto a = floats(o[1]), b = floats(o[2]);
        const uint32_t take_min = predicate(o[3]);
        each(in, lanes, [&](int l) { return as_bits(extreme(in, a[l], b[l], take_min >> l & 1)); });
        break;
      }
      case FSETP: {
        const auto a = floats(o[2]), b = floats(o[3]);
        uint32_t result = 0;
        for (int l = 0; l < kLanes; ++l) result |= uint32_t(compare(in.compare, a[l], b[l])) << l;
        set_compared(in, result, lanes);
        break;
      }
      case FCHK: {
        const auto a = floats(o[1]), b = floats(o[2]);
        uint32_t result = 0;
        for (int l = 0; l < kLanes; ++l) result |= uint32_t(is_extreme(a[l], b[l])) << l;
        set_predicate(o[0], result, lanes);
        break;
      }
      case MUFU: {
        const auto a = floats(o[1]);
        each(in, lanes, [&](int l) { return as_bits(special_function(in, a[l])); });
        break;
      }
      case I2F:
      case I2FP: {
        const Lanes low = ints(o[1]);
        const Lanes high = in.has(U64) || in.has(S64) ? bits(o[1], 1) : Lanes{};
        each(in, lanes, [&](int l) {
          const uint64_t both = low[l] | uint64_t(high[l]) << 32;
          if (in.has(U64)) return as_bits(round_up(in, both));
          if (in.has(S64)) return as_bits(round_up(in, int64_t(both)));
          return as_bits(in.has(U32) ? round_up(in, low[l]) : round_up(in, int32_t(low[l])));
        });
        break;
      }
      case F2I: {
        const auto a = floats(o[1]);
        std::array<uint64_t, kLanes> out;
        for (int l = 0; l < kLanes; ++l) {
          const float x = a[l] != a[l] ? 0.f : std::trunc(a[l]);
          out[l] = in.has(U64) ? uint64_t(std::clamp(x, 0.f, 18446742974197923840.f))
                   : in.has(U32)
                       ? uint64_t(std::clamp(double(x), 0., 4294967295.))
                       : uint64_t(int64_t(std::clamp(double(x), -2147483648., 2147483647.)));
        }
        if (in.has(U64) || in.has(S64)) {
          set_pair(o[0], out, lanes);
        } else {
          each(in, lanes, [&](int l) { return uint32_t(out[l]); });
        }
        break;
      }
      case F2FP: {
        const auto high = floats(o[1]), low = floats(o[2]);
        each(in, lanes, [&](int l) {
          const auto round = [&](float x) {
            return in.has(BF16) ? float_to_bfloat(x) : float_to_half(x);
          };
          return round(low[l]) | uint32_t(round(high[l])) << 16;
        });
        break;
      }
      case HADD2:
        if (in.has(F32)) {  // -0 + the half: a conversion
          if (o[1].index != kZero) fail(in.text);
          const Lanes a = bits(o[2]);
          each(in, lanes, [&](int l) {
            const float x = half_to_float(uint16_t(a[l] >> 16 * o[2].part));
            return as_bits(o[2].negate ? -x : x);
          });
          break;
        }
        [[fallthrough]];
      case HMUL2:
      case HFMA2:
      case HMNMX2:
      case VHMNMX:
        packed(in, lanes);
        break;
      case HMMA:
        multiply_matrices(in);
        break;
      case LDC: {
        const Lanes index = o[1].index == kZero ? Lanes{} : registers_[o[1].index];
        const uint32_t start = o[1].value + uniform(o[1].uniform);
        std::array<Lanes, 4> words{};  // all are read before one is written
        for (int w = 0; w < std::max(in.bytes / 4, 1); ++w) {
          for (int l = 0; l < kLanes; ++l) {
            if (!(lanes >> l & 1)) continue;
            const uint32_t offset = start + index[l] + 4 * w;
            const uint32_t word = constant(offset & ~3u) >> 8 * (offset & 3);
            words[w][l] = in.bytes >= 4 ? word : word & ((1u << 8 * in.bytes) - 1);
          }
        }
        for (int w = 0; w < std::max(in.bytes / 4, 1); ++w) set(o[0], words[w], lanes, w);
        break;
      }
      case LDG:
      case LD:
      case LDS:
      case LDL:
        return load(in, lanes);
      case STG:
      case ST:
      case STS:
      case STL:
        return store(in, lanes);
      case LDSM:
        return load_matrices(in);
      case LDGSTS:
        copy_async(in, lanes);
        return 4;
      case RED:
      case REDG: {
        const Lanes value = bits(o[1]);
        if (!in.has(MAX) && !(in.has(ADD) && in.has(F32))) fail("a reduction");
        for (int l = 0; l < kLanes; ++l) {
          if (!(lanes >> l & 1)) continue;
          uint32_t word;
          uint8_t* to = global(address(o[0], l), 4);
          std::memcpy(&word, to, 4);
          word =
              in.has(MAX) ? std::max(word, value[l]) : as_bits(as_float(word) + as_float(value[l]));
          std::memcpy(to, &word, 4);
        }
        return 4;
      }
      case ATOMG: {
        if (!in.has(ADD) || in.has(F32)) fail("an atomic operation");
        const Lanes value = bits(o[3]);
        note_sectors(o[2], lanes, 4);
        Lanes old{};
        for (int l = 0; l < kLanes; ++l) {
          if (!(lanes >> l & 1)) continue;
          uint8_t* at = global(address(o[2], l), 4);
          std::memcpy(&old[l], at, 4);
          const uint32_t sum = old[l] + value[l];
          std::memcpy(at, &sum, 4);
        }
        set(o[1], old, lanes);
        return 4;
      }
      case kUnknown:
        fail("an instruction that execute() in walk.cpp does not know yet:");
      default:
        break;  // waits and hints
    }
    return 0;
  }

  Lanes modified(const Instruction& in, const Operand& o) const {
    if (in.op == SEL) return ints(o);
    const auto values = floats(o);
    Lanes out;
    for (int l = 0; l < kLanes; ++l) out[l] = as_bits(values[l]);
    return out;
  }
};

// Wakes the warps at barriers where as many have arrived as those wait for.
bool wake(const std::vector<std::unique_ptr<Warp>>& warps) {
  constexpr int kBarriers = 16;
  int alive = 0, arrived[kBarriers] = {}, expected[kBarriers] = {};
  for (const auto& warp : warps) {
    alive += warp->status != Warp::kDone;
    for (int barrier : warp->arrived) ++arrived[barrier];
    if (warp->status != Warp::kAtBarrier) continue;
    ++arrived[warp->barrier];
    expected[warp->barrier] = warp->expected;
  }
  bool any = false;
  for (auto& warp : warps) {
    const int b = warp->barrier;
    if (warp->status != Warp::kAtBarrier || arrived[b] < (expected[b] ? expected[b] : alive))
      continue;
    warp->status = Warp::kRunning;
    any = true;
    for (auto& other : warps) std::erase(other->arrived, b);
  }
  return any;
}

thread_local string error;

}  // namespace

extern "C" {

const char* last_error() { return error.c_str(); }

// `text`: a line for each instruction, with guard, opcode and operands between tabs.
void* load_kernel(const char* text) {
  try {
    auto kernel = std::make_unique<Kernel>();
    std::istringstream lines(text);
    for (string line; std::getline(lines, line);) {
      const size_t first = line.find('\t'), second = line.find('\t', first + 1);
      kernel->code.push_back(parse(line.substr(0, first),
                                   line.substr(first + 1, second - first - 1),
                                   line.substr(second + 1)));
    }
    return kernel.release();
  } catch (const std::exception& caught) {
    error = caught.what();
    return nullptr;
  }
}

void free_kernel(void* kernel) { delete static_cast<Kernel*>(kernel); }

// Runs block (x, y) of a grid. `streamed`: of each range whether it comes from DRAM. Returns the number of events of all its warps, -1 on an error;
// `sizes` gets the number of each warp's. The events stay until the thread's next call.
int64_t walk_block(void* kernel, const uint8_t* params, int params_bytes, int params_at,
                   const uint64_t* ranges, const uint8_t* streamed, int num_ranges, int threads,
                   int threads_x, int x, int y, int grid_x, int grid_y, int64_t* sizes,
                   const uint32_t** events, int64_t* bytes_moved) {
  static thread_local std::vector<uint32_t> all;
  try {
    Launch launch;
    launch.constants.assign(kConstantBytes + 4, 0);
    launch.x = x;
    launch.y = y;
    launch.threads_x = threads_x;
    // blockDim, gridDim
    const int constants[] = {threads_x, threads / threads_x, 1, grid_x, grid_y, 1};
    std::memcpy(launch.constants.data(), constants, sizeof constants);
    std::memcpy(&launch.constants[0x28], &kLocalBytes, 4);  // the top of the stack
    std::memcpy(&launch.constants[params_at], params, params_bytes);
    for (int i = 0; i < num_ranges; ++i)
      launch.ranges.push_back({ranges[2 * i], ranges[2 * i + 1], streamed[i] != 0});
    std::vector<uint8_t> shared(kSharedBytes);
    std::vector<std::unique_ptr<Warp>> warps;
    for (int w = 0; w < threads / kLanes; ++w) {
      warps.push_back(
          std::make_unique<Warp>(*static_cast<Kernel*>(kernel), launch, shared.data(), w));
    }
    const auto running = [&] {
      return std::any_of(warps.begin(), warps.end(),
                         [](const auto& warp) { return warp->status != Warp::kDone; });
    };
    while (running()) {
      for (auto& warp : warps) {
        if (warp->status == Warp::kRunning) warp->run();
      }
      if (!wake(warps) && running()) fail("warps wait at barriers that nobody reaches");
    }
    all.clear();
    *bytes_moved = 0;
    for (size_t w = 0; w < warps.size(); ++w) {
      *bytes_moved += warps[w]->bytes_moved;
      sizes[w] = int64_t(warps[w]->events.size());
      all.insert(all.end(), warps[w]->events.begin(), warps[w]->events.end());
    }
    *events = all.data();
    return int64_t(all.size());
  } catch (const std::exception& caught) {
    error = caught.what();
    return -1;
  }
}

}  // extern "C"
