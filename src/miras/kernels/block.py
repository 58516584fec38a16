"""One block of gradient steps and its pull-back, traced, and the Triton programs that scan them over a sequence.

    (o, z', r')             = block(x, w, z, r)                inputs x, shared weights w, slots z, gradient point r
    (dx, dw, dz, dr)        = pull(x, w, z, r, do, dz', dr')   its vector-Jacobian product, the block recomputed inside

A window of `refresh` steps is one block, or several of which the last ends it. Both programs run one instance a sequence
and head, carry the slots in registers in float32 from block to block, and are generated from these graphs by
`translate`, so that nothing here knows any choice's formula. Where every block ends a window, r is z's first slot.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.func import functionalize
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

from miras.design import Design
from miras.engine.chunk import Run, Slots, scan_run
from miras.engine.problem import Problem
from miras.kernels.translate import Body, tile
from miras.memory import WeightShape

aten = torch.ops.aten


def _unbind(x: Tensor, dim: int = 0) -> list[Tensor]:
    return [x.select(dim, index) for index in range(x.shape[dim])]


DECOMPOSED: Any = {aten.unbind.int: _unbind} | get_decompositions(
    [
        *(aten.gelu, aten.gelu_backward, aten.silu, aten.silu_backward, aten.sigmoid_backward, aten.tanh_backward),
        *(aten._softmax, aten._softmax_backward_data, aten.softshrink, aten.threshold_backward),
        *(aten.relu, aten.softplus, aten.softplus_backward, aten.masked_fill, aten.rsub, aten.addcmul, aten.addcdiv),
    ]
)
"""Operations written as simpler ones, all but one by torch itself."""


REREAD = 2**14
"""Most numbers of a head's weights that the backward kernel keeps in registers.

Larger ones, slots and their gradients stay in memory, from where every use reads them anew: kept, they and the copies that
the tensor cores read would take an SM's registers and shared memory several times over.
"""


@dataclass(frozen=True)
class Block:
    """`length` gradient steps of a design, `blocks` of which make a window, on flat lists of tensors of `dtype`.

    Sequences: q, k, v, lr, log_decay and gates by name; shared: weights by name and slow parameters; state: the slots of
    every weight and, if it is kept `apart` from them, its gradient point. Equal if the `facts` of their designs are.
    """

    design: Design = field(compare=False)
    facts: tuple[object, ...]
    shapes: tuple[tuple[str, WeightShape], ...]
    gates: tuple[str, ...]
    slow: tuple[str, ...]
    widths: tuple[int, int]
    channels: tuple[int | None, int | None]
    length: int
    apart: bool
    dtype: torch.dtype

    @property
    def blocks(self) -> int:
        return self.design.refresh // self.length

    @property
    def sequences(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a block's inputs, without batch and head."""
        k, v = self.widths
        lr, decay = (() if c is None else (c,) for c in self.channels)
        tails = {"q": (k,), "k": (k,), "v": (v,), "lr": lr, "log_decay": decay} | dict.fromkeys(self.gates, ())
        return {name: (self.length, *tail) for name, tail in tails.items()}

    @property
    def shared(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what all sequences share, for one head."""
        weights = {name: (shape.d_in, shape.d_out) for name, shape in self.shapes}
        return weights | dict.fromkeys(self.slow, (1, self.widths[1]))

    @property
    def state(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what is carried from block to block, for one sequence and head."""
        slots = [(f"{name}_{i}", x) for name, x in self.shapes for i in range(self.design.learning.slots)]
        points = [(f"{name}_point", x) for name, x in self.shapes if self.apart]
        return {name: (shape.d_in, shape.d_out) for name, shape in (*slots, *points)}

    def __call__(self, ends: bool, *flat: Tensor) -> tuple[Tensor, ...]:
        """Outputs [1, 1, length, V] and the state afterwards, for a block that ends a window or does not."""
        tensors, shapes, count = iter(flat), dict(self.shapes), self.design.learning.slots
        q, k, v, lr, log_decay = (next(tensors) for _ in range(5))
        gates, weights, slow = ({name: next(tensors) for name in group} for group in (self.gates, shapes, self.slow))
        problem = Problem(self.design, q, k, v, lr, log_decay, gates, weights, slow, shapes)
        slots = {name: [next(tensors) for _ in range(count)] for name in shapes}
        scan = Slots(slots, {name: next(tensors) if self.apart else slots[name][0] for name in shapes})
        out = scan_run(problem, scan, Run(0, 1, self.length, ends), "recurrent" if self.design.refresh == 1 else "frozen")
        points = [scan.point[name] for name in shapes] if self.apart else []
        return (out, *(z for name in shapes for z in scan.slots[name]), *points)

    def pull(self, ends: bool, needed: Sequence[bool], *flat: Tensor) -> tuple[Tensor, ...]:
        """Gradients in the inputs that are needed, sequences and shared ones, and in the state."""
        count = len(needed) + len(self.state)
        inputs = [x.detach() for x in flat[:count]]
        leaves = [x.requires_grad_() for x, need in zip(inputs, needed, strict=False) if need]
        leaves += [x.requires_grad_() for x in inputs[len(needed) :]]
        with torch.enable_grad():
            reached = [(x, g) for x, g in zip(self(ends, *inputs), flat[count:], strict=True) if x.requires_grad]
            results, grads = zip(*reached, strict=True)
            return torch.autograd.grad(results, leaves, grads, materialize_grads=True)

    def examples(self) -> list[Tensor]:
        """Inputs to trace with."""
        shapes = [(1, 1, *x) for x in self.sequences.values()] + [(1, *x) for x in self.shared.values()]
        return [torch.zeros(x, dtype=self.dtype) for x in [*shapes, *((1, 1, *x) for x in self.state.values())]]


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
    writer.bodies(lambda ends: _traced(block, ends), names, ["o", *(f"z_{x}" for x in block.state)])
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
    writer.bodies(lambda ends: _pulled(block, ends, needed), names, found)
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


def identifier(name: str) -> str:
    """A tensor's name in a program."""
    return name.replace(".", "_")


def _offsets(dims: tuple[int, ...]) -> str:
    """Where the numbers of a tile lie in memory, by rows."""
    parts = []
    for axis, size in enumerate(dims):
        marks = ", ".join(":" if i == axis else "None" for i in range(len(dims)))
        index = f"tl.arange(0, {size})" + (f"[{marks}]" if len(dims) > 1 else "")
        stride = math.prod(dims[axis + 1 :])
        parts.append(index if stride == 1 else f"{index} * {stride}")
    return " + ".join(parts)


def _traced(block: Block, ends: bool) -> Graph:
    return _graph(functools.partial(block, ends), block.examples())


def _pulled(block: Block, ends: bool, needed: tuple[bool, ...]) -> Graph:
    examples = block.examples()
    with torch.no_grad():
        results = [torch.zeros_like(x) for x in block(ends, *examples)]
    return _graph(functools.partial(block.pull, ends, needed), [*examples, *results])


def _graph(function: Callable[..., tuple[Tensor, ...]], examples: Sequence[Tensor]) -> Graph:
    """The operations of a function, without writes into tensors."""
    with torch.no_grad():
        traced = make_fx(function)(*examples)
        # In a second pass, since no leaf can be made of a tensor that is being traced without its writes.
        plain = make_fx(functionalize(traced), decomposition_table=DECOMPOSED)(*examples)
    plain.graph.eliminate_dead_code()
    return plain.graph
