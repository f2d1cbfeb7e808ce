"""A fixed slice of the random layers that ``make nightly`` runs by the ten thousand."""

import pytest
import random_kernels
import torch

from sparsekit import _native

pytestmark = pytest.mark.skipif(_native.lacks_cpu() is not None, reason="the native library is not built")


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_random_layers(first):
    failed = random_kernels.run(first, 50)
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("what", ["y", "activated", "x", "values", "bias"])
def test_one_wrong_element_is_found(what, monkeypatch):
    run = random_kernels._run

    def spoiled(case, *args):
        found = run(case, *args)
        if what in found and found[what].numel():
            found[what] = found[what].clone()
            found[what].view(-1)[-1] += 0.05
        return found

    monkeypatch.setattr(random_kernels, "_run", spoiled)
    case = next(c for c in map(random_kernels.draw, range(100)) if c.dtype == torch.float32 and all(c.wanted)
                and c.bias and c.batch > 2 and c.density > 0.3)  # fmt: skip
    (failure,) = random_kernels.run(case.seed, 1)
    assert failure.startswith("AssertionError") and str(case) in failure


def test_a_seed_is_a_case():
    assert [random_kernels.draw(seed) for seed in range(20)] == [random_kernels.draw(seed) for seed in range(20)]
    cases = [random_kernels.draw(seed) for seed in range(400)]
    assert {(c.kind, c.format) for c in cases} == {(k, f) for k in ("linear", "conv") for f in ("csr", "bsr")}
