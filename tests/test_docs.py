"""The pages build without a warning, name everything public, and their commands and programs run."""

import re
import runpy
import shlex
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import sparsekit
from sparsekit.__main__ import _parser
from sparsekit.criteria import CRITERIA

ROOT = Path(sparsekit.__file__).resolve().parents[1]
DOCS = ROOT / "docs"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="an installed package has no documentation beside it")


def commands():
    """Every line of every shell block."""
    found = []
    for page in sorted(DOCS.glob("*.rst")):
        for block in re.findall(r"\.\. code-block:: sh\n\n((?:   .*\n)+)", page.read_text() + "\n"):
            found += [(page.name, line.split("  #")[0].strip()) for line in block.splitlines()]
    return found


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_are_real(page, command):
    program, *words = shlex.split(command)
    if program == "sparsekit":
        assert callable(_parser().parse_args(words).run)
    else:
        assert program == "python"
        assert (ROOT / next(word for word in words if not word.startswith("-") and "/" in word)).exists()


def test_there_is_a_command_for_each_of_the_ten_questions():
    text = (DOCS / "faster.rst").read_text()
    parts = re.split(r"^\d+\. .*\?\n-+\n", text, flags=re.M)[1:]
    assert len(parts) == 10 and all(".. code-block:: sh" in part for part in parts)


def test_pages_build_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "trees"), "-b", "html"]
    done = subprocess.run([*command, str(DOCS), str(tmp_path / "html")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    inventory = (tmp_path / "html" / "objects.inv").read_bytes().split(b"\n", 4)[4]
    names = {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines()}
    assert {f"sparsekit.{name}" for name in sparsekit.__all__} <= names
    ours = {f"{found.__module__}.{name}" for name, found in CRITERIA.items() if "sparsekit" in found.__module__}
    assert ours and ours <= names
    page = (tmp_path / "html" / "index.html").read_text()
    assert not re.search(r"""(src|href)=["'](https?:)?//(?!github\.com|www\.sphinx-doc\.org|alabaster)""", page)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path, tmp_path, monkeypatch, capfd):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    printed = capfd.readouterr().out
    expected = {
        "convert_pruned_model": "pruned weights that came back: 0\n",
        "find_a_ticket": "round 4: ",
        "export_and_serve": "answers agree with the dense model",
    }
    assert expected[path.stem] in printed
