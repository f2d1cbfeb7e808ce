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


def test_stability_and_recipes_are_drawn(runs, tmp_path, capsys):
    how = ["--model", "mlp:64-20-10", "--data", "digits", "--iterations", "8", "--steps", "0", "4", "--threads", "1"]
    lab = tmp_path / "lab"
    lab.mkdir()
    assert main(["stability", *how, "--alphas", "5", "--json", str(lab / "stability-mlp.json")]) == 0
    capsys.readouterr()
    write_gallery([lab], tmp_path / "alone")
    assert sorted(path.stem for path in (tmp_path / "alone").glob("*.png")) == ["instability", "paths"]
    page = (tmp_path / "alone" / "index.html").read_text()
    assert "Stability: mlp:64-20-10, digits, seed 0" in page and page.count("data:image/png") == 2
    assert main(["reproduce", "stability", "--scale", "smoke", "--out", str(lab / "recipe")]) == 0
    page = write_gallery([lab, runs / "two"], tmp_path / "both").read_text()
    assert "stability (smoke)" in page and page.count("Stability: ") == 2 and "Ledger: " in page
    assert (tmp_path / "both" / "recipe-0.png").read_bytes() == (lab / "recipe" / "figure.png").read_bytes()
    for text in ('{"steps": 3}', '{"model": "m", "data": "d", "seed": 0, "steps": [{"curves": []}]}', "[1]"):
        (lab / "stability-mlp.json").write_text(text)
        with pytest.raises(ValueError, match="Expected what sparsekit stability --json writes"):
            write_gallery([lab], tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_names_of_unlike_runs_fit_the_figures(runs, tmp_path):
    """matplotlib warns, an error in tests, of figures that have no room left for their axes."""
    how = ["--model", "mlp:64-20-10", "--data", "digits", "--rounds", "3", "--iterations", "5", "--threads", "1"]
    more = ["--density", "0.1", "--schedule", "cubic", "--scope", "global", "--rewind", "2it", "--criterion"]
    assert main(["ticket", *how, *more, "layer_softmax,small_init", "--out", str(tmp_path / "runs")]) == 0
    text = write_gallery([runs, tmp_path / "runs"], tmp_path / "page").read_text()
    assert re.search(r"scope global.*rewind 2it.*rate \[[\d.]+ %, [\d.]+ %, [\d.]+ %\]", text)


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
