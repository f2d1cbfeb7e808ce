"""Reads a graph that torch.export saved, and runs it, without the seconds of importing torch's tracer.

The archive holds the graph as JSON (``torch/_export/serde/schema.py``, schema version 8) and the weights as bytes.
Nothing of it is unpickled or evaluated: operators of ``aten`` and ``sparsekit`` run, arithmetic on sizes, nothing else.
(``torch.export.load`` looks up any function of torch that a file names, and evaluates its expressions.)
"""

from __future__ import annotations

import json
import math
import operator
import zipfile
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

__all__ = ["Traced", "read"]

_MAJOR = 8
_DTYPES = dict(enumerate((
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64,
    torch.complex32, torch.complex64, torch.complex128, torch.bool, torch.bfloat16), 1))  # fmt: skip
_LAYOUTS = {7: torch.strided}
_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d, 4: torch.preserve_format}
_SIZES = {f"_operator.{name}": getattr(operator, name) for name in (
    "add", "sub", "mul", "floordiv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_")}  # fmt: skip
_NAMES = {"as_tensor": "name", "as_sym_int": "as_name", "as_sym_bool": "as_name", "as_sym_float": "as_name"}
_PLAIN = {"as_int", "as_ints", "as_float", "as_floats", "as_bool", "as_bools", "as_string", "as_int_lists"}
_ENUMS = {"as_scalar_type": _DTYPES, "as_layout": _LAYOUTS, "as_memory_format": _FORMATS}


class _Name(str):
    """A value that an earlier step makes."""


class Traced:
    """A traced graph as steps ``(function, arguments, holes, keywords, outputs, names that nobody reads again)``.

    ``holes`` are the places of those arguments that other steps make; the rest stand there already.
    """

    def __init__(self, graph: dict[str, Any], held: dict[str, Tensor], inputs: list, specs: tuple[Any, Any]) -> None:
        self.inputs = inputs
        """Name and facts of every input; None instead of facts where it is no tensor."""
        self._names = [name for name, _ in inputs]
        self._spec, self._outputs = specs
        self._plain = self._spec == pytree.tree_structure(((0,) * len(inputs), {}))
        self._results = [_argument(argument, held) for argument in graph["outputs"]]
        seen = {name for result in self._results for name in _names(result)}
        self._steps: list[tuple] = []
        for node in reversed(graph["nodes"]):
            function, arguments, keywords, outputs = _step(node, held)
            holes = [place for place, value in enumerate(arguments) if _names(value)]
            used = {name for value in (*arguments, *keywords.values()) for name in _names(value)}
            dead = [name for name in used | set(_names(outputs)) if name not in seen]
            seen |= used
            self._steps.append((function, arguments, holes, keywords, outputs, dead))
        self._steps.reverse()

    def run(self, *inputs: Any) -> Any:
        """The model's output for inputs that were checked."""
        if not (self._plain and len(inputs) == len(self._names) and all(isinstance(x, Tensor) for x in inputs)):
            inputs, spec = pytree.tree_flatten((inputs, {}))
            if spec != self._spec:
                raise ValueError(f"Expected inputs as at export ({self._spec}), got {spec}")
        values = dict(zip(self._names, inputs, strict=True))
        with torch.no_grad():
            for function, arguments, holes, keywords, outputs, dead in self._steps:
                arguments = arguments.copy()
                for place in holes:
                    arguments[place] = _fill(arguments[place], values)
                if keywords:
                    made = function(*arguments, **{key: _fill(value, values) for key, value in keywords.items()})
                else:
                    made = function(*arguments)
                if len(outputs) == 1 and type(outputs[0]) is _Name:
                    values[outputs[0]] = made
                else:
                    _assign(outputs, made, values)
                for name in dead:
                    del values[name]
        results = [_fill(result, values) for result in self._results]
        return results[0] if self._outputs.is_leaf() else pytree.tree_unflatten(results, self._outputs)


def read(archive: zipfile.ZipFile) -> Traced:
    """The one graph of a ``.pt2`` archive; raises ValueError where it is torn or holds something else."""
    root = archive.namelist()[0].partition("/")[0]
    models = [name for name in archive.namelist() if name.startswith(f"{root}/models/")]
    try:
        if len(models) != 1 or archive.read(f"{root}/byteorder") != b"little":
            raise ValueError("not one little-endian model")
        program = json.loads(archive.read(models[0]))
        if program["schema_version"]["major"] != _MAJOR:
            raise ValueError(f"schema version {program['schema_version']}")
        module, stem = program["graph_module"], models[0].rpartition("/")[2].removesuffix(".json")
        tensors = {}
        for kind in ("weights", "constants"):
            tensors |= _tensors(archive, f"{root}/data/{kind}/", f"{stem}_{kind}_config.json")
        held, inputs = {}, []
        for spec in module["signature"]["input_specs"]:
            ((kind, facts),) = spec.items()
            if kind in ("parameter", "buffer", "tensor_constant"):
                held[facts["arg"]["name"]] = tensors[facts[f"{kind}_name"]]
            elif kind == "constant_input":
                inputs.append((facts["name"], None))
            elif kind == "user_input" and "as_tensor" in facts["arg"]:
                name = facts["arg"]["as_tensor"]["name"]
                inputs.append((name, _facts(module["graph"]["tensor_values"][name])))
            else:
                raise ValueError(f"an input of kind {kind}")
        if any([*spec] != ["user_output"] for spec in module["signature"]["output_specs"]):
            raise ValueError("outputs beside the model's own")
        calls = next(call["signature"] for call in module["module_call_graph"] if call["fqn"] == "")
        specs = tuple(pytree.treespec_loads(calls[name]) for name in ("in_spec", "out_spec"))
        return Traced(module["graph"], held, inputs, specs)
    except (KeyError, TypeError, AttributeError, StopIteration, RuntimeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _tensors(archive: zipfile.ZipFile, folder: str, config: str) -> dict[str, Tensor]:
    """The tensors that a table of the archive names."""
    storages: dict[str, Tensor] = {}
    tensors = {}
    for name, entry in json.loads(archive.read(folder + config))["config"].items():
        path, meta = entry["path_name"], entry["tensor_meta"]
        if entry["use_pickle"] or meta["layout"] != 7:
            raise ValueError(f"{name} is no plain tensor")
        dtype, count = _DTYPES[meta["dtype"]], math.prod(sizes := _ints(meta["sizes"]))
        if not count:
            tensors[name] = torch.empty(sizes, dtype=dtype, device=meta["device"]["type"])
            continue
        if path not in storages:
            raw = torch.frombuffer(bytearray(archive.read(folder + path)), dtype=torch.uint8)
            storages[path] = raw.to(torch.device(meta["device"]["type"], meta["device"]["index"]), copy=True)
        whole = storages[path].view(dtype)
        tensors[name] = whole.as_strided(sizes, _ints(meta["strides"]), meta["storage_offset"]["as_int"])
    return tensors


def _ints(entries: list[dict[str, int]]) -> list[int]:
    return [entry["as_int"] for entry in entries]


def _facts(meta: dict[str, Any]) -> dict[str, Any]:
    """What an input must be; None where an axis may be of any size."""
    return {"dtype": str(_DTYPES[meta["dtype"]]), "shape": [size.get("as_int") for size in meta["sizes"]]}


def _step(node: dict[str, Any], held: dict[str, Tensor]) -> tuple[Callable, list, dict[str, Any], list]:
    """One call of the graph: function, positional and keyword arguments, names of the outputs."""
    function, arguments, keywords = _function(node["target"]), [], {}
    for entry in node["inputs"]:
        value = _argument(entry["arg"], held)
        if entry["kind"] == 1:
            arguments.append(value)
        else:
            keywords[entry["name"]] = value
    return function, arguments, keywords, [_argument(output, {}) for output in node["outputs"]]


def _function(target: str) -> Callable:
    if target in _SIZES:
        return _SIZES[target]
    parts = target.split(".")
    if len(parts) != 5 or parts[:2] != ["torch", "ops"] or parts[2] not in ("aten", "sparsekit"):
        raise ValueError(f"a call of {target}")
    op = getattr(getattr(getattr(torch.ops, parts[2]), parts[3]), parts[4])
    if any(argument.name == "filename" for argument in op._schema.arguments):
        raise ValueError(f"a call of {target}, which opens files")
    return op


def _argument(entry: dict[str, Any], held: dict[str, Tensor]) -> Any:
    """An argument as it is passed; a :class:`_Name` where a step or the caller makes it."""
    ((kind, value),) = entry.items()
    if kind in _NAMES:
        name = value.get(_NAMES[kind])
        return next(iter(value.values())) if name is None else held.get(name, _Name(name))
    if kind in ("as_tensors", "as_sym_ints", "as_optional_tensors"):
        one = {"as_tensors": "as_tensor", "as_sym_ints": "as_sym_int"}.get(kind)
        return [_argument({one: item} if one else item, held) for item in value]
    if kind in ("as_none", "as_optional_tensor"):
        return None if kind == "as_none" else _argument(value, held)
    if kind in _ENUMS:
        return _ENUMS[kind][value]
    if kind == "as_device":
        return torch.device(value["type"], value["index"])
    if kind not in _PLAIN:
        raise ValueError(f"an argument {kind}")
    return value


def _names(value: Any) -> list[str]:
    if isinstance(value, list):
        return [name for item in value for name in _names(item)]
    return [value] if isinstance(value, _Name) else []


def _fill(value: Any, values: dict[str, Any]) -> Any:
    kind = type(value)
    if kind is _Name:
        return values[value]
    return [_fill(item, values) for item in value] if kind is list else value


def _assign(outputs: list, made: Any, values: dict[str, Any]) -> None:
    """Give the results of a call their names; an operator returns several as a tuple."""
    results = (made,) if len(outputs) == 1 else made if outputs else ()
    for name, result in zip(outputs, results, strict=True):
        if type(name) is list:
            values.update(zip(name, result, strict=True))
        elif name is not None:
            values[name] = result
