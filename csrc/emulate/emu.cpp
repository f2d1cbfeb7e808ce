// The scheduler: one fiber per CUDA thread, blocks one after another, all on the calling OS thread.
//
// A fiber runs until it waits: at a barrier, at a warp operation, or because its kernel returned. The warp with the
// highest random priority runs first and as far as it can, so a fast warp overtakes a slow one wherever no barrier
// forbids it. This file is compiled without sanitizers: EMU_ASAN and EMU_TSAN make it tell them about fibers and about
// the order that barriers give to memory.
#include "emu.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "fiber.h"
#include "warp_arithmetic.h"

namespace emu {

Device device;

namespace {

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

// Reused by all launches. Two sets when races are looked for: a block that ran on the fibers of its predecessor would
// look like the same threads going on, and a race between the two would be hidden.
#if defined(EMU_TSAN)
constexpr int kFiberSets = 2;
#else
constexpr int kFiberSets = 1;
#endif
Fiber fibers[kFiberSets][kMaxThreads];

uint64_t chosen_seed = 0;
std::string last_error;

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

Launch* active = nullptr;
Thread* current = nullptr;

std::string place(At at) {
  std::string file = at.file_name();
  file = file.substr(file.find_last_of('/') + 1);
  return file + ":" + std::to_string(at.line());
}

bool same(At a, At b) {
  return a.line() == b.line() && a.column() == b.column() && std::string_view(a.file_name()) == b.file_name();
}

std::string name(const Thread& t) {
  return "thread " + std::to_string(t.number) + " of block " + std::to_string(blockIdx.x) +
         (gridDim.y > 1 || gridDim.z > 1 ? "," + std::to_string(blockIdx.y) + "," + std::to_string(blockIdx.z) : "");
}

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The current thread waits until somebody makes it ready.
void wait(State state, At at) {
  current->state = state;
  current->where = at;
  leave_fiber(*current->fiber, false);
}

void run_thread() {
  acquire(&active->start_of_memory);
  try {
    (*active->body)();
    if (current->first_copy != current->last_copy)
      throw Error(name(*current) + " returned with asynchronous copies in flight: cp_async_wait<0>() is missing");
  } catch (const std::exception& error) {
    active->failed = true;
    last_error = error.what();
  }
  release(&active->end_of_memory);
  current->state = State::kReturned;
  --active->alive;
  leave_fiber(*current->fiber, true);
  std::abort();  // a fiber that returned is never entered again
}

void set_priorities() {
  for (size_t w = 0; w < active->warps.size(); ++w)
    active->warps[w].priority = chosen_seed == 0 ? ~w : chosen_seed == 1 ? w : active->random();
}

void explain_deadlock() {
  const Thread *waits = nullptr, *other = nullptr;
  for (const auto& t : active->threads) {
    if (t->state == State::kReturned) continue;
    if (!waits) waits = t.get();
  }
  for (const auto& t : active->threads)
    if (t->state != waits->state || (t->state != State::kReturned && !same(t->where, waits->where))) other = t.get();
  last_error = "deadlock: " + name(*waits) + " waits at " + place(waits->where);
  if (other && other->state == State::kReturned) last_error += " but " + name(*other) + " has returned";
  else if (other) last_error += " but " + name(*other) + " waits at " + place(other->where);
  else last_error += " for threads that do not exist";
}

void run_block(uint64_t block_number) {
  Launch& l = *active;
  const int threads = int(l.threads.size());
  for (Barrier& b : l.barriers) b = Barrier{};
  for (size_t w = 0; w < l.warps.size(); ++w) {
    Warp& warp = l.warps[w];
    warp.arrived = 0;
    for (int i = 0; i < kWarp; ++i) {
      warp.lane[i] = l.threads[w * kWarp + i].get();
      warp.order[i] = chosen_seed == 1 ? kWarp - 1 - i : i;
    }
    if (chosen_seed > 1) std::shuffle(warp.order, warp.order + kWarp, l.random);
  }
  set_priorities();
  for (int i = 0; i < threads; ++i) {
    Thread& t = *l.threads[i];
    t.state = State::kReady;
    t.pieces = t.first_copy = t.last_copy = t.open_group = 0;
    t.fiber = &fibers[block_number % kFiberSets][i];
    start_fiber(*t.fiber, run_thread);
  }
  l.alive = threads;
  std::vector<Warp*> by_priority;
  while (l.alive > 0 && !l.failed) {
    Warp* best = nullptr;
    for (Warp& warp : l.warps) {
      const bool ready = std::any_of(warp.lane, warp.lane + kWarp, [](Thread* t) { return t->state == State::kReady; });
      if (ready && (!best || warp.priority > best->priority)) best = &warp;
    }
    if (!best) {
      explain_deadlock();
      l.failed = true;
      break;
    }
    for (int i = 0; i < kWarp && !l.failed; ++i) {
      Thread& t = *best->lane[best->order[i]];
      if (t.state != State::kReady) continue;
      current = &t;
      threadIdx = t.index;
      enter_fiber(*t.fiber);
      current = nullptr;
    }
  }
}

void check_guards() {
#if !defined(EMU_ASAN)
  for (size_t i = 0; i < active->pieces.size(); ++i) {
    const Piece& p = active->pieces[i];
    for (size_t b = 0; b < kGuard; ++b)
      if (p.data[p.bytes + b] != kGuardByte)
        throw Error("block " + std::to_string(blockIdx.x) + " wrote behind its piece " + std::to_string(i) +
                    " of shared memory (" + std::to_string(p.bytes) + " bytes)");
  }
#endif
}

void drop_pieces() {
#if defined(EMU_TSAN)
  // Reused memory would look shared between blocks.
  active->kept.insert(active->kept.end(), active->pieces.begin(), active->pieces.end());
#else
  for (Piece& p : active->pieces) std::free(p.data);
#endif
  active->pieces.clear();
  active->shared_used = 0;
}

void run_grid(dim3 grid, dim3 block, size_t shared_bytes) {
  if (block.y != 1 || block.z != 1 || block.x == 0 || block.x % kWarp || block.x > kMaxThreads)
    throw Error("a block of " + std::to_string(block.x) + " x " + std::to_string(block.y) + " x " +
                std::to_string(block.z) + " threads: expected x a multiple of 32 up to 1024, y and z 1");
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw Error("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                std::to_string(grid.z) + " blocks: at most 2^31 - 1 x 65535 x 65535");
  if (shared_bytes > size_t(device.shared_bytes))
    throw Error(std::to_string(shared_bytes) + " bytes of shared memory: a block has at most " +
                std::to_string(device.shared_bytes));
  Launch& l = *active;
  blockDim = block;
  gridDim = grid;
  l.shared_limit = shared_bytes;
  l.random.seed(chosen_seed);
  l.warps.resize(block.x / kWarp);
  for (unsigned i = 0; i < block.x; ++i) {
    l.threads.push_back(std::make_unique<Thread>());
    l.threads.back()->number = int(i);
    l.threads.back()->index = {i, 0, 0};
  }
  l.pieces.reserve(kMaxPieces);
  release(&l.start_of_memory);

  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  if (chosen_seed == 1) std::reverse(order.begin(), order.end());
  if (chosen_seed > 1) std::shuffle(order.begin(), order.end(), l.random);
  uint64_t done = 0;
  for (const uint64_t b : order) {
    blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    run_block(done++);
    if (l.failed) return;
    check_guards();
    drop_pieces();
  }
}

}  // namespace

cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  auto state = std::make_unique<Launch>();
  active = state.get();
  active->body = &body;
  enter_scheduler();
  try {
    run_grid(grid, block, shared_bytes);
  } catch (const Error& error) {
    last_error = error.what();
    active->failed = true;
  }
  const bool failed = active->failed;
  acquire(&active->end_of_memory);
  if (failed)
    for (auto& set : fibers)
      for (size_t i = 0; i < active->threads.size(); ++i)
        if (set[i].stack) forget_fiber(set[i]);
  drop_pieces();
  for (Piece& p : active->kept) std::free(p.data);
  active = nullptr;
  return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

void fail(At at, const char* sentence, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, sentence);
  std::vsnprintf(text, sizeof text, sentence, arguments);
  va_end(arguments);
  throw Error(place(at) + ": " + text + " (" + name(*current) + ")");
}

// ---- barriers ----

void barrier(int id, int threads, At at) {
  if (id < 0 || id >= kMaxBarriers) fail(at, "barrier %d: there are %d", id, kMaxBarriers);
  const int all = int(active->threads.size());
  if (threads == 0) threads = all;
  if (threads % kWarp || threads < 0 || threads > all) fail(at, "a barrier of %d of %d threads", threads, all);
  Barrier& b = active->barriers[id];
  if (b.arrived == 0) {
    b.expected = threads;
    b.where = at;
    b.first_thread = current->number;
  } else if (!same(b.where, at) && id == 0) {
    fail(at, "mismatched barriers: thread %d waits at %s", b.first_thread, place(b.where).c_str());
  } else if (b.expected != threads) {
    fail(at, "barrier %d of %d threads, thread %d waits for %d", id, threads, b.first_thread, b.expected);
  }
  char* memory = &b.order_of_memory[b.generation & 1];
  release(memory);
  current->barrier = id;
  if (++b.arrived == b.expected) {
    b.arrived = 0;
    ++b.generation;
    for (auto& t : active->threads)
      if (t->state == State::kAtBarrier && t->barrier == id) t->state = State::kReady;
    if (id == 0 && active->random() % 4 == 0) set_priorities();
  } else {
    wait(State::kAtBarrier, at);
  }
  acquire(memory);
}

namespace {

// All lanes of the current warp meet; the last to come calls combine.
template <class F>
void meet(const void* input, void* output, At at, const F& combine) {
  Warp& warp = active->warps[current->number / kWarp];
  current->input = input;
  current->output = output;
  if (warp.arrived == 0) {
    warp.where = at;
  } else if (!same(warp.where, at)) {
    Thread** waiting = warp.lane;
    while ((*waiting)->state != State::kAtWarp) ++waiting;
    fail(at, "divergent warp operations: %s waits at %s", name(**waiting).c_str(), place(warp.where).c_str());
  }
  if (++warp.arrived < kWarp) return wait(State::kAtWarp, at);
  warp.arrived = 0;
  combine(warp);
  for (Thread* t : warp.lane)
    if (t->state == State::kAtWarp) t->state = State::kReady;
}

int lane() { return current->number % kWarp; }

}  // namespace

void sync_warp(At at) {
  Warp& warp = active->warps[current->number / kWarp];
  char* memory = &warp.order_of_memory[warp.generation & 1];
  release(memory);
  meet(nullptr, nullptr, at, [](Warp& w) { ++w.generation; });
  acquire(memory);
}

uint64_t shuffle(Shuffle kind, uint64_t value, int argument, At at) {
  const int own = lane();
  int source = kind == Shuffle::kXor    ? own ^ argument
               : kind == Shuffle::kUp   ? own - argument
               : kind == Shuffle::kDown ? own + argument
                                        : argument;
  if (kind == Shuffle::kIndex || kind == Shuffle::kXor) {
    if (source < 0 || source >= kWarp) fail(at, "a shuffle from lane %d", source);
  } else if (source < 0 || source >= kWarp) {
    source = own;
  }
  struct Input {
    uint64_t value;
    int source;
  } const input{value, source};
  uint64_t result = 0;
  meet(&input, &result, at, [](Warp& w) {
    for (Thread* t : w.lane)
      *static_cast<uint64_t*>(t->output) =
          static_cast<const Input*>(w.lane[static_cast<const Input*>(t->input)->source]->input)->value;
  });
  return result;
}

unsigned ballot(bool predicate, At at) {
  unsigned result = 0;
  meet(&predicate, &result, at, [](Warp& w) {
    unsigned votes = 0;
    for (int i = 0; i < kWarp; ++i) votes |= unsigned(*static_cast<const bool*>(w.lane[i]->input)) << i;
    for (Thread* t : w.lane) *static_cast<unsigned*>(t->output) = votes;
  });
  return result;
}

void ldmatrix(int count, bool transposed, const uint32_t* row, uint32_t* r, At at) {
  meet(row, r, at, [&](Warp& w) {
    const uint16_t* rows[kWarp];
    uint32_t* out[kWarp];
    for (int i = 0; i < kWarp; ++i) {
      rows[i] = static_cast<const uint16_t*>(w.lane[i]->input);
      out[i] = static_cast<uint32_t*>(w.lane[i]->output);
    }
    warp_ldmatrix(count, transposed, rows, out);
  });
}

void mma(Mma kind, float* d, const uint32_t* a, const uint32_t* b, uint32_t metadata, int selector, At at) {
  struct Input {
    const uint32_t *a, *b;
    uint32_t metadata;
  } const input{a, b, metadata};
  meet(&input, d, at, [&](Warp& w) {
    Fragments f;
    for (int i = 0; i < kWarp; ++i) {
      const Input& in = *static_cast<const Input*>(w.lane[i]->input);
      f.a[i] = in.a, f.b[i] = in.b, f.metadata[i] = in.metadata;
      f.d[i] = static_cast<float*>(w.lane[i]->output);
    }
    warp_mma(kind, f, selector);
  });
}

// ---- shared memory ----

void* take(size_t bytes, size_t charge, At at) {
  Launch& l = *active;
  const size_t number = size_t(current->pieces++);
  if (number == l.pieces.size()) {
    if (number == kMaxPieces) fail(at, "more than %d pieces of shared memory", kMaxPieces);
    l.shared_used += charge;
    if (l.shared_used > l.shared_limit)
      fail(at, "piece %zu ends at byte %zu of shared memory, the launch asked for %zu", number, l.shared_used,
           l.shared_limit);
    void* data = nullptr;
    const size_t guard =
#if defined(EMU_ASAN)
        0;
#else
        kGuard;
#endif
    if (posix_memalign(&data, kAlignment, bytes + guard) != 0) fail(at, "no memory for %zu bytes", bytes);
    std::memset(data, 0xff, bytes);
    std::memset(static_cast<char*>(data) + bytes, kGuardByte, guard);
    l.pieces.push_back({static_cast<unsigned char*>(data), bytes});
    release(data);
  }
  const Piece& piece = l.pieces[number];
  if (piece.bytes != bytes)
    fail(at, "piece %zu of shared memory has %zu bytes for another thread, %zu for this one", number, piece.bytes,
         bytes);
  acquire(piece.data);
  return piece.data;
}

void check_shared(const void* p, size_t bytes, const char* what, At at) {
  const auto* address = static_cast<const unsigned char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail(at, "%s at an address that is no multiple of %zu", what, bytes);
  for (const Piece& piece : active->pieces)
    if (address >= piece.data && address + bytes <= piece.data + piece.bytes) return;
  fail(at, "%s outside of shared memory", what);
}

// ---- asynchronous copies ----

void copy_issue(const Copy& copy, At at) {
  Thread& t = *current;
  if (t.last_copy == kMaxCopies) {  // make room: what has landed lies in front
    std::copy(t.copies + t.first_copy, t.copies + t.last_copy, t.copies);
    std::copy(t.group + t.first_copy, t.group + t.last_copy, t.group);
    t.last_copy -= t.first_copy;
    t.first_copy = 0;
    if (t.last_copy == kMaxCopies) fail(at, "more than %d copies of one thread in flight", kMaxCopies);
  }
  t.copies[t.last_copy] = copy;
  t.group[t.last_copy++] = t.open_group;
#if defined(EMU_ASAN)
  if (copy.bytes >= 8) __asan_poison_memory_region(copy.destination, copy.bytes);
#endif
}

void copy_commit() { ++current->open_group; }

bool copy_land(int pending, Copy* copy) {
  Thread& t = *current;
  if (t.first_copy == t.last_copy || t.group[t.first_copy] >= t.open_group - pending) return false;
  *copy = t.copies[t.first_copy++];
#if defined(EMU_ASAN)
  if (copy->bytes >= 8) __asan_unpoison_memory_region(copy->destination, copy->bytes);
#endif
  return true;
}

}  // namespace emu

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure) return emu::last_error.c_str();
  return error == cudaSuccess ? "no error" : "invalid argument";
}

extern "C" void sparsekit_emulate_seed(uint64_t seed) { emu::chosen_seed = seed; }
extern "C" void sparsekit_emulate_device(int multiprocessors, int shared_bytes) {
  emu::device = {multiprocessors, shared_bytes};
}
