"""Transposable 2:4 masks: optimal, valid, and the dead stay dead."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from nm_cases import NM, few, holds

from sparsekit.transposable import transposable_2_4


def best_by_force(tile):
    """The largest sum over all 4x4 patterns that keep two in every row and column."""
    patterns = torch.tensor(list(product([0, 1], repeat=16)), dtype=torch.float64).view(-1, 4, 4)
    fits = (patterns.sum(1) == 2).all(1) & (patterns.sum(2) == 2).all(1)
    return float((patterns[fits].flatten(1) @ tile.double().flatten()).max())


def test_transposable_masks_are_optimal():
    tiles = [torch.rand(4, 4), torch.randn(4, 4).abs(), torch.zeros(4, 4), torch.eye(4), torch.rand(4, 4).round()]
    for tile in tiles:
        mask = transposable_2_4(tile)
        assert int(mask.sum()) == 8
        assert float(tile[mask].double().sum()) == pytest.approx(best_by_force(tile), abs=1e-12)
    together = transposable_2_4(torch.cat(tiles, 1))
    for tile, mask in zip(tiles, together.split(4, 1), strict=True):
        assert torch.equal(mask, transposable_2_4(tile))


def test_ragged_transposable_masks_are_optimal():
    for rows, cols in product((1, 2, 3, 4), repeat=2):
        scores = torch.rand(rows, cols)
        tile = F.pad(scores, (0, 4 - cols, 0, 4 - rows))
        kept = float(scores[transposable_2_4(scores)].double().sum())
        assert kept == pytest.approx(best_by_force(tile), abs=1e-12)


@few
@given(st.integers(0, 41), st.integers(0, 41), st.sampled_from([(), (1, 1), (2, 3)]))
def test_transposable_masks_are_valid(out, inputs, kernel):
    scores = torch.rand(out, inputs, *kernel)
    mask = transposable_2_4(scores)
    assert mask.shape == scores.shape
    assert mask.dtype == torch.bool
    assert holds(mask)
    assert holds(mask.transpose(0, 1).contiguous())
    whole = mask[: out // 4 * 4, : inputs // 4 * 4]
    assert int(whole.sum()) * 2 == whole.numel()
    assert torch.equal(mask, transposable_2_4(scores))


def test_transposable_masks_over_many_tiles(monkeypatch):
    scores = torch.randn(64, 96).abs()
    mask = transposable_2_4(scores)
    assert holds(mask)
    assert holds(mask.t().contiguous())
    upper = float(scores[NM.nm_mask(scores, torch.ones_like(mask))].sum())
    assert 0.9 * upper < float(scores[mask].sum()) <= upper
    monkeypatch.setattr("sparsekit.transposable._CHUNK", 7)
    assert torch.equal(transposable_2_4(scores), mask)


def test_transposable_masks_keep_the_dead_dead():
    scores, alive = torch.rand(16, 16), torch.rand(16, 16) < 0.5
    mask = transposable_2_4(scores, alive)
    assert not bool((mask & ~alive).any())
    for tile, live, kept in zip(scores.split(4), alive.split(4), mask.split(4), strict=True):
        for one, there, got in zip(tile.split(4, 1), live.split(4, 1), kept.split(4, 1), strict=True):
            assert float(one[got].double().sum()) == pytest.approx(best_by_force(one * there), abs=1e-12)


def test_transposable_masks_of_infinite_scores():
    scores = torch.rand(4, 4)
    scores[1, 2], scores[2, 2] = torch.inf, torch.inf
    assert bool(transposable_2_4(scores)[1:3, 2].all())
