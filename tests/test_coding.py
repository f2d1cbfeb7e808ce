"""Masks in few bytes: every mask comes back, in the smaller coding, and bytes that are no mask are refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.coding import decode, encode, structure
from sparsekit.pattern import Pattern


def random_mask(shape, density, seed=0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=0, max_size=4), st.sampled_from([0, 0.01, 0.1, 0.3, 0.6, 1]), st.integers(0, 9)
)
def test_every_mask_comes_back(shape, density, seed):
    mask = random_mask(shape, density, seed)
    coded, facts = encode(mask)
    assert torch.equal(decode(coded, shape, facts), mask)
    assert len(coded) <= -(-mask.numel() // 8)


@pytest.mark.parametrize("pattern", ["channel", "block:8x1", "block:16x16", "block:1x4", "block:4x8", "2:4", "2:4t"])
@pytest.mark.parametrize("shape", [(64, 64), (32, 64, 3, 3), (37, 50)])
def test_structure_is_found_and_shrinks_the_mask(pattern, shape):
    pattern = Pattern.parse(pattern)
    if pattern.transposable and len(shape) == 2 and shape[0] % 4:
        pytest.skip("2:4t wants multiples of 4")
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    if pattern.nm:
        mask = pattern.nm_mask(scores, torch.ones(shape, dtype=torch.bool))
    else:
        groups = pattern.group_scores(scores, torch.ones(shape, dtype=torch.bool))[0]
        mask = pattern.expand(random_mask(groups.shape, 0.4), torch.Size(shape))
    found = structure(mask)
    assert found.holds(mask) and found.group == pattern.group and found.nm in (None, (2, 4))
    coded, facts = encode(mask)
    assert facts["pattern"] == found.name and torch.equal(decode(coded, list(shape), facts), mask)
    if not pattern.nm:
        assert len(coded) <= -(-groups.numel() // 8)


def test_a_mask_that_is_not_contiguous_comes_back():
    mask = random_mask((30, 20), 0.2).t()
    coded, facts = encode(mask)
    assert torch.equal(decode(coded, [20, 30], facts), mask)


@pytest.mark.parametrize(
    ("density", "coding", "bits"), [(0.5, "bitmap", 1), (0.2, "elias-fano", 0.9), (0.1, "elias-fano", 0.55),
                                    (0.01, "elias-fano", 0.09)]
)  # fmt: skip
def test_the_smaller_coding_is_taken(density, coding, bits):
    coded, facts = encode(random_mask((256, 256), density))
    assert facts["coding"] == coding and 8 * len(coded) <= bits * 256 * 256 + 8


def good():
    mask = random_mask((40, 50), 0.1)
    coded, facts = encode(mask)
    assert facts["coding"] == "elias-fano"
    return coded, facts


def edited(coded, at, value):
    coded = coded.clone()
    coded[at] = value
    return coded


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda c, f: (c[:-1], [40, 50], f), r"Expected \d+ mask bytes for 202 of 2000, got \d+"),
        (lambda c, f: (c, [40, 5], f), "Expected a count of at most 200 groups, got 202"),
        (lambda c, f: (edited(c, -3, 0), [40, 50], f), "Expected 202 positions, got"),
        (lambda c, f: (c, [40, 50], f | {"count": 10**12}), "Expected a count of at most 2000 groups"),
        (lambda c, f: (c, [40, 50], f | {"count": -1}), "Expected a count"),
        (lambda c, f: (c, [40, 50], f | {"count": True}), "Expected a count"),
        (lambda c, f: (c, [40, 50], f | {"coding": "zip"}), "Expected a mask coded as bitmap or elias-fano"),
        (lambda c, f: (c, [40, 50], f | {"pattern": "block:4000000000x1"}), "Expected blocks inside a weight"),
        (lambda c, f: (c, [2000], f | {"pattern": "channel"}), "Expected a mask of two axes"),
        (lambda c, f: (c, [40, 50], f | {"pattern": "os"}), "Expected a pattern"),
        (lambda c, f: (c, [40, 50], {}), "Expected a pattern"),
        (lambda c, f: (c.view(1, -1), [40, 50], f), "Expected mask bytes in one row"),
        (lambda c, f: (torch.zeros(250, dtype=torch.uint8), [40, 50], f | {"coding": "bitmap"}), "202 living groups"),
    ],
)
def test_bytes_that_are_no_mask_are_refused(edit, why):
    with pytest.raises(ValueError, match=why):
        decode(*edit(*good()))
