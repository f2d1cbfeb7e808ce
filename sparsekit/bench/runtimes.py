"""Other runtimes, in this process or in one of another environment: they serve an ONNX graph of one layer.

A runtime whose packages do not go with ours joins the same run from its own environment, whose interpreter
``SPARSEKIT_DEEPSPARSE_PYTHON`` names (likewise ``…_OPENVINO_…``, ``…_ONNXRUNTIME_…``). This file is then run there as
a program, so it imports nothing of sparsekit and no torch, and the worker reads its own clock: pipes are not timed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import weakref


def _onnxruntime(model, x, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or its threads take the others' turns
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})[0]


def _openvino(model, x, threads):
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY", "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.7,
    }  # fmt: skip
    core = openvino.Core()
    request = core.compile_model(core.read_model(model=model), "CPU", options).create_infer_request()
    return lambda: request.infer([x])[0]


def _deepsparse(model, x, threads):
    import deepsparse

    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        file.write(model)
        file.flush()
        engine = deepsparse.Engine(file.name, batch_size=x.shape[0], num_cores=threads)
    return lambda: engine.run([x])[0]


ENGINES = {"onnxruntime": _onnxruntime, "openvino": _openvino, "deepsparse": _deepsparse}


def engine(name, model, x, threads):
    """A call that runs the ONNX graph ``model`` (bytes) on ``x`` (float32 array) with so many threads."""
    if name not in ENGINES:
        raise ValueError(f"Expected a runtime of {', '.join(ENGINES)}, got {name!r}")
    return ENGINES[name](model, x, threads)


def python_of(name):
    """The interpreter that the environment variable of a runtime names, or None."""
    return os.environ.get(f"SPARSEKIT_{name.upper()}_PYTHON") or None


def version(name):
    """The version of a runtime, in its own environment where it has one, or None."""
    if (python := python_of(name)) is None:
        return _version(name) if importlib.util.find_spec(name) else None
    try:
        done = subprocess.run([python, "-I", __file__, "version", name], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _version(name):
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def elsewhere(name, model, x, threads):
    """:func:`engine` in the interpreter of :func:`python_of`; its ``timed(count)`` gives the worker's seconds.

    Raises RuntimeError with the worker's own words where it has no such runtime, or dies.
    """
    command = [python_of(name), "-I", __file__, "serve", name, str(threads)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def ask(word, *arrays):
        try:
            _send(worker.stdin, {"do": word, "shapes": [list(a.shape) for a in arrays[1:]]}, *arrays)
            head, parts = _receive(worker.stdout)
        except (OSError, EOFError):
            raise RuntimeError(f"{command[0]}: Expected a worker of {name}, got one that ended") from None
        if "error" in head:
            raise RuntimeError(head["error"])
        return head, parts

    import numpy as np

    def run():
        head, (y,) = ask("run")
        return np.frombuffer(y, np.float32).reshape(head["shape"]).copy()

    run.timed = lambda count: ask(f"time {count}")[0]["seconds"]
    weakref.finalize(run, _end, worker)
    ask("load", np.frombuffer(model, np.uint8), x)
    return run


def _end(worker):
    worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        with contextlib.suppress(OSError):  # bytes that a dead worker will not read
            pipe.close()


def _send(pipe, head, *arrays):
    blobs = [array.tobytes() for array in arrays]
    pipe.write(json.dumps({**head, "sizes": [len(blob) for blob in blobs]}).encode() + b"\n")
    for blob in blobs:
        pipe.write(blob)
    pipe.flush()


def _receive(pipe):
    line = pipe.readline()
    if not line:
        raise EOFError
    head = json.loads(line)
    return head, [pipe.read(size) for size in head["sizes"]]


def _serve(name, threads):
    """The worker: what arrives is loaded, run or timed; whatever a runtime prints goes nowhere."""
    import numpy as np

    pipe_in, pipe_out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    run = None
    while True:
        try:
            head, parts = _receive(pipe_in)
        except EOFError:
            return
        word, _, count = head["do"].partition(" ")
        try:
            if word == "load":
                x = np.frombuffer(parts[1], np.float32).reshape(head["shapes"][0]).copy()
                run = engine(name, parts[0], x, threads)
                _send(pipe_out, {})
            elif word == "run":
                y = np.ascontiguousarray(run(), np.float32)
                _send(pipe_out, {"shape": y.shape}, y)
            else:
                start = time.perf_counter()
                for _ in range(int(count)):
                    run()
                _send(pipe_out, {"seconds": time.perf_counter() - start})
        except Exception as error:
            _send(pipe_out, {"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    if sys.argv[1] == "version":
        print(_version(sys.argv[2]) or "")
    else:
        _serve(sys.argv[2], int(sys.argv[3]))
