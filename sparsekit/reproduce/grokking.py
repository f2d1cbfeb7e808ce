"""Grokking: a network that has memorised generalises much later, unless it starts under the right mask."""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..mask import Masks
from ..nn import convert
from ..overlap import jaccard
from ..prune import prune
from ..ticket.controls import random_masks
from .base import Check, Setting, interval, recipe
from .figure import Curve, Panel, draw

_PAPER = "Minegishi, Iwasawa, Matsuo, Bridging Lottery Ticket and Grokking, arXiv:2310.19470"
_MEMORISED, _GENERALISED = 0.99, 0.95  # accuracies on the pairs shown and on those never shown
_SPARSITY = 0.6  # of all weights, ranked together
_RIVALS = {  # what the grokked mask is compared with: words, the paper, most % of its wait
    "dense": ("no mask", "nearly closed", 50),
    "memorised": ("the mask at memorisation", "below 100", 100),
    "random": ("a random mask", "below 100", 100),
}


@recipe("grokking", _PAPER)
def grokking(setting: Setting) -> list[Check]:
    """Modular addition: the grokked network's mask shortens the wait between memorising and generalising."""
    seeds, runs = setting.seeds or setting.pick(1, 2, 3), []
    for seed in range(seeds):
        task = Addition(setting, seed)
        runs.append(setting.once(f"seed_{seed}", partial(_run, task)))
    _figure(setting, runs)
    late = [(run["dense"]["memorised"], run["dense"]["generalised"]) for run in runs]
    words = ", ".join(f"{first or 'never'} and {then or 'never'}" for first, then in late)
    claim = "dense: generalises (step) at least twice as late as it memorises"
    checks = [setting.check(claim, "delayed", words, all(first and then and then >= 2 * first for first, then in late))]
    for other, (text, paper, most) in _RIVALS.items():
        waits = [(_wait(run["grokked"]), _wait(run[other])) for run in runs]
        mean, _, words = interval([ours / theirs for (ours, _), (theirs, _) in waits], 100, ".0f")
        if not all(seen for _, (_, seen) in waits):
            words = f"at most {words}: the other never did"
        seen = all(seen for (_, seen), _ in waits)
        claim = f"wait under the grokked mask, % of that under {text} (below {most})"
        checks.append(setting.check(claim, paper, words if seen else "never generalises", seen and 100 * mean < most))
    pace = [run["pace"] for run in runs]
    words = ", ".join(f"{before:.4f} and {after:.4f}" for before, after in pace)
    claim = "mask distance per check, while learning to generalise and afterwards"
    checks.append(setting.check(claim, "faster, slower", words, all(before > after for before, after in pace)))
    return checks


def _wait(run: dict) -> tuple[int, bool]:
    """Steps between memorising and generalising; where that was not seen, at least so many, and False."""
    memorised, generalised = run["memorised"] or run["at"][-1], run["generalised"]
    return max(run["at"][0], (generalised or run["at"][-1]) - memorised), generalised is not None


class Addition:
    """All sums of two numbers modulo a prime, some of them shown, and the network that is to learn them."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.device, self.seed = setting.device, seed
        prime, share = setting.pick((11, 0.6), (47, 0.6), (67, 0.4))
        self.steps, self.every = setting.pick(20, 12_000, 50_000), setting.pick(5, 50, 50)
        generator = torch.Generator().manual_seed(seed)
        one, two = torch.triu_indices(prime, prime)  # each pair once: the sum of two embeddings knows no order
        x, y = F.one_hot(one, prime).float() + F.one_hot(two, prime).float(), (one + two) % prime
        order = torch.randperm(len(y), generator=generator)
        cut = int(share * len(y))
        x, y = x.to(self.device), y.to(self.device)
        self.shown, self.hidden = ((x[part], y[part]) for part in (order[:cut], order[cut:]))
        width, neurons = setting.pick((16, 16), (256, 48), (500, 48))  # the authors': 500 and 48
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = nn.Sequential(
                nn.Linear(prime, width, bias=False),  # of a sum of one-hot codes: the sum of two embeddings
                nn.Linear(width, neurons, bias=False),
                nn.ReLU(),
                nn.Linear(neurons, width, bias=False),
                nn.Linear(width, prime, bias=False),
            ).to(self.device)

    def train(self, steps: int, masks: Masks | None = None) -> dict:
        """Train on all shown pairs at once (AdamW 1e-3, decay 1) until the hidden ones are known, at most ``steps``.

        Gives the steps at which both sets are learnt, None where they are not; without ``masks`` it goes on half as
        long again and gives the mask at every check.
        """
        model = copy.deepcopy(self.model)
        if masks is not None:
            model = convert(model, masks, self.shown[0], training=True, inplace=True, impl="csr")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1.0, betas=(0.9, 0.98), fused=True)
        found: dict = {"memorised": None, "generalised": None, "at": [], "shown": [], "hidden": [], "masks": []}
        last = steps
        for step in range(1, steps + 1):
            F.cross_entropy(model(self.shown[0]), self.shown[1]).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % self.every:
                continue
            shown, hidden = (_accuracy(model, *part) for part in (self.shown, self.hidden))
            for key, value in (("at", step), ("shown", shown), ("hidden", hidden)):
                found[key].append(value)
            if masks is None:
                found["masks"].append(prune(model, _SPARSITY))
            if found["memorised"] is None and shown >= _MEMORISED:
                found["memorised"] = step
            if found["generalised"] is None and hidden >= _GENERALISED:
                found["generalised"] = step
                last = min(last, step + max(step // 2, 10 * self.every) if masks is None else step)
            if step >= last:
                break
        return found


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).double().mean())


def _run(task: Addition) -> dict:
    """One seed: dense, then from the same first weights under the masks of both its phases and a random one."""
    dense = task.train(task.steps)
    masks, at = dense.pop("masks"), dense["at"]
    last = masks[-1]
    begin, end = (at.index(dense[key] or at[-1]) for key in ("memorised", "generalised"))
    steps = [1 - jaccard(a, b) for a, b in zip(masks, masks[1:], strict=False)]
    found = {
        "dense": dense,
        "distance": [1 - jaccard(mask, last) for mask in masks],
        "pace": [_mean(steps[begin:end]), _mean(steps[end:])],
    }
    random = random_masks(last, torch.Generator().manual_seed(task.seed))
    for kind, mask in (("grokked", last), ("memorised", masks[begin]), ("random", random)):
        found[kind] = {key: value for key, value in task.train(2 * at[end], mask).items() if key != "masks"}
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


def _figure(setting: Setting, runs: list[dict]) -> None:
    first = runs[0]
    curves = [Curve("dense, pairs shown", first["dense"]["at"], first["dense"]["shown"])]
    for kind in ("dense", "grokked", "memorised", "random"):
        text = kind if kind == "dense" else f"{kind} mask"
        curves.append(Curve(f"{text}, pairs hidden", first[kind]["at"], first[kind]["hidden"]))
    distance = Curve("dense", first["dense"]["at"], first["distance"])
    panels = [
        Panel("step", "accuracy", curves),
        Panel("step", "Jaccard distance to the last mask", [distance]),
    ]
    draw(setting.out, "Modular addition: what the mask knows", panels)
