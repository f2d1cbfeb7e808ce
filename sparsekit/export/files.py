"""``sparsekit export``: from a run, a packed file or one of torch.nn.utils.prune to a file that somebody serves."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..files import read_json
from ..mask import Masks
from ..nn import convert, fuse
from ..ticket.store import finished_rounds, round_path
from .dense import save_dense, save_prune
from .graph import save_aoti, save_pt2
from .onnx import save_onnx
from .packed import read_portable, save_state

__all__ = ["STATES", "TARGETS", "classes_of", "export_file"]

STATES = ("packed", "dense", "prune")
"""Files of tensors; the others hold the graph of a network as well, whose name must be known."""
_ONNX = {"onnx": save_onnx, "onnx-packed": partial(save_onnx, sparse=True)}
_GRAPHS = {"pt2": save_pt2, "aoti": save_aoti} | _ONNX
TARGETS = (*STATES, *_GRAPHS)
_SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "fashion-mnist": (1, 28, 28), "cifar10": (3, 32, 32)}


def export_file(
    source: str | Path,
    to: str,
    out: str | Path,
    number: int | None = None,
    model: str | None = None,
    input_shape: tuple[int, ...] | None = None,
    batch: int = 64,
) -> Path:
    """Write the trained ticket of a run's round (default: the last finished), or of a file, to ``out``.

    ``to`` is ``"packed"`` (survivors and masks; :func:`sparsekit.load` reads it), ``"dense"`` (plain
    safetensors, original keys, zeros baked in), ``"prune"`` (the keys of torch.nn.utils.prune), ``"pt2"``
    (torch.export), ``"aoti"`` (compiled; :mod:`sparsekit.serve` and C++ run it), ``"onnx"`` (dense) or
    ``"onnx-packed"`` (as small as packed, unpacked on opening). The last four need the network: ``model`` names one of
    :mod:`sparsekit.models` for images of ``input_shape``, by default those of the run. pt2 and aoti fuse it and
    measure its formats here, on ``batch`` images.
    Raises ValueError or FileNotFoundError naming the file.
    """
    if to not in TARGETS:
        raise ValueError(f"Expected to= one of {', '.join(TARGETS)}, got {to!r}")
    source, out = Path(source), Path(out)
    if source.is_dir():
        number = _choose_round(source, number)
        state, masks, header = read_portable(round_path(source, number) / "trained.safetensors")
        header = header | {"recipe": {"round": number, "config": read_json(source / "config.json")}}
    else:
        if number is not None:
            raise ValueError(f"{source}: Expected a run directory with --round, got a file")
        state, masks, header = read_portable(source)
    network = None if to in STATES else _network(source, state, header.get("recipe"), model, input_shape)
    out.parent.mkdir(parents=True, exist_ok=True)
    if to == "packed":
        return save_state(state, masks, out, header)
    if to == "prune":
        return save_prune(state, masks, out)
    if to == "dense":
        return save_dense(state, out)
    return _save_graph(to, *network, masks, batch, out)


def _network(
    source: Path, state: dict[str, Tensor], recipe: Any, name: str | None, shape: tuple[int, ...] | None
) -> tuple[nn.Module, tuple[int, ...]]:
    """The named network holding ``state``; names are looked up in :mod:`sparsekit.models`, nothing else."""
    config = recipe.get("config") if isinstance(recipe, dict) else None
    config = config if isinstance(config, dict) else {}
    name = config.get("model") if name is None else name
    shape = _SHAPES.get(str(config.get("data"))) if shape is None else shape
    if not isinstance(name, str) or shape is None:
        raise ValueError(f"{source}: Expected --model and --input-shape for a source that does not name them, got none")
    network = models.build(name, classes=classes_of(name, state, shape), input_shape=shape)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{source}: Expected the tensors of {name}, got others ({error})") from None
    return network.eval(), shape


def classes_of(name: str, state: dict[str, Tensor], shape: tuple[int, ...]) -> int:
    """How many classes the network that ``state`` comes from tells apart; files keep tensors in no telling order."""
    if name.startswith("mlp:"):  # as said there
        return int(last) if (last := name.rpartition("-")[2]).isdigit() else 1
    probe = models.build(name, classes=1, input_shape=shape).state_dict()
    found = (len(t) for key, t in state.items() if key in probe and t.dim() and t.shape != probe[key].shape)
    return max(next(found, 1), 1)


@torch.no_grad()
def _save_graph(to: str, network: nn.Module, shape: tuple[int, ...], masks: Masks, batch: int, out: Path) -> Path:
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
    x = x.to(next(network.parameters()).dtype)
    if to in _ONNX:
        return _GRAPHS[to](convert(network, masks, impl="dense"), x, out)
    return _GRAPHS[to](fuse(convert(network, masks, x)), x, out)


def _choose_round(run: Path, number: int | None) -> int:
    finished = finished_rounds(run)
    if not finished:
        raise FileNotFoundError(f"{run}: Expected a run with a finished round, got none")
    if number is None:
        return finished[-1]
    if number not in finished:
        raise FileNotFoundError(f"{run}: Expected a finished round of {', '.join(map(str, finished))}, got {number}")
    return number
