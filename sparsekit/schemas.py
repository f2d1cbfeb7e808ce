"""The schema of every sparsekit operator, written once.

``setup.py`` generates the C++ registration from this table and :mod:`sparsekit.ops` reads it when the
native library is absent, so the two can never disagree. Keep this file free of imports: the build
executes it before anything is installed.

Vocabulary
    ``x [N, in]``, ``dy [N, out]``, weight ``W [out, in]`` sparse with ``nnz`` survivors.
    ``values [nnz]`` are the survivors in row-major (CSR) order of ``W`` viewed as ``[out, in]``;
    a convolution weight ``[out, in/groups, kh, kw]`` is viewed as ``[out, in/groups * kh * kw]``.
    ``crow_indices int32 [out + 1]``, ``col_indices int32 [nnz]`` (ascending within a row).
    ``t_crow int32 [in + 1]``, ``t_row int32 [nnz]``, ``t_perm int32 [nnz]`` are the same survivors in
    column-major (CSC) order: entry ``p`` of column ``j`` sits in row ``t_row[p]`` and its value is
    ``values[t_perm[p]]``. Rows ascend within a column.

A gradient that a ``*_backward`` operator was not asked for comes back as an empty tensor.
"""

_CONV = "int[2] stride, int[2] padding, int[2] dilation, int groups"
_T = "Tensor t_crow, Tensor t_row, Tensor t_perm"

SCHEMAS = {
    "csr_linear": "(Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor? bias) -> Tensor",
    "csr_linear_t": f"(Tensor dy, Tensor values, {_T}) -> Tensor",
    "csr_sddmm": "(Tensor dy, Tensor x, Tensor crow_indices, Tensor col_indices) -> Tensor",
    "csr_linear_backward": (
        f"(Tensor dy, Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, {_T}, "
        "bool need_dx, bool need_dvalues, bool need_dbias) -> (Tensor, Tensor, Tensor)"
    ),
    "csr_conv2d": (
        "(Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor? bias, "
        f"int[2] kernel_size, {_CONV}) -> Tensor"
    ),
    "csr_conv2d_t": (
        f"(Tensor dy, Tensor values, {_T}, int[2] input_size, int[2] kernel_size, {_CONV}) -> Tensor"
    ),
    "csr_conv2d_sddmm": (
        "(Tensor dy, Tensor x, Tensor crow_indices, Tensor col_indices, "
        f"int[2] kernel_size, {_CONV}) -> Tensor"
    ),
    "csr_conv2d_backward": (
        f"(Tensor dy, Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, {_T}, "
        f"int[2] kernel_size, {_CONV}, "
        "bool need_dx, bool need_dvalues, bool need_dbias) -> (Tensor, Tensor, Tensor)"
    ),
    "build_info": "() -> str",
}
