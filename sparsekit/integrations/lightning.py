"""Lightning: a search whose rounds are whole fits, and the callback that counts their steps.

A callback alone cannot run rounds: one ``fit`` is one training. (``ModelPruning`` of Lightning prunes within
one fit, and goes on with the optimizer's state of before.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

try:
    import lightning.pytorch as lightning
except ImportError:  # the older name of the same package
    import pytorch_lightning as lightning
from torch import nn

from ..mask import digest
from ..nn import masks_of
from ..ticket import tickets
from ..ticket.loop import Round

__all__ = ["TicketCallback", "find"]


class TicketCallback(lightning.Callback):
    """Tells a round what it needs: optimizer and scheduler at the start, every step, the end of its steps.

    With rewinding to a step the optimizer, scheduler and generators of that step are put back and the fit ends as
    many steps earlier. Raises RuntimeError when a fit ends under other masks than it began with.
    """

    def __init__(self, round: Round) -> None:
        self.round, self.masks = round, digest(masks_of(round.model))

    def on_train_start(self, trainer: lightning.Trainer, pl_module: nn.Module) -> None:
        """Begin the round; Lightning made optimizer and scheduler anew for this fit."""
        if len(trainer.optimizers) != 1:
            raise ValueError(f"Expected one optimizer, got {len(trainer.optimizers)}; search by sparsekit.tickets")
        scheduler = trainer.lr_scheduler_configs[0].scheduler if trainer.lr_scheduler_configs else None
        self.total = trainer.estimated_stepping_batches
        per_epoch = max(1, int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
        self.offset = self.round.begin(trainer.optimizers[0], scheduler, per_epoch)

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Count optimizer steps; accumulated batches are none."""
        if trainer.global_step + self.offset > self.round.steps:
            self.round.step()
            trainer.should_stop |= self.offset > 0 and self.round.steps >= self.total

    def on_train_end(self, trainer: lightning.Trainer, pl_module: nn.Module) -> None:
        """Check that what was pruned stayed pruned."""
        if digest(masks_of(pl_module)) != self.masks:
            raise RuntimeError("Expected the masks that the round began with, got others after the fit")


def find(
    module: lightning.LightningModule,
    make_trainer: Callable[[], lightning.Trainer],
    fit: Mapping[str, Any],
    **search: Any,
) -> tuple[lightning.LightningModule, dict[str, Any]]:
    """Search for a ticket of a LightningModule: one fresh trainer, optimizer and scheduler per round.

    ``make_trainer()`` gives the trainer of each round, ``fit`` the arguments of its ``fit`` (``train_dataloaders``,
    ``val_dataloaders`` or ``datamodule``), ``search`` those of :func:`sparsekit.tickets`. The metrics that the module
    logged are in the ledger. Returns the last round's sparse module and the ledger.
    """
    rounds, last = tickets(module, **search), module
    for round_ in rounds:
        trainer = make_trainer()
        trainer.callbacks.append(TicketCallback(round_))
        trainer.fit(round_.model, **fit)
        if trainer.interrupted:
            raise KeyboardInterrupt
        round_.record(**{name: value for name, value in trainer.callback_metrics.items() if value.numel() == 1})
        round_.model.trainer = None  # the module outlives its trainer
        last = round_.model
    return last, rounds.summary
