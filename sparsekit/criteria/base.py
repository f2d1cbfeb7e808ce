"""What a criterion is: one function from a layer to scores, registered by its name.

A criterion asks by reading: ``layer.weight`` costs nothing, ``layer.grad`` runs the loss once for all layers,
and what was not given (``init``, ``data``) is missed with a sentence that says how to give it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .facts import Facts

__all__ = ["CRITERIA", "Criterion", "Layer", "criterion", "find", "name_of"]


class Layer:
    """What a criterion sees of one layer; every tensor is detached and none is to be changed.

    ``name`` of the weight (``"fc1.weight"``), ``weight [out, in]`` or ``[out, in/groups, kh, kw]``, and
    ``alive``, bool of that shape: what earlier pruning left. The properties below are computed when read.
    """

    def __init__(self, name: str, weight: Tensor, alive: Tensor, facts: Facts) -> None:
        self.name, self.weight, self.alive, self._facts = name, weight, alive, facts

    @property
    def init(self) -> Tensor:
        """The weight at initialisation, of the weight's shape; needs ``init=`` (a ticket search gives it)."""
        return self._facts.init(self.name, self.weight)

    @property
    def grad(self) -> Tensor:
        """d loss / d weight on ``data=``, of the weight's shape, pruned positions included (they multiply 0)."""
        return self._facts.gradient(self.name)

    @property
    def hessian_grad(self) -> Tensor:
        """The loss's Hessian over all prunable weights times its gradient, of the weight's shape; needs ``data=``."""
        return self._facts.hessian_gradient(self.name)

    @property
    def flow(self) -> Tensor:
        """d R / d ``|weight|`` for R = the sum of outputs of the network of absolute weights on an input of ones.

        float64, in eval mode (SynFlow, arXiv:2006.05467, section 6); ``data=`` is needed for the input's shape.
        """
        return self._facts.flow(self.name)

    @property
    def input_rms(self) -> Tensor:
        """Root mean square of each input feature or channel on ``data=``, broadcast to the weight's shape."""
        return self._facts.input_rms(self.name, self.weight)


Criterion = Callable[[Layer], Tensor]
CRITERIA: dict[str, Criterion] = {}


def criterion(function: Criterion | None = None, *, steps: int = 1) -> Criterion:
    """Register ``function(layer) -> scores`` (float, of the weight's shape; low scores go first) by its name.

    The function may read any property of :class:`Layer`. ``@criterion(steps=100)`` prunes in that many
    steps, each scoring what the one before left, unless the caller says otherwise.
    """
    if function is None:
        return lambda function: criterion(function, steps=steps)
    function.steps = steps
    CRITERIA[function.__name__] = function
    return function


def find(given: str | Criterion) -> Criterion:
    """The criterion of a name, or the function itself; raises ValueError with the known names."""
    found = given if callable(given) else CRITERIA.get(given) if isinstance(given, str) else None
    if found is None:
        raise ValueError(f"Expected a criterion of {', '.join(CRITERIA)} or a function, got {given!r}")
    return found


def name_of(given: str | Criterion) -> str:
    """How a run's configuration calls a criterion."""
    return getattr(given, "__name__", type(given).__name__) if callable(given) else given
