"""Rivals that are seldom here: runtimes of another environment, and a GPU's, by stand-ins that compute."""

import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from sparsekit.bench import cases, gpu, problem, rivals, runner, runtimes


def posed(subject="linear-64x64", work="forward", **more):
    return problem.pose(cases.Case("layers", subject, work, 0.3, cases.LAYERS[subject].batch, **more))


def named(name):
    return next(rival for rival in rivals.RIVALS if rival.name == name)


# ---- runtimes of another environment ----------------------------------------------------------------

ENGINE = """
import numpy as np

class Engine:
    def __init__(self, path, batch_size, num_cores):
        assert open(path, "rb").read() and (batch_size, num_cores) == (16, 1)
        print("a banner that must not reach the pipe")

    def run(self, inputs):
        if not np.isfinite(inputs[0]).all():
            raise ValueError("not finite")
        return [2 * inputs[0]]
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An interpreter that has ``deepsparse``: this one, with a package lent."""
    package = tmp_path / "deepsparse.py"
    package.write_text(ENGINE)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift\nPYTHONPATH={tmp_path} exec {sys.executable} -P "$@"\n')  # without -I
    python.chmod(0o755)
    monkeypatch.setenv("SPARSEKIT_DEEPSPARSE_PYTHON", str(python))
    return package


def test_a_worker_serves_times_itself_and_passes_errors_on(elsewhere):
    x = np.ones((16, 4), np.float32)
    run = runtimes.elsewhere("deepsparse", b"graph", x, 1)
    assert np.array_equal(run(), 2 * x) and run().dtype == np.float32
    assert 0 < run.timed(3) < 5
    with pytest.raises(RuntimeError, match="ValueError: not finite"):
        runtimes.elsewhere("deepsparse", b"graph", x * np.nan, 1)()
    elsewhere.write_text("raise ImportError('another numpy')")
    with pytest.raises(RuntimeError, match="ImportError: another numpy"):
        runtimes.elsewhere("deepsparse", b"graph", x, 1)


def test_a_worker_that_dies_is_said_so(monkeypatch):
    monkeypatch.setenv("SPARSEKIT_DEEPSPARSE_PYTHON", "/bin/true")
    with pytest.raises(RuntimeError, match="Expected a worker of deepsparse, got one that ended"):
        runtimes.elsewhere("deepsparse", b"", np.ones((1, 1), np.float32), 1)
    assert runtimes.version("deepsparse") is None
    monkeypatch.setenv("SPARSEKIT_DEEPSPARSE_PYTHON", "/no/such/python")
    assert runtimes.version("deepsparse") is None and "deepsparse" not in rivals.absences()
    with pytest.raises(OSError, match="/no/such/python"):
        runtimes.elsewhere("deepsparse", b"", np.ones((1, 1), np.float32), 1)


def test_a_runtime_of_another_environment_joins_the_row(monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    monkeypatch.setenv("SPARSEKIT_ONNXRUNTIME_PYTHON", sys.executable)
    assert runtimes.version("onnxruntime")
    for subject in ("linear-64x64", "conv3x3-8-8"):
        p = posed(subject)
        thunk = named("onnxruntime").make(p)
        assert problem.verdict(thunk(), p) < 1e-5 and 0 < thunk.timed(2) < 5
    assert named("onnxruntime").make(posed(work="step")) == "serves only"
    with pytest.raises(ValueError, match="Expected a runtime of onnxruntime, openvino, deepsparse, got 'tvm'"):
        runtimes.engine("tvm", b"", None, 1)


# ---- a GPU's ----------------------------------------------------------------------------------------


def test_every_rival_says_why_it_is_missing(monkeypatch):
    here, there = rivals.absences("cpu"), rivals.absences("cuda")
    assert here["2:4 cuSPARSELt"] == here["cuSPARSE"] == "on a GPU only"
    assert there["scipy csr"] == there["onnxruntime"] == there["deepsparse"] == "on a CPU only"
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
    assert rivals.absences("cuda")["cuSPARSE"] == "not installed: pip install cupy-cuda12x"
    assert "2:4 cuSPARSELt" not in rivals.absences("cuda")
    notes = runner.thunks_of(posed(), runner.Session("cpu", "quick"))[1]
    assert notes.keys() <= rivals.absences().keys()


def test_cusparse_through_a_cupy_of_numpy(monkeypatch):
    sparse = pytest.importorskip("scipy.sparse")
    fakes = {"cupy": types.SimpleNamespace(from_dlpack=np.from_dlpack), "cupyx": types.ModuleType("cupyx"),
             "cupyx.scipy": types.ModuleType("cupyx.scipy"),
             "cupyx.scipy.sparse": types.SimpleNamespace(csr_matrix=sparse.csr_matrix)}  # fmt: skip
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, name, module)
    for dtype in ("float32", "float64"):
        p = posed(dtype=dtype)
        assert problem.verdict(gpu.cusparse(p)(), p) < 1e-5
    assert gpu.cusparse(posed("conv3x3-8-8")) == "has no convolution"
    assert gpu.cusparse(posed(work="step")) == "has no gradient for a fixed pattern"
    assert gpu.cusparse(posed(dtype="bfloat16")) == "through cupy has float32 and float64 only"


def test_two_of_four_checks_its_own_mask(monkeypatch):
    import torch.sparse

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda dense: dense)
    thunk = gpu.semi_structured(posed())
    assert thunk()[0].dtype == torch.bfloat16 and thunk()[0].shape == (16, 64)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda dense: 1.1 * dense)
    with pytest.raises(AssertionError, match="Expected the dense result within 0.02"):
        gpu.semi_structured(posed())
    assert gpu.semi_structured(posed("conv3x3-8-8")) == "has no convolution"


def test_buffers_that_rotate_are_more_than_the_cache(monkeypatch):
    p = posed()
    assert gpu.clones(p) == [p]

    class Far(torch.Tensor):
        is_cuda = True

    far = replace(p, x=p.x.as_subclass(Far))
    size = (p.x.numel() + p.dy.numel()) * 4
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda where: types.SimpleNamespace(L2_cache_size=2 * size)
    )
    made = gpu.clones(far)
    assert made[0] is far and len(made) == 7  # together over three times the cache
    assert len({clone.x.data_ptr() for clone in made}) == len({clone.dy.data_ptr() for clone in made}) == 7
    assert len({id(problem.sparse_thunk(clone)[0]) for clone in made}) == 1  # the weights are not copied
    seen = []
    thunks = [lambda i=i: seen.append(i) for i in range(3)]
    run = runner.Session("cuda").cold(thunks)
    [run() for _ in range(4)]
    assert seen == [0, 1, 2, 0]
    assert runner.Session("cuda").clock(16).flush and not runner.Session("cuda").clock(16384).flush
    monkeypatch.setattr(runner, "graphed", lambda thunk: lambda: seen.append("graph"))
    runner.Session("cuda", graphs=True).cold(thunks)()
    assert seen[-1] == "graph"
