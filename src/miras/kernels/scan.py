"""The scan of a block over a sequence, forward and in reverse, by programs that are generated for it (see `block`).

The forward program keeps the state before every `every`th block; the backward pass takes the sequence from one kept state
to the next in reverse, where the forward program first writes down the state before every block, unless all were kept, and
the backward program then pulls back through them. What is left of a window at either end of a sequence is the same scan in
blocks of one step, and so is a token while decoding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from miras.design import Design
from miras.engine.problem import MemoryState, Problem
from miras.kernels import space
from miras.kernels.block import Block
from miras.kernels.fused import facts_of
from miras.kernels.graph import Untraceable, unwatched


class Programs(Protocol):
    """What generates and launches programs. They are equal for equal blocks, and kept."""

    path: str

    def block_length(self, problem: Problem) -> int:
        """Gradient steps of a block."""
        ...

    def make(self, block: Block, needed: tuple[bool, ...] | None) -> None:
        """The forward program, or the backward one for the inputs that need a gradient. Raises Untraceable."""
        ...

    def every(self, block: Block, steps: int) -> int:
        """Of how many blocks one state is kept for the backward pass."""
        ...

    def forward(self, block: Block, tensors: Sequence[Tensor], rows: int, sizes: dict[str, int]) -> None:
        """Tensors: sequences, shared, state; the last state and those kept; outputs, not written if `read` is 0."""
        ...

    def backward(
        self, block: Block, needed: tuple[bool, ...], tensors: Sequence[Tensor], rows: int, sizes: dict[str, int]
    ) -> None:
        """Tensors: sequences, shared, states before every block; gradients of the state in pairs, of outputs, of inputs.

        Of the pairs [..., 2, ...] the current one is that of `side`: a block reads the one and writes the other.
        """
        ...


def unhashable(design: Design) -> str | None:
    """Why no program can be kept for a design; None where it can."""
    try:
        hash(facts_of(design))
    except TypeError as error:
        return f"its programs are kept by design, and one of its choices cannot be hashed ({error})"
    return None


def one_by_one(problem: Problem, *, scales: bool) -> bool:
    """Whether a block can have one step only: rates or decays per channel, links that move at every token.

    `scales`: but for those that scale weights, whose numbers a block can find without the weights of every step.
    """
    design = problem.design
    assert design.retention is not None
    linked = design.link_at == "token" and not design.retention.identity and not (scales and design.retention.scales)
    return linked or max(problem.lr.dim(), problem.log_decay.dim()) > 3


def run_scan(problem: Problem, state: MemoryState, programs: Programs, handed: bool) -> tuple[Tensor, MemoryState]:
    """Outputs [B, H, N, V] and the final state: whole windows in their blocks, what is left at either end step by step.

    A state that was `handed` over may have a graph in which its slots and its gradient point are apart.

    Raises:
        Untraceable: an operation of the design has no form in these programs, or they cannot be built or run here.
    """
    refresh, total = problem.design.refresh, problem.num_steps
    apart = handed and any(x.requires_grad for x in state.point.values())
    length = programs.block_length(problem)
    start = min(-int(state.phase[0]) % refresh, total) if length > 1 else 0
    step = max(refresh, length)
    stop = start + (total - start) // step * step if length > 1 else total
    pieces: list[Tensor] = []
    for begin, end, size in ((0, start, 1), (start, stop, length), (stop, total, 1)):
        if begin < end:
            part = problem.mapped(lambda x, begin=begin, end=end: x[:, :, begin:end])
            out, state = _run_blocks(part, state, size, apart or size < refresh, programs)
            pieces.append(out)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2), state


def _run_blocks(
    problem: Problem, state: MemoryState, length: int, apart: bool, programs: Programs
) -> tuple[Tensor, MemoryState]:
    """The same for whole blocks."""
    design, names, block = problem.design, list(problem.shapes), block_of(problem, length, apart)
    sequences = [problem.q, problem.k, problem.v, problem.lr, problem.log_decay, *problem.gates.values()]
    slots = [z for name in names for z in state.slots[name].unbind(2)]
    points = [state.point[name] for name in names] if apart else []
    phase = int(state.phase[0])
    scan = Scan(programs, block, phase // length, problem.k.shape[1])
    shared = [*problem.weights.values(), *problem.slow.values()]
    out, *ends = _Scan.apply(scan, *sequences, *shared, *slots, *points)
    count = design.learning.slots
    final = {name: ends[i * count : (i + 1) * count] for i, name in enumerate(names)}
    ends = ends[len(slots) :] if apart else [z[0] for z in final.values()]
    return out, MemoryState(
        {name: torch.stack(z, dim=2) for name, z in final.items()},
        dict(zip(names, ends, strict=True)),
        (state.phase + problem.num_steps) % design.refresh,
    )


def block_of(problem: Problem, length: int, apart: bool) -> Block:
    """So many steps of a problem."""
    return Block(
        design=problem.design,
        facts=facts_of(problem.design),
        shapes=tuple(problem.shapes.items()),
        gates=tuple(problem.gates),
        slow=tuple(problem.slow),
        widths=(problem.k.shape[-1], problem.v.shape[-1]),
        channels=(_channels(problem.lr), _channels(problem.log_decay)),
        length=length,
        apart=apart,
        dtype=problem.k.dtype,
    )


def _channels(x: Tensor) -> int | None:
    return x.shape[3] if x.dim() == 4 else None


class Scan(NamedTuple):
    """A block over a sequence whose first block is number `phase` of its window; `heads` of a sequence."""

    programs: Programs
    block: Block
    phase: int
    heads: int

    def forward(
        self, flat: Sequence[Tensor], begin: int, steps: int, every: int, read: bool, kept: list[Tensor] | None = None
    ) -> _Scanned:
        """Run blocks begin to begin + steps from the state at the end of `flat`; `kept`: where to keep states, if given."""
        block, rows, total = self.block, flat[0].shape[:2], flat[0].shape[2]
        states = flat[len(block.sequences) + len(block.shared) :]
        count = -(-steps // every)
        last = [torch.empty_like(x) for x in states]
        if kept is None:
            kept = [space.empty(x, (*rows, count, *x.shape[2:])) for x in states]
        out = flat[2].new_empty(flat[2].shape if read else (1,))
        sizes = {"begin": begin, "steps": steps, "total": total, "phase": self.phase, "heads": self.heads}
        sizes |= {"every": every, "kept": count, "read": int(read)}
        self.programs.forward(block, [*flat, *last, *kept, out], rows.numel(), sizes)
        return _Scanned(out, last, kept)

    def backward(
        self,
        flat: Sequence[Tensor],
        kept: Sequence[Tensor],
        grads: Sequence[Tensor],
        needed: tuple[bool, ...],
        begin: int,
        side: int,
    ) -> None:
        """Pull the blocks from `begin` on back whose states are `kept`; `grads`: state, outputs, then what is needed."""
        inputs, rows = flat[: len(needed)], flat[0].shape[:2].numel()
        sizes = {"begin": begin, "steps": kept[0].shape[2], "total": flat[0].shape[2], "phase": self.phase}
        sizes |= {"heads": self.heads, "side": side}
        self.programs.backward(self.block, needed, [*inputs, *kept, *grads], rows, sizes)

    def segments(
        self, inputs: Sequence[Tensor], kept: Sequence[Tensor], every: int
    ) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """From the last to the first: a number of blocks, its first, and the states before all of them."""
        steps = inputs[0].shape[2] // self.block.length
        if every == 1:
            yield 0, kept
            return
        space: list[Tensor] | None = None
        for index in reversed(range(kept[0].shape[2])):
            begin = index * every
            length = min(every, steps - begin)
            if space is not None and space[0].shape[2] != length:
                space = None
            flat = [*inputs, *(x[:, :, index].contiguous() for x in kept)]
            space = self.forward(flat, begin, length, 1, False, space).kept
            yield begin, space


class _Scanned(NamedTuple):
    """Outputs, the state after the last block, and those kept before some, [B, H, n, ...]."""

    out: Tensor
    last: list[Tensor]
    kept: list[Tensor]


class _Scan(torch.autograd.Function):
    """A scan and its pull-back in reverse, from kept state to kept state."""

    @staticmethod
    def forward(ctx: Any, scan: Scan, *flat: Tensor) -> tuple[Tensor, ...]:
        flat = tuple(x.contiguous() for x in flat)
        learned = any(ctx.needs_input_grad)
        steps = flat[0].shape[2] // scan.block.length
        every = scan.programs.every(scan.block, steps) if learned else steps
        if learned:
            # Made here, where a design that has none has another path to go to.
            scan.programs.make(scan.block, _needed(ctx, scan))
        scan.programs.make(scan.block, None)
        out, last, kept = scan.forward(flat, 0, steps, every, True)
        if learned:
            ctx.scan, ctx.every = scan, every
            ctx.save_for_backward(*flat[: len(_needed(ctx, scan))], *kept)
        return (out, *last)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *grad_state: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            path = ctx.scan.programs.path
            raise RuntimeError(f"path={path!r} has no second derivatives (create_graph=True); path='frozen' has")
        scan, needed = ctx.scan, _needed(ctx, ctx.scan)
        saved = ctx.saved_tensors  # Once: gradient checkpointing makes them anew each time.
        inputs, kept = saved[: len(needed)], saved[len(needed) :]
        rows = inputs[0].shape[:2]
        carried = [torch.stack((x, torch.empty_like(x)), dim=2) for x in grad_state]
        count = len(scan.block.sequences)
        found = [torch.empty_like(x) if need else None for x, need in zip(inputs[:count], needed, strict=False)]
        found += [
            x.new_zeros(*rows, *x.shape[1:]) if need else None
            for x, need in zip(inputs[count:], needed[count:], strict=True)
        ]
        grads = [*carried, grad_out.contiguous(), *(x for x in found if x is not None)]
        side = 0
        for begin, states in scan.segments(inputs, kept, ctx.every):
            scan.backward(inputs, states, grads, needed, begin, side)
            side = (side + states[0].shape[2]) % 2
        summed = [None if x is None else x.sum(0) for x in found[count:]]
        return (None, *found[:count], *summed, *(x[:, :, side] for x in carried))


def _needed(ctx: Any, scan: Scan) -> tuple[bool, ...]:
    """Which sequences and shared tensors need a gradient."""
    return tuple(ctx.needs_input_grad[1 : 1 + len(scan.block.sequences) + len(scan.block.shared)])


def generate(make: Callable[..., Any], *args: Any) -> None:
    """Make a program, which `make` keeps. Raises Untraceable: what a choice's own code or the translator has against it."""
    if (reason := refusal(make, *args)) is not None:
        raise Untraceable(reason)


@functools.lru_cache(maxsize=512)
def refusal(make: Callable[..., Any], *args: Any) -> str | None:
    """Why a program cannot be made, kept so that it is tried once; None where it has been."""
    try:
        with unwatched():
            make(*args)
    except Untraceable as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None
