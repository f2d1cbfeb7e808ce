"""Files that serve: traced, compiled and ONNX graphs give what the model gives, for any batch, here and in C++."""

import functools
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sparsekit as sk
from sparsekit import _native, serve
from sparsekit.__main__ import main
from sparsekit.export import save_aoti, save_onnx, save_pt2

ROOT = Path(__file__).resolve().parents[1]
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
native = pytest.mark.skipif(_native.lacks_cpu() is not None, reason="no native library")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Linear(16, 5)
        self.norm.running_mean.uniform_()

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


X = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def sparse(impl="csr", training=False) -> nn.Module:
    torch.manual_seed(0)
    model = Net().train(training)
    return sk.convert(model, sk.prune(model, 0.7, pattern="block:16x1" if impl == "bsr" else "unstructured"), impl=impl)


def batches(got, model):
    """``got`` agrees with ``model`` for every batch, none of which it was made with."""
    for size in (1, 2, 5, 64):
        x = torch.randn(size, 2, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(got(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["csr", "bsr", "dense"])
def test_a_traced_file_gives_what_the_model_gives(tmp_path, impl):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a forced format without a kernel warns
        model = sparse(impl)
    assert save_pt2(model, X, tmp_path / "m.pt2") == tmp_path / "m.pt2"
    served = serve.load(tmp_path / "m.pt2")
    batches(served, model)
    assert not served(X).requires_grad
    assert list(tmp_path.iterdir()) == [tmp_path / "m.pt2"]


def test_a_traced_file_leaves_out_what_only_training_reads(tmp_path):
    model, trained = sparse(), sparse()
    trained.train()(X.clone().requires_grad_()).sum().backward()
    assert trained.conv._buffers["t_perm"] is not None
    for name, net in {"a": model, "b": trained.eval()}.items():
        save_pt2(net, X, tmp_path / f"{name}.pt2")
    sizes = [(tmp_path / f"{name}.pt2").stat().st_size for name in "ab"]
    assert abs(sizes[0] - sizes[1]) < 512 and trained.conv._buffers["t_perm"] is not None


@pytest.mark.parametrize("save", [save_pt2, save_aoti])
@pytest.mark.parametrize(
    ("model", "x", "name", "why"),
    [
        (lambda: sparse(training=True), X, "m.pt2", "Expected a model in eval mode"),
        (sparse, X, "m.bin", r"m\.bin: Expected a file name that ends in \.pt2"),
        (sparse, X, "gone/m.pt2", "Expected a file in an existing directory"),
        (sparse, 3, "m.pt2", "Expected inputs with a batch axis, got int"),
        (sparse, X[:, :1], "m.pt2", "Net: Expected a model that torch.export traces"),
    ],
)
def test_graphs_that_cannot_be(tmp_path, save, model, x, name, why):
    with pytest.raises((ValueError, FileNotFoundError), match=why):
        save(model(), x, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_graph_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        serve.load(tmp_path / "gone.pt2")
    (tmp_path / "a.pt2").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"a\.pt2: Expected a \.pt2 file, got no archive"):
        serve.load(tmp_path / "a.pt2")
    torch.save({}, tmp_path / "b.pt2")
    with pytest.raises(ValueError, match=r"b\.pt2: Expected a \.pt2 file that torch.export or AOTInductor wrote"):
        serve.load(tmp_path / "b.pt2")


def test_serving_imports_nothing_that_trains():
    code = "import sys, sparsekit.serve; print(*[m for m in sys.modules if m.startswith('sparsekit.')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "sparsekit.ops" in out
    training = ("nn", "ticket", "export", "data", "models", "plan", "report", "autograd")
    assert [name for name in out if name.split(".")[1] in training] == []


class Odd(nn.Module):
    """Sizes in the graph, lists of tensors, several outputs of an operator, outputs of several kinds."""

    def __init__(self, wild=False) -> None:
        super().__init__()
        self.fc, self.wild = nn.Linear(8, 8), wild
        self.register_buffer("shift", torch.ones(8))

    def forward(self, x, scale=2.0):
        y, n = self.fc(x) * scale, x.shape[0]
        left, right = y.chunk(2, 1)
        both = torch.cat([left, right.flip(1), torch.zeros(n, 2)], 1)
        if self.wild:
            with torch.autocast("cpu", enabled=False):
                both = both.sin()
        return {"flat": (y + self.shift).reshape(n * 8), "rest": (both[:, 1:], torch.arange(n, dtype=torch.int32), n)}


@functools.cache
def trace(wild=False):
    torch.manual_seed(0)
    model = sk.convert(Odd(wild).eval(), sk.prune(Odd(), 0.5), impl="csr")
    with tempfile.TemporaryDirectory() as folder:
        return save_pt2(model, torch.randn(4, 8), Path(folder, "odd.pt2")).read_bytes(), model


def traced(tmp_path, wild=False):
    path, (content, model) = tmp_path / "odd.pt2", trace(wild)
    path.write_bytes(content)
    return path, model


def test_a_traced_graph_of_many_kinds(tmp_path):
    path, model = traced(tmp_path)
    served = serve.load(path)
    for size in (1, 3):
        x = torch.randn(size, 8)
        got, want = served(x), model(x)
        assert got["rest"][2] == size and got.keys() == want.keys()
        torch.testing.assert_close((got["flat"], *got["rest"][:2]), (want["flat"].detach(), *want["rest"][:2]))


def test_a_traced_graph_checks_its_inputs(tmp_path):
    served = serve.load(traced(tmp_path)[0])
    for wrong, error in ((torch.ones(0, 8), ValueError), (torch.ones(2, 7), ValueError), (torch.ones(8), ValueError),
                         (torch.ones(2, 8).double(), TypeError), (3, TypeError)):  # fmt: skip
        with pytest.raises(error, match="Expected an input of"):
            served(wrong)
    with pytest.raises(ValueError, match="Expected inputs as at export"):
        served(torch.ones(2, 8), torch.ones(2, 8))


def edited(path, name, edit):
    """The archive with one entry changed."""
    with zipfile.ZipFile(path) as old:
        entries = {entry: old.read(entry) for entry in old.namelist()}
    (only,) = (entry for entry in entries if entry.endswith(name))
    entries[only] = edit(entries[only])
    with zipfile.ZipFile(path, "w") as new:
        for entry, content in entries.items():
            new.writestr(entry, content)
    return path


def test_a_traced_graph_runs_no_other_code(tmp_path):
    refused = r"\.pt2: Expected a graph of torch's and sparsekit's operators, got "
    ours = b"torch.ops.sparsekit.csr_linear.default"
    for target in (b"torch.ops.aten.from_file.default", b"os.system", b"torch.serialization.os.system", b"torch.ops.a"):
        path = edited(traced(tmp_path)[0], "/model.json", lambda text, t=target: text.replace(ours, t))
        with pytest.raises(ValueError, match=refused + f"a call of {target.decode()}"):
            serve.load(path)
    for name, edit in {
        "/model.json": lambda text: text[:900],
        "/weight_0": lambda content: content[:8],
        "/model_weights_config.json": lambda text: text.replace(b'"as_int": 8', b'"as_int": 1099511627776'),
        "/byteorder": lambda _: b"big",
    }.items():
        with pytest.raises(ValueError, match=refused):
            serve.load(edited(traced(tmp_path)[0], name, edit))
    with pytest.raises(ValueError, match=refused + "a call of torch.ops.higher_order"):
        serve.load(traced(tmp_path, wild=True)[0])


def test_damaged_traces_are_refused_or_read(tmp_path):
    path, rng, found = traced(tmp_path)[0], random.Random(0), {"refused": 0, "read": 0}
    good = path.read_bytes()
    strange = [b"null", b"-1", b"[]", b"{}", b'""', b"1e999", b"99999999999999999999", b'"torch.ops"', b"true"]

    def mutate(text):
        words = list(re.finditer(rb'"[a-z_]+"|\d+|true|false|null|\[\]', text))
        word = rng.choice(words)
        return text[: word.start()] + rng.choice([*strange, rng.choice(words).group()]) + text[word.end() :]

    for _ in range(300):
        path.write_bytes(good)
        entry = rng.choice(["/model.json", "/model.json", "/model_weights_config.json", "/model_constants_config.json"])
        try:
            serve.load(edited(path, entry, mutate))
            found["read"] += 1
        except ValueError as error:
            assert "odd.pt2: Expected" in str(error)
            found["refused"] += 1
    assert min(found.values()) > 30


def test_a_traced_file_serves_without_the_tracer(tmp_path):
    path, _ = traced(tmp_path)
    code = (
        "import sys, torch, sparsekit.serve as serve\n"
        f"print(serve.load({str(path)!r})(torch.ones(3, 8))['flat'].shape)\nprint(*sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[0] == "torch.Size([24])" and not {"torch._dynamo", "sympy", "sparsekit.nn"} & {*out[1].split()}
    assert path.stat().st_size < 40_000  # the example it was traced with is not in it


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("no g++")
    folder, model = tmp_path_factory.mktemp("aoti"), sk.fuse(sparse())
    return save_aoti(model, X, folder / "m.pt2"), model


@native
def test_a_compiled_file_gives_what_the_model_gives(package):
    path, model = package
    served = serve.load(path)
    batches(served, model)
    for wrong, error in ((X[:0], ValueError), (X[:, :1], ValueError), (X[0], ValueError), (X.double(), TypeError)):
        with pytest.raises(error, match="Expected an input of"):
            served(wrong)
    with pytest.raises(ValueError, match="Expected 1 inputs as at export, got 2"):
        served(X, X)
    strided = X.transpose(2, 3)
    torch.testing.assert_close(served(strided), model(strided), rtol=1e-5, atol=1e-5)


@native
def test_a_compiled_file_serves_without_the_compiler_or_the_tracer(package):
    code = (
        "import sys, torch, sparsekit.serve as serve\n"
        f"print(serve.load({str(package[0])!r})(torch.ones(3, 2, 8, 8)).shape)\n"
        "print(*sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[0] == "torch.Size([3, 5])"
    assert not {"torch._inductor.compile_fx", "torch._dynamo", "sparsekit.nn"} & {*out[1].split()}


@native
@pytest.mark.skipif(not shutil.which("cmake"), reason="no cmake")
def test_a_compiled_file_serves_in_cpp(package, tmp_path):
    path, model = package
    cmake = ["cmake", "-S", ROOT / "examples/serve_cpp", "-B", tmp_path / "b", "-DCMAKE_BUILD_TYPE=Debug",
             f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"]  # fmt: skip
    for command in (cmake, ["cmake", "--build", tmp_path / "b"]):
        done = subprocess.run(command, capture_output=True, text=True)
        if torch.version.cuda is not None and "CUDA cannot be found" in done.stderr:
            pytest.skip("torch's CMake files want the CUDA toolkit")
        assert done.returncode == 0, done.stdout + done.stderr
    run = [tmp_path / "b/serve", _native.status()["path"], path]
    done = subprocess.run([*run, "6x2x8x8", "3"], input=X.numpy().tobytes(), capture_output=True, check=True)
    got = torch.from_numpy(np.frombuffer(done.stdout, np.float32).copy()).view(6, 5)
    torch.testing.assert_close(got, model(X).detach(), rtol=1e-5, atol=1e-5)
    assert done.stderr.decode().endswith(" us\n")
    one = subprocess.run([*run, "1x2x8x8"], input=X[:1].numpy().tobytes(), capture_output=True, check=True)
    assert np.allclose(np.frombuffer(one.stdout, np.float32), got[0], 1e-5, 1e-5)
    for arguments, why in (
        (run[:2], "Expected LIBRARY PACKAGE SHAPE"),
        ([*run, "6x2x8x9"], "Expected 864 numbers on stdin, got fewer"),
        ([*run, "6x2x4x16"], "unmatched dim value at 2, expected: 8"),
        ([run[0], tmp_path / "no.so", path, "6x2x8x8"], "no.so"),
    ):
        done = subprocess.run(arguments, input=X.numpy().tobytes(), capture_output=True)
        assert done.returncode == 1 and why in done.stderr.decode(), done.stderr.decode()


# ONNX


def onnx_packages():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    import onnxruntime

    return onnxruntime


@pytest.mark.parametrize("sparse_file", [False, True])
def test_an_onnx_file_gives_what_the_model_gives(tmp_path, sparse_file):
    runtime = onnx_packages()
    model = sparse()
    assert save_onnx(model, X, tmp_path / "m.onnx", sparse=sparse_file) == tmp_path / "m.onnx"
    session = runtime.InferenceSession(tmp_path / "m.onnx")
    for size in (1, 7):
        x = torch.randn(size, 2, 8, 8)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-5, atol=1e-5)
    assert list(tmp_path.iterdir()) == [tmp_path / "m.onnx"]


def test_packed_weights_shrink_an_onnx_file_and_keep_the_bits(tmp_path):
    runtime = onnx_packages()
    import onnx

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(127, 255), nn.ReLU(), nn.Linear(255, 64)).eval()
    masks = sk.prune(model, 0.9, scope="layer") | {"2.weight": torch.rand(64, 255) < 0.95}  # the second is best dense
    ticket = sk.convert(model, masks, impl="csr")
    for name in ("dense", "sparse"):
        save_onnx(ticket, torch.randn(4, 127), tmp_path / f"{name}.onnx", sparse=name == "sparse")
    dense, small = (onnx.load(tmp_path / f"{name}.onnx") for name in ("dense", "sparse"))
    onnx.checker.check_model(small, full_check=True)
    assert [node.output[0] for node in small.graph.node if node.domain == "sparsekit"] == ["0.weight"]
    assert not dense.functions and [function.name for function in small.functions] == ["Unpack"]
    small.graph.output.append(onnx.helper.make_tensor_value_info("0.weight", onnx.TensorProto.FLOAT, [255, 127]))
    session = runtime.InferenceSession(small.SerializeToString())
    got = session.run(["0.weight"], {session.get_inputs()[0].name: np.zeros((1, 127), np.float32)})[0]
    want = next(onnx.numpy_helper.to_array(t) for t in dense.graph.initializer if t.name == "0.weight")
    assert np.array_equal(got, want)
    whole, part = 4 * 255 * 127, 4 * int(masks["0.weight"].sum()) + 255 * 127 / 8
    saved = [(tmp_path / f"{name}.onnx").stat().st_size for name in ("dense", "sparse")]
    assert saved[0] - saved[1] > whole - part - 2500


def test_onnxruntime_unpacks_once(tmp_path):
    runtime = onnx_packages()
    import onnx

    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    runtime.InferenceSession(save_onnx(sparse(), X, tmp_path / "m.onnx", sparse=True), options)
    left = {node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node}
    assert "Conv" in left and not {"Unpack", "CumSum", "Gather", "Where"} & left


def test_an_onnx_graph_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    onnx_packages()
    monkeypatch.setattr("sparsekit.export.onnx._ERROR", -1.0)
    (tmp_path / "m.onnx").write_text("old")
    with pytest.raises(RuntimeError, match="Expected onnxruntime within"):
        save_onnx(sparse(), X, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_onnx_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install 'sparsekit\[onnx\]'"):
        save_onnx(sparse(), X, tmp_path / "m.onnx")


# The command line


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed file that names its network, as those of runs do."""
    from sparsekit import models

    path = tmp_path_factory.mktemp("packed") / "t.safetensors"
    model = models.build("mlp:64-32-10", input_shape=(1, 8, 8), seed=0)
    ticket = sk.convert(model, sk.prune(model, 0.8), impl="csr")
    sk.save(ticket, path, recipe={"config": {"model": "mlp:64-32-10", "data": "digits"}})
    return path, ticket


@pytest.mark.parametrize("to", ["pt2", "onnx", "onnx-packed"])
def test_the_command_line_exports_graphs(packed, tmp_path, to):
    path, ticket = packed
    out, x = tmp_path / ("m.pt2" if to == "pt2" else "m.onnx"), torch.randn(5, 1, 8, 8)
    if to != "pt2":
        runtime = onnx_packages()
    assert main(["export", str(path), "--to", to, "-o", str(out), "--batch", "8"]) == 0
    if to != "pt2":
        session = runtime.InferenceSession(out)
        got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    else:
        got = serve.load(out)(x)
    torch.testing.assert_close(got, ticket(x).detach(), rtol=1e-5, atol=1e-5)


def test_a_network_whose_head_is_not_its_last_tensor(tmp_path):
    from sparsekit import models

    model = models.build("resnet20", classes=7, input_shape=(3, 8, 8), seed=0).eval()
    sk.save(sk.convert(model, sk.prune(model, 0.5), impl="csr"), tmp_path / "t.safetensors")
    network = ["--model", "resnet20", "--input-shape", "3x8x8", "--batch", "2", "-o", str(tmp_path / "m.pt2")]
    assert main(["export", str(tmp_path / "t.safetensors"), "--to", "pt2", *network]) == 0
    assert serve.load(tmp_path / "m.pt2")(torch.randn(3, 3, 8, 8)).shape == (3, 7)


def test_the_command_line_needs_the_name_of_a_network(packed, tmp_path, capsys):
    path, ticket = packed
    sk.save(ticket, tmp_path / "t", recipe={"config": {"model": "os.system", "data": ["digits"]}})
    out = ["--to", "pt2", "-o", str(tmp_path / "m.pt2")]
    assert main(["export", str(tmp_path / "t"), *out]) == 2
    assert "Expected --model and --input-shape" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "t"), *out, "--input-shape", "1x8x8"]) == 2
    assert "Expected a model of lenet-300-100" in capsys.readouterr().err
    assert main(["export", str(path), *out, "--model", "conv2", "--input-shape", "1x28x28"]) == 2
    assert "Expected the tensors of conv2, got others" in capsys.readouterr().err
    assert not (tmp_path / "m.pt2").exists()
    assert main(["export", str(tmp_path / "t"), *out, "--model", "mlp:64-32-10", "--input-shape", "1x8x8"]) == 0
    assert os.path.exists(tmp_path / "m.pt2")
