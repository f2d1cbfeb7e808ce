#include "conv_code.h"

#include <cmath>
#include <cstring>
#include <list>
#include <mutex>

#include "evex.h"
#include "machine_code.h"

#if defined(SPARSEKIT_X86) && defined(__linux__)
#include <sys/mman.h>
#endif

namespace sparsekit {
namespace {

// When code pays, in nanoseconds as measured on Zen 4: per line it saves some for every survivor, which must make up
// for each activation loaded and for fetching the code itself, once per call.
constexpr double kSaved = 0.12, kLoad = 0.2, kFetchByte = 0.05;
constexpr double kMostCode = 8 << 20;
constexpr size_t kCacheBytes = size_t(64) << 20;
constexpr int64_t kSurvivorBytes = 7, kLoadBytes = 10, kPieceBytes = 24 << 10;

using Function = void (*)(const float* x, const float* values, float* y, const float* bias);

// Memory that is written first and executed later, never both; null where the system forbids it.
#if defined(SPARSEKIT_X86) && defined(__linux__)
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
void* executable(const void*, size_t) { return nullptr; }
void release(void*, size_t) {}
#endif

// First and last column of every row, and where rows begin: a mask hardly changes and keeps them all.
std::vector<int32_t> outline(const Lists& lists) {
  std::vector<int32_t> all;
  all.reserve(size_t(3 * lists.rows));
  for (int64_t r = 0; r < lists.rows; ++r) {
    const int32_t begin = lists.crow[r], end = lists.crow[r + 1];
    all.insert(all.end(), {end, begin < end ? lists.index[begin] : -1, begin < end ? lists.index[end - 1] : -1});
  }
  return all;
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

int64_t blocks_of(int64_t rows) { return (rows + ConvCode::kBlockRows - 1) / ConvCode::kBlockRows; }

// Pairs of a block and a column that meet, if at random.
double meetings(const Lists& lists, int64_t columns) {
  const double places = double(blocks_of(lists.rows) * columns);
  return places * (1 - std::exp(-double(lists.nnz) / places));
}

// Whether code for these lists would pay: a function of sizes alone, so that equal calls give equal bits.
bool pays(const Lists& lists, int64_t columns, int64_t lines) {
  const double nnz = double(lists.nnz), loads = meetings(lists, columns);
  const double bytes = kSurvivorBytes * nnz + kLoadBytes * loads;
  return bytes <= kMostCode && double(lines) * (kSaved * nnz - kLoad * (loads - 0.5 * nnz)) > kFetchByte * bytes;
}

}  // namespace

ConvCode::ConvCode(const Lists& lists, const std::vector<int32_t>& of_column, int64_t stride)
    : rows_(lists.rows), nnz_(lists.nnz), stride_(stride), blocks_(blocks_of(lists.rows)), outline_(outline(lists)),
      of_column_(of_column) {
  block_rows_ = (rows_ + blocks_ - 1) / blocks_;
  blocks_ = (rows_ + block_rows_ - 1) / block_rows_;
  const int64_t columns = int64_t(of_column.size());
  const int64_t bytes = int64_t(kSurvivorBytes * double(nnz_) + kLoadBytes * meetings(lists, columns));
  chunks_ = std::clamp<int64_t>(bytes / (blocks_ * kPieceBytes), 1, columns);
  const int64_t chunk = (columns + chunks_ - 1) / chunks_;
  chunks_ = (columns + chunk - 1) / chunk;

  std::vector<uint8_t> code;
  code.reserve(size_t(bytes + bytes / 8 + blocks_ * chunks_ * 1024));
  Writer write(code);
  struct Survivor {
    int32_t row, value;
  };
  std::vector<Survivor> survivors;
  std::vector<int32_t> start(size_t(chunk + 1)), from, cursor(lists.crow, lists.crow + rows_);
  for (int64_t block = 0; block < blocks_; ++block) {
    const int64_t first = row(block), count = row(block + 1) - first;
    for (int64_t c = 0; c < chunks_; ++c) {
      const int64_t begin = c * chunk, end = std::min(columns, begin + chunk);
      // The survivors of this piece, sorted by column: count, sum up, place.
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
      each([&](int32_t r, int32_t p, int64_t k) { survivors[start[k]++] = {r, p}; });
      from.assign(cursor.begin() + first, cursor.begin() + first + count);
      for (int64_t r = 0; r < count; ++r) {
        int32_t& p = cursor[first + r];
        while (p < lists.crow[first + r + 1] && lists.index[p] < end) ++p;
      }
      Weights weights(write, from.data(), cursor.data() + first, count);

      write.align();
      pieces_.push_back(code.size());
      write.begin();
      for (int r = 0; r < count; ++r) {
        if (c == 0) write.broadcast(r, kBias, r);
        else write.load_far(r, kY, r * stride * 4);
      }
      int32_t done = 0;
      for (int64_t k = 0, loaded = 0; k < end - begin; ++k) {
        if (start[k] == done) continue;  // start[k] is now the end of column k
        const int x = int(kBlockRows + loaded++ % 4);
        write.load_far(x, kX, int64_t(of_column[begin + k]) * 4);
        for (; done < start[k]; ++done) weights.multiply_add(survivors[done].row, x, survivors[done].value);
      }
      for (int r = 0; r < count; ++r) write.store_far(r, kY, r * stride * 4);
      write.finish();
    }
  }
  bytes_ = code.size();
  pages_ = executable(code.data(), bytes_);
}

ConvCode::~ConvCode() {
  if (pages_ != nullptr) release(pages_, bytes_);
}

Span ConvCode::extent(int64_t piece) const {
  const auto bound = [&](int64_t i) { return int64_t(i < int64_t(pieces_.size()) ? pieces_[i] : bytes_); };
  return {bound(piece), bound(piece + 1)};
}

void ConvCode::run(Span blocks, const float* x, const int32_t* starts, int64_t lines, const float* values,
                   const float* bias, float* y) const {
  static constexpr float kNoBias[kBlockRows] = {};
  char* pages = static_cast<char*>(pages_);
  for (int64_t c = 0; c < chunks_; ++c)
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const auto code = reinterpret_cast<Function>(pages + pieces_[block * chunks_ + c]);
      const float* start = bias ? bias + row(block) : kNoBias;
      float* to = y + (row(block) - row(blocks.begin)) * stride_;
      // Processors look ahead in data much better than in code: fetch the next piece while this one runs.
      const bool wrap = block + 1 == blocks.end;
      const Span next = wrap && c + 1 == chunks_ ? Span{0, 0}
                        : extent(wrap ? blocks.begin * chunks_ + c + 1 : (block + 1) * chunks_ + c);
      for (int64_t t = 0; t < lines; ++t) {
        const Span share = cut(next.end - next.begin, lines, t, 64);
        for (int64_t i = share.begin; i < share.end; i += 64) __builtin_prefetch(pages + next.begin + i, 0, 2);
        code(x + starts[t], values, to + t * 16, start);
      }
    }
}

std::shared_ptr<const ConvCode> ConvCode::find(const Tensor& key, const Lists& lists,
                                               const std::vector<int32_t>& of_column, int64_t stride, int64_t lines) {
  struct Entry {
    uint64_t key[2];
    std::shared_ptr<const ConvCode> code;
  };
  static std::mutex mutex;
  static std::list<Entry>& entries = *new std::list<Entry>;  // most recently used first; never torn down
  static bool refused = false;  // a policy that changed since the probe is asked once
  STD_TORCH_CHECK(key.is_cpu() && key.scalar_type() == ScalarType::Long && key.dim() == 1 && key.size(0) == 2 &&
                      key.is_contiguous(),
                  "Expected code_key of dtype int64 and shape [2] on the CPU, got shape ", shape_of(key));
  if (lists.nnz == 0 || MachineCode::available() != "yes" || !pays(lists, int64_t(of_column.size()), lines))
    return nullptr;
  const auto* wanted = static_cast<const uint64_t*>(key.const_data_ptr());

  const std::lock_guard<std::mutex> lock(mutex);
  for (auto e = entries.begin(); e != entries.end(); ++e)
    if (e->key[0] == wanted[0] && e->key[1] == wanted[1] && e->code->describes(lists, of_column, stride)) {
      entries.splice(entries.begin(), entries, e);
      return e->code;
    }
  if (refused || !ascend(lists)) return nullptr;
  const std::shared_ptr<const ConvCode> code(new ConvCode(lists, of_column, stride));
  if (code->pages_ == nullptr) {
    refused = true;
    return nullptr;
  }
  entries.push_front({{wanted[0], wanted[1]}, code});
  size_t held = 0;
  for (auto e = entries.begin(); e != entries.end();) {
    held += e->code->bytes_;
    e = held > kCacheBytes && e != entries.begin() ? entries.erase(e) : std::next(e);
  }
  return code;
}

bool ConvCode::describes(const Lists& lists, const std::vector<int32_t>& of_column, int64_t stride) const {
  return lists.rows == rows_ && lists.nnz == nnz_ && stride == stride_ && of_column == of_column_ &&
         outline(lists) == outline_;
}

Span ConvCode::share(int64_t parts, int64_t part) const {
  const auto bound = [&](int64_t which) -> int64_t {
    if (which == parts) return blocks_;
    const size_t goal = bytes_ * size_t(which) / size_t(parts);
    int64_t block = 0;
    while (block < blocks_ && pieces_[block * chunks_] < goal) ++block;
    return block;
  };
  return {bound(part), bound(part + 1)};
}

}  // namespace sparsekit
