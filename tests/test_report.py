"""The report: tables with every number or a dash, figures that are figures, clear words on bad files."""

import json
import math
import struct
import sys

import pytest

from sparsekit import report

LAYERS = {"fc1": ([300, 784], 0.2), "fc2": ([100, 300], 0.2), "fc3": ([10, 100], 0.1)}


def make_summary(rounds: int = 5, controls: bool = True) -> dict:
    total = sum(math.prod(shape) for shape, _ in LAYERS.values())
    rows = []
    for k in range(rounds):
        layers = [
            {"name": n, "shape": s, "density": (1 - r) ** k, "format": "csr" if k and n != "fc3" else "dense"}
            for n, (s, r) in LAYERS.items()
        ]
        row = {
            "round": k,
            "density": sum(x["density"] * math.prod(x["shape"]) for x in layers) / total,
            "test_accuracy": 0.98 + 0.001 * (k % 3),
            "val_loss": 0.07,
            "early_stop_iteration": 3000 - 100 * k,
            "train_seconds": 12.0 / (k + 1),
            "masked_dense_seconds": 12.5,
            "speedup": 12.5 * (k + 1) / 12.0,
            "layers": layers,
        }
        if controls and k:
            row["controls"] = {"reinit": {"test_accuracy": 0.97, "early_stop_iteration": 4000}}
        rows.append(row)
    config = {
        "model": "lenet-300-100",
        "data": "mnist",
        "rounds": rounds - 1,
        "rate": {"*": 0.2, "fc3.weight": 0.1},
    }
    config |= {
        "rewind": "init",
        "pattern": "unstructured",
        "criterion": "magnitude",
        "scope": "layer",
        "seed": 0,
    }
    seconds = {"train_seconds": 27.4, "masked_dense_seconds": 62.5, "speedup": 2.28, "overhead_seconds": 3.0}
    inference = {"dense_us": 812.0, "sparse_us": 131.0, "speedup": 6.2, "batch": 64}
    inference |= {"file_bytes": 182_345, "dense_bytes": 1_070_000}
    return {"config": config, "rounds": rows, "total": seconds, "inference": inference}


def write(folder, summary) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(summary if isinstance(summary, str) else json.dumps(summary))


def test_the_whole_report(tmp_path):
    pytest.importorskip("matplotlib")
    write(tmp_path, make_summary())
    path = report.write_report(tmp_path)
    text = path.read_text(encoding="utf-8")
    assert path == tmp_path / "report.md" and text.startswith("# Ticket search: lenet-300-100 on mnist\n")
    assert "| 3 | 51.3 | 98.00 | 97.00 | 2700 | 3.0 | 12.5 | 4.17x | csr x2, dense |" in text
    assert "20 % (`fc3.weight` 10 %) of the survivors" in text
    assert "| fc3 | 10x100 | 65.6 | dense |" in text
    assert "27.4 s; masked dense would have taken 62.5 s (2.28x)" in text
    assert "dense 812 µs, sparse 131 µs, 6.20x as fast; the file has 182.34 kB against 1.07 MB dense" in text
    for name in ("accuracy", "early_stop", "seconds", "density"):
        assert f"(figures/{name}.png)" in text
        head = (tmp_path / "figures" / f"{name}.png").read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">I", head[16:20])[0] >= 800


def test_the_verdict():
    lines = report._headline(make_summary())
    assert len(lines) == 3
    assert "dense network reaches 98.00 %" in lines[1]
    assert "not below it has 98.10 % at 41.1 % of the weights (re-init 97.00 %)" in lines[1]
    assert "the best has 98.20 % at 64.1 %" in lines[1]
    worse = make_summary()
    for row in worse["rounds"][1:]:
        row["test_accuracy"] = 0.5
    assert "no ticket matches it, the best has 50.00 %" in report._headline(worse)[1]


def test_an_unfinished_search_says_so():
    summary = make_summary()
    summary["config"]["rounds"] = 12
    assert "Unfinished: 5 of 13 rounds" in report._headline(summary)[0]


def test_drawing_leaves_no_global_state(tmp_path):
    mpl = pytest.importorskip("matplotlib")
    before = dict(mpl.rcParams)
    had_pyplot = "matplotlib.pyplot" in sys.modules
    write(tmp_path, make_summary())
    report.write_report(tmp_path)
    assert dict(mpl.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def test_nulls_become_dashes(tmp_path):
    summary = make_summary(3, controls=False)
    for row in summary["rounds"]:
        row |= dict.fromkeys(report._NUMBERS)
        row["layers"] = None
        row["controls"] = None
    summary["config"] = {}
    summary["total"] = {"train_seconds": None}
    summary["inference"] = None
    write(tmp_path, summary)
    text = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert "| 1 | 80.0 | – | – | – | – | – | – |" in text
    assert "masked dense was not measured" in text and "No layers were recorded" in text
    assert not list(tmp_path.rglob("*.png"))
    assert "–" in report.ledger_table(summary)


def test_partial_numbers_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    summary = make_summary(4)
    summary["rounds"][2] |= {"test_accuracy": None, "val_loss": math.nan, "masked_dense_seconds": None}
    summary["rounds"][3] |= {"density": 0.0, "early_stop_iteration": None, "speedup": math.inf}
    write(tmp_path, summary)
    report.write_report(tmp_path)
    assert len(list(tmp_path.rglob("*.png"))) == 4


def test_no_rounds_and_one_round(tmp_path):
    write(tmp_path / "none", make_summary(0))
    assert "no ticket can be judged" in report.write_report(tmp_path / "none").read_text(encoding="utf-8")
    write(tmp_path / "one", make_summary(1))
    text = report.write_report(tmp_path / "one").read_text(encoding="utf-8")
    assert "no pruned network was tested" in text and "accuracy.png" not in text


def test_out_elsewhere(tmp_path):
    pytest.importorskip("matplotlib")
    write(tmp_path / "run", make_summary(3))
    path = report.write_report(tmp_path / "run", out=tmp_path / "docs/mnist.md")
    assert path == tmp_path / "docs/mnist.md" and (tmp_path / "docs/figures/accuracy.png").is_file()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["summary.json"]


def test_figures_of_an_earlier_report_do_not_stay(tmp_path):
    pytest.importorskip("matplotlib")
    summary = make_summary(3)
    write(tmp_path, summary)
    report.write_report(tmp_path)
    for row in summary["rounds"]:
        row["train_seconds"] = None
    write(tmp_path, summary)
    assert "seconds.png" not in report.write_report(tmp_path).read_text(encoding="utf-8")
    assert not (tmp_path / "figures/seconds.png").exists()


def test_without_matplotlib(tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write(tmp_path, make_summary())
    text = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert "No figures: figures need matplotlib: pip install 'sparsekit[demo]'" in text
    assert "## Ledger" in text and not (tmp_path / "figures").exists()


def test_names_from_files_break_nothing(tmp_path):
    pytest.importorskip("matplotlib")
    summary = make_summary(3)
    summary["config"]["model"] = "a|b <script>$x_{$"
    summary["rounds"][-1]["layers"][0]["name"] = "a|b\nc $\\frac$"
    write(tmp_path, summary)
    text = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert "<script>" not in text and "| a\\|b c $\\frac$ |" in text


def test_ledger_for_the_terminal():
    lines = report.ledger_table(make_summary()).splitlines()
    assert len(lines) == 7 and lines[0].split()[0] == "round" and lines[-1].startswith("Training took 27.4 s")
    assert len({line.index("x  ") for line in lines[1:-1]}) == 1  # aligned
    assert "re-init" not in report.ledger_table(make_summary(controls=False))


BAD = {
    "torn": ('{"config": {}, "rounds": [', "Expected JSON, got a torn or foreign file"),
    "a list": ([], "a summary: Expected an object, got []"),
    "foreign": ({"epochs": 3}, "config: Expected an object, got nothing"),
    "rounds": ({"config": {}, "rounds": {}, "total": {}}, "rounds: Expected a list"),
    "row": ({"config": {}, "rounds": [3], "total": {}}, "rounds[0]: Expected an object, got 3"),
    "density": (
        {"config": {}, "rounds": [{"round": 0, "density": "all"}], "total": {}},
        "rounds[0].density: Expected a number, got 'all'",
    ),
    "accuracy": (
        {"config": {}, "rounds": [{"round": 0, "density": 1.0, "test_accuracy": "high"}], "total": {}},
        "rounds[0].test_accuracy: Expected a number, got 'high'",
    ),
    "control": (
        {"config": {}, "rounds": [{"round": 0, "density": 1.0, "controls": {"reinit": 0.9}}], "total": {}},
        "rounds[0].controls.reinit: Expected an object",
    ),
    "layers": (
        {"config": {}, "rounds": [{"round": 0, "density": 1.0, "layers": 3}], "total": {}},
        "rounds[0].layers: Expected a list, got 3",
    ),
    "total": (
        {"config": {}, "rounds": [], "total": {"speedup": []}},
        "total.speedup: Expected a number, got []",
    ),
    "inference": (
        {"config": {}, "rounds": [], "total": {}, "inference": "fast"},
        "inference: Expected an object, got 'fast'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_summaries(tmp_path, case):
    content, message = BAD[case]
    write(tmp_path, content)
    with pytest.raises(ValueError, match=r"summary\.json") as caught:
        report.write_report(tmp_path)
    assert message in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_binary_and_missing_summaries(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"summary\.json: Expected the summary"):
        report.write_report(tmp_path)
    (tmp_path / "summary.json").write_bytes(b"\xff\xfe\x00\x9f")
    with pytest.raises(ValueError, match="torn or foreign"):
        report.write_report(tmp_path)
