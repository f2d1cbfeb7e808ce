"""The house: who may import whom, and what the front door shows."""

import ast
import importlib
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sparsekit

ROOT = Path(sparsekit.__file__).resolve().parents[1]

# From the ground up. A module may import from its own floor and from any floor above it in this list.
FLOORS = [
    {"schemas", "_version"},
    {"_native", "_nodes", "_triton", "device", "memory", "clock"},
    {"pattern", "mask", "transposable", "coding", "panels", "refill"},
    {"criteria", "schedule", "select"},
    {"prune"},
    {"collapse", "flops", "overlap"},
    {"format", "kernels", "files", "times"},
    {"plan", "explanation", "roofline"},
    {"ops", "autograd", "functional"},
    {"serve", "traced"},
    {"nn"},
    {"data", "nets", "models", "words", "figures", "report"},
    {"ticket"},
    {"export", "reproduce"},
    {"integrations"},
    {"bench", "info", "planner"},
    {"__main__"},
    {"demo"},
]
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}


def modules():
    """``{"nn.base": path}`` of everything in the package but its front door."""
    sources = [*(ROOT / "sparsekit").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    found = {}
    for path in sources:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[1:] if parts[0] == "sparsekit" else parts
        found[".".join(parts).removesuffix(".__init__")] = path
    del found["__init__"]
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """The sparsekit modules that a module names in an import, at its top or inside a function."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "sparsekit"}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = ["sparsekit", *package[: len(package) - node.level + 1], *filter(None, [node.module])]
            else:
                base = (node.module or "").split(".")
            if base[0] == "sparsekit":
                found |= {".".join([*base, alias.name]) for alias in node.names}
    return {_module(dotted.split(".")[1:]) for dotted in found} - {None}


def _module(parts: list[str]) -> str | None:
    """The longest leading part of a dotted name that is a module; None for names of the front door."""
    for end in range(len(parts), 0, -1):
        if (name := ".".join(parts[:end])) in MODULES:
            return name
    return None


def test_every_module_has_a_floor():
    assert {name.split(".")[0] for name in MODULES} - FLOOR.keys() == set()


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name):
    own = FLOOR[name.split(".")[0]]
    wrong = {other for other in imports(name) if FLOOR[other.split(".")[0]] > own}
    assert not wrong, f"{name} imports {wrong} from a later floor"


def test_kernel_folders_do_not_know_each_other():
    for name in MODULES:
        folder = name.split(".")[:2]
        if folder[0] == "kernels" and len(folder) == 2:
            kernels = {other.split(".")[1] for other in imports(name) if other.startswith("kernels.")}
            assert kernels <= {folder[1], "blocks", "reference", "tuning"}, name


def test_no_circles():
    # A package that gathers names from its own modules is no circle: those never import the package.
    edges = {name: imports(name) - {name} for name in MODULES}
    done: set[str] = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in sorted(edges[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in MODULES:
        visit(name, [])


def test_front_door():
    assert len(sparsekit.__all__) <= 25
    assert sparsekit.__all__ == sorted(sparsekit.__all__)
    for name in sparsekit.__all__:
        assert inspect.getdoc(getattr(sparsekit, name)), f"{name} has no docstring"
    assert not sparsekit._HOME.keys() & MODULES.keys()  # importing the module would hide the function


def test_a_source_tree_that_was_not_installed_says_so(tmp_path):
    (tmp_path / "sparsekit").mkdir()
    shutil.copy(ROOT / "sparsekit/__init__.py", tmp_path / "sparsekit")
    command = [sys.executable, "-S", "-c", "import sparsekit"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert "Expected an installed package, got a source tree; run pip install" in done.stderr


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of packages that integrations import
def test_all_names_exist(name):
    if needed := {"integrations.lightning": "lightning", "integrations.huggingface": "huggingface_hub"}.get(name):
        pytest.importorskip(needed)
    if "import triton" in MODULES[name].read_text() or name.startswith("kernels.bsr."):
        pytest.importorskip("triton")
    module = importlib.import_module(f"sparsekit.{name}")
    assert module.__doc__, f"{name} has no docstring"
    assert [public for public in getattr(module, "__all__", ()) if not hasattr(module, public)] == []
