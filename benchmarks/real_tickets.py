"""Speed of tickets that a search found, not of random masks: LeNet-300-100 at 3.5 %, VGG-16 and ResNet-18 at 10 %.

    SPARSEKIT_DATA=DIR python benchmarks/real_tickets.py --model resnet18 --run runs/resnet18 --out real.json

The run directory is made by iterative magnitude pruning with short rounds and kept: LeNet by the paper's recipe on
MNIST (15 rounds of 20 %, 600 steps each), the others on CIFAR-10 (three rounds to a tenth, 120 steps of 16 images, all
layers ranked together: long enough for a mask that training shaped, far too short for accuracy). A search that was
stopped goes on after its last round; a finished one is only measured. Rivals of the ticket: plain dense torch with the
ticket's weights (for images the better of contiguous and channels_last), and for a training step (forward, backward,
optimizer) also dense layers that multiply weight and mask; all by the loop that everyone writes, ours also as a search
steps (``written``: perceptrons without autograd, other networks no differently). Beside it, the same densities with
survivors drawn at random.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from pathlib import Path

import torch

import sparsekit as sk
from sparsekit import data, models
from sparsekit.bench import environment
from sparsekit.export.packed import read_portable
from sparsekit.plan import measure
from sparsekit.ticket.ledger import masked_dense
from sparsekit.ticket.store import round_path
from sparsekit.ticket.train import Training, fit, make_step, torch_step

IMAGES = 500  # that a short search is validated and tested on


@dataclasses.dataclass(frozen=True)
class Case:
    """What is searched for: data set, rounds and their rates, the training of a round, the batch that is timed."""

    data: str
    rounds: int
    rates: float | dict[str, float]
    scope: str
    training: Training
    batch: int


def case(name: str, rounds: int | None, iterations: int | None) -> Case:
    """The case of a model's name."""
    if name == "lenet-300-100":
        return Case("mnist", rounds or 15, models.rates(name), "layer", Training(iterations or 600, 60), 60)
    rounds, steps = rounds or 3, iterations or 120
    training = Training(steps, 16, lr=1e-3, eval_every=steps)
    return Case("cifar10", rounds, 1 - 0.1 ** (1 / rounds), "global", training, 16)


def find(name: str, case: Case, run: Path, dataset):
    """The model and the last round's masks of the run, searched for where it is not finished."""
    model = models.build(name, seed=0, input_shape=dataset.input_shape)
    torch.manual_seed(0)
    search = sk.tickets(
        model, case.rounds, case.rates, scope=case.scope, run_dir=run,
        exclude=[models.output_layer(model)] if name != "lenet-300-100" else (),
        example_inputs=dataset.train_x[: case.training.batch_size],
    )  # fmt: skip
    for round_ in search:
        done = fit(round_.model, dataset, case.training, round_.permutation, round_.begin, round_.step)
        round_.record(test_accuracy=done.final_test_accuracy)
        print(f"round {round_.number:2d}: {round_.density:6.1%} left, {done.final_test_accuracy:.2%}", flush=True)
    state, masks, _ = read_portable(round_path(run, case.rounds) / "trained.safetensors")
    model.load_state_dict(state)
    return model, masks, search.summary["rounds"][-1]


def shuffled(masks):
    """Masks of the same density in each layer, survivors anywhere."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view(mask.shape)
        for name, mask in masks.items()
    }


def compare(model, masks, x, y, training: Training) -> dict:
    """Times in us of inference and of a training step, dense and converted, and their ratios."""
    serving, stepping = (sk.convert(model, masks, x, flag, plan_seconds=30) for flag in (False, True))
    layouts = [torch.contiguous_format, *([torch.channels_last] if x[0].dim() == 3 and x.shape[1] > 1 else [])]
    nets = {"converted": (serving, x), "fused": (sk.fuse(serving.eval()), x)}
    steps = {"converted": (stepping, x), "fused": (sk.fuse(stepping.train()), x)}
    steps["written"] = copy.deepcopy(stepping), x
    steps["masked"] = masked_dense(model, masks), x
    for layout in layouts:
        name = "dense" if layout == torch.contiguous_format else "dense channels_last"
        own, image = copy.deepcopy(model).to(memory_format=layout), x.contiguous(memory_format=layout)
        nets[name], steps[name] = (copy.deepcopy(own), image), (own, image)

    def forward(net, x):
        net.eval()

        def run():
            with torch.no_grad():
                return net(x)

        return run

    def step(net, x, make=torch_step):
        run = make(net.train(), training.make_optimizer(net))
        return lambda: run(x, y)

    infer = measure({name: forward(*pair) for name, pair in nets.items()}, 1.0)
    makers = {"written": make_step}
    took = measure({name: step(*pair, makers.get(name, torch_step)) for name, pair in steps.items()}, 1.0)
    dense, dense_step = (min(us for name, us in times.items() if "dense" in name) for times in (infer, took))
    return {
        "forward_us": infer, "step_us": took, "forward": dense / infer["converted"],
        "fused_forward": dense / infer["fused"], "step": dense_step / took["converted"],
        "fused_step": dense_step / took["fused"], "masked_step": took["masked"] / took["fused"],
        "written_step": dense_step / took["written"],
        "formats": [{layer.name: layer.chosen for layer in sk.explain(net).layers} for net in (serving, stepping)],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="lenet-300-100", choices=("lenet-300-100", "vgg16", "resnet18"))
    parser.add_argument("--data-dir", type=Path, help="default: $SPARSEKIT_DATA")
    parser.add_argument("--run", type=Path, required=True, help="run directory of the search; goes on where it stopped")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--scope", choices=("layer", "global"), help="what is ranked together (default: as above)")
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--batch", type=int, help="to time (default 60, images of CIFAR-10 16)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--search-only", action="store_true")
    parser.add_argument("--ticket-only", action="store_true", help="leave out the random masks")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sk.keep_memory()
    asked = case(args.model, args.rounds, args.iterations)
    asked = dataclasses.replace(asked, scope=args.scope or asked.scope)
    dataset = data.load(asked.data, args.data_dir)
    if asked.data == "cifar10":
        few = {name: getattr(dataset, name)[:IMAGES] for name in ("val_x", "val_y", "test_x", "test_y")}
        dataset = dataclasses.replace(dataset, **few)
    model, masks, found = find(args.model, asked, args.run, dataset)
    if args.search_only:
        return
    batch = args.batch or asked.batch
    x, y = dataset.train_x[:batch], dataset.train_y[:batch]
    rows = {"ticket": compare(model, masks, x, y, asked.training)}
    if not args.ticket_only:
        random = shuffled(masks)
        for name, mask in random.items():
            model.get_parameter(name).data.mul_(mask)
        rows["random mask"] = compare(model, random, x, y, asked.training)
    share = "" if found["flop_density"] is None else f" ({found['flop_density']:.1%} of the multiply-adds)"
    print(
        f"{args.model} ({asked.scope} scope), {found['density']:.1%} left{share}, {found['test_accuracy']:.2%} on "
        f"{asked.data}, batch {batch}, {args.threads} threads"
    )
    for name, row in rows.items():
        print(
            f"{name:12} inference {row['forward']:.2f}x (fused {row['fused_forward']:.2f}x), step {row['step']:.2f}x "
            f"(fused {row['fused_step']:.2f}x, written {row['written_step']:.2f}x) of dense, {row['masked_step']:.2f}x "
            f"of masked dense; {row['formats']}"
        )
    if args.out:
        facts = {"environment": environment(), "model": args.model, "scope": asked.scope}
        facts |= {"threads": args.threads, "batch": batch}
        facts |= {key: found[key] for key in ("density", "flop_density", "test_accuracy")}
        args.out.write_text(json.dumps(facts | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
