// What the scheduler (emu.cpp) and the operations that threads wait in (operations.cpp) know of a running launch.
#pragma once

#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "emu.h"

#if defined(EMU_TSAN)
extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace emu {

// What happens after acquire(a) comes after everything that any thread did before its release(a).
inline void acquire([[maybe_unused]] void* address) {
#if defined(EMU_TSAN)
  __tsan_acquire(address);
#endif
}
inline void release([[maybe_unused]] void* address) {
#if defined(EMU_TSAN)
  __tsan_release(address);
#endif
}

struct Fiber;

constexpr int kWarp = 32, kMaxThreads = 1024, kMaxBarriers = 16, kMaxPieces = 64, kMaxCopies = 512;
constexpr size_t kAlignment = 128, kGuard = 128;
constexpr unsigned char kGuardByte = 0xfd;

enum class State { kReady, kAtWarp, kAtBarrier, kReturned };

struct Thread {
  Fiber* fiber = nullptr;
  uint3 index{};
  int number = 0;  // in the block
  State state = State::kReady;
  At where;               // of the call it waits in
  int barrier = 0;        // which one it waits at
  const void* input = nullptr;
  void* output = nullptr;
  int pieces = 0;         // of shared memory taken so far
  Copy copies[kMaxCopies];
  int group[kMaxCopies];  // of each copy; they ascend
  int first_copy = 0, last_copy = 0, open_group = 0;
};

// Lanes arrive with their operands; the last one computes for all.
struct Warp {
  Thread* lane[kWarp];
  int order[kWarp];
  int arrived = 0;
  At where;
  uint64_t priority = 0;
  unsigned generation = 0;
  char order_of_memory[2];  // addresses that stand for __syncwarp's effect on memory
};

struct Barrier {
  int arrived = 0, expected = 0;
  At where;
  int first_thread = 0;
  unsigned generation = 0;
  char order_of_memory[2];
};

struct Piece {
  unsigned char* data;
  size_t bytes;
};

// Everything about the launch that is running. One OS thread runs one launch at a time.
struct Launch {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  Barrier barriers[kMaxBarriers];
  std::vector<Piece> pieces;
  std::vector<Piece> kept;  // pieces of earlier blocks that must not be reused yet
  size_t shared_limit = 0, shared_used = 0;
  const std::function<void()>* body = nullptr;
  std::mt19937_64 random;
  int alive = 0;
  bool failed = false;
  char start_of_memory, end_of_memory;
};

extern Launch* active;
extern Thread* current;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::string place(At at);
bool same(At a, At b);
std::string name(const Thread& t);
// The current thread waits until somebody makes it ready.
void wait(State state, At at);
// Another warp becomes the fastest.
void set_priorities();

}  // namespace emu
