"""DDP, FSDP2 and distributed checkpoints with two processes: the results of one, the masks of rank 0."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_two_processes(tmp_path):
    worker = Path(__file__).with_name("distributed_worker.py")
    run = subprocess.run([sys.executable, worker, tmp_path], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and run.stdout.splitlines()[-1:] == ["all passed"], run.stdout + run.stderr
