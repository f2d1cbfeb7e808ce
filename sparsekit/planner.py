"""``sparsekit plan``: how a model would run here, layer by layer, without running anything else.

The model is a factory named on the command line (``package.module:function``), a ticket's run directory, or a file of
``torch.export``, whose linear and convolution operators become layers again.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import models
from .explanation import Explanation, explain
from .export.files import classes_of
from .export.packed import read_portable
from .files import read_json
from .mask import mask_of
from .nn import convert
from .nn.exported import quiet
from .prune import prunable, prune
from .ticket.store import finished_rounds, round_path

__all__ = ["plan"]

_FACTORY = re.compile(r"[\w.]+:\w+")
_DRAWN = (".png", ".svg", ".pdf")


def plan(args: Namespace) -> Explanation:
    """Plan what ``args`` name, print the table, write the files asked for.

    Raises ValueError or FileNotFoundError on a source that is no model, and on files that cannot be written before
    anything is measured.
    """
    for path in filter(None, (args.json, args.markdown, args.chart)):
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path}: Expected a file in an existing folder, got {path.parent}")
    if args.chart and args.chart.suffix.lower() not in _DRAWN:
        raise ValueError(f"{args.chart}: Expected a chart ending in {', '.join(_DRAWN)}")
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"Expected --threads of at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("Expected --device cpu, got cuda: torch sees no CUDA device here (see sparsekit info)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's exported programs about torch's own code
        found = _plan(args, _shape(args.input))
    print(found)
    if args.json:
        args.json.write_text(json.dumps(found.to_dict(), indent=1))
    if args.markdown:
        args.markdown.write_text(found.to_markdown())
    if args.chart:
        found.chart(args.chart)
    return found


def _plan(args: Namespace, shape: tuple[int, ...]) -> Explanation:
    model, masks = _model(args.source, shape, args.model)
    if args.sparsity is not None:
        masks = prune(model, args.sparsity, args.pattern, scope="layer")
    elif masks is None:
        masks = {name: mask_of(module) for name, module in prunable(model).items()}
    if all(bool(mask.all()) for mask in masks.values()):
        raise ValueError(f"{args.source}: Expected a pruned model, or --sparsity, got one without a pruned weight")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(args.device, _dtype(model))
    _try(args.source, model.to(args.device), x)
    how = {"inplace": not args.regroup, "plan_seconds": args.plan_seconds, "regroup": args.regroup}
    fast = convert(model, masks, x, args.training, **how)
    return explain(fast)


def _try(source: str, model: nn.Module, x: Tensor) -> None:
    """One pass, so that an input the model does not take is one sentence."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model(x)
    except Exception as error:  # whatever its layers raise
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{source}: Expected a model that takes {'x'.join(map(str, x.shape))}, got: {said}") from error


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", text):
        raise ValueError(f"Expected --input as batch and sizes, 64x3x32x32, got {text!r}")
    return tuple(map(int, text.split("x")))


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _model(source: str, shape: tuple[int, ...], network: str | None) -> tuple[nn.Module, dict[str, Tensor] | None]:
    """The model, and its masks where the source holds any."""
    path = Path(source)
    if path.is_dir():
        return _of_run(path, shape, network)
    if network is not None:
        raise ValueError(f"Expected --model beside a run directory, which may not name its own, got {source!r}")
    if path.suffix == ".pt2":
        if not path.is_file():
            raise FileNotFoundError(f"{path}: Expected a file of torch.export.save, got none")
        return _of_program(path), None
    if _FACTORY.fullmatch(source):
        return _of_factory(source), None
    raise ValueError(f"Expected MODEL.pt2, a run directory or module.path:factory, got {source!r}")


def _of_run(run: Path, shape: tuple[int, ...], network: str | None) -> tuple[nn.Module, dict[str, Tensor]]:
    rounds = finished_rounds(run)
    if not rounds:
        raise FileNotFoundError(f"{run}: Expected a run with a finished round, got none")
    state, masks, _ = read_portable(round_path(run, rounds[-1]) / "trained.safetensors")
    name = network or read_json(run / "config.json").get("model")
    if name is None:
        raise ValueError(f"{run}: Expected a run that names its model, or --model module.path:factory, got neither")
    if network is not None and _FACTORY.fullmatch(network):  # never one that a file names
        model = _of_factory(network)
    else:
        model = models.build(str(name), classes=classes_of(str(name), state, shape[1:]), input_shape=shape[1:])
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        wanted = f"a ticket of {name} for inputs of {shape[1:]}"
        raise ValueError(f"{run}: Expected {wanted}, got another's ({error})") from None
    return model.eval(), masks


def _of_factory(source: str) -> nn.Module:
    module, _, name = source.partition(":")
    sys.path.insert(0, os.getcwd())  # as python -m does
    try:
        factory = getattr(importlib.import_module(module), name)
    except AttributeError:
        raise ValueError(f"{source}: Expected a function of {module}, got no {name!r} in it") from None
    finally:
        sys.path.remove(os.getcwd())
    model = factory() if not isinstance(factory, nn.Module) else factory
    if not isinstance(model, nn.Module):
        raise TypeError(f"{source}: Expected a function that returns a model, got {type(model).__name__}")
    return model.eval()


def _of_program(path: Path) -> nn.Module:
    with _no_pickle(), quiet():
        try:
            graph = torch.export.load(path).module(check_guards=False)
        except Exception as error:  # torch raises whatever its readers raise on a torn file
            raise ValueError(f"{path}: Expected a file of torch.export.save, got another ({error})") from None
    for name in ("train", "eval"):
        graph.__dict__.pop(name, None)  # torch forbids both on a program's module; its layers here have no modes
    if any(str(node.target).startswith("sparsekit.") for node in graph.graph.nodes):
        raise ValueError(f"{path}: Expected a model of dense layers, got one that was planned before it was exported")
    found = _layers(graph)
    if not found:
        raise ValueError(
            f"{path}: Expected linear or convolution operators over parameters, got none; weights that the program "
            "computes (a parametrisation, torch.nn.utils.prune not removed) are not seen"
        )
    return graph


@contextmanager
def _no_pickle() -> Iterator[None]:
    """torch falls back to full unpickling where the safe reader refuses; a file from elsewhere must not get that."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def _layers(graph: fx.GraphModule) -> list[str]:
    """Put ``nn.Linear`` and ``nn.Conv2d`` where the program calls their operators on parameters; their names."""
    makers = {torch.ops.aten.linear.default: _linear, torch.ops.aten.conv2d.default: _conv}
    found: dict[str, tuple] = {}
    for node in list(graph.graph.nodes):
        maker = makers.get(node.target)
        if maker is None:
            continue
        x, weight, *rest = node.args
        bias = rest[0] if rest else None
        if any(n is not None and n.op != "get_attr" for n in (weight, bias)) or not weight.target.endswith("weight"):
            continue
        name = weight.target.removesuffix("weight").removesuffix(".") or "layer"
        facts = (bias and bias.target, tuple(map(str, rest[1:])))
        if found.setdefault(name, facts) != facts:
            continue  # one weight in two geometries: the first keeps it
        parameters = [None if n is None else _attribute(graph, n.target) for n in (weight, bias)]
        if not isinstance(graph.get_submodule(name) if name != "layer" else None, nn.Linear | nn.Conv2d):
            graph.set_submodule(name, maker(*parameters, *rest[1:]))
        with graph.graph.inserting_before(node):
            call = graph.graph.call_module(name, (x,))
        node.replace_all_uses_with(call)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return list(found)


def _attribute(graph: nn.Module, target: str) -> Any:
    owner, _, leaf = target.rpartition(".")
    return getattr(graph.get_submodule(owner), leaf)


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer


def _conv(weight, bias, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1) -> nn.Conv2d:
    geometry = {"stride": tuple(stride), "padding": tuple(padding), "dilation": tuple(dilation), "groups": groups}
    out, inputs, *kernel = weight.shape
    layer = nn.Conv2d(inputs * groups, out, tuple(kernel), bias=bias is not None, device="meta", **geometry)
    layer.weight, layer.bias = weight, bias
    return layer
