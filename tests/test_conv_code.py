"""Machine code for the masks of convolutions: right, the same for any number of threads, and never for another mask."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from checks import check, poison, randn

from sparsekit.kernels.csr import layout

ops = torch.ops.sparsekit


def code_is_unavailable():
    try:
        return '"machine_code": "yes"' not in ops.build_info()
    except (AttributeError, RuntimeError):
        return True


pytestmark = pytest.mark.skipif(code_is_unavailable(), reason="no machine code here")
CASES = {
    "3x3": (17, (40, 24, 3, 3), (13, 12), dict(padding=1)),
    "3x3 of one image": (1, (100, 64, 3, 3), (14, 14), dict(padding=1)),
    "strided": (2, (65, 48, 3, 3), (21, 22), dict(padding=1, stride=2)),
    "dilated": (16, (29, 31, 3, 5), (15, 16), dict(padding=(2, 0), dilation=2)),
    "pointwise": (1, (64, 96, 1, 1), (20, 20), {}),
    "pointwise, many lines": (3, (65, 40, 1, 1), (24, 30), {}),
    "pointwise, odd": (2, (64, 96, 1, 1), (15, 15), {}),
    "pointwise, 4 KB apart": (1, (64, 96, 1, 1), (32, 32), {}),
    "pointwise, strided": (2, (64, 96, 1, 1), (35, 30), dict(stride=2)),
    "7x7": (3, (57, 16, 7, 7), (23, 22), dict(stride=2, padding=3)),
    "many samples, taps far apart": (16, (40, 31, 3, 3), (20, 33), dict(padding=2, dilation=8)),
    "one output": (4, (1, 64, 3, 3), (20, 20), dict(padding=1)),
}


def make(shape, density=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    mask[shape[0] // 2] = False  # an output without survivors
    index = layout.csr(mask)
    return torch.randn(shape, generator=generator) * mask, mask, index


def conv(x, weight, mask, index, bias=None, activation="none", stride=1, padding=0, dilation=1, key=True, skip=None):
    pairs = [(v, v) if isinstance(v, int) else v for v in (stride, padding, dilation)]
    code_key = layout.code_key(*index.values()) if key is True else key
    how = *pairs, 1, code_key, activation, skip
    return ops.csr_conv2d(x, weight[mask], *index.values(), bias, mask.shape[2:], *how)


def gradient(dy, x, weight, mask, index, stride=1, padding=0, dilation=1, key=True, needs=(True, True, True)):
    pairs = [(v, v) if isinstance(v, int) else v for v in (stride, padding, dilation)]
    code_key = layout.code_key(*index.values()) if key is True else key
    lists = *index.values(), *layout.transposed(*index.values(), layout.columns(mask.shape)).values()
    return ops.csr_conv2d_backward(dy, x, weight[mask], *lists, mask.shape[2:], *pairs, 1, *needs, code_key)


@pytest.mark.parametrize("case", CASES)
def test_gradients_against_the_dense_oracle(case):
    n, shape, size, how = CASES[case]
    weight, mask, index = make(shape)
    x = randn(n, shape[1], *size)
    exact, w = x.double().requires_grad_(), weight.double().requires_grad_()
    y = F.conv2d(exact, w, **how)
    dy = randn(*y.shape, seed=5)
    dx, dw = torch.autograd.grad(y, (exact, w), dy.double())
    for form in (torch.contiguous_format, torch.channels_last):
        poison(dx.float())
        got = gradient(dy.contiguous(memory_format=form), x, weight, mask, index, **how)
        check(got[0], dx)
        check(got[1], dw[mask])
        check(gradient(dy, x, weight, mask, index, **how, needs=(True, False, False))[0], dx)


def test_code_in_huge_pages():
    shape = (512, 512, 3, 3)
    x, dy = randn(16, 512, 6, 6), randn(16, 512, 4, 4, seed=2)
    for density in (0.08, 0.15):  # one whole page and a rest in small ones; two
        weight, mask, index = make(shape, density)
        y = conv(x, weight, mask, index)
        check(y, F.conv2d(x.double(), weight.double()))
        assert not torch.equal(y, conv(x, weight, mask, index, key=None))  # code ran, in another order of additions
        exact = x.double().requires_grad_()
        (dx,) = torch.autograd.grad(F.conv2d(exact, weight.double()), exact, dy.double())
        check(gradient(dy, x, weight, mask, index, needs=(True, False, False))[0], dx)


def test_input_gradients_run_on_code_for_any_number_of_threads():
    layer, before, results = make((64, 100, 3, 3)), torch.get_num_threads(), []
    x, dy = randn(2, 100, 29, 29), randn(2, 64, 15, 15, seed=2)
    how = dict(stride=2, padding=1)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradient(dy, x, *layer, **how))
            results[-1] += (gradient(randn(17, 64, 8, 8), randn(17, 100, 10, 10), *layer)[0],)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    plain = gradient(dy, x, *layer, **how, key=None)
    assert not torch.equal(plain[0], results[0][0])  # another order of additions: no code ran there
    assert torch.equal(plain[1], results[0][1]) and torch.equal(plain[2], results[0][2])


@pytest.mark.parametrize("case", CASES)
def test_against_the_dense_oracle(case):
    n, shape, size, how = CASES[case]
    layer, bias = make(shape), randn(shape[0], seed=3)
    for x in (randn(n, shape[1], *size), randn(n, shape[1], *size).contiguous(memory_format=torch.channels_last)):
        expected = F.conv2d(x.double(), layer[0].double(), bias.double(), **how)
        poison(expected.float())
        check(conv(x, *layer, bias, **how), expected)
        check(conv(x, *layer, **how), F.conv2d(x.double(), layer[0].double(), **how))


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("key", [True, None], ids=["code", "no code"])
def test_activations(activation, key):
    layer, x, bias = make((40, 64, 3, 3)), randn(3, 64, 14, 14), randn(40, seed=3)
    expected = getattr(F, activation)(F.conv2d(x.double(), layer[0].double(), bias.double()))
    check(conv(x, *layer, bias, activation, key=key), expected)
    layer, x = make((40, 64, 1, 1)), randn(3, 64, 20, 20)[1:]  # read and written in place
    expected = getattr(F, activation)(F.conv2d(x.double(), layer[0].double(), bias.double()))
    check(conv(x, *layer, bias, activation, key=key), expected)


@pytest.mark.parametrize("case", CASES)
def test_what_is_added_is_added_before_the_activation(case):
    n, shape, size, how = CASES[case]
    layer, bias, x = make(shape), randn(shape[0], seed=3), randn(n, shape[1], *size)
    for form in (torch.contiguous_format, torch.channels_last):
        plain = conv(x.contiguous(memory_format=form), *layer, bias, **how)
        for skip in (randn(*plain.shape, seed=6), randn(*plain.shape, seed=6).contiguous(memory_format=form)):
            for activation, function in (("none", torch.clone), ("relu", torch.relu), ("silu", F.silu)):
                poison(plain)
                got = conv(x.contiguous(memory_format=form), *layer, bias, activation, **how, skip=skip)
                assert got.stride() == plain.stride()
                wanted = function(plain + skip)
                assert torch.equal(got, wanted) or (activation == "silu" and torch.allclose(got, wanted, atol=1e-6))


def test_code_is_really_used_and_gives_other_bits_than_the_kernels():
    """The two add in different orders: results that agree to the bit would mean that no code ran."""
    layer, x = make((100, 64, 3, 3)), randn(1, 64, 14, 14)
    assert not torch.equal(conv(x, *layer, padding=1), conv(x, *layer, padding=1, key=None))


def test_results_do_not_depend_on_the_number_of_threads():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found = [conv(randn(n, 64, 30, 30), *make((100, 64, 3, 3)), bias=randn(100), padding=1) for n in (1, 2, 16)]
            results.append([*found, conv(randn(1, 256, 28, 28), *make((256, 256, 1, 1), 0.1), bias=randn(256))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_each_share_of_the_outputs_adds_its_own_bias(threads):
    before, shape = torch.get_num_threads(), (1000, 64, 1, 1)
    x, (weight, mask, index), bias = randn(1, 64, 28, 28), make(shape, 0.2), randn(1000)
    try:
        torch.set_num_threads(threads)
        got = conv(x, weight, mask, index, bias)
    finally:
        torch.set_num_threads(before)
    check(got, F.conv2d(x.double(), weight.double(), bias.double()))


def test_new_values_need_no_new_code():
    weight, mask, index = make((40, 64, 3, 3))
    x = randn(2, 64, 14, 14)
    for factor in (1, -2):
        check(conv(x, factor * weight, mask, index), F.conv2d(x.double(), factor * weight.double()))


def test_other_geometries_under_one_key():
    layer = make((40, 64, 3, 3))
    for size in ((14, 14), (14, 15), (9, 30), (14, 14)):
        for how in ({}, {"padding": 1}, {"stride": 2}, {"dilation": 2}):
            x = randn(2, 64, *size)
            check(conv(x, *layer, **how), F.conv2d(x.double(), layer[0].double(), **how))


def test_a_key_of_another_mask_is_noticed():
    one, other = make((40, 64, 3, 3)), make((40, 64, 3, 3), seed=1)
    x, key = randn(2, 64, 14, 14), layout.code_key(*one[2].values())
    for layer in (one, other, one):
        check(conv(x, *layer, key=key), F.conv2d(x.double(), layer[0].double()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_values_reach_exactly_what_depends_on_them(bad):
    weight, mask, index = make((60, 64, 3, 3), 0.1)
    x = randn(2, 64, 14, 14)
    x[1, 63, 0, 13] = bad
    where = torch.zeros_like(x)
    where[1, 63, 0, 13] = 1
    y = conv(x, weight, mask, index, padding=1)
    assert torch.equal(y.isfinite(), F.conv2d(where, mask.float(), padding=1) == 0)
    dy = randn(2, 60, 14, 14)
    dy[1, 59, 0, 13] = bad
    where = (~dy.isfinite()).float()
    dx = gradient(dy, randn(2, 64, 14, 14), weight, mask, index, padding=1)[0]
    assert torch.equal(dx.isfinite(), F.conv_transpose2d(where, mask.float(), padding=1) == 0)


def test_the_switch_turns_it_off():
    program = "import sparsekit, torch, sys; sys.path.insert(0, sys.argv[1]); import test_conv_code as t\n"
    program += "layer, x = t.make((100, 64, 3, 3)), t.randn(1, 64, 14, 14)\n"
    program += "assert torch.equal(t.conv(x, *layer, padding=1), t.conv(x, *layer, padding=1, key=None))"
    environment = os.environ | {"SPARSEKIT_JIT": "0"}
    here = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run([sys.executable, "-c", program, here], env=environment, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_a_wrong_key_is_named():
    layer, x = make((100, 64, 3, 3)), randn(1, 64, 14, 14)
    with pytest.raises(RuntimeError, match="Expected code_key of dtype int64 and shape"):
        conv(x, *layer, key=torch.zeros(3, dtype=torch.int64))
