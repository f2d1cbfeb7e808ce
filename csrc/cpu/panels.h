// A batch of vectors packed feature-major: panel [features][lines * kLanes samples], panel after panel.
//
// One survivor then needs one contiguous run of memory per panel, and a range of features is a contiguous
// piece of a panel, so a tile of features fits the L1 cache without set conflicts.
#pragma once
#include "tensors.h"

namespace sparsekit {

// A 2-D tensor [samples, features] with any strides.
struct Matrix {
  char* data;
  Storage storage;
  int bytes;
  int64_t samples, features;
  int64_t sample_stride, feature_stride;
  int64_t second = 0;  // of storage kPairs

  explicit Matrix(const Tensor& t)
      : data(static_cast<char*>(const_cast<void*>(t.const_data_ptr()))),
        storage(storage_of(t.scalar_type())),
        bytes(element_bytes(t.scalar_type())),
        samples(t.size(0)),
        features(t.size(1)),
        sample_stride(t.stride(0)),
        feature_stride(features == 1 ? 1 : t.stride(1)) {}

  void* at(int64_t sample, int64_t feature) const {
    return data + (sample * sample_stride + feature * feature_stride) * bytes;
  }
};

template <class T>
struct Panels {
  static constexpr int64_t L = kLanes<T>;
  T* data;
  int64_t features, first, samples;  // samples [first, first + samples) of the tensor
  int64_t lines, count;              // lines per panel (the last may be narrower), panels

  // The lines per panel that the kernels like best; narrower ones where threads can then have whole panels each.
  static int64_t lines_for(int64_t samples, int64_t threads = 1) {
    const int64_t total = (samples + L - 1) / L, widest = kernels<T>().panel_lines;
    int64_t panels = std::max<int64_t>(1, (total + widest - 1) / widest);
    if (panels == 1 && threads == 2 && total == widest && kernels<T>().least_lines * 2 <= total) panels = 2;
    return (total + panels - 1) / panels;
  }

  Panels(Workspace::Slot slot, int64_t features, int64_t first, int64_t samples, int64_t lines)
      : features(features), first(first), samples(samples), lines(lines),
        count((samples + lines * L - 1) / (lines * L)) {
    data = Workspace::mine().get<T>(slot, (samples + L - 1) / L * L * features);
  }

  int64_t lines_of(int64_t panel) const {
    return std::min(lines, (samples + L - 1) / L - panel * lines);
  }
  int64_t width_of(int64_t panel) const { return lines_of(panel) * L; }
  // The width that tiles of features are cut for: that of the panel one thread would have, so that sums are too.
  int64_t tile_width(int64_t i) const {
    return count == 2 && 2 * lines == lines_for(samples) ? 2 * lines * L : width_of(i);
  }
  T* panel(int64_t i) const { return data + i * lines * L * features; }

  // f(tensor position, line within the panel, lanes) for every line of a panel.
  template <class F>
  void each_line(int64_t i, const F& f) const {
    for (int64_t line = 0; line < lines_of(i); ++line) {
      const int64_t sample = (i * lines + line) * L;
      f(first + sample, line, std::min(L, samples - sample));
    }
  }

  void fill(const Matrix& from, int64_t i, Span span) const {
    if (span.begin >= span.end) return;
    const int64_t width = width_of(i);
    // Short runs of features keep the scattered lines of the destination in the L1 cache.
    constexpr int64_t kRun = 4 * L;
    for (int64_t f = span.begin; f < span.end; f += kRun)
      each_line(i, [&](int64_t sample, int64_t line, int64_t lanes) {
        kernels<T>().pack[from.storage]({panel(i) + f * width + line * L, width, from.at(sample, f), from.sample_stride,
                                         from.feature_stride, lanes, std::min(kRun, span.end - f), from.second});
      });
  }

  // Whether parts work on whole panels: fetching what another core has written costs more than arithmetic on it.
  bool even(int64_t parts) const { return count % parts == 0; }

  // This part's share of packing all panels.
  void fill_part(const Matrix& from, int64_t parts, int64_t part) const {
    const Span own = even(parts) ? cut(count, parts, part) : Span{0, count};
    const Span span = even(parts) ? Span{0, features} : cut(features, parts, part, L);
    for (int64_t i = own.begin; i < own.end; ++i) fill(from, i, span);
  }
};

}  // namespace sparsekit
