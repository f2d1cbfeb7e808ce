"""The search for tickets: what a round starts from, what it leaves behind, and that a killed one goes on."""

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsekit as sk
from sparsekit import files, models, report
from sparsekit.data import Dataset
from sparsekit.nn import SparseModule, dense_state
from sparsekit.ticket import ledger, store
from sparsekit.ticket.rewind import Rewind, Snapshot, decode, encode, set_rng
from sparsekit.ticket.train import Training, fit, train_round

WORKER = Path(__file__).with_name("ticket_worker.py")


@pytest.fixture(autouse=True)
def _one_thread():
    """Of little use to tensors this small, and slow where other processes want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mlp(*widths: int) -> nn.Sequential:
    return models.build("mlp:" + "-".join(map(str, widths)), classes=widths[-1], input_shape=widths[:1], seed=0)


def net() -> nn.Sequential:
    """Every kind of state: convolution, batch norm, dropout, linear."""
    torch.manual_seed(3)
    conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
    return nn.Sequential(
        conv,
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(64, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


X = torch.randn(60, 1, 4, 4, generator=torch.Generator().manual_seed(1))
Y = torch.arange(60) % 3


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


def train(round_, steps=6, make=sgd, x=X, y=Y, spy=None):
    """A loop that draws noise, has a schedule, and counts its steps."""
    model = round_.model.train()
    optimizer = make(model)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], 0.5)
    start = round_.begin(optimizer, scheduler, steps_per_epoch=3)
    for step in range(start, steps):
        if spy is not None:
            spy(step, model, optimizer, scheduler)
        batch = round_.permutation(len(x), step // 3)[20 * (step % 3) :][:20]
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        round_.step()
    return optimizer


def search(model=None, rounds=2, **how):
    return sk.tickets(model or net(), rounds, **{"impl": "csr"} | how)


def run(model=None, rounds=2, steps=6, make=sgd, **how):
    """Train every round; ``[(round, dense state at its start, optimizer)]`` and the search."""
    found, seen = search(model, rounds, **how), []
    for round_ in found:
        before = dense_state(round_.model)
        seen.append((round_, before, train(round_, steps, make)))
    return seen, found


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


# Rounds and masks


def test_one_dense_round_and_then_as_many_as_asked_for():
    seen, found = run(rounds=3)
    assert [r.number for r, *_ in seen] == [0, 1, 2, 3] == [row["round"] for row in found.summary["rounds"]]
    assert not seen[0][0].masks and seen[0][0].density == 1
    assert not any(isinstance(m, SparseModule) for m in seen[0][0].model.modules())
    assert sum(isinstance(m, SparseModule) for m in seen[1][0].model.modules()) == 3


def test_densities_are_those_of_the_paper():
    model = models.build("lenet-300-100", seed=0)
    rounds = search(model, 9, rate=models.rates("lenet-300-100"))
    left = {r.number: r.density for r in rounds}
    assert {k: round(100 * left[k], 1) for k in (1, 3, 7, 9)} == {1: 80.0, 3: 51.3, 7: 21.1, 9: 13.5}
    rows = {layer["name"]: layer["density"] for layer in rounds.summary["rounds"][9]["layers"]}
    assert rows == pytest.approx({"fc1": 0.8**9, "fc2": 0.8**9, "fc3": 0.9**9}, abs=1e-3)


def test_the_given_model_is_not_touched():
    model = net().eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    run(model, rewind="3it")
    assert_equal(model.state_dict(), state)
    assert [type(m) for m in model.modules()] == classes and not model.training
    assert all(p.grad is None for p in model.parameters())


def test_asking_for_tickets_leaves_the_generators_alone():
    model, before = net(), torch.get_rng_state()
    search(model, criterion="random")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("how", [{}, {"scope": "global"}, {"pattern": "block:4x1"}, {"criterion": "random"}])
def test_masks_are_nested_and_counted(how):
    seen, found = run(rounds=3, rate=0.3, **how)
    for (before, *_), (round_, *_) in pairwise(seen):
        earlier = before.masks
        for name, mask in round_.masks.items():
            assert not (mask & ~earlier.get(name, torch.ones_like(mask))).any()
    for round_, _, _ in seen:
        alive = sum(int(mask.sum()) for mask in round_.masks.values()) or 36 + 1024 + 48
        assert round_.density == pytest.approx(alive / (36 + 1024 + 48))
        assert found.summary["rounds"][round_.number]["density"] == round_.density
    assert seen[3][0].density == pytest.approx(0.7**3, abs=0.03)


def test_global_scope_takes_the_smallest_of_all_layers():
    model = mlp(20, 10, 5)
    with torch.no_grad():
        model.fc1.weight.mul_(1e-3)
    *_, round_ = search(model, 1, rate=0.5, scope="global")
    assert int(round_.masks["fc1.weight"].sum()) == 200 - 125 and "fc2.weight" in round_.masks
    assert bool(round_.masks["fc2.weight"].all())


def test_one_shot():
    *_, (round_, _, _) = run(rounds=1, rate=0.9)[0]
    assert round_.number == 1 and {n: int(m.sum()) for n, m in round_.masks.items()} == {
        "0.weight": 4,
        "5.weight": 102,
        "7.weight": 5,
    }


def test_rates_by_layer_and_layers_left_out():
    seen, _ = run(rounds=1, rate={"*": 0.5, "7": 0.25}, exclude="5")
    masks = seen[1][0].masks
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"0.weight": 18, "7.weight": 36}
    assert isinstance(seen[1][0].model[5], nn.Linear)
    assert seen[1][0].density == pytest.approx((18 + 36) / (36 + 48))


def test_exclude_may_be_any_iterable():
    seen, found = run(rounds=1, exclude=(name for name in ["5", "7.weight"]))
    assert list(seen[1][0].masks) == ["0.weight"] and found.config["exclude"] == ["5", "7.weight"]


@pytest.mark.parametrize("pattern", ["block:8x1", "channel", "2:4"])
def test_patterns_hold_in_every_round(pattern):
    seen, found = run(mlp(16, 32, 8, 16), 1 if pattern == "2:4" else 2, steps=0, rate=0.3, pattern=pattern)
    for round_, _, _ in seen[1:]:
        assert all(sk.Pattern.parse(pattern).holds(mask) for mask in round_.masks.values())
        assert round_.density < 0.8
    assert found.config["pattern"] == pattern


def test_a_criterion_of_ones_own():
    def closest_to_one(layer):
        return -(layer.weight - 1).abs()

    model = mlp(4, 6, 3)
    *_, round_ = (found := search(model, 1, rate=0.5, criterion=closest_to_one))
    weight = model.fc1.weight.detach()
    kept = round_.masks["fc1.weight"]
    assert int(kept.sum()) == 12 and (weight[kept] - 1).abs().max() <= (weight[~kept] - 1).abs().min()
    assert found.config["criterion"] == "closest_to_one"


def test_pruned_weights_are_exactly_zero_after_training_and_in_the_files(tmp_path):
    seen, _ = run(run_dir=tmp_path / "run", make=lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.5))
    for round_, _, _ in seen[1:]:
        state = dense_state(round_.model)
        kept, masks, _ = sk.export.read_portable(
            tmp_path / "run" / f"round_{round_.number:02d}" / "trained.safetensors"
        )
        assert_equal(masks, round_.masks)
        for name, mask in round_.masks.items():
            assert not state[name][~mask].any() and state[name][mask].any()
        assert_equal(kept, state)


# Rewinding


def test_init_gives_survivors_their_first_values_back():
    model = net()
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for round_, before, _ in run(model)[0][1:]:
        for name, tensor in before.items():
            want = first[name] * round_.masks[name] if name in round_.masks else first[name]
            assert torch.equal(tensor, want), name
        assert before["1.num_batches_tracked"] == 0


@pytest.mark.parametrize("rewind", ["3it", "1ep", "4it"])
@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("impl", ["csr", "dense"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_step_is_gone_back_to_exactly(tmp_path, rewind, make, impl, on_disk):
    at = 4 if rewind == "4it" else 3
    seen = {}

    for round_ in search(rewind=rewind, impl=impl, run_dir=tmp_path / "run" if on_disk else None):

        def spy(step, model, optimizer, scheduler, round_=round_):
            if step == at:
                owner = {id(m.values): f"{n}.weight" for n, m in model.named_modules() if isinstance(m, SparseModule)}
                names = {id(p): owner.get(id(p), n) for n, p in model.named_parameters()}
                layers = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, SparseModule)}
                moments = {
                    (names[id(p)], key): value.clone()
                    for p, values in optimizer.state.items()
                    for key, value in values.items()
                }
                groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
                rng = torch.rand(()).item(), random.random(), numpy.random.rand()  # noqa: NPY002 - the global one
                schedule = scheduler.state_dict()
                seen[round_.number] = dense_state(model), layers, moments, groups, rng, schedule, round_.masks

        torch.rand(round_.number), random.random()  # noise before begin() is of no account
        train(round_, make=make, spy=spy)
        assert round_.steps == 6

    state, _, moments, groups, rng, schedule, _ = seen[0]
    assert any(value.any() for value in moments.values()) and schedule["last_epoch"] == at
    for number in (1, 2):
        state_n, layers, moments_n, groups_n, rng_n, schedule_n, masks = seen[number]
        assert (groups_n, rng_n, schedule_n) == (groups, rng, schedule)
        assert state_n.keys() == state.keys() and moments_n.keys() == moments.keys()
        for name in state:
            assert torch.equal(state_n[name], state[name] * masks[name] if name in masks else state[name]), name
        for (name, key), value in moments_n.items():
            want = moments[name, key]
            if name in layers and want.dim():
                want = layers[name].pack(want)
            assert torch.equal(value, want), (name, key)


def test_rewound_without_pruning_a_round_repeats_the_dense_one():
    """Nothing pruned, everything rewound: each round ends in the same bits, dropout and batch norm included."""
    for rewind in ("init", "2it", "1ep"):
        seen, _ = run(rate=0.0, rewind=rewind, rounds=1)
        assert_equal(dense_state(seen[1][0].model), dense_state(seen[0][0].model))


def test_lr_keeps_the_weights_and_replays_the_schedule():
    seen, _ = run(rewind="lr")
    for (earlier, *_), (round_, before, optimizer) in pairwise(seen):
        trained = dense_state(earlier.model)
        for name, tensor in before.items():
            want = trained[name] * round_.masks[name] if name in round_.masks else trained[name]
            assert torch.equal(tensor, want), name
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 4)
        assert round_.steps == 6


def test_none_goes_on_with_weights_rates_and_noise():
    noise, found = [], search(rewind="none")
    for round_ in found:
        noise.append(torch.rand(()).item())
        before = dense_state(round_.model)
        if round_.number:
            for name, mask in round_.masks.items():
                assert torch.equal(before[name], trained[name] * mask)  # noqa: F821 - of the round before
            optimizer = sgd(round_.model)
            round_.begin(optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], 0.5))
            assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 4)
        train(round_)
        trained = dense_state(round_.model)  # noqa: F841
        after = torch.get_rng_state()
        expected = torch.rand(()).item()
        torch.set_rng_state(after)
        noise.append(expected)
    assert noise[2] == noise[1] and noise[4] == noise[3] and len({noise[0], noise[1], noise[3]}) == 3


def test_init_starts_every_round_with_the_same_noise():
    noise = []
    for round_ in search():
        noise.append((torch.rand(3).tolist(), random.random(), numpy.random.rand()))  # noqa: NPY002
        train(round_)
    assert noise[0] == noise[1] == noise[2]


def test_begin_does_not_wind_the_noise_back_when_it_is_not_asked_to():
    later = []
    for round_ in search():
        torch.rand(1)
        round_.begin(sgd(round_.model))
        later.append(torch.rand(1).item())
    assert later[0] == later[1] == later[2]


def test_the_data_order_depends_on_the_epoch_alone():
    orders = [[r.permutation(50, e).tolist() for e in range(3)] for r in search()]
    assert orders[0] == orders[1] == orders[2]
    assert orders[0][0] != orders[0][1] and sorted(orders[0][0]) == list(range(50))


def test_param_groups_and_named_parameters():
    def make(model):
        groups = [{"params": [(n, p)], "lr": 0.1 / (i + 1)} for i, (n, p) in enumerate(model.named_parameters())]
        return torch.optim.SGD(groups, momentum=0.9)

    seen, _ = run(rewind="2it", make=make)
    sparse = seen[2][2]
    assert [g["param_names"] for g in sparse.param_groups] == [[n] for n, _ in seen[2][0].model.named_parameters()]
    assert [g["lr"] for g in sparse.param_groups] == [g["lr"] for g in seen[0][2].param_groups]


def test_rewinding_needs_begin(tmp_path):
    with pytest.raises(
        ValueError, match=r"Expected round\.begin\(optimizer, scheduler\).* got no begin\(\) in round 0"
    ):
        for _ in search(rewind="3it", run_dir=tmp_path / "run"):
            pass
    assert not (tmp_path / "run" / "round_00").exists()
    with pytest.raises(ValueError, match=r"in round 1"):
        for round_ in search(rewind="3it"):
            if not round_.number:
                train(round_)


def test_rewinding_needs_to_get_there():
    with pytest.raises(ValueError, match=r"rewind point '9it', step 9, got 6 calls of round\.step"):
        run(rewind="9it")
    with pytest.raises(ValueError, match=r"steps_per_epoch"):
        for round_ in search(rewind="2ep"):
            round_.begin(sgd(round_.model))


def test_an_optimizer_of_another_model_is_refused():
    model = net()
    for round_ in search(model):
        with pytest.raises(
            ValueError, match=r"Expected an optimizer over round\.model's parameters, got 7 of 7 others"
        ):
            round_.begin(sgd(model))
        break


@pytest.mark.parametrize("rewind", ["2it", "none"])
def test_other_parameter_groups_are_refused(rewind):
    with pytest.raises(ValueError, match="Expected 1 parameter groups"):
        for round_ in search(rewind=rewind):
            if round_.number:
                parameters = list(round_.model.parameters())
                round_.begin(torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.1))
            train(round_)


def test_a_scheduler_that_cannot_be_kept_is_refused_before_training():
    class Strange(torch.optim.lr_scheduler.StepLR):
        def state_dict(self):
            return {"thing": object()}

    for round_ in search(rewind="2it"):
        optimizer = sgd(round_.model)
        with pytest.raises(TypeError, match="Expected plain values and tensors in the training state, got object"):
            round_.begin(optimizer, Strange(optimizer, 1))
        break


@pytest.mark.parametrize("text", ["", "5", "it", "-1it", "1.5ep", "5 it", "LR", 5, None])
def test_rewinds_that_are_none(text):
    with pytest.raises(ValueError, match="Expected rewind 'init', '500it'"):
        Rewind.parse(text)


def test_generator_states_survive_their_file(tmp_path):
    snapshot = Snapshot.take(0, nn.Linear(2, 2))
    files.write_tensors(tmp_path / "a", *snapshot.to_tensors())
    drawn = [(torch.rand(()).item(), random.gauss(0, 1), numpy.random.standard_normal()) for _ in range(3)]  # noqa: NPY002
    set_rng(Snapshot.from_tensors(*files.read_tensors(tmp_path / "a")).rng)
    assert drawn == [(torch.rand(()).item(), random.gauss(0, 1), numpy.random.standard_normal()) for _ in range(3)]  # noqa: NPY002


def test_encode_keeps_types_and_bits():
    value = {1: (2.5, None, True, [math.inf]), "t": torch.arange(3), "d": {"x": -0.0}}
    tensors = {}
    text = json.dumps(encode(value, tensors))
    got = decode(json.loads(text), tensors)
    assert torch.equal(got.pop("t"), value.pop("t")) and got == value and type(got[1]) is tuple


# Files, and going on


def worker(tmp_path, name, die="", cache=None, impl="auto", rewind="4it"):
    """Run a search in a process of its own; ``die`` says where it is killed."""
    env = os.environ | {"SPARSEKIT_CACHE": str(cache or tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path / name), die, impl, rewind], env=env, capture_output=True, text=True
    )
    assert done.returncode == (-signal.SIGKILL if die else 0), done.stderr
    return done.stdout.split()


def results(folder: Path) -> dict[str, dict]:
    found = {}
    for path in sorted(folder.glob("**/*.safetensors")):
        found[str(path.relative_to(folder))] = files.read_tensors(path)[0]
    return found


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_search_goes_on_to_the_same_bits(tmp_path):
    assert worker(tmp_path, "whole") == ["0", "1", "2", "3"]
    assert worker(tmp_path, "killed", "0:7") == ["0"]  # after the rewind point
    assert worker(tmp_path, "killed", "2:5") == ["0", "1", "2"]  # in the middle of a round
    assert worker(tmp_path, "killed", "2:files") == ["2"]  # between the files of a round
    left = [path.name for path in (tmp_path / "killed").iterdir() if path.name.startswith(".")]
    assert left == [".round_02.partial"]
    # Its plans are gone: without the formats it kept, the round could run in others.
    assert worker(tmp_path, "killed", cache=tmp_path / "other") == ["2", "3"]
    whole, killed = results(tmp_path / "whole"), results(tmp_path / "killed")
    assert whole.keys() == killed.keys() and len(whole) == 2 + 2 * 4
    for file in whole:
        assert_equal(killed[file], whole[file])
    assert not [path for path in (tmp_path / "killed").iterdir() if path.name.startswith(".")]
    rounds = [json.loads((tmp_path / run / "summary.json").read_text())["rounds"] for run in ("whole", "killed")]
    for row, again in zip(*rounds, strict=True):
        assert [row[k] for k in ("density", "val_loss", "steps")] == [
            again[k] for k in ("density", "val_loss", "steps")
        ]
    assert worker(tmp_path, "killed") == []  # nothing left to train


@pytest.mark.parametrize("rewind", ["init", "lr", "none"])
def test_a_search_given_up_goes_on_to_the_same_bits(tmp_path, rewind):
    how = {"rewind": rewind, "criterion": "random", "rounds": 3}
    run(run_dir=tmp_path / "whole", **how)
    for stop in (0, 1, 2, 3):
        for round_ in search(run_dir=tmp_path / "broken", **how):
            train(round_, steps=3 if round_.number == stop else 6)
            if round_.number == stop:
                break
    numbers = [r.number for r, *_ in run(run_dir=tmp_path / "broken", **how)[0]]
    assert numbers == [3]
    whole, broken = results(tmp_path / "whole"), results(tmp_path / "broken")
    for file in whole:
        assert_equal(broken[file], whole[file])


def test_a_round_begun_keeps_its_formats(tmp_path):
    how = {"impl": "auto", "run_dir": tmp_path / "run", "rounds": 1}
    for round_ in search(**how):
        if round_.number:
            break
    kept = json.loads((tmp_path / "run" / "formats.json").read_text())
    assert kept == {"1": {n: m.format.name for n, m in round_.model.named_modules() if isinstance(m, SparseModule)}}
    turned = {name: "csr" if format == "dense" else "dense" for name, format in kept["1"].items()}
    (tmp_path / "run" / "formats.json").write_text(json.dumps({"1": turned}))
    for round_ in search(**how):
        layers = {n: m.format.name for n, m in round_.model.named_modules() if isinstance(m, SparseModule)}
        assert layers == turned
        twin = round_.variant(net())
        assert {n: m.format.name for n, m in twin.named_modules() if isinstance(m, SparseModule)} == turned


def test_in_memory_it_is_the_same_search(tmp_path):
    on_disk, _ = run(run_dir=tmp_path / "run", rewind="3it")
    in_memory, found = run(rewind="3it")
    for (a, *_), (b, *_) in zip(on_disk, in_memory, strict=True):
        assert_equal(dense_state(a.model), dense_state(b.model))
    assert len(found.summary["rounds"]) == 3


def test_a_finished_search_trains_nothing_and_more_rounds_go_on(tmp_path):
    first, found = run(rounds=1, run_dir=tmp_path / "run")
    again, same = run(rounds=1, run_dir=tmp_path / "run")
    assert not again and same.summary == found.summary
    more, longer = run(rounds=3, run_dir=tmp_path / "run")
    assert [r.number for r, *_ in more] == [2, 3]
    assert longer.summary["rounds"][:2] == found.summary["rounds"]
    at_once, _ = run(rounds=3)
    assert_equal(dense_state(more[-1][0].model), dense_state(at_once[-1][0].model))
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == longer.summary


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"rate": 0.3}, r"rate 0\.2, got 0\.3"),
        ({"rewind": "lr"}, "rewind 'init', got 'lr'"),
        ({"scope": "global"}, "scope 'layer', got 'global'"),
        ({"note": {"seed": 1}}, "seed 0, got 1"),
        ({"note": {}}, "seed 0, got None"),
        ({"model": mlp(4, 3)}, r"0\.weight of shape \[4, 1, 3, 3\], got none"),
    ],
)
def test_another_configuration_is_refused_by_name(tmp_path, other, what):
    how = {"run_dir": tmp_path, "note": {"seed": 0}, "rounds": 0}
    run(**how)
    before = {path: path.read_bytes() for path in tmp_path.glob("**/*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"Expected the configuration this run began with \(.*{what}"):
        list(search(**how | other))
    assert {path: path.read_bytes() for path in tmp_path.glob("**/*") if path.is_file()} == before


def test_the_order_of_rates_matters_because_later_ones_win(tmp_path):
    list(search(rounds=0, rate={"*": 0.2, "7": 0.1}, run_dir=tmp_path))
    with pytest.raises(ValueError, match="Expected the configuration"):
        list(search(rounds=0, rate={"7": 0.1, "*": 0.2}, run_dir=tmp_path))


def test_the_same_note_may_hold_tuples(tmp_path):
    for _ in range(2):
        assert search(rounds=0, note={"size": (1, 2)}, run_dir=tmp_path).config["size"] == [1, 2]
        list(search(rounds=0, note={"size": (1, 2)}, run_dir=tmp_path))


def test_another_machine_is_only_warned_about(tmp_path):
    list(search(rounds=0, note={"threads": 2, "torch": "1"}, run_dir=tmp_path))
    with pytest.warns(UserWarning, match=r"Expected the machine this run began on \(threads 2, got 4\)"):
        list(search(rounds=0, note={"threads": 4, "torch": "1"}, run_dir=tmp_path))


def test_foreign_directories_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="Expected a run directory or an empty one, got other files"):
        list(search(run_dir=tmp_path))
    with pytest.raises(NotADirectoryError, match=r"notes\.txt: Expected a run directory, got a file"):
        list(search(run_dir=tmp_path / "notes.txt"))
    (tmp_path / "config.json").write_text('{"architectures": ["other"]}')
    with pytest.raises(ValueError, match=r"config\.json: Expected the configuration of a ticket search"):
        list(search(run_dir=tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "notes.txt"]


def test_a_kill_before_the_first_file_leaves_a_usable_directory(tmp_path):
    (tmp_path / ".config.json.12ab34cd.partial").write_text("{")
    list(search(rounds=0, run_dir=tmp_path))
    assert not (tmp_path / ".config.json.12ab34cd.partial").exists()


@pytest.mark.parametrize("file", ["trained.safetensors", "end.safetensors", "result.json"])
def test_a_full_disk_loses_at_most_the_round(tmp_path, monkeypatch, file):
    def write(path, *content, real):
        if Path(path).name == file and "round_01" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, *content)

    with monkeypatch.context() as patch:
        for name in ("write_tensors", "write_json"):
            real = getattr(store, name)
            patch.setattr(store, name, lambda path, *content, real=real: write(path, *content, real=real))
        with pytest.raises(OSError, match="No space left"):
            run(run_dir=tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").glob("*round_*")) == ["round_00"]
    seen, _ = run(run_dir=tmp_path / "run")
    assert [r.number for r, *_ in seen] == [1, 2]
    assert_equal(dense_state(seen[-1][0].model), dense_state(run()[0][-1][0].model))


@pytest.mark.parametrize("file", ["start.safetensors", "round_00/trained.safetensors", "round_00/end.safetensors"])
def test_damaged_files_of_a_run_are_named(tmp_path, file):
    run(rounds=0, run_dir=tmp_path)
    files.write_tensors(tmp_path / file, {"a": torch.ones(1)}, {})
    with pytest.raises(ValueError, match=rf"{Path(file).name}: Expected"):
        run(rounds=1, run_dir=tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-3])
    with pytest.raises(ValueError, match=rf"{Path(file).name}: Expected a whole safetensors file"):
        run(rounds=1, run_dir=tmp_path)


# Bad arguments


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"rounds": -1}, "Expected rounds as a whole number"),
        ({"rounds": 1.5}, "Expected rounds as a whole number"),
        ({"rounds": True}, "Expected rounds as a whole number"),
        ({"rate": 1.5}, "Expected a share between 0 and 1, got 1.5"),
        ({"rate": {"5": 0.1}}, r"0\.weight: Expected a share for every layer"),
        ({"pattern": "diagonal"}, "Expected a pattern"),
        ({"pattern": "2:4"}, "Expected rounds=1 with pattern '2:4'"),
        ({"criterion": "luck"}, "Expected a criterion of magnitude, random or a function, got 'luck'"),
        ({"scope": "local"}, "Expected scope 'global' or 'layer'"),
        ({"rewind": "start"}, "Expected rewind"),
        ({"impl": "coo"}, "Expected a format of dense"),
        ({"exclude": "fc9"}, "fc9"),
        ({"model": nn.ReLU()}, "Expected a model with a linear or convolution layer, got ReLU"),
        ({"note": {"rate": 1}}, "Expected a note without the search's own names, got ..rate"),
    ],
)
def test_bad_arguments_fail_before_anything_is_written(tmp_path, how, why):
    with pytest.raises(ValueError, match=why):
        search(run_dir=tmp_path / "run", **how)
    assert not (tmp_path / "run").exists()


def test_pruned_models_and_strange_notes_are_refused():
    model = sk.convert(mlp(8, 6, 4), sk.prune(mlp(8, 6, 4), 0.5), impl="csr")
    with pytest.raises(ValueError, match=r"fc1\.weight: Expected a dense weight, got a pruned one"):
        search(model)
    with pytest.raises(TypeError, match="Expected a note of JSON values"):
        search(note={"x": object()})


# The ledger


def dataset() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 1, 4, 4, generator=generator)
    y = (x.flatten(1) @ torch.randn(16, 3, generator=generator)).argmax(1)
    return Dataset("made", 3, x[:200], y[:200], x[200:250], y[200:250], x[250:], y[250:], (0.0,), (1.0,))


TRAINING = Training(iterations=30, batch_size=20, optimizer="adam", lr=1e-2, eval_every=10)


def test_the_ledger_of_a_run(tmp_path):
    data = dataset()
    model = nn.Sequential(nn.Flatten(), mlp(16, 32, 3))
    found = search(model, 2, rate=0.3, run_dir=tmp_path, example_inputs=data.train_x[:20], note={"seed": 0})
    for round_ in found:
        train_round(round_, data, TRAINING, fresh=nn.Sequential(nn.Flatten(), mlp(16, 32, 3)))
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
        train_round(round_, data, Training(4, 20, eval_every=2), fresh=other)
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


# Anyone's loop


def test_with_a_data_loader_of_ones_own(tmp_path):
    data = dataset()
    train_set = torch.utils.data.TensorDataset(data.train_x, data.train_y)
    model = nn.Sequential(nn.Flatten(), mlp(16, 64, 32, 3))
    found = sk.tickets(model, rounds=3, rate=0.3, rewind="1ep", run_dir=tmp_path, example_inputs=data.train_x[:25])
    orders = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for round_ in found:
            loader = torch.utils.data.DataLoader(train_set, batch_size=25, shuffle=True)
            optimizer = torch.optim.Adam(round_.model.parameters(), lr=1e-2)
            start = round_.begin(optimizer, steps_per_epoch=len(loader))
            seen = []
            for _ in range(start // len(loader), 4):
                for x, y in loader:
                    seen.append(y)
                    optimizer.zero_grad()
                    F.cross_entropy(round_.model(x), y).backward()
                    optimizer.step()
                    round_.step()
            orders.append(torch.cat(seen))
            with torch.no_grad():
                accuracy = (round_.model(data.test_x).argmax(1) == data.test_y).float().mean()
            round_.record(test_accuracy=accuracy)
    assert len(orders[0]) == 800 and len(orders[1]) == 600
    assert all(torch.equal(order, orders[0][200:]) for order in orders[1:])  # the epochs after the rewind point again
    rows = found.summary["rounds"]
    assert min(row["test_accuracy"] for row in rows) > 0.6
    assert [row["steps"] for row in rows] == [32, 24, 24, 24] and found.summary["total"]["speedup"] > 0
