// Machine code for the mask of a convolution: as machine_code.h does for a linear layer, with the place of every
// operand in the padded planes compiled in. Code serves one mask and one geometry of planes, whatever the values.
#pragma once
#include "conv_table.h"

namespace sparsekit {

// A product of sparse rows with planes, as code is made for it: lists of one tile, where in the planes each of their
// columns reads, and where the value of each survivor lies (without perm they lie in the order of the lists).
struct CodeSource {
  std::vector<int32_t> crow, index, perm, of_column;

  // W as it is: rows are output channels.
  static CodeSource forward(const Conv& c, const Grid<float>& x, const Lists& lists);
  // The transpose: rows are (input channel, stride phase); `corner` as for transposed_table. Empty if perm is none.
  static CodeSource transposed(const Conv& c, const Grid<float>& dy, const Lists& t, const int32_t* perm,
                               int64_t corner);
};

class ConvCode {
 public:
  static constexpr int64_t kBlockRows = 28;  // output channels in registers; four more hold activations

  // The code of the product of W (or of its transpose, listed by column with the place of its values in `perm`) with
  // the planes of a grid, whose results lie `stride` floats apart, generated on first use; null where it would not pay
  // for `lines` lines of 16 results per row or code cannot be had. key [2] names the mask's content.
  static std::shared_ptr<const ConvCode> find_forward(const Tensor& key, const Conv& c, const Grid<float>& x,
                                                      const Lists& lists, int64_t stride, int64_t lines);
  static std::shared_ptr<const ConvCode> find_transposed(const Tensor& key, const Conv& c, const Grid<float>& dy,
                                                         const Lists& t, const int32_t* perm, int64_t corner,
                                                         int64_t stride, int64_t lines);

  bool usable() const { return bool(*pages_); }
  size_t bytes() const { return pages_->held(); }
  // Cuts of the rows that fall between blocks of equal code.
  Span share(int64_t parts, int64_t part) const;
  int64_t blocks() const { return blocks_; }
  int64_t row(int64_t block) const { return std::min(rows_, block * block_rows_); }

  // y[row - row(blocks.begin)][line * 16 ...] of the rows of some blocks, for lines at starts[line] of x:
  // bias (of all rows, or null) plus the products.
  void run(Span blocks, const float* x, const int32_t* starts, int64_t lines, const float* values, const float* bias,
           float* y) const;

 private:
  ConvCode(const Lists& mask, const Geometry& geometry, const CodeSource& source);
  template <class Make>
  static std::shared_ptr<const ConvCode> find(const Tensor& key, const Lists& mask, const Geometry& geometry,
                                              const Make& make);
  Span extent(int64_t piece) const;

  int64_t rows_, stride_;
  Outline outline_;  // of the mask, to notice a key that belongs to another
  Geometry geometry_;
  int64_t blocks_, block_rows_, chunks_ = 0;
  std::vector<size_t> pieces_;  // [chunk][block], the order in which they run: where its code begins
  std::vector<size_t> before_;  // [block], bytes of code of the blocks before it
  std::optional<CodePages> pages_;
};

}  // namespace sparsekit
