"""The triton path: the block scan of any memory and bias as one GPU kernel forward and one backward (see `scan`).

States before blocks are kept for the backward pass: those before all, where that takes less than a few times the memory of
keys and values, or else of the square root of their number.

A block has 16, 32 or 64 steps where the links allow it and the window is a multiple of it; with refresh 1, links at
every token, rates and decays per channel, or where no more fit, it has one, of which every other learner is made, the exact
online one too. Both programs run one instance a sequence and head, and carry the slots in float32 from block to block: in
registers, or, where these could not hold them, in memory (L2). Matrices are divided into tiles (see `pieces`). States and
everything that is no matrix product are in float32, operands in `operands_of` the inputs.

What has been checked is what Triton's interpreter and compiler can check without a GPU: outputs and gradients, and that
the programs compile for one and fit into it (docs/gpu.md has the counts). No speed of it has been measured.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import linecache
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph

from miras.design import Design
from miras.engine.problem import Problem
from miras.kernels.block import Block, identifier, pulled, traced
from miras.kernels.graph import Untraceable
from miras.kernels.pieces import grid, split
from miras.kernels.scan import generate, one_by_one, unhashable
from miras.kernels.translate import Body

MAX_BLOCK = 64
"""Most gradient steps a block takes."""

MAX_WORK = 2**21
"""Most steps of a block times numbers of the weights, where a shorter block has fewer: longer ones do not fit into shared
memory, or take Triton many minutes to compile."""

WIDE = 4
"""How much less that is for operands of float32, each of which is two of TF32 of twice the bytes."""

MIN_BLOCK = 16
"""Fewest, where it takes more than one: with less there is nothing for a matrix product."""

UNMEASURED = "its speed has not been measured on a GPU yet, so it runs only where it is asked for: path='triton'"
"""Why it is not chosen by itself."""

PIECE = 128
"""Longest axis of a tile."""

KEPT = 8
"""The state before every block is kept where it has at most so many numbers a step for each number of a key and a value: the
backward pass then runs no forward one, by its instructions a fourth of all (docs/gpu.md). Else some are."""

MAX_STATE = 2**17
"""Most numbers of one head's slots."""

REREAD = 2**14
"""Most numbers of a head's weights that kernels keep in registers.

Larger ones, slots and their gradients stay in memory, from where every use reads them anew: kept, they and the copies that
the tensor cores read would take an SM's registers and shared memory several times over. A forward kernel in blocks of one
step, each of which would read them all, keeps as many as registers hold.
"""

REGISTERS = 2**16
"""Numbers of float32 that an SM's registers hold."""


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
        return f"{held} numbers of state a head; allowed: {MAX_STATE}"
    return None


def unusable(device: torch.device) -> str | None:
    """Why no kernel can be launched on a device; None where one can."""
    if not installed("triton"):
        return "triton is not installed: pip install 'torch-miras[gpu]'"
    if device.type != "cuda" and not interpreted():
        return f"it needs a CUDA device, not {device.type} (or Triton's interpreter: TRITON_INTERPRET=1 before the import)"
    return None


@functools.cache
def installed(package: str) -> bool:
    """Whether a package can be imported; looked for once, since every call of `memorize` asks."""
    return importlib.util.find_spec(package) is not None


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
        numbers = sum(shape.d_in * shape.d_out for shape in problem.shapes.values())
        most = MAX_WORK // WIDE if self.operands in ("float32", "tf32") else MAX_WORK
        fitting = 2 ** (max(most // numbers, 1).bit_length() - 1)
        length = math.gcd(problem.design.refresh, min(MAX_BLOCK, fitting))
        return length if length >= MIN_BLOCK else 1

    def make(self, block: Block, needed: tuple[bool, ...] | None) -> None:
        if needed is None:
            generate(forward_program, block, self.operands)
        else:
            generate(backward_program, block, self.operands, needed)

    def every(self, block: Block, steps: int) -> int:
        kept = sum(math.prod(x) for x in block.state.values()) / block.length
        return 1 if kept <= KEPT * sum(block.widths) else math.isqrt(steps - 1) + 1

    def forward(self, block: Block, tensors: Sequence[Tensor], rows: int, sizes: dict[str, int]) -> None:
        sizes = {**sizes, "READ": bool(sizes["read"])}
        del sizes["read"]
        program, count = forward_program(block, self.operands), len(block.state)
        if carried(block):
            self._launch(block, program, tensors, rows, sizes)
            return
        before = len(block.sequences) + len(block.shared)
        first, last = tensors[before : before + count], tensors[before + count : before + 2 * count]
        pairs = [torch.stack((x, torch.empty_like(x)), dim=2) for x in first]
        self._launch(block, program, [*tensors[:before], *pairs, *tensors[before + 2 * count :]], rows, sizes)
        for x, pair in zip(last, pairs, strict=True):
            x.copy_(pair[:, :, sizes["steps"] % 2])

    def backward(
        self, block: Block, needed: tuple[bool, ...], tensors: Sequence[Tensor], rows: int, sizes: dict[str, int]
    ) -> None:
        self._launch(block, backward_program(block, self.operands, needed), tensors, rows, sizes)

    def _launch(self, block: Block, program: Program, tensors: Sequence[Tensor], rows: int, sizes: dict[str, Any]) -> None:
        assert len(tensors) == len(program.tensors)
        sizes = {**sizes, "HEADS": sizes["heads"]}
        del sizes["heads"]
        try:
            kernel_of(program)[(rows,)](*tensors, **sizes, **options(block))
        except Exception as error:
            # OutOfResources and CompilationError, which are Triton's and not importable without it.
            if type(error).__module__.startswith("triton"):
                raise Untraceable(f"{type(error).__name__}: {error}") from error
            raise


def options(block: Block) -> dict[str, int]:
    """What a kernel is compiled with.

    Of warps, a sixteenth of the longest tile's rows, since tensor cores take 16 at once; of registers, all that a thread can
    have, since NVIDIA's assembler gives some kernels a few dozen and spills the rest.
    """
    longest = max(max(shape.d_in, shape.d_out) for _, shape in block.shapes)
    return {"num_warps": max(4, min(longest, PIECE) // 16), "num_stages": 1, "maxnreg": 255}


class Program(NamedTuple):
    """A Triton program as text, and its tensor arguments in order."""

    source: str
    tensors: tuple[str, ...]


_numbers = itertools.count()


@functools.lru_cache(maxsize=256)
def kernel_of(program: Program) -> Any:
    """The kernel of a program; its text is kept where Python's own tools, and Triton, find a function's source."""
    name, source = f"<miras triton program {next(_numbers)}>", program.source
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"__name__": f"miras_triton_program_{next(_numbers)}"}
    exec(compile(source, name, "exec"), namespace)
    return namespace["forward" if "def forward(" in source else "backward"]


def large(block: Block) -> bool:
    """Whether weights and state stay in memory."""
    return sum(math.prod(x) for x in block.shared.values()) > REREAD


def carried(block: Block) -> bool:
    """Whether the forward kernel carries the state in registers."""
    held = sum(math.prod(x) for x in block.state.values())
    return not large(block) or (block.length == 1 and 2 * held <= REGISTERS)


@functools.lru_cache(maxsize=64)
def forward_program(block: Block, operands: str) -> Program:
    """The scan: keeps the state before every `every`th step, and stores outputs where READ.

    The state is `carried` in registers, or lies in pairs [..., 2, ...] in memory: a step reads the one and writes the other,
    the first step reads the first.
    """
    writer, held = _Writer(block, operands), carried(block)
    here, there = (f"(row * 2 + (step - begin{x}) % 2)" for x in ("", " + 1"))
    if held:
        writer.load(0, block.shared, "head", "w_")
        writer.load(0, block.state, "row", "z_", "_first")
    else:
        writer.remake(block.shared, "head", "w_")
        writer.remake(block.state, here, "z_", "_pair")
        writer.put(block.state, there, "z_", "_pair")
    writer.add(0, "for step in range(begin, begin + steps):")
    writer.add(1, "if (step - begin) % every == 0:", "    place = row * kept + (step - begin) // every")
    if not held:
        writer.load(2, block.state, here, "z_", "_pair")
    writer.store(2, block.state, "place", "z_", "_kept")
    writer.add(1, f"time = (row * total + step * {block.length})")
    writer.load(1, block.sequences, "time", "x_", per_step=True)
    inputs = [*writer.names(block.sequences, "x_"), *writer.names(block.shared, "w_"), *writer.names(block.state, "z_")]
    outputs = {"o": (block.length, block.widths[1])}
    writer.bodies(lambda ends: traced(block, ends), inputs, writer.names(outputs, "") + writer.names(block.state, "z_"))
    writer.add(1, "if READ:")
    writer.store(2, outputs, "time", per_step=True)
    if held:
        writer.store(0, block.state, "row", "z_", "_last")
    else:
        # The next step's threads read what others of this one wrote.
        writer.add(1, "tl.debug_barrier()")
    kinds = ("first", "last", "kept") if held else ("pair", "kept")
    tensors = (*block.sequences, *block.shared, *(f"{name}_{kind}" for kind in kinds for name in block.state), "o")
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
    reread = large(block)
    if reread:
        writer.remake(block.shared, "head", "w_")
        writer.remake(shared, "row", "dw_", "_grad")
    else:
        writer.load(0, block.shared, "head", "w_")
        writer.load(0, shared, "row", "dw_", "_grad")
        writer.load(0, block.state, "(row * 2 + side)", "dz_", "_grad")
    writer.add(0, "for back in range(steps):", "    here = steps - 1 - back", "    step = begin + here")
    writer.add(1, "place = row * steps + here", f"time = (row * total + step * {block.length})")
    writer.load(1, block.sequences, "time", "x_", per_step=True)
    writer.load(1, outputs, "time", "d", "_grad", per_step=True)
    if not reread:
        writer.load(1, block.state, "place", "z_", "_kept")
    else:
        writer.remake(block.state, "place", "z_", "_kept")
        writer.remake(block.state, "(row * 2 + (side + back) % 2)", "dz_", "_grad")
        writer.put(shared, "row", "dw_", "_grad")
        writer.put(block.state, "(row * 2 + (side + back + 1) % 2)", "dz_", "_grad")
    writer.put(sequences, "time", "dx_", "_grad", per_step=True)
    inputs = [*writer.names(block.sequences, "x_"), *writer.names(block.shared, "w_"), *writer.names(block.state, "z_")]
    inputs += [*writer.names(outputs, "d"), *writer.names(block.state, "dz_")]
    found = [*writer.names(sequences, "dx_"), *(f"+{x}" for x in writer.names(shared, "dw_"))]
    writer.bodies(lambda ends: pulled(block, ends, needed), inputs, found + writer.names(block.state, "dz_"))
    if reread:
        # As above.
        writer.add(1, "tl.debug_barrier()")
    else:
        writer.store(0, shared, "row", "dw_", "_grad")
        writer.store(0, block.state, "(row * 2 + (side + steps) % 2)", "dz_", "_grad")
    grads = [f"{x}_grad" for x, need in zip([*block.sequences, *block.shared], needed, strict=True) if need]
    states = [f"{x}_kept" for x in block.state] + [f"{x}_grad" for x in block.state]
    tensors = (*block.sequences, *block.shared, *states, "o_grad", *grads)
    return writer.program("backward", tensors, "begin, steps, total, phase, side, HEADS: tl.constexpr")


class _Writer:
    """Lines of a program; names of tensors are made identifiers, and a tensor's pointer ends in _ptr.

    Tensors that are longer than `PIECE` along an axis are several tiles (see `pieces`), whose names end in their place.
    """

    def __init__(self, block: Block, operands: str) -> None:
        self.block, self.operands = block, operands
        self.dtype = str(block.dtype).replace("torch.", "tl.")
        self.lines: list[str] = []
        self.remade: dict[str, str] = {}
        self.direct: dict[str, str] = {}
        self.offsets: dict[str, str] = {}

    def add(self, depth: int, *lines: str) -> None:
        self.lines += ["    " * (depth + 1) + line for line in lines]

    def names(self, shapes: Mapping[str, tuple[int, ...]], prefix: str) -> list[str]:
        """The tiles of tensors."""
        return [
            f"{prefix}{identifier(name)}{end}" for name, shape in shapes.items() for end in map(_end, grid(shape, PIECE))
        ]

    def addresses(
        self, shapes: Mapping[str, tuple[int, ...]], at: str, suffix: str, per_step: bool = False
    ) -> Iterator[str]:
        """Where tiles of number `at` of tensors lie; in a sequence, of what begins at time `at`."""
        for name, shape in shapes.items():
            whole = math.prod(shape[1:] if per_step else shape)
            strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
            kept = [axis for axis, n in enumerate(shape) if n != 1]
            dims = [(min(shape[axis], PIECE), strides[axis]) for axis in kept]
            for place in grid(shape, PIECE):
                start = sum(i * min(n, PIECE) * stride for i, n, stride in zip(place, shape, strides, strict=True))
                terms = [f"{identifier(name + suffix)}_ptr", f"{at} * {whole}" if whole > 1 else at]
                terms += [str(start)] if start else []
                yield " + ".join([*terms, *([self.offset(dims)] if dims else [])])

    def offset(self, dims: Sequence[tuple[int, int]]) -> str:
        """The name of where the numbers of a tile lie, for its lengths and strides."""
        name = "at_" + "_".join(f"{n}x{stride}" for n, stride in dims)
        parts = []
        for axis, (size, stride) in enumerate(dims):
            marks = ", ".join(":" if i == axis else "None" for i in range(len(dims)))
            index = f"tl.arange(0, {size})" + (f"[{marks}]" if len(dims) > 1 else "")
            parts.append(index if stride == 1 else f"{index} * {stride}")
        self.offsets[name] = " + ".join(parts)
        return name

    def load(
        self, depth: int, shapes: dict[str, tuple[int, ...]], at: str, prefix: str, suffix: str = "", per_step: bool = False
    ) -> None:
        for name, where in zip(self.names(shapes, prefix), self.addresses(shapes, at, suffix, per_step), strict=True):
            self.add(depth, f"{name} = tl.load({where})")

    def remake(self, shapes: dict[str, tuple[int, ...]], at: str, prefix: str, suffix: str = "") -> None:
        """Load at every use: volatile, since equal loads would otherwise become one again."""
        for name, where in zip(self.names(shapes, prefix), self.addresses(shapes, at, suffix), strict=True):
            self.remade[name] = f"tl.load({where}, volatile=True)"

    def put(self, shapes: dict[str, tuple[int, ...]], at: str, prefix: str, suffix: str, per_step: bool = False) -> None:
        """Store results as soon as they are there."""
        self.direct |= dict(zip(self.names(shapes, prefix), self.addresses(shapes, at, suffix, per_step), strict=True))

    def store(
        self,
        depth: int,
        shapes: dict[str, tuple[int, ...]],
        at: str,
        prefix: str = "",
        suffix: str = "",
        per_step: bool = False,
    ) -> None:
        for name, where in zip(self.names(shapes, prefix), self.addresses(shapes, at, suffix, per_step), strict=True):
            self.add(depth, f"tl.store({where}, {name})")

    def bodies(self, graph: Callable[[bool], Graph], inputs: Sequence[str], results: Sequence[str]) -> None:
        """The block that ends a window and, if there is one, that which does not; a result "+x" is added to x."""
        several = self.block.blocks > 1
        if several:
            self.add(1, f"if (phase + step) % {self.block.blocks} == {self.block.blocks - 1}:")
        self._body(1 + several, split(graph(True), PIECE), inputs, results, "")
        if several:
            self.add(1, "else:")
            self._body(2, split(graph(False), PIECE), inputs, results, "m_")

    def _body(self, depth: int, graph: Graph, inputs: Sequence[str], results: Sequence[str], prefix: str) -> None:
        body = Body(self.dtype, self.operands, prefix, dict(self.remade))
        # Through names of their own, since a result may be another one's input.
        ends: list[str] = []
        for name, value in zip(results, body.translate(graph, inputs), strict=True):
            target = name.removeprefix("+")
            text = body.whole(value)
            text = body.reading(f"{target} + {text}" if name.startswith("+") else text)
            if target in self.direct:
                body.lines.append(f"tl.store({self.direct[target]}, {text})")
            else:
                body.lines.append(f"{prefix}new_{target} = {text}")
                ends.append(f"{target} = {prefix}new_{target}")
        self.add(depth, *body.lines, *ends)

    def program(self, name: str, tensors: Sequence[str], rest: str) -> Program:
        # Or else every number that is 1 or a multiple of 16 would have a kernel of its own, compiled for minutes.
        names = [x.strip() for x in rest.split(",") if ":" not in x]
        pointers = ", ".join(f"{identifier(x)}_ptr" for x in tensors)
        head = [
            "import triton",
            "import triton.language as tl",
            "",
            "",
            f"@triton.jit(do_not_specialize={names})",
            f"def {name}({pointers}, {rest}):",
        ]
        head += ["    row = tl.program_id(0).to(tl.int64)", "    head = row % HEADS"]
        head += [f"    {name} = {text}" for name, text in self.offsets.items()]
        return Program("\n".join([*head, *self.lines]) + "\n", tuple(tensors))


def _end(place: Sequence[int]) -> str:
    """What the name of a tile ends in."""
    return "".join(f"_{i}" for i in place) if any(place) else ""
