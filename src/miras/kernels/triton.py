"""The triton path: the block scan of any memory and bias as one GPU kernel forward and one backward (see `scan`).

Memory grows with the square root of the length, beyond inputs and outputs, since so many states are kept.

A block has 16, 32 or 64 steps where the links allow it and the window is a multiple of it; with refresh 1, links at
every token, or rates and decays per channel it has one, which updates the weights in registers and so is the exact
online learner. Both programs run one instance a sequence and head and carry the slots in registers in float32 from block
to block. States and everything that is no matrix product are in float32, operands in `operands_of` the inputs.

What has been checked is what Triton's interpreter and compiler can check without a GPU: outputs and gradients, and that
the programs compile for one. No speed of it has been measured. The forward kernel carries a head's state in registers:
d = 64 with a hidden layer of 256 takes 128 KiB of an SM's 256, and ptxas spills there (docs/gpu.md has the counts).
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import linecache
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph

from miras.design import Design
from miras.engine.problem import Problem
from miras.kernels.block import Block, identifier, pulled, traced
from miras.kernels.graph import Untraceable
from miras.kernels.scan import generate, one_by_one, unhashable
from miras.kernels.translate import Body, tile

MAX_BLOCK = 64
"""Most gradient steps a block takes."""

MAX_WORK = 2**12
"""Most numbers of a block's tile that is as wide as the memory, where a shorter block has fewer: beyond it a backward
kernel took Triton minutes to compile."""

MIN_BLOCK = 16
"""Fewest, where it takes more than one: with less there is nothing for a matrix product."""

UNMEASURED = "its speed has not been measured on a GPU yet, so it runs only where it is asked for: path='triton'"
"""Why it is not chosen by itself."""

MAX_STATE = 2**17
"""Most numbers of one head's slots: 512 KiB of float32, twice the registers of a streaming multiprocessor."""


REREAD = 2**14
"""Most numbers of a head's weights that the backward kernel keeps in registers.

Larger ones, slots and their gradients stay in memory, from where every use reads them anew: kept, they and the copies that
the tensor cores read would take an SM's registers and shared memory several times over.
"""


def unfit(design: Design, widths: tuple[int, int] | None = None) -> str | None:
    """Why a design has no kernel, for keys and values of some `widths` if they are known; None where it has one."""
    assert design.memory is not None
    if (reason := unhashable(design)) is not None:
        return reason
    if widths is None:
        return None
    shapes = design.memory.weights(*widths)
    sizes = {"keys": widths[0], "values": widths[1]}
    sizes |= {f"{name}'s axis {i}": n for name, x in shapes.items() for i, n in enumerate((x.d_in, x.d_out))}
    odd = [f"{name} of {n}" for name, n in sizes.items() if n & (n - 1)]
    if odd:
        return f"its tiles need widths that are powers of two; {', '.join(odd)}"
    held = design.learning.slots * sum(x.d_in * x.d_out for x in shapes.values())
    if held > MAX_STATE:
        return f"{held} numbers of state a head, which its registers would have to hold; allowed: {MAX_STATE}"
    return None


def unusable(device: torch.device) -> str | None:
    """Why no kernel can be launched on a device; None where one can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'torch-miras[gpu]'"
    if device.type != "cuda" and not interpreted():
        return f"it needs a CUDA device, not {device.type} (or Triton's interpreter: TRITON_INTERPRET=1 before the import)"
    return None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def operands_of(dtype: torch.dtype) -> str:
    """What the matrix products of inputs in a dtype are computed in, a key of `translate.OPERANDS`."""
    if dtype == torch.float32:
        return "float32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    name = str(dtype).removeprefix("torch.")
    return f"{name} rounded" if dtype != torch.float64 and interpreted() else name


@dataclass(frozen=True)
class TritonPrograms:
    """Triton's, with products of `operands`."""

    operands: str
    path = "triton"

    def block_length(self, problem: Problem) -> int:
        if one_by_one(problem, scales=False):
            return 1
        widest = max(max(shape.d_in, shape.d_out) for shape in problem.shapes.values())
        length = math.gcd(problem.design.refresh, max(MIN_BLOCK, min(MAX_BLOCK, MAX_WORK // widest)))
        return length if length >= MIN_BLOCK else 1

    def make(self, block: Block, needed: tuple[bool, ...] | None) -> None:
        if needed is None:
            generate(forward_program, block, self.operands)
        else:
            generate(backward_program, block, self.operands, needed)

    def every(self, block: Block, steps: int) -> int:
        return math.isqrt(steps - 1) + 1

    def forward(self, block: Block, tensors: Sequence[Tensor], rows: int, sizes: dict[str, int]) -> None:
        sizes = {**sizes, "READ": bool(sizes["read"])}
        del sizes["read"]
        self._launch(block, forward_program(block, self.operands), tensors, rows, sizes)

    def backward(
        self, block: Block, needed: tuple[bool, ...], tensors: Sequence[Tensor], rows: int, sizes: dict[str, int]
    ) -> None:
        self._launch(block, backward_program(block, self.operands, needed), tensors, rows, sizes)

    def _launch(self, block: Block, program: Program, tensors: Sequence[Tensor], rows: int, sizes: dict[str, Any]) -> None:
        assert len(tensors) == len(program.tensors)
        sizes = {**sizes, "HEADS": sizes["heads"]}
        del sizes["heads"]
        try:
            _kernel(program.source)[(rows,)](*tensors, **sizes, num_warps=num_warps(block), num_stages=1)
        except Exception as error:
            # OutOfResources and CompilationError, which are Triton's and not importable without it.
            if type(error).__module__.startswith("triton"):
                raise Untraceable(f"{type(error).__name__}: {error}") from error
            raise


def num_warps(block: Block) -> int:
    """Warps of an instance: 255 registers a thread hold about 8,000 numbers a warp."""
    held = sum(math.prod(x) for x in block.state.values())
    return 4 if held <= 2**13 else 8


_numbers = itertools.count()


@functools.lru_cache(maxsize=256)
def _kernel(source: str) -> Any:
    """The kernel of a program; its text is kept where Python's own tools, and Triton, find a function's source."""
    name = f"<miras triton program {next(_numbers)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"__name__": f"miras_triton_program_{next(_numbers)}"}
    exec(compile(source, name, "exec"), namespace)
    return namespace["forward" if "def forward(" in source else "backward"]


class Program(NamedTuple):
    """A Triton program as text, and its tensor arguments in order."""

    source: str
    tensors: tuple[str, ...]


@functools.lru_cache(maxsize=64)
def forward_program(block: Block, operands: str) -> Program:
    """The scan: keeps the state before every `every`th step, and stores outputs where READ."""
    writer = _Writer(block, operands)
    writer.load(0, block.shared, "head", "w_")
    writer.load(0, block.state, "row", "z_", "_first")
    writer.add(0, "for step in range(begin, begin + steps):")
    writer.add(1, "if (step - begin) % every == 0:", "    place = row * kept + (step - begin) // every")
    writer.store(2, block.state, "place", "z_", "_kept")
    writer.add(1, f"time = (row * total + step * {block.length})")
    writer.load(1, block.sequences, "time", "x_", per_step=True)
    names = [f"x_{x}" for x in block.sequences] + [f"w_{x}" for x in block.shared] + [f"z_{x}" for x in block.state]
    writer.bodies(lambda ends: traced(block, ends), names, ["o", *(f"z_{x}" for x in block.state)])
    writer.add(1, "if READ:")
    writer.store(2, {"o": (block.length, block.widths[1])}, "time", per_step=True)
    writer.store(0, block.state, "row", "z_", "_last")
    states = [f"{name}_{kind}" for kind in ("first", "last", "kept") for name in block.state]
    tensors = (*block.sequences, *block.shared, *states, "o")
    return writer.program(
        "forward", tensors, "begin, steps, total, every, kept, phase, HEADS: tl.constexpr, READ: tl.constexpr"
    )


@functools.lru_cache(maxsize=64)
def backward_program(block: Block, operands: str, needed: tuple[bool, ...]) -> Program:
    """The pull-back of steps begin to begin + steps in reverse, given the state before each of them.

    Gradients of the state lie in pairs [..., 2, ...], and the current one is that of `side`: a step reads the one and writes
    the other.
    """
    writer = _Writer(block, operands)
    wanted = dict(zip((*block.sequences, *block.shared), needed, strict=True))
    sequences = {name: x for name, x in block.sequences.items() if wanted[name]}
    shared = {name: x for name, x in block.shared.items() if wanted[name]}
    outputs = {"o": (block.length, block.widths[1])}
    large = sum(math.prod(x) for x in block.shared.values()) > REREAD
    load = writer.remake if large else writer.load
    load(0, block.shared, "head", "w_")
    load(0, shared, "row", "dw_", "_grad")
    if not large:
        writer.load(0, block.state, "(row * 2 + side)", "dz_", "_grad")
    writer.add(0, "for back in range(steps):", "    here = steps - 1 - back", "    step = begin + here")
    writer.add(1, "place = row * steps + here", f"time = (row * total + step * {block.length})")
    load(1, block.state, "place", "z_", "_kept")
    writer.load(1, block.sequences, "time", "x_", per_step=True)
    writer.load(1, outputs, "time", "d", "_grad", per_step=True)
    if large:
        writer.remake(1, block.state, "(row * 2 + (side + back) % 2)", "dz_", "_grad")
        writer.put(shared, "row", "dw_", "_grad")
        writer.put(block.state, "(row * 2 + (side + back + 1) % 2)", "dz_", "_grad")
    writer.put(sequences, "time", "dx_", "_grad", per_step=True)
    names = [f"x_{x}" for x in block.sequences] + [f"w_{x}" for x in block.shared] + [f"z_{x}" for x in block.state]
    names += ["do", *(f"dz_{x}" for x in block.state)]
    found = [f"dx_{x}" for x in sequences] + [f"+dw_{x}" for x in shared] + [f"dz_{x}" for x in block.state]
    writer.bodies(lambda ends: pulled(block, ends, needed), names, found)
    if large:
        # The next step's threads read what others of this one wrote.
        writer.add(1, "tl.debug_barrier()")
    else:
        writer.store(0, shared, "row", "dw_", "_grad")
        writer.store(0, block.state, "(row * 2 + (side + steps) % 2)", "dz_", "_grad")
    grads = [f"{x}_grad" for x, need in zip([*block.sequences, *block.shared], needed, strict=True) if need]
    states = [f"{x}_kept" for x in block.state] + [f"{x}_grad" for x in block.state]
    tensors = (*block.sequences, *block.shared, *states, "o_grad", *grads)
    return writer.program("backward", tensors, "begin, steps, total, phase, side, HEADS: tl.constexpr")


class _Writer:
    """Lines of a program; names of tensors are made identifiers, and a tensor's pointer ends in _ptr."""

    def __init__(self, block: Block, operands: str) -> None:
        self.block, self.operands = block, operands
        self.dtype = str(block.dtype).replace("torch.", "tl.")
        self.lines: list[str] = []
        self.remade: dict[str, str] = {}
        self.direct: dict[str, str] = {}
        self.offsets: dict[tuple[int, ...], str] = {}

    def add(self, depth: int, *lines: str) -> None:
        self.lines += ["    " * (depth + 1) + line for line in lines]

    def address(self, pointer: str, shape: tuple[int, ...], at: str, per_step: bool) -> str:
        """Where tile number `at` of a tensor lies; in a sequence, where the tile that begins at time `at` does."""
        dims = tile(shape)
        stride = math.prod(shape[1:] if per_step else shape)
        start = f"{identifier(pointer)}_ptr + {at} * {stride}" if stride > 1 else f"{identifier(pointer)}_ptr + {at}"
        if not dims:
            return start
        name = self.offsets.setdefault(dims, "at_" + "x".join(map(str, dims)))
        return f"{start} + {name}"

    def load(
        self, depth: int, shapes: dict[str, tuple[int, ...]], at: str, prefix: str, suffix: str = "", per_step: bool = False
    ) -> None:
        for name, shape in shapes.items():
            where = self.address(name + suffix, shape, at, per_step)
            self.add(depth, f"{prefix}{identifier(name)} = tl.load({where})")

    def remake(self, depth: int, shapes: dict[str, tuple[int, ...]], at: str, prefix: str, suffix: str = "") -> None:
        """Load at every use: volatile, since equal loads would otherwise become one again."""
        for name, shape in shapes.items():
            where = self.address(name + suffix, shape, at, False)
            self.remade[f"{prefix}{identifier(name)}"] = f"tl.load({where}, volatile=True)"

    def put(self, shapes: dict[str, tuple[int, ...]], at: str, prefix: str, suffix: str, per_step: bool = False) -> None:
        """Store results as soon as they are there."""
        for name, shape in shapes.items():
            self.direct[f"{prefix}{identifier(name)}"] = self.address(name + suffix, shape, at, per_step)

    def store(
        self,
        depth: int,
        shapes: dict[str, tuple[int, ...]],
        at: str,
        prefix: str = "",
        suffix: str = "",
        per_step: bool = False,
    ) -> None:
        for name, shape in shapes.items():
            self.add(depth, f"tl.store({self.address(name + suffix, shape, at, per_step)}, {prefix}{identifier(name)})")

    def bodies(self, graph: Callable[[bool], Graph], names: Sequence[str], results: Sequence[str]) -> None:
        """The block that ends a window and, if there is one, that which does not; a result "+x" is added to x."""
        inputs = [identifier(name) for name in names]
        several = self.block.blocks > 1
        if several:
            self.add(1, f"if (phase + step) % {self.block.blocks} == {self.block.blocks - 1}:")
        self._body(1 + several, graph(True), inputs, results, "")
        if several:
            self.add(1, "else:")
            self._body(2, graph(False), inputs, results, "m_")

    def _body(self, depth: int, graph: Graph, inputs: Sequence[str], results: Sequence[str], prefix: str) -> None:
        body = Body(self.dtype, self.operands, prefix, dict(self.remade))
        # Through names of their own, since a result may be another one's input.
        ends: list[str] = []
        for name, value in zip(results, body.translate(graph, inputs), strict=True):
            target = identifier(name.removeprefix("+"))
            text = body.whole(value)
            text = body.reading(f"{target} + {text}" if name.startswith("+") else text)
            if target in self.direct:
                body.lines.append(f"tl.store({self.direct[target]}, {text})")
            else:
                body.lines.append(f"{prefix}new_{target} = {text}")
                ends.append(f"{target} = {prefix}new_{target}")
        self.add(depth, *body.lines, *ends)

    def program(self, name: str, tensors: Sequence[str], rest: str) -> Program:
        pointers = ", ".join(f"{identifier(x)}_ptr" for x in tensors)
        head = ["import triton", "import triton.language as tl", "", "", "@triton.jit", f"def {name}({pointers}, {rest}):"]
        head += ["    row = tl.program_id(0).to(tl.int64)", "    head = row % HEADS"]
        head += [f"    {name} = {_offsets(dims)}" for dims, name in self.offsets.items()]
        return Program("\n".join([*head, *self.lines]) + "\n", tuple(tensors))


def _offsets(dims: tuple[int, ...]) -> str:
    """Where the numbers of a tile lie in memory, by rows."""
    parts = []
    for axis, size in enumerate(dims):
        marks = ", ".join(":" if i == axis else "None" for i in range(len(dims)))
        index = f"tl.arange(0, {size})" + (f"[{marks}]" if len(dims) > 1 else "")
        stride = math.prod(dims[axis + 1 :])
        parts.append(index if stride == 1 else f"{index} * {stride}")
    return " + ".join(parts)
