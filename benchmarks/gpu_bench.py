"""The measuring half of ``gpu.py``: builds a case, checks it against float64, times it beside its rivals."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import limits
import torch
import torch.nn.functional as F
from gpu_cases import LAYERS, Case, Layer
from gpu_rows import Spread, failed, product, row
from gpu_work import Run, Setup, error_of, mask_of, runner
from torch import Tensor, nn

from sparsekit import SparseConv2d, SparseLinear
from sparsekit import format as formats
from sparsekit.bench.gpu import sets_needed, tuned_bsr, two_of_four
from sparsekit.clock import Events, Wall, race, rotating
from sparsekit.kernels import tuning

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
TOLERANCE = {"bfloat16": 4e-3, "float16": 1e-3, "tf32": 2e-3, "float32": 1e-5}  # of ‖y - ref‖ / ‖ref‖
_SECONDS = 0.25  # of timing for each thunk
_SETUP_SECONDS = 75  # that a rival may take to set up, and a row in all
_LAST = {"memory_format": torch.channels_last}


def measure(thunks: Mapping[str, Run], sets: int, clock: Wall | Events, seconds: float | None = None) -> dict:
    """Each thunk's :class:`Spread`, in turn, every call on the next input set; a thunk that raises has its reason."""
    found: dict[str, Spread | str] = {}
    live: dict[str, Callable[[], object]] = {}
    for name, run in thunks.items():
        try:
            for i in range(sets):
                run(i)
            live[name] = rotating([partial(run, i) for i in range(sets)])
        except Exception as error:
            if "CUDA error" in str(error):
                raise
            found[name] = _words(error)
    if live:
        samples = race(live, _SECONDS if seconds is None else seconds, least=9, most=100, slow=1.0, clock=clock)
        found |= {name: Spread.of(*zip(*pairs, strict=True)) for name, pairs in samples.items()}
    return found


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer (Python code only: a hung kernel is the supervisor's business)."""

    def stop(signum, frame):
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Bench:
    """Runs cases on ``device``; ``card`` is what its ceilings measured, set by the caller as they become known."""

    card: limits.Card | None = None
    formats = formats.names()

    def __init__(self, device: torch.device, tiny: bool = False, compiled: bool = True) -> None:
        self.device, self.tiny = device, tiny
        self.cuda = device.type == "cuda"
        self.compiled = compiled and self.cuda
        self.clock = Events() if self.cuda else Wall()
        self.facts = facts(device)
        self.l2 = torch.cuda.get_device_properties(device).L2_cache_size if self.cuda else 1 << 16
        self._dense: dict[tuple, tuple] = {}
        if self.cuda:
            torch.backends.cudnn.benchmark = True  # the dense rival takes its fastest algorithm

    def rows(self, case: Case) -> Iterator[dict]:
        """The rows of a case; what fails is a row with its reason."""
        runs = {"ceilings": self._ceiling, "layers": self._layer, "experiments": self._experiment}
        try:
            with _flags(case.dtype):
                yield from runs[case.suite](case)
        except Exception as error:
            yield failed(case, "all", _words(error), self.facts)
        finally:
            if self.cuda:
                with contextlib.suppress(RuntimeError):  # a context that an error has broken
                    torch.cuda.empty_cache()

    # Ceilings

    def _ceiling(self, case: Case) -> Iterator[dict]:
        kind, _, which = case.what.partition("-")
        dtype = which if kind == "gemm" else "bfloat16"
        with _flags(dtype), time_limit(_SETUP_SECONDS):
            run, amount, sets, shape = getattr(self, "_" + {"l2": f"l2_{which}"}.get(kind, kind))(which)
            spread = measure({"it": run}, sets, self.clock)["it"]
        if isinstance(spread, str):
            raise RuntimeError(spread)
        yield row(case, case.what, self.facts, spread, shape=shape, rate=amount / spread.p50 * 1e6)

    def _copy(self, _: str) -> tuple[Run, float, int, tuple]:
        size = 1 << (16 if self.tiny else 30)
        x, y = torch.randn(2, size // 2, device=self.device).bfloat16().unbind()
        return lambda i: y.copy_(x), 2 * x.numel() * 2, 1, tuple(x.shape)

    def _l2_copy(self, _: str) -> tuple[Run, float, int, tuple]:
        x, y = torch.randn(2, 1 << (12 if self.tiny else 22), device=self.device).bfloat16().unbind()
        times = 20

        def run(i):
            for _ in range(times):
                y.copy_(x)

        return run, times * 2 * x.numel() * 2, 1, tuple(x.shape)

    def _l2_read(self, _: str) -> tuple[Run, float, int, tuple]:
        if not self.cuda:
            raise RuntimeError("Expected a CUDA device for the L2 reader, got none")
        from l2 import reader

        programs = 2 * torch.cuda.get_device_properties(self.device).multi_processor_count
        run, amount = reader(self.device, programs)
        return lambda i: run(), amount, 1, (programs,)

    def _gemm(self, dtype: str) -> tuple[Run, float, int, tuple]:
        m, n, k = (64, 32, 32) if self.tiny else (16384, 4096, 4096)
        xs = [torch.randn(m, k, device=self.device).to(DTYPES[dtype]) for _ in range(2)]
        w = torch.randn(n, k, device=self.device).to(DTYPES[dtype])
        return lambda i: F.linear(xs[i], w), 2 * m * n * k, 2, (m, n, k)

    def _conv(self, channels: str) -> tuple[Run, float, int, tuple]:
        layer = LAYERS["conv-256-28" if channels == "256" else "conv-512-14"]
        layer = layer.tiny() if self.tiny else layer
        conv = nn.Conv2d(layer.inputs, layer.out, 3, padding=1, device=self.device).bfloat16().to(**_LAST)
        xs = [torch.randn(layer.input, device=self.device).bfloat16().contiguous(**_LAST) for _ in range(4)]

        def run(i):
            with torch.no_grad():
                return conv(xs[i])

        return run, 2 * layer.positions * layer.out * layer.inputs * 9, 4, layer.input

    # Layers

    def setup(self, case: Case) -> Setup:
        """Build a case's modules and inputs."""
        layer = LAYERS[case.layer].tiny() if self.tiny else LAYERS[case.layer]
        dense, weight = self._rival(case, layer)[:2]
        mask = mask_of(case, weight.shape, self.device)
        if self.cuda:
            reason = formats.get(case.format).absent(self.device, mask)
            if not reason and case.format == "bsr" and not _on_cuda("bsr_linear"):
                reason = "the Triton kernels are not registered"
            if reason:
                raise RuntimeError(f"Expected a kernel of {case.format!r} on {self.device.type}, got none: {reason}")
        with torch.no_grad():
            dense.weight.copy_(weight * mask)
        kind = SparseLinear if layer.kind == "linear" else SparseConv2d
        sparse = kind.from_dense(dense, mask, case.format)
        generator = torch.Generator(self.device).manual_seed(2)

        def fresh(shape):
            t = torch.randn(shape, generator=generator, device=self.device).to(DTYPES[case.dtype])
            return t.contiguous(**_LAST) if t.dim() == 4 else t

        out = (layer.batch, layer.out, *layer.input[2:])
        size = sum(torch.Size(shape).numel() for shape in (layer.input, out)) * dense.weight.element_size()
        count = sets_needed(size, self.l2)
        return Setup(
            layer, dense, sparse, mask, [fresh(layer.input) for _ in range(count)], [fresh(out) for _ in range(count)]
        )

    def _rival(self, case: Case, layer: Layer) -> tuple:
        """The dense layer, its unpruned weight, and the compiled layer once a case asked for it."""
        key = (case.layer, case.dtype)
        if key not in self._dense:
            torch.manual_seed(0)
            if layer.kind == "linear":
                dense = nn.Linear(layer.inputs, layer.out)
            else:
                dense = nn.Conv2d(layer.inputs, layer.out, 3, padding=1).to(**_LAST)
            dense = dense.to(self.device, DTYPES[case.dtype])
            self._dense[key] = dense, dense.weight.detach().clone(), None
        dense, weight, compiled = self._dense[key]
        if compiled is None and self.compiled and "compiled" in case.rivals:
            compiled = torch.compile(dense, mode="max-autotune-no-cudagraphs", dynamic=False)
            self._dense[key] = dense, weight, compiled
        return self._dense[key]

    def _layer(self, case: Case) -> Iterator[dict]:
        with time_limit(_SETUP_SECONDS):
            setup = self.setup(case)
        for work in case.works:
            try:
                yield self._timed(case, work, setup)
            except Exception as error:
                yield failed(case, work, _words(error), self.facts)
                if "CUDA error" in str(error):
                    return

    def _timed(self, case: Case, work: str, setup: Setup) -> dict:
        with time_limit(_SETUP_SECONDS):
            with watched_tuning() as configs:
                ours = runner(setup.sparse, setup.xs, setup.dys, work)
                ours(0)
            error = error_of(work, ours, setup)
        if not error < TOLERANCE[case.dtype]:
            raise AssertionError(f"Expected float64 within {TOLERANCE[case.dtype]:g}, got {error:.1e}; not timed")
        thunks = {"ours": ours, "dense": runner(setup.dense, setup.xs, setup.dys, work)}
        reasons: dict[str, str] = {}
        for name, build in self._rivals(case, work, setup).items():
            try:
                with time_limit(_SETUP_SECONDS), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch announces that its sparse layouts are in beta
                    run = build()
                    run(0)
                thunks[name] = run
            except Exception as problem:
                if "CUDA error" in str(problem):
                    raise
                reasons[name] = _words(problem)
        few = setup.layer.positions < 256  # then the weight is what must come from memory, and it is not rotated
        times = measure(thunks, len(setup.xs), Events(flush=True) if few and self.cuda else self.clock)
        spread = times.pop("ours")
        if isinstance(spread, str):
            raise RuntimeError(spread)
        rivals = reasons | {name: t if isinstance(t, str) else t.p50 for name, t in times.items()}
        return row(
            case, work, self.facts, spread, rivals=rivals, of=product(case, setup.layer, work), card=self.card,
            error=error, config=configs, shape=(*setup.layer.input, setup.layer.out),
        )  # fmt: skip

    def _rivals(self, case: Case, work: str, setup: Setup) -> dict[str, Callable[[], Run]]:
        found: dict[str, Callable[[], Run]] = {}
        compiled = self._rival(case, setup.layer)[2]
        if compiled is not None and work in ("forward", "step"):
            found["dense compiled"] = lambda: runner(compiled, setup.xs, setup.dys, work)
        if work == "forward":
            weight, bias = setup.dense.weight.detach(), setup.dense.bias.detach()
            if "2:4" in case.rivals:
                found["2:4"] = lambda: _of_sets(two_of_four(weight, bias), setup)
            if "torch bsr" in case.rivals:
                found["torch bsr"] = lambda: _of_sets(
                    tuned_bsr(weight.to_sparse_bsr(case.block), bias, setup.xs[0]), setup
                )
        return found

    # Experiments

    def _experiment(self, case: Case) -> Iterator[dict]:
        import gpu_experiments

        yield from gpu_experiments.rows(self, case)


@contextlib.contextmanager
def watched_tuning() -> Iterator[dict[str, dict]]:
    """Tuning on; what each kernel chose is in the dict."""
    choose, chosen = tuning.choose, {}

    def watched(kernel, *arguments, **more):
        chosen[kernel] = choose(kernel, *arguments, **more)
        return chosen[kernel]

    tuning.choose = watched
    try:
        with tuning.on():
            yield chosen
    finally:
        tuning.choose = choose


def _of_sets(product: Callable[[Tensor], object], setup: Setup) -> Run:
    return lambda i: product(setup.xs[i])


def facts(device: torch.device) -> dict:
    """What every row carries: the device and the versions."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None

    def said(*command: str) -> str | None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit, changed = (said("git", "-C", str(ROOT), *w) for w in (["rev-parse", "--short", "HEAD"], ["status", "-s"]))
    driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "driver": driver.splitlines()[0] if driver else None,
        "torch": torch.__version__,
        "triton": version,
        "commit": os.environ.get("SPARSEKIT_COMMIT") or commit,
        "dirty": bool(changed) if changed is not None else None,
    }


@contextlib.contextmanager
def _flags(dtype: str) -> Iterator[None]:
    """fp32 products in tf32 for cuBLAS, cuDNN and our kernels alike, or in none of them."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = dtype == "tf32"
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def _on_cuda(op: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"sparsekit::{op}", "CUDA")


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
