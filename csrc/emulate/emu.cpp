// The scheduler: one fiber per CUDA thread, blocks one after another, all on the calling OS thread.
//
// A fiber runs until it waits: at a barrier, at a warp operation, or because its kernel returned. The warp with the
// highest random priority runs first and as far as it can, so a fast warp overtakes a slow one wherever no barrier
// forbids it. This file is compiled without sanitizers: EMU_ASAN and EMU_TSAN make it tell them about fibers and about
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <string_view>

#include "fiber.h"
#include "running.h"

namespace emu {

Device device;
Launch* active = nullptr;
Thread* current = nullptr;

namespace {

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

}  // namespace

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

void wait(State state, At at) {
  current->state = state;
  current->where = at;
  leave_fiber(*current->fiber, false);
}

void set_priorities() {
  for (size_t w = 0; w < active->warps.size(); ++w)
    active->warps[w].priority = chosen_seed == 0 ? ~w : chosen_seed == 1 ? w : active->random();
}

namespace {

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

}  // namespace emu

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure) return emu::last_error.c_str();
  return error == cudaSuccess ? "no error" : "invalid argument";
}

extern "C" void sparsekit_emulate_seed(uint64_t seed) { emu::chosen_seed = seed; }
extern "C" void sparsekit_emulate_device(int multiprocessors, int shared_bytes) {
  emu::device = {multiprocessors, shared_bytes};
}
