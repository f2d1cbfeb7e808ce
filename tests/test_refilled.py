"""The refill round of a search: structured masks of the same density, the order of rows, rewinding, resuming."""

import json
import shutil

import pytest
import torch
from ticket_nets import X, adam, net, train
from torch import nn

import sparsekit as sk
from sparsekit.__main__ import main
from sparsekit.pattern import Pattern
from sparsekit.ticket.refilled import refilled
from sparsekit.ticket.rewind import Snapshot

pytestmark = pytest.mark.usefixtures("one_thread")


def wide():
    """Two hidden layers whose rows can move, in front of a norm."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 3)
    )  # fmt: skip


def every(model, run=None, rewind="init", make=adam, **how):
    """All rounds of a search that ends in a refill; (round, its first dense state)."""
    found = sk.tickets(model, 2, 0.4, rewind=rewind, run_dir=run, refill="block:8x1", example_inputs=X[:20], **how)
    seen = []
    for round_ in found:
        first = sk.to_dense(round_.model).state_dict()
        train(round_, make=make)
        seen.append((round_, first))
    return seen, found


def test_one_more_round_with_blocks_of_the_same_density():
    seen, found = every(wide())
    (ticket, _), (last, first) = seen[-2:]
    assert [round_.number for round_, _ in seen] == [0, 1, 2, 3]
    for name in ("1.weight", "4.weight"):
        mask = last.masks[name].view(-1, 8, last.masks[name].shape[1])
        assert torch.equal(mask.any(1), mask.all(1))  # eight rows live and die together
        assert abs(int(mask.sum()) - int(ticket.masks[name].sum())) <= 4
    assert int(last.masks["6.weight"].sum()) == int(ticket.masks["6.weight"].sum())  # the output layer keeps its rows
    row = found.summary["rounds"][3]
    assert row["refill"]["pattern"] == "block:8x1" and 0.2 < row["refill"]["kept"] < 1
    assert row["density"] == pytest.approx(ticket.density, abs=0.02)
    assert "refill" not in found.summary["rounds"][2]
    assert sk.tickets(wide(), 2).config.keys() == found.config.keys() - {"refill"}


def test_weights_and_moments_move_with_their_rows():
    model = wide()
    optimizer = torch.optim.Adam(model.parameters())
    model(X).square().sum().backward()
    optimizer.step()
    point = Snapshot.take(1, model, optimizer)
    masks = sk.prune(model, 0.8)
    done = refilled(model, masks, Pattern.parse("block:8x1"), point, X)
    assert done.order and set(done.facts["regrouped"]) == done.order.keys()
    order = {name: tuple(part for part in index) for name, index in done.order.items()}
    for name, index in order.items():
        assert torch.equal(done.point.model[name], point.model[name][index])
    for key in ("exp_avg", "exp_avg_sq"):
        moved, own = (p.optimizer["state"]["1.weight"][key] for p in (done.point, point))
        assert torch.equal(moved, own[order["1.weight"]]) and not torch.equal(moved, own)
    twin = wide()
    twin.load_state_dict(done.point.model)
    for one in (model, twin):
        one.eval()
    torch.testing.assert_close(twin(X), model(X))  # the same function


@pytest.mark.parametrize("rewind", ["init", "3it", "lr", "none"])
def test_a_search_that_was_interrupted_goes_on_to_the_same_bits(rewind, tmp_path):
    _, whole = every(wide(), tmp_path / "whole", rewind)
    every(wide(), tmp_path / "cut", rewind)
    shutil.rmtree(tmp_path / "cut/round_03")
    torch.manual_seed(99)
    seen, again = every(wide(), tmp_path / "cut", rewind)
    assert [round_.number for round_, _ in seen] == [3]
    files = [(tmp_path / run / "round_03/trained.safetensors").read_bytes() for run in ("whole", "cut")]
    assert files[0] == files[1]
    assert again.summary["rounds"][3]["refill"] == whole.summary["rounds"][3]["refill"]


def test_controls_obey_the_pattern():
    for round_ in sk.tickets(wide(), 1, 0.6, refill="block:8x1", example_inputs=X[:20]):
        if round_.number == 2:
            _, begin = round_.control("reinit", 1)
            control, _ = round_.control("shuffle", 1)
            mask = sk.masks_of(control)["4.weight"].view(-1, 8, 48)
            assert torch.equal(mask.any(1), mask.all(1)) and begin() == 0
        train(round_)


def test_channels_need_no_order():
    *_, last = sk.tickets(net(), 1, 0.5, refill="channel")
    assert last.number == 2 and not last._search.order
    assert all(bool((mask.flatten(1).all(1) == mask.flatten(1).any(1)).all()) for name, mask in last.masks.items()
               if name != "7.weight")  # fmt: skip


def test_bad_refills_are_refused_before_training(tmp_path):
    for text in ("2:4", "unstructured", "blok"):
        with pytest.raises(ValueError, match="Expected (refill as )?a pattern"):
            sk.tickets(wide(), 2, refill=text)
    with pytest.raises(ValueError, match="Expected an unstructured search of at least one round to refill"):
        sk.tickets(wide(), 2, pattern="block:4x1", refill="block:8x1")
    every(wide(), tmp_path / "run")
    with pytest.raises(ValueError, match="refill 'block:8x1 after round 2', got 'block:8x1 after round 3'"):
        list(sk.tickets(wide(), 3, 0.4, run_dir=tmp_path / "run", refill="block:8x1", example_inputs=X[:20]))


def test_from_the_command_line(tmp_path, capsys):
    command = "ticket --model mlp:64-32-24-10 --data digits --rounds 1 --rate 0.6 --iterations 10 --refill 8x1 --out"
    assert main([*command.split(), str(tmp_path / "run"), "--control", "random"]) == 0
    ledger, verdicts = capsys.readouterr().out.split("Training took")
    assert ledger.count(" as block:8x1 ") == verdicts.count(" as block:8x1 ") == 1
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/report.md").read_text().count(" as block:8x1 |") == 1
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["config"]["refill"] == "block:8x1 after round 1"
    assert [row["round"] for row in summary["rounds"]] == [0, 1, 2] and summary["rounds"][2]["refill"]["kept"] > 0.2
