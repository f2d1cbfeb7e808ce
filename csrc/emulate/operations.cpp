// What the threads of a block wait in or share: barriers, warp operations, shared memory, asynchronous copies.
//
// Compiled without sanitizers, as the scheduler is: see emu.cpp.
#include <algorithm>
#include <cstring>

#if defined(EMU_ASAN)
#include <sanitizer/asan_interface.h>
#endif

#include "running.h"
#include "warp_arithmetic.h"

namespace emu {

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
