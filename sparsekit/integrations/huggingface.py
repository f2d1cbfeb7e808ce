"""Hugging Face: a search whose rounds are whole ``Trainer.train()`` calls, and packed files on the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, hf_hub_download
from torch import nn

from ..export import load, save
from ..mask import digest
from ..nn import masks_of
from ..ticket import tickets
from ..ticket.loop import Round

__all__ = ["FILE", "TicketHubMixin", "find", "ticket_callback"]

FILE = "ticket.safetensors"
"""The name of the packed file in a repository."""


def ticket_callback(round: Round) -> Any:
    """A ``transformers.TrainerCallback`` that tells a round its optimizer, scheduler and steps.

    With rewinding to a step the optimizer, scheduler and generators of that step are put back and training ends as
    many steps earlier. The callback raises RuntimeError when training ends under other masks than it began with.
    """
    from transformers import TrainerCallback  # the mixin needs no transformers

    class TicketCallback(TrainerCallback):
        masks = digest(masks_of(round.model))

        def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, train_dataloader=None, **_):
            per_epoch = max(1, len(train_dataloader) // args.gradient_accumulation_steps)
            plain = getattr(optimizer, "optimizer", optimizer), getattr(lr_scheduler, "scheduler", lr_scheduler)
            self.offset = round.begin(*plain, per_epoch)  # accelerate wraps both

        def on_step_end(self, args, state, control, **_):
            round.step()
            control.should_training_stop |= self.offset > 0 and round.steps >= state.max_steps

        def on_train_end(self, args, state, control, model=None, **_):
            if digest(masks_of(round.model)) != self.masks:
                raise RuntimeError("Expected the masks that the round began with, got others after training")

    return TicketCallback()


def find(model: nn.Module, make_trainer: Callable[[nn.Module], Any], **search: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Search for a ticket with ``transformers.Trainer``: one fresh trainer, optimizer and scheduler per round.

    ``make_trainer(model)`` gives the trainer of a round's model; ``search`` are arguments of
    :func:`sparsekit.tickets` (tied weights want ``exclude=``). The trainer's last metrics are in the ledger, those of
    ``evaluate()`` included where it has an evaluation set. Returns the last round's sparse model and the ledger.
    """
    rounds, last = tickets(model, **search), model
    for round_ in rounds:
        trainer = make_trainer(round_.model)
        trainer.add_callback(ticket_callback(round_))
        metrics = trainer.train().metrics
        if trainer.eval_dataset is not None:
            metrics |= trainer.evaluate()
        round_.record(**metrics)
        last = round_.model
    return last, rounds.summary


class TicketHubMixin(ModelHubMixin):
    """Mix into a module: ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` keep the packed file.

    ``class Net(nn.Module, TicketHubMixin)``: the arguments of ``__init__`` go to ``config.json``, survivors and
    masks to ``ticket.safetensors``. A pretrained ticket comes back sparse, in the formats that are fastest where it
    is loaded; nothing is unpickled.
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        save(self, Path(save_directory) / FILE)

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, revision=None, cache_dir=None, force_download=False, local_files_only=False, token=None,
        **arguments: Any,
    ):  # fmt: skip
        path = Path(model_id) / FILE
        if not Path(model_id).is_dir():
            path = hf_hub_download(
                repo_id=model_id, filename=FILE, revision=revision, cache_dir=cache_dir, force_download=force_download,
                token=token, local_files_only=local_files_only,
            )  # fmt: skip
        return load(path, cls(**arguments))
