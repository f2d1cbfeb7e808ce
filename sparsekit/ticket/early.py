"""Early-bird tickets: channel masks that stop changing long before training ends (You et al., arXiv:1909.11957)."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor, nn

from ..mask import Masks
from ..overlap import hamming
from ..prune import prunable

__all__ = ["EarlyBird", "channel_masks"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class EarlyBird:
    """Call :meth:`update` after every epoch; it says True when the ticket has emerged.

    Args:
        share: of all channels to prune, those of least batch-norm scale, ranked globally.
        window, distance: emerged when the last ``window`` masks lie within that Hamming distance of each other
            (the paper: 5 and 0.1).
    """

    def __init__(self, share: float, window: int = 5, distance: float = 0.1) -> None:
        if isinstance(window, bool) or not isinstance(window, int) or window < 2:
            raise ValueError(f"Expected window as a whole number of at least 2, got {window!r}")
        for name, value in (("share", share), ("distance", distance)):
            if not 0 <= value < 1:
                raise ValueError(f"Expected {name} in [0, 1), got {value!r}")
        self.share, self.distance = share, distance
        self.masks: deque[Masks] = deque(maxlen=window)

    @property
    def distances(self) -> list[float]:
        """Hamming distances of the last mask to the earlier ones in the window."""
        return [hamming(self.masks[-1], earlier) for earlier in list(self.masks)[:-1]]

    def update(self, model: nn.Module) -> bool:
        """Take the channel mask of ``model`` as it is now; True when all masks of the window are alike."""
        self.masks.append(channel_masks(model, self.share))
        if len(self.masks) < self.masks.maxlen:
            return False
        pairs = [(a, b) for i, a in enumerate(self.masks) for b in list(self.masks)[:i]]
        return all(hamming(a, b) <= self.distance for a, b in pairs)

    def ticket(self, model: nn.Module) -> Masks:
        """Weight masks of the last channel mask: for each batch norm, the layer whose output it scales.

        That is the prunable layer before it in the model's order with as many outputs; raises ValueError
        without one. Feed the result to :func:`sparsekit.convert`, which cuts dead channels out.
        """
        if not self.masks:
            raise ValueError("Expected update() before ticket(), got no mask yet")
        layers = {module: name for name, module in prunable(model).items()}
        found, last = {}, None
        for name, module in model.named_modules():
            if module in layers:
                last = module
            elif (key := f"{name}.weight") in self.masks[-1]:
                keep = self.masks[-1][key]
                if last is None or last.weight.shape[0] != keep.numel():
                    raise ValueError(f"{key}: Expected a layer of {keep.numel()} outputs before it, got none")
                shape = last.weight.shape
                found[layers[last]] = keep.view(-1, *[1] * (len(shape) - 1)).expand(shape).clone()
                last = None
        return found


@torch.no_grad()
def channel_masks(model: nn.Module, share: float) -> Masks:
    """``{"bn1.weight": bool [channels]}``, False for the ``share`` of all channels whose |scale| is least.

    Raises: ValueError on a model without batch norms that have scales.
    """
    scales: dict[str, Tensor] = {
        f"{name}.weight" if name else "weight": module.weight.detach().abs()
        for name, module in model.named_modules()
        if isinstance(module, _NORMS) and module.weight is not None
    }
    if not scales:
        raise ValueError(f"Expected a model with affine batch norms, got {type(model).__name__}")
    order = torch.cat(list(scales.values())).argsort(stable=True)
    keep = torch.ones(len(order), dtype=torch.bool, device=order.device)
    keep[order[: int(share * len(order) + 0.5)]] = False
    return dict(zip(scales, keep.split([len(scale) for scale in scales.values()]), strict=True))
