"""Controls keep what they say and change what they say; the verdict follows the papers' definitions."""

import json
import math

import pytest
import torch
from ticket_nets import TRAINING, assert_equal, dataset, mlp, net, run, search, train
from torch import nn

import sparsekit as sk
from sparsekit.nn import SparseModule, dense_state
from sparsekit.ticket.controls import control, parse
from sparsekit.ticket.train import train_round
from sparsekit.ticket.verdict import judge, study, verdict_table

pytestmark = pytest.mark.usefixtures("one_thread")

STATE = net().state_dict()
MASKS = sk.prune(net(), 0.7, scope="layer")


def changed(text, seed=0, **how):
    state, masks = control(text, STATE, MASKS, seed, **how)
    assert state.keys() == STATE.keys() and masks.keys() == MASKS.keys()
    for name in STATE:
        if name not in MASKS:
            assert torch.equal(state[name], STATE[name])
    return state, masks


@pytest.mark.parametrize("text", ["reinit", "shuffle", "noise", "signs"])
def test_weights_change_and_masks_do_not(text):
    state, masks = changed(text)
    assert masks is MASKS
    for name in MASKS:
        assert not torch.equal(state[name], STATE[name]) and state[name].dtype == STATE[name].dtype
    assert_equal(changed(text)[0], state)  # a seed repeats it
    if text != "signs":
        assert not torch.equal(changed(text, 1)[0]["5.weight"], state["5.weight"])
    assert_equal(net().state_dict(), STATE)  # nothing was written into


def test_shuffling_exchanges_survivors_among_themselves():
    """A shuffle that rebinds a local does nothing (a defect of another tool)."""
    state, _ = changed("shuffle")
    for name, mask in MASKS.items():
        assert torch.equal(state[name][mask].sort().values, STATE[name][mask].sort().values)
        assert torch.equal(state[name][~mask], STATE[name][~mask])
    assert not torch.equal(state["5.weight"][MASKS["5.weight"]], STATE["5.weight"][MASKS["5.weight"]])


def test_reinit_deals_the_layer_out_anew_or_takes_fresh_weights():
    state, _ = changed("reinit")
    for name in MASKS:
        assert torch.equal(state[name].flatten().sort().values, STATE[name].flatten().sort().values)
    torch.manual_seed(9)
    fresh = nn.Linear(3, 3).state_dict()
    assert control("reinit", STATE, MASKS, 0, fresh=fresh)[0] is fresh


def test_noise_is_measured_in_the_layer_s_own_deviations():
    for text, sigmas in (("noise", 1.0), ("noise:3", 3.0), ("noise:0.5", 0.5)):
        weight = STATE["5.weight"]
        ratio = (changed(text)[0]["5.weight"] - weight).std() / weight.std()
        assert float(ratio) == pytest.approx(sigmas, rel=0.1)
    assert torch.equal(changed("noise:0")[0]["5.weight"], STATE["5.weight"])


def test_signs_keep_signs_alone():
    weight = changed("signs")[0]["5.weight"]
    assert torch.equal(weight.sign(), STATE["5.weight"].sign()) and len(weight.abs().unique()) == 1


@pytest.mark.parametrize("pattern", ["unstructured", "block:2x2", "2:4", "channel"])
def test_random_masks_have_the_layers_densities_and_the_pattern(pattern):
    model = mlp(16, 32, 8)
    masks = sk.prune(model, 0.5, pattern, scope="layer")
    state, drawn = control("random", model.state_dict(), masks, 3, pattern)
    assert state is not None and drawn.keys() == masks.keys()
    for name, mask in masks.items():
        assert int(drawn[name].sum()) == int(mask.sum()) and sk.Pattern.parse(pattern).holds(drawn[name])
        assert not torch.equal(drawn[name], mask)


@pytest.mark.parametrize("text", ["luck", "reinit:3", "noise:x", "", None])
def test_controls_that_are_none(text):
    with pytest.raises(ValueError, match=r"Expected (controls of reinit|noise:SIGMAS)"):
        parse(text)


# In a search


def test_a_fresh_network_of_another_architecture_is_refused():
    round_ = next(iter(search(rounds=1)))
    with pytest.raises(ValueError, match=r"Expected fresh as a new model of the search's architecture, got Linear"):
        round_.control("reinit", 0, torch.nn.Linear(3, 2))


@pytest.mark.parametrize("rewind", ["init", "3it"])
def test_controls_of_a_round_are_sparse_and_start_where_they_should(rewind):
    seen, found = run(rewind=rewind, rounds=1)
    for round_ in search(rounds=2, rewind=rewind):
        train(round_)
    point, start = round_._search.point, round_._search.start
    fresh = net()
    for text in ("reinit", "random", "shuffle", "noise"):
        model, begin = round_.control(text, 1, fresh if text == "reinit" else None)
        layers = [m for m in model.modules() if isinstance(m, SparseModule)]
        assert len(layers) == 3
        masks = sk.masks_of(model)
        counts = {n: int(m.sum()) for n, m in round_.masks.items()}
        assert {n: int(m.sum()) for n, m in masks.items()} == counts
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], 0.5)
        first = begin(optimizer, scheduler, 3)
        assert first == (3 if rewind == "3it" and text != "reinit" else 0)
        assert bool(optimizer.state) == (first > 0)
        base = dense_state(model)
        if text == "reinit":
            assert torch.equal(base["5.weight"], fresh[5].weight * masks["5.weight"])
        if text == "random":
            assert torch.equal(base["5.weight"], point.model["5.weight"] * masks["5.weight"])
        assert torch.equal(base["0.weight"] != 0, masks["0.weight"])
    assert start.step == 0 and point.step == (3 if rewind == "3it" else 0)
    assert seen and found.summary


def test_controls_are_recorded_with_their_runs(tmp_path):
    data = dataset()
    model = nn.Sequential(nn.Flatten(), mlp(16, 32, 3))
    found = search(model, 1, rate=0.5, run_dir=tmp_path)
    states = []
    for round_ in found:
        train_round(round_, data, TRAINING, None, ["reinit", "reinit", "reinit", "random", "noise:0.5"])
        states.append(torch.get_rng_state())
    controls = found.summary["rounds"][1]["controls"]
    assert list(controls) == ["reinit", "random", "noise:0.5"] and len(controls["reinit"]["runs"]) == 3
    runs = controls["reinit"]["runs"]
    assert len({run["val_loss"] for run in runs}) == 3 and "runs" not in controls["random"]
    assert controls["reinit"]["test_accuracy"] == pytest.approx(sum(r["test_accuracy"] for r in runs) / 3)
    (row,) = study([found.summary], classes=3)
    assert row["verdict"]["seeds"] == 1 and row["verdict"]["word"] in verdicts
    assert set(row["controls"]) == set(controls)


# Verdicts

verdicts = ("winning", "matching", "below dense", "no better than random", "collapsed")


def runs(*pairs):
    return [{"test_accuracy": a, "early_stop_iteration": j} for a, j in pairs]


DENSE = runs((0.980, 4000), (0.981, 4200), (0.979, 4100))
WORSE = runs((0.950, 4500), (0.951, 4600), (0.949, 4400))


@pytest.mark.parametrize(
    ("ticket", "controls", "word", "certain"),
    [
        (runs((0.984, 2000), (0.985, 2100), (0.983, 2000)), {"reinit": WORSE}, "winning", True),
        (runs((0.984, 2000), (0.985, 2100), (0.983, 2000)), {}, "winning", True),
        (runs((0.984, 2000), (0.978, 2100), (0.990, 9000)), {"reinit": WORSE}, "matching", False),
        (runs((0.982, 4500), (0.983, 4600), (0.981, 4550)), {"reinit": WORSE}, "matching", True),
        (runs((0.9795, 2000), (0.9805, 2100), (0.9785, 2000)), {"reinit": WORSE}, "matching", True),
        (runs((0.970, 2000), (0.971, 2100), (0.969, 2000)), {"reinit": WORSE}, "below dense", True),
        (runs((0.951, 4500), (0.950, 4600), (0.950, 4400)), {"reinit": WORSE}, "no better than random", False),
        (runs((0.950, 4500), (0.951, 4600), (0.949, 4401)), {"reinit": WORSE}, "no better than random", True),
        (runs((0.984, 2000), (0.985, 2100), (0.983, 2000)), {"random": DENSE[::-1]}, "winning", True),
        (
            runs((0.985, 4100), (0.983, 4100), (0.984, 4000)),
            {"random": runs(*[(0.984 - i / 100, 4000) for i in range(3)])},
            "winning",
            False,
        ),
        (runs((0.951, 2000), (0.950, 2010), (0.950, 1990)), {"reinit": WORSE}, "below dense", True),
        (runs((0.984, 2000), (0.985, 2100), (0.983, 2000)), {"noise": DENSE}, "winning", True),
        (runs((0.11, 100), (0.10, 100), (0.12, 100)), {"reinit": WORSE}, "collapsed", True),
    ],
)
def test_verdicts_over_seeds(ticket, controls, word, certain):
    pytest.importorskip("scipy")
    verdict = judge(DENSE, ticket, controls)
    assert (verdict.word, verdict.certain, verdict.seeds) == (word, certain, 3)
    assert str(verdict) == word + ("" if certain else " (uncertain)")
    assert verdict.accuracy.low <= verdict.accuracy.mean <= verdict.accuracy.high


def test_one_seed_has_a_word_but_no_certainty():
    ticket, same = runs((0.984, 2000)), runs((0.984, 1900))
    verdict = judge(DENSE[:1], ticket, {"random": WORSE[:1]})
    assert (verdict.word, verdict.certain, verdict.accuracy.high) == ("winning", False, math.inf)
    assert judge(DENSE[:1], ticket, {"random": same}).word == "no better than random"
    assert judge(DENSE[:1], ticket, empty_layers=["fc1.weight"]).word == "collapsed"


def test_intervals_are_student_s():
    stats = pytest.importorskip("scipy.stats")
    ticket = runs((0.984, 2000), (0.986, 2200), (0.983, 2500))
    verdict = judge(DENSE, ticket, confidence=0.9)
    want = stats.ttest_rel([0.984, 0.986, 0.983], [0.980, 0.981, 0.979]).confidence_interval(0.9)
    assert (verdict.accuracy.low, verdict.accuracy.high) == pytest.approx((want.low, want.high))


def test_runs_that_cannot_be_paired():
    with pytest.raises(ValueError, match="ticket: Expected one run for each of 3 dense ones, got 1"):
        judge(DENSE, WORSE[:1])
    with pytest.raises(ValueError, match="reinit: Expected one run for each of 3 dense ones, got 0"):
        judge(DENSE, WORSE, {"reinit": []})
    with pytest.raises(ValueError, match="Expected summaries of the same rounds"):
        study([])
    row = {"round": 0, "test_accuracy": None}
    with pytest.raises(ValueError, match="round 0: Expected an accuracy and an early stop, got none"):
        study([{"rounds": [row, row | {"round": 1}]}])


def test_the_table_reads_well():
    pytest.importorskip("scipy")
    more = {"layers": [{"name": "a", "density": 0.2}]}
    summaries = [
        {"rounds": [{"round": 0, "density": 1.0} | more | d, {"round": 1, "density": 0.2} | more | t]}
        for d, t in zip(DENSE, runs((0.984, 2000), (0.985, 2100), (0.983, 2000)), strict=True)
    ]
    for summary, worse in zip(summaries, WORSE, strict=True):
        summary["rounds"][1]["controls"] = {"reinit": worse}
    head, row = verdict_table(study(summaries)).splitlines()
    assert head.split("  ")[0] == "weights %" and "reinit %" in head
    assert "20.0" in row and "98.40" in row and "95.00" in row and row.endswith("winning") and "[" in row
    json.dumps(study(summaries), allow_nan=False)
