"""Whole networks: inference and training steps against the best dense execution, and what they hold in memory."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import convert, data, fuse, models, prune, regroup
from ..flops import flop_density, positions
from ..nn import SparseModule
from ..ticket.train import Training, fit
from .cases import TICKETS, Case
from .layers import MODELS
from .tickets import MaskedSearch

__all__ = ["Prepared", "Unavailable", "memory", "prepare"]


class Unavailable(Exception):
    """A case wants what is not here; the message says how to get it."""


@dataclass
class Prepared:
    """A model ready to be timed; ``thunks`` holds ``sparse`` and its dense rivals."""

    thunks: dict[str, Callable[[], object]]
    notes: dict[str, str]
    input: tuple[int, ...]
    weights: int
    bytes: int
    dense_bytes: int
    formats: str
    error: float


def prepare(case: Case, where: str = "cpu") -> Prepared:
    """Prune a model by magnitude, convert it as a user would, check it; raises AssertionError where it is wrong.

    Inference is timed with batch norms folded on both sides. A step is forward and backward of the mean logit.
    """
    shape, batch, classes = MODELS[case.subject]
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1)).to(where)
    if case.masks == "ticket":
        model, masks = map(deepcopy, _ticket(case.subject, case.density))
    else:
        model = models.build(case.subject, classes=classes, input_shape=shape, seed=0)
        scope = "layer" if case.masks == "uniform" else None
        masks = prune(model, 1 - case.density, pattern=case.pattern, scope=scope)
    model, masks = model.to(where), {name: mask.to(where) for name, mask in masks.items()}
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    training = case.work == "step"
    model.train(training)
    ordered = model
    if case.regrouped:
        found = regroup(model, masks, x)
        ordered, masks = found.model.train(training), found.masks
    sparse = convert(ordered, masks, training=training, example_inputs=x)
    formats = [m.format.name for m in sparse.modules() if isinstance(m, SparseModule)]
    counts = ", ".join(f"{name} {formats.count(name)}" for name in dict.fromkeys(formats))
    if not training:
        sparse = fuse(sparse)
    error = _check(sparse, model, ordered, masks, x, training)
    ours = _thunk(sparse, x, training)
    plain = fuse(model) if not training else model
    rivals = {"dense": _thunk(plain, x, training)}
    if any(isinstance(m, nn.Conv2d) for m in model.modules()):
        last = deepcopy(plain).to(memory_format=torch.channels_last)
        rivals["dense channels_last"] = _thunk(last, x.contiguous(memory_format=torch.channels_last), training)
        ours_last = _thunk(sparse, x.contiguous(memory_format=torch.channels_last), training)
        if _once(ours_last) < 0.95 * _once(ours):
            ours = ours_last
    sizes = [_bytes(m) for m in (sparse, model)]
    weights = sum(mask.numel() for mask in masks.values())
    notes = {"torch.sparse": "has no convolution and no gradient for a fixed pattern"}
    notes["density"] = _densities(model, masks, x)
    return Prepared({**rivals, "sparse": ours}, notes, tuple(x.shape), weights, *sizes, counts, error)


@functools.cache
def _ticket(subject: str, density: float) -> tuple[nn.Module, dict[str, Tensor]]:
    """A trained network and its masks after four short rounds of magnitude pruning, rewound to init."""
    try:
        dataset = data.load(TICKETS[subject])
    except (FileNotFoundError, ModuleNotFoundError) as reason:
        raise Unavailable(str(reason)) from None
    shape, _, classes = MODELS[subject]
    init = models.build(subject, classes=classes, input_shape=shape, seed=0)
    search = MaskedSearch(init, 1 - density**0.25)
    for _ in range(5):
        twin = search.open()
        fit(twin, dataset, Training(200), _order)
        search.close(twin)
    return search.trained, search.masks


def _densities(model: nn.Module, masks: dict[str, Tensor], x: Tensor) -> str:
    weights = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    return f"{weights:.3g} of the weights, {flop_density(masks, positions(model, x)):.3g} of the multiply-adds"


def _order(count: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(epoch))


def _once(thunk: Callable[[], object]) -> float:
    from .timing import spreads

    return spreads({"it": thunk}, 0.05)["it"].p50


def _thunk(model: nn.Module, x: Tensor, training: bool) -> Callable[[], object]:
    if not training:

        def serve():
            with torch.no_grad():
                return model(x)

        return serve
    wanted = [p for p in model.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(model(x).mean(), wanted)


def _check(
    sparse: nn.Module, model: nn.Module, ordered: nn.Module, masks: dict, x: Tensor, training: bool
) -> float:
    """The relative error of the logits, and in training of every gradient, against the model in float64.

    ``ordered`` is the model, or the same with its rows in another order, which ``sparse`` was made of.
    """
    exact = deepcopy(ordered).double()
    with torch.set_grad_enabled(training):
        want, got = exact(x.double()), deepcopy(sparse)(x)
    plain = want if ordered is model else deepcopy(model).double()(x.double())
    pairs = {"logits": (got.detach().double(), plain.detach())}
    if training:
        twin = deepcopy(sparse)
        twin(x).mean().backward()
        want.mean().backward()
        for name, module in twin.named_modules():
            if isinstance(module, SparseModule):
                gradient = exact.get_parameter(f"{name}.weight").grad * masks[f"{name}.weight"]
                packed = module.pack(gradient.to(module.values.dtype)).double()
                pairs[name] = (module.values.grad.double(), packed)
    worst = 0.0
    for name, (have, need) in pairs.items():
        error = float((have - need).norm() / need.norm().clamp_min(1e-30))
        # deep nets amplify float32's rounding on the way down
        if not error < (1e-3 if name == "logits" else 2e-2):
            raise AssertionError(f"{name}: Expected the float64 dense result, got a relative error of {error:.1e}")
        worst = max(worst, error)
    return worst


def _bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in itertools.chain(model.parameters(), model.buffers()))


def memory(case: Case) -> tuple[int, int, int]:
    """Weights, and bytes of the model in training with gradients and Adam's state: sparse, dense."""
    if case.subject.startswith("mlp:"):
        widths = case.subject.removeprefix("mlp:").split("-")
        model = models.build(case.subject, input_shape=(int(widths[0]),), classes=int(widths[-1]))
        x = torch.randn(1, int(widths[0]))
    else:
        shape, _, classes = MODELS[case.subject]
        model = models.build(case.subject, classes=classes, input_shape=shape)
        x = torch.randn(2, *shape)
    masks = prune(model, 1 - case.density)
    sparse = convert(model, masks, training=True, impl=case.format)
    return sum(m.numel() for m in masks.values()), _held(sparse, x), _held(model, x)


def _held(model: nn.Module, x: Tensor) -> int:
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    state = [t for values in optimizer.state.values() for t in values.values()]
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), *state]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
