// The csr operators of linear layers on CUDA. Kernels compute in float32 or float64; half types pass through float32.
#include <tuple>

#include "bind.h"
#include "csr_linear.h"

namespace sparsekit::cuda {
namespace {

ScalarType compute_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor as(const Tensor& t, ScalarType type) { return t.scalar_type() == type ? t : torch::stable::to(t, type); }

// A row-major matrix in the compute type; rows may lie apart.
struct Matrix {
  Matrix(const Context& here, const char* name, const Tensor& t, int64_t columns) {
    here.check(t.dim() == 2 && (columns < 0 || t.size(1) == columns),
               std::string("Expected ") + name + " [N, " + std::to_string(columns) + "], got " + shape_of(t));
    tensor = as(t, compute_type(t));
    const bool rows_whole = tensor.size(1) <= 1 || tensor.stride(1) == 1;
    if (!rows_whole || (tensor.size(0) > 1 && tensor.stride(0) < tensor.size(1))) tensor = torch::stable::contiguous(tensor);
    stride = tensor.size(0) > 1 ? tensor.stride(0) : tensor.size(1);
  }
  const void* data() const { return tensor.const_data_ptr(); }

  Tensor tensor;
  int64_t stride;
};

struct Lists {
  Lists(const Context& here, const Tensor& crow_, const Tensor& index_)
      : crow(here.index("crow_indices", crow_)), index(here.index("col_indices", index_)), rows(crow_.size(0) - 1),
        nnz(index_.size(0)) {
    here.check(crow_.dim() == 1 && rows >= 0 && index_.dim() == 1, "Expected 1-D index tensors, got crow_indices " +
                                                                       shape_of(crow_) + ", col_indices " + shape_of(index_));
  }
  const int32_t *crow, *index;
  int64_t rows, nnz;
};

Tensor product(const char* op, const Tensor& x, const Tensor& values, const Tensor* perm, const Tensor& crow,
               const Tensor& index, const std::optional<Tensor>& bias) {
  const Context here(op, x);
  const Lists w(here, crow, index);
  const Matrix in(here, "an input", x, -1);
  const int dtype = dtype_of(op, in.tensor);
  here.check(values.dim() == 1 && values.size(0) == w.nnz, "Expected values [" + std::to_string(w.nnz) + "], got " + shape_of(values));
  const Tensor held = here.operand("values", as(values, in.tensor.scalar_type()), in.tensor.scalar_type());
  std::optional<Tensor> added;
  if (bias) {
    here.check(bias->dim() == 1 && bias->size(0) == w.rows, "Expected bias [" + std::to_string(w.rows) + "], got " + shape_of(*bias));
    added = here.operand("bias", as(*bias, in.tensor.scalar_type()), in.tensor.scalar_type());
  }
  const int64_t tokens = x.size(0), features = x.size(1);
  Tensor y = torch::stable::new_empty(in.tensor, {tokens, w.rows});
  const Tensor work = here.workspace(y, sparsekit_cuda_csr_linear_workspace(tokens, features, w.rows, w.nnz, dtype));
  here.run(sparsekit_cuda_csr_linear(in.data(), in.stride, held.const_data_ptr(),
                                     perm ? here.index("t_perm", *perm) : nullptr, w.crow, w.index,
                                     added ? added->const_data_ptr() : nullptr, y.mutable_data_ptr(), w.rows, tokens,
                                     features, w.rows, w.nnz, dtype, work.mutable_data_ptr(), here.stream()));
  return as(y, x.scalar_type());
}

// A code key names machine code of the CPU, whose kernels alone apply an activation.
Tensor csr_linear(Tensor x, Tensor values, Tensor crow, Tensor col, std::optional<Tensor> bias,
                  std::optional<Tensor> /* code_key */, std::string activation) {
  STD_TORCH_CHECK(activation == "none", "csr_linear: Expected activation none on a GPU, got ", activation);
  return product("csr_linear", x, values, nullptr, crow, col, bias);
}

Tensor csr_linear_t(Tensor dy, Tensor values, Tensor t_crow, Tensor t_row, Tensor t_perm) {
  return product("csr_linear_t", dy, values, &t_perm, t_crow, t_row, std::nullopt);
}

Tensor csr_sddmm(Tensor dy, Tensor x, Tensor crow, Tensor col) {
  const Context here("csr_sddmm", dy);
  const Lists w(here, crow, col);
  const Matrix out(here, "dy", dy, w.rows), in(here, "x", x, -1);
  here.check(dy.size(0) == x.size(0) && dy.scalar_type() == x.scalar_type(),
             "Expected dy and x of one batch size and dtype, got " + shape_of(dy) + " and " + shape_of(x));
  const int dtype = dtype_of("csr_sddmm", in.tensor);
  const int64_t tokens = x.size(0), features = x.size(1);
  Tensor dvalues = torch::stable::new_empty(in.tensor, {w.nnz});
  const Tensor work = here.workspace(dvalues, sparsekit_cuda_csr_sddmm_workspace(tokens, features, w.rows, w.nnz, dtype));
  here.run(sparsekit_cuda_csr_sddmm(out.data(), out.stride, in.data(), in.stride, w.crow, w.index,
                                    dvalues.mutable_data_ptr(), tokens, features, w.rows, w.nnz, dtype,
                                    work.mutable_data_ptr(), here.stream()));
  return as(dvalues, x.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> csr_linear_backward(Tensor dy, Tensor x, Tensor values, Tensor crow, Tensor col,
                                                       Tensor t_crow, Tensor t_row, Tensor t_perm, bool need_dx,
                                                       bool need_dvalues, bool need_dbias,
                                                       std::optional<Tensor> /* code_key */) {
  const auto none = [&] { return torch::stable::new_empty(dy, {0}); };
  const int64_t tokens[] = {0};
  return {need_dx ? csr_linear_t(dy, values, t_crow, t_row, t_perm) : none(),
          need_dvalues ? csr_sddmm(dy, x, crow, col) : none(),
          need_dbias ? torch::stable::sum(dy, torch::headeronly::IntHeaderOnlyArrayRef(tokens, 1)) : none()};
}

}  // namespace
}  // namespace sparsekit::cuda

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CUDA, m) {
  m.impl("csr_linear", TORCH_BOX(&sparsekit::cuda::csr_linear));
  m.impl("csr_linear_t", TORCH_BOX(&sparsekit::cuda::csr_linear_t));
  m.impl("csr_sddmm", TORCH_BOX(&sparsekit::cuda::csr_sddmm));
  m.impl("csr_linear_backward", TORCH_BOX(&sparsekit::cuda::csr_linear_backward));
}
