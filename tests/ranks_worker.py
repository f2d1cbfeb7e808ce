"""Two ranks search together: ``torchrun --nproc-per-node 2 ranks_worker.py FOLDER`` prints a line when all is well.

FOLDER/run is left by a search that stopped after a round and went on.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

import sparsekit as sk
from sparsekit.__main__ import main
from sparsekit.files import read_json
from sparsekit.ticket import ranks, store
from sparsekit.ticket.store import round_path

OPTIONS = ["--model", "mlp:64-32-10", "--data", "digits", "--iterations", "20", "--impl", "csr"]
OPTIONS += ["--control", "reinit,random"]


def write_nothing(*args):
    raise AssertionError("a rank other than the first wrote a file")


def search(folder, rounds):
    assert main(["ticket", *OPTIONS, "--rounds", str(rounds), "--out", str(folder)]) == 0


def same(a, b):
    """Two runs are equal to the bit but for what the clock says."""
    for number in range(3):
        for file in ("trained.safetensors", "end.safetensors"):
            left, right = (load_file(round_path(run, number) / file) for run in (a, b))
            assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left), (number, file)
        lines = [read_json(round_path(run, number) / "result.json") for run in (a, b)]
        for key in ("masks_sha256", "test_accuracy", "val_loss", "early_stop_iteration"):
            assert lines[0][key] == lines[1][key]


def shares():
    """Batches are shared out without loss, sums and statistics are everyone's."""
    mine = ranks.share(torch.arange(7))
    assert ranks.total(float(mine.sum()), len(mine)) == [21.0, 7.0]
    net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))
    net[0].running_mean.fill_(float(ranks.rank()))
    ranks.average_statistics(net)
    assert net[0].running_mean.tolist() == [0.5, 0.5] and net[0].running_var.tolist() == [1.0, 1.0]


def own_loop(folder):
    """One's own loop, whose model forgets rank 0's mask on one rank: all ranks hear of it, and nothing is kept."""
    torch.manual_seed(dist.get_rank())  # rank 0's weights and masks, whatever a rank has
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    seen = []
    for round_ in sk.tickets(model, 1, 0.5, criterion="random", impl="csr", run_dir=folder):
        twin = nn.parallel.DistributedDataParallel(round_.model)
        twin(torch.ones(4, 8)).sum().backward()
        seen.append(ranks.agree(sk.masks_of(round_.model)))
    assert len(seen) == 2 and len(set(seen)) == 2
    found = sk.tickets(model, 1, 0.5, impl="csr")
    try:
        for round_ in found:
            if round_.number and dist.get_rank():
                other = {name: mask.flip(0) for name, mask in round_.masks.items()}
                round_.model = sk.convert(sk.to_dense(round_.model), other, impl="csr")
    except ValueError as error:
        assert str(error) == "Expected the masks of rank 0 on every rank, got others on [1]"
    else:
        raise AssertionError("different masks went unnoticed")
    try:
        ranks.from_first(lambda: [][0])
    except IndexError:
        return
    raise AssertionError("what rank 0 raised did not reach the others")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    joined = ranks.join("cpu")
    assert joined and not ranks.join("cpu") and ranks.count() == 2
    if ranks.rank():
        store.write_tensors = store.write_json = write_nothing
    search(folder / "run", 1)
    search(folder / "run", 2)
    search(folder / "again", 2)
    shares()
    own_loop(folder / "own")
    dist.barrier()
    if ranks.rank() == 0:
        same(folder / "run", folder / "again")
        print("all passed")
    dist.destroy_process_group()
