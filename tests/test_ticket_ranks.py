"""A search under torchrun: two ranks train what one would, and rank 0 alone decides and writes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks_worker import OPTIONS

from sparsekit.__main__ import main
from sparsekit.files import read_json, read_tensors, unpack_state
from sparsekit.ticket import ranks
from sparsekit.ticket.store import round_path


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_two_ranks(tmp_path):
    pytest.importorskip("sklearn")
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = Path(__file__).with_name("ranks_worker.py")
    done = subprocess.run([*command, worker, tmp_path], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.splitlines()[-1:] == ["all passed"], done.stdout + done.stderr
    assert done.stdout.count("run directory") == 3  # of three searches, by rank 0

    assert main(["ticket", *OPTIONS, "--rounds", "2", "--out", str(tmp_path / "alone")]) == 0
    for number in range(3):
        two, one = (read_json(round_path(tmp_path / name, number) / "result.json") for name in ("run", "alone"))
        assert two["density"] == one["density"] and two["steps"] == one["steps"] == 20
        assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-3)
        for name, control in one.get("controls", {}).items():
            assert two["controls"][name]["val_loss"] == pytest.approx(control["val_loss"], rel=1e-3)
        files = [round_path(tmp_path / name, number) / "trained.safetensors" for name in ("run", "alone")]
        (shared, _), (weights, _) = (unpack_state(*read_tensors(file)) for file in files)
        for name, weight in weights.items():
            torch.testing.assert_close(shared[name], weight, rtol=1e-2, atol=1e-4)
    assert read_json(run / "config.json")["ranks"] == 2 and two["masked_dense_seconds"] > 0


def test_one_process_is_rank_0():
    assert (ranks.count(), ranks.rank(), ranks.join("cpu")) == (1, 0, False)
    x = torch.arange(4)
    assert ranks.share(x) is x and ranks.total(1.0, 2.0) == [1.0, 2.0] and ranks.from_first(lambda: 3) == 3
