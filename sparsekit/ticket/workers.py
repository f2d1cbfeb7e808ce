"""Independent trainings side by side: forked processes, whose results come back as plain values and tensors."""

from __future__ import annotations

import json
import multiprocessing
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import wait
from typing import Any

import safetensors.torch
import torch

from .rewind import decode, encode

__all__ = ["each"]


def each(function: Callable[[Any], Any], items: Iterable[Any], workers: int = 1) -> list[Any]:
    """``[function(item) for item in items]``, in order, with up to ``workers`` processes at a time.

    ``workers=1`` runs here. More need fork (Linux) and models on the CPU; each process computes with one
    thread, and what a function changes but does not return is lost with it. Results may hold dicts, lists,
    tuples, numbers, text and tensors.

    Raises: ValueError where processes cannot be had; RuntimeError with the traceback of one that failed.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"Expected workers as a whole number of at least 1, got {workers!r}")
    items = list(items)
    if workers == 1 or len(items) < 2:
        return [function(item) for item in items]
    if "fork" not in multiprocessing.get_all_start_methods():
        raise ValueError(f"Expected workers=1 on a system that cannot fork, got {workers}")
    if torch.cuda.is_initialized():
        raise ValueError(f"Expected workers=1 in a process that uses CUDA, which no fork survives, got {workers}")
    context = multiprocessing.get_context("fork")
    waiting, running, results = list(enumerate(items)), {}, {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                number, item = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_run, args=(function, item, sender))
                process.start()
                sender.close()
                running[receiver] = number, process
            for receiver in wait(list(running)):
                number, process = running.pop(receiver)
                results[number] = _receive(receiver, process)
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()
    return [results[number] for number in range(len(items))]


def _run(function: Callable[[Any], Any], item: Any, sender: Any) -> None:
    torch.set_num_threads(1)  # OpenMP's threads did not come along
    try:
        tensors: dict[str, torch.Tensor] = {}
        value = json.dumps({"value": encode(function(item), tensors)})
        content = safetensors.torch.save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})
    except BaseException:
        value, content = json.dumps({"error": traceback.format_exc()}), b""
    sender.send_bytes(value.encode())
    sender.send_bytes(content)
    sender.close()


def _receive(receiver: Any, process: Any) -> Any:
    try:
        answer = json.loads(receiver.recv_bytes())
        content = receiver.recv_bytes()
    except EOFError:
        process.join()
        raise RuntimeError(f"Expected a result from each process, got exit code {process.exitcode}") from None
    process.join()
    if "error" in answer:
        raise RuntimeError(f"Expected each process to finish, got\n{answer['error']}")
    return decode(answer["value"], safetensors.torch.load(content))
