"""Plans: the measured choice, its cache, and how it is explained."""

import json
import math

import pytest
import torch
from torch import nn

import sparsekit as sk
from sparsekit import plan, times


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(plan, "_cache", plan.Times("plans.json"))


@pytest.fixture
def clock(monkeypatch):
    """A clock that only thunks move, by the microseconds they are made with."""

    class Clock:
        now, calls = 0.0, 0

        def thunk(self, us):
            def run():
                self.now += us * 1e-6
                self.calls += 1

            return run

    clock = Clock()
    monkeypatch.setattr("sparsekit.clock.time.perf_counter", lambda: clock.now)
    return clock


def restarted(monkeypatch):
    """As a new process would begin: the file is all that is left."""
    monkeypatch.setattr(plan, "_cache", plan.Times("plans.json"))


# ---- the choice -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({"dense": 100, "csr": 50}, "csr"),
        ({"dense": 50, "csr": 100}, "dense"),
        ({"dense": 100, "compact": 100, "csr": 98}, "dense"),  # a tie goes to the simpler
        ({"csr": 98, "compact": 100}, "compact"),  # whatever the order they come in
        ({"dense": 200, "compact": 100, "csr": 96}, "csr"),  # 4 % is no tie
        ({"csr": 10}, "csr"),
    ],
)
def test_the_fastest_wins(clock, times, chosen):
    name, measured = plan.choose({name: clock.thunk(us) for name, us in times.items()})
    assert name == chosen
    assert measured == pytest.approx(times)


def test_one_slow_call_does_not_decide(clock):
    steady, calls = clock.thunk(1000), iter(range(10**6))

    def hiccups():
        clock.now += 1 if next(calls) == 4 else 900e-6

    name, times = plan.choose({"dense": steady, "csr": hiccups})
    assert name == "csr" and times["csr"] == pytest.approx(900)


def test_measuring_is_interleaved(clock):
    order = []
    thunks = {name: (lambda name=name: order.append(name) or clock.thunk(1000)()) for name in ("dense", "csr")}
    plan.measure(thunks, seconds=0)
    turns = [order[start : start + 3] for start in range(4, len(order), 3)]  # after the warm-up
    assert len(turns) == 10 and all(len({*turn}) == 1 for turn in turns)  # a call that is not timed, and two that are
    for first, second in zip(turns[::2], turns[1::2], strict=True):
        assert {first[0], second[0]} == {"dense", "csr"}


# ---- the cache --------------------------------------------------------------------------------------


def test_a_hit_measures_nothing(clock, monkeypatch):
    thunks = {"dense": clock.thunk(100), "csr": clock.thunk(50)}
    first = plan.choose(thunks, "key")
    spent = clock.calls
    assert plan.choose(thunks, "key") == first
    restarted(monkeypatch)
    assert plan.choose(thunks, "key") == first
    assert clock.calls == spent
    plan.choose(thunks, "another key")
    assert clock.calls > spent


def test_other_candidates_are_measured_anew(clock):
    plan.choose({"dense": clock.thunk(100)}, "key")
    assert plan.choose({"dense": clock.thunk(100), "csr": clock.thunk(10)}, "key")[0] == "csr"


def test_two_processes_keep_each_others_entries(clock, monkeypatch):
    here, there = plan.Times("plans.json"), plan.Times("plans.json")
    here.get("warm"), there.get("warm")  # both have read the file before either writes
    here.put("a", {"dense": 1.0})
    there.put("b", {"dense": 2.0})
    restarted(monkeypatch)
    assert plan._cache.get("a") == {"dense": 1.0} and plan._cache.get("b") == {"dense": 2.0}


@pytest.mark.parametrize(
    "text",
    ['{"key": {"dense": 1', "[]", '{"key": 3}', '{"key": {"dense": "x"}}', '{"key": {"dense": NaN}}', "\x00", ""],
)
def test_a_torn_cache_is_measured_anew(clock, monkeypatch, text):
    path = plan.device.cache_dir() / "plans.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    thunks = {"dense": clock.thunk(100), "csr": clock.thunk(50)}
    with pytest.warns(UserWarning, match=r"plans\.json: Expected a cache of measured times, got .*measuring anew"):
        assert plan.choose(thunks, "key")[0] == "csr"
    restarted(monkeypatch)
    spent = clock.calls
    assert plan.choose(thunks, "key")[0] == "csr"  # the file is whole again
    assert clock.calls == spent


def test_a_cache_that_cannot_be_written_does_without(clock, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="times cannot be written"):
        assert plan.choose({"dense": clock.thunk(100), "csr": clock.thunk(50)}, "key")[0] == "csr"
    assert plan._cache.get("key") == pytest.approx({"dense": 100, "csr": 50})  # remembered all the same


def test_nothing_half_written_is_left(clock, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(times.json, "dump", full)
    with pytest.warns(UserWarning, match="No space left"):
        plan.choose({"dense": clock.thunk(100)}, "key")
    assert [*plan.device.cache_dir().iterdir()] == []


def test_the_key_has_everything_a_time_depends_on(monkeypatch):
    cpu = torch.device("cpu")
    keys = {plan.cache_key(cpu, "Linear", (64, 10)), plan.cache_key(cpu, "Linear", (64, 11))}
    monkeypatch.setattr(plan.torch, "get_num_threads", lambda: 77)
    keys.add(plan.cache_key(cpu, "Linear", (64, 10)))
    monkeypatch.setattr(plan.torch, "__version__", "9.9")
    keys.add(plan.cache_key(cpu, "Linear", (64, 10)))
    monkeypatch.setattr(plan._native, "status", lambda: {"build": {"version": "0", "schemas": "0"}})
    keys.add(plan.cache_key(cpu, "Linear", (64, 10)))
    monkeypatch.setattr(plan.device, "describe", lambda where: "another machine")
    keys.add(plan.cache_key(cpu, "Linear", (64, 10)))
    assert len(keys) == 6


def test_density_buckets():
    assert plan.density_bucket(0) == "0"
    assert plan.density_bucket(0.100) == plan.density_bucket(0.104)
    assert plan.density_bucket(0.1) != plan.density_bucket(0.13)
    assert len({plan.density_bucket(2**-k) for k in range(10)}) == 10


# ---- the explanation --------------------------------------------------------------------------------


def model():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))
    return model, sk.prune(model, 0.9, exclude=("4",))


def test_explain_tells_the_whole_story():
    dense, masks = model()
    fast = sk.convert(dense, masks, torch.randn(5, 3, 6, 6))
    report = sk.explain(fast).to_dict()
    assert json.loads(json.dumps(report))["layers"][0]["shape"] == [4, 3, 3, 3]
    first, second, last = report["layers"]
    assert [layer["name"] for layer in report["layers"]] == ["0", "2", "4"]
    for name, layer in (("0.weight", first), ("2.weight", second)):
        assert layer["density"] == pytest.approx(float(masks[name].float().mean()))
        assert layer["us"] > 0 and layer["dense_us"] > 0 and not layer["assumed"] and not layer["forced"]
        assert layer["speedup"] == pytest.approx(layer["dense_us"] / layer["us"])
        assert {layer["chosen"], *layer["rejected"]} == set(sk.format.names())  # every candidate has its line
        assert layer["chosen"] not in layer["rejected"]
    assert first["input_shape"] == (5, 3, 6, 6) and second["input_shape"] == (5, 64)
    assert last["chosen"] == "torch" and last["rejected"] == {"sparse": "no weight of it is pruned"}
    head, *rows = str(sk.explain(fast)).splitlines()
    assert head.split()[:5] == ["layer", "shape", "input", "density", "runs"]
    assert rows[0].split()[:3] == ["0", "4x3x3x3", "5x3x6x6"] and first["chosen"] in rows[0]


def test_explain_says_what_was_assumed_and_forced():
    dense, masks = model()
    text = str(sk.explain(sk.convert(dense, masks)))
    assert "(16x3x32x32)" in text and "assumed; give example_inputs" in text
    forced = sk.explain(sk.convert(dense, masks, impl="csr"))
    assert "csr (forced)" in str(forced) and forced.layers[0].us is None and forced.layers[0].speedup is None


def test_explain_follows_the_model():
    dense, masks = model()
    fast = sk.convert(dense, masks)
    nested = nn.ModuleDict({"body": fast})
    assert [layer.name for layer in sk.explain(nested).layers] == ["body.0", "body.2", "body.4"]
    other = {"csr": "dense"}.get(fast[2].format.name, "csr")
    fast[2].set_format(other)
    moved = sk.explain(fast).layers[1]
    assert moved.chosen == other and moved.us is None
    fast[2].load_state_dict(sk.SparseLinear(64, 8).state_dict())
    assert sk.explain(fast).layers[1].density == 1


def test_explain_of_a_lone_layer_and_of_none():
    assert "SparseLinear" in str(sk.explain(sk.SparseLinear(4, 4)))
    assert str(sk.explain(nn.ReLU())) == "no linear or convolution layer"


def test_explain_leaves_foreign_layers_a_reason():
    class Mine(nn.Linear):
        pass

    (layer,) = sk.explain(nn.Sequential(Mine(4, 4))).layers
    assert layer.rejected == {"sparse": "not a plain torch layer"} and math.isclose(layer.density, 1)
