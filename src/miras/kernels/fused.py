"""The fused path: whole windows of the block-parallel engine as one compiled step with a compiled pull-back.

    (o, z')      = step(x, w, z)            a few windows: inputs x, weights w, slots z at the start, z' at the end
    (dx, dw, dz) = pull(x, w, z, do, dz')   its vector-Jacobian product, the step itself recomputed inside

Both are traced once for each shape from the engine (`engine/chunk.py`) and torch's own derivatives into plain graphs of
tensor operations, so nothing here knows any choice's formula, and torch.compile fuses all that stands between the matrix
products. One autograd function scans the step over the sequence; it keeps the inputs and the slots before every step.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from miras.design import Design
from miras.engine.chunk import Slots, run_blocks, run_chunks
from miras.engine.problem import MemoryState, Problem
from miras.kernels.graph import Graph, Spec, Table, Untraceable, examples_of, graph_of, made, specs_of, unwatched
from miras.memory import WeightShape

STEP_LENGTH = 16
"""Fewest gradient steps a compiled step takes, where a window has fewer: below it calls cost more than they do."""

MAX_WINDOW = 256
"""Longest window that is compiled as one step: its graph grows with the number of its blocks."""

MIN_WORK = 2**28
"""Products of a weight and an input that are worth the tens of seconds of compiling, once a shape (cached on disk)."""

_least_work: ContextVar[int | None] = ContextVar("least_work", default=None)


@dataclass(frozen=True)
class Step:
    """`length` gradient steps of a design, from one window's start to another's end, on flat lists of tensors.

    sequences: q, k, v, lr, log_decay, then gates by name; shared: weights by name, then slow parameters; slots: those of
    the first weight, of the second, and so on. Steps are equal if the `facts` of their designs are.
    """

    design: Design = field(compare=False)
    facts: tuple[object, ...]
    shapes: tuple[tuple[str, WeightShape], ...]
    gates: tuple[str, ...]
    slow: tuple[str, ...]
    length: int
    tile: int
    compiled: bool

    @property
    def num_sequences(self) -> int:
        return 5 + len(self.gates)

    @property
    def num_inputs(self) -> int:
        """Sequences and shared tensors."""
        return self.num_sequences + len(self.shapes) + len(self.slow)

    def __call__(self, *flat: Tensor) -> tuple[Tensor, ...]:
        """Outputs [B, H, length, V], then the slots at the end."""
        shapes, names, count = dict(self.shapes), [name for name, _ in self.shapes], self.design.learning.slots
        tensors = iter(flat)
        q, k, v, lr, log_decay = (next(tensors) for _ in range(5))
        gates, weights, slow = ({name: next(tensors) for name in group} for group in (self.gates, names, self.slow))
        problem = Problem(self.design, q, k, v, lr, log_decay, gates, weights, slow, shapes)
        slots = {name: [next(tensors) for _ in range(count)] for name in names}
        scan = Slots(slots, {name: z[0] for name, z in slots.items()})
        out = run_blocks(problem, scan, 0, "frozen", self.tile)
        return (out, *(z for name in names for z in scan.slots[name]))


def run_fused(problem: Problem, state: MemoryState, tile: int, compiled: bool, handed: bool) -> tuple[Tensor, MemoryState]:
    """Outputs [B, H, N, V] and the final state: whole windows fused, what is left at either end block by block.

    A state that was `handed` over may have a graph in which its slots and its gradient point are apart; the first window,
    read from both, then stays out too.
    """
    refresh, total = problem.design.refresh, problem.num_steps
    start = min(-int(state.phase[0]) % refresh, total)
    if start == 0 and handed and any(x.requires_grad for x in state.point.values()):
        start = min(refresh, total)
    length = refresh * -(-STEP_LENGTH // refresh)
    stop = start + (total - start) // length * length
    pieces: list[Tensor] = []
    for begin, end in ((0, start), (start, stop), (stop, total)):
        if begin == end:
            continue
        part = problem.mapped(lambda x, begin=begin, end=end: x[:, :, begin:end])
        if begin == start and end == stop:
            out, state = _run_windows(part, state, length, tile, compiled)
        else:
            out, state = run_chunks(part, state, "frozen", tile)
        pieces.append(out)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2), state


def facts_of(design: Design) -> tuple[object, ...]:
    """What of a design the engine's arithmetic depends on."""
    choices = (design.memory, design.bias, design.retention, design.learning)
    return (*choices, design.refresh, design.gradient_at, design.link_at, design.anchor)


def unfit(design: Design) -> str | None:
    """Why a design's windows, or with refresh 1 its steps (`kernels/online.py`), are not traced; None where they are."""
    assert design.memory is not None and design.retention is not None
    if design.memory.linear and design.refresh > 1:
        return f"memory {design.memory.kind} is linear: it has little between its products to fuse"
    if design.link_at == "token" and not (design.retention.identity or design.retention.scales):
        return f"retention {design.retention.kind} is linked at every token, which forms weights a token"
    if design.refresh > MAX_WINDOW:
        return f"refresh={design.refresh}: windows of more than {MAX_WINDOW} steps are not compiled as a whole"
    try:
        hash(facts_of(design))
    except TypeError as error:
        return f"its compiled graphs are kept by design, and one of its choices cannot be hashed ({error})"
    return None


def unprofitable(
    device: torch.device, work: int | None = None, *, packed: bool = False, per_channel: bool = False
) -> str | None:
    """Why the path would not pay here; None where it does, or where the `work` (see `work_of`) is not known."""
    if device.type != "cpu":
        return f"it has been measured on CPUs only, not on {device.type}"
    if per_channel:
        return "it has not been measured with rates or decays per channel, which take small blocks"
    if packed:
        return "packed sequences end apart, and every number of rows would be compiled anew"
    return uncompiled(work)


def uncompiled(work: int | None) -> str | None:
    """Why the path, taken all the same, would run its graphs as they are; None where it compiles them, on any device."""
    if not has_compiler():
        return "no C++ compiler (g++ or clang++, or the one in $CXX), which torch.compile needs"
    return too_little(work, MIN_WORK)


def too_little(work: int | None, least: int) -> str | None:
    """Why some work does not pay for compiling where that takes at least so much, or what `compiled_from` says."""
    asked = _least_work.get()
    least = least if asked is None else asked
    if work is not None and work < least:
        return f"{work:.1e} products of a weight and an input are not worth compiling for ({least:.1e} are)"
    return None


@contextmanager
def compiled_from(work: int | None) -> Generator[None]:
    """Within it whatever takes at least this much `work` is compiled (None: as always), for a small model's many steps."""
    token = _least_work.set(work)
    try:
        yield
    finally:
        _least_work.reset(token)


def work_of(design: Design, k: Tensor, v: Tensor) -> int:
    """Products of a weight and an input in one pass over a sequence with keys k [B, *, *, K] and values v [B, *, *, V]."""
    assert design.memory is not None
    shapes = design.memory.weights(k.shape[-1], v.shape[-1])
    return k.shape[:3].numel() * sum(shape.d_in * shape.d_out for shape in shapes.values())


@functools.cache
def has_compiler() -> bool:
    """Whether torch.compile finds a C++ compiler."""
    return any(shutil.which(name) is not None for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def _run_windows(problem: Problem, state: MemoryState, length: int, tile: int, compiled: bool) -> tuple[Tensor, MemoryState]:
    """The same for whole windows from a window's start."""
    step = Step(
        problem.design,
        facts_of(problem.design),
        tuple(problem.shapes.items()),
        tuple(problem.gates),
        tuple(problem.slow),
        length,
        tile,
        compiled,
    )
    sequences = [problem.q, problem.k, problem.v, problem.lr, problem.log_decay, *problem.gates.values()]
    slots = [z for name in problem.shapes for z in state.slots[name].unbind(2)]
    out, *ends = _Scan.apply(step, *sequences, *problem.weights.values(), *problem.slow.values(), *slots)
    count = problem.design.learning.slots
    final = {name: ends[i * count : (i + 1) * count] for i, name in enumerate(problem.shapes)}
    return out, MemoryState(
        {name: torch.stack(z, dim=2) for name, z in final.items()},
        {name: z[0] for name, z in final.items()},
        state.phase * 0,
    )


class _Scan(torch.autograd.Function):
    """A step over the sequence, and its pull-back in reverse."""

    @staticmethod
    def forward(ctx: Any, step: Step, *flat: Tensor) -> tuple[Tensor, ...]:
        sequences, shared, slots = _split(step, flat)
        steps = _steps(sequences, step.length)
        specs = specs_of([*steps[0], *shared, *slots])
        graph = made(_forward_graph(step, specs))
        ctx.step, kept, learned = step, [], any(ctx.needs_input_grad)
        if learned:
            # Made here, where one that cannot be has another path to go to.
            made(_backward_graph(step, specs, _needed(ctx, step)))
        pieces: list[Tensor] = []
        for inputs in steps:
            kept += slots if learned else []
            out, *slots = graph(*inputs, *shared, *slots)
            pieces.append(out)
        if learned:
            ctx.save_for_backward(*sequences, *shared, *kept)
        return (torch.cat(pieces, dim=2), *slots)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *grad_slots: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise RuntimeError("path='fused' has no second derivatives (create_graph=True); path='frozen' has")
        step: Step = ctx.step
        sequences, shared, kept = _split(step, ctx.saved_tensors)
        steps, needed, count = _steps([*sequences, grad_out], step.length), _needed(ctx, step), len(grad_slots)
        graph = made(_backward_graph(step, specs_of([*steps[0][:-1], *shared, *kept[:count]]), needed))
        of_sequences = sum(needed[: step.num_sequences])
        totals = [torch.zeros_like(x) for x, need in zip(shared, needed[step.num_sequences :], strict=True) if need]
        carried, pieces = [x.contiguous() for x in grad_slots], []
        for *inputs, grad in reversed(steps):
            slots, kept = kept[-count:], kept[:-count]
            found = graph(*inputs, *shared, *slots, grad, *carried, *totals)
            pieces.append(found[:of_sequences])
            totals, carried = found[of_sequences:-count], found[-count:]
        joined = [torch.cat(x, dim=2) for x in zip(*reversed(pieces), strict=True)]
        grads = iter([*joined, *totals])
        return (None, *(next(grads) if need else None for need in needed), *carried)


def _running_sum(x: Tensor, dim: int) -> Tensor:
    """`cumsum` as a masked sum, which is compiled with what surrounds it; of the steps of a window, so of few numbers."""
    x = x.movedim(dim, -1)
    past = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.bool, device=x.device).tril()
    return torch.where(past, x.unsqueeze(-2), 0.0).sum(-1).movedim(-1, dim)


FUSED: Table = {torch.ops.aten.cumsum.default: _running_sum}


def _needed(ctx: Any, step: Step) -> tuple[bool, ...]:
    """Which inputs need a gradient."""
    return tuple(ctx.needs_input_grad[1 : 1 + step.num_inputs])


def _split(step: Step, flat: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Sequences, shared tensors and slots of a flat list."""
    a, b = step.num_sequences, step.num_inputs
    return list(flat[:a]), [x.contiguous() for x in flat[a:b]], [x.contiguous() for x in flat[b:]]


def _steps(sequences: Sequence[Tensor], length: int) -> list[tuple[Tensor, ...]]:
    """The parts [B, H, length, ...] of sequences [B, H, N, ...] that each step takes, each laid out by rows."""
    parts = (x.unflatten(2, (-1, length)).movedim(2, 0).contiguous().unbind() for x in sequences)
    return list(zip(*parts, strict=True))


@functools.lru_cache(maxsize=64)
def _forward_graph(step: Step, specs: tuple[Spec, ...]) -> Graph | Untraceable:
    """The step as a graph of tensor operations, or why there is none (kept too, so that it is tried once)."""
    return graph_of(step, examples_of(specs), step.compiled, FUSED)


@functools.lru_cache(maxsize=64)
@unwatched()
def _backward_graph(step: Step, specs: tuple[Spec, ...], needed: tuple[bool, ...]) -> Graph | Untraceable:
    """Its pull-back: gradients in the sequences that need one, totals that the shared tensors' add to, then in all slots."""
    examples, split = examples_of(specs), sum(needed[: step.num_sequences])

    def pull(*flat: Tensor) -> tuple[Tensor, ...]:
        inputs = [x.detach() for x in flat[: len(specs)]]
        leaves = [x.requires_grad_() for x, need in zip(inputs, needed, strict=False) if need]
        leaves += [x.requires_grad_() for x in inputs[step.num_inputs :]]
        with torch.enable_grad():
            results = step(*inputs)
            reached = [(x, grad) for x, grad in zip(results, flat[len(specs) :], strict=False) if x.requires_grad]
            outputs, grads = zip(*reached, strict=True)
            found = torch.autograd.grad(outputs, leaves, grads, materialize_grads=True)
        totals = flat[len(specs) + len(results) :]
        added = (total + x for total, x in zip(totals, found[split:], strict=False))
        return (*found[:split], *added, *found[split + len(totals) :])

    with torch.no_grad():
        grads = [torch.zeros_like(x) for x in step(*examples)]
        shared, wanted = examples[step.num_sequences : step.num_inputs], needed[step.num_sequences :]
        totals = [torch.zeros_like(x) for x, need in zip(shared, wanted, strict=True) if need]
        return graph_of(pull, [*examples, *grads, *totals], step.compiled, FUSED)
