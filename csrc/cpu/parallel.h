// Threads and scratch memory.
//
// Work is always cut so that one output element is computed by one thread in an order that does not depend
// on the cut: results are bitwise identical for every number of threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_THREAD__)
// torch's pool hands work over by means that ThreadSanitizer does not see; these two tell it. Their argument is
// an address only: of something global, which can be named before anything that was handed over is read.
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
#else
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
#endif

namespace sparsekit {

// How many threads a piece of work deserves; waking one costs as much as some microseconds of work.
inline int64_t parts_for(double nanoseconds) {
  constexpr double kWorthAThread = 6000;
  if (nanoseconds < 2 * kWorthAThread) return 1;
  return std::min<int64_t>(torch::stable::get_num_threads(), int64_t(nanoseconds / kWorthAThread));
}

// f(part) for part in [0, parts).
template <class F>
void for_parts(int64_t parts, const F& f) {
  if (parts <= 1) {
    if (parts == 1) f(int64_t(0));
    return;
  }
  static char begun, ended;
  const auto share = [&](int64_t begin, int64_t end) {
    __tsan_acquire(&begun);
    for (int64_t part = begin; part < end; ++part) f(part);
    __tsan_release(&ended);
  };
  __tsan_release(&begun);
  torch::stable::parallel_for(0, parts, 1, share);
  __tsan_acquire(&ended);
}

// The bounds of `part` when [0, total) is cut into `parts` with cuts at multiples of `unit`.
struct Span {
  int64_t begin, end;
};
inline Span cut(int64_t total, int64_t parts, int64_t part, int64_t unit = 1) {
  const int64_t units = (total + unit - 1) / unit;
  return {std::min(total, units * part / parts * unit), std::min(total, units * (part + 1) / parts * unit)};
}

// Rows holding an equal share of the survivors (plus a constant cost for each row).
inline Span cut_rows(const int32_t* crow, int64_t rows, int64_t parts, int64_t part, int64_t unit) {
  constexpr int64_t kRowCost = 8;
  const auto cost = [&](int64_t r) { return crow[r] + kRowCost * r; };
  const auto bound = [&](int64_t which) -> int64_t {
    if (which == parts) return rows;
    const int64_t goal = cost(rows) * which / parts;
    int64_t low = 0, high = rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (cost(middle) < goal) low = middle + 1;
      else high = middle;
    }
    return std::min(rows, (low + unit / 2) / unit * unit);
  };
  return {bound(part), bound(part + 1)};
}

// Grow-only scratch memory of one thread. Slots are independent; their content is undefined.
class Workspace {
 public:
  enum Slot { kX, kDy, kValues, kTable, kOffsets, kTile, kCursor, kStage, kGrad, kSlots };

  static Workspace& mine() {
    thread_local Workspace workspace;
    return workspace;
  }

  template <class T>
  T* get(Slot slot, int64_t count) {
    Block& block = blocks_[slot];
    // One spare line at the end: a kernel may read (never use) a vector past the last element.
    const size_t bytes = (size_t(std::max<int64_t>(count, 0)) * sizeof(T) + 127) / 64 * 64;
    if (bytes > block.bytes) {
      std::free(block.data);
      block = {};
      block.data = std::aligned_alloc(64, bytes);
      if (block.data == nullptr) throw std::bad_alloc();
      block.bytes = bytes;
    }
    return static_cast<T*>(block.data);
  }

  // Called at the end of an operator: keep what the next call is likely to need, give back the excess.
  void trim() {
    constexpr size_t kKeep = size_t(64) << 20;
    size_t kept = 0;
    for (Block& block : blocks_) {
      if (kept + block.bytes > kKeep) {
        std::free(block.data);
        block = {};
      }
      kept += block.bytes;
    }
  }

  ~Workspace() {
    for (Block& block : blocks_) std::free(block.data);
  }

 private:
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
  };
  Block blocks_[kSlots];
};

}  // namespace sparsekit
