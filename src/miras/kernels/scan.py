"""The triton path: the block scan of any memory and bias as one GPU kernel forward and one backward (see `block`).

The forward kernel keeps the state of about the square root of the number of blocks; the backward pass takes the
sequence from one kept state to the next in reverse, where the forward kernel first writes down the state before every
block, and the backward kernel then pulls back through them. Memory so grows with the square root of the length, beyond
inputs and outputs. What is left of a window at either end of a sequence, and a token while decoding, is the same scan in
blocks of one step.

A block has 16, 32 or 64 steps where the links allow it and the window is a multiple of it; with refresh 1, links at
every token, or rates and decays per channel it has one, which updates the weights in registers and so is the exact
online learner. States and everything that is no matrix product are in float32, operands in `operands_of` the inputs.

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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miras.design import Design
from miras.engine.problem import MemoryState, Problem
from miras.kernels.block import Block, Program, backward_program, forward_program
from miras.kernels.fused import facts_of
from miras.kernels.graph import Untraceable

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


def unfit(design: Design, widths: tuple[int, int] | None = None) -> str | None:
    """Why a design has no kernel, for keys and values of some `widths` if they are known; None where it has one."""
    assert design.memory is not None
    try:
        hash(facts_of(design))
    except TypeError as error:
        return f"its kernels are kept by design, and one of its choices cannot be hashed ({error})"
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


def run_scan(problem: Problem, state: MemoryState, operands: str, handed: bool) -> tuple[Tensor, MemoryState]:
    """Outputs [B, H, N, V] and the final state: whole windows in their blocks, what is left at either end step by step.

    A state that was `handed` over may have a graph in which its slots and its gradient point are apart.

    Raises:
        Untraceable: an operation of the design has no Triton form, or its kernel does not fit the device.
    """
    refresh, total = problem.design.refresh, problem.num_steps
    apart = handed and any(x.requires_grad for x in state.point.values())
    length = block_length(problem)
    start = min(-int(state.phase[0]) % refresh, total) if length > 1 else 0
    stop = total if length == 1 else start + (total - start) // refresh * refresh
    pieces: list[Tensor] = []
    for begin, end, size in ((0, start, 1), (start, stop, length), (stop, total, 1)):
        if begin < end:
            part = problem.mapped(lambda x, begin=begin, end=end: x[:, :, begin:end])
            out, state = _run_blocks(part, state, size, apart or size < refresh, operands)
            pieces.append(out)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2), state


def block_length(problem: Problem) -> int:
    """Gradient steps of a block."""
    design = problem.design
    assert design.retention is not None
    single = design.link_at == "token" and not design.retention.identity
    if single or max(problem.lr.dim(), problem.log_decay.dim()) > 3:
        return 1
    widest = max(max(shape.d_in, shape.d_out) for shape in problem.shapes.values())
    length = math.gcd(design.refresh, max(MIN_BLOCK, min(MAX_BLOCK, MAX_WORK // widest)))
    return length if length >= MIN_BLOCK else 1


def _run_blocks(problem: Problem, state: MemoryState, length: int, apart: bool, operands: str) -> tuple[Tensor, MemoryState]:
    """The same for whole blocks."""
    design, names = problem.design, list(problem.shapes)
    block = Block(
        design=design,
        facts=facts_of(design),
        shapes=tuple(problem.shapes.items()),
        gates=tuple(problem.gates),
        slow=tuple(problem.slow),
        widths=(problem.k.shape[-1], problem.v.shape[-1]),
        channels=(_channels(problem.lr), _channels(problem.log_decay)),
        length=length,
        apart=apart,
        dtype=problem.k.dtype,
    )
    sequences = [problem.q, problem.k, problem.v, problem.lr, problem.log_decay, *problem.gates.values()]
    slots = [z for name in names for z in state.slots[name].unbind(2)]
    points = [state.point[name] for name in names] if apart else []
    phase = int(state.phase[0])
    scan = Scan(block, operands, phase // length, problem.k.shape[1])
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


def _channels(x: Tensor) -> int | None:
    return x.shape[3] if x.dim() == 4 else None


class Scan(NamedTuple):
    """A block over a sequence whose first block is number `phase` of its window; `heads` of a sequence."""

    block: Block
    operands: str
    phase: int
    heads: int

    def forward(self, flat: Sequence[Tensor], begin: int, steps: int, every: int, read: bool) -> _Scanned:
        """Run blocks begin to begin + steps from the state at the end of `flat`."""
        block, rows, total = self.block, flat[0].shape[:2], flat[0].shape[2]
        states = flat[len(block.sequences) + len(block.shared) :]
        count = -(-steps // every)
        last = [torch.empty_like(x) for x in states]
        kept = [x.new_empty(*rows, count, *x.shape[2:]) for x in states]
        out = flat[2].new_empty(flat[2].shape if read else (1,))
        sizes = {"begin": begin, "steps": steps, "total": total, "every": every, "kept": count, "phase": self.phase}
        program = forward_program(block, self.operands)
        self._launch(program, rows.numel(), [*flat, *last, *kept, out], {**sizes, "READ": read})
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
        inputs = flat[: len(needed)]
        sizes = {"begin": begin, "steps": kept[0].shape[2], "total": flat[0].shape[2], "phase": self.phase, "side": side}
        program = backward_program(self.block, self.operands, needed)
        self._launch(program, flat[0].shape[:2].numel(), [*inputs, *kept, *grads], sizes)

    def _launch(self, program: Program, rows: int, tensors: Sequence[Tensor], sizes: dict[str, Any]) -> None:
        assert len(tensors) == len(program.tensors)
        kernel = _kernel(program.source)
        try:
            kernel[(rows,)](*tensors, **sizes, HEADS=self.heads, num_warps=num_warps(self.block), num_stages=1)
        except Exception as error:
            # OutOfResources and CompilationError, which are Triton's and not importable without it.
            if type(error).__module__.startswith("triton"):
                raise Untraceable(f"{type(error).__name__}: {error}") from error
            raise


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
        every = math.isqrt(steps - 1) + 1 if learned else steps
        if learned:
            # Made here, where a design that has none has another path to go to.
            _made(backward_program, scan.block, scan.operands, _needed(ctx, scan))
        _made(forward_program, scan.block, scan.operands)
        out, last, kept = scan.forward(flat, 0, steps, every, True)
        if learned:
            ctx.scan, ctx.every = scan, every
            ctx.save_for_backward(*flat[: len(_needed(ctx, scan))], *kept)
        return (out, *last)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *grad_state: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise RuntimeError("path='triton' has no second derivatives (create_graph=True); path='frozen' has")
        scan, every, needed = ctx.scan, ctx.every, _needed(ctx, ctx.scan)
        inputs, kept = ctx.saved_tensors[: len(needed)], ctx.saved_tensors[len(needed) :]
        rows, steps = inputs[0].shape[:2], inputs[0].shape[2] // scan.block.length
        carried = [torch.stack((x, torch.empty_like(x)), dim=2) for x in grad_state]
        count = len(scan.block.sequences)
        found = [torch.empty_like(x) if need else None for x, need in zip(inputs[:count], needed, strict=False)]
        found += [
            x.new_zeros(*rows, *x.shape[1:]) if need else None
            for x, need in zip(inputs[count:], needed[count:], strict=True)
        ]
        grads = [*carried, grad_out.contiguous(), *(x for x in found if x is not None)]
        side = 0
        for index in reversed(range(kept[0].shape[2])):
            begin = index * every
            flat = [*inputs, *(x[:, :, index].contiguous() for x in kept)]
            states = scan.forward(flat, begin, min(every, steps - begin), 1, False).kept
            scan.backward(flat, states, grads, needed, begin, side)
            side = (side + states[0].shape[2]) % 2
        summed = [None if x is None else x.sum(0) for x in found[count:]]
        return (None, *found[:count], *summed, *(x[:, :, side] for x in carried))


def _needed(ctx: Any, scan: Scan) -> tuple[bool, ...]:
    """Which sequences and shared tensors need a gradient."""
    return tuple(ctx.needs_input_grad[1 : 1 + len(scan.block.sequences) + len(scan.block.shared)])


def _made(make: Callable[..., Program], *args: Any) -> Program:
    """A program, or `Untraceable` with what a choice's own code or the translator had against it."""
    try:
        return make(*args)
    except Exception as error:
        raise Untraceable(f"{type(error).__name__}: {error}".splitlines()[0]) from error


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
