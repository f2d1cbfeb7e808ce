// What a panel product works on: sizes, work space, and the checks of a PanelShape. Words used by all panel files:
//
// panel     a block row (input gradient: a block column): kWidth = 8 or 16 neighbouring outputs that share columns
// unit      the D neighbouring rows of the source that one block meets
// tile      the panels of one thread block, all of one convolution group; `warps` warps with `per_warp` panels each
// chunk     a run of the tile's used units whose rows are resident in shared memory together
// fragment  `depth` gathered rows of a chunk by one panel: what one tensor core instruction multiplies
// octet     8 neighbouring tokens of one image line; lines are padded to whole octets
#pragma once

#include "launch.h"
#include "panel.h"
#include "ptx.cuh"

namespace sparsekit::cuda::panel {

constexpr int kMaxWarps = 16;
constexpr int kMaxChunk = 1024;
constexpr int kZeroRows = 8;  // behind the rows of a chunk, one for each set of banks
constexpr int kMaxSplit = 64;

// Where the source coordinate of position q of a feature-major copy lies, for kernel column s; -1: a zero.
struct Axis {
  int count, scale, offset, step, divisor, extent;
  SPARSEKIT_DEVICE int at(int q, int s) const {
    const int scaled = q * scale + offset + s * step;
    if (q >= count || scaled < 0 || scaled % divisor != 0) return -1;
    return scaled / divisor < extent ? scaled / divisor : -1;
  }
};

// The feature-major copy [copies][groups * padded][batch][lines][octets * 8] of an image [batch, height, width,
// groups * channels], one copy per kernel column: strides, padding, dilation and the zeros between the pixels of a
// strided input gradient are in the copy, so that every octet that a product reads is one aligned piece.
struct Source {
  int64_t batch;
  int lines, octets, copies, groups, channels, padded;
  Axis vertical, horizontal;

  SPARSEKIT_BOTH int64_t plane() const { return batch * lines * octets; }  // octets of one feature
  int64_t elements() const { return int64_t{copies} * groups * padded * batch * lines * octets * 8; }
};

// The tokens of the output, [batch][lines][octets * 8] with `width` tokens of a line real; output line l reads line
// `step * l` of the source. Octet q of the output starts at octet at(q) of each source feature.
struct Tokens {
  int64_t batch;
  int lines, octets, width, step, source_lines;

  SPARSEKIT_BOTH int64_t all() const { return batch * lines * octets; }
  SPARSEKIT_DEVICE int64_t at(int64_t q) const {
    const unsigned line = unsigned(q) / unsigned(octets), image = line / unsigned(lines);
    const int64_t source_line = int64_t{image} * source_lines + int64_t{line - image * unsigned(lines)} * step;
    return source_line * octets + (unsigned(q) - line * unsigned(octets));
  }
  // The number of token i of octet q among the real ones, -1 for padding.
  SPARSEKIT_DEVICE int64_t real(int64_t q, int i) const {
    const unsigned line = unsigned(q) / unsigned(octets), column = (unsigned(q) - line * unsigned(octets)) * 8 + i;
    return q < all() && int(column) < width ? int64_t{line} * width + column : -1;
  }
};

// The list of blocks and how it is cut into tiles, chunks and fragments.
struct Lists {
  const int32_t* starts;  // [groups * panels * starts_stride + 1] first entry of each panel at every starts_stride-th
  const int32_t* columns;  // [entries] tap * units + unit, ascending within a panel
  const int32_t* perm;     // [entries] which block of the values, or null: entry e is block e
  int starts_stride, entries;
  int groups, panels, width, outputs;  // panels and outputs of one group; the last panel may stick out
  int taps, taps_w, units;
  int unit_shift;          // a unit has 1 << unit_shift rows
  bool flipped;            // tap (r, s) reads the line of tap (kernel_h - 1 - r): input gradient
  int dilation;            // lines from one tap to the next
  int warps, per_warp, tiles;  // tiles of one group
  int chunk_units, max_chunks;
  int depth, classes;      // of a fragment; rows of `classes` neighbouring residues lie in different banks
  int64_t fragments;       // room for them

  SPARSEKIT_BOTH int tile_panels() const { return warps * per_warp; }
  SPARSEKIT_BOTH int all_units() const { return taps * units; }
  SPARSEKIT_BOTH int chunk_rows() const { return chunk_units << unit_shift; }
  SPARSEKIT_BOTH int unit_rows() const { return 1 << unit_shift; }
  SPARSEKIT_BOTH int all_tiles() const { return groups * tiles; }
  SPARSEKIT_BOTH int chunks(int used) const { return (used + chunk_units - 1) / chunk_units; }
  SPARSEKIT_BOTH int stream_length() const { return max_chunks * per_warp + 1; }
};

// Work space that plan_kernel and pack_kernel fill, all indices int32.
struct Plan {
  int32_t* used;      // [all tiles] units that a tile uses
  int32_t* rows;      // [all tiles][all units] where in the source the units it uses start, in octets
  int32_t* place;     // [entries] which of these an entry meets
  int32_t* bounds;    // [groups * panels][max_chunks + 1] entries of a panel, chunk by chunk
  int32_t* owner;     // [all tiles][warps][per_warp] panel within the group, -1: none
  int32_t* segments;  // [all tiles][warps][max_chunks][per_warp] first fragment; a warp's fragments are neighbours
  uint16_t* slots;    // [fragments][depth] TileLayout::slot of the row in the chunk; kZeroRows of zeros follow the last
  int32_t* origin;    // [fragments][depth] entry * unit_rows() + row within the unit, -1: none
  uint32_t* weights;  // [fragments][lane][width / 4] in the order of mma operand b; null where none are needed
};

// Hands out work space piece by piece, or only counts it when there is none yet.
class Carver {
 public:
  explicit Carver(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}
  template <class T>
  T* take(int64_t count) {
    const uintptr_t piece = base_ + static_cast<uintptr_t>(used_);
    used_ += round_up(count * int64_t(sizeof(T)), 256);
    return reinterpret_cast<T*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  uintptr_t base_;
  int64_t used_ = 0;
};

// ---- host: from a PanelShape to the above ----

struct Sizes {
  int64_t out_height, out_width;
  explicit Sizes(const PanelShape& s)
      : out_height((s.height + 2 * s.padding_h - s.dilation_h * (s.kernel_h - 1) - 1) / s.stride_h + 1),
        out_width((s.width + 2 * s.padding_w - s.dilation_w * (s.kernel_w - 1) - 1) / s.stride_w + 1) {}
};

// Why the kernels do not take a shape, or null.
inline const char* refusal(const PanelShape& s, bool transposed) {
  constexpr int64_t kMost = int64_t{1} << 30;
  for (const int64_t size : {s.in, s.out, s.kernel_h, s.kernel_w, s.stride_h, s.stride_w, s.dilation_h, s.dilation_w,
                             s.groups, s.height + 1, s.width + 1, s.batch + 1, s.blocks + 1})
    if (size < 1 || size > kMost) return "Expected sizes from 1 (batch, height, width, blocks: 0) to 2^30, got others";
  if (s.padding_h < 0 || s.padding_w < 0 || s.padding_h > 32768 || s.padding_w > 32768)
    return "Expected a padding from 0 to 32768, got another";
  if (max(s.stride_h, s.stride_w) > 32768 || max(s.dilation_h * s.kernel_h, s.dilation_w * s.kernel_w) > 32768)
    return "Expected strides and kernels that span at most 32768 pixels, got larger ones";
  if (s.in % s.groups != 0 || s.out % s.groups != 0) return "Expected groups that divide in and out, got others";
  if (s.rows != 8 && s.rows != 16) return "Expected blocks of 8 or 16 rows, got others";
  if (s.cols != 1 && s.cols != 4 && s.cols != 8 && s.cols != 16)
    return "Expected blocks of 1, 4, 8 or 16 columns, got others";
  if (transposed && s.cols < 8) return "Expected blocks of 8 or 16 columns for an input gradient, got narrower ones";
  if (s.dtype != kFloat32 && s.dtype != kFloat16 && s.dtype != kBFloat16)
    return "Expected float16, bfloat16 or float32, got another dtype";
  if (s.chunk < 0 || s.chunk > kMaxChunk || s.chunk % 16 != 0) return "Expected a chunk of 16, 32, ... 1024 rows";
  if (s.stages != 0 && (s.stages < 2 || s.stages > 4)) return "Expected 2 to 4 stages";
  if (s.split < 0 || s.split > kMaxSplit) return "Expected a split of at most 64";
  if (s.warps < 0 || s.warps > kMaxWarps || s.warps % 4 != 0) return "Expected 4, 8, 12 or 16 warps";
  const bool pixels = s.height > 0 && s.width > 0;
  if (!pixels && (s.kernel_h > 1 || s.kernel_w > 1 || s.padding_h > 0 || s.padding_w > 0))
    return "Expected an image with pixels, got an empty one";
  if (pixels && (s.height + 2 * s.padding_h < s.dilation_h * (s.kernel_h - 1) + 1 ||
                 s.width + 2 * s.padding_w < s.dilation_w * (s.kernel_w - 1) + 1))
    return "Expected an image at least as large as the kernel, got a smaller one";
  const int64_t blocks_in = ceil_div(s.in / s.groups, s.cols), blocks_out = ceil_div(s.out / s.groups, s.rows);
  const int64_t units = s.kernel_h * s.kernel_w * (transposed ? blocks_out : blocks_in);
  if (units > 800000) return "Expected at most 800000 blocks in a dense row of blocks, got more";
  if (s.blocks * s.rows * s.cols > int64_t{INT32_MAX} * 8 || s.blocks * 16 > INT32_MAX)
    return "Expected at most 2^27 blocks, got more";
  return nullptr;
}

inline bool has_tokens(const PanelShape& s) { return s.batch > 0 && s.height > 0 && s.width > 0; }

// The copy of x and where the output's tokens read it.
inline Source source_of_input(const PanelShape& s, int padded) {
  const Sizes o(s);
  const int lines = int((o.out_height - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1);
  return {s.batch, lines, int(ceil_div(o.out_width, 8)), int(s.kernel_w), int(s.groups), int(s.in / s.groups), padded,
          {lines, 1, int(-s.padding_h), 0, 1, int(s.height)},
          {int(o.out_width), int(s.stride_w), int(-s.padding_w), int(s.dilation_w), 1, int(s.width)}};
}
inline Tokens tokens_of_output(const PanelShape& s, const Source& x) {
  const Sizes o(s);
  return {s.batch, int(o.out_height), x.octets, int(o.out_width), int(s.stride_h), x.lines};
}

// The copy of dy, pixels `stride` apart with zeros between them, that makes the input gradient a convolution of
// stride 1 with the kernel turned around: dx[h] = sum over r of dy[(h + padding - r dilation) / stride].
inline Source source_of_gradient(const PanelShape& s, int padded) {
  const Sizes o(s);
  const int lines = int(s.height + (s.kernel_h - 1) * s.dilation_h);
  return {s.batch, lines, int(ceil_div(s.width, 8)), int(s.kernel_w), int(s.groups), int(s.out / s.groups), padded,
          {lines, 1, int(s.padding_h - (s.kernel_h - 1) * s.dilation_h), 0, int(s.stride_h), int(o.out_height)},
          {int(s.width), 1, int(s.padding_w), int(-s.dilation_w), int(s.stride_w), int(o.out_width)}};
}
inline Tokens tokens_of_input(const PanelShape& s, const Source& dy) {
  return {s.batch, int(s.height), dy.octets, int(s.width), 1, dy.lines};
}

// The copy of dy as it is, [groups * padded][batch][out_height][octets * 8].
inline Source source_of_output(const PanelShape& s, int padded) {
  const Sizes o(s);
  return {s.batch, int(o.out_height), int(ceil_div(o.out_width, 8)), 1, int(s.groups), int(s.out / s.groups), padded,
          {int(o.out_height), 1, 0, 0, 1, int(o.out_height)}, {int(o.out_width), 1, 0, 0, 1, int(o.out_width)}};
}

inline bool is_half(const PanelShape& s) { return s.dtype != kFloat32; }

// `depth` is that of a fragment, `classes` the rows whose banks differ.
inline Lists lists_of(const PanelShape& s, bool transposed, int depth, int classes) {
  Lists l{};
  const int in = int(s.in / s.groups), out = int(s.out / s.groups);
  const int blocks_in = int(ceil_div(in, s.cols)), blocks_out = int(ceil_div(out, s.rows));
  l.taps_w = int(s.kernel_w);
  l.taps = int(s.kernel_h) * l.taps_w;
  l.starts_stride = transposed ? l.taps : 1;
  l.entries = int(s.blocks);
  l.groups = int(s.groups);
  l.panels = transposed ? blocks_in : blocks_out;
  l.width = int(transposed ? s.cols : s.rows);
  l.outputs = transposed ? in : out;
  l.units = transposed ? blocks_out : blocks_in;
  while (l.unit_rows() < (transposed ? s.rows : s.cols)) ++l.unit_shift;
  l.flipped = transposed;
  l.dilation = int(s.dilation_h);
  l.depth = depth;
  l.classes = classes;

  // 32 outputs a warp where that fills a block; 16 where outputs are few, or where sums and operands are 4 bytes wide.
  const int64_t outputs = int64_t{l.panels} * l.width;
  const int wide = is_half(s) && outputs > 256 ? 32 : 16;
  l.per_warp = wide / l.width;
  const int most_warps = max_shared_bytes() >= 144 << 10 ? kMaxWarps : kMaxWarps / 2;
  const int64_t even = ceil_div(outputs, ceil_div(outputs, wide * most_warps));  // outputs of a tile if all are alike
  l.warps = s.warps ? int(s.warps) : int(round_up(ceil_div(even, wide), 4));
  l.tiles = int(ceil_div(l.panels, l.tile_panels()));
  // As many resident rows as outputs: small blocks then share a multiprocessor, large ones fill it.
  const int rows = s.chunk ? int(s.chunk) : (is_half(s) ? 32 : 16) * l.warps;
  const int64_t all_rows = int64_t{l.taps} * l.units * l.unit_rows();
  l.chunk_units = int(min(int64_t{rows}, round_up(all_rows, 16))) / l.unit_rows();
  l.max_chunks = int(max(int64_t{1}, ceil_div(int64_t{l.taps} * l.units, l.chunk_units)));
  l.fragments = int64_t{l.entries} * l.unit_rows() / depth + int64_t{l.groups} * l.panels * l.max_chunks + 1;
  return l;
}

// Three stages where a multiprocessor has room for them beside 16 warps, which is what its registers hold.
inline int stages_for(const PanelShape& s, const Lists& l, int64_t stage_bytes) {
  if (s.stages) return int(s.stages);
  return 3 * stage_bytes * kMaxWarps / l.warps <= max_shared_bytes() ? 3 : 2;
}

inline Plan take_plan(Carver& space, const Lists& l, bool weights) {
  Plan p{};
  p.used = space.take<int32_t>(l.all_tiles());
  p.rows = space.take<int32_t>(int64_t{l.all_tiles()} * l.all_units());
  p.place = space.take<int32_t>(l.entries);
  p.bounds = space.take<int32_t>(int64_t{l.groups} * l.panels * (l.max_chunks + 1));
  p.owner = space.take<int32_t>(int64_t{l.all_tiles()} * l.tile_panels());
  p.segments = space.take<int32_t>(int64_t{l.all_tiles()} * l.warps * l.stream_length());
  p.slots = space.take<uint16_t>(l.fragments * l.depth);
  p.origin = space.take<int32_t>(l.fragments * l.depth);
  if (weights) p.weights = space.take<uint32_t>(l.fragments * kWarp * (l.width / 4));
  return p;
}

}  // namespace sparsekit::cuda::panel
