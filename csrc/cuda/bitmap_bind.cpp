// The bitmap operator on CUDA.
#include "bind.h"
#include "bitmap_linear.h"

namespace sparsekit::cuda {
namespace {

Tensor bitmap_linear(Tensor x, Tensor values, Tensor bitmap, Tensor offsets, std::optional<Tensor> bias,
                     int64_t out_features, std::string activation) {
  const Context here("bitmap_linear", x);
  const ScalarType type = x.scalar_type();
  here.check(x.dim() == 2, "Expected x [N, in], got " + shape_of(x));
  const int64_t tokens = x.size(0), features = x.size(1), nnz = values.size(0);
  const int64_t tile_rows = (out_features + 7) / 8, tile_cols = (features + 7) / 8;
  here.check(bitmap.dim() == 2 && bitmap.size(0) == tile_rows && bitmap.size(1) == tile_cols,
             "Expected a bitmap [" + std::to_string(tile_rows) + ", " + std::to_string(tile_cols) + "], got " + shape_of(bitmap));
  here.check(offsets.size(0) == tile_rows * ((tile_cols + 15) / 16) + 1, "Expected one offset for every 16 tiles, got " + shape_of(offsets));
  const Tensor held = here.aligned("values", values, type);
  const Tensor bits = here.operand("bitmap", bitmap, ScalarType::Long);
  std::optional<Tensor> added;
  if (bias) added = here.operand("bias", *bias, type);
  const bool whole = x.size(1) <= 1 || x.stride(1) == 1;
  const Tensor in = here.on_device("x", whole ? x : torch::stable::contiguous(x));
  const int64_t stride = tokens > 1 ? in.stride(0) : features;
  const int dtype = dtype_of("bitmap_linear", x);
  Tensor y = torch::stable::new_empty(x, {tokens, out_features});
  const Tensor work = here.workspace(
      y, sparsekit_cuda_bitmap_linear_workspace(in.const_data_ptr(), stride, tokens, features, out_features, nnz, dtype));
  here.run(sparsekit_cuda_bitmap_linear(in.const_data_ptr(), stride, held.const_data_ptr(),
                                        static_cast<const int64_t*>(bits.const_data_ptr()), here.index("offsets", offsets),
                                        added ? added->const_data_ptr() : nullptr, y.mutable_data_ptr(), tokens, features,
                                        out_features, nnz, activation_code(here, activation), dtype,
                                        work.mutable_data_ptr(), here.stream()));
  return y;
}

}  // namespace
}  // namespace sparsekit::cuda

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CUDA, m) { m.impl("bitmap_linear", TORCH_BOX(&sparsekit::cuda::bitmap_linear)); }
