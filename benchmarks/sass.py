"""A small reader of compiled GPU kernels: resources, the main loop, and what is wrong with it.

Works without a GPU, on what ``triton.compile`` returns and on the text of the tools in Triton's wheel. The
main loop is the innermost backward branch around tensor-core instructions (else around FFMA); Triton's own
intermediate text tells what the loop was meant to hold: how many products, which loads.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import limits

_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_LABEL = re.compile(r"(\.L\w*):")
_TARGET = re.compile(r"`\((\.L\w*)\)")
_DOT = re.compile(
    r"tt\.dot .*?(?:inputPrecision = (\w+) )?: tensor<(\d+)x(\d+)x(\w+)[^*]*\* tensor<\d+x(\d+)x", re.ASCII
)
_SIZES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8}


@cache
def tools() -> Path:
    """The folder of ptxas, cuobjdump and nvdisasm in Triton's wheel."""
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin"


def _run(tool: str, *arguments: object) -> str:
    command = [str(tools() / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def ptxas_version() -> str:
    """``12.8.93``."""
    return re.search(r"V([\d.]+)", _run("ptxas", "--version"))[1]


@dataclass
class Code:
    """One kernel's machine code: ``lines`` of (opcode, operands), ``labels`` point into them."""

    registers: int = 0
    stack: int = 0
    shared: int = 0
    lines: list[tuple[str, str]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def count(self, pattern: str, inside: range | None = None) -> int:
        """Instructions whose opcode and operands begin as ``pattern`` does, in a loop or everywhere."""
        lines = self.lines if inside is None else self.lines[inside.start : inside.stop]
        return sum(bool(re.match(pattern, " ".join(line))) for line in lines)

    def loop(self) -> range | None:
        """The innermost loop with the most products, from its label to its backward branch."""
        for product in (r"HGMMA|HMMA|IMMA|DMMA", r"FFMA|HFMA2|DFMA"):
            found: dict[int, int] = {}
            for at, (opcode, operands) in enumerate(self.lines):
                target = _TARGET.search(operands) if opcode.startswith("BRA") else None
                start = self.labels.get(target[1], at) if target else at
                if start < at and self.count(product, range(start, at + 1)):
                    found[start] = at + 1
            loops = [range(*pair) for pair in found.items()]
            inner = [a for a in loops if not any(a != b and a.start <= b.start and b.stop <= a.stop for b in loops)]
            if inner:
                return max(inner, key=lambda span: (self.count(product, span), len(span)))
        return None


def read(cubin: bytes) -> dict[str, Code]:
    """Every kernel of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, text = _run("cuobjdump", "--dump-resource-usage", file.name), _run("nvdisasm", "-c", file.name)
    kernels = {
        name: Code(int(registers), int(stack), int(shared))
        for name, registers, stack, shared in re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage
        )
    }
    code = Code()
    for line in text.splitlines():
        if line.startswith(".text."):
            code = kernels.get(line[len(".text.") :].rstrip(":"), Code())
        elif match := _LABEL.match(line):
            code.labels[match[1]] = len(code.lines)
        elif match := _INSTRUCTION.match(line):
            code.lines.append((match[1], match[2].strip()))
    return kernels


@dataclass
class Intent:
    """What Triton meant the main loop to be, from its intermediate text before and after its passes."""

    dots: list[tuple[int, int, int, str, str]]  # M, N, K, element type, precision
    indices: int  # integers that a thread loads in an iteration
    waiting: int  # loads of floats that were not made asynchronous
    staged: int  # index loads that go through shared memory
    narrow: int  # asynchronous copies under 16 bytes although the tile has 16 bytes for each thread
    small: int  # the same of tiles that do not
    buffers: int  # of the shallowest operand ring

    @classmethod
    def of(cls, ttir: str, ttgir: str, threads: int) -> Intent:
        """Read both texts; the main loop is the innermost ``scf.for`` around a product."""
        layouts = dict(re.findall(r"^(#\w+) = (#ttg\.\w+<.*>)$", ttgir, re.M))
        before, after = _body(ttir), _body(ttgir)
        dots = [(int(m), int(n), int(k), kind, how or "") for how, m, k, kind, n in _DOT.findall(before)]
        indices = waiting = staged = narrow = small = 0
        load = r"tt\.load .*: (?:tensor<)?([\dx]*)!tt\.ptr<(\w+)>(?:, (.*?)>)? loc"
        for shape, kind, layout in re.findall(load, after):
            if kind.startswith("i"):
                layout = re.sub(r"#\w+(?![\w.])", lambda name: layouts.get(name[0], name[0]), layout)
                indices += _per_thread(shape, layout, threads)
            else:
                waiting += 1
        copy = r"async_copy_global_to_local .*?(?:contiguity = (\d+).*?)?: tensor<([\dx]+)x!tt\.ptr<(\w+)>"
        for contiguity, shape, kind in re.findall(copy, after):
            if kind.startswith("i"):
                staged += 1
            elif int(contiguity or 1) * _SIZES.get(kind, 1) < 16:
                roomy = _numel(shape) * _SIZES.get(kind, 1) // threads >= 16
                narrow, small = narrow + roomy, small + (not roomy)
        rings = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x", ttgir)
        return cls(dots, indices, waiting, staged, narrow, small, min(map(int, rings), default=0))

    def tensor_cores(self) -> bool:
        """Whether every product can run on tensor cores: not fp32 with full precision."""
        return bool(self.dots) and all(kind != "f32" or how.startswith("tf32") for *_, kind, how in self.dots)

    def wgmma(self, warps: int) -> bool:
        """Whether every product fits Hopper's warpgroup instruction."""
        fits = all(m % 64 == 0 and n % 8 == 0 and k * _SIZES[kind] >= 32 for m, n, k, kind, _ in self.dots)
        return self.tensor_cores() and fits and warps % 4 == 0


def _body(text: str) -> str:
    """The innermost ``scf.for`` (or ``scf.while``) with the most products, by indentation; "" without one."""
    lines, best = text.splitlines(), ""
    for start, line in enumerate(lines):
        if re.search(r"scf\.(for|while) ", line):
            indent = len(line) - len(line.lstrip())
            closing = (i for i in range(start + 1, len(lines)) if re.match(rf" {{{indent}}}}}(?! do)", lines[i]))
            body = "\n".join(lines[start + 1 : next(closing, len(lines))])
            products = [len(re.findall(r"(?:tt\.dot|ttng\.warp_group_dot) ", part)) for part in (body, best)]
            nested = re.search(r"scf\.(for|while) [\s\S]*(?:tt\.dot|ttng\.warp_group_dot) ", body)
            if products[0] > products[1] and not nested:
                best = body
    return best


def _numel(shape: str) -> int:
    total = 1
    for extent in re.findall(r"\d+", shape):
        total *= int(extent)
    return total


def _per_thread(shape: str, layout: str, threads: int) -> int:
    """Integers that one thread loads of an index tensor (1 of a scalar), by its blocked layout."""
    extents = [int(extent) for extent in re.findall(r"\d+", shape)]
    if not extents:
        return 1
    fields = [
        [int(n) for n in match.split(",")]
        for name in ("sizePerThread", "threadsPerWarp", "warpsPerCTA")
        for match in re.findall(rf"{name} = \[([\d, ]+)\]", layout)
    ]
    if len(fields) != 3:
        return max(1, -(-_numel(shape) // threads))
    if sliced := re.search(r"slice<\{dim = (\d+)", layout):
        fields = [[n for i, n in enumerate(values) if i != int(sliced[1])] for values in fields]
    total = 1
    for extent, size, lanes, warps in zip(extents, *fields, strict=True):
        total *= size * -(-extent // (size * lanes * warps))
    return total


_KNOWN = "(tf32 takes no transposed operand)"
"""How a violation ends that no kernel in this Triton can avoid; it becomes a note."""


def report(code: Code, arch: int, warps: int, shared: int, intent: Intent) -> dict:
    """One row of the table: the numbers, ``violations`` (an empty list is a good kernel) and ``notes`` in words."""
    loop = code.loop() if intent.dots else None
    inside = loop or range(0)
    fit, stopped_by = limits.ctas(arch, code.registers, shared, warps)
    row = {
        "registers": code.registers,
        "stack": code.stack,
        "shared": shared,
        "ctas": fit,
        "ctas_limited_by": stopped_by,
        "loop": len(inside),
        "hgmma": code.count("HGMMA", inside),
        "hmma": code.count("HMMA", inside),
        "copies16": code.count(r"LDGSTS\S*\.128|UTMALDG|UBLKCP", inside),
        "copies_narrow": code.count(r"LDGSTS(?!\S*\.128)", inside),
        "ldg": code.count("LDG[. ]", inside),
        "index_loads": intent.indices,
        "waits": code.count(r"WARPGROUP\.DEPBAR", inside),
        "products": len(intent.dots),
        "buffers": intent.buffers,
    }
    violations = _violations(row, code, arch, warps, intent, loop)
    known = [text for text in violations if text.endswith(_KNOWN)]
    return row | {"violations": [text for text in violations if text not in known], "notes": known}


def _violations(
    row: dict, code: Code, arch: int, warps: int, intent: Intent, loop: range | None
) -> Sequence[str]:
    found = []
    spills = code.count("STL|LDL")
    if row["stack"] or spills:
        inside = code.count("STL|LDL", loop) if loop else 0
        found.append(f"{row['stack']} bytes of stack, {spills} spill instructions, {inside} of them in the loop")
    if row["shared"] > limits.SHARED_CTA[arch]:
        found.append(f"{row['shared'] / 1024:.0f} KiB of shared memory, over {limits.SHARED_CTA[arch] // 1024}")
    if not row["ctas"]:
        found.append(f"does not fit a multiprocessor: {row['ctas_limited_by']}")
    if not intent.dots:
        return found
    if loop is None:
        return [*found, "no loop around its products"]
    if intent.tensor_cores():
        if arch >= 90 and intent.wgmma(warps) and not row["hgmma"]:
            found.append("no HGMMA although the tile fits wgmma")
        elif not row["hgmma"] + row["hmma"]:
            found.append("no tensor-core instruction")
    if row["waits"] > row["products"]:
        found.append(f"{row['waits']} warpgroup waits for {row['products']} products: wgmma is serialised")
    if intent.waiting:
        found.append(f"{intent.waiting} data loads wait for memory: not asynchronous")
    if row["ldg"] > row["index_loads"]:
        found.append(f"{row['ldg']} LDG for {row['index_loads']} index loads")
    if intent.staged:
        found.append(f"{intent.staged} index loads staged through shared memory: load them an iteration ahead")
    if intent.narrow:
        found.append(f"{intent.narrow} tiles copied by less than 16 bytes")
    elif row["copies_narrow"] and not intent.small + intent.staged:
        tf32 = arch >= 90 and all(how.startswith("tf32") for *_, kind, how in intent.dots if kind == "f32")
        known = f" {_KNOWN}" if tf32 and any(kind == "f32" for *_, kind, _ in intent.dots) else ""
        found.append(f"{row['copies_narrow']} copies of less than 16 bytes{known}")
    return found
