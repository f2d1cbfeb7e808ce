"""A search in a process of its own, to be killed: ``ticket_worker.py RUN ROUND:STEP|ROUND:files IMPL REWIND``."""

import os
import random
import signal
import sys

import numpy
import torch
import torch.nn.functional as F
from torch import nn

import sparsekit as sk
from sparsekit import files
from sparsekit.ticket import store


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def write_or_die(path, *content):
    if path.name.startswith("end"):
        die()
    files.write_tensors(path, *content)


def main(out: str, when: str, impl: str, rewind: str) -> None:
    number, _, step = when.partition(":")
    torch.set_num_threads(1)
    for seed in (torch.manual_seed, numpy.random.seed, random.seed):
        seed(0)
    model = nn.Sequential(
        nn.Linear(40, 96),
        nn.BatchNorm1d(96),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(96, 96),
        nn.ReLU(),
        nn.Linear(96, 4),
    )
    x, y = torch.randn(160, 40), torch.arange(160) % 4
    for round_ in sk.tickets(model, 3, 0.5, rewind=rewind, run_dir=out, example_inputs=x[:32], impl=impl):
        print(round_.number, flush=True)
        last = str(round_.number) == number
        if last and step == "files":
            store.write_tensors = write_or_die
        optimizer = torch.optim.Adam(round_.model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        for done in range(round_.begin(optimizer, scheduler, steps_per_epoch=5), 10):
            if last and str(done) == step:
                die()
            batch = round_.permutation(160, done // 5)[32 * (done % 5) :][:32]
            loss = F.cross_entropy(round_.model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            round_.step()
        round_.record(val_loss=loss)


main(*sys.argv[1:])
