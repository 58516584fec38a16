"""One block of gradient steps and its pull-back, traced, for the programs that scan them over a sequence.

    (o, z', r')             = block(x, w, z, r)                inputs x, shared weights w, slots z, gradient point r
    (dx, dw, dz, dr)        = pull(x, w, z, r, do, dz', dr')   its vector-Jacobian product, the block recomputed inside

A window of `refresh` steps is one block, or several of which the last ends it. Both programs run one instance a sequence
and head, carry the slots in float32 from block to block, and are generated from these graphs, so that nothing here knows any
choice's formula. Where every block ends a window, r is z's first slot.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.func import functionalize
from torch.fx import Graph

from miras.design import Design
from miras.engine.chunk import Run, Slots, scan_run
from miras.engine.problem import Problem
from miras.kernels.graph import trace
from miras.memory import WeightShape

aten = torch.ops.aten


def _unbind(x: Tensor, dim: int = 0) -> list[Tensor]:
    return [x.select(dim, index) for index in range(x.shape[dim])]


def _split(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    return [x.narrow(dim, start, min(size, x.shape[dim] - start)) for start in range(0, x.shape[dim], size)]


DECOMPOSED: Any = {aten.unbind.int: _unbind, aten.split.Tensor: _split} | get_decompositions(
    [
        *(aten.gelu, aten.gelu_backward, aten.silu, aten.silu_backward, aten.sigmoid_backward, aten.tanh_backward),
        *(aten._softmax, aten._softmax_backward_data, aten.softshrink, aten.threshold_backward),
        *(aten.relu, aten.softplus, aten.softplus_backward, aten.masked_fill, aten.rsub, aten.addcmul, aten.addcdiv),
    ]
)
"""Operations written as simpler ones, all but one by torch itself."""


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
        return max(self.design.refresh // self.length, 1)

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
        moving = self.length > 1 and self.design.refresh == 1 and not constant_gradients(self.design)
        out = scan_run(problem, scan, Run(0, 1, self.length, ends), "substituted" if moving else "frozen")
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


def constant_gradients(design: Design) -> bool:
    """Whether gradients are the same at any weights."""
    assert design.memory is not None
    return design.memory.linear and design.bias.slope == "constant"


def identifier(name: str) -> str:
    """A tensor's name in a program."""
    return name.replace(".", "_")


def traced(block: Block, ends: bool) -> Graph:
    """The block's operations."""
    return _graph(functools.partial(block, ends), block.examples())


def pulled(block: Block, ends: bool, needed: tuple[bool, ...]) -> Graph:
    """Those of its pull-back."""
    examples = block.examples()
    with torch.no_grad():
        results = [torch.zeros_like(x) for x in block(ends, *examples)]
    return _graph(functools.partial(block.pull, ends, needed), [*examples, *results])


def _graph(function: Callable[..., tuple[Tensor, ...]], examples: Sequence[Tensor]) -> Graph:
    """The operations of a function, without writes into tensors."""
    # In a second pass, since no leaf can be made of a tensor that is being traced without its writes.
    plain = trace(functionalize(trace(function, examples)), examples, DECOMPOSED)
    plain.graph.eliminate_dead_code()
    return plain.graph
