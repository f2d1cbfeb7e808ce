"""Planes: convolutions and pools that read and leave them, and models whose layers hand them on."""

import copy
import itertools
import os
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checks import check, poison, randn
from torch import nn

import sparsekit as sk
from sparsekit import _native
from sparsekit.kernels.csr import layout
from sparsekit.kernels.csr.planes import from_planes, full_lanes, to_planes
from sparsekit.nn import kept
from sparsekit.nn.planes import Planes

pytestmark = pytest.mark.skipif(not _native.load(), reason="the native library is not built")

ops = torch.ops.sparsekit
GEOMETRIES = {  # samples, weight, image, geometry
    "3x3 of one": (1, (12, 8, 3, 3), (9, 7), {"padding": 1}),
    "3x3, machine code": (1, (64, 64, 3, 3), (14, 14), {"padding": 1}),
    "3x3 of many": (21, (40, 8, 3, 3), (6, 5), {"padding": 1}),
    "strided": (3, (12, 8, 3, 3), (14, 13), {"padding": 1, "stride": 2}),
    "strided of many": (16, (12, 8, 3, 3), (8, 8), {"padding": 1, "stride": 2}),
    "one tap of a stride": (17, (12, 4, 1, 1), (6, 5), {"stride": 2, "groups": 2}),
    "wide": (2, (9, 2, 3, 3), (40, 56), {"groups": 3}),
    "5x5": (16, (9, 6, 5, 5), (7, 10), {"padding": 2}),
    "dilated": (1, (8, 8, 3, 3), (12, 11), {"padding": 2, "dilation": 2}),
    "nothing survives": (2, (4, 3, 3, 3), (5, 5), {"padding": 1}),
    "no samples": (0, (4, 3, 3, 3), (5, 5), {"padding": 1}),
}
ENDS = {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def make(name, dtype):
    """Images, a masked weight, a bias, and a convolution's arguments for them."""
    n, shape, size, given = GEOMETRIES[name]
    options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | given
    density = 0.0 if name == "nothing survives" else 0.3
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density
    mask[1] = False
    weight, bias = randn(*shape, dtype=dtype) * mask, randn(shape[0], dtype=dtype, seed=2)
    x = randn(n, shape[1] * options["groups"], *size, dtype=dtype, seed=3)
    index = layout.csr(mask)
    parts = weight[mask], *index.values(), bias, list(shape[2:])
    geometry = [[options[key]] * 2 for key in ("stride", "padding", "dilation")]
    y = F.conv2d(x.double(), weight.double(), bias.double(), **options)
    return x, y, (*parts, *geometry, options["groups"], layout.code_key(*index.values()))


def planes_of(x, border, lanes):
    return to_planes(x, border, lanes), [x.shape[0], *x.shape[2:], border]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_convolutions_against_an_oracle(name, dtype):
    x, y, arguments = make(name, dtype)
    z = randn(*y.shape, dtype=dtype, seed=4)
    full, ends = full_lanes(dtype), itertools.cycle(ENDS)
    skips = {"none": lambda lanes: (None, []), "image": lambda lanes: (z, []),
             "planes": lambda lanes: planes_of(z, 1, lanes), "narrow": lambda lanes: planes_of(z, 0, 1)}  # fmt: skip
    for lanes, border, skip in itertools.product((1, full), (-1, 0, 1, 2), skips):
        for held, own in ((x, []), planes_of(x, 0, 1), planes_of(x, 1, lanes), planes_of(x, 2, lanes)):
            end = next(ends)
            poison(torch.empty(held.numel()), torch.empty(y.numel()))
            got = ops.csr_conv2d_planes(held, own, *arguments, end, *skips[skip](lanes), lanes, border)
            if border >= 0:
                size = [*y.shape[:1], *y.shape[2:], border]
                planes, got = got, from_planes(got, size)
                again = to_planes(got, border, lanes)  # zeros around
                for number, (one, other) in enumerate(zip(planes, again, strict=True)):
                    there = min(lanes, len(y) - number * lanes)
                    assert torch.equal(one[..., :there], other[..., :there])
            check(got, ENDS[end](y if skip == "none" else y + z.double()), dtype)


@pytest.mark.parametrize("name", ["3x3, machine code", "3x3 of many", "wide", "strided of many"])
def test_the_same_bits_for_any_number_of_threads_and_as_of_images(name):
    x, y, arguments = make(name, torch.float32)
    lanes, z, before = 16 if len(x) > 9 else 1, randn(*y.shape, seed=4), torch.get_num_threads()
    plain = ops.csr_conv2d(x, *arguments, "relu", z)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for skip in ((z, []), planes_of(z, 1, lanes)):
                planes = ops.csr_conv2d_planes(*planes_of(x, 1, lanes), *arguments, "relu", *skip, lanes, 1)
                assert torch.equal(from_planes(planes, [*y.shape[:1], *y.shape[2:], 1]), plain)
                image = ops.csr_conv2d_planes(*planes_of(x, 1, lanes), *arguments, "relu", *skip, lanes, -1)
                assert torch.equal(image, plain)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 1), (3, 1, 1), (2, 1, 0), (5, 3, 2)], ids=str)
def test_pools_are_torchs_to_the_bit(window, dtype):
    window = [[n, n] for n in window]
    for n, lanes, h, w in itertools.product((0, 1, 20), (1, full_lanes(dtype)), (5, 8), (5, 34)):
        x = randn(n, 3, h, w, dtype=dtype)
        if n:
            x[0, 0, 1, 1], x[-1, -1, -1, -1], x[0, 1] = float("nan"), float("inf"), -float("inf")
        expected = F.max_pool2d(x, *window)
        for border in (0, 1):
            poison(torch.empty(expected.numel()))
            planes = ops.max_pool2d_planes(*planes_of(x, 1, lanes), *window, border)
            got = from_planes(planes, [n, *expected.shape[2:], border])
            assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.nan_to_num(), expected.nan_to_num())
            assert planes.sum(3).isnan().sum() <= expected.isnan().sum()  # none in the border


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_every_instruction_set(isa):
    here, env = Path(__file__).parent, {**os.environ, "SPARSEKIT_ISA": isa}
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_planes; test_planes.for_one_instruction_set()"
    done = subprocess.run([sys.executable, "-c", code, here], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f'"active_isa": "{isa}"' in done.stdout or isa not in ops.build_info()


def for_one_instruction_set():
    print(ops.build_info())
    for name in ("3x3 of one", "3x3 of many"):
        test_convolutions_against_an_oracle(name, torch.float32)
    test_pools_are_torchs_to_the_bit((3, 2, 1), torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 8, 7, 1)}, "Expected x of 1 groups and"),
        ({"x": torch.zeros(1, 8, 112, 3)}, "Expected x as planes"),
        ({"x_size": [1, 9, 7]}, "Expected the size of x"),
        ({"x_size": [1, 0, 7, 1]}, "Expected the size of x"),
        ({"x_size": [1, 9, 7, -1]}, "Expected the size of x"),
        ({"lanes": 4}, "Expected 1 or 16 lanes, got 4"),
        ({"skip": torch.zeros(1, 12, 9, 8)}, r"Expected skip of shape \[1, 12, 9, 7\], got \[1, 12, 9, 8\]"),
        ({"skip": torch.zeros(1, 12, 9, 7).double()}, "Expected skip to have the dtype of x"),
        ({"activation": "tanh"}, "Expected activation"),
    ],
)
def test_bad_arguments_are_named(change, message):
    x, _, arguments = make("3x3 of one", torch.float32)
    held, size = planes_of(x, 1, 1)
    given = {"x": held, "x_size": size, "activation": "none", "skip": None, "lanes": 1} | change
    with pytest.raises(RuntimeError, match="csr_conv2d_planes: " + message):
        ops.csr_conv2d_planes(given["x"], given["x_size"], *arguments, given["activation"], given["skip"], [],
                              given["lanes"], 1)  # fmt: skip
    wide = to_planes(randn(16, 8, 9, 7), 1, 16)
    with pytest.raises(RuntimeError, match="Expected planes of 1 lane, got 16"):
        ops.csr_conv2d_planes(wide, [16, 9, 7, 1], *arguments, "none", None, [], 1, 1)
    with pytest.raises(RuntimeError, match="max_pool2d_planes: Expected padding of at most half"):
        ops.max_pool2d_planes(held, size, [2, 2], [2, 2], [2, 2], 1)


# ---- models -----------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, inputs, width, stride=1):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(inputs, width, 3, stride, 1), nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU()
        self.down = nn.Conv2d(inputs, width, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        return self.relu(self.conv2(self.relu(self.conv1(x))) + self.down(x))


def net():
    """A plain stem with a pool, residual blocks, a dense end."""
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 5, padding=2), nn.SiLU(), nn.MaxPool2d(2)
    blocks = Block(16, 16), Block(16, 24, 2), Block(24, 24)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)).eval()


def wins(on):
    """Measurements in which planes win, or do not."""
    return lambda thunks: {name: [thunk(), 1.0 + (name == "images") * on][1] for name, thunk in thunks.items()}


def made(monkeypatch, dense=(), n=3, on=True, model=None, size=(24, 20)):
    monkeypatch.setattr(kept, "measure", wins(on))
    model = net() if model is None else model
    masks = sk.prune(model, 0.6)
    impl = {name.removesuffix(".weight"): "dense" if name.removesuffix(".weight") in dense else "csr" for name in masks}
    sparse = planned(sk.convert(model, masks, impl=impl), randn(n, 3, *size))
    return sparse, sk.fuse(sparse)


def planned(model, x):
    """The model, its convolutions as if they had been measured on x."""

    def note(layer, inputs):
        layer.plan = replace(layer.plan, input_shape=tuple(inputs[0].shape))

    handles = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, sk.SparseConv2d)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return model


def borders(model):
    found = {name: getattr(module, "border", None) for name, module in model.named_modules()}
    return {name: border for name, border in found.items() if border is not None}


def handed_on(model, x):
    """The results of layers that are planes."""
    seen, handles = [], []
    for name, module in model.named_modules():
        if hasattr(module, "border"):
            handles.append(module.register_forward_hook(lambda m, i, y, n=name: seen.append((n, type(y) is Planes))))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return [name for name, planes in seen if planes]


ALL = {"0": 2, "2": 0, "4": 1, "5.conv1": 1, "5.conv2": 0, "6.conv1": 1, "6.down": 0, "6.conv2": 1, "7.conv1": 1}


def test_runs_hand_on_planes(monkeypatch):
    sparse, fused = made(monkeypatch)
    assert borders(fused) == ALL and borders(sparse) == {}
    assert "0, 2, 5.conv1, 5.conv2, 6.conv1, 6.down, 6.conv2, 7.conv1, 7.conv2 hand on planes" in fused[0].plan.note
    assert "hand on planes, 1.0 us for 2.0" in str(sk.explain(fused))
    for x in (randn(3, 3, 24, 20), randn(1, 3, 24, 20), randn(40, 3, 9, 14), randn(0, 3, 24, 20)):
        with torch.no_grad():
            torch.testing.assert_close(fused(x), sparse(x), rtol=1e-4, atol=1e-5)
        assert set(handed_on(fused, x)) == ALL.keys()
        twice, wanted = copy.deepcopy(fused).double(), copy.deepcopy(sparse).double()
        with torch.no_grad():
            torch.testing.assert_close(twice(x.double()), wanted(x.double()))
    plain = sparse.state_dict()
    assert fused.state_dict().keys() == plain.keys()
    assert all(torch.equal(value, plain[key]) for key, value in fused.state_dict().items())


def test_the_way_back_and_copies(monkeypatch):
    sparse, fused = made(monkeypatch)
    x = randn(3, 3, 24, 20)
    dense = sk.to_dense(fused)
    assert [type(module) for module in dense][:5] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.SiLU, nn.MaxPool2d]
    with torch.no_grad():
        wanted = sparse(x)
        torch.testing.assert_close(dense(x), wanted, rtol=1e-4, atol=1e-5)
        again = pickle.loads(pickle.dumps(fused[:5]))
        torch.testing.assert_close(again(x), fused[:5](x))
        fused.load_state_dict(sparse.state_dict())
        assert torch.equal(fused(x), copy.deepcopy(fused)(x))


def test_what_asks_for_images_gets_them(monkeypatch):
    sparse, fused = made(monkeypatch)
    x = randn(3, 3, 24, 20)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(fused(x), sparse(x), atol=1e-5) and fused(x).requires_grad
    fused(x).sum().backward()
    with torch.no_grad():
        assert fused[:3](last).is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(fused(last), sparse(last), rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert fused(x).dtype == torch.bfloat16 and handed_on(fused, x) == []
        torch.testing.assert_close(torch.func.vmap(fused)(x[None])[0], sparse(x), rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match=r"0: Expected an input of shape \[N, 3, H, W\]"):
            fused(randn(3, 4, 24, 20))
        program = torch.export.export(fused, (x,))
        assert not any("planes" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(x), sparse(x), rtol=1e-4, atol=1e-5)
    assert fused[:2].to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_readers_of_images(monkeypatch):
    _, fused = made(monkeypatch, dense=("6.down",))
    assert borders(fused) == {name: border for name, border in ALL.items() if name not in ("5.conv2", "6.down")}
    x = randn(3, 3, 24, 20)
    plain = copy.deepcopy(fused)
    for module in plain.modules():
        if hasattr(module, "border"):
            module.border = None
    with torch.no_grad():
        assert torch.equal(fused(x), plain(x))
    watched, _ = made(monkeypatch)
    watched[2].register_forward_hook(lambda m, i, y: None)
    assert {"0", "2", "4"}.isdisjoint(borders(sk.fuse(watched)))
    assert borders(made(monkeypatch, on=False)[1]) == {}
    circular = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")).eval()
    assert borders(made(monkeypatch, model=circular)[1]) == {}
    unplanned = sk.convert(net(), sk.prune(net(), 0.6), impl="csr")
    assert borders(sk.fuse(unplanned)) == {}


def test_threads_of_a_program_share_a_model(monkeypatch):
    _, fused = made(monkeypatch)
    xs, results = [randn(n, 3, 24, 20, seed=n) for n in (1, 2, 20)], {}

    def serve(x):
        with torch.no_grad():
            results[len(x)] = [fused(x) for _ in range(5)]

    threads = [threading.Thread(target=serve, args=(x,)) for x in xs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        assert all(torch.equal(fused(x), got) for x in xs for got in results[len(x)])


def test_planes_are_tensors_to_everybody(monkeypatch):
    _, fused = made(monkeypatch)
    x = randn(3, 3, 24, 20)
    with torch.no_grad():
        planes, wanted = fused[0](x), from_planes(fused[0](x).held, [3, 24, 20, 2])
        assert type(planes) is Planes and planes.shape == wanted.shape and planes.dtype == x.dtype
        assert "Planes(tensor(" in repr(fused[0](x))
        assert torch.equal(fused[0](x) + 1, wanted + 1) and torch.equal(F.relu(fused[0](x)), wanted)
        assert torch.equal(copy.deepcopy(fused[0](x)), wanted)
        assert torch.equal(pickle.loads(pickle.dumps(fused[0](x))), wanted)
        through = fused[0](x)
        through.mul_(2)  # what is written stays written
        assert torch.equal(through.clone(), 2 * wanted)
        assert torch.equal(fused[2](through), fused[2](2 * wanted))
