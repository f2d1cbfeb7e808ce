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

__all__ = ["LAUNCHERS", "each"]


LAUNCHERS = ("local", "ray")


def each(function: Callable[[Any], Any], items: Iterable[Any], workers: int = 1, launcher: str = "local") -> list[Any]:
    """``[function(item) for item in items]``, in order, with up to ``workers`` processes at a time.

    ``workers=1`` runs here. More need fork (Linux) and models on the CPU; each process computes with one
    thread, and what a function changes but does not return is lost with it. Results may hold dicts, lists,
    tuples, numbers, text and tensors. With ``launcher="ray"`` each item is a task of one processor on the Ray
    cluster that RAY_ADDRESS names, or on this machine; Ray starts a task whose process died again.

    Where one process fails the others finish first. Raises: ValueError where processes cannot be had; RuntimeError with
    the traceback of the first that failed; ImportError without Ray.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"Expected workers as a whole number of at least 1, got {workers!r}")
    if launcher not in LAUNCHERS:
        raise ValueError(f"Expected a launcher of {', '.join(LAUNCHERS)}, got {launcher!r}")
    if launcher == "ray" and workers != 1:
        raise ValueError(f"Expected workers=1 with launcher='ray', whose cluster decides how many run, got {workers}")
    items = list(items)
    if launcher == "ray":
        answers = _on_ray(function, items)
    elif workers == 1 or len(items) < 2:
        return [function(item) for item in items]
    else:
        answers = _forked(function, items, workers)
    for answer in answers:
        if "error" in answer[0]:
            failed = sum("error" in other for other, _ in answers)
            count = f" ({failed} of {len(answers)} did not)" if failed > 1 else ""
            raise RuntimeError(f"Expected each process to finish{count}, got\n{answer[0]['error']}")
    return [decode(answer["value"], safetensors.torch.load(content)) for answer, content in answers]


Answer = tuple[dict[str, Any], bytes]  # {"value": …} or {"error": …}, and the value's tensors


def _forked(function: Callable[[Any], Any], items: list[Any], workers: int) -> list[Answer]:
    if "fork" not in multiprocessing.get_all_start_methods():
        raise ValueError(f"Expected workers=1 on a system that cannot fork, got {workers}")
    if torch.cuda.is_initialized():
        raise ValueError(f"Expected workers=1 in a process that uses CUDA, which no fork survives, got {workers}")
    context = multiprocessing.get_context("fork")
    waiting, running, answers = list(enumerate(items)), {}, {}
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
                answers[number] = _receive(receiver, process)
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()
    return [answers[number] for number in range(len(items))]


def _on_ray(function: Callable[[Any], Any], items: list[Any]) -> list[Answer]:
    try:
        import ray
    except ImportError:
        raise ImportError("Expected ray for launcher='ray', got none; pip install ray") from None
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        task = ray.remote(num_cpus=1, max_retries=3)(_answer)
        return [_fetch(ray, future) for future in [task.remote(function, item) for item in items]]
    finally:
        if started:
            ray.shutdown()


def _fetch(ray: Any, future: Any) -> Answer:
    try:
        text, content = ray.get(future)
    except ray.exceptions.RayError as error:
        return {"error": str(error)}, b""
    return json.loads(text), content


def _answer(function: Callable[[Any], Any], item: Any) -> tuple[str, bytes]:
    """What the function gives, as text and bytes that any process can read; or its traceback."""
    torch.set_num_threads(1)  # of a forked process OpenMP's threads did not come along
    try:
        tensors: dict[str, torch.Tensor] = {}
        value = json.dumps({"value": encode(function(item), tensors)})
        own = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        return value, safetensors.torch.save(own)
    except BaseException:
        return json.dumps({"error": traceback.format_exc()}), b""


def _run(function: Callable[[Any], Any], item: Any, sender: Any) -> None:
    value, content = _answer(function, item)
    sender.send_bytes(value.encode())
    sender.send_bytes(content)
    sender.close()


def _receive(receiver: Any, process: Any) -> Answer:
    try:
        answer = json.loads(receiver.recv_bytes())
        content = receiver.recv_bytes()
    except EOFError:
        process.join()
        return {"error": f"exit code {process.exitcode}"}, b""
    process.join()
    return answer, content
