"""The matrix products that a design's block formula consists of: their FLOPs, and the time of them alone.

Derived from the memory (traced once) and the path's blocks. Not counted: elementwise work, triangular solves, the small
systems of a learning rule (momentum multiplies masks of a block's size), what a retention or a learning rule does at window
ends, and what gates per channel cost more than gates per head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from miras.bench.case import DECODED, Case
from miras.design import Design
from miras.engine import plan
from miras.engine.chunk import Run, plan_runs
from miras.engine.dispatch import refusal

FORMULAS = ("attention", "triangular", "substituted", "frozen", "recurrent")
"""Paths whose products are known here; any other is taken to compute those of the first one that accepts the design."""

QUERIES = 128
"""Queries that the products of softmax attention take at once."""


class Product(NamedTuple):
    """`times` products [batch, m, k] @ [batch, k, n]; `gradients` of its two factors need a gradient."""

    batch: int
    m: int
    k: int
    n: int
    times: int = 1
    gradients: int = 2

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.k * self.n * self.times


class Factor(NamedTuple):
    """A fast weight in a memory's forward pass: its sizes, and whether its input is inner (depends on an earlier product).

    `constant`: its input depends on nothing (fast biases).
    """

    d_in: int
    d_out: int
    inner: bool
    constant: bool


def formula(design: Design, path: str | None = None) -> str | None:
    """The block formula of a design, by the path that is named after it; None where it runs token by token only."""
    if path in FORMULAS:
        return path
    return next((name for name in FORMULAS if refusal(name, design) is None), None)


def products(case: Case, mode: str, path: str | None = None) -> list[Product]:
    """The products of the formula's forward pass, by `path` (None: the design's own)."""
    design, path = case.design, formula(case.design, path)
    assert path is not None
    if not design.parametric:
        return _attention(case, mode)
    key_dim, value_dim = design.inputs.memory_widths(case.head_dim)
    chosen, n = plan(design, path, per_channel_gates(design)), design.learning.micro_steps
    runs = plan_runs(case.tokens * n, 0, design.refresh, chosen.tile)
    if mode == "decode":
        places = range(case.tokens * n, (case.tokens + DECODED) * n, n)
        runs = [run for place in places for run in plan_runs(n, place % design.refresh, design.refresh, chosen.tile)]
    factors = trace(design, key_dim, value_dim)
    block = _Block(design, case.batch, case.heads, factors)
    return [p for run in runs for p in block.products(run, chosen.path)]


def flops(case: Case, mode: str, path: str | None = None) -> int:
    """FLOPs of these products in a mode: without anything computed twice."""
    backward = mode == "forward+backward"
    return sum(p.flops * (1 + p.gradients * backward) for p in products(case, mode, path))


def floor_flops(case: Case, mode: str, path: str | None = None) -> int:
    """FLOPs of `floor`."""
    again = flops(case, "forward", path) if mode == "forward+backward" else 0
    return flops(case, mode, path) + again


def operand_type(case: Case) -> torch.dtype:
    """The type of the floor's operands: the case's on a GPU; on a CPU, where our paths compute in it, float32 at least."""
    if case.device.startswith("cuda") or case.dtype == "float64":
        return case.torch_dtype
    return torch.float32


def floor(case: Case, mode: str, path: str | None = None) -> Callable[[], None]:
    """A function that computes these products and nothing else.

    Forward and backward: the forward products twice (an engine that keeps no intermediate results recomputes them) and two
    more for the gradients. Operands are of `operand_type`, and reused from product to product, so that they lie in the
    cache where they fit.
    """
    dtype, backward = operand_type(case), mode == "forward+backward"
    merged: dict[Product, int] = {}
    for p in products(case, mode, path):
        merged[p._replace(times=1)] = merged.get(p._replace(times=1), 0) + p.times

    def operands(p: Product) -> tuple[Tensor, Tensor, Tensor]:
        sizes = ((p.m, p.k), (p.k, p.n), (p.m, p.n))
        a, b, c = (torch.rand(p.batch, *size, dtype=dtype, device=case.device) for size in sizes)
        return a, b, c

    made = [(p, times, *operands(p)) for p, times in merged.items()]

    def run() -> None:
        for p, times, a, b, c in made:
            for _ in range(times):
                torch.bmm(a, b)
                if backward:
                    torch.bmm(a, b)
                    for left, right in ((a.mT, c), (c, b.mT))[: p.gradients]:
                        torch.bmm(left, right)

    return run


def trace(design: Design, key_dim: int, value_dim: int) -> list[Factor]:
    """The fast weights of a memory's forward pass, in the order of their products."""
    memory = design.memory
    assert memory is not None
    shapes = memory.weights(key_dim, value_dim)

    def inputs(key_tracked: bool) -> Iterator[tuple[str, bool]]:
        seen: list[tuple[str, bool]] = []

        def linear(name: str, x: Tensor) -> Tensor:
            seen.append((name, x.requires_grad))
            return x.new_zeros(*x.shape[:-1], shapes[name].d_out).requires_grad_(not key_tracked) + 0 * x.sum()

        memory(torch.zeros(1, 1, key_dim, requires_grad=key_tracked), linear, {})
        return iter(seen)

    return [
        Factor(shapes[name].d_in, shapes[name].d_out, inner, not inner and not fed)
        for (name, inner), (_, fed) in zip(inputs(False), inputs(True), strict=True)
    ]


class _Block:
    """Products of the blocks of one run; see miras.engine.chunk."""

    def __init__(self, design: Design, batch: int, heads: int, factors: Sequence[Factor]) -> None:
        assert design.retention is not None
        self.design, self.batch, self.heads, self.factors = design, batch, heads, factors
        self.identity, self.scales = design.retention.identity, design.retention.scales
        self.settles = design.retention.settles or design.learning.settles

    def products(self, run: Run, path: str) -> list[Product]:
        if path == "triangular":
            errors = self._triangular(run)
        elif path == "substituted":
            errors = self._substituted(run)
        else:
            errors = self._frozen(run)
        return [*errors, *self._written(run), *self._read(run)]

    def _frozen(self, run: Run) -> Iterator[Product]:
        rows = self.batch * self.heads
        for f in self.factors:
            yield Product(rows, run.length, f.d_in, f.d_out, run.blocks, 1 if f.constant else 2)
            if f.inner:
                yield Product(rows, run.length, f.d_out, f.d_in, run.blocks)

    def _triangular(self, run: Run) -> Iterator[Product]:
        rows, b, (f,), slots = self.batch * self.heads, run.length, self.factors, self.design.learning.slots
        if self.design.bias.slope == "constant":
            return
        if self.design.anchor == "initial":
            yield Product(self.heads, run.blocks * self.batch * b, f.d_in, f.d_out)
        yield Product(run.blocks * rows, b, f.d_in, b)
        yield Product(run.blocks * rows, b, b, f.d_out)
        yield Product(run.blocks * rows, b, b, f.d_in, slots)
        yield Product(rows, b, f.d_in, f.d_out, run.blocks * slots)

    def _substituted(self, run: Run) -> Iterator[Product]:
        rows = self.batch * self.heads
        for f in self.factors:
            sides = ((f.d_in, f.d_out), (f.d_out, f.d_in)) if f.inner else ((f.d_in, f.d_out),)
            for d_in, d_out in sides:
                there = f._replace(d_in=d_in, d_out=d_out)
                # What multiplies keys is read for all steps at once.
                length = 1 if f.inner or f.constant else run.length
                yield from self._weights(there, length, run.blocks * run.length // length)
                steps = run.blocks * (run.length - 1)
                yield Product(rows, 1, d_in, run.length, steps)
                yield Product(rows, 1, run.length, d_out, steps)

    def _weights(self, f: Factor, length: int, times: int) -> Iterator[Product]:
        """x times the anchor, one large product a head, and times every slot."""
        gradients = 1 if f.constant else 2
        if self.design.anchor == "initial":
            yield Product(self.heads, self.batch * length, f.d_in, f.d_out, times, gradients)
        yield Product(self.batch * self.heads, length, f.d_in, f.d_out, times * self.design.learning.slots, gradients)

    def _written(self, run: Run) -> Iterator[Product]:
        rows, slots = self.batch * self.heads, self.design.learning.slots
        for f in self.factors:
            yield Product(rows, f.d_in, run.length, f.d_out, run.blocks * slots, 1 if f.constant else 2)

    def _read(self, run: Run) -> Iterator[Product]:
        rows, b, slots = run.blocks * self.batch * self.heads, run.length, self.design.learning.slots
        tangent = self.design.link_at == "refresh" and not self.identity
        formed = not (tangent or self.identity or (self.scales and b > 1))
        for f in self.factors:
            gradients = 1 if f.constant else 2
            if formed:
                yield Product(rows * b, f.d_in, b, f.d_out)
                yield Product(rows * b, 1, f.d_in, f.d_out, 1, gradients)
            else:
                if tangent:
                    yield Product(rows, b, f.d_in, f.d_out, 1, gradients)
                elif self.design.anchor == "initial":
                    yield Product(self.heads, run.blocks * self.batch * b, f.d_in, f.d_out, 1, gradients)
                yield Product(rows, b, f.d_in, f.d_out, slots, gradients)
                yield Product(rows, b, f.d_in, b, 1, 0 if f.constant else 2)
                yield Product(rows, b, b, f.d_out)
            if run.ends and (self.settles or tangent):
                yield Product(rows, 1, f.d_in, f.d_out, 1, gradients)


def _attention(case: Case, mode: str) -> list[Product]:
    """Scores and read-outs, `QUERIES` at a time, of the keys that any of them sees."""
    rows, d = case.batch * case.heads, case.head_dim
    window = case.design.learning.attended
    if mode == "decode":
        starts, size = range(case.tokens, case.tokens + DECODED), 1
    else:
        starts, size = range(0, case.tokens, QUERIES), QUERIES
    found: list[Product] = []
    for start in starts:
        queries = size if mode == "decode" else min(size, case.tokens - start)
        keys = start + queries
        keys = keys if window is None else min(keys, window + queries - 1)
        found += [Product(rows, queries, d, keys), Product(rows, queries, keys, d)]
    return found


def per_channel_gates(design: Design) -> bool:
    """Whether a layer of the design makes rates or decays per channel."""
    gates = (design.inputs.rate, design.inputs.decay)
    return design.parametric and (design.inputs.features.per_channel or any(g is not None and g.per_channel for g in gates))
