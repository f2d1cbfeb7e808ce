"""Planning a model: budget, predictions, what alike layers share, the whole model's check, sparsekit plan."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import sparsekit as sk
from sparsekit import plan, roofline
from sparsekit.__main__ import main
from sparsekit.clock import Sample
from sparsekit.nn import SparseModule

planning = sys.modules["sparsekit.nn.planning"]
whole = sys.modules["sparsekit.nn.whole"]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(plan, "_cache", plan.Times("plans.json"))
    roofline._probed.cache_clear()


@pytest.fixture
def csr_wins(monkeypatch):
    """Measured times without a clock: csr takes a tenth of dense. Counts what was measured."""
    measured = []

    def measure(thunks, seconds=0.02, hopeless=0):
        for thunk in thunks.values():
            thunk()
        measured.append(sorted(thunks))
        return {name: 10.0 if name in ("csr", "sparse") else 100.0 for name in thunks}

    monkeypatch.setattr(plan, "measure", measure)
    monkeypatch.setattr(whole, "measure", measure)
    return measured


def net(depth=3, width=64):
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 8))


def half(model, share=0.25):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(module.weight.shape, generator=generator) < share
        for name, module in sk.prunable(model).items()
    }


# ---- the cache and the budget -----------------------------------------------------------------------


def test_alike_layers_are_measured_once_and_never_again(csr_wins):
    model, x = net(), torch.randn(20, 64)
    masks = half(model)
    first = sk.explain(sk.convert(model, masks, x))
    spent = len(csr_wins)
    assert csr_wins == [["csr", "dense"], ["csr", "dense"], ["dense", "sparse"]]  # hidden, output, whole model
    again = sk.explain(sk.convert(model, masks, x))
    assert len(csr_wins) == spent
    totals = again.to_dict()["totals"]
    assert (totals["measured"], totals["cached"], totals["unmeasured"]) == (0, 4, 0)
    assert [layer.chosen for layer in again.layers] == [layer.chosen for layer in first.layers] == ["csr"] * 4
    assert totals["us"] == 10 and totals["dense_us"] == 100 and totals["timed"] == "model"


def test_without_a_second_everything_stays_dense_and_says_so(csr_wins):
    model = net()
    found = sk.explain(sk.convert(model, half(model), torch.randn(16, 64), plan_seconds=0))
    for layer in found.layers:
        assert layer.chosen == "dense" and layer.us is None and layer.speedup is None
        assert "not measured within plan_seconds=0, so it stays dense" in layer.note
        assert "not measured, predicted" in layer.rejected["csr"]
    assert found.to_dict()["totals"]["unmeasured"] == 4
    assert "whole model not timed: that takes about" in str(found) and "4 not measured" in str(found)


@pytest.mark.parametrize("seconds", [-1, float("nan"), "10"])
def test_seconds_are_a_number(seconds):
    with pytest.raises(ValueError, match="Expected plan_seconds as a number of at least 0, got"):
        sk.convert(model := net(), half(model), plan_seconds=seconds)


def test_what_promises_most_is_measured_first(monkeypatch):
    order = []

    def choose(thunks, key):
        order.append(next(size for size in ("512, 512", "16, 16") if size in key))
        return "dense", dict.fromkeys(thunks, 1.0)

    monkeypatch.setattr(planning, "choose", choose)
    model = nn.ModuleList([nn.Linear(16, 16), nn.Linear(512, 512)])
    sk.convert(model, half(model, 0.05))
    assert order == ["512, 512", "16, 16"]


def test_hopeless_candidates_are_not_measured(monkeypatch, csr_wins):
    rates = {"dense linear": 1e6, "csr linear": 1.0, "bsr linear": 1.0, "bytes": 1e4, "call us": 1.0}
    monkeypatch.setattr(roofline, "_rates", lambda where, dtype: rates)
    model = nn.Sequential(nn.Linear(256, 256))
    (layer,) = sk.explain(sk.convert(model, half(model))).layers
    assert layer.chosen == "dense" and "(roofline), not measured" in layer.rejected["csr"]
    assert csr_wins == [["dense"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_device_is_probed_once(dtype):
    rates = roofline._rates(torch.device("cpu"), dtype)
    assert all(rate > 0 for rate in rates.values()) and {"dense linear", "dense conv", "bytes"} <= rates.keys()
    roofline._probed.cache_clear()
    assert roofline._rates(torch.device("cpu"), dtype) == rates
    product = roofline.Product(64, 1 << 20, 1 << 16, 1 << 16, 1, False, torch.device("cpu"), dtype)
    times = roofline.predict(product, {"dense": 1 << 20, "csr": 1 << 14})
    assert times["csr"] < times["dense"]


def test_a_busy_machine_makes_no_format_look_hopeless(monkeypatch):
    def interrupted(thunks, seconds, hopeless):
        return {name: [Sample(us, us) for us in (10.0, 4010.0, 4010.0)] for name in thunks}

    monkeypatch.setattr(plan, "race", interrupted)
    rates = roofline._probe(torch.device("cpu"), torch.float32)
    assert rates["call us"] == 10 and rates["bytes"] == 2 * (1 << 24) / 10
    assert plan.measure({"a": list, "b": list}) == {"a": 4010, "b": 4010}  # what is compared are medians


@pytest.mark.parametrize("pattern", ["unstructured", "block:16x16", "block:8x1", "2:4", "channel"])
@pytest.mark.parametrize("kind", ["linear", "conv", "grouped"])
def test_what_a_format_would_store_is_what_it_stores(pattern, kind):
    layer = {
        "linear": lambda: nn.Linear(96, 80),
        "conv": lambda: nn.Conv2d(32, 48, 3),
        "grouped": lambda: nn.Conv2d(32, 48, 1, groups=2),
    }[kind]()
    groups = getattr(layer, "groups", 1)
    (mask,) = sk.prune(nn.Sequential(layer), 0.5, pattern).values()
    for fmt in map(sk.format.get, sk.format.names()):
        if not fmt.unsupported(mask, groups):
            values = fmt.gather(layer.weight.detach(), fmt.index(mask, groups))
            assert fmt.stored(mask, groups)[0] == values.numel(), fmt.name


def test_autocast_is_measured_as_it_runs(monkeypatch):
    seen, keys = [], []

    def choose(thunks, key):
        keys.append(key)
        for thunk in thunks.values():
            seen.append(thunk().dtype)
        return "dense", dict.fromkeys(thunks, 1.0)

    monkeypatch.setattr(planning, "choose", choose)
    model = nn.Sequential(nn.Linear(64, 64))
    sk.convert(model, half(model))
    with torch.autocast("cpu", torch.bfloat16):
        sk.convert(model, half(model))
    assert set(seen) == {torch.float32, torch.bfloat16} and keys[0] != keys[1]


# ---- the whole model --------------------------------------------------------------------------------


def slow_together(monkeypatch, culprit):
    """Alone every layer is fast in csr; the model is slow while the layer called ``culprit`` is sparse."""

    def measure(thunks, seconds=0.02, hopeless=0):
        if "sparse" not in thunks:
            return {name: 10.0 if name == "csr" else 100.0 for name in thunks}
        formats = {name: module.format.name for name, module in models[-1].named_modules() if hasattr(module, "format")}
        return {"dense": 100.0, "sparse": 150.0 if formats[culprit] == "csr" else 50.0}

    models = []
    check = whole.check

    def spy(plain, sparse, *rest):
        models.append(sparse)
        return check(plain, sparse, *rest)

    monkeypatch.setattr(sys.modules["sparsekit.nn.convert"], "check", spy)
    for module in (plan, whole):
        monkeypatch.setattr(module, "measure", measure)
    losses = {"sparse 0": 5.0, "dense 0": 9.0, "sparse 2": 20.0, "dense 2": 9.0, "sparse 4": 10.0, "dense 4": 9.0}
    monkeypatch.setattr(whole, "_losses", lambda *args: losses)


@pytest.mark.parametrize(("culprit", "fallen"), [("2", ["2"]), ("4", ["2", "4"]), ("0", ["0", "2", "4"])])
@pytest.mark.parametrize("training", [False, True])
def test_layers_that_lose_in_the_whole_model_are_dense_again(monkeypatch, culprit, fallen, training):
    slow_together(monkeypatch, culprit)
    model, x = net(2), torch.randn(16, 64)
    masks = half(model)
    fast = sk.convert(model, masks, x, training)
    found = sk.explain(fast)
    assert [layer.name for layer in found.layers if layer.chosen == "dense"] == fallen
    told = found.to_dict()["totals"]["fallen"]  # in the order in which they fell
    assert sorted(told) == fallen and f"sparse: {', '.join(told)}" in str(found)
    assert "the whole model took 1.50x the time of dense with it" in found.layers[1].rejected["csr"]
    assert found.to_dict()["totals"]["us"] == (100.0 if len(fallen) == 3 else 50.0)  # all dense: noise is no gain
    want = sk.to_dense(fast)(x)
    assert torch.allclose(fast(x), want, atol=1e-5)
    assert all(torch.equal(mask, masks[name]) for name, mask in sk.masks_of(fast).items())
    again = sk.explain(sk.convert(model, masks, x, training))  # from the cache
    assert [layer.chosen for layer in again.layers] == [layer.chosen for layer in found.layers]


class Inner(nn.Module):
    """Dropout, batch norm, a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Dropout(0.5))
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        y = self.body(x).unsqueeze(1)
        return {"logits": self.head(self.attention(y, y, y, need_weights=False)[0].squeeze(1)), "none": None}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_timing_the_model_leaves_no_trace(training, inplace):
    model, x = Inner().train(), torch.randn(8, 32)
    before, rng = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    masks = sk.prune(model, 0.8)
    fast = sk.convert(model, masks, x, training, inplace=inplace)
    found = sk.explain(fast)
    assert found.whole.us > 0 and found.whole.dense_us > 0 and found.to_dict()["totals"]["timed"] == "model"
    assert torch.equal(rng, torch.get_rng_state())
    assert all(m.training for m in fast.modules()) and all(p.grad is None for p in fast.parameters())
    for name, tensor in sk.to_dense(fast).state_dict().items():
        want = torch.where(masks[name], before[name], 0) if name in masks else before[name]
        assert torch.equal(tensor, want), name
    if not inplace:
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_totals_are_of_the_model_as_it_is():
    model, x = net(), torch.randn(16, 64)
    fast = sk.convert(model, half(model, 0.05), x)
    found = sk.explain(fast)
    assert found.dense_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert found.bytes == sum(t.numel() * t.element_size() for t in (*fast.parameters(), *fast.buffers()))
    assert found.whole.seconds > 0 and "planned in" in str(found)
    layer = next(module for module in fast.modules() if isinstance(module, SparseModule))
    layer.set_format("csr" if layer.format.name == "dense" else "dense")
    assert sk.explain(fast).whole is None  # it was timed in other formats


def test_a_graph_needs_a_gpu():
    model = net()
    with pytest.raises(ValueError, match="Expected a CUDA model and CUDA example_inputs on one device .* got cpu"):
        sk.convert(model, half(model), torch.randn(16, 64), graph=True, inplace=True)
    with pytest.raises(ValueError, match="Expected graph=True with example_inputs and without training"):
        sk.convert(model, half(model), graph=True)
    assert not any(isinstance(module, SparseModule) for module in model.modules())


# ---- sparsekit plan ---------------------------------------------------------------------------------


def factory():
    """What ``tests.test_planning:factory`` names."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 10))
    with torch.no_grad():
        for name, mask in sk.prune(model, 0.9).items():
            model.get_parameter(name).mul_(mask)
    return model


@pytest.fixture
def here(monkeypatch):
    monkeypatch.syspath_prepend(str(sk.__file__).rpartition("/sparsekit/")[0] + "/tests")


def test_plan_of_a_factory(here, tmp_path, capsys):
    files = [tmp_path / name for name in ("p.json", "p.md", "p.png")]
    options = [text for pair in zip(("--json", "--markdown", "--chart"), map(str, files), strict=True) for text in pair]
    pytest.importorskip("matplotlib")
    before = torch.get_num_threads()
    try:
        argv = ["plan", "test_planning:factory", "--input", "4x3x8x8", "--training", "--threads", "1", *options]
        assert main(argv) == 0
    finally:
        torch.set_num_threads(before)
    printed = capsys.readouterr().out
    assert "whole model, forward + backward" in printed and "planned in" in printed
    written = json.loads(files[0].read_text())
    assert [layer["name"] for layer in written["layers"]] == ["0", "3"] and written["totals"]["us"] > 0
    assert files[1].read_text().startswith("| layer | shape") and files[2].read_bytes()[1:4] == b"PNG"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's exporter about torch's own code
def test_plan_of_an_exported_program(tmp_path, capsys):
    model = factory().eval()
    file, x = tmp_path / "m.pt2", torch.randn(4, 3, 8, 8)
    torch.export.save(torch.export.export(model, (x,)), file)
    from sparsekit.planner import _of_program

    twin = _of_program(file)
    assert torch.allclose(twin(x), model(x), atol=1e-6) and {*sk.prunable(twin)} == {"0.weight", "3.weight"}
    assert main(["plan", str(file), "--input", "4x3x8x8"]) == 0
    assert "whole model, forward" in capsys.readouterr().out
    planned = sk.convert(model, sk.prune(model, 0.9), impl="csr")
    torch.export.save(torch.export.export(planned, (x,)), file)
    assert main(["plan", str(file), "--input", "4x3x8x8"]) == 2
    assert "got one that was planned before it was exported" in capsys.readouterr().err
    torch_prune.l1_unstructured(model[3], "weight", 0.5)
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    with warnings.catch_warnings(action="ignore"):  # the exporter about the pruned weights, which are no buffers
        torch.export.save(torch.export.export(model, (x,)), file)
    assert main(["plan", str(file), "--input", "4x3x8x8"]) == 2
    assert "weights that the program computes" in capsys.readouterr().err


def test_plan_of_a_run(tmp_path, capsys):
    pytest.importorskip("sklearn")
    run = tmp_path / "run"
    how = ["--model", "mlp:64-32-10", "--data", "digits", "--rounds", "1", "--iterations", "5"]
    assert main(["ticket", *how, "--out", str(run)]) == 0
    capsys.readouterr()
    assert main(["plan", str(run), "--input", "60x64"]) == 0
    assert "fc1" in capsys.readouterr().out
    assert main(["plan", str(run), "--input", "60x65"]) == 2
    assert main(["plan", str(tmp_path), "--input", "60x64"]) == 2
    wrong = capsys.readouterr().err.splitlines()
    assert len(wrong) == 2 and "Expected" in wrong[0] and "Expected a run with a finished round" in wrong[1]


def test_plan_of_a_run_from_python(here, tmp_path, capsys):
    for round_ in sk.tickets(factory(), 1, 0.5, run_dir=tmp_path / "run"):
        round_.record()
    argv = ["plan", str(tmp_path / "run"), "--input", "4x3x8x8"]
    assert main([*argv, "--model", "test_planning:factory", "--regroup"]) == 0
    printed = capsys.readouterr().out
    assert "0.5" in printed and "natural order" in printed
    assert main(argv) == 2
    assert "Expected a run that names its model, or --model module.path:factory, got neither" in capsys.readouterr().err
    config = json.loads((tmp_path / "run/config.json").read_text()) | {"model": "test_planning:factory"}
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    assert main(argv) == 2  # a name that a file gives is not imported
    assert "Expected a model of lenet-300-100" in capsys.readouterr().err
    assert main(["plan", "test_planning:factory", "--input", "4x3x8x8", "--model", "vgg11"]) == 2
    assert "Expected --model beside a run directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["nowhere", "--input", "1x2"], "Expected MODEL.pt2, a run directory or module.path:factory, got 'nowhere'"),
        (["gone.pt2", "--input", "1x2"], "gone.pt2: Expected a file of torch.export.save, got none"),
        (["no_such_module_here:f", "--input", "1x2"], "No module named 'no_such_module_here'"),
        (["test_planning:f", "--input", "1x2"], "Expected a function of test_planning, got no 'f' in it"),
        (["test_planning:half", "--input", "1"], "Expected --input as batch and sizes"),
        (["test_planning:net", "--input", "4x64"], "Expected a pruned model, or --sparsity"),
        (["test_planning:net", "--input", "4x64", "--threads", "0"], "Expected --threads of at least 1, got 0"),
        (["test_planning:net", "--input", "4x64", "--json", "no/such/f"], "Expected a file in an existing folder"),
        (["test_planning:net", "--input", "4x64", "--chart", "plan.xyz"], "Expected a chart ending in .png, .svg"),
        (["test_planning:net", "--input", "4x65", "--sparsity", "0.5"], "net: Expected a model that takes 4x65, got: "),
        (["torn.pt2", "--input", "1x2"], "torn.pt2: Expected a file of torch.export.save, got another"),
    ],
)
def test_plans_of_nothing_are_one_sentence(here, tmp_path, monkeypatch, capsys, argv, why):
    monkeypatch.chdir(tmp_path)
    Path("torn.pt2").write_text("no archive\r\n")
    assert main(["plan", *argv]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("sparsekit plan: ") and why in printed.err and printed.err.count("\n") == 1
