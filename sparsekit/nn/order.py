"""The order of rows that a regrouped model runs in, kept with it, and the way back to the original one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b

import torch
from torch import Tensor, nn

__all__ = ["keep_order", "layers_of", "moves", "original", "restore_order"]

_ORDER, _MARK = "_sparsekit_order", "regrouped"

Index = tuple[Tensor, ...]


def keep_order(model: nn.Module, index: Mapping[str, Index]) -> None:
    """Say of a model in which order it runs: per entry of the dense state dict where its elements came from.

    Its own state dict then names the order (``regrouped``, a hash), so that none of another order loads.
    """
    digest = blake2b(digest_size=16)
    for name in sorted(index):
        for part in index[name]:
            digest.update(part.contiguous().numpy())
    object.__setattr__(model, _ORDER, layers_of(index))
    model.register_buffer(_MARK, torch.frombuffer(bytearray(digest.digest()), dtype=torch.int64))
    model.register_load_state_dict_pre_hook(_refuse_others)


def layers_of(index: Mapping[str, Index]) -> dict[str, Index]:
    """Per layer where its rows came from, and the columns of its weight, from the index of a state dict."""
    layers: dict[str, Index] = {}
    for name, parts in index.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" or path not in layers:  # a norm may have no weight
            layers[path] = tuple(part.flatten() for part in parts)
    return layers


def _refuse_others(module: nn.Module, state: Mapping[str, Tensor], prefix: str, *rest) -> None:
    mark, own = state.get(prefix + _MARK), getattr(module, _MARK, None)
    if own is not None and mark is not None and not torch.equal(mark.cpu(), own.cpu()):
        rest[-1].append(f"{prefix}{_MARK}: Expected weights in this model's order of rows, got another order")


def moves(tensors: Iterable[tuple[str, Tensor]], layers: Mapping[str, Index]) -> Iterator[tuple[Tensor, Index]]:
    """Each tensor that an order moves, once, and its index: rows of a layer, and columns of its weight."""
    seen = set()
    for name, tensor in tensors:
        path, _, leaf = name.rpartition(".")
        if path not in layers or leaf not in ("weight", "bias", "running_mean", "running_var"):
            continue
        if tensor.data_ptr() in seen:  # a module under two names
            continue
        seen.add(tensor.data_ptr())
        rows, *columns = (part.to(tensor.device) for part in layers[path])
        yield tensor, (rows[:, None], columns[0][None]) if leaf == "weight" and columns else (rows,)


def original(model: nn.Module, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Entries of the model's dense state dict, or masks, in the original order; those that say the order go."""
    entries = dict(entries)
    for path, layers in _orders(model):
        entries.pop(f"{path}{_MARK}", None)
        own = {name.removeprefix(path): name for name in entries if name.startswith(path)}
        moved = {id(t): _back(t, index) for t, index in moves(((n, entries[own[n]]) for n in own), layers)}
        entries |= {own[n]: moved[id(entries[own[n]])] for n in own if id(entries[own[n]]) in moved}
    return entries


@torch.no_grad()
def restore_order(model: nn.Module) -> None:
    """Put a dense model back into the original order, in place."""
    for path, layers in list(_orders(model)):
        module = model.get_submodule(path.removesuffix("."))
        delattr(module, _MARK)
        delattr(module, _ORDER)
        hooks = module._load_state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if hook.hook is _refuse_others]:
            del hooks[key]
        for tensor, index in moves(module.state_dict().items(), layers):
            tensor.copy_(_back(tensor, index))


def _back(tensor: Tensor, index: Index) -> Tensor:
    return torch.empty_like(tensor).index_put_(index, tensor)


def _orders(model: nn.Module) -> Iterator[tuple[str, Mapping[str, Index]]]:
    for path, module in model.named_modules():
        if _ORDER in vars(module):
            yield f"{path}." if path else "", vars(module)[_ORDER]
