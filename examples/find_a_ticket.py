"""Iterative magnitude pruning in a training loop of one's own: the model of each round is really sparse.

    python examples/find_a_ticket.py        # on handwritten digits, seconds; run it twice: nothing is trained again
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

import sparsekit as sk
from sparsekit import data, models


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/example"))
    run_dir = parser.parse_args().out
    dataset = data.load("digits")
    model = models.build("mlp:64-300-100-10", input_shape=tuple(dataset.train_x.shape[1:]), seed=0)
    batch = dataset.train_x[:60]
    search = sk.tickets(
        model, rounds=4, rate=0.5, rewind="init", run_dir=run_dir, example_inputs=batch, exclude=["fc3"]
    )
    for round_ in search:  # a round that is finished in run_dir is not given again
        optimizer = torch.optim.Adam(round_.model.parameters(), 1.2e-3)
        for _ in range(200):
            chosen = torch.randint(len(dataset.train_x), (60,))
            loss = F.cross_entropy(round_.model(dataset.train_x[chosen]), dataset.train_y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            right = round_.model.eval()(dataset.test_x).argmax(1) == dataset.test_y
        accuracy = right.float().mean().item()
        round_.record(test_accuracy=accuracy)
        formats = {layer.name: layer.chosen for layer in sk.explain(round_.model).layers}
        print(f"round {round_.number}: {round_.density:.1%} of the weights, accuracy {accuracy:.3f}, {formats}")
    print(f"the ledger is in {run_dir / 'summary.json'}; sparsekit report {run_dir} draws it")


if __name__ == "__main__":
    main()
