#include "conv_code.h"

#include "evex.h"

namespace sparsekit {
namespace {

// When code pays, in nanoseconds as measured on Zen 4: per line it saves some for every survivor, which must make up
// for each activation loaded and for fetching the code itself, once per call.
constexpr double kSaved = 0.12, kLoad = 0.2, kFetchByte = 0.05;
constexpr double kMostCode = 8 << 20;
constexpr int64_t kSurvivorBytes = 7, kLoadBytes = 10, kPieceBytes = 24 << 10;

using Function = void (*)(const float* x, const float* values, float* y, const float* bias);

int64_t blocks_of(int64_t rows) { return (rows + ConvCode::kBlockRows - 1) / ConvCode::kBlockRows; }

// Columns that blocks load, if survivors lie at random.
double loads_of(const Lists& lists, int64_t columns) {
  return meetings(double(lists.nnz), double(blocks_of(lists.rows) * columns));
}

// Whether code for these lists would pay: a function of sizes alone, so that equal calls give equal bits.
bool pays(const Lists& lists, int64_t columns, int64_t lines) {
  const double nnz = double(lists.nnz), loads = loads_of(lists, columns);
  const double bytes = kSurvivorBytes * nnz + kLoadBytes * loads;
  return bytes <= kMostCode && double(lines) * (kSaved * nnz - kLoad * (loads - 0.5 * nnz)) > kFetchByte * bytes;
}

}  // namespace

ConvCode::ConvCode(const Lists& lists, const std::vector<int32_t>& of_column, int64_t stride)
    : rows_(lists.rows), nnz_(lists.nnz), stride_(stride), outline_(lists), of_column_(of_column),
      blocks_(blocks_of(lists.rows)) {
  block_rows_ = (rows_ + blocks_ - 1) / blocks_;
  blocks_ = (rows_ + block_rows_ - 1) / block_rows_;
  const int64_t columns = int64_t(of_column.size());
  const int64_t bytes = int64_t(kSurvivorBytes * double(nnz_) + kLoadBytes * loads_of(lists, columns));
  chunks_ = std::clamp<int64_t>(bytes / (blocks_ * kPieceBytes), 1, columns);
  const int64_t chunk = (columns + chunks_ - 1) / chunks_;
  chunks_ = (columns + chunk - 1) / chunk;

  std::vector<uint8_t> code;
  code.reserve(size_t(bytes + bytes / 8 + blocks_ * chunks_ * 1024));
  Writer write(code);
  PieceSorter sorter(lists, nullptr);
  for (int64_t block = 0; block < blocks_; ++block) {
    const int count = int(row(block + 1) - row(block));
    for (int64_t c = 0; c < chunks_; ++c) {
      const Span some{c * chunk, std::min(columns, (c + 1) * chunk)};
      const auto& survivors = sorter.take({row(block), row(block + 1)}, some);
      Weights weights(write, sorter.first(), sorter.last(), count);
      write.align();
      pieces_.push_back(code.size());
      write.begin();
      for (int r = 0; r < count; ++r) {
        if (c == 0) write.broadcast(r, kBias, r);
        else write.load_far(r, kY, r * stride * 4);
      }
      int loaded = 0, x = 0;
      int32_t column = -1;
      for (const auto [r, index, value] : survivors) {
        if (index != column) {
          column = index, x = int(kBlockRows) + loaded++ % 4;
          write.load_far(x, kX, int64_t(of_column[size_t(some.begin + column)]) * 4);
        }
        weights.multiply_add(r, x, value);
      }
      for (int r = 0; r < count; ++r) write.store_far(r, kY, r * stride * 4);
      write.finish();
    }
  }
  pages_.emplace(code);
}

Span ConvCode::extent(int64_t piece) const {
  const auto bound = [&](int64_t i) { return int64_t(i < int64_t(pieces_.size()) ? pieces_[i] : pages_->size()); };
  return {bound(piece), bound(piece + 1)};
}

void ConvCode::run(Span blocks, const float* x, const int32_t* starts, int64_t lines, const float* values,
                   const float* bias, float* y) const {
  static constexpr float kNoBias[kBlockRows] = {};
  for (int64_t c = 0; c < chunks_; ++c)
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const auto code = reinterpret_cast<Function>(pages_->data() + pieces_[block * chunks_ + c]);
      const float* start = bias ? bias + row(block) : kNoBias;
      float* to = y + (row(block) - row(blocks.begin)) * stride_;
      // The next piece is fetched while this one runs.
      const bool wrap = block + 1 == blocks.end;
      const Span next = wrap && c + 1 == chunks_ ? Span{0, 0}
                        : extent(wrap ? blocks.begin * chunks_ + c + 1 : (block + 1) * chunks_ + c);
      for (int64_t t = 0; t < lines; ++t) {
        pages_->prefetch(next, lines, t);
        code(x + starts[t], values, to + t * 16, start);
      }
    }
}

std::shared_ptr<const ConvCode> ConvCode::find(const Tensor& key, const Lists& lists,
                                               const std::vector<int32_t>& of_column, int64_t stride, int64_t lines) {
  check_code_key(key);
  if (lists.nnz == 0 || code_available() != "yes" || !pays(lists, int64_t(of_column.size()), lines)) return nullptr;
  return CodeCache<ConvCode>::all().find(
      key,
      [&](const ConvCode& c) {
        return c.nnz_ == lists.nnz && c.stride_ == stride && c.of_column_ == of_column && c.outline_.describes(lists);
      },
      [&]() -> std::shared_ptr<const ConvCode> {
        if (!ascend(lists)) return nullptr;
        return std::shared_ptr<const ConvCode>(new ConvCode(lists, of_column, stride));
      });
}

Span ConvCode::share(int64_t parts, int64_t part) const {
  const auto bound = [&](int64_t which) -> int64_t {
    if (which == parts) return blocks_;
    const size_t goal = pages_->size() * size_t(which) / size_t(parts);
    int64_t block = 0;
    while (block < blocks_ && pieces_[block * chunks_] < goal) ++block;
    return block;
  };
  return {bound(part), bound(part + 1)};
}

}  // namespace sparsekit
