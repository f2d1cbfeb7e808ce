// Writes the few AVX-512 instructions that machine code is made of; plain bytes, so it compiles anywhere.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

namespace sparsekit {

enum Pointer { kBias = 1, kY = 2, kValues = 6, kX = 7 };  // rcx, rdx, rsi, rdi: the order of arguments reversed

// Registers that point into the values: a survivor near one takes 7 bytes instead of 10. The bias is read before
// rcx becomes one of them. r12 would need a longer form.
inline constexpr int kAnchors[] = {0, 1, 3, 5, 8, 9, 10, 11, 13, 14, 15};
inline constexpr int kAnchorCount = 11;

// One instruction per call, in its EVEX encoding with 64-byte registers where it has one.
class Writer {
 public:
  explicit Writer(std::vector<uint8_t>& code) : code_(code) {}

  // vmovups zmm, [pointer + 64 * line], for lines -128..127
  void load(int zmm, Pointer from, int64_t line) { short_form(0x10, zmm, from, line); }
  void store(int zmm, Pointer to, int64_t line) { short_form(0x11, zmm, to, line); }
  // The same anywhere: [pointer + byte]
  void load_far(int zmm, Pointer from, int64_t byte) { far_form(0x10, zmm, from, byte); }
  void store_far(int zmm, Pointer to, int64_t byte) { far_form(0x11, zmm, to, byte); }
  // vbroadcastss zmm, [pointer + 4 * element], for elements -128..127
  void broadcast(int zmm, Pointer from, int64_t element) {
    prefix(zmm, 0, 2, 1, false);
    bytes({0x18, modrm(1, zmm, from), uint8_t(int8_t(element))});
  }
  // vfmadd231ps sum, x, [values + 4 * element]{1to16}
  void multiply_add(int sum, int x, int64_t element) {
    prefix(sum, x, 2, 1, true);
    bytes({0xb8, modrm(2, sum, kValues)});
    number(int32_t(4 * element));
  }
  // The same relative to an anchor, for elements -128..127
  void multiply_add(int sum, int x, int anchor, int64_t element) {
    prefix(sum, x, 2, 1, true, anchor);
    bytes({0xb8, modrm(1, sum, anchor), uint8_t(int8_t(element))});
  }
  // lea anchor, [values + 4 * element]
  void point(int anchor, int64_t element) {
    bytes({uint8_t(anchor > 7 ? 0x4c : 0x48), 0x8d, modrm(2, anchor, kValues)});
    number(int32_t(4 * element));
  }
  void add(Pointer pointer, int32_t amount) {
    bytes({0x48, 0x81, uint8_t(0xc0 | pointer)});
    number(amount);
  }
  // endbr64; push rbx, rbp, r13, r14, r15
  void begin() { bytes({0xf3, 0x0f, 0x1e, 0xfa, 0x53, 0x55, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57}); }
  // pop them; vzeroupper; ret
  void finish() { bytes({0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x5d, 0x5b, 0xc5, 0xf8, 0x77, 0xc3}); }
  void align() {
    while (code_.size() % 64) code_.push_back(0xcc);
  }

 private:
  static uint8_t modrm(int mode, int reg, int base) { return uint8_t(mode << 6 | (reg & 7) << 3 | (base & 7)); }
  void bytes(std::initializer_list<uint8_t> b) { code_.insert(code_.end(), b); }
  void number(int32_t n) {
    uint8_t b[4];
    std::memcpy(b, &n, 4);
    code_.insert(code_.end(), b, b + 4);
  }
  // The four EVEX bytes; high bits of register numbers are stored inverted. pp: 0 none, 1 the 66 prefix.
  void prefix(int reg, int vvvv, int map, int pp, bool broadcast, int base = 0) {
    bytes({0x62, uint8_t((~reg >> 3 & 1) << 7 | 0x40 | (~base >> 3 & 1) << 5 | (~reg >> 4 & 1) << 4 | map),
           uint8_t((~vvvv & 15) << 3 | 4 | pp),
           uint8_t(0x40 | (broadcast ? 0x10 : 0) | (~vvvv >> 4 & 1) << 3)});
  }
  void short_form(uint8_t opcode, int zmm, Pointer base, int64_t line) {
    prefix(zmm, 0, 1, 0, false);
    bytes({opcode, modrm(1, zmm, base), uint8_t(int8_t(line))});
  }
  void far_form(uint8_t opcode, int zmm, Pointer base, int64_t byte) {
    prefix(zmm, 0, 1, 0, false);
    bytes({opcode, modrm(2, zmm, base)});
    number(int32_t(byte));
  }

  std::vector<uint8_t>& code_;
};

// Emits the multiply-adds of a piece, whose survivors come feature by feature, rows ascending. Groups of adjacent
// rows share an anchor, which moves on when one of them leaves its reach and the others have caught up.
class Weights {
 public:
  // A survivor that is further than this ahead of its group is addressed the long way.
  static constexpr int32_t kAhead = 200;

  // next[row], end[row]: the values of a row in this piece
  Weights(Writer& write, const int32_t* next, const int32_t* end, int64_t rows)
      : write_(write), next_(next, next + rows), end_(end, end + rows) {
    const int64_t apart = rows > 1 ? (next[rows - 1] - next[0]) / (rows - 1) : 0;
    group_ = apart <= 100 ? 3 : apart <= 200 ? 2 : 1;
    for (int32_t& at : at_) at = kNowhere;
  }

  void multiply_add(int row, int x, int32_t value) {
    const int group = row / group_;
    const bool near = group < kAnchorCount && reach(group, value);
    if (near) write_.multiply_add(row, x, kAnchors[group], value - at_[group]);
    else write_.multiply_add(row, x, value);
    next_[size_t(row)] = value + 1;
  }

 private:
  static constexpr int32_t kNowhere = -1000;

  // Whether a group's anchor is within 128 of a value, after moving it there if that serves the whole group.
  bool reach(int group, int32_t value) {
    int32_t& at = at_[group];
    if (at - 128 <= value && value <= at + 127) return true;
    int32_t low = value;
    for (size_t r = size_t(group * group_); r < std::min(next_.size(), size_t((group + 1) * group_)); ++r)
      if (next_[r] < end_[r]) low = std::min(low, next_[r]);
    if (value - low > kAhead) return false;
    at = low + 128;
    write_.point(kAnchors[group], at);
    return true;
  }

  Writer& write_;
  std::vector<int32_t> next_, end_;
  int group_;
  int32_t at_[kAnchorCount];  // the value that each anchor points at
};

}  // namespace sparsekit
