"""Sweeps over seeds and choices: one summary, no replicate lost, together or apart, here or on Ray."""

import shutil
from argparse import Namespace

import kill_sweep
import pytest
import torch

from sparsekit.__main__ import main
from sparsekit.files import read_json
from sparsekit.ticket.sweep import variants
from sparsekit.ticket.workers import each

pytestmark = pytest.mark.usefixtures("one_thread")

SEARCH = ["ticket", "--model", "mlp:64-32-10", "--data", "digits", "--rounds", "2", "--iterations", "60"]


def search(out, *options, code=0):
    pytest.importorskip("sklearn")
    pytest.importorskip("scipy")
    assert main([*SEARCH, *options, "--out", str(out)]) == code


def test_choices_are_multiplied_and_named():
    def names(**how):
        usual = {"criterion": "magnitude", "pattern": "unstructured", "rewind": "init"}
        return list(variants(Namespace(**usual | how)))

    assert names() == [""]
    assert names(criterion="snip,lamp") == ["snip", "lamp"]
    assert names(pattern="block:8x1,2:4", rewind="init,5it") == [
        "block-8x1_init", "block-8x1_5it", "2-4_init", "2-4_5it",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="Expected each --criterion once, got lamp,lamp"):
        names(criterion="lamp,lamp")


def test_a_killed_sweep_ends_as_one_let_be(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("scipy")
    options = ["--rounds", "1", "--iterations", "20", "--control", "reinit"]
    sweeps, files = kill_sweep.kill_and_compare(tmp_path, 2, 1, options)
    assert sweeps >= 1 and files == 2 + 2 * (5 + 2 * 3)  # of the sweep; of each run its own, and three a round
    found = read_json(tmp_path / "let_be" / "sweep.json")["searches"]
    assert list(found) == ["magnitude", "random"]
    assert found["random"]["seeds"] == [0] and found["random"]["config"]["criterion"] == "random"
    assert [row["round"] for row in found["magnitude"]["rounds"]] == [1]
    text = (tmp_path / "let_be" / "sweep.md").read_text()
    assert "## random" in text and "verdict" in text and "reinit %" in text
    pytest.importorskip("matplotlib")
    assert main(["report", str(tmp_path / "let_be")]) == 0
    page = (tmp_path / "let_be" / "report.md").read_text()
    assert page.count("Verdict: ") == 2 and page.count("Ledger: ") == 2


def test_what_was_compared_can_differ():
    line = {"test_accuracy": 0.5, "train_seconds": 1.0, "controls": {"reinit": {"val_loss": 1.0, "step_us": 3.0}}}
    assert kill_sweep.essence([line]) == [{"test_accuracy": 0.5, "controls": {"reinit": {"val_loss": 1.0}}}]


def test_the_others_finish_where_one_fails(tmp_path):
    def work(item):
        if item == 1:
            raise OSError("disk full")
        (tmp_path / str(item)).touch()

    with pytest.raises(RuntimeError, match="OSError: disk full"):
        each(work, range(5), workers=2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0", "2", "3", "4"]


def test_seeds_and_controls_in_one_training(tmp_path, capsys):
    """Up to rounding what they are apart, and as resumable."""
    options = ["--seeds", "2", "--control", "reinit,random", "--seed", "3"]
    search(tmp_path / "apart", *options, "--impl", "csr")
    search(tmp_path / "together", *options, "--impl", "csr", "--together")
    printed = capsys.readouterr().out
    assert "2 searches" in printed
    for how in ("apart", "together"):
        assert all(f"{tmp_path / how / seed}:\n" in printed for seed in ("seed_3", "seed_4"))
    for seed in ("seed_3", "seed_4"):
        apart, together = (read_json(tmp_path / how / seed / "summary.json")["rounds"] for how in ("apart", "together"))
        for one, wide in zip(apart, together, strict=True):
            assert wide["density"] == one["density"] and wide["steps"] == one["steps"]
            assert wide["val_loss"] == pytest.approx(one["val_loss"], rel=2e-2)
            for name, control in one.get("controls", {}).items():
                assert wide["controls"][name]["val_loss"] == pytest.approx(control["val_loss"], rel=2e-2)
            assert wide["test_accuracy"] == pytest.approx(one["test_accuracy"], abs=0.01)
        assert apart[0]["masks_sha256"] == together[0]["masks_sha256"]
        assert together[1]["overhead_seconds"] < 5
    study = read_json(tmp_path / "together" / "study.json")
    shutil.rmtree(tmp_path / "together" / "seed_4" / "round_02")  # a kill while round 2 was closed, seed 3's first
    search(tmp_path / "together", *options, "--impl", "csr", "--together")
    again = read_json(tmp_path / "together" / "study.json")
    assert again["rounds"][0] == study["rounds"][0]
    assert again["rounds"][1]["ticket"] == pytest.approx(study["rounds"][1]["ticket"], abs=0.01)
    search(tmp_path / "together", *options, "--impl", "csr", code=2)
    assert "together True, got None" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--together", "--rewind", "5it"], "Expected --rewind init and one process with --together, got --rewind 5it"),
        (["--together", "--workers", "2"], "Expected --together and torchrun without --workers and --launcher"),
        (["--criterion", "snip,luck"], "luck"),
    ],
)
def test_what_does_not_go_together(tmp_path, capsys, options, message):
    search(tmp_path / "run", *options, code=2)
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_ray(tmp_path):
    pytest.importorskip("ray")
    options = ["--criterion", "magnitude,snip", "--impl", "csr", "--control", "reinit"]
    search(tmp_path / "ray", *options, "--launcher", "ray")
    search(tmp_path / "local", *options)
    assert (tmp_path / "ray" / "sweep.json").read_bytes() == (tmp_path / "local" / "sweep.json").read_bytes()

    def work(item):
        return torch.full((2,), 1 / item)

    assert [float(t[0]) for t in each(work, [1, 2], launcher="ray")] == [1.0, 0.5]
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        each(work, [1, 0], launcher="ray")


def test_launchers_by_name():
    with pytest.raises(ValueError, match="Expected a launcher of local, ray, got 'slurm'"):
        each(len, [], launcher="slurm")
    with pytest.raises(ValueError, match="Expected workers=1 with launcher='ray'"):
        each(len, [], workers=2, launcher="ray")
