"""Two processes train what one would: ``distributed_worker.py FOLDER`` prints a line for every check that passed."""

import copy
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sparsekit as sk
from sparsekit.integrations.distributed import check_masks_agree, convert

RANKS = 2


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 24), nn.ReLU())
    return model.append(nn.Linear(24, 5))


def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def train(model, optimizer, rank=None):
    """Three steps on eight images, or on a rank's share of them."""
    for number in range(3):
        x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(number))
        step(model, optimizer, x if rank is None else x.chunk(RANKS)[rank])


def whole(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def same(model, reference):
    for (name, parameter), want in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(whole(parameter).detach(), want.detach(), rtol=1e-4, atol=1e-6, msg=name)


def ddp(rank, fmt):
    fast = convert(network(), sk.prune(network(), 0.7), impl=fmt)
    alone, masks = copy.deepcopy(fast), check_masks_agree(fast)
    model = nn.parallel.DistributedDataParallel(fast)
    train(model, torch.optim.AdamW(model.parameters(), 0.01), rank)
    train(alone, torch.optim.AdamW(alone.parameters(), 0.01))
    same(fast, alone)
    assert check_masks_agree(fast) == masks


def fsdp(rank, fmt, folder):
    fast = convert(network(), sk.prune(network(), 0.7), impl=fmt)
    alone = copy.deepcopy(fast)
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in fast:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    model = fully_shard(fast, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    train(model, optimizer, rank)
    train(alone, torch.optim.AdamW(alone.parameters(), 0.01))
    same(model, alone)

    state, moments = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": moments}, checkpoint_id=f"{folder}/{fmt}")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state, moments = get_state_dict(model, optimizer)
    dcp.load({"model": state, "optimizer": moments}, checkpoint_id=f"{folder}/{fmt}")
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=moments)
    same(model, alone)
    try:
        model.load_state_dict({"0.weight": torch.zeros(8, 3, 3, 3)}, strict=False)
    except RuntimeError as error:
        assert "0.values: Expected the packed survivors" in str(error)
    else:
        raise AssertionError("dense weights went into a sharded layer")


def disagreement(rank):
    """Ranks whose own masks differ take those of rank 0; converted each by itself they are told."""
    model = network(rank)
    masks = sk.prune(model, 0.7, criterion="random")
    check_masks_agree(convert(model, masks if rank == 0 else None, impl="csr"))
    try:
        check_masks_agree(sk.convert(model, masks, impl="csr"))
    except ValueError as error:
        assert str(error) == "Expected the masks of rank 0 on every rank, got others on [1]"
    else:
        raise AssertionError("different masks went unnoticed")


def main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    for fmt in ("csr", "dense"):
        ddp(rank, fmt)
        fsdp(rank, fmt, folder)
    disagreement(rank)
    model = nn.parallel.DistributedDataParallel(convert(network(), sk.prune(network(), 0.9)))  # formats by the clock
    train(model, torch.optim.SGD(model.parameters(), 0.1), rank)
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        print("all passed")


if __name__ == "__main__":
    torch.set_num_threads(1)
    mp.spawn(main, (sys.argv[1],), RANKS)
