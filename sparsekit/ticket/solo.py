"""Single networks of a finished search: what its rounds hold, and one training under a mask for comparison."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data import Dataset
from ..files import read_tensors, unpack_state
from ..nn import convert
from .rewind import Snapshot
from .stability import order_of
from .store import finished_rounds, round_path
from .train import Training, fit

__all__ = ["begin_from", "read_round", "read_start", "solo"]


def read_round(run: Path, number: int | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Trained dense weights and masks of a round of a run directory, None being the last that is finished.

    Raises: FileNotFoundError without a finished round of that number.
    """
    finished = finished_rounds(run) if run.is_dir() else []
    if number is None and finished:
        number = finished[-1]
    if number not in finished:
        raise FileNotFoundError(f"{run}: Expected a finished round{'' if number is None else f' {number}'}, got none")
    return unpack_state(*read_tensors(round_path(run, number) / "trained.safetensors"))


def read_start(run: Path) -> dict[str, Tensor]:
    """The dense weights that the tickets of a run directory go back to."""
    path = run / "rewind.safetensors"
    return Snapshot.from_tensors(*read_tensors(path if path.exists() else run / "start.safetensors")).model


@torch.no_grad()
def begin_from(model: nn.Module, path: Path) -> tuple[str, list[str]]:
    """Put the weights of a safetensors file, packed, dense or anyone's, into ``model`` where name and shape fit.

    Returns the start of the file's SHA-256 and what stays as it was drawn: a head for other classes.
    Raises: ValueError when nothing fits; FileNotFoundError.
    """
    tensors, header = read_tensors(path, plain=True)
    state, own = unpack_state(tensors, header)[0] if header else tensors, model.state_dict()
    fits = {name: tensor for name, tensor in state.items() if name in own and own[name].shape == tensor.shape}
    if all(tensor.dim() < 2 for tensor in fits.values()):  # a bias alone is a coincidence
        raise ValueError(f"{path}: Expected a weight of this network ({', '.join(own)}), got {', '.join(state)}")
    model.load_state_dict(own | fits)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16], [name for name in own if name not in fits]


def solo(model: nn.Module, masks: Mapping[str, Tensor], data: Dataset, training: Training, seed: int) -> dict:
    """A copy of the dense ``model`` trained, sparse under ``masks`` if there are any; the fields of :class:`Fit`.

    The data come in the order of ``seed``.
    """
    model = copy.deepcopy(model)
    if masks:
        model = convert(model, masks, data.train_x[: training.batch_size], training=True, inplace=True)
    return asdict(fit(model, data, training, order_of(seed)))
