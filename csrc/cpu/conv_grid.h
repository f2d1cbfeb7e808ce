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
  int64_t second = 0;  // of storage kPairs

  explicit Sheet(const Tensor& t)
      : data(static_cast<char*>(const_cast<void*>(t.const_data_ptr()))),
        storage(storage_of(t.scalar_type())),
        bytes(element_bytes(t.scalar_type())),
        n(t.size(0)), c(t.size(1)), h(t.size(2)), w(t.size(3)),
        stride_n(t.stride(0)), stride_c(t.stride(1)), stride_h(t.stride(2)),
        stride_w(w == 1 ? 1 : t.stride(3)) {}

  // Elements of `bytes` that are computed with as they are; sizes and strides are still to be set.
  static Sheet native(void* data, int bytes) { return Sheet(data, bytes); }

  bool channels_last() const { return c > 1 && stride_c == 1 && stride_w != 1; }
  void* at(int64_t i, int64_t j, int64_t y, int64_t x) const {
    return data + (i * stride_n + j * stride_c + y * stride_h + x * stride_w) * bytes;
  }

 private:
  Sheet(void* data, int bytes) : data(static_cast<char*>(data)), storage(kNative), bytes(bytes) {}
};

// How tensor rows and columns map to positions of phase planes:
// position (a, b) of phase (py, px) is tensor element (a * sh + py - oy, b * sw + px - ox).
struct Mapping {
  int64_t sh, sw, oy, ox;

  int64_t row(int64_t a, int64_t phase) const { return a * sh + phase / sw - oy; }
  // The rows or columns of positions, within [begin, end), that fall inside a tensor of that size.
  Span rows(int64_t phase, int64_t size, int64_t begin, int64_t end) const {
    return inside(oy - phase / sw, sh, size, begin, end);
  }
  Span columns(int64_t phase, int64_t size, int64_t begin, int64_t end) const {
    return inside(ox - phase % sw, sw, size, begin, end);
  }
  static Span inside(int64_t shift, int64_t step, int64_t size, int64_t begin, int64_t end) {
    const int64_t low = std::min(end, std::max(begin, ceil_div(shift, step)));
    return {low, std::max(low, std::min(end, ceil_div(size + shift, step)))};
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
    for (int64_t phase = 0; phase < phases(); ++phase) {
      const Window w{phase, map.rows(phase, from.h, 0, rows), map.columns(phase, from.w, 0, pitch)};
      for (int64_t c = channels_span.begin; c < channels_span.end; ++c) zero_margins(group, c, w);
      if (w.a.begin == w.a.end || w.b.begin == w.b.end) continue;
      if (lanes == 1) fill_flat(from, group, first, channels_span, w);
      else if (from.channels_last()) fill_channels_last(from, group, first, count, channels_span, w);
      else fill_planes(from, group, first, count, channels_span, w);
    }
  }

 private:
  struct Window {  // the positions of a phase plane that are elements of the tensor
    int64_t phase;
    Span a, b;
  };

  void zero_margins(int64_t group, int64_t c, const Window& w) const {
    const auto zero = [&](int64_t begin, int64_t end) {
      std::fill_n(at(group, c, w.phase, begin), (end - begin) * lanes, T(0));
    };
    if (w.a.begin == w.a.end || w.b.begin == w.b.end) return zero(0, plane);
    // What lies between one row's last element and the next row's first is contiguous.
    zero(0, w.a.begin * pitch + w.b.begin);
    const int64_t gap = w.b.begin + pitch - w.b.end;
    if (gap == 0) {
    } else if (lanes == 1 && gap <= kLanes<T>) {  // a whole line is quicker; elements come after
      for (int64_t a = w.a.begin; a + 1 < w.a.end; ++a)
        std::fill_n(at(group, c, w.phase, a * pitch + w.b.end), kLanes<T>, T(0));
    } else {
      for (int64_t a = w.a.begin; a + 1 < w.a.end; ++a) zero(a * pitch + w.b.end, (a + 1) * pitch + w.b.begin);
    }
    zero((w.a.end - 1) * pitch + w.b.end, plane);
  }

  void fill_flat(const Sheet& from, int64_t group, int64_t first, Span channels_span, const Window& w) const {
    const int64_t y = map.row(w.a.begin, w.phase), x = map.column(w.b.begin, w.phase);
    if (from.channels_last() && channels_span.end - channels_span.begin >= 4)
      return fill_flat_channels_last(from, group, first, channels_span, w);
    for (int64_t c = channels_span.begin; c < channels_span.end; ++c)
      kernels<T>().load[from.storage]({at(group, c, w.phase, w.a.begin * pitch + w.b.begin), pitch,
                                       from.at(first, c, y, x), from.stride_h * map.sh, from.stride_w * map.sw,
                                       w.a.end - w.a.begin, w.b.end - w.b.begin, from.second});
  }

  // Transposes channels by positions. A vector's unused lanes are written as zeros past the end of a row: into the
  // margin and, before it is filled, the next row.
  void fill_flat_channels_last(const Sheet& from, int64_t group, int64_t first, Span channels_span,
                               const Window& w) const {
    const int64_t c = channels_span.begin, count = channels_span.end - c;
    for (int64_t a = w.a.begin; a < w.a.end; ++a)
      for (int64_t b = w.b.begin; b < w.b.end; b += kLanes<T>)
        kernels<T>().pack[from.storage](
            {at(group, c, w.phase, a * pitch + b), channel_size(),
             from.at(first, c, map.row(a, w.phase), map.column(b, w.phase)), from.stride_w * map.sw, 1,
             std::min<int64_t>(kLanes<T>, w.b.end - b), count, from.second});
  }

  void fill_planes(const Sheet& from, int64_t group, int64_t first, int64_t count, Span channels_span,
                   const Window& w) const {
    const int64_t x = map.column(w.b.begin, w.phase), length = w.b.end - w.b.begin;
    // A strided row is transposed as a whole, then every map.sw-th line of it is kept.
    const bool strided = map.sw > 1 && from.stride_w == 1;
    T* stage = strided ? Workspace::mine().get<T>(Workspace::kTile, length * map.sw * lanes) : nullptr;
    for (int64_t c = channels_span.begin; c < channels_span.end; ++c)
      for (int64_t a = w.a.begin; a < w.a.end; ++a) {
        T* to = at(group, c, w.phase, a * pitch + w.b.begin);
        void* source = from.at(first, c, map.row(a, w.phase), x);
        if (strided) {
          kernels<T>().pack[from.storage](
              {stage, lanes, source, from.stride_n, 1, count, (length - 1) * map.sw + 1, from.second});
          for (int64_t b = 0; b < length; ++b) std::copy_n(stage + b * map.sw * lanes, lanes, to + b * lanes);
        } else {
          kernels<T>().pack[from.storage](
              {to, lanes, source, from.stride_n, from.stride_w * map.sw, count, length, from.second});
        }
      }
  }

  void fill_channels_last(const Sheet& from, int64_t group, int64_t first, int64_t count, Span channels_span,
                          const Window& w) const {
    const int64_t begin = channels_span.begin, channels_count = channels_span.end - begin;
    for (int64_t a = w.a.begin; a < w.a.end; ++a)
      for (int64_t b = w.b.begin; b < w.b.end; ++b)
        kernels<T>().pack[from.storage]({at(group, begin, w.phase, a * pitch + b), channel_size(),
                                         from.at(first, begin, map.row(a, w.phase), map.column(b, w.phase)),
                                         from.stride_n, 1, count, channels_count, from.second});
  }
};

// Where a product is written: its rows are (channel, phase) pairs of a tensor.
template <class T>
struct Target {
  Sheet sheet;
  Mapping map;
  int64_t lanes;

  // A piece of a product: positions (a, b) in a x [0, width), where one row of positions is `pitch` positions.
  struct Piece {
    Span a;
    int64_t width, pitch;
    int64_t first, count;  // samples
  };

  // Stores rows [rows) of a product; row r starts at from + (r - rows.begin) * stride.
  void store(const T* from, int64_t stride, Span rows, const Piece& piece) const {
    const int64_t phases = map.sh * map.sw;
    for (int64_t phase = 0; phase < phases; ++phase) {
      const Span channels{ceil_div(rows.begin - phase, phases), ceil_div(rows.end - phase, phases)};
      store_phase(from + (channels.begin * phases + phase - rows.begin) * stride, stride * phases, channels, phase,
                  piece);
    }
  }

  // The same for channels of one phase, row after row.
  void store_phase(const T* from, int64_t stride, Span channels, int64_t phase, const Piece& piece) const {
    const Span ya = map.rows(phase, sheet.h, piece.a.begin, piece.a.end), xb = map.columns(phase, sheet.w, 0, piece.width);
    if (channels.begin >= channels.end || ya.begin == ya.end || xb.begin == xb.end) return;
    const int64_t y = map.row(ya.begin, phase), x = map.column(xb.begin, phase);
    const int64_t row_stride = sheet.stride_h * map.sh, step = sheet.stride_w * map.sw;
    int64_t height = ya.end - ya.begin, length = xb.end - xb.begin;
    from += ((ya.begin - piece.a.begin) * piece.pitch + xb.begin) * lanes;
    if (sheet.channels_last()) return store_channels_last(from, stride, channels, y, x, height, length, piece);
    if (length == piece.pitch && row_stride == length * step) length *= height, height = 1;  // one long run
    for (int64_t c = channels.begin; c < channels.end; ++c, from += stride) {
      T* packed = const_cast<T*>(from);
      if (lanes == 1) {
        kernels<T>().store[sheet.storage](
            {packed, piece.pitch, sheet.at(piece.first, c, y, x), row_stride, step, height, length});
        continue;
      }
      for (int64_t i = 0; i < height; ++i)
        kernels<T>().unpack[sheet.storage]({packed + i * piece.pitch * lanes, lanes,
                                            sheet.at(piece.first, c, y + i * map.sh, x), sheet.stride_n, step,
                                            piece.count, length});
    }
  }

 private:
  // Channels lie side by side in the tensor: what is transposed is channels by samples, or channels by positions.
  void store_channels_last(const T* from, int64_t stride, Span channels, int64_t y, int64_t x, int64_t height,
                           int64_t length, const Piece& piece) const {
    const auto& unpack = kernels<T>().unpack[sheet.storage];
    const int64_t count = channels.end - channels.begin, step = lanes == 1 ? kLanes<T> : 1;
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < length; j += step)
        unpack({const_cast<T*>(from) + (i * piece.pitch + j) * lanes, stride,
                sheet.at(piece.first, channels.begin, y + i * map.sh, x + j * map.sw),
                lanes == 1 ? sheet.stride_w * map.sw : sheet.stride_n, 1,
                lanes == 1 ? std::min(step, length - j) : piece.count, count});
  }
};

}  // namespace sparsekit
