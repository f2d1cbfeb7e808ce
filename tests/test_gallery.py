"""Several searches on one page."""

import json
import re

import pytest

from sparsekit.__main__ import main
from sparsekit.ticket.gallery import find_runs, write_gallery

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    how = ["--data", "digits", "--rounds", "2", "--iterations", "6", "--impl", "csr", "--threads", "1"]
    model = ["--model", "mlp:64-20-10"]
    assert main(["ticket", *model, *how, "--control", "reinit", "--seeds", "2", "--out", str(folder / "one")]) == 0
    assert main(["ticket", *model, *how, "--criterion", "random", "--out", str(folder / "two")]) == 0
    return folder


def test_one_page_of_several_runs(runs, tmp_path):
    check = {"claim": "<b>", "paper": "1", "found": "2", "passed": True}
    (runs / "checks.json").write_text(json.dumps({"recipe": "r", "scale": "smoke", "checks": [check]}))
    page = write_gallery([runs], tmp_path)
    text, markdown = page.read_text(), (tmp_path / "report.md").read_text()
    (runs / "checks.json").unlink()
    assert not re.search(r'(src|href)="(?!data:)', text), "one file needs nothing else"
    assert "&lt;b&gt;" in text and "<b>" not in text and "PASS" in text
    names = ["accuracy", "early-stop", "seconds", "layers", "overlap"]
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") and name in markdown for name in names)
    assert "2 seeds" in text and "criterion random" in text and "criterion magnitude" in text
    assert text.count("Ledger: ") == 3


def test_runs_are_found_below_a_folder(runs):
    assert [run.name for run in find_runs([runs])] == ["seed_0", "seed_1", "two"]
    assert find_runs([runs / "two", runs / "two"]) == [runs / "two"]


def test_the_command_line_takes_one_or_several(runs, tmp_path, capsys):
    assert main(["report", str(runs / "two")]) == 0
    assert capsys.readouterr().out.strip() == str(runs / "two" / "report.md")
    assert main(["report", str(runs / "one"), str(runs / "two"), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "index.html")
    assert main(["report", str(tmp_path)]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main(["report", str(tmp_path), str(runs)]) == 2
    assert "got no summary.json" in capsys.readouterr().err
