"""The state of sparse layers: loaded from and into every format, copied, converted, refused whole where it is torn."""

import copy
import io
import pickle

import pytest
import torch
from nn_layers import FORMATS, check, conv, each_format, linear
from torch import nn
from torch.nn.utils import prune as torch_prune


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("make", [linear, conv])
def test_packed_state_moves_between_formats(source, target, make):
    saved, loaded = make(fmt=source), make(fmt=target)
    parameter = loaded.values
    loaded(torch.randn(2, 9) if make is linear else torch.randn(1, 4, 5, 5)).sum().backward()
    assert loaded.load_state_dict(saved.state_dict()).missing_keys == []
    assert torch.equal(loaded.weight, saved.weight) and torch.equal(loaded.survivors(), saved.survivors())
    assert torch.equal(loaded.bias, saved.bias)
    assert loaded.values is parameter and loaded.format.name == target  # an optimizer keeps hold of it
    check(loaded, torch.randn(2, 9) if make is linear else torch.randn(1, 4, 5, 5))


@each_format
def test_dense_state_fills_the_survivors(fmt):
    layer, dense = linear(fmt=fmt), nn.Linear(9, 7)
    mask = layer.survivors().clone()
    layer.load_state_dict(dense.state_dict())
    assert torch.equal(layer.survivors(), mask)
    assert torch.equal(layer.weight, torch.where(mask, dense.weight, 0))


@each_format
def test_pruned_state_brings_its_mask(fmt):
    layer, dense = linear(fmt=fmt), nn.Linear(9, 7)
    torch_prune.random_unstructured(dense, "weight", 0.5)
    layer.load_state_dict(dense.state_dict())
    assert torch.equal(layer.survivors(), dense.weight_mask != 0)
    assert torch.equal(layer.weight, dense.weight)


@each_format
def test_loading_keeps_the_dtype_and_learns_no_gradient(fmt):
    layer = linear(fmt=fmt, dtype=torch.bfloat16)
    layer.values.requires_grad_(False)
    layer.load_state_dict(linear(fmt="csr").state_dict())
    assert layer.values.dtype == torch.bfloat16 and not layer.values.requires_grad
    check_forward = layer(torch.randn(2, 9, dtype=torch.bfloat16))
    assert check_forward.dtype == torch.bfloat16


def tear(state, **changes):
    return {name: changes.get(name, tensor) for name, tensor in state.items()}


def torn_states():
    csr, compact, dense = (linear(fmt=fmt).state_dict() for fmt in ("csr", "compact", "dense"))
    col, crow, rows = csr["col_indices"], csr["crow_indices"], compact["rows"]

    def edited(tensor, at, value):
        tensor = tensor.clone()
        tensor[at] = value
        return tensor

    wraps = torch.tensor([0, 2**31 - 1, -(2**31), -1, 0, 0, 0, len(col)], dtype=torch.int32)
    wrong_values = dense["values"] + (~dense["mask"]).float()
    return {
        "column too large": (tear(csr, col_indices=edited(col, 0, 9)), r"col_indices in \[0, 9\)"),
        "column negative": (tear(csr, col_indices=edited(col, 0, -1)), r"col_indices in \[0, 9\)"),
        "columns unsorted": (tear(csr, col_indices=col.flip(0)), "ascend within each row"),
        "columns of int64": (tear(csr, col_indices=col.long()), "int32 indices"),
        "rows too few": (tear(csr, crow_indices=crow[:-1]), r"crow_indices \[8\]"),
        "rows beyond the end": (tear(csr, crow_indices=edited(crow, -1, 99)), "ascend from 0"),
        "rows going back": (tear(csr, crow_indices=edited(crow, 1, len(col))), "ascend from 0"),
        "rows that wrap": (tear(csr, crow_indices=wraps), "ascend from 0"),
        "values too few": (tear(csr, values=csr["values"][:-1]), "of one length"),
        "unit too large": (tear(compact, rows=edited(rows, -1, 7)), "rows as ascending int64 indices below 7"),
        "unit twice": (tear(compact, rows=edited(rows, 0, int(rows[1]))), "rows as ascending"),
        "compact values": (tear(compact, values=compact["values"][1:]), "values of shape"),
        "mask of floats": (tear(dense, mask=dense["mask"].float()), "bool mask"),
        "mask too small": (tear(dense, mask=dense["mask"][:-1]), "bool mask"),
        "pruned weights alive": (tear(dense, values=wrong_values), "0 where the mask is False"),
        "no index": ({"values": csr["values"], "bias": csr["bias"]}, "index tensors of one format"),
        "mixed index": (csr | {"rows": rows}, "index tensors of one format"),
        "another shape": ({"weight": torch.ones(9, 7), "bias": csr["bias"]}, r"shape \[7, 9\], got \[9, 7\]"),
        "another mask": (
            {"weight_orig": torch.ones(7, 9), "weight_mask": torch.ones(7, 8), "bias": csr["bias"]},
            r"weight_mask of shape \[7, 9\], got \[7, 8\]",
        ),
    }


@each_format
@pytest.mark.parametrize("name", torn_states())
def test_torn_states_are_refused_whole(fmt, name):
    state, message = torn_states()[name]
    layer = nn.Sequential(linear(fmt=fmt))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=f"0.*{message}"):
        layer.load_state_dict({f"0.{key}": tensor for key, tensor in state.items()}, strict=False)
    after = layer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if key != "0.bias")


@each_format
def test_strict_and_not(fmt):
    layer = nn.Sequential(linear(fmt=fmt), linear(fmt=fmt))
    state = layer.state_dict()
    partial_state = {key: tensor for key, tensor in state.items() if key.startswith("1.")} | {"extra": torch.ones(1)}
    with pytest.raises(RuntimeError, match="Missing key.*0.values"):
        layer.load_state_dict(partial_state)
    result = layer.load_state_dict(partial_state, strict=False)
    assert set(result.missing_keys) == {key for key in state if key.startswith("0.")}
    assert result.unexpected_keys == ["extra"]
    bad = state | {"0.values": torch.ones(1)}
    del bad["1.values"], bad["1.bias"]
    with pytest.raises(RuntimeError, match="1.bias"):  # one layer's trouble does not hide another's
        layer.load_state_dict(bad)


@each_format
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_apart(fmt, how):
    layer = nn.Sequential(conv(fmt=fmt), nn.Flatten(), linear(5, 6 * 9, fmt=fmt))
    x = torch.randn(2, 4, 5, 5)
    layer(x.requires_grad_()).sum().backward()
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        other = nn.Sequential(conv(fmt=fmt), nn.Flatten(), linear(5, 6 * 9, fmt=fmt))
        other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(layer(x), other(x))
    assert other[0].format is layer[0].format
    with torch.no_grad():
        other[0].values.add_(1)
    assert not torch.equal(layer[0].values, other[0].values)


@each_format
def test_set_format_and_back(fmt):
    layer = conv(fmt="csr")
    weight, parameter = layer.weight.detach().clone(), layer.values
    layer.set_format(fmt)
    assert layer.values is parameter and torch.equal(layer.weight, weight)
    assert layer.state_dict().keys() == conv(fmt=fmt).state_dict().keys()
    check(layer, torch.randn(2, 4, 5, 5))
    layer.set_format("csr")
    assert torch.equal(layer.weight, weight)
