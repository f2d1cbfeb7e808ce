// Machine code for one mask, the fastest way to run an unstructured product.
//
// The survivors are compiled into straight-line AVX-512: a block of outputs stays in registers, every packed
// activation is loaded once per block, and each survivor is one multiply-add that broadcasts its weight from
// memory. Only positions are compiled in, so code serves all values that a mask ever holds.
#pragma once
#include "code_pages.h"

namespace sparsekit {

class MachineCode {
 public:
  static constexpr int64_t kLanes = 16;      // samples per tile: one zmm register
  static constexpr int64_t kBlockRows = 28;  // outputs in registers; four more hold activations

  // The code of the product of [samples, features] with lists, generated on first use; null where other kernels are
  // the better choice or code cannot be had. The value of survivor p is values[perm[p]], without perm values[p]. key
  // [2] names the mask's content: code is kept under it.
  static std::shared_ptr<const MachineCode> find(const Tensor& key, bool transposed, const Lists& lists,
                                                 const int32_t* perm, int64_t features, int64_t samples);

  // Whether code for permuted lists should read the values where they lie. Those of one feature and block are
  // neighbours there: enough of them pay for the cache line that they share, else gathering them all once is faster.
  static bool reads_in_place(const Lists& lists, int64_t features);

  bool usable() const { return bool(*pages_); }
  size_t bytes() const { return pages_->held(); }
  int64_t survivors() const { return nnz_; }
  int64_t blocks() const { return blocks_; }
  int64_t row(int64_t block) const { return std::min(rows_, block * block_rows_); }
  // Blocks of about an equal share of the code, and so of the work.
  Span share(int64_t parts, int64_t part) const;

  // y[tile][row - row(blocks.begin)][lane] of the rows of some blocks: bias (may be null) plus the products.
  // x points at tile 0 of packed activations [tile][feature][lane], x_stride floats per tile, y_stride likewise.
  void run(Span blocks, int64_t tiles, const float* x, int64_t x_stride, const float* values, const float* bias,
           float* y, int64_t y_stride) const;

 private:
  struct Piece {
    size_t offset;  // of its code
    int64_t first_feature;
  };

  MachineCode(const Lists& lists, const int32_t* perm, bool transposed);
  Span extent(int64_t block, int64_t chunk) const;  // of a piece, in bytes; empty after the last chunk

  int64_t rows_, nnz_;
  bool transposed_;
  Outline outline_;  // of the mask, to notice a key that belongs to another
  int64_t blocks_, block_rows_, chunks_ = 0;
  std::vector<Piece> pieces_;  // [block][chunk]
  std::optional<CodePages> pages_;
};

}  // namespace sparsekit
