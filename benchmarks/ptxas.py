"""What NVIDIA's assembler says of the programs of path "triton", which needs no GPU (docs/gpu.md has the table).

    python benchmarks/ptxas.py [--cases plain-64 matrix] [--json runs/ptxas.json]

Programs are those that `miras bench` with the arguments of a case would launch on an H100 or H200, compiled by the
installed Triton. Per kernel: the steps of a block; the shared memory of an instance, of which there are at most 232,448
bytes; registers a thread; loads and stores of what these could not hold; instructions, of which products on tensor cores.
"cycles" are those that a multiprocessor's four schedulers take to issue them all once, a token of one head, both kinds of
block where a window has several: what else slows a kernel down is not seen here.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from miras.bench.case import DTYPES, Case, memory_inputs, named_design
from miras.engine.problem import build_problem
from miras.kernels.block import Block
from miras.kernels.scan import block_of
from miras.kernels.triton import (
    Program,
    TritonPrograms,
    backward_program,
    forward_program,
    kernel_of,
    operands_of,
    options,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

SHARED = 232_448
"""Bytes of shared memory that a kernel can have on an H100 or H200."""

PLAIN = "titans_lmm learning.kind=GradientDescent"

CASES: dict[str, str] = {
    "plain-64": f"{PLAIN} refresh=64",
    "plain-16": f"{PLAIN} refresh=16",
    "plain-1": f"{PLAIN} refresh=1",
    "momentum": "titans_lmm refresh=64",
    "yaad": "yaad refresh=64",
    "moneta": "moneta refresh=64",
    "memora": "memora refresh=64",
    "matrix": f"{PLAIN} memory.kind=Matrix refresh=64",
    "wide": f"{PLAIN} refresh=16 --head-dim 128",
    "float32": f"{PLAIN} refresh=16 --dtype float32",
}
"""Designs with overrides, at sizes of 64 in bfloat16 unless they say otherwise."""


@dataclass(frozen=True)
class Row:
    """One kernel of a case."""

    case: str
    kernel: str
    block: int
    warps: int
    seconds: float
    shared: int
    registers: int
    spilled: int
    instructions: int
    products: int

    @property
    def cycles(self) -> float:
        return self.instructions * self.warps / 4 / self.block


def block_for(arguments: str) -> tuple[Block, str]:
    """The blocks and the operands of a case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    found = parser.parse_intermixed_args(shlex.split(arguments))
    design = named_design(found.model, found.overrides)
    case = Case(found.model, design, batch=1, tokens=design.refresh, heads=1, head_dim=found.head_dim, dtype=found.dtype)
    problem = build_problem(**memory_inputs(case))
    operands = operands_of(DTYPES[found.dtype])
    length = TritonPrograms(operands).block_length(problem)
    return block_of(problem, length, apart=length < design.refresh), operands


def compiled(program: Program, block: Block) -> Any:
    """Triton's result for compute capability 9.0."""
    kernel = kernel_of(program)
    types, constants, facts = dict[str, str](), dict[tuple[int, ...], Any](), dict[tuple[int, ...], Any]()
    for place, name in enumerate(kernel.arg_names):
        if name.isupper():
            types[name], constants[(place,)] = "constexpr", {"HEADS": 16, "READ": True}[name]
        elif name.endswith("_ptr"):
            types[name], facts[(place,)] = "*fp32", [["tt.divisibility", 16]]
        else:
            types[name] = "i32"
    source = ASTSource(kernel, types, constants, facts)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options(block))


def measured(case: str) -> list[Row]:
    """The kernels of a case, forward and backward."""
    block, operands = block_for(CASES[case])
    needed = (True,) * (len(block.sequences) + len(block.shared))
    programs = {"forward": forward_program(block, operands), "backward": backward_program(block, operands, needed)}
    rows: list[Row] = []
    for name, program in programs.items():
        began = time.perf_counter()
        found = compiled(program, block)
        seconds = time.perf_counter() - began
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(found.asm["cubin"])
            file.flush()
            used = _said(TOOLS / "cuobjdump", "--dump-resource-usage", file.name)
            text = _said(TOOLS / "nvdisasm", "-c", file.name)
        registers = int(re.findall(r"REG:(\d+)", used)[-1])
        counts = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", text, re.MULTILINE))
        spilled, products = (sum(counts[x] for x in names) for names in (("LDL", "STL"), ("HGMMA", "HMMA")))
        numbers = (found.metadata.shared, registers, spilled, counts.total(), products)
        rows.append(Row(case, name, block.length, found.metadata.num_warps, round(seconds, 1), *numbers))
    return rows


def _said(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def table(rows: list[Row]) -> str:
    """In Markdown."""
    names = ("case", "kernel", "block", "warps", "shared memory", "registers", "spilled", "instructions", "products")
    lines = ["| " + " | ".join([*names, "cycles a token", "s to compile"]) + " |", "|---" * (len(names) + 2) + "|"]
    for x in rows:
        numbers = (x.shared, x.registers, x.spilled, x.instructions, x.products, x.cycles)
        cells = [x.case, x.kernel, str(x.block), str(x.warps), *(f"{n:,.0f}" for n in numbers), f"{x.seconds:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[Row] = []
    for case in arguments.cases:
        rows += measured(case)
        print(table(rows[-2:]), flush=True)
    print(f"\nTriton {triton.__version__}\n\n{table(rows)}")
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    for x in rows:
        if x.shared > SHARED:
            print(f"{x.case}, {x.kernel}: {x.shared:,} bytes of shared memory; an SM has {SHARED:,}")


if __name__ == "__main__":
    main()
