// Geometry of a convolution as a gather product.
//
// Activations are copied once per call into zero-padded planes, split by stride phase, so that one survivor is
// one constant offset: moving to the next output position moves every operand by one position. `lanes` samples
// sit innermost: kLanes of them (every access is one aligned line) or a single one (small batches; a line is
// then kLanes neighbouring positions, and the positions past the end of a row are computed and dropped).
#pragma once
#include "tensors.h"

namespace sparsekit {

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
inline int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

struct Conv {
  int64_t n, in, h, w, out, oh, ow;
  int64_t kh, kw, sh, sw, ph, pw, dh, dw, groups;

  int64_t in_per_group() const { return in / groups; }
  int64_t out_per_group() const { return out / groups; }
  int64_t taps() const { return kh * kw; }
  int64_t phases() const { return sh * sw; }
  // How far the last tap reaches, in positions of a phase plane.
  int64_t reach_h() const { return (kh - 1) * dh / sh; }
  int64_t reach_w() const { return (kw - 1) * dw / sw; }
};

// A 4-D tensor [n, c, h, w] with any strides.
struct Sheet {
  char* data;
  Storage storage;
  int bytes;
  int64_t n, c, h, w;
  int64_t stride_n, stride_c, stride_h, stride_w;

  explicit Sheet(const Tensor& t)
      : data(static_cast<char*>(const_cast<void*>(t.const_data_ptr()))),
        storage(storage_of(t.scalar_type())),
        bytes(element_bytes(t.scalar_type())),
        n(t.size(0)), c(t.size(1)), h(t.size(2)), w(t.size(3)),
        stride_n(t.stride(0)), stride_c(t.stride(1)), stride_h(t.stride(2)),
        stride_w(w == 1 ? 1 : t.stride(3)) {}

  bool channels_last() const { return c > 1 && stride_c == 1 && stride_w != 1; }
  void* at(int64_t i, int64_t j, int64_t y, int64_t x) const {
    return data + (i * stride_n + j * stride_c + y * stride_h + x * stride_w) * bytes;
  }
};

// How tensor rows and columns map to positions of phase planes:
// position (a, b) of phase (py, px) is tensor element (a * sh + py - oy, b * sw + px - ox).
struct Mapping {
  int64_t sh, sw, oy, ox;

  int64_t row(int64_t a, int64_t phase) const { return a * sh + phase / sw - oy; }
  // The positions of a row, within [begin, end), that fall inside a tensor `width` wide.
  Span columns(int64_t phase, int64_t width, int64_t begin, int64_t end) const {
    const int64_t shift = ox - phase % sw;
    const int64_t low = std::min(end, std::max(begin, ceil_div(shift, sw)));
    return {low, std::max(low, std::min(end, ceil_div(width + shift, sw)))};
  }
  int64_t column(int64_t b, int64_t phase) const { return b * sw + phase % sw - ox; }
};

// Padded planes of one block of samples.
template <class T>
struct Grid {
  Mapping map;
  int64_t channels, rows, pitch;
  int64_t lanes;
  int64_t plane;  // positions from one plane to the next
  T* data = nullptr;

  Grid(Mapping map, int64_t channels, int64_t rows, int64_t pitch, int64_t lanes)
      : map(map), channels(channels), rows(rows), pitch(pitch), lanes(lanes) {
    // A vector may read past the last row of a plane: those positions exist and are zero. An odd number of
    // lines per plane spreads the channels over all cache sets.
    const int64_t line = kLanes<T> / lanes;
    int64_t lines = (rows * pitch + line - 1) / line + (lanes == 1 ? 1 : 0);
    plane = (lines | 1) * line;
  }

  int64_t phases() const { return map.sh * map.sw; }
  int64_t channel_size() const { return phases() * plane * lanes; }  // elements
  int64_t size() const { return channels * channel_size(); }         // elements per group of samples
  void allocate(Workspace::Slot slot, int64_t groups) {
    data = Workspace::mine().get<T>(slot, groups * size() + 2 * kLanes<T>);
  }
  T* at(int64_t group, int64_t channel, int64_t phase, int64_t position) const {
    return data + group * size() + channel * channel_size() + (phase * plane + position) * lanes;
  }

  // Copies samples [first, first + count) of channels [begin, end) of one group of samples.
  void fill(const Sheet& from, int64_t group, int64_t first, int64_t count, Span channels_span) const {
    const int64_t begin = channels_span.begin, end = channels_span.end;
    for (int64_t phase = 0; phase < phases(); ++phase) {
      if (from.channels_last()) {
        for (int64_t a = 0; a < rows; ++a) fill_row_channels_last(from, group, first, count, begin, end, phase, a);
      } else {
        for (int64_t c = begin; c < end; ++c)
          for (int64_t a = 0; a < rows; ++a) fill_row(from, group, first, count, c, phase, a);
      }
      for (int64_t c = begin; c < end; ++c) zero(at(group, c, phase, rows * pitch), plane - rows * pitch);
    }
  }

 private:
  void zero(T* to, int64_t positions) const { std::fill_n(to, positions * lanes, T(0)); }

  // The valid columns of a row; all others of it become zero for every channel.
  Span margins(const Sheet& from, int64_t group, int64_t begin, int64_t end, int64_t phase, int64_t a) const {
    const int64_t y = map.row(a, phase);
    Span valid = map.columns(phase, from.w, 0, pitch);
    if (y < 0 || y >= from.h) valid = {0, 0};
    for (int64_t c = begin; c < end; ++c) {
      T* row = at(group, c, phase, a * pitch);
      zero(row, valid.begin);
      zero(row + valid.end * lanes, pitch - valid.end);
    }
    return valid;
  }

  void fill_row(const Sheet& from, int64_t group, int64_t first, int64_t count, int64_t c, int64_t phase,
                int64_t a) const {
    const Span valid = margins(from, group, c, c + 1, phase, a);
    if (valid.begin == valid.end) return;
    T* to = at(group, c, phase, a * pitch + valid.begin);
    void* source = from.at(first, c, map.row(a, phase), map.column(valid.begin, phase));
    const int64_t step = from.stride_w * map.sw, length = valid.end - valid.begin;
    if (lanes == 1)
      kernels<T>().load[from.storage](to, source, step, length);
    else
      kernels<T>().pack[from.storage]({to, lanes, source, from.stride_n, step, count, length});
  }

  void fill_row_channels_last(const Sheet& from, int64_t group, int64_t first, int64_t count, int64_t begin,
                              int64_t end, int64_t phase, int64_t a) const {
    const Span valid = margins(from, group, begin, end, phase, a);
    const int64_t y = map.row(a, phase);
    if (lanes == 1) {
      for (int64_t c = begin; c < end && valid.begin < valid.end; ++c)
        kernels<T>().load[from.storage](at(group, c, phase, a * pitch + valid.begin),
                                        from.at(first, c, y, map.column(valid.begin, phase)),
                                        from.stride_w * map.sw, valid.end - valid.begin);
    } else {
      for (int64_t b = valid.begin; b < valid.end; ++b)
        kernels<T>().pack[from.storage]({at(group, begin, phase, a * pitch + b), channel_size(),
                                         from.at(first, begin, y, map.column(b, phase)), from.stride_n, 1, count,
                                         end - begin});
    }
  }
};

// Where a product is written: rows are (channel, phase) pairs of a tensor.
template <class T>
struct Target {
  Sheet sheet;
  Mapping map;
  int64_t lanes;

  // Stores positions (a, begin .. end) of one row of `group`; `from` holds position `begin`.
  void store(const T* from, int64_t row, int64_t first, int64_t count, int64_t a, int64_t begin, int64_t end) const {
    const int64_t phases = map.sh * map.sw, channel = row / phases, phase = row % phases;
    const int64_t y = map.row(a, phase);
    const Span valid = map.columns(phase, sheet.w, begin, end);
    if (y < 0 || y >= sheet.h || valid.begin == valid.end) return;
    void* to = sheet.at(first, channel, y, map.column(valid.begin, phase));
    const int64_t step = sheet.stride_w * map.sw, length = valid.end - valid.begin;
    const T* source = from + (valid.begin - begin) * lanes;
    if (lanes == 1)
      kernels<T>().store[sheet.storage](to, step, source, length);
    else
      kernels<T>().unpack[sheet.storage](
          {const_cast<T*>(source), lanes, to, sheet.stride_n, step, count, length});
  }
};

}  // namespace sparsekit
