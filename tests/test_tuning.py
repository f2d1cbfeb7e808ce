"""Launch configurations: the default unless asked, measured once, remembered on disk. No GPU is needed to choose."""

import json

import pytest
import torch

from sparsekit import times
from sparsekit.kernels import tuning

CONFIGS = [{"BM": 64}, {"BM": 128}, {"BM": 256}]
CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """A pretended device on which a launch takes ``cost[BM]`` us; ``launched`` lists what ran."""

    class Gpu:
        cost = {64: 30.0, 128: 10.0, 256: 20.0}
        launched = []

        def launch(self, config):
            self.launched.append(config["BM"])
            if self.cost[config["BM"]] is None:
                raise RuntimeError("out of resource: shared memory")

    pretended = Gpu()
    pretended.launched = []

    def clock(run, count):
        run()
        return pretended.cost[pretended.launched[-1]]

    monkeypatch.setattr(tuning, "_clock", clock)
    monkeypatch.setattr(tuning, "_place", lambda where: "pretended")
    monkeypatch.setattr(tuning, "_times", times.Times("tuning.json"))
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return pretended


def choose(gpu, key=(1,)):
    return tuning.choose("kernel", key, CONFIGS, gpu.launch, CUDA)["BM"]


def test_the_default_where_nobody_asked(gpu):
    assert choose(gpu) == 64
    assert gpu.launched == []


def test_the_fastest_where_measured(gpu):
    with tuning.on():
        assert choose(gpu) == 128
    launches = len(gpu.launched)
    assert launches > 3
    assert choose(gpu) == 128  # known from now on, without a launch
    assert choose(gpu, (2,)) == 64  # but not for another shape
    assert len(gpu.launched) == launches


def test_another_process_finds_it_on_disk(gpu, monkeypatch, tmp_path):
    with tuning.on():
        choose(gpu)
    monkeypatch.setattr(tuning, "_times", times.Times("tuning.json"))
    monkeypatch.setattr(tuning, "_chosen", {})
    gpu.launched.clear()
    assert choose(gpu) == 128 and gpu.launched == []


def test_what_does_not_launch_is_never_chosen(gpu):
    gpu.cost = {64: 30.0, 128: None, 256: 20.0}
    with tuning.on():
        assert choose(gpu) == 256
    gpu.launched.clear()
    assert choose(gpu) == 256 and gpu.launched == []


def test_where_nothing_launches_the_reason_is_raised(gpu):
    gpu.cost = dict.fromkeys(gpu.cost)
    with tuning.on(), pytest.raises(RuntimeError, match="out of resource"):
        choose(gpu)


def test_switched_off(gpu, monkeypatch):
    monkeypatch.setenv("SPARSEKIT_AUTOTUNE", "0")
    with tuning.on():
        assert choose(gpu) == 64
    assert gpu.launched == []


def test_never_while_a_graph_is_captured(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with tuning.on():
        assert choose(gpu) == 64
    assert gpu.launched == []


def test_other_configurations_are_measured_anew(gpu):
    with tuning.on():
        choose(gpu)
        other = tuning.choose("kernel", (1,), [{"BM": 64}, {"BM": 256}], gpu.launch, CUDA)
    assert other == {"BM": 256}


def test_on_the_cpu_there_is_nothing_to_tune(gpu):
    with tuning.on():
        assert tuning.choose("kernel", (1,), CONFIGS, gpu.launch, torch.device("cpu")) == CONFIGS[0]


def test_the_file_is_plain_json(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path))
    with tuning.on():
        choose(gpu)
    (entry,) = json.loads((tmp_path / "tuning.json").read_text()).values()
    assert entry == {'{"BM": 64}': 30.0, '{"BM": 128}': 10.0, '{"BM": 256}': 20.0}


def test_asking_again_costs_no_look_up(gpu, monkeypatch):
    with tuning.on():
        choose(gpu)
    monkeypatch.setattr(tuning, "_look_up", None)
    assert choose(gpu) == 128
