"""The exact online learner's errors one gradient step after the other, each step one compiled call.

    (x_t, g_t)  = step(k_t, v_t, ..; x_<t, g_<t; W_0)    factors of every weight, given the block's earlier ones
    (dk_t, ..)  = pull(the same; dx, dg)                 its vector-Jacobian product, the step itself recomputed inside

Both are traced from `engine/errors.py`, so nothing here knows any choice's formula. A product of one row is traced as a
sum, which the compiler fuses with all that stands around it: a step is a single kernel. What the gradient in W_0 would be,
outer products at every step, is left to matrix products over the block, of what each read took and gave back.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.design import Design
from miras.engine.chunk import run_chunks
from miras.engine.errors import Factors, Past, Steps, masked_product, raw_errors, scaled
from miras.engine.problem import MemoryState, Problem
from miras.kernels.graph import Graph, Spec, Untraceable, examples_of, graph_of, made, specs_of
from miras.memory import WeightShape


def run_online(problem: Problem, state: MemoryState, tile: int, compiled: bool) -> tuple[Tensor, MemoryState]:
    """Outputs [B, H, N, V] and the final state of a design with refresh 1, by blocks of `tile` steps."""
    design, early = problem.design, _key_readers(problem)
    step = OnlineStep(
        design,
        (design.memory, design.bias),
        tuple(problem.shapes.items()),
        early,
        (*(gate.name for gate in design.bias.gates), *(("smoothing",) if design.bias.implicit else ())),
        tuple(problem.slow),
        design.learning.slots,
        design.anchor == "initial",
        tile,
        compiled,
    )
    return run_chunks(problem, state, "substituted", tile, step.errors)


def _key_readers(problem: Problem) -> tuple[str, ...]:
    """Weights that multiply the key itself, whose initial reads wait for no earlier step."""
    assert problem.design.memory is not None
    k, found = problem.k[:, :, :1], []

    def linear(name: str, x: Tensor) -> Tensor:
        if x is k:
            found.append(name)
        return x.new_zeros(*x.shape[:-1], problem.shapes[name].d_out)

    problem.design.memory(k, linear, problem.slow)
    return tuple(found)


@dataclass(frozen=True)
class OnlineStep:
    """One gradient step of a block on a flat list of tensors, every weight's factors [B, H, 1, d] of it.

    rows: k, v, lr, gates by name, initial reads of the `early` weights (those that multiply the key), mix; then the slow
    parameters; the factors x, g [B, H, tile, d] of each weight so far; and what is constant over the steps' gradients:
    carry by slot, anchors and slots of the other weights. Steps are equal if the `facts` of their designs are.
    """

    design: Design = field(compare=False)
    facts: tuple[object, ...]
    shapes: tuple[tuple[str, WeightShape], ...]
    early: tuple[str, ...]
    gates: tuple[str, ...]
    slow: tuple[str, ...]
    num_slots: int
    anchored: bool
    tile: int
    compiled: bool

    @property
    def late(self) -> tuple[str, ...]:
        """Weights that multiply something else than the key."""
        return tuple(name for name, _ in self.shapes if name not in self.early)

    @property
    def num_rows(self) -> int:
        return 4 + len(self.gates) + len(self.early)

    @property
    def num_leaves(self) -> int:
        """Inputs whose gradients are taken step by step."""
        return self.num_rows + len(self.slow) + 2 * len(self.shapes)

    def errors(self, design: Design, shapes: dict[str, WeightShape], steps: Steps, past: Past) -> dict[str, Factors]:
        """`substituted_errors` of a block of at most `tile` steps."""
        rows = [steps.k, steps.v, steps.lr, *(steps.gates[name] for name in self.gates)]
        rows += [past.initial(name, steps.k, shapes[name]) for name in self.early]
        constant = [*past.carry, *(past.anchor[name] for name in self.late if self.anchored)]
        constant += [z for name in self.late for z in past.slots[name]]
        found = iter(_Block.apply(self, *rows, past.mix, *(steps.slow[name] for name in self.slow), *constant))
        return {name: Factors(next(found), next(found)) for name in shapes}

    def past(self, mix: Tensor, constant: Sequence[Tensor]) -> Past:
        """What the late weights' products read."""
        tensors = iter(constant)
        carry = [next(tensors) for _ in range(self.num_slots)]
        anchor = {name: next(tensors) for name in self.late} if self.anchored else {}
        return Past(anchor, {name: [next(tensors) for _ in range(self.num_slots)] for name in self.late}, carry, mix)

    def raw(self, flat: Sequence[Tensor], probes: dict[str, tuple[Tensor, Tensor]]) -> tuple[dict[str, Factors], Tensor]:
        """Factors of the step without rates, and the rates; `probes` by weight are added to what a read gives [.., d_out],
        and to the gradient [.., d_in] that it hands back, so that the gradients in them are known."""
        tensors = iter(flat)
        k, v, lr, *gates = (next(tensors) for _ in range(3 + len(self.gates)))
        early = {name: next(tensors) for name in self.early}
        mix, slow = next(tensors), {name: next(tensors) for name in self.slow}
        earlier = {name: Factors(next(tensors), next(tensors)) for name, _ in self.shapes}
        past, shapes = self.past(mix, list(tensors)), dict(self.shapes)

        def linear(name: str, x: Tensor) -> Tensor:
            if name in early:
                y = early[name]
            elif name in probes:
                given, back = probes[name]
                x = _Tapped.apply(x, back)
                y = past.initial(name, x, shapes[name]) + given
            else:
                y = past.initial(name, x, shapes[name])
            return y + masked_product(x, earlier[name], mix, shapes[name].channel_axis)

        steps = Steps(k, v, lr, dict(zip(self.gates, gates, strict=True)), slow)
        return raw_errors(self.design, shapes, steps, linear), lr

    def __call__(self, *flat: Tensor) -> tuple[Tensor, ...]:
        """x, g of every weight."""
        return self.scaled(*self.raw(flat, {}))

    def scaled(self, raw: dict[str, Factors], lr: Tensor) -> tuple[Tensor, ...]:
        return tuple(x for pair in scaled(raw, lr, dict(self.shapes)).values() for x in pair)

    def pull(self, *flat: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the leaves, those in earlier factors added to the totals given; then for each late weight what a read
        took and what it gave back, and the gradients in what it gave and in what it took back: x, dy, dx', g.

        flat: the step's inputs, the gradients of its results, and the totals [B, H, tile, d].
        """
        leaves = [x.detach().requires_grad_() for x in flat[: self.num_leaves]]
        rest, count = flat[self.num_leaves :], 2 * len(self.shapes)
        constant, grads, totals = rest[: -2 * count], rest[-2 * count : -count], rest[-count:]
        shapes, k = dict(self.shapes), flat[0]

        def probe(width: int) -> Tensor:
            return k.new_zeros(*k.shape[:-1], width).requires_grad_()

        probes = {name: (probe(shapes[name].d_out), probe(shapes[name].d_in)) for name in self.late}
        with torch.enable_grad():
            raw, lr = self.raw([*leaves, *constant], probes)
            wanted = [*leaves, *(x for pair in probes.values() for x in pair)]
            reached = [(x, grad) for x, grad in zip(self.scaled(raw, lr), grads, strict=True) if x.requires_grad]
            results, above = zip(*reached, strict=True)
            found = list(torch.autograd.grad(results, wanted, above, materialize_grads=True))
        start = self.num_leaves - count
        found[start : start + count] = [a + b for a, b in zip(totals, found[start:], strict=False)]
        reads = iter(found[self.num_leaves :])
        pairs = [(raw[name].x, next(reads), next(reads), raw[name].g) for name in self.late]
        return (*found[: self.num_leaves], *(x for pair in pairs for x in pair))


class _Tapped(torch.autograd.Function):
    """x as it is; the probe is added to the gradient that comes back to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probe: Tensor) -> Tensor:
        ctx.save_for_backward(probe)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad + ctx.saved_tensors[0], None


class _Block(torch.autograd.Function):
    """The steps of a block in turn, and their pull-backs in reverse."""

    @staticmethod
    def forward(ctx: Any, step: OnlineStep, *flat: Tensor) -> tuple[Tensor, ...]:
        rows, slow, carry, rest = _split(step, flat)
        length, found = flat[0].shape[2], _buffers(step, flat[0])
        first = [*rows[0], *slow, *found, *carry[0], *rest]
        graph = made(_forward_graph(step, specs_of(first)))
        if any(ctx.needs_input_grad):
            # Made here, where one that cannot be has another path to go to.
            made(_backward_graph(step, specs_of(first)))
        for t in range(length):
            for whole, row in zip(found, graph(*rows[t], *slow, *found, *carry[t], *rest), strict=True):
                whole[:, :, t : t + 1] = row
        found = [x[:, :, :length] for x in found]
        ctx.step = step
        ctx.save_for_backward(*flat, *found)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise RuntimeError("path='fused' has no second derivatives (create_graph=True); path='substituted' has")
        step: OnlineStep = ctx.step
        count = len(grads)
        saved = ctx.saved_tensors
        flat, found = saved[:-count], saved[-count:]
        rows, slow, carry, rest = _split(step, flat)
        length = flat[0].shape[2]
        found, totals = ([_padded(x, step.tile) for x in group] for group in (found, grads))
        graph = made(_backward_graph(step, specs_of([*rows[0], *slow, *found, *carry[0], *rest])))
        results: list[Sequence[Tensor]] = []
        for t in reversed(range(length)):
            here = [x[:, :, t : t + 1].contiguous() for x in totals]
            results.append(graph(*rows[t], *slow, *found, *carry[t], *rest, *here, *totals))
            totals = results[-1][step.num_leaves - count : step.num_leaves]
        by_input = list(zip(*reversed(results), strict=True))
        back = [torch.cat(x, dim=2) for x in by_input[: step.num_rows - 1]]
        back.append(torch.cat(by_input[step.num_rows - 1], dim=-2)[..., :length])
        back += [torch.stack(x).sum(0) for x in by_input[step.num_rows : step.num_rows + len(slow)]]
        reads = [torch.cat(x, dim=2) for x in by_input[step.num_leaves :]]
        return (None, *back, *_pull_reads(step, flat[step.num_rows + len(slow) :], reads))


def _pull_reads(step: OnlineStep, constant: Sequence[Tensor], reads: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients in carry, anchors and slots, from every late weight's x, dy, dx', g over the block."""
    if not reads:
        return [None] * len(constant)
    shapes = dict(step.shapes)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in constant]
        past, given, grads = step.past(reads[0], leaves), [], []
        for index, name in enumerate(step.late):
            x, dy, dx, g = reads[4 * index : 4 * index + 4]
            given += [past.initial(name, x, shapes[name]), past.initial(name, dx, shapes[name])]
            grads += [dy, g]
        return list(torch.autograd.grad(given, leaves, grads, materialize_grads=True))


def _split(
    step: OnlineStep, flat: Sequence[Tensor]
) -> tuple[list[tuple[Tensor, ...]], list[Tensor], list[tuple[Tensor, ...]], list[Tensor]]:
    """A block's rows by step, slow parameters, carry by step, anchors and slots."""
    a = step.num_rows
    b = a + len(step.slow)
    c = b + step.num_slots
    mix = F.pad(flat[a - 1], (0, step.tile - flat[a - 1].shape[-1]))
    rows = [*(_rows(x, 2) for x in flat[: a - 1]), _rows(mix, -2)]
    carry = [_rows(x, -1) for x in flat[b:c]]
    return (
        list(zip(*rows, strict=True)),
        [x.contiguous() for x in flat[a:b]],
        list(zip(*carry, strict=True)),
        [x.contiguous() for x in flat[c:]],
    )


def _rows(x: Tensor, axis: int) -> list[Tensor]:
    """One tensor a step, laid out by rows."""
    return [row.unsqueeze(axis) for row in x.movedim(axis, 0).contiguous().unbind(0)]


def _padded(x: Tensor, length: int) -> Tensor:
    """x [B, H, b, d] with zeros after its b steps."""
    return F.pad(x, (0, 0, 0, length - x.shape[2])).contiguous()


def _buffers(step: OnlineStep, k: Tensor) -> list[Tensor]:
    """Zeros [B, H, tile, d] for the factors of every weight."""
    widths = [width for _, shape in step.shapes for width in (shape.d_in, shape.d_out)]
    return [k.new_zeros(*k.shape[:2], step.tile, width) for width in widths]


@functools.lru_cache(maxsize=64)
def _forward_graph(step: OnlineStep, specs: tuple[Spec, ...]) -> Graph | Untraceable:
    """The step as a graph of tensor operations, or why there is none."""
    return graph_of(step, examples_of(specs), step.compiled, SUMS)


@functools.lru_cache(maxsize=64)
def _backward_graph(step: OnlineStep, specs: tuple[Spec, ...]) -> Graph | Untraceable:
    """Its pull-back."""
    examples = examples_of(specs)
    totals = _buffers(step, examples[0])
    grads = [x[:, :, :1].contiguous() for x in totals]
    return graph_of(step.pull, [*examples, *grads, *totals], step.compiled, SUMS)


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """a [n, m, k] @ b [n, k, p] without a matrix product."""
    if a.shape[2] == 1:
        return a * b
    if a.shape[1] == 1:
        return (a.mT * b).sum(1, keepdim=True)
    return (a.unsqueeze(-1) * b.unsqueeze(1)).sum(2)


SUMS = {torch.ops.aten.bmm.default: _sum_of_products}
"""Products as sums, for few rows."""
