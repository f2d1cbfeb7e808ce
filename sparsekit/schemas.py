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
    ``code_key int64 [2]`` (on the CPU, optional) names the content of ``crow_indices, col_indices``: machine code made
    for a mask is kept under it, and one key must never name two masks. The CPU alone reads it.
    ``csr_chain`` is ``csr_linear`` of one layer after the other, an entry of each list per layer.
    ``csr_conv2d`` adds ``skip``, of the shape and dtype of its result, before the activation.

    ``*_planes``: images [n, channels, h, w] as ``[ceil(n / lanes), channels, positions, lanes]``, padded by ``border``
    zeros (kernels/csr/planes.py); ``x_size`` and ``skip_size`` say n, h, w, border of such tensors and are empty for
    images. ``lanes`` is 1 or a cache line's and no less than theirs. The result is planes of ``border``, an image if
    that is -1. float32 or float64.

    ``bsr_*``, ``panel_*``: ``values [blocks, R, C]`` are blocks of R outputs by C inputs of one tap (kernel
    position) and group; with ``rows = ceil(out / groups / R)``, ``cols = ceil(in / groups / C)``, ``taps = kh * kw``:
    ``crow_indices int32 [groups * rows + 1]``, ``col_indices int32 [blocks]`` = ``tap * cols + input block``
    (ascending within a block row), ``row_order int32 [groups * rows]`` block rows, longest first,
    ``runs int32 [runs, 2]`` = (block row, first block) of runs of at most ``max(1, 256 // C)`` blocks of a
    row, ``t_crow int32 [groups * cols * taps + 1]`` over segments ``(group * cols + input block) * taps +
    tap``, ``t_row int32 [blocks]`` = ``tap * rows + block row within the group``, ``t_perm int32 [blocks]``
    which block, ``t_order int32 [groups * cols]`` input blocks, longest first. Entries of ``values`` outside
    the weight are 0, and so is their gradient. ``activation``: none, relu, gelu (exact), silu.
    ``bitmap_linear``: ``values [nnz]`` tile row by tile row of 8 x 8 tiles, tile by tile, row by row of a tile;
    ``bitmap int64 [tile rows, tile columns]``, bit ``8 r + c`` set where row r, column c of the tile survives;
    ``offsets int32 [tile rows * runs + 1]`` where each run of 16 tiles starts in ``values``.
    ``lanes_linear``: ``values [steps, 64]``, ``codes uint8 [steps, 64]``, ``bases int32 [steps]``, ``starts int32
    [groups + 1]``, ``order int32 [out]`` or ``[0]``, as kernels/lanes/layout.py lays them out; x is not float64. values
    have the dtype of x, or are bfloat16 or int8 beside ``scale float32 [out]``, which multiplies the finished sums.
    ``nm_*``: ``values [out, in / 2]`` are two of every four inputs, ``choice uint8 [out, in / 4]`` which two (two
    bits each, the lower first), ``t_choice uint8 [in, out / 4]`` the same of the transposed weight.
    ``dense_sddmm``: ``dyᵀ x [out, in]`` where ``mask bool [out, in]``, exactly 0 elsewhere.
    ``zero_pruned_``: ``grad`` becomes exactly 0 where ``mask bool`` of its shape is False; any strides.

    ``max_pool2d``: windows reach over padding, which holds nothing; NaN wins. x is contiguous, float32 or float64.

Convolutions return channels_last tensors on a GPU, elsewhere tensors in the format of x or dy.
A gradient that a ``*_backward`` operator was not asked for comes back as an empty tensor.
"""

_CONV = "int[2] stride, int[2] padding, int[2] dilation, int groups"
_T = "Tensor t_crow, Tensor t_row, Tensor t_perm"
_BT = f"{_T}, Tensor t_order"
_NEEDS = "bool need_dx, bool need_dvalues, bool need_dbias"

_BLOCKED = {
    "linear": (
        "(Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor row_order, Tensor? bias, "
        "int out_features, str activation) -> Tensor"
    ),
    "linear_t": f"(Tensor dy, Tensor values, {_BT}, int in_features) -> Tensor",
    "sddmm": "(Tensor dy, Tensor x, Tensor crow_indices, Tensor col_indices, Tensor runs, int[2] block) -> Tensor",
    "linear_backward": (
        f"(Tensor dy, Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor runs, {_BT}, "
        f"{_NEEDS}) -> (Tensor, Tensor, Tensor)"
    ),
    "conv2d": (
        "(Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor row_order, Tensor? bias, "
        f"int out_channels, int[2] kernel_size, {_CONV}, str activation) -> Tensor"
    ),
    "conv2d_t": (
        f"(Tensor dy, Tensor values, {_BT}, int in_channels, int[2] input_size, int[2] kernel_size, {_CONV}) -> Tensor"
    ),
    "conv2d_sddmm": (
        "(Tensor dy, Tensor x, Tensor crow_indices, Tensor col_indices, Tensor runs, int[2] block, "
        f"int[2] kernel_size, {_CONV}) -> Tensor"
    ),
    "conv2d_backward": (
        f"(Tensor dy, Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor runs, {_BT}, "
        f"int[2] kernel_size, {_CONV}, {_NEEDS}) -> (Tensor, Tensor, Tensor)"
    ),
}

SCHEMAS = {
    "csr_linear": (
        "(Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor? bias, Tensor? code_key=None, "
        "str activation='none') -> Tensor"
    ),
    "csr_chain": (
        "(Tensor x, Tensor[] values, Tensor[] crow_indices, Tensor[] col_indices, Tensor?[] biases, "
        "Tensor?[] code_keys, str[] activations) -> Tensor"
    ),
    "csr_linear_t": f"(Tensor dy, Tensor values, {_T}) -> Tensor",
    "csr_sddmm": "(Tensor dy, Tensor x, Tensor crow_indices, Tensor col_indices) -> Tensor",
    "csr_linear_backward": (
        f"(Tensor dy, Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, {_T}, "
        f"{_NEEDS}, Tensor? code_key=None) -> (Tensor, Tensor, Tensor)"
    ),
    "csr_conv2d": (
        "(Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor? bias, "
        f'int[2] kernel_size, {_CONV}, Tensor? code_key=None, str activation="none", Tensor? skip=None) -> Tensor'
    ),
    "csr_conv2d_planes": (
        "(Tensor x, int[] x_size, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor? bias, "
        f"int[2] kernel_size, {_CONV}, Tensor? code_key, str activation, Tensor? skip, int[] skip_size, int lanes, "
        "int border) -> Tensor"
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
        f"{_NEEDS}, Tensor? code_key=None) -> (Tensor, Tensor, Tensor)"
    ),
    **{f"bsr_{verb}": schema for verb, schema in _BLOCKED.items()},
    **{f"panel_{verb}": schema for verb, schema in _BLOCKED.items() if not verb.endswith("backward")},
    "bitmap_linear": (
        "(Tensor x, Tensor values, Tensor bitmap, Tensor offsets, Tensor? bias, int out_features, str activation)"
        " -> Tensor"
    ),
    "lanes_linear": (
        "(Tensor x, Tensor values, Tensor codes, Tensor bases, Tensor starts, Tensor order, Tensor? scale, "
        "Tensor? bias, int out_features, str activation) -> Tensor"
    ),
    "nm_linear": "(Tensor x, Tensor values, Tensor choice, Tensor? bias) -> Tensor",
    "nm_linear_t": "(Tensor dy, Tensor values, Tensor choice, Tensor? t_choice) -> Tensor",
    "nm_sddmm": "(Tensor dy, Tensor x, Tensor choice) -> Tensor",
    "max_pool2d": "(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding) -> Tensor",
    "max_pool2d_planes": (
        "(Tensor x, int[] x_size, int[2] kernel_size, int[2] stride, int[2] padding, int border) -> Tensor"
    ),
    "dense_sddmm": "(Tensor dy, Tensor x, Tensor mask) -> Tensor",
    "zero_pruned_": "(Tensor(a!) grad, Tensor mask) -> ()",
    "build_info": "() -> str",
}
