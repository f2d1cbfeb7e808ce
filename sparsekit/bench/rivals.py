"""Who else could do the work: torch's dense and sparse executions, and other runtimes where installed.

An adapter gets a :class:`~sparsekit.bench.problem.Problem` and returns a thunk, or the reason why it has none,
which the row then carries (None: there is nothing to say). ``dense…`` rivals compute what the sparse layer does, in
the same dtype: the best of them is what ``ratio`` divides by. The others stand beside: another dtype, another library.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import nn

from . import gpu, runtimes
from .problem import Problem, Thunk, dense_thunk, forward_of_linear

__all__ = ["RIVALS", "Rival", "absences"]


class Rival(NamedTuple):
    """``how`` says how it was set up. ``level``: the smallest selection that times it. ``dtype``: of its result.

    ``needs`` a package, ``where`` a device of this type. ``own_check``: its mask is another, and it checks itself.
    """

    name: str
    how: str
    make: Callable[[Problem], Thunk | str | None]
    level: str = "usual"
    dtype: torch.dtype | None = None
    needs: str | None = None
    where: str | None = None
    own_check: bool = False


def absences(where: str = "cpu") -> dict[str, str]:
    """Rivals that cannot run on ``where``, and how to get them."""
    found = {}
    for rival in RIVALS:
        if rival.where not in (None, where):
            found[rival.name] = "on a CPU only" if rival.where == "cpu" else "on a GPU only"
        elif rival.needs and importlib.util.find_spec(rival.needs) is None and not runtimes.python_of(rival.needs):
            found[rival.name] = f"not installed: {_INSTALL.get(rival.needs, f'pip install {rival.needs}')}"
    return found


_INSTALL = {
    "deepsparse": "an environment of its own, pip install 'deepsparse==1.8.0' 'numpy<2' --only-binary :all:, "
                  "and SPARSEKIT_DEEPSPARSE_PYTHON=its python",
    "onnxruntime": "pip install onnx onnxruntime",
    "cupy": "pip install cupy-cuda12x",
}  # fmt: skip


def _dense(p: Problem) -> Thunk:
    return dense_thunk(p, p.dense, p.x, p.dy)


def _channels_last(p: Problem) -> Thunk | None:
    if p.is_linear:
        return None
    last = {"memory_format": torch.channels_last}
    module = p.once("channels_last", lambda: deepcopy(p.dense).to(**last))
    return dense_thunk(p, module, p.x.contiguous(**last), p.dy.contiguous(**last))


def _compiled(p: Problem) -> Thunk | str:
    if p.case.work in ("dx", "dw"):
        return "an operator alone has nothing to compile"

    def compiled() -> nn.Module:
        module = deepcopy(p.dense)
        module.compile(mode="max-autotune-no-cudagraphs")
        return module

    return dense_thunk(p, p.once("compiled", compiled), p.x, p.dy)


def _bfloat16(p: Problem) -> Thunk | str:
    if p.case.torch_dtype != torch.float32:
        return "the row's own dtype is not float32"
    last = {} if p.is_linear else {"memory_format": torch.channels_last}
    module = p.once("bfloat16", lambda: deepcopy(p.dense).to(torch.bfloat16, **last))
    x, dy = (t.to(torch.bfloat16, **last) for t in (p.x, p.dy))
    return dense_thunk(p, module, x, dy)


def _torch_csr(p: Problem) -> Thunk | str:
    if reason := forward_of_linear(p):
        return reason
    if p.case.torch_dtype == torch.bfloat16 and not p.x.is_cuda:
        return "has no bfloat16"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that its CSR support is beta
        weight = p.once("csr", p.dense.weight.detach().to_sparse_csr)
    bias, x = p.dense.bias.detach(), p.x
    return lambda: (torch.sparse.mm(weight, x.t()).t() + bias,)


def _torch_bsr(p: Problem) -> Thunk | str:
    if reason := forward_of_linear(p):
        return reason
    rows, cols = p.case.block
    if rows != cols or rows == 1:
        return "takes square blocks only"
    if p.dense.weight.shape[0] % rows or p.dense.weight.shape[1] % cols:
        return "takes whole blocks only"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = p.once("bsr", lambda: p.dense.weight.detach().to_sparse_bsr((rows, cols)))
    bias, x = p.dense.bias.detach(), p.x
    if x.is_cuda:
        product = p.once("tuned bsr", lambda: gpu.tuned_bsr(weight, bias, x))
        return lambda: (product(x),)
    return lambda: (torch.nn.functional.linear(x, weight) + bias,)


def _scipy(p: Problem) -> Thunk | str:
    if reason := forward_of_linear(p):
        return reason
    if p.case.torch_dtype == torch.bfloat16:
        return "has no bfloat16"
    from scipy.sparse import csr_array

    weight, x, bias = csr_array(p.dense.weight.detach().numpy()), p.x.numpy(), p.dense.bias.detach().numpy()
    return lambda: ((weight @ x.T).T + bias,)


def _serves(p: Problem) -> str | None:
    if p.case.work != "forward":
        return "serves only"
    return None if p.case.torch_dtype == torch.float32 else "set up for float32 only"


def _onnx(dense: nn.Module, shape: tuple[int, ...]) -> bytes:
    """The layer as an ONNX graph of one node."""
    from onnx import TensorProto, helper, numpy_helper

    weight, bias = (t.detach().numpy() for t in (dense.weight, dense.bias))
    constants = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")]
    if isinstance(dense, nn.Linear):
        node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)
    else:
        (top, left), strides = dense.padding, list(dense.stride)
        node = helper.make_node("Conv", ["x", "w", "b"], ["y"], pads=[top, left, top, left], strides=strides)
    ports = [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))]
    ports.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, None))
    graph = helper.make_graph([node], "layer", ports[:1], ports[1:], constants)
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


def _runtime(name: str) -> Callable[[Problem], Thunk | str]:
    def make(p: Problem) -> Thunk | str:
        if reason := _serves(p):
            return reason
        if importlib.util.find_spec("onnx") is None:
            return "needs onnx to be handed the layer: pip install onnx"
        where = runtimes.elsewhere if runtimes.python_of(name) else runtimes.engine
        run = where(name, _onnx(p.dense, tuple(p.x.shape)), p.x.numpy(), torch.get_num_threads())

        def thunk():
            return (run(),)

        if hasattr(run, "timed"):
            thunk.timed = run.timed
        return thunk

    return make


RIVALS: tuple[Rival, ...] = (
    Rival("dense", "torch, eager, contiguous", _dense, "quick"),
    Rival("dense channels_last", "torch, eager, weights, images and gradients channels_last", _channels_last, "quick"),
    Rival("dense compiled", "torch.compile, max-autotune-no-cudagraphs", _compiled, "full"),
    Rival("bfloat16", "torch, eager, all in bfloat16; images channels_last", _bfloat16, dtype=torch.bfloat16),
    Rival("torch.sparse csr", "torch.sparse.mm(W_csr, x.t()).t() + b: faster than F.linear", _torch_csr, "quick"),
    Rival("torch.sparse bsr", "F.linear(x, W_bsr) + b; on a GPU tuned for the shape first", _torch_bsr),
    Rival("scipy csr", "csr_array @ x.T, one thread whatever is asked", _scipy, needs="scipy", where="cpu"),
    Rival("onnxruntime", "dense graph of one node, as many threads, not spinning", _runtime("onnxruntime"),
          needs="onnxruntime", where="cpu"),
    Rival("openvino", "CPU, latency hint, f32, sparse weights decompressed from 0.7", _runtime("openvino"),
          needs="openvino", where="cpu"),
    Rival("deepsparse", "Engine(num_cores=threads)", _runtime("deepsparse"), needs="deepsparse", where="cpu"),
    Rival("2:4 cuSPARSELt", "to_sparse_semi_structured: another mask, of 50 %; half precision", gpu.semi_structured,
          where="cuda", own_check=True),
    Rival("cuSPARSE", "cupyx csr_matrix @ x.T", gpu.cusparse, needs="cupy", where="cuda"),
)  # fmt: skip
