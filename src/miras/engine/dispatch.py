"""The public op `memorize`, and which path it takes and why (`explain`)."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from miras.design import Design
from miras.engine.attention import run_attention, run_packed
from miras.engine.checks import check_inputs, check_state, check_values
from miras.engine.chunk import run_chunks
from miras.engine.problem import AttentionState, MemoryState, Problem, build_problem
from miras.engine.ragged import run_ragged
from miras.engine.reference import run_reference
from miras.kernels import fla_ops, native, triton
from miras.kernels.fused import run_fused, uncompiled, unfit, unprofitable, work_of
from miras.kernels.graph import Untraceable
from miras.kernels.online import run_online
from miras.kernels.scan import run_scan

PATHS = ("attention", "fla", "triton", "native", "triangular", "fused", "substituted", "frozen", "recurrent", "reference")
"""Every path, fastest first; all that accept a design give the same results."""

TILES = {"triangular": 64, "substituted": 32, "fused": 64, "frozen": 64, "recurrent": 1}
CHANNEL_TILE = 16
"""Largest block where gates per channel or per-token weights make a block's work quadratic in it."""


@dataclass(frozen=True)
class Plan:
    """The path a design takes, its block length, and why each other path refused (speed only: results are the same)."""

    path: str
    tile: int
    refusals: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"path: {self.path} (blocks of {self.tile})" if self.tile > 1 else f"path: {self.path}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.refusals.items()]
        return "\n".join(lines)


def refusal(path: str, design: Design, widths: tuple[int, int] | None = None) -> str | None:
    """Why a path cannot run a design, from declared facts and, if known, the widths of k and v; None where it can."""
    if not design.parametric:
        return None if path == "attention" else "the design has no fast weights"
    assert design.memory is not None and design.retention is not None
    if path == "attention":
        return "the design has fast weights"
    if path == "reference":
        return None
    if not design.learning.linear:
        return f"learning {design.learning.kind} gives no block matrices"
    if path == "triton":
        return triton.unfit(design, widths)
    if path == "native":
        return native.unfit(design)
    settles = design.retention.settles or design.learning.settles
    if path == "fused":
        return unfit(design) if design.refresh > 1 else refusal("substituted", design) or unfit(design)
    if path in ("triangular", "substituted"):
        if not design.retention.identity:
            return f"the link of retention {design.retention.kind} is not the identity"
        constant = design.memory.linear and design.bias.slope == "constant" and not settles
        if design.refresh > 1 and not (constant and path == "triangular"):
            return f"refresh={design.refresh}: gradients stand still over a window (they move at every step with 1)"
        if settles:
            return "the state settles at every step"
        if path == "triangular" and not design.memory.linear:
            return f"memory {design.memory.kind} is not linear in its weights"
        if path == "triangular" and design.bias.slope == "general":
            return f"the gradient of bias {design.bias.kind} is not affine"
    if path == "frozen" and design.refresh == 1:
        return "refresh=1: gradients move at every step"
    if path == "recurrent" and design.refresh > 1:
        return "blocks of one step are needed with refresh=1 only"
    return fla_ops.unfit(design) if path == "fla" else None


def plan(
    design: Design,
    path: str | None = None,
    per_channel: bool = False,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    work: int | None = None,
    rows: int | None = None,
    packed: bool = False,
    widths: tuple[int, int] | None = None,
) -> Plan:
    """Choose the first path that accepts the design and pays for `work` (see `work_of`), or check the one asked for.

    `device` and `dtype` are those of the inputs, `widths` those of keys and values, `rows` is the number of sequences and
    heads, as far as they are known.

    Raises:
        ValueError: unknown path, or one that refuses the design.
    """
    device = device or torch.device("cpu")
    refusals = {name: reason for name in PATHS if (reason := refusal(name, design, widths)) is not None}
    if (reason := fla_ops.unavailable(device, dtype, widths)) is not None:
        refusals.setdefault("fla", reason)
    for name, unusable in (("triton", triton.unusable), ("native", native.unusable)):
        if (reason := unusable(device)) is not None:
            refusals.setdefault(name, reason)
    if path is None:
        refusals.setdefault("triton", triton.UNMEASURED)
        if design.parametric and (reason := native.unprofitable(design, work, rows, per_channel=per_channel)) is not None:
            refusals.setdefault("native", reason)
        reason = unprofitable(device, work, packed=packed, per_channel=per_channel)
        if reason is not None:
            refusals.setdefault("fused", reason)
        if device.type != "cuda":
            refusals.setdefault("fla", "Triton's interpreter is there to test kernels: ask for it by name")
        path = next(name for name in PATHS if name not in refusals)
    elif path not in PATHS:
        raise ValueError(f"path={path!r}; allowed: {', '.join(PATHS)}, or None to choose")
    elif path in refusals:
        able = [name for name in PATHS if name not in refusals]
        raise ValueError(f"path={path!r} refuses this design: {refusals[path]}; able: {', '.join(able)}")
    tile = TILES.get("substituted" if path == "fused" and design.refresh == 1 else path, 1)
    if path in ("fused", "frozen") and design.refresh > 1:
        tile = min(tile, design.refresh)
        assert design.retention is not None
        if design.link_at == "token" and not design.retention.identity:
            tile = min(tile, CHANNEL_TILE)
    return Plan(path, min(tile, CHANNEL_TILE) if per_channel else tile, refusals)


def explain(
    design: Design,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    per_channel: bool = False,
    widths: tuple[int, int] | None = None,
) -> Plan:
    """Which path runs a design and why the others refused; print it.

    Only "native" and "fused" depend on the amount of work: what is said of them holds for long sequences of enough heads,
    and others run as the next path that accepts the design. "fla" and "triton" depend on the `widths` of keys and values
    too, and compute products of half-precision inputs in half precision ("fla" those of float32 ones mostly in TF32); every
    other path computes them in float32.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"dtype={dtype}; must be a floating-point type")
    return plan(design, per_channel=per_channel, device=torch.device(device), dtype=dtype, widths=widths)


def memorize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    design: Design,
    weights: Mapping[str, Tensor] | None = None,
    lr: Tensor | None = None,
    log_decay: Tensor | None = None,
    gates: Mapping[str, Tensor] | None = None,
    initial_state: MemoryState | AttentionState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    path: str | None = None,
    check: bool = True,
) -> tuple[Tensor, MemoryState | AttentionState | None]:
    """Write (k_t, v_t) into a memory that learns, and read it at q_t, for every token: o_t = M(W_t; q_t).

    Args:
        q, k: [B, T, H, K]; v: [B, T, H, V], of one floating dtype. With a learning rule of n micro-steps a token, k, v, lr
            and gates have T * n positions, q and log_decay T.
        design: the four choices; see `miras.Design`.
        weights: initial dual state A_0, {name: [H, d_in, d_out]}, and slow norm parameters as extra names [H, V].
            Softmax attention: "keys" [H, N, K] and "values" [H, N, V] of its N persistent tokens, if it has any.
        lr: rates eta >= 0, [B, T, H], or [B, T, H, C] one a channel of the model-width axis.
        log_decay: log alpha <= 0 in nats, [B, T, H] or [B, T, H, C]; None keeps everything.
        gates: what the bias and the learning declare, {name: [B, T, H]}.
        initial_state: the state that an earlier call returned; None starts from A_0.
        output_final_state: also return the state after the last token.
        cu_seqlens: [N + 1] borders of N sequences packed into one row (B = 1); states then have N rows.
        path: force one of `miras.PATHS` ("reference" is the definition); None takes the fastest that accepts the design.
        check: also check values (NaN, signs, ranges); shapes and types are always checked.

    Returns:
        out [B, T, H, V] in v's dtype (computed in float32, or float64 if given; for "fla" and "triton" see `explain`), and
        the final state or None.

    Raises:
        ValueError, TypeError: illegal shapes, types, names or values, or a path that refuses the design.

    Source: the recurrence of docs/equations.md (Miras Eq. 4 and Sec. 3).
    """
    weights, gates = weights or {}, gates or {}
    check_inputs(q, k, v, design=design, weights=weights, lr=lr, log_decay=log_decay, gates=gates, cu_seqlens=cu_seqlens)
    if check:
        check_values(q, k, v, design=design, weights=weights, lr=lr, log_decay=log_decay, gates=gates)
    per_channel = any(x is not None and x.dim() == 4 for x in (lr, log_decay))
    work = work_of(design, k, v) if design.parametric else 0
    packed, widths = cu_seqlens is not None, (k.shape[-1], v.shape[-1])
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    known: dict[str, Any] = {"work": work, "rows": rows * k.shape[2], "packed": packed, "widths": widths}
    chosen = plan(design, path, per_channel, device=k.device, dtype=k.dtype, **known)
    if initial_state is not None:
        check_state(initial_state, design, rows, k, v)
    if not design.parametric:
        assert initial_state is None or isinstance(initial_state, AttentionState)
        window = design.learning.attended
        if cu_seqlens is None:
            out, final = run_attention(q, k, v, window, initial_state, weights)
        else:
            out, final = run_packed(q, k, v, window, initial_state, weights, cu_seqlens)
        return out.to(v.dtype), final if output_final_state else None
    assert lr is not None and (initial_state is None or isinstance(initial_state, MemoryState))
    problem = build_problem(q, k, v, design=design, weights=weights, lr=lr, log_decay=log_decay, gates=gates)
    tensors = problem.tensors() + ([] if initial_state is None else initial_state.tensors())
    learned = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    # The inner gradients need autograd, which inference mode forbids; leaving it alone would switch the outer graph on.
    with torch.inference_mode(False), torch.set_grad_enabled(learned), _no_autocast(q.device.type):
        problem, past = _taken(problem, initial_state, learned)
        try:
            if chosen.path == "fla":
                out, state = _run_fla(problem, past, cu_seqlens, v.dtype, decays=log_decay is not None)
            else:
                out, state = _run(problem, chosen, past, cu_seqlens, v.dtype)
        except Untraceable as error:
            if path is not None:
                raise ValueError(f"path={path!r} cannot run this design here: {error}") from error
            plain = (name for name in PATHS[PATHS.index("triangular") :] if name != "fused")
            other = next(name for name in plain if refusal(name, design, widths) is None)
            warnings.warn(
                f"path {chosen.path!r} cannot run this design here, which runs as '{other}': {error}", stacklevel=2
            )
            out, state = _run(problem, plan(design, other, per_channel), past, cu_seqlens, v.dtype)
    return out.to(v.dtype), state if output_final_state else None


def recall(
    q: Tensor,
    *,
    design: Design,
    weights: Mapping[str, Tensor],
    state: MemoryState | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """What a memory held at the last window end, read at q [B, T, H, K] and not written: o_t = M(link(a + point); q_t).

    The rest is as in `memorize`, unchecked; without a state the memory is A_0. Outputs [B, T, H, V] in q's dtype.
    """
    if cu_seqlens is not None and state is not None:
        parts = [
            recall(q[:, start:stop], design=design, weights=weights, state=state.index_select(torch.tensor([row])))
            for row, (start, stop) in enumerate(pairwise(cu_seqlens.tolist()))
        ]
        return torch.cat(parts, dim=1)
    assert design.memory is not None
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    slow = {name: weights[name].to(dtype).unsqueeze(1) for name in design.slow_names(q.shape[-1]) if name in weights}
    point = {name: x.to(dtype) for name, x in weights.items() if name not in slow}
    if state is not None:
        anchored = design.anchor == "initial"
        point = {name: _tracked(x) + (point[name] if anchored else 0) for name, x in state.point.items()}
    with _no_autocast(q.device.type):
        linked = {name: design.link(x) for name, x in point.items()}
        out = design.memory(q.to(dtype).transpose(1, 2), lambda name, h: h @ linked[name], slow)
    return out.transpose(1, 2).to(q.dtype)


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    # Autocast would run the memory's products in half precision, whose errors its state would add up.
    usable = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if usable else nullcontext()


def _tracked(x: Tensor) -> Tensor:
    """x, copied if it was made in inference mode, where autograd cannot use it."""
    return x.clone() if x.is_inference() else x


def _taken(problem: Problem, state: MemoryState | None, learned: bool) -> tuple[Problem, MemoryState | None]:
    """What autograd can use, the state in the problem's dtype; where nothing is learned, cut off from its graph.

    Paths keep states for the backward pass of whatever needs a gradient, in a pass without gradients too.
    """

    def take(x: Tensor) -> Tensor:
        x = x.to(problem.k.dtype) if x.is_floating_point() else x
        return _tracked(x) if learned else _tracked(x).detach()

    weights, slow = ({name: take(x) for name, x in group.items()} for group in (problem.weights, problem.slow))
    return replace(problem.mapped(take), weights=weights, slow=slow), None if state is None else state.map(take)


def _run(
    problem: Problem, chosen: Plan, state: MemoryState | None, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, MemoryState]:
    n = problem.design.learning.micro_steps
    lengths = torch.full((problem.q.shape[0],), problem.num_steps)
    source = None
    if cu_seqlens is not None:
        bounds = cu_seqlens.cpu() * n
        lengths = bounds.diff()
        problem, source = _unpack(problem, bounds)
    run = run_reference
    if chosen.path == "fused":
        compiled = uncompiled(work_of(problem.design, problem.k, problem.v)) is None
        if problem.design.refresh == 1:
            run = functools.partial(run_online, tile=chosen.tile, compiled=compiled)
        else:
            run = functools.partial(run_fused, tile=chosen.tile, compiled=compiled, handed=state is not None)
    elif chosen.path == "triton":
        programs = triton.TritonPrograms(triton.operands_of(dtype))
        run = functools.partial(run_scan, programs=programs, handed=state is not None)
    elif chosen.path == "native":
        run = functools.partial(run_scan, programs=native.NativePrograms(), handed=state is not None)
    elif chosen.path != "reference":
        run = functools.partial(run_chunks, path=chosen.path, tile=chosen.tile)
    if state is None:
        state = problem.initial_state()
    out, final = run_ragged(run, problem, state, lengths)
    if source is not None:
        out = out.transpose(1, 2).flatten(0, 1)[source].unsqueeze(0)
    else:
        out = out.transpose(1, 2)
    return out[:, n - 1 :: n], final


def _run_fla(
    problem: Problem, state: MemoryState | None, cu_seqlens: Tensor | None, dtype: torch.dtype, *, decays: bool
) -> tuple[Tensor, MemoryState]:
    n = problem.design.learning.micro_steps
    if state is None:
        state = problem.initial_state()
        if cu_seqlens is not None:
            state = state.index_select(torch.zeros(len(cu_seqlens) - 1, dtype=torch.int64))
    bounds = None if cu_seqlens is None else cu_seqlens.to(problem.q.device) * n
    out, final = fla_ops.run_fla(problem, state, dtype, bounds, decays=decays)
    return out[:, n - 1 :: n], final


def _unpack(problem: Problem, bounds: Tensor) -> tuple[Problem, Tensor]:
    """A packed row as a batch of rows, padded at their ends, and where each packed step lies in the flattened batch."""
    lengths = bounds.diff()
    rows, longest = len(lengths), int(lengths.max())
    place = torch.arange(longest)
    index = (bounds[:-1, None] + place).clamp_max(problem.num_steps - 1).flatten().to(problem.q.device)

    def unpack(x: Tensor) -> Tensor:
        return x[0].index_select(1, index).unflatten(1, (rows, longest)).movedim(1, 0)

    real = (place < lengths[:, None]).flatten().nonzero().squeeze(1).to(problem.q.device)
    return problem.mapped(unpack), real
