#include "conv_code.h"

#include "evex.h"

namespace sparsekit {
namespace {

// When code pays, in nanoseconds as measured on Zen 4: per line it saves some for every survivor (more where lines of
// activations are not aligned, which code loads once for many), which must make up for each activation loaded and for
// fetching the code itself, once per call; from farther away when a training step ran in between.
constexpr double kSaved = 0.14, kSavedApart = 0.25, kLoad = 0.2, kFetchByte = 0.05, kTrainingFactor = 2.0;
constexpr double kMostCode = 8 << 20;
constexpr int64_t kNowhere = -1000;
constexpr int64_t kSurvivorBytes = 7, kLoadBytes = 10, kPieceBytes = 24 << 10;
constexpr int64_t kLead = 100;  // lines by which the pointer to x moves ahead of what is read: it reaches back 128

using Function = void (*)(const float* x, const float* values, float* y, const float* bias);

int64_t blocks_of(int64_t rows) { return (rows + ConvCode::kBlockRows - 1) / ConvCode::kBlockRows; }

// Columns that blocks load, if survivors lie at random.
double loads_of(int64_t nnz, int64_t rows, int64_t columns) {
  return meetings(double(nnz), double(blocks_of(rows) * columns));
}

// Whether code would pay: a function of sizes alone, so that equal calls give equal bits.
bool pays(const Tensor& key, const Grid<float>& grid, int64_t nnz, int64_t rows, int64_t columns, int64_t lines,
          double fetch) {
  check_code_key(key);
  // Places are compiled in as 32 bits of bytes.
  if (nnz == 0 || code_available() != "yes" || grid.size() >= int64_t(1) << 29) return false;
  const double loads = loads_of(nnz, rows, columns), bytes = kSurvivorBytes * double(nnz) + kLoadBytes * loads;
  const double saved = grid.lanes == 1 ? kSavedApart : kSaved;
  const double gain = saved * double(nnz) - kLoad * (loads - 0.5 * double(nnz));
  return bytes <= kMostCode && double(lines) * gain > fetch * bytes;
}

}  // namespace

CodeSource CodeSource::forward(const Conv& c, const Grid<float>& x, const Lists& lists) {
  CodeSource source;
  source.crow.assign(lists.crow, lists.crow + lists.rows + 1);
  source.index.assign(lists.index, lists.index + lists.nnz);
  source.of_column = column_offsets(c, x);
  return source;
}

CodeSource CodeSource::transposed(const Conv& c, const Grid<float>& dy, const Lists& t, const int32_t* perm,
                                  int64_t corner) {
  for (int64_t p = 0; p < t.nnz; ++p)
    if (perm[p] < 0 || perm[p] >= t.nnz) return {};
  CodeSource source;
  std::vector<std::pair<int32_t, int32_t>> row;  // column, place of its value
  source.crow.push_back(0);
  for (int64_t i = 0; i < c.in; ++i)
    for (int64_t phase = 0; phase < c.phases(); ++phase) {
      row.clear();
      for (int64_t tap = 0; tap < c.taps(); ++tap) {
        if ((tap / c.kw * c.dh % c.sh) * c.sw + tap % c.kw * c.dw % c.sw != phase) continue;
        for (int32_t p = t.crow[i * c.taps() + tap]; p < t.crow[i * c.taps() + tap + 1]; ++p)
          row.emplace_back(int32_t(t.index[p] * c.taps() + tap), perm[p]);
      }
      std::sort(row.begin(), row.end());
      for (const auto& [column, value] : row) source.index.push_back(column), source.perm.push_back(value);
      source.crow.push_back(int32_t(source.index.size()));
    }
  for (int64_t o = 0; o < c.out; ++o)
    for (int64_t tap = 0; tap < c.taps(); ++tap) {
      const int64_t y = tap / c.kw * c.dh, x = tap % c.kw * c.dw;
      source.of_column.push_back(
          int32_t(o * dy.channel_size() + (corner - y / c.sh * dy.pitch - x / c.sw) * dy.lanes));
    }
  return source;
}

ConvCode::ConvCode(const Lists& mask, const Geometry& geometry, const CodeSource& source)
    : rows_(int64_t(source.crow.size()) - 1), stride_(geometry.detail), outline_(mask), geometry_(geometry),
      blocks_(blocks_of(rows_)) {
  const Lists lists{source.crow.data(), source.index.data(), rows_, int64_t(source.index.size())};
  block_rows_ = (rows_ + blocks_ - 1) / blocks_;
  blocks_ = (rows_ + block_rows_ - 1) / block_rows_;
  const int64_t columns = int64_t(source.of_column.size());
  const int64_t bytes = int64_t(kSurvivorBytes * double(lists.nnz) + kLoadBytes * loads_of(lists.nnz, rows_, columns));
  // Small pieces read few inputs; where lines are whole groups of samples, these are large and should stay in L1.
  const int64_t piece = geometry.lanes == 1 ? kPieceBytes : kPieceBytes / 2;
  chunks_ = std::clamp<int64_t>(bytes / (blocks_ * piece), 1, columns);
  const int64_t chunk = (columns + chunks_ - 1) / chunks_;
  chunks_ = (columns + chunk - 1) / chunk;

  std::vector<uint8_t> code;
  code.reserve(size_t(bytes + bytes / 8 + blocks_ * chunks_ * 1024));
  Writer write(code);
  const int32_t* perm = source.perm.empty() ? nullptr : source.perm.data();
  PieceSorter sorter(lists, perm);
  for (int64_t c = 0; c < chunks_; ++c) {
    const Span some{c * chunk, std::min(columns, (c + 1) * chunk)};
    for (int64_t block = 0; block < blocks_; ++block) {
      const int count = int(row(block + 1) - row(block));
      const auto& survivors = sorter.take({row(block), row(block + 1)}, some);
      Weights weights(write, sorter.first(), sorter.last(), count);
      write.align();
      pieces_.push_back(code.size());
      write.begin();
      for (int r = 0; r < count; ++r) {
        if (c == 0) write.broadcast(r, kBias, r);
        else write.load_far(r, kY, r * stride_ * 4);
      }
      int loaded = 0, x = 0;
      int32_t column = -1;
      int64_t near = kNowhere;  // where an anchor points: the values of a few inputs of one output are neighbours
      int64_t reach = 0;        // the byte that the pointer to x stands at
      for (const auto [r, index, value] : survivors) {
        if (index != column) {
          column = index, x = int(kBlockRows) + loaded++ % 4;
          const int64_t from = int64_t(source.of_column[size_t(some.begin + column)]) * 4;
          if (geometry.lanes == 1) {
            write.load_far(x, kX, from);
          } else {  // whole lines: the short form reaches 128 of them either way
            if (from - reach < -128 * 64 || from - reach > 127 * 64) {
              write.add(kX, int32_t(from + 64 * kLead - reach));
              reach = from + 64 * kLead;
            }
            write.load(x, kX, (from - reach) / 64);
          }
        }
        if (perm == nullptr) {
          weights.multiply_add(r, x, value);
          continue;
        }
        if (value < near - 128 || value > near + 127) write.point(kAnchors[0], near = value);
        write.multiply_add(r, x, kAnchors[0], value - near);
      }
      for (int r = 0; r < count; ++r) write.store_far(r, kY, r * stride_ * 4);
      write.finish();
    }
  }
  pages_.emplace(code);
  before_.assign(size_t(blocks_ + 1), 0);
  for (int64_t block = 0; block < blocks_; ++block) {
    before_[size_t(block + 1)] = before_[size_t(block)];
    for (int64_t c = 0; c < chunks_; ++c) {
      const Span piece = extent(c * blocks_ + block);
      before_[size_t(block + 1)] += size_t(piece.end - piece.begin);
    }
  }
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
      const auto code = reinterpret_cast<Function>(pages_->data() + pieces_[c * blocks_ + block]);
      const float* start = bias ? bias + row(block) : kNoBias;
      float* to = y + (row(block) - row(blocks.begin)) * stride_;
      // The next piece is fetched while this one runs.
      const bool wrap = block + 1 == blocks.end;
      const Span next = wrap && c + 1 == chunks_ ? Span{0, 0} : extent(wrap ? (c + 1) * blocks_ + blocks.begin : c * blocks_ + block + 1);
      for (int64_t t = 0; t < lines; ++t) {
        pages_->prefetch(next, lines, t);
        code(x + starts[t], values, to + t * 16, start);
      }
    }
}

template <class Make>
std::shared_ptr<const ConvCode> ConvCode::find(const Tensor& key, const Lists& mask, const Geometry& geometry,
                                               const Make& make) {
  return CodeCache<ConvCode>::all().find(
      key, [&](const ConvCode& code) { return code.geometry_ == geometry && code.outline_.describes(mask); },
      [&]() -> std::shared_ptr<const ConvCode> {
        if (!ascend(mask)) return nullptr;
        const CodeSource source = make();
        if (source.crow.empty()) return nullptr;
        return std::shared_ptr<const ConvCode>(new ConvCode(mask, geometry, source));
      });
}

std::shared_ptr<const ConvCode> ConvCode::find_forward(const Tensor& key, const Conv& c, const Grid<float>& x,
                                                       const Lists& lists, int64_t stride, int64_t lines) {
  if (!pays(key, x, lists.nnz, lists.rows, c.in * c.taps(), lines, kFetchByte)) return nullptr;
  return find(key, lists, geometry_of(c, x, -1, stride), [&] { return CodeSource::forward(c, x, lists); });
}

std::shared_ptr<const ConvCode> ConvCode::find_transposed(const Tensor& key, const Conv& c, const Grid<float>& dy,
                                                          const Lists& t, const int32_t* perm, int64_t corner,
                                                          int64_t stride, int64_t lines) {
  if (!pays(key, dy, t.nnz, c.in * c.phases(), c.out * c.taps(), lines, kTrainingFactor * kFetchByte)) return nullptr;
  return find(key, t, geometry_of(c, dy, corner, stride),
              [&] { return CodeSource::transposed(c, dy, t, perm, corner); });
}

Span ConvCode::share(int64_t parts, int64_t part) const {
  const auto bound = [&](int64_t which) -> int64_t {
    if (which == parts) return blocks_;
    const size_t goal = before_.back() * size_t(which) / size_t(parts);
    return std::lower_bound(before_.begin(), before_.end(), goal) - before_.begin();
  };
  return {bound(part), bound(part + 1)};
}

}  // namespace sparsekit
