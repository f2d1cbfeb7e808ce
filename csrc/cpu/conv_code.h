// Machine code for the mask of a convolution: as machine_code.h does for a linear layer, with the place of every
// operand in the padded planes compiled in. Code serves one mask and one geometry of planes, whatever the values.
#pragma once
#include "code_pages.h"
#include "conv_table.h"

namespace sparsekit {

class ConvCode {
 public:
  static constexpr int64_t kBlockRows = 28;  // output channels in registers; four more hold activations

  // The code of the product of a table of one tile with planes of at most `reach` floats, whose results lie `stride`
  // floats apart, generated on first use; null where it would not pay for `lines` lines of 16 results per channel or
  // code cannot be had. key [2] names the mask's content.
  static std::shared_ptr<const ConvCode> find(const Tensor& key, const Lists& lists, const std::vector<int32_t>& of_column,
                                              int64_t stride, int64_t lines);

  const CodePages& pages() const { return *pages_; }
  // Cuts of the rows that fall between blocks of equal code.
  Span share(int64_t parts, int64_t part) const;
  int64_t blocks() const { return blocks_; }
  int64_t row(int64_t block) const { return std::min(rows_, block * block_rows_); }

  // y[row - row(blocks.begin)][line * 16 ...] of the rows of some blocks, for lines at starts[line] of x:
  // bias (of all rows, or null) plus the products.
  void run(Span blocks, const float* x, const int32_t* starts, int64_t lines, const float* values, const float* bias,
           float* y) const;

 private:
  ConvCode(const Lists& lists, const std::vector<int32_t>& of_column, int64_t stride);
  Span extent(int64_t piece) const;

  int64_t rows_, nnz_, stride_;
  Outline outline_;                 // of the mask, to notice a key that belongs to another
  std::vector<int32_t> of_column_;  // where in the planes a column of the weight reads
  int64_t blocks_, block_rows_, chunks_ = 0;
  std::vector<size_t> pieces_;  // [block][chunk], where its code begins
  std::optional<CodePages> pages_;
};

}  // namespace sparsekit
