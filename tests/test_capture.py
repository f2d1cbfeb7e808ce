"""graph=True: what the replay of a captured model checks, on a stand-in for CUDA graphs that replays on the CPU."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import sparsekit as sk
from sparsekit.nn import capture as module
from sparsekit.nn.capture import capture


class Graph:
    """Replays the last recorded call into the tensors that it gave, as a CUDA graph does."""

    def replay(self):
        model, inputs, output = self.recorded
        with torch.no_grad():
            for to, tensor in zip(*(pytree.tree_leaves(t) for t in (output, self.call(model, inputs))), strict=True):
                to.copy_(tensor)


@pytest.fixture
def cuda(monkeypatch):
    """Stand-ins for what capture asks of torch.cuda; the list of what was asked, in order."""
    log, graphs, call = [], [], module.call

    class Stream:
        def wait_stream(self, other):
            log.append("wait")

    @contextlib.contextmanager
    def entered(name):
        log.append(f"enter {name}")
        yield
        log.append(f"leave {name}")

    def ordinary(model, inputs):
        replay = vars(model).pop("forward", None)
        try:
            return call(model, inputs)
        finally:
            if replay is not None:
                model.forward = replay

    def record(model, inputs):
        log.append("call")
        output = call(model, inputs)
        if log[-2] == "enter graph":
            graphs[-1].recorded, graphs[-1].call = (model, inputs, output), ordinary
        return output

    def graph(fresh):
        graphs.append(fresh)
        return entered("graph")

    for name, stand_in in {
        "Stream": Stream, "current_stream": Stream, "stream": lambda s: entered("side"), "CUDAGraph": Graph,
        "graph": graph, "device": lambda d: entered("device"),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(module, "call", record)
    return log


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x, shift, double=False):
        y = self.two(self.one(x).relu() + shift)
        return {"y": 2 * y if double else y}


def net():
    model = Net().eval()
    return sk.convert(model, sk.prune(model, 0.5), impl="csr")


def test_warm_up_is_on_a_side_stream_before_the_capture(cuda):
    capture(net(), (torch.randn(3, 16), torch.randn(16)))
    order = ["enter device", "wait", "enter side", *["call"] * 3, "leave side", "wait", "enter graph", "call",
             "leave graph", "leave device"]  # fmt: skip
    assert cuda == order


def test_a_replay_is_the_function_of_new_inputs_and_changed_weights(cuda):
    sparse = net()
    graph = capture(copy.deepcopy(sparse), (torch.randn(3, 16), torch.randn(16)))
    kept = []
    for _ in range(2):
        x, shift = torch.randn(3, 16, requires_grad=True), torch.randn(16)
        for model in (sparse, graph):
            with torch.no_grad():
                model.one.values.mul_(1.5)
        kept.append((graph(x, shift)["y"], sparse(x, shift)["y"]))
    for got, wanted in kept:  # the first result is not the graph's own memory
        torch.testing.assert_close(got, wanted)
        assert not got.requires_grad


def test_arguments_go_by_name(cuda):
    sparse, x, shift = net(), torch.randn(16, 16), torch.randn(16, 16)
    graph = capture(copy.deepcopy(sparse), {"shift": shift, "x": x})
    for got in (graph(x, shift), graph(shift=shift, x=x), graph(x, shift=shift, double=False)):
        torch.testing.assert_close(got["y"], sparse(x, shift)["y"])
    with pytest.raises(TypeError, match="missing a required argument: 'shift'"):
        graph(x)


def test_another_function_is_refused(cuda):
    x, shift = torch.randn(3, 16), torch.randn(16)
    graph = capture(net(), (x, shift))
    for given in ((torch.randn(4, 16), shift), (x.double(), shift), (x, shift, True), (x, 1.0)):
        with pytest.raises(ValueError, match="Expected inputs as they were captured"):
            graph(*given)
    with pytest.raises(ValueError, match="Expected a captured model in eval mode"):
        graph.train()(x, shift)
    graph.eval().one.set_format("dense")
    with pytest.raises(ValueError, match="Expected weights where they were captured"):
        graph(x, shift)


def test_the_ordinary_forward_comes_back(cuda):
    x, shift = torch.randn(3, 16), torch.randn(16)
    graph = capture(net(), (x, shift))
    wanted = graph(x, shift)["y"]
    other = torch.randn(7, 16)
    twin, dense = copy.deepcopy(graph), sk.to_dense(graph)
    assert twin(other, shift)["y"].shape == (7, 4)  # a copy is not captured
    torch.testing.assert_close(dense(x, shift)["y"], wanted)
    del graph.forward
    torch.testing.assert_close(graph(other, shift)["y"], twin(other, shift)["y"])


def test_a_device_is_needed():
    model = net()
    with pytest.raises(ValueError, match="Expected a CUDA model and CUDA example_inputs on one device .* got cpu"):
        module.on_gpu(model, torch.randn(3, 16))
    with pytest.raises(ValueError, match="got cpu, meta"):
        module.on_gpu(model, torch.empty(3, 16, device="meta"))
