"""The command line: ``sparsekit info | ticket | reproduce | stability | transfer | report | export | plan | bench``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ._version import __version__
from .memory import keep_memory


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code. Wrong input is one sentence on stderr and code 2."""
    args = _parser().parse_args(argv)
    if args.command in ("ticket", "reproduce", "stability", "transfer", "bench"):
        keep_memory()
    try:
        return args.run(args) or 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"sparsekit {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "; finished rounds are kept" if args.command in ("ticket", "reproduce") else ""
        print(f"sparsekit {args.command}: interrupted{kept}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparsekit", description="Sparse kernels and winning tickets for PyTorch.")
    parser.add_argument("--version", action="version", version=f"sparsekit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    info = commands.add_parser("info", help="what is installed and how to get what is missing; or what FILE holds")
    info.add_argument("file", metavar="FILE", nargs="?", type=Path, help="a packed file, or any safetensors file")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    ticket = commands.add_parser("ticket", help="search for a winning ticket")
    ticket.add_argument(
        "--model", required=True, help="lenet-300-100, mlp:IN-…-OUT, conv2, resnet20, vgg16, … (all are in the README)"
    )
    ticket.add_argument("--data", required=True, help="digits, mnist, fashion-mnist or cifar10")
    ticket.add_argument("--data-dir", type=Path, help="where the data files are (default: $SPARSEKIT_DATA)")
    ticket.add_argument("--rounds", type=int, default=12, help="pruning rounds after the dense one (default 12)")
    ticket.add_argument(
        "--rate",
        type=float,
        help="share of survivors removed per round, half of it in the output layer with --scope layer "
        "(default: the paper's rates for the model)",
    )
    length = ticket.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help="length of each training in epochs")
    length.add_argument("--iterations", type=int, help="length of each training in steps (default: the paper's)")
    ticket.add_argument("--pattern", default="unstructured", help="unstructured, block:RxC, N:M, channel; A,B: a sweep")
    ticket.add_argument(
        "--criterion", default="magnitude",
        help="magnitude, random, snip, grasp, synflow, taylor, lamp, movement, … (any registered); A,B: a sweep",
    )  # fmt: skip
    ticket.add_argument(
        "--score-at", default="end", choices=("end", "init"), help="score trained weights, or the first ones"
    )
    ticket.add_argument("--density", type=float, help="share of weights left after the last round, in place of --rate")
    ticket.add_argument(
        "--schedule", default="geometric", choices=("geometric", "cubic", "linear", "one-shot"),
        help="how --density is reached",
    )  # fmt: skip
    ticket.add_argument(
        "--scope", choices=("layer", "global", "er", "erk"), help="what is ranked together (default: the paper's)"
    )
    ticket.add_argument("--least", type=int, default=0, help="weights that every layer keeps at least")
    ticket.add_argument(
        "--refill", metavar="8x1",
        help="after the last round turn its ticket into blocks (8x1, 16x16, …) or channels of the same density, and "
        "train that from the rewind point",
    )  # fmt: skip
    ticket.add_argument(
        "--rewind", default="init", help="init, 500it, 2ep, lr, none, or auto (the first stable step); A,B: a sweep"
    )
    ticket.add_argument(
        "--control", default="none", metavar="C,C,…",
        help="controls beside each ticket, of reinit, random, shuffle, noise:SIGMAS, signs, linear (its tangent); "
        "named twice, trained twice",
    )  # fmt: skip
    ticket.add_argument(
        "--start", type=Path, metavar="FILE", help="first weights of a safetensors file: a network trained before"
    )
    ticket.add_argument(
        "--impl", default="auto", help="force one format: dense, compact, csr, bsr, … (default: what measures fastest)"
    )
    ticket.add_argument("--seed", type=_seed, default=0)
    ticket.add_argument(
        "--seeds", type=int, default=1, help="replicates, each in OUT/seed_N; the verdict then has intervals"
    )
    ticket.add_argument("--workers", type=int, default=1, help="replicates trained at a time, one thread each")
    ticket.add_argument(
        "--launcher", default="local", choices=("local", "ray"),
        help="where replicates run: processes here, or tasks of a Ray cluster that sees OUT and the data",
    )  # fmt: skip
    ticket.add_argument(
        "--together", action="store_true", help="train the tickets and controls of all seeds as one wide network"
    )
    ticket.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    ticket.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    ticket.add_argument("--out", type=Path, required=True, help="run directory; an unfinished run goes on")
    ticket.set_defaults(run=_ticket)

    again = commands.add_parser("reproduce", help="a paper's experiment, its numbers beside ours, PASS or FAIL")
    again.add_argument("name", metavar="NAME", nargs="?", help="the recipe; none lists them")
    again.add_argument("--scale", default="short", choices=("smoke", "short", "paper"))
    again.add_argument("--seeds", type=int, help="replicates (default: the recipe's)")
    again.add_argument("--data-dir", type=Path, help="where the data files are (default: $SPARSEKIT_DATA)")
    again.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    again.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    again.add_argument("--out", type=Path, help="default: runs/reproduce/NAME-SCALE; an unfinished run goes on")
    again.set_defaults(run=_reproduce)

    stability = commands.add_parser("stability", help="is training from a step on stable to SGD noise?")
    stability.add_argument("--model", required=True, help="as for ticket")
    stability.add_argument("--data", required=True, help="as for ticket")
    stability.add_argument("--data-dir", type=Path, help="where the data files are (default: $SPARSEKIT_DATA)")
    length = stability.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help="length of the training in epochs")
    length.add_argument("--iterations", type=int, help="length of the training in steps (default: the paper's)")
    stability.add_argument("--steps", type=int, nargs="+", default=[0], help="steps to branch from (default 0)")
    stability.add_argument("--ticket", type=Path, help="under the masks of this file, RUN/round_NN/trained.safetensors")
    stability.add_argument("--children", type=int, default=2, help="trainings from each step, compared by pairs")
    stability.add_argument("--alphas", type=int, default=30, help="points on each line")
    stability.add_argument("--workers", type=int, default=1, help="children trained at a time, one thread each")
    stability.add_argument("--seed", type=_seed, default=0)
    stability.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    stability.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    stability.add_argument("--json", type=Path, help="also write the curves to this file")
    stability.set_defaults(run=_stability)

    transfer = commands.add_parser("transfer", help="train a run's ticket on other data or by another optimizer")
    transfer.add_argument("source", metavar="RUN", type=Path)
    transfer.add_argument("--round", type=int, help="which round's masks (default: the last finished)")
    transfer.add_argument("--data", required=True, help="as for ticket")
    transfer.add_argument("--data-dir", type=Path, help="where the data files are (default: $SPARSEKIT_DATA)")
    transfer.add_argument("--model", help="the network there (default: the run's)")
    transfer.add_argument("--exclude", nargs="*", default=[], help="layers that stay newly drawn and dense: fc3")
    transfer.add_argument("--optimizer", choices=("adam", "sgd"), help="default: the recipe's")
    transfer.add_argument("--lr", type=float, help="learning rate (default: the recipe's)")
    length = transfer.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help="length of each training in epochs")
    length.add_argument("--iterations", type=int, help="length of each training in steps (default: the run's)")
    transfer.add_argument("--seed", type=_seed, default=0)
    transfer.add_argument("--seeds", type=int, default=1, help="replicates; the verdict then has intervals")
    transfer.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    transfer.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    transfer.add_argument("--json", type=Path, help="also write the runs to this file")
    transfer.set_defaults(run=_transfer)

    report = commands.add_parser("report", help="write RUN/report.md with figures; of several runs one page")
    report.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run, or folders of them")
    report.add_argument("--out", type=Path, help="folder of the page of several runs (default: the first one given)")
    report.set_defaults(run=_report)

    export = commands.add_parser("export", help="a run's ticket, or a packed file, as a file that trains on or serves")
    export.add_argument("source", metavar="RUN|FILE", type=Path)
    targets = ("packed", "dense", "prune", "pt2", "aoti", "onnx", "onnx-packed")
    export.add_argument("--to", required=True, choices=targets, help="pt2, aoti and onnx hold the network too")
    export.add_argument("--round", type=int, help="which round of a run (default: the last finished)")
    export.add_argument("--model", help="the network of pt2, aoti and onnx (default: the run's)")
    export.add_argument("--input-shape", type=_shape, help="of one input, 3x32x32 (default: of the run's data)")
    export.add_argument("--batch", type=int, default=64, help="inputs that formats are measured with (default 64)")
    export.add_argument("-o", "--out", type=Path, required=True)
    export.set_defaults(run=_export)

    from .bench.command import add_options

    plan = commands.add_parser("plan", help="how a pruned model would run here, layer by layer, and why")
    plan.add_argument("source", metavar="MODEL.pt2|RUN|module.path:factory")
    plan.add_argument("--input", required=True, help="shape of the input with its batch, 64x3x32x32")
    plan.add_argument("--model", help="of a RUN that does not name its own: a model's name or module.path:factory")
    plan.add_argument("--training", action="store_true", help="forward + backward (default: forward)")
    plan.add_argument("--sparsity", type=float, help="prune each layer by magnitude first (default: what it has)")
    plan.add_argument("--pattern", default="unstructured", help="for --sparsity")
    plan.add_argument("--regroup", action="store_true", help="also try the rows in another order (convert's regroup)")
    plan.add_argument("--plan-seconds", type=float, default=10.0, help="what measuring may take (default 10)")
    plan.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    plan.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    plan.add_argument("--json", type=Path, help="also write layers and totals to this file")
    plan.add_argument("--markdown", type=Path, help="also write the table to this file")
    plan.add_argument("--chart", type=Path, help="also draw a bar chart to this file")
    plan.set_defaults(run=_plan)

    bench = commands.add_parser("bench", help="time sparse layers against dense ones, here")
    add_options(bench)
    bench.set_defaults(run=_bench)
    return parser


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(extent) for extent in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"Expected a shape such as 3x32x32, got {text!r}") from None


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"Expected a seed between 0 and {2**32 - 1}, got {text!r}")
    return int(text)


def _info(args: argparse.Namespace) -> None:
    from . import info

    if args.file is not None:
        from .export.inspect import describe, render

        facts = describe(args.file)
        print(json.dumps(facts, indent=1) if args.json else render(facts))
        return
    facts = info.collect()
    print(json.dumps(facts, indent=1) if args.json else info.render(facts))


def _ticket(args: argparse.Namespace) -> None:
    from .ticket.command import search

    search(args)


def _reproduce(args: argparse.Namespace) -> int:
    from . import reproduce

    if args.name is None:
        for found in reproduce.RECIPES.values():
            print(f"{found.name:12} {found.about}")
        return 0
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)
    how = {"data_dir": args.data_dir, "seeds": args.seeds, "device": args.device}
    checks = reproduce.reproduce(args.name, args.scale, args.out, **how)
    print(reproduce.table(checks))
    return int(any(check.passed is False for check in checks))


def _stability(args: argparse.Namespace) -> None:
    from .ticket.command import stability

    stability(args)


def _transfer(args: argparse.Namespace) -> None:
    from .ticket.transfer_command import transfer_run

    transfer_run(args)


def _report(args: argparse.Namespace) -> None:
    if len(args.runs) == 1 and args.out is None and not list(args.runs[0].glob("*/**/summary.json")):
        from .report import write_report

        print(write_report(args.runs[0]))
    else:
        from .ticket.gallery import write_gallery

        print(write_gallery(args.runs, args.out or args.runs[0]))


def _export(args: argparse.Namespace) -> None:
    from .export import export_file

    print(export_file(args.source, args.to, args.out, args.round, args.model, args.input_shape, args.batch))


def _plan(args: argparse.Namespace) -> None:
    from .planner import plan

    plan(args)


def _bench(args: argparse.Namespace) -> int:
    from .bench.command import execute

    return execute(args)


if __name__ == "__main__":
    sys.exit(main())
