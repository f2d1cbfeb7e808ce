#include "machine_code.h"

#include "evex.h"

namespace sparsekit {
namespace {

// When code pays, in nanoseconds as measured on Zen 4 and rounded to caution. Per tile it saves some for every
// survivor (more in the first, as other kernels favour wide batches), which must make up for each activation loaded,
// and then for fetching the code itself, once per call; from farther away when a training step ran in between.
constexpr double kSaved = 0.33, kSavedFirst = 0.15, kLoad = 0.38, kFetchByte = 0.045, kTrainingFactor = 1.5;
constexpr int64_t kMostCode = 10 << 20;

constexpr int64_t kSurvivorBytes = 7, kLoadBytes = 7, kPieceBytes = 20 << 10;
constexpr int64_t kLeastChunk = 512, kMostChunk = 1024;  // features of a piece of code

using Function = void (*)(const float* x, const float* values, float* y, const float* bias);

int64_t blocks_of(int64_t rows) { return (rows + MachineCode::kBlockRows - 1) / MachineCode::kBlockRows; }

// Whether code for these lists would pay: a function of sizes alone, so that equal calls give equal bits.
bool pays(const Lists& lists, bool transposed, int64_t features, int64_t samples) {
  const bool in_place = transposed && MachineCode::reads_in_place(lists, features);
  const double places = double(blocks_of(lists.rows) * features), nnz = double(lists.nnz);
  const double loads = meetings(nnz, places);
  const double bytes = kSurvivorBytes * nnz + (in_place ? 2 : 1) * kLoadBytes * loads;
  const double fetch = kFetchByte * bytes * (transposed ? kTrainingFactor : 1);
  const double tiles = double((samples + MachineCode::kLanes - 1) / MachineCode::kLanes);
  return bytes <= double(kMostCode) && tiles * (kSaved * nnz - kLoad * loads) + kSavedFirst * nnz > fetch;
}

}  // namespace

MachineCode::MachineCode(const Lists& lists, const int32_t* perm, bool transposed)
    : rows_(lists.rows), nnz_(lists.nnz), transposed_(transposed), outline_(lists), blocks_(blocks_of(lists.rows)) {
  block_rows_ = (rows_ + blocks_ - 1) / blocks_;
  blocks_ = (rows_ + block_rows_ - 1) / block_rows_;
  const int64_t features = largest_index(lists) + 1;
  const int64_t per_feature = kSurvivorBytes * lists.nnz / (blocks_ * features) + kLoadBytes;
  const int64_t target = std::clamp(kPieceBytes / per_feature, kLeastChunk, kMostChunk);
  chunks_ = (features + target - 1) / target;
  const int64_t chunk = (features + chunks_ - 1) / chunks_;

  std::vector<uint8_t> code;
  code.reserve(size_t(lists.nnz * kSurvivorBytes + std::min(lists.nnz, blocks_ * features) * kLoadBytes +
                      blocks_ * chunks_ * 1024));
  Writer write(code);
  PieceSorter sorter(lists, perm);
  for (int64_t block = 0; block < blocks_; ++block) {
    const int count = int(row(block + 1) - row(block));
    for (int64_t c = 0; c < chunks_; ++c) {
      const Span some{c * chunk, std::min(features, (c + 1) * chunk)};
      const auto& survivors = sorter.take({row(block), row(block + 1)}, some);
      Weights weights(write, sorter.first(), sorter.last(), count);
      write.align();
      pieces_.push_back({code.size(), some.begin});
      write.begin();
      for (int r = 0; r < count; ++r) {
        if (c == 0) write.broadcast(r, kBias, r);
        else write.load(r, kY, r);
      }
      int64_t reach = 0;  // the feature that the pointer to x stands at
      int loaded = 0;
      for (size_t i = 0, next; i < survivors.size(); i = next, ++loaded) {
        const int64_t k = survivors[i].index;
        for (next = i + 1; next < survivors.size() && survivors[next].index == k;) ++next;
        if (k - reach > 127) {
          const int64_t step = k + 128 - reach;
          write.add(kX, int32_t(step * 64));
          reach += step;
        }
        const int x = int(kBlockRows) + loaded % 4;
        write.load(x, kX, k - reach);
        // Values in the order of the weight's rows: those of one feature are neighbours, and nobody else's.
        const int32_t near = survivors[i].value;
        const bool anchored = perm && next - i > 1;
        if (anchored) write.point(kAnchors[0], near);
        for (; i < next; ++i) {
          const auto [r, index, value] = survivors[i];
          if (!perm) weights.multiply_add(r, x, value);
          else if (anchored && -128 <= value - near && value - near <= 127)
            write.multiply_add(r, x, kAnchors[0], value - near);
          else write.multiply_add(r, x, value);
        }
      }
      for (int r = 0; r < count; ++r) write.store(r, kY, r);
      write.finish();
    }
  }
  pages_.emplace(code);
}

Span MachineCode::extent(int64_t block, int64_t chunk) const {
  if (chunk == chunks_) return {0, 0};
  const size_t piece = size_t(block * chunks_ + chunk);
  return {int64_t(pieces_[piece].offset), int64_t(piece + 1 < pieces_.size() ? pieces_[piece + 1].offset : pages_->size())};
}

void MachineCode::run(Span blocks, int64_t tiles, const float* x, int64_t x_stride, const float* values,
                      const float* bias, float* y, int64_t y_stride) const {
  static constexpr float kNoBias[kBlockRows] = {};
  for (int64_t c = 0; c < chunks_; ++c)
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const Piece& piece = pieces_[size_t(block * chunks_ + c)];
      const auto code = reinterpret_cast<Function>(pages_->data() + piece.offset);
      const float* start = bias ? bias + row(block) : kNoBias;
      float* to = y + (row(block) - row(blocks.begin)) * kLanes;
      // The next piece is fetched while this one runs.
      const Span next = block + 1 < blocks.end ? extent(block + 1, c) : extent(blocks.begin, c + 1);
      for (int64_t t = 0; t < tiles; ++t) {
        pages_->prefetch(next, tiles, t);
        code(x + t * x_stride + piece.first_feature * kLanes, values, to + t * y_stride, start);
      }
    }
}

std::shared_ptr<const MachineCode> MachineCode::find(const Tensor& key, bool transposed, const Lists& lists,
                                                     const int32_t* perm, int64_t features, int64_t samples) {
  check_code_key(key);
  if (lists.nnz == 0 || code_available() != "yes" || !pays(lists, transposed, features, samples)) return nullptr;
  const auto code = CodeCache<MachineCode>::all().find(
      key, [&](const MachineCode& c) { return c.transposed_ == transposed; },
      [&]() -> std::shared_ptr<const MachineCode> {
        if (!ascend(lists)) return nullptr;
        for (int64_t p = 0; perm && p < lists.nnz; ++p)
          if (perm[p] < 0 || perm[p] >= lists.nnz) return nullptr;
        return std::shared_ptr<const MachineCode>(new MachineCode(lists, perm, transposed));
      });
  return code != nullptr && code->nnz_ == lists.nnz && code->outline_.describes(lists) ? code : nullptr;
}

bool MachineCode::reads_in_place(const Lists& lists, int64_t features) {
  constexpr int64_t kNeighbours = 4;  // as measured on Zen 4 at 64 samples
  return lists.nnz > kNeighbours * blocks_of(lists.rows) * features;
}

Span MachineCode::share(int64_t parts, int64_t part) const {
  const auto bound = [&](int64_t which) -> int64_t {
    if (which == parts) return blocks_;
    const size_t goal = pages_->size() * size_t(which) / size_t(parts);
    int64_t block = 0;
    while (block < blocks_ && pieces_[block * chunks_].offset < goal) ++block;
    return block;
  };
  return {bound(part), bound(part + 1)};
}

}  // namespace sparsekit
