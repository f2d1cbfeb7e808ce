"""What a search records: the ledger, the masked-dense rival, and the training loop of the command line."""

import json
import math

import numpy
import pytest
import torch
import torch.nn.functional as F
from ticket_nets import TRAINING, X, Y, assert_equal, dataset, mlp, run, search, sgd
from torch import nn

import sparsekit as sk
from sparsekit import models, report
from sparsekit.ticket import ledger
from sparsekit.ticket.train import Training, fit, train_round

pytestmark = pytest.mark.usefixtures("one_thread")


# The ledger


def test_the_ledger_of_a_run(tmp_path):
    data = dataset()
    model = nn.Sequential(nn.Flatten(), mlp(16, 32, 3))
    found = search(model, 2, rate=0.3, run_dir=tmp_path, example_inputs=data.train_x[:20], note={"seed": 0})
    for round_ in found:
        train_round(round_, data, TRAINING, controls=["reinit"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == found.summary and summary.keys() == {"config", "rounds", "total"}
    assert summary["config"] == json.loads((tmp_path / "config.json").read_text()) == found.config
    for number, row in enumerate(summary["rounds"]):
        assert json.loads((tmp_path / f"round_{number:02d}" / "result.json").read_text()) == row
        assert row["round"] == number and row["density"] == pytest.approx(0.7**number, abs=0.01)
        assert 0.4 < row["test_accuracy"] <= 1 and row["val_loss"] > 0
        assert row["early_stop_iteration"] in (10, 20, 30) and row["steps"] == 30
        assert row["speedup"] == pytest.approx(row["masked_dense_seconds"] / row["train_seconds"])
        assert row["speedup"] == pytest.approx(row["masked_dense_step_us"] / row["median_step_us"])
        assert [layer["name"] for layer in row["layers"]] == ["1.fc1", "1.fc2"]
        assert [layer["shape"] for layer in row["layers"]] == [[32, 16], [3, 32]]
        assert {layer["format"] for layer in row["layers"]} == ({"csr"} if number else {"torch"})
        inside = sum(layer["density"] * math.prod(layer["shape"]) for layer in row["layers"])
        assert inside / (32 * 16 + 3 * 32) == pytest.approx(row["density"])
    total, rounds = summary["total"], summary["rounds"]
    for key in ("train_seconds", "masked_dense_seconds", "overhead_seconds"):
        assert total[key] == pytest.approx(sum(row[key] for row in rounds)) and total[key] > 0
    assert total["speedup"] == pytest.approx(total["masked_dense_seconds"] / total["train_seconds"])
    assert total["seconds_saved"] == pytest.approx(total["masked_dense_seconds"] - total["train_seconds"])
    report.check_summary(summary)


def test_a_control_is_recorded_but_not_counted_as_training(monkeypatch):
    data, model = dataset(), nn.Sequential(nn.Flatten(), mlp(16, 32, 3), nn.Dropout(0.1))
    other = nn.Sequential(
        nn.Flatten(), models.build("mlp:16-32-3", classes=3, input_shape=(16,), seed=9), nn.Dropout(0.1)
    )
    first, slow = other[1].fc1.weight.detach().clone(), 5.0

    clock = [0.0]

    def tick():
        clock[0] += 1e-6
        return clock[0]

    real = fit

    def fit_slowly(model, *args, **kwargs):
        result = real(model, *args, **kwargs)
        clock[0] += slow  # seconds that pass in this training, by our watch
        return result

    monkeypatch.setattr("sparsekit.ticket.train.fit", fit_slowly)
    for module in ("train", "loop"):
        monkeypatch.setattr(f"sparsekit.ticket.{module}.time.perf_counter", tick)
    found = search(model, 1)
    noise = []
    for round_ in found:
        train_round(round_, data, Training(4, 20, eval_every=2), None, ["reinit"], lambda seed: other)
        noise.append(torch.rand(1).item())
    row = found.summary["rounds"][1]
    assert "controls" not in found.summary["rounds"][0] and found.summary["rounds"][0].get("control_seconds") is None
    assert row["controls"]["reinit"]["test_accuracy"] >= 0 and row["control_seconds"] == pytest.approx(slow, rel=0.01)
    assert row["train_seconds"] < 0.01 and row["overhead_seconds"] == pytest.approx(slow, rel=0.01)  # the ticket's own
    assert found.summary["total"]["control_seconds"] == row["control_seconds"]
    assert torch.equal(other[1].fc1.weight, first)  # the control trained a copy
    assert noise[0] == noise[1]  # and drew from other generators


def test_seconds_are_the_loop_s_own_without_those_of_controls(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("sparsekit.ticket.loop.time.perf_counter", lambda: clock[0])
    found = search(rounds=1)
    for round_ in found:
        clock[0] += 10
        round_.record(control_seconds=4) if round_.number else round_.record(train_seconds=7)
    dense, pruned = found.summary["rounds"]
    assert (dense["train_seconds"], dense["overhead_seconds"]) == (7, 3)
    assert (pruned["train_seconds"], pruned["overhead_seconds"]) == (6, 0)
    assert (found.summary["total"]["train_seconds"], found.summary["total"]["control_seconds"]) == (13, 4)


def test_a_control_has_the_ticket_s_masks_and_its_own_weights():
    fresh = models.build("mlp:16-32-3", classes=3, input_shape=(16,), seed=9)
    *_, round_ = search(mlp(16, 32, 3), 1, rate=0.5)
    control = round_.variant(fresh)
    assert_equal(sk.masks_of(control), round_.masks)
    want = fresh.fc1.weight * round_.masks["fc1.weight"]
    assert torch.equal(control.fc1.weight, want) and not torch.equal(control.fc1.weight, round_.model.fc1.weight)
    with pytest.raises(ValueError, match=r"fc1\.weight: Expected a mask of shape"):
        round_.variant(mlp(16, 30, 3))


def test_metrics_of_many_kinds():
    found = search(rounds=1)
    for round_ in found:
        round_.record(test_accuracy=torch.tensor(0.5), val_loss=float("nan"), extra={"a": [numpy.float32(1), 2, None]})
        with pytest.raises(TypeError, match=r"model: Expected a number, text"):
            round_.record(model=round_.model)
        with pytest.raises(ValueError, match=r"got \['density'\]"):
            round_.record(density=1)
    row = found.summary["rounds"][1]
    assert (row["test_accuracy"], row["val_loss"], row["extra"]) == (0.5, None, {"a": [1.0, 2, None]})
    json.dumps(found.summary, allow_nan=False)


def test_only_the_steps_of_the_round_are_counted(monkeypatch):
    monkeypatch.setattr("sparsekit.ticket.loop.masked_dense_us", lambda *_: (100.0, 300.0))
    _, found = run(rewind="4it", example_inputs=X[:4])
    for row, steps in zip(found.summary["rounds"], (6, 2, 2), strict=True):
        assert row["steps"] == steps
        assert row["masked_dense_seconds"] - row["train_seconds"] == pytest.approx(steps * 200e-6)


def test_without_examples_the_rival_is_unknown():
    total = run(rounds=1)[1].summary["total"]
    assert total["masked_dense_seconds"] is None is total["speedup"] is total["seconds_saved"]


def test_the_masked_dense_twin_computes_the_same_and_keeps_its_zeros():
    *_, round_ = search(rate=0.5)
    model = round_.model.eval()
    twin = ledger.masked_dense(model, round_.masks).eval()
    assert isinstance(twin[5], ledger.MaskedLinear) and isinstance(twin[0], ledger.MaskedConv2d)
    torch.testing.assert_close(twin(X), model(X), rtol=1e-5, atol=1e-6)
    F.cross_entropy(twin(X), Y).backward()
    F.cross_entropy(model(X), Y).backward()
    for index in (0, 5, 7):
        mask, grad = round_.masks[f"{index}.weight"], twin[index].weight.grad
        assert not grad[~mask].any() and grad[mask].any()
        torch.testing.assert_close(model[index].pack(grad), model[index].values.grad, rtol=1e-4, atol=1e-6)
    ours, masked = ledger.masked_dense_us(model, round_.masks, X[:4])
    assert ours > 0 and masked > 0


# The command line's training loop


def test_fit_finds_the_least_validation_loss(monkeypatch):
    losses = iter([3.0, 1.0, 2.0])
    states = []

    def evaluate(model, x, y, batch=1000):
        states.append(model[1].fc1.weight.detach().clone())
        return (next(losses) if x is data.val_x else 0.0), len(states) / 10

    monkeypatch.setattr("sparsekit.ticket.train.evaluate", evaluate)
    data, model = dataset(), nn.Sequential(nn.Flatten(), mlp(16, 8, 3))
    found = fit(model, data, TRAINING, lambda count, epoch: torch.arange(count))
    assert (found.val_loss, found.early_stop_iteration, found.steps) == (1.0, 20, 30)
    assert found.final_test_accuracy == 0.4 and found.test_accuracy == 0.5
    assert torch.equal(states[4], states[1])  # tested with the weights of iteration 20
    assert torch.equal(model[1].fc1.weight, states[3])  # and left with the last


def test_fit_from_a_later_step_sees_the_batches_it_would_have_seen():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x.detach().clone()) if self.training else None
            return x

    data, order = dataset(), lambda count, epoch: torch.arange(count).roll(epoch)
    model = nn.Sequential(Spy(), nn.Flatten(), mlp(16, 8, 3))
    fit(model, data, TRAINING, order)
    whole, seen[:] = list(seen), []
    fit(model, data, TRAINING, order, begin=lambda *_: 13)
    assert len(whole) == 30 and len(seen) == 17
    assert all(torch.equal(a, b) for a, b in zip(whole[13:], seen, strict=True))


def test_schedules():
    optimizer = sgd(nn.Linear(2, 2))
    scheduler = Training(10, warmup=2, milestones=(4, 6)).make_scheduler(optimizer)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert Training(10).make_scheduler(optimizer) is None
    with pytest.raises(ValueError, match="Expected optimizer 'adam' or 'sgd', got 'lion'"):
        Training(10, optimizer="lion").make_optimizer(nn.Linear(2, 2))
