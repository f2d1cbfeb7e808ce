"""A search on several ranks (``torchrun``): rank 0 decides and keeps, the others take its word; data are shared out.

Without a process group there is one rank, and every function here does nothing.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..mask import Masks, digest

__all__ = ["SharedRun", "agree", "average_statistics", "count", "from_first", "join", "masks_from_first", "parallel"]
__all__ += ["rank", "share", "total"]


def count() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's, from 0 on."""
    return dist.get_rank() if count() > 1 else 0


def join(device: str) -> bool:
    """Become one of the ranks that torchrun started, if it did: gloo on the CPU, NCCL on GPUs, one each.

    Returns whether it did, in which case ``torch.distributed.destroy_process_group`` is due in the end.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
        return False
    if int(os.environ["WORLD_SIZE"]) < 2:
        return False
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return True


def from_first(function: Callable[[], Any]) -> Any:
    """What ``function()`` gives on rank 0, on every rank; what it raises there, all raise."""
    if count() == 1:
        return function()
    message: list[Any] = [None, None]
    if rank() == 0:
        try:
            message[0] = function()
        except Exception as error:
            message[1] = error
    dist.broadcast_object_list(message, src=0)
    if message[1] is not None:
        raise message[1]
    return message[0]


def masks_from_first(function: Callable[[], Masks], where: torch.device) -> Masks:
    """The masks that ``function()`` makes on rank 0, on the device ``where`` of every rank."""
    if count() == 1:
        return function()
    found = from_first(lambda: {name: mask.cpu() for name, mask in function().items()})
    return {name: mask.to(where) for name, mask in found.items()}


def agree(masks: Mapping[str, Tensor]) -> str:
    """The SHA-256 of the masks; raises ValueError on every rank unless all hold the same."""
    own = digest({name: mask.cpu() for name, mask in masks.items()})
    if count() == 1:
        return own
    found: list[str] = [""] * count()
    dist.all_gather_object(found, own)
    if odd := [number for number, other in enumerate(found) if other != found[0]]:
        raise ValueError(f"Expected the masks of rank 0 on every rank, got others on {odd}")
    return own


def share(batch: Tensor) -> Tensor:
    """This rank's part of a batch, or of anything with samples first."""
    return batch if count() == 1 else batch.tensor_split(count())[rank()]


def parallel(model: nn.Module) -> nn.Module:
    """The model as all ranks train it: gradients are means over them. Buffers are not sent with every batch: masks
    never change, and for batch norms see :func:`average_statistics`."""
    if count() == 1:
        return model
    wrap = nn.parallel.DistributedDataParallel
    later = "forward_sync_buffers" in inspect.signature(wrap).parameters  # which torch 2.13 renamed
    return wrap(model, **{"forward_sync_buffers" if later else "broadcast_buffers": False})


def average_statistics(model: nn.Module) -> None:
    """Give batch norms the mean over ranks of their running statistics, each rank having seen its share."""
    if count() == 1:
        return
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            for statistics in (module.running_mean, module.running_var):
                dist.all_reduce(statistics)
                statistics.div_(count())


def total(*values: float) -> list[float]:
    """Sums over the ranks, in float64."""
    if count() == 1:
        return list(values)
    where = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(values, dtype=torch.float64, device=where)
    dist.all_reduce(sums)
    return sums.tolist()


class SharedRun:
    """A run directory of which rank 0 alone has files: what it reads reaches every rank, and it alone writes."""

    def __init__(self, open_run: Callable[[], Any]) -> None:
        self._run: Any = None
        from_first(lambda: self._open(open_run))

    def _open(self, open_run: Callable[[], Any]) -> None:
        self._run = open_run()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args: from_first(lambda: getattr(self._run, name)(*args))
