"""The native path: the block scan of any memory and bias as one C++ program forward and one backward (see `scan`).

A thread takes a sequence and head from its first token to its last, so that what stands between matrix products, and the
memory's weights, stay in the caches of its core, and threads wait for one another at the end only. Programs are generated
from the traced block by `cxx`, know nothing of the batch or the length, take seconds to build, and are kept on disk.

Blocks have as many steps as a window, or its largest divisor up to `MAX_BLOCK`, and with refresh 1 `UNROLLED`; the state
before every block is kept for the backward pass. Links at every token that are not numbers times the weights, rates and
decays per channel, and, with refresh 1, links and states that settle have blocks of one step; of these, and of blocks with a
`LARGE` state, the states of the square root of their number are kept.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph

from miras.design import Design
from miras.engine.problem import Problem
from miras.kernels.block import Block, constant_gradients, identifier, pulled, traced
from miras.kernels.cxx import Translation
from miras.kernels.fused import too_little
from miras.kernels.graph import Untraceable
from miras.kernels.loops import Buffer, Loop, Operand, Ref, schedule, turned, whole, write
from miras.kernels.recompute import recomputed
from miras.kernels.scan import generate, one_by_one, refusal, unhashable

MAX_BLOCK = 64
"""Most gradient steps of a block that takes them at once."""

UNROLLED = 16
"""Most steps of a block that takes them one after the other: with refresh 1, whose weights between them are never formed
(`substituted_errors`), and where weights are linked at every token by a number, which is found without keeping them.

More take longer to build; with fewer, more states are kept.
"""

LARGE = 2**20
"""Numbers of a state that is not kept before every block, which would fill the memory."""

MIN_WORK = 2**24
"""Products of a weight and an input that are worth the seconds of tracing and building, once a design.

Fewer run faster too, and a training of a hundred steps makes up for the building; a first try of something small is quicker
without. `compiled_from` sets another number.
"""

REALS = {torch.float32: "float", torch.float64: "double"}
"""What numbers are in C++."""

FLAGS = "-std=c++17 -O3 -fopenmp-simd -fno-math-errno -fno-trapping-math -ffp-contract=fast -shared -fPIC -pthread"

ALIGN = 16
"""What numbers a buffer in the arena begins at a multiple of: 64 bytes of float."""


def unfit(design: Design) -> str | None:
    """Why a design has no programs; None where it has."""
    return unhashable(design)


@functools.cache
def compiler() -> tuple[str, ...]:
    """The command of the C++ compiler: $CXX, which may have several words, or g++ or clang++; empty where there is none."""
    asked = shlex.split(os.environ.get("CXX", ""))
    for program, *rest in [asked] if asked else [["g++"], ["clang++"]]:
        if path := shutil.which(program):
            return path, *rest
    return ()


def unusable(device: torch.device) -> str | None:
    """Why no program can run on a device; None where one can."""
    if device.type != "cpu":
        return f"its programs are for CPUs, not for {device.type}"
    if not compiler():
        return f"no C++ compiler ({os.environ.get('CXX', '').strip() or 'g++ or clang++, or the one in $CXX'})"
    return None


def unprofitable(design: Design, work: int | None, rows: int | None, *, per_channel: bool) -> str | None:
    """Why another path is faster, or building would not pay for the `work` (see `fused.work_of`), on so many `rows`.

    But for the number of rows, measured: two cores, d = 64, T = 2,048 (512 for rates per channel), forward and backward.
    """
    assert design.memory is not None
    if rows is not None and rows < torch.get_num_threads():
        return f"{rows} sequences and heads leave some of {torch.get_num_threads()} threads without work"
    if per_channel and not design.memory.linear:
        return "rates and decays per channel take blocks of one step"
    return too_little(work, MIN_WORK)


class NativePrograms:
    """C++ programs, on torch's number of threads."""

    path = "native"

    def block_length(self, problem: Problem) -> int:
        design = problem.design
        assert design.retention is not None
        if one_by_one(problem, scales=True):
            return 1
        linked = not design.retention.identity
        if design.refresh == 1 and (linked or design.retention.settles or design.learning.settles):
            return 1
        if design.refresh == 1:
            return MAX_BLOCK if constant_gradients(design) else UNROLLED
        most = UNROLLED if linked and design.link_at == "token" else MAX_BLOCK
        return max(n for n in range(1, most + 1) if design.refresh % n == 0)

    def make(self, block: Block, needed: tuple[bool, ...] | None) -> None:
        generate(_library, block, needed)

    def every(self, block: Block, steps: int) -> int:
        return 1 if _keeps_all(block) else math.isqrt(steps - 1) + 1

    def forward(self, block: Block, tensors: Sequence[Tensor], rows: int, sizes: Mapping[str, int]) -> None:
        library = _library(block, None)
        _run(library.forward if sizes["read"] else library.replay, block, tensors, rows, [sizes[x] for x in FORWARD_SIZES])

    def backward(
        self, block: Block, needed: tuple[bool, ...], tensors: Sequence[Tensor], rows: int, sizes: Mapping[str, int]
    ) -> None:
        _run(_library(block, needed).backward, block, tensors, rows, [sizes[x] for x in BACKWARD_SIZES])


FORWARD_SIZES = ("heads", "begin", "steps", "total", "phase", "every", "kept")
BACKWARD_SIZES = ("heads", "begin", "steps", "total", "phase", "side")
"""Numbers that a program takes, after those of rows and threads."""


def _run(function: Any, block: Block, tensors: Sequence[Tensor], rows: int, sizes: Sequence[int]) -> None:
    assert all(x.is_contiguous() and x.dtype == block.dtype and x.device.type == "cpu" for x in tensors)
    pointers = (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))
    numbers = [rows, torch.get_num_threads(), *sizes]
    if not function(pointers, (ctypes.c_long * len(numbers))(*numbers)):
        raise MemoryError("no memory for the program of path 'native'")


def _keeps_all(block: Block) -> bool:
    """Whether the states before all blocks are kept, and none is found again."""
    return block.length > 1 and sum(map(math.prod, block.state.values())) < LARGE


@functools.lru_cache(maxsize=256)
def _library(block: Block, needed: tuple[bool, ...] | None) -> ctypes.CDLL:
    """The built programs: forward and replay, or backward for the inputs that need a gradient. Raises Untraceable."""
    if needed is None:
        names = ["forward"] if _keeps_all(block) else ["forward", "replay"]
        graphs = {ends: traced(block, ends) for ends in _kinds(block)}
        functions = [_forward(block, graphs, name) for name in names]
    else:
        functions = [_backward(block, needed)]
    return built(source(REALS[block.dtype], [f"constexpr int BLOCK = {block.length};", *functions]))


def forget() -> None:
    """Let go of all programs that have been built; those on disk stay."""
    _library.cache_clear()
    refusal.cache_clear()


def source(real: str, lines: Sequence[str]) -> str:
    """A program of `lines` on numbers that are float or double."""
    return "\n".join([f"typedef {real} real;", Path(__file__).with_name("native.h").read_text(), *lines]) + "\n"


def built(source: str) -> ctypes.CDLL:
    """A source as a library, compiled unless it is on disk; one that cannot be read is compiled anew. Raises Untraceable."""
    library = _compiled(source)
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        library.unlink()
        return ctypes.CDLL(str(_compiled(source)))


def _compiled(source: str) -> Path:
    """Where the library of a source lies, of these flags, this compiler and this processor.

    It lies in $MIRAS_CACHE_DIR, or else in ~/.cache/miras; $MIRAS_CXXFLAGS are its last flags. Raises Untraceable.
    """
    command = [*compiler(), *shlex.split(FLAGS), *_target(), *shlex.split(os.environ.get("MIRAS_CXXFLAGS", ""))]
    key = hashlib.sha256("\n".join([source, *command, _macros()]).encode()).hexdigest()[:32]
    folder = Path(os.environ.get("MIRAS_CACHE_DIR") or Path.home() / ".cache" / "miras") / "native"
    library = folder / f"{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            text, made = Path(work) / "program.cpp", Path(work) / "program.so"
            text.write_text(source)
            done = subprocess.run([*command, str(text), "-o", str(made)], capture_output=True, text=True)
            if done.returncode != 0:
                raise Untraceable(f"{command[0]} failed: {done.stderr.strip() or done.returncode}")
            # In one step, since other processes may look for it.
            made.replace(library)
    return library


def _target() -> tuple[str, ...]:
    """The flags that compile for this processor, with the widest vectors that it has."""
    machine = platform.machine()
    if machine in ("arm64", "aarch64"):
        return ("-mcpu=native",)
    wide = ("-mprefer-vector-width=512",) if machine in ("x86_64", "AMD64") else ()
    return ("-march=native", *wide)


@functools.cache
def _macros() -> str:
    """What the compiler says of itself and of this processor."""
    command = [*compiler(), *_target(), "-dM", "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, text=True).stdout


class _Body(NamedTuple):
    """The lines of a block, and how many numbers of the arena they need."""

    lines: list[str]
    size: int


def _body(graph: Graph, inputs: Sequence[str], outputs: Sequence[str | None]) -> _Body:
    """A traced graph from pointers to pointers; an output "+x" is added to x, one that is None is not wanted."""
    shapes = [tuple(node.meta["val"].shape) for node in graph.nodes if node.op == "placeholder"]
    given = [Buffer(shape, pointer) for shape, pointer in zip(shapes, inputs, strict=True)]
    translation = Translation()
    found = zip(translation.translate(graph, given), outputs, strict=True)
    wanted = [(value, shape, pointer) for (value, shape), pointer in found if pointer is not None]
    values = turned(translation.operations, [value for value, _, _ in wanted])
    outer, ends = set(given), list[Buffer]()
    for value, (_, shape, pointer) in zip(values, wanted, strict=True):
        end = _end(value, shape, pointer, outer)
        if isinstance(end, Loop):
            # Where its operand is made, so that the two can run as one.
            makers = [
                i + 1 for i, op in enumerate(translation.operations) if isinstance(value, Ref) and value.buffer is op.out
            ]
            translation.operations.insert(makers[-1] if makers else 0, end)
            end = end.out
        outer.add(end)
        ends.append(end)
    return _Body(*write(recomputed(schedule(translation.operations, ends), ends), outer, ALIGN))


def _end(value: Operand, shape: tuple[int, ...], pointer: str, outer: set[Buffer]) -> Buffer | Loop:
    """What puts a result where it is wanted: its own buffer if it can lie there, else a copy."""
    if pointer.startswith("+"):
        name = pointer.removeprefix("+")
        total = Buffer(shape, name)
        outer.add(total)
        return Loop(Buffer(shape, name), shape, (whole(total), value), lambda x, y: f"({x} + {y})")
    if isinstance(value, Ref) and value.buffer not in outer and value.whole:
        value.buffer.name = pointer
        return value.buffer
    return Loop(Buffer(shape, pointer), shape, (value,), str)


def _forward(block: Block, graphs: Mapping[bool, Graph], name: str) -> str:
    """The scan, which keeps the state before every `every`th block; "replay" leaves the outputs out."""
    shared, sequences, state = (_named(x) for x in (block.shared, block.sequences, block.state))
    inputs = [f"x_{x}" for x in sequences] + [f"w_{x}" for x in shared] + [f"z_{x}" for x in state]
    outputs = ["y_o" if name == "forward" else None, *(f"n_{x}" for x in state)]
    bodies = {ends: _body(graph, inputs, outputs) for ends, graph in graphs.items()}
    held = {x: -(-math.prod(shape) // ALIGN) * ALIGN for x, shape in state.items()}
    size, pairs = max(x.size for x in bodies.values()), 2 * sum(held.values())
    tensors = [*sequences, *shared, *(f"{x}_{kind}" for kind in ("first", "last", "kept") for x in state), "o"]
    before = [f"large_pages(t_{x}_kept, rows * kept * {math.prod(shape)});" for x, shape in state.items()]
    lines = [*_head(name, tensors, FORWARD_SIZES, size + pairs, before), *_at(shared, "head", "w_")]
    lines.append(f"real *arena = memory + {pairs};")
    begin = 0
    # The state goes to and fro between two places.
    for x, shape in state.items():
        count = math.prod(shape)
        lines += [f"real *pair_{x} = memory + {begin};", f"real *z_{x} = pair_{x};"]
        lines.append(f"std::memcpy(z_{x}, t_{x}_first + row * {count}, {count} * sizeof(real));")
        begin += 2 * held[x]
    lines += ["for (long step = begin; step < begin + steps; step++) {", "const long here = step - begin;"]
    lines += ["long time = row * total + step * BLOCK;", *_at(sequences, "time", "x_", "", per_step=True)]
    lines.append(f"real *y_o = t_o + time * {block.widths[1]};")
    for x, shape in state.items():
        count = math.prod(shape)
        lines.append(f"if (here % every == 0) keep<{count}>(t_{x}_kept + (row * kept + here / every) * {count}, z_{x});")
        lines.append(
            f"real *n_{x} = here + 1 == steps ? t_{x}_last + row * {count} : pair_{x} + (here + 1) % 2 * {held[x]};"
        )
    lines += [*_branches(block, bodies), *(f"z_{x} = n_{x};" for x in state), "}", "});", "}"]
    return "\n".join(lines)


def _backward(block: Block, needed: tuple[bool, ...]) -> str:
    """The pull-back of blocks begin to begin + steps in reverse, given the state before each of them."""
    shared, sequences, state = (_named(x) for x in (block.shared, block.sequences, block.state))
    wanted = dict(zip([*sequences, *shared], needed, strict=True))
    found, summed = ({x: shape for x, shape in group.items() if wanted[x]} for group in (sequences, shared))
    inputs = [f"x_{x}" for x in sequences] + [f"w_{x}" for x in shared] + [f"z_{x}" for x in state]
    inputs += ["y_o", *(f"g_{x}" for x in state)]
    outputs = [f"dx_{x}" for x in found] + [f"+dw_{x}" for x in summed] + [f"h_{x}" for x in state]
    bodies = {ends: _body(pulled(block, ends, needed), inputs, outputs) for ends in _kinds(block)}
    grads = [f"{x}_grad" for x in (*state, "o", *found, *summed)]
    tensors = [*sequences, *shared, *(f"{x}_kept" for x in state), *grads]
    lines = _head("backward", tensors, BACKWARD_SIZES, max(x.size for x in bodies.values()))
    lines += ["real *arena = memory;", *_at(shared, "head", "w_"), *_at(summed, "row", "dw_", "_grad")]
    lines += ["for (long back = 0; back < steps; back++) {", "long here = steps - 1 - back, step = begin + here;"]
    lines += ["long time = row * total + step * BLOCK;", *_at(sequences, "time", "x_", "", per_step=True)]
    lines += _at({"o": (block.length, block.widths[1])}, "time", "y_", "_grad", per_step=True)
    lines += _at(found, "time", "dx_", "_grad", per_step=True)
    lines += _at(state, "(row * steps + here)", "z_", "_kept")
    lines += _at(state, "(row * 2 + (side + back) % 2)", "g_", "_grad")
    lines += _at(state, "(row * 2 + (side + back + 1) % 2)", "h_", "_grad")
    return "\n".join([*lines, *_branches(block, bodies), "}", "});", "}"])


def _named(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {identifier(name): shape for name, shape in shapes.items()}


def _kinds(block: Block) -> list[bool]:
    """Blocks that end a window and, if there are any, those that do not."""
    return [True, False] if block.blocks > 1 else [True]


def _head(name: str, tensors: Sequence[str], sizes: Sequence[str], arena: int, before: Sequence[str] = ()) -> list[str]:
    """A program up to where each row begins; lines `before` run once."""
    lines = [f'extern "C" int {name}(real **tensors, const long *sizes) {{']
    lines += [f"real *t_{x} = tensors[{i}];" for i, x in enumerate(tensors)]
    lines += [f"const long {x} = sizes[{i}];" for i, x in enumerate(["rows", "threads", *sizes])]
    lines += before
    lines.append(f"return for_rows(rows, threads, {arena}, [=](long row, real *memory) {{")
    return [*lines, "const long head = row % heads;"]


def _at(
    shapes: Mapping[str, tuple[int, ...]], place: str, prefix: str, suffix: str = "", *, per_step: bool = False
) -> list[str]:
    """Pointers to number `place` of tensors; of sequences, to what begins at that time."""
    sizes = {name: math.prod(shape[1:] if per_step else shape) for name, shape in shapes.items()}
    return [f"real *{prefix}{name} = t_{name}{suffix} + {place} * {size};" for name, size in sizes.items()]


def _branches(block: Block, bodies: Mapping[bool, _Body]) -> list[str]:
    if block.blocks == 1:
        return bodies[True].lines
    condition = f"if ((phase + step) % {block.blocks} == {block.blocks - 1}) {{"
    return [condition, *bodies[True].lines, "} else {", *bodies[False].lines, "}"]
