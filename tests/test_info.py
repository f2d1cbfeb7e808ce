"""Hardware facts and the environment report."""

import json
import re
import stat
import sys
from types import SimpleNamespace

import pytest
import torch

from sparsekit import device, info


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in ("SPARSEKIT_DATA", "SPARSEKIT_CACHE"):
        monkeypatch.delenv(name, raising=False)


def test_cpu_facts():
    facts = device.cpu()
    assert facts["cores"] >= 1 and facts["model"] and isinstance(facts["isa"], list)
    assert json.dumps(facts)


def test_describe_is_a_stable_file_name():
    key = device.describe("cpu")
    assert key == device.describe() == device.describe(torch.device("cpu"))
    assert re.fullmatch(r"cpu-[a-z0-9_]+-[A-Za-z0-9._+-]+-\d+c", key)
    assert device.describe("meta") == "meta"


def test_generations_of_one_name_have_keys_of_their_own(monkeypatch):
    text = "vendor_id : AuthenticAMD\ncpu family : {}\nmodel : {}\nmodel name : AMD EPYC\nflags : fpu avx2 avx512f\n"
    keys = []
    for family, model in ((25, 17), (26, 2)):
        monkeypatch.setattr(device.Path, "read_text", lambda self, f=family, m=model: text.format(f, m))
        device._cpu_identity.cache_clear()
        keys.append(device.describe("cpu"))
    device._cpu_identity.cache_clear()
    assert [key.rsplit("-", 1)[0] for key in keys] == ["cpu-avx512-AMD-EPYC-f25m17", "cpu-avx512-AMD-EPYC-f26m2"]


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz", "Intel-Xeon-Gold-6338"),
        ("Intel(R) Xeon(R) Platinum 8480+", "Intel-Xeon-Platinum-8480+"),
        ("AMD EPYC 7763 64-Core Processor", "AMD-EPYC-7763"),
        ("AMD EPYC", "AMD-EPYC"),
        ("NVIDIA H200", "NVIDIA-H200"),
        ("../../etc", "..-..-etc"),
        ("", "unknown"),
    ],
)
def test_slugs(name, slug):
    assert device._slug(name) == slug


def test_gpu_facts_from_torch(monkeypatch):
    properties = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, total_memory=150 << 30, multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: properties.name)
    (gpu,) = device.gpus()
    assert gpu["capability"] == "9.0" and gpu["usable"]
    assert device.describe("cuda:0") == "NVIDIA-H200"


def test_describe_cuda_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="cuda: Expected a GPU that torch can use"):
        device.describe("cuda")


def program(folder, name: str, output: str, before: str = "") -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{before}\ncat <<'X'\n{output}\nX\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def only_path(tmp_path, monkeypatch):
    """A PATH that holds the programs of the test and little else."""
    (tmp_path / "cat").symlink_to("/bin/cat")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    return tmp_path


needs_sh = pytest.mark.skipif(sys.platform == "win32", reason="fakes programs by shell scripts")


@needs_sh
def test_compiler_versions(only_path):
    program(only_path, "gcc", "gcc (Debian 14.2.0-19) 14.2.1 20250117")
    program(only_path, "g++", "g++ (Ubuntu 13.3.0-6ubuntu2~24.04) 13.3.1")
    program(only_path, "clang", "Debian clang version 19.1.7 (3)\nTarget: x86_64-pc-linux-gnu")
    (only_path / "cuda/bin").mkdir(parents=True)
    nvcc = "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.88"
    program(only_path / "cuda/bin", "nvcc", nvcc)
    found = device.compilers()
    versions = {name: entry and entry["version"] for name, entry in found.items()}
    assert versions == {
        "gcc": "14.2.1",
        "g++": "13.3.1",
        "clang": "19.1.7",
        "clang++": None,
        "nvcc": "13.0.88",
    }


@needs_sh
def test_a_compiler_that_hangs_or_talks_nonsense(only_path, monkeypatch):
    monkeypatch.setattr(device, "_TIMEOUT", 0.2)
    program(only_path, "gcc", "never", before="while :; do :; done")
    program(only_path, "g++", "hello")
    found = device.compilers()
    assert found["gcc"]["version"] == found["g++"]["version"] == "unknown"


@needs_sh
def test_a_card_that_torch_cannot_use_is_explained(only_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    program(only_path, "nvidia-smi", "NVIDIA H200, 9.0, 143771\nFailed to initialize NVML: whatever, too")
    (gpu,) = device.gpus()
    assert gpu["name"] == "NVIDIA H200" and not gpu["usable"]
    assert "install torch for CUDA" in info.render(info.collect())


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert device.cache_dir() == tmp_path / ".cache/sparsekit"
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "x"))
    assert device.cache_dir() == tmp_path / "x"
    assert not (tmp_path / "x").exists()


def test_report_is_json_and_complete():
    facts = info.collect()
    assert json.loads(json.dumps(facts)) == facts
    text = info.render(facts)
    for part in ("sparsekit", "torch", "native library", "formats", "cpu", "plan cache", "SPARSEKIT_CACHE"):
        assert part in text
    assert torch.__version__ in text and facts["device_key"] in text


def test_every_missing_thing_says_how_to_get_it(monkeypatch, only_path):
    facts = info.collect()
    facts["packages"] = {"safetensors": None, "triton": None}
    facts["extras"] = {"demo": {"matplotlib": None, "tqdm": "4"}}
    facts["native"] = {
        "loaded": False,
        "path": None,
        "reason": "not built; reinstall with g++",
        "build": None,
    }
    facts["compilers"] = dict.fromkeys(("gcc", "g++", "clang", "clang++", "nvcc"))
    text = info.render(facts)
    for part in (
        "pip install safetensors",
        "pip install triton",
        "matplotlib missing, tqdm 4; pip install 'sparsekit[demo]'",
        "reinstall with g++",
        "apt-get install g++",
        "install the CUDA toolkit",
        "set SPARSEKIT_DATA",
    ):
        assert part in text


def test_data_that_is_there(monkeypatch, tmp_path):
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"{name}-ubyte.gz").touch()
    monkeypatch.setenv("SPARSEKIT_DATA", str(tmp_path))
    sets = info.collect()["data"]["sets"]
    assert sets["mnist"] == {"where": f"{tmp_path} (4 files)", "missing": None}
    assert sets["cifar10"]["where"] is None and "data_batch_1.bin" in sets["cifar10"]["missing"]
