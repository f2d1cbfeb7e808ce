// The seam between drivers (which know torch) and micro-kernels (which know one instruction set).
//
// This header is included by translation units that are compiled several times with different
// instruction-set flags. It must therefore contain plain data only: no std or torch header and no inline
// function, or the linker could keep the AVX-512 copy of something that everybody calls.
#pragma once
#include <stdint.h>

namespace sparsekit {

// Activations are packed so that one 64-byte line holds the same feature of kLanes samples.
template <class T>
constexpr int kLanes = 64 / sizeof(T);

// How an element is stored in a user's tensor. Arithmetic is always in T (float or double).
// kPairs is only read: two bfloat16 that lie some way apart become the halves of one float.
enum Storage { kNative = 0, kBFloat16 = 1, kHalf = 2, kPairs = 3 };

// Y[row][0 .. lines) (+)= sum over p in [begin[row], end[row]) of values[p] * base[offset(index[p])]
template <class T>
struct Product {
  const T* base;         // the dense operand
  const int32_t* index;  // per survivor: a row of a packed panel, or an element offset into base
  bool index_is_offset;  // otherwise offset = index * lines * kLanes
  const T* values;
  const int32_t* begin;  // per row, relative to the first row of this call
  const int32_t* end;
  int64_t rows;
  const T* bias;    // per row, or null
  bool accumulate;  // continue from what y holds instead of starting from bias
  T* y;
  int64_t y_stride;
};

// dvalues[p] (+)= sum over q of dy[row][q] * base[offset(index[p]) + q]
template <class T>
struct Sddmm {
  const T* base;
  const int32_t* index;
  bool index_is_offset;
  const T* dy;
  int64_t dy_stride;
  const int32_t* begin;
  const int32_t* end;
  int64_t rows;
  int32_t first, last;  // only survivors in [first, last) belong to this call
  bool accumulate;
  T* dvalues;
};

// A 2-D piece of a tensor: `lanes` (at most kLanes) samples by `count` elements.
// Packed side: element j of all samples is one line at packed + j * packed_stride.
// Tensor side: element j of sample i is at tensor + i * lane_stride + j * step.
template <class T>
struct Transfer {
  T* packed;
  int64_t packed_stride;
  void* tensor;
  int64_t lane_stride, step;
  int64_t lanes, count;
  int64_t second = 0;  // of kPairs: from one bfloat16 to its partner
};

// `rows` rows of `count` elements: contiguous on the packed side, any strides on the tensor side.
template <class T>
struct Rows {
  T* packed;
  int64_t packed_stride;
  void* tensor;
  int64_t row_stride, step;
  int64_t rows, count;
  int64_t second = 0;  // as above
};

// dw[i][j] = sum over s of dy[s][i] * x[s][j] where mask[i][j], else exactly 0, for rows i in [first, last).
template <class T>
struct MaskedProduct {
  const T* dy;
  int64_t dy_stride;
  const T* x;
  int64_t x_stride, samples, inputs;
  const uint8_t* mask;  // as dw [outputs][inputs]
  T* dw;
  int64_t first, last;
};

// Lists of blocks times packed activations: per list `rows` outputs, per block `depth` input features.
// y[(list * rows + r) * y_stride + n] = bias + sum over b in [begin[list], end[list]), k < depth of
//     values[which[b] * block + r * row_step + k * k_step] * panel[index[b] * index_step + k * x_stride + n]
// for `width` samples n side by side.
template <class T>
struct BsrProduct {
  const T* panel;
  int64_t features, width;  // a block may stick out of the features; what sticks out is not read
  int64_t index_step, x_stride, y_stride;
  const int32_t* index;
  const int32_t* depths;  // per block its features that are there, or null: those of block index[b] of `features`
  const int32_t* which;  // or null: the blocks lie in order
  const T* values;
  int64_t block;  // weights of a block
  int64_t rows, row_step, depth, k_step;
  const int32_t* begin;  // per list
  const int32_t* end;
  int64_t lists;
  const T* bias;  // per output, or null
  T* y;
  int64_t odd;  // of `columns` alone
};

// The widest panel, in samples.
template <class T>
constexpr int kMaxSamples = 8 * kLanes<T>;

// sums[j][r] (+)= sum over samples t of dy[t][r] * panel[index[j] * index_step + t], lanes outputs r of which `rows`
// are there and `inputs` features j, a multiple of 16. The sums of absent rows are meaningless.
// dy[t][r] lies at t * sample_stride + r * row_stride; one of the strides is 1.
template <class T>
struct BsrSddmm {
  const T* panel;
  int64_t index_step, width, samples;  // the panel's samples, and how many of them are there
  const T* dy;
  int64_t sample_stride, row_stride, rows;
  const int32_t* index;
  int64_t inputs;
  bool accumulate;
  T* sums;
};

// The kernels exist for numbers, and for pairs of bfloat16: there values, panel and dy hold two bfloat16 in place
// of each float, which are multiplied apart and summed together.
template <class T>
struct BlockKernels {
  void (*product)(const BsrProduct<T>&);
  // The transposed product of blocks of one input: y[index[b]] += sum over k of values[b * depth + k] *
  // panel[list * depth + k] for b in [begin[list], end[list]). `rows`, `which`, the steps and bias are not read.
  void (*spread)(const BsrProduct<T>&);
  void (*sddmm)(const BsrSddmm<T>&, int lanes);  // lanes: 1, 4, 8, ... at most vector_lanes
  // Of pairs alone: the product of blocks of one input and 8, 16, ... outputs. values are bfloat16, the panel holds
  // pairs of samples; the sums of the first of each pair go to y, those of the second `odd` further. `which`, the
  // steps of a block and its depth are not read.
  void (*columns)(const BsrProduct<T>&);
};

// One row of a pooled image: to[j] = the largest of from[r * row_stride + j * step + s - pad] over r < rows and
// s < window, columns outside [0, width) left out; NaN wins. `line` is scratch for pad + width + window + 32 elements.
template <class T>
struct Pool {
  const T* from;
  int64_t row_stride, rows, width;
  int64_t window, step, pad;
  T* line;
  T* to;
  int64_t count;
};

// A weight in lanes (kernels/lanes/layout.py) times one sample or two: the sums of groups [first, last) of 64 rows.
struct LanesProduct {
  const float* x;  // rows of 64 inputs at least
  int64_t x_stride, samples;
  int64_t limit;  // where the last window of an input begins
  const uint8_t* codes;
  const void* values;
  const int32_t* bases;
  const int32_t* starts;
  int64_t first, last;
  float* sums;  // of the first group on
  int64_t sum_stride;
};

enum Activation { kNone = 0, kRelu = 1, kGelu = 2, kSilu = 3 };

// Of each channel, `rows` rows of `count` elements: to = activation(from + add), then `gap` zeros after each row of
// `to`, and `before` and `after` zeros around all. `to` may be `from`, with the same steps and no zeros.
template <class T>
struct Finish {
  struct Steps {
    int64_t channel, row;
  };
  const T* from;
  Steps from_step;
  const T* add;  // or null
  Steps add_step;
  T* to;
  Steps to_step;
  int64_t channels, rows, count, gap, before, after;
  Activation activation;
};

template <class T>
struct Kernels {
  int max_lines;    // widest product/sddmm, in lines
  int panel_lines;  // best panel width for a large batch, in lines
  int least_lines;  // narrowest panel whose products are bitwise those of panel_lines

  void (*product)(const Product<T>&, int lines);
  void (*sddmm)(const Sddmm<T>&, int lines);
  // y[row] = bias[row] + sum values[p] * x[index[p]]
  void (*dot)(const Product<T>&);
  // cursor_out[row] = first p >= cursor[row] with p == end[row] or index[p] >= limit, where the indices from
  // cursor[row] to end[row] lie in [first, last).
  void (*advance)(const int32_t* index, const int32_t* cursor, const int32_t* end, int32_t* cursor_out, int64_t rows,
                  int32_t first, int32_t limit, int32_t last);
  T (*sum)(const T*, int64_t count);

  BlockKernels<T> numbers;
  BlockKernels<T> pairs;  // all null without an instruction for them
  void (*block_vector)(const BsrProduct<T>&);  // one sample of numbers: width = 1, no bias
  int vector_lanes;
  // to[r * count + i] = the pair of from[r * step + i] and from[r * step + second + i]
  void (*interleave)(const uint16_t* from, int64_t second, int64_t step, void* to, int64_t rows, int64_t count);
  void (*activate)(T*, int64_t count, Activation);
  void (*finish)(const Finish<T>&);
  void (*pool)(const Pool<T>&);
  void (*pool_lines)(const Pool<T>&);  // the same of kLanes images side by side: every element is a line; no scratch
  // to[r][j] = the largest of from[2 r .. 2 r + 1][2 j .. 2 j + 1] of rows of 2 * half elements; NaN wins
  void (*pool_pairs)(const T* from, T* to, int64_t rows, int64_t half);

  // Indexed by Storage.
  void (*pack[4])(const Transfer<T>&);    // unused lanes become zero
  void (*unpack[3])(const Transfer<T>&);  // unused lanes are not written
  void (*load[4])(const Rows<T>&);        // tensor to packed
  void (*store[3])(const Rows<T>&);       // packed to tensor
  // y[i] += x[i * step], two tensors of one storage
  void (*add[3])(void* y, const void* x, int64_t step, int64_t count);
  void (*gather[3])(T* to, const void* from, const int32_t* which, int64_t count);
  void (*masked_product)(const MaskedProduct<T>&);
  void (*clear_pruned)(T* grad, const uint8_t* mask, int64_t count);  // exactly 0 where the mask is
};

struct Isa {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
  void (*lanes[4])(const LanesProduct&);  // indexed by the Storage of the values, and kLanesInt8
};
constexpr int kLanesInt8 = 3;

}  // namespace sparsekit
