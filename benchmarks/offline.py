"""Every shipped GPU kernel, compiled and read without a GPU: registers, spills, shared memory, the main loop.

    python benchmarks/offline.py                       # writes benchmarks/results/offline/triton.md, .json, cuda.md
    python benchmarks/offline.py --arch 90 --filter 64x64 --cases FILE

A kernel module offers its configurations through ``offline_cases()``, which yields dicts ``name, kernel``
(a jitted function), ``signature`` (argument -> Triton type), ``constexprs, num_warps, num_stages, arch``
(80 or 90) and ``divisible`` (names of arguments that are multiples of 16); ``--cases FILE`` reads them from
a file instead. The exit status is 1 where a kernel breaks a rule of :mod:`sass`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import limits
import sass

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks/results/offline"
_HEAD = (
    ("kernel", "name"), ("sm", "arch"), ("warps", "num_warps"), ("stages", "num_stages"), ("R", "registers"),
    ("stack", "stack"), ("KiB", "shared"), ("CTA/SM", "ctas"), ("loop", "loop"), ("HGMMA", "hgmma"),
    ("HMMA", "hmma"), ("16 B", "copies16"), ("narrow", "copies_narrow"), ("LDG", "ldg"), ("index", "index_loads"),
    ("waits", "waits"), ("products", "products"), ("buffers", "buffers"), ("model", "model"),
    ("violations", "violations"),
)  # fmt: skip
_LEGEND = """
`loop`: instructions of the main loop, and in it `HGMMA`, `HMMA`, `16 B` and `narrow` asynchronous copies, `LDG` (plain
loads) against `index` (integers that a thread loads in an iteration), warpgroup `waits` against `products`. `buffers`:
depth of the operand ring. `CTA/SM` by registers, shared memory and threads. `model` is **a model, not a measurement**:
time relative to dense at 50/25/10/5 % of blocks left, from L2 traffic, dense rate and memory bandwidth
(benchmarks/limits.py), of 16384 tokens by 4096 x 4096 or a 3x3 convolution of 256 channels on 64 images of 28 x 28.
None of this was run on a GPU."""


def shipped() -> Iterator[dict]:
    """The cases of every kernel module that offers some."""
    sys.path.insert(0, str(ROOT))
    for path in sorted((ROOT / "kernels").glob("*/*.py")):
        if "def offline_cases(" in path.read_text():
            yield from importlib.import_module(f"sparsekit.kernels.{path.parent.name}.{path.stem}").offline_cases()


def cases_of(file: Path) -> Iterator[dict]:
    """The cases of a file."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    yield from module.offline_cases()


def compile_case(case: dict):
    """What ``triton.compile`` makes of a case."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = case["kernel"]
    kernel = getattr(kernel, "fn", kernel) if not hasattr(kernel, "arg_names") else kernel  # autotuned
    names, constants = kernel.arg_names, dict(case["constexprs"])
    signature = {name: "constexpr" if name in constants else case["signature"][name] for name in names}
    divisible = {names[d] if isinstance(d, int) else d for d in case.get("divisible", ())}
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in divisible - constants.keys()}
    source = triton.compiler.ASTSource(kernel, signature, constants, attrs)
    options = {"num_warps": case["num_warps"], "num_stages": case.get("num_stages", 3)}
    return triton.compile(source, target=GPUTarget("cuda", case["arch"], 32), options=options)


def row_of(case: dict) -> dict:
    """Compile and judge one case; what does not compile is a violation."""
    row = {key: case[key] for key in ("name", "arch", "num_warps")} | {"num_stages": case.get("num_stages", 3)}
    try:
        kernel = compile_case(case)
        code = sass.read(kernel.asm["cubin"])[kernel.metadata.name]
        intent = sass.Intent.of(kernel.asm["ttir"], kernel.asm["ttgir"], 32 * case["num_warps"])
        row |= sass.report(code, case["arch"], case["num_warps"], kernel.metadata.shared, intent)
        row["model"] = modelled(case, intent)
    except Exception as error:  # one broken kernel must not hide the others
        reason = str(error).strip().splitlines() or [type(error).__name__]
        row["violations"] = [f"does not compile: {reason[0][:200]}"]
    return row


def modelled(case: dict, intent: sass.Intent) -> list[float] | None:
    """Modelled time over dense time at 50/25/10/5 %, for kernels whose name tells work and block."""
    named = re.search(r"(\d+)x(\d+)", case["name"])
    work = next((w for w, words in _WORK.items() if re.search(words, case["name"], re.IGNORECASE)), None)
    if not (named and work and intent.tensor_cores()) or " few" in case["name"]:
        return None
    block, card = (int(named[1]), int(named[2])), limits.CARDS[case["arch"]]
    m, n, _, kind, _ = intent.dots[0]
    across = block[1] if work == "dx" else block[0]
    tile = max(1, m * n // across)  # the accumulator spans one block and this many tokens (dW: inputs)
    itemsize, dtype = (4, "tf32") if kind == "f32" else (2, "bfloat16")
    shape, taps = ((50176, 256, 9 * 256), 9) if "conv" in case["name"] else ((16384, 4096, 4096), 1)
    dense = limits.Product(work, *shape, 1.0, itemsize, taps)
    least = limits.limit(dense, card, dtype)
    products = [dense._replace(density=density) for density in (0.5, 0.25, 0.1, 0.05)]
    return [round(limits.model(product, block, tile, card, dtype) / least, 2) for product in products]


_SYSTEM = 1024  # bytes of shared memory that sm_90 counts with every kernel
_WORK = {"dw": r"sddmm|dw", "dx": r"_t\b|_t[-_ ]|dx", "forward": "linear|conv|forward|fwd"}


def table(rows: Iterable[dict]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(head for head, _ in _HEAD) + " |", "|---" * len(_HEAD) + "|"]
    for row in rows:
        cells = []
        for _, key in _HEAD:
            value = row.get(key)
            if key == "violations":
                cells.append("; ".join([*(f"**{text}**" for text in value), *row.get("notes", [])]) or "none")
            elif key == "shared" and value is not None:
                cells.append(f"{value / 1024:.0f}")
            elif key == "model":
                cells.append(" ".join(f"{ratio:.2f}".lstrip("0") for ratio in value) if value else "")
            else:
                cells.append("" if value is None else str(value))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def environment() -> dict:
    """Versions and commit that the table belongs to."""
    import triton

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = [line[3:] for line in git("status", "--porcelain", "kernels", "csrc/cuda").splitlines()]
    return {
        "triton": triton.__version__, "ptxas": sass.ptxas_version(), "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(changed),
    }  # fmt: skip


def cuda_rows(sources: Iterable[Path], archs: Iterable[int]) -> Iterator[dict]:
    """Every kernel of the CUDA sources, compiled by nvcc and read from its cubin."""
    nvcc = _nvcc()
    for source in sources:
        for arch in archs:
            name, code = source.relative_to(ROOT).as_posix(), f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder) / "kernels.cubin"
                command = [nvcc, "-std=c++20", "-O3", "-cubin", f"-arch={code}", f"-I{ROOT / 'csrc'}", source]
                done = subprocess.run([*command, "-o", cubin], capture_output=True, text=True, check=False)
                if done.returncode:
                    last = (done.stderr.strip().splitlines() or ["no message"])[0]
                    yield {"file": name, "arch": arch, "name": "", "violations": [f"does not compile: {last}"]}
                    continue
                kernels = sass.read(cubin.read_bytes())
            names = _demangled(kernels)
            for mangled, kernel in kernels.items():
                spills = kernel.count("STL|LDL")
                loop = kernel.loop() or range(0)
                wrong = [f"{kernel.stack} bytes of stack, {spills} spill instructions"]
                yield {
                    "file": name, "arch": arch, "name": names[mangled], "registers": kernel.registers,
                    "stack": kernel.stack, "shared": kernel.shared - _SYSTEM * (arch >= 90), "loop": len(loop),
                    "hgmma": kernel.count("HGMMA", loop), "hmma": kernel.count("HMMA", loop),
                    "violations": wrong if kernel.stack or spills else [],
                }  # fmt: skip


def _nvcc() -> str:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise SystemExit("Expected nvcc on the PATH for csrc/cuda, got none: install CUDA or pass --no-cuda")
    return nvcc


def _demangled(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    if not shutil.which("c++filt"):
        return {name: name for name in names}
    out = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    short = [re.sub(r"\(anonymous namespace\)::|sparsekit::cuda::|^void ", "", text) for text in out]
    return dict(zip(names, (re.sub(r"\([^()]*\)$", "", text) for text in short), strict=True))


def cuda_table(rows: Iterable[dict]) -> str:
    """Markdown."""
    keys = ("file", "name", "arch", "registers", "stack", "shared", "loop", "hgmma", "hmma")
    head = ("file", "kernel", "sm", "R", "stack", "static bytes", "loop", "HGMMA", "HMMA", "violations")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [f"`{row[key]}`" if key == "name" else str(row.get(key, "")) for key in keys]
        lines.append("| " + " | ".join([*cells, "; ".join(f"**{t}**" for t in row["violations"]) or "none"]) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="80,90", help="80, 90 or both (default)")
    parser.add_argument("--filter", default="", help="only cases whose name has this regular expression")
    parser.add_argument("--cases", type=Path, help="a Python file that defines offline_cases()")
    parser.add_argument("--no-cuda", action="store_true", help="leave out csrc/cuda")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the tables")
    args = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("Expected TRITON_INTERPRET to be unset (kernels are compiled here), got it set")
    archs = [int(arch) for arch in args.arch.split(",")]
    if not set(archs) <= {80, 90}:
        parser.error(f"Expected --arch 80, 90 or 80,90, got {args.arch}")
    facts = environment()
    head = f"Triton {facts['triton']}, ptxas {facts['ptxas']}, commit {facts['commit']}" + " (changed)" * facts["dirty"]
    args.out.mkdir(parents=True, exist_ok=True)

    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for case in shipped() if args.cases is None else cases_of(args.cases):
            if case["arch"] in archs and re.search(args.filter, case["name"]):
                rows.append(row_of(case))
                print(".", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    print(table(rows))
    listed = ",\n".join(json.dumps(row) for row in rows)  # a line for each, so that a change is one
    (args.out / "triton.json").write_text(f'{{"environment": {json.dumps(facts)},\n"rows": [\n{listed}\n]}}\n')
    title = "# Triton kernels, compiled offline"
    (args.out / "triton.md").write_text(f"{title}\n\n{head}\n{_LEGEND}\n\n{table(rows)}\n")

    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    if sources and not args.no_cuda and args.cases is None:
        cuda = [row for row in cuda_rows(sources, archs) if re.search(args.filter, row["name"])]
        print(f"\n{cuda_table(cuda)}")
        said = subprocess.run([_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
        note = f"nvcc {re.search(r'V([0-9.]+)', said)[1]}, {head.split(', ')[-1]}; not run on a GPU."
        note += " `loop`: instructions of the innermost loop with products (matrix instructions, else FFMA)."
        (args.out / "cuda.md").write_text(f"# CUDA kernels, compiled offline\n\n{note}\n\n{cuda_table(cuda)}\n")
        rows += cuda
    bad = sum(bool(row["violations"]) for row in rows)
    print(f"\n{head}: {len(rows)} kernels, {bad} with violations")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
