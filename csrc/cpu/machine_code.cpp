#include "machine_code.h"

#include <cmath>
#include <cstring>
#include <list>
#include <mutex>

#include "evex.h"

#if defined(SPARSEKIT_X86) && defined(__linux__)
#include <sys/mman.h>
#endif

namespace sparsekit {
namespace {

// When code pays, in nanoseconds as measured on Zen 4 and rounded to caution. Per tile it saves some for every
// survivor (more in the first, as other kernels favour wide batches), which must make up for each activation loaded,
// and then for fetching the code itself, once per call; from farther away when a training step ran in between.
constexpr double kSaved = 0.3, kSavedFirst = 0.15, kLoad = 0.38, kFetchByte = 0.05, kTrainingFactor = 2.0;
constexpr int64_t kMostCode = 9 << 19;
constexpr size_t kCacheBytes = size_t(64) << 20;

constexpr int64_t kSurvivorBytes = 7, kLoadBytes = 7, kPieceBytes = 20 << 10;
constexpr int64_t kLeastChunk = 512, kMostChunk = 1024;  // features of a piece of code

using Function = void (*)(const float* x, const float* values, float* y, const float* bias);

// Memory that is written first and executed later, never both; null where the system forbids it.
#if defined(SPARSEKIT_X86) && defined(__linux__)
constexpr const char* kPlatform = nullptr;
void* executable(const void* code, size_t size) {
  void* pages = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) return nullptr;
  std::memcpy(pages, code, size);
  if (mprotect(pages, size, PROT_READ | PROT_EXEC) == 0) return pages;
  munmap(pages, size);
  return nullptr;
}
void release(void* pages, size_t size) { munmap(pages, size); }
#else
constexpr const char* kPlatform = "needs Linux on x86-64";
void* executable(const void*, size_t) { return nullptr; }
void release(void*, size_t) {}
#endif

std::string probe() {
  const char* wanted = std::getenv("SPARSEKIT_JIT");
  if (wanted != nullptr && std::strcmp(wanted, "0") == 0) return "switched off by SPARSEKIT_JIT=0";
  if (kPlatform != nullptr) return kPlatform;
  if (std::strncmp(active_isa().name, "avx512", 6) != 0) return "needs AVX-512";
  const uint8_t nothing = 0xc3;
  void* pages = executable(&nothing, 1);
  if (pages == nullptr) return "the system forbids executable memory";
  release(pages, 1);
  return "yes";
}

// First and last index of every row, and where rows begin: a mask hardly changes and keeps them all.
template <class F>
void outline(const Lists& lists, const F& f) {
  for (int64_t r = 0; r < lists.rows; ++r) {
    const int32_t begin = lists.crow[r], end = lists.crow[r + 1];
    f(end);
    f(begin < end ? lists.index[begin] : -1);
    f(begin < end ? lists.index[end - 1] : -1);
  }
}

// What the kernels require of lists, and a generator must not take on trust.
bool ascend(const Lists& lists) {
  for (int64_t r = 0; r < lists.rows; ++r) {
    if (lists.crow[r] > lists.crow[r + 1]) return false;
    int32_t last = -1;
    for (int32_t p = lists.crow[r]; p < lists.crow[r + 1]; last = lists.index[p++])
      if (lists.index[p] <= last) return false;
  }
  return true;
}

int64_t blocks_of(int64_t rows) { return (rows + MachineCode::kBlockRows - 1) / MachineCode::kBlockRows; }

// Whether code for these lists would pay: a function of sizes alone, so that equal calls give equal bits.
bool pays(const Lists& lists, bool transposed, int64_t features, int64_t samples) {
  const double places = double(blocks_of(lists.rows) * features), nnz = double(lists.nnz);
  const double loads = places * (1 - std::exp(-nnz / places));  // pairs of block and feature that meet, if at random
  const double bytes = kSurvivorBytes * nnz + (transposed ? 2 : 1) * kLoadBytes * loads;
  const double fetch = kFetchByte * bytes * (transposed ? kTrainingFactor : 1);
  const double tiles = double((samples + MachineCode::kLanes - 1) / MachineCode::kLanes);
  return bytes <= double(kMostCode) && tiles * (kSaved * nnz - kLoad * loads) + kSavedFirst * nnz > fetch;
}

}  // namespace

const std::string& MachineCode::available() {
  static const std::string reason = probe();
  return reason;
}

MachineCode::MachineCode(const Lists& lists, const int32_t* perm)
    : rows_(lists.rows), nnz_(lists.nnz), blocks_(blocks_of(lists.rows)) {
  block_rows_ = (rows_ + blocks_ - 1) / blocks_;
  blocks_ = (rows_ + block_rows_ - 1) / block_rows_;
  outline_.reserve(size_t(3 * rows_));
  outline(lists, [&](int32_t n) { outline_.push_back(n); });

  const int64_t features = largest_index(lists) + 1;
  const int64_t per_feature = kSurvivorBytes * lists.nnz / (blocks_ * features) + kLoadBytes;
  const int64_t target = std::clamp(kPieceBytes / per_feature, kLeastChunk, kMostChunk);
  chunks_ = (features + target - 1) / target;
  const int64_t chunk = (features + chunks_ - 1) / chunks_;

  std::vector<uint8_t> code;
  code.reserve(size_t(lists.nnz * kSurvivorBytes + std::min(lists.nnz, blocks_ * features) * kLoadBytes +
                      blocks_ * chunks_ * 1024));
  Writer write(code);
  struct Survivor {
    int32_t row, value;
  };
  std::vector<Survivor> survivors;
  std::vector<int32_t> start(size_t(chunk + 1)), from, cursor(lists.crow, lists.crow + rows_);
  for (int64_t block = 0; block < blocks_; ++block) {
    const int64_t first = row(block), count = row(block + 1) - first;
    for (int64_t c = 0; c < chunks_; ++c) {
      const int64_t begin = c * chunk, end = std::min(features, begin + chunk);
      // The survivors of this piece, sorted by feature: count, sum up, place.
      std::fill(start.begin(), start.end(), 0);
      int64_t total = 0;
      const auto each = [&](const auto& f) {
        for (int64_t r = 0; r < count; ++r)
          for (int32_t p = cursor[first + r]; p < lists.crow[first + r + 1] && lists.index[p] < end; ++p)
            f(int32_t(r), p, lists.index[p] - begin);
      };
      each([&](int32_t, int32_t, int64_t k) { ++start[k + 1], ++total; });
      for (int64_t k = 0; k < chunk; ++k) start[k + 1] += start[k];
      survivors.resize(size_t(total));
      each([&](int32_t r, int32_t p, int64_t k) { survivors[start[k]++] = {r, perm ? perm[p] : p}; });
      from.assign(cursor.begin() + first, cursor.begin() + first + count);
      for (int64_t r = 0; r < count; ++r) {
        int32_t& p = cursor[first + r];
        while (p < lists.crow[first + r + 1] && lists.index[p] < end) ++p;
      }
      Weights weights(write, from.data(), cursor.data() + first, count);

      write.align();
      pieces_.push_back({code.size(), begin});
      write.begin();
      for (int r = 0; r < count; ++r) {
        if (c == 0) write.broadcast(r, kBias, r);
        else write.load(r, kY, r);
      }
      int64_t reach = 0;  // the feature that the pointer to x stands at
      int32_t done = 0;
      for (int64_t k = 0, loaded = 0; k < end - begin; ++k) {
        if (start[k] == done) continue;  // start[k] is now the end of feature k
        if (k - reach > 127) {
          const int64_t step = k + 128 - reach;
          write.add(kX, int32_t(step * 64));
          reach += step;
        }
        const int x = int(kBlockRows + loaded++ % 4);
        write.load(x, kX, k - reach);
        if (!perm) {
          for (; done < start[k]; ++done) weights.multiply_add(survivors[done].row, x, survivors[done].value);
          continue;
        }
        // Values in the order of the weight's rows: those of one feature are neighbours, and nobody else's.
        const int32_t near = survivors[done].value;
        const bool several = start[k] - done > 1;
        if (several) write.point(kAnchors[0], near);
        for (; done < start[k]; ++done) {
          const int32_t value = survivors[done].value;
          if (several && -128 <= value - near && value - near <= 127)
            write.multiply_add(survivors[done].row, x, kAnchors[0], value - near);
          else write.multiply_add(survivors[done].row, x, value);
        }
      }
      for (int r = 0; r < count; ++r) write.store(r, kY, r);
      write.finish();
    }
  }
  bytes_ = code.size();
  pages_ = executable(code.data(), bytes_);
}

MachineCode::~MachineCode() {
  if (pages_ != nullptr) release(pages_, bytes_);
}

Span MachineCode::extent(int64_t block, int64_t chunk) const {
  if (chunk == chunks_) return {0, 0};
  const size_t piece = size_t(block * chunks_ + chunk);
  return {int64_t(pieces_[piece].offset), int64_t(piece + 1 < pieces_.size() ? pieces_[piece + 1].offset : bytes_)};
}

void MachineCode::run(Span blocks, int64_t tiles, const float* x, int64_t x_stride, const float* values,
                      const float* bias, float* y, int64_t y_stride) const {
  static constexpr float kNoBias[kBlockRows] = {};
  char* pages = static_cast<char*>(pages_);
  for (int64_t c = 0; c < chunks_; ++c)
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const Piece& piece = pieces_[size_t(block * chunks_ + c)];
      const auto code = reinterpret_cast<Function>(pages + piece.offset);
      const float* start = bias ? bias + row(block) : kNoBias;
      float* to = y + (row(block) - row(blocks.begin)) * kLanes;
      // Processors look ahead in data much better than in code: fetch the next piece while this one runs.
      const Span next = block + 1 < blocks.end ? extent(block + 1, c) : extent(blocks.begin, c + 1);
      for (int64_t t = 0; t < tiles; ++t) {
        const Span share = cut(next.end - next.begin, tiles, t, 64);
        for (int64_t i = share.begin; i < share.end; i += 64) __builtin_prefetch(pages + next.begin + i, 0, 2);
        code(x + t * x_stride + piece.first_feature * kLanes, values, to + t * y_stride, start);
      }
    }
}

std::shared_ptr<const MachineCode> MachineCode::find(const Tensor& key, bool transposed, const Lists& lists,
                                                     const int32_t* perm, int64_t features, int64_t samples) {
  struct Entry {
    uint64_t key[2];
    bool transposed;
    std::shared_ptr<const MachineCode> code;
  };
  static std::mutex mutex;
  static std::list<Entry>& entries = *new std::list<Entry>;  // most recently used first; never torn down
  STD_TORCH_CHECK(key.is_cpu() && key.scalar_type() == ScalarType::Long && key.dim() == 1 && key.size(0) == 2 &&
                      key.is_contiguous(),
                  "Expected code_key of dtype int64 and shape [2] on the CPU, got shape ", shape_of(key));
  static bool refused = false;  // a policy that changed since the probe is asked once
  if (lists.nnz == 0 || available() != "yes" || !pays(lists, transposed, features, samples)) return nullptr;
  const auto* wanted = static_cast<const uint64_t*>(key.const_data_ptr());

  const std::lock_guard<std::mutex> lock(mutex);
  for (auto e = entries.begin(); e != entries.end(); ++e)
    if (e->key[0] == wanted[0] && e->key[1] == wanted[1] && e->transposed == transposed) {
      if (!e->code->describes(lists)) return nullptr;
      entries.splice(entries.begin(), entries, e);
      return e->code;
    }
  if (refused) return nullptr;
  if (!ascend(lists)) return nullptr;
  for (int64_t p = 0; perm && p < lists.nnz; ++p)
    if (perm[p] < 0 || perm[p] >= lists.nnz) return nullptr;
  const std::shared_ptr<const MachineCode> code(new MachineCode(lists, perm));
  if (code->pages_ == nullptr) {
    refused = true;
    return nullptr;
  }
  entries.push_front({{wanted[0], wanted[1]}, transposed, code});
  size_t held = 0;
  for (auto e = entries.begin(); e != entries.end();) {
    held += e->code->bytes_;
    e = held > kCacheBytes && e != entries.begin() ? entries.erase(e) : std::next(e);
  }
  return code;
}

bool MachineCode::describes(const Lists& lists) const {
  if (lists.rows != rows_ || lists.nnz != nnz_) return false;
  bool same = true;
  size_t i = 0;
  outline(lists, [&](int32_t n) { same = same && outline_[i++] == n; });
  return same;
}

Span MachineCode::share(int64_t parts, int64_t part) const {
  const auto bound = [&](int64_t which) -> int64_t {
    if (which == parts) return blocks_;
    const size_t goal = bytes_ * size_t(which) / size_t(parts);
    int64_t block = 0;
    while (block < blocks_ && pieces_[block * chunks_].offset < goal) ++block;
    return block;
  };
  return {bound(part), bound(part + 1)};
}

}  // namespace sparsekit
