// Checked views of what every operator on blocks receives.
#pragma once
#include "tensors.h"

namespace sparsekit {

// Outputs and inputs of a block.
struct Block {
  int64_t rows, cols;
  int64_t size() const { return rows * cols; }
};

inline Block check_block(const char* op, int64_t rows, int64_t cols) {
  const auto side = [](int64_t s) { return s == 1 || (s >= 4 && s <= 128 && (s & (s - 1)) == 0); };
  STD_TORCH_CHECK(side(rows) && side(cols), op, ": Expected blocks of sides 1, 4, 8, 16, 32, 64 or 128, got ", rows,
                  "x", cols);
  return {rows, cols};
}

inline Block check_blocks(const char* op, const Tensor& values, const Tensor& x, const char* x_name, int64_t count) {
  check_same_dtype(op, "values", values, x_name, x);
  STD_TORCH_CHECK(values.dim() == 3 && values.size(0) == count && values.is_contiguous(), op,
                  ": Expected contiguous values of shape [", count, ", R, C], got ", shape_of(values));
  return check_block(op, values.size(1), values.size(2));
}

// `lists` cover `extent` outputs in steps of `side`, and none of their blocks lies beyond `reach` inputs.
inline void check_extents(const char* op, const Lists& lists, const char* name, int64_t extent, int64_t side,
                          const char* reach_name, int64_t reach, int64_t reach_side) {
  STD_TORCH_CHECK(lists.rows == (extent + side - 1) / side, op, ": Expected the lists of ", extent, " ", name,
                  " in blocks of ", side, ", got ", lists.rows, " lists");
  const int64_t needed = largest_index(lists) + 1, got = (reach + reach_side - 1) / reach_side;
  STD_TORCH_CHECK(needed <= got, op, ": Expected ", reach_name, " of at least ", (needed - 1) * reach_side + 1,
                  " features (", needed, " blocks of ", reach_side, "), got ", reach);
}

}  // namespace sparsekit
