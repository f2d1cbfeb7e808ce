"""What the tests of the ticket search share: small nets with every kind of state, and a loop that trains them."""

import torch
import torch.nn.functional as F
from torch import nn

import sparsekit as sk
from sparsekit import models
from sparsekit.data import Dataset
from sparsekit.nn import dense_state
from sparsekit.ticket.train import Training


def mlp(*widths: int) -> nn.Sequential:
    return models.build("mlp:" + "-".join(map(str, widths)), classes=widths[-1], input_shape=widths[:1], seed=0)


def net() -> nn.Sequential:
    """Every kind of state: convolution, batch norm, dropout, linear."""
    torch.manual_seed(3)
    conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
    return nn.Sequential(
        conv,
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(64, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


X = torch.randn(60, 1, 4, 4, generator=torch.Generator().manual_seed(1))
Y = torch.arange(60) % 3


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


def train(round_, steps=6, make=sgd, x=X, y=Y, spy=None):
    """A loop that draws noise, has a schedule, and counts its steps."""
    model = round_.model.train()
    optimizer = make(model)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], 0.5)
    start = round_.begin(optimizer, scheduler, steps_per_epoch=3)
    for step in range(start, steps):
        if spy is not None:
            spy(step, model, optimizer, scheduler)
        batch = round_.permutation(len(x), step // 3)[20 * (step % 3) :][:20]
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        round_.step()
    return optimizer


def search(model=None, rounds=2, **how):
    return sk.tickets(model or net(), rounds, **{"impl": "csr"} | how)


def run(model=None, rounds=2, steps=6, make=sgd, **how):
    """Train every round; ``[(round, dense state at its start, optimizer)]`` and the search."""
    found, seen = search(model, rounds, **how), []
    for round_ in found:
        before = dense_state(round_.model)
        seen.append((round_, before, train(round_, steps, make)))
    return seen, found


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


def dataset() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 1, 4, 4, generator=generator)
    y = (x.flatten(1) @ torch.randn(16, 3, generator=generator)).argmax(1)
    return Dataset("made", 3, x[:200], y[:200], x[200:250], y[200:250], x[250:], y[250:], (0.0,), (1.0,))


TRAINING = Training(iterations=30, batch_size=20, optimizer="adam", lr=1e-2, eval_every=10)
