"""What `memorize` asks of its inputs; every error says what was given, what is allowed and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from miras.choice import require
from miras.design import Design
from miras.engine.problem import AttentionState, MemoryState, State


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    design: Design,
    weights: Mapping[str, Tensor],
    lr: Tensor | None,
    log_decay: Tensor | None,
    gates: Mapping[str, Tensor],
    cu_seqlens: Tensor | None,
) -> None:
    """Shapes, types and names. Raises ValueError or TypeError that say what was given and what is allowed."""
    _check_qkv(q, k, v, design)
    _require_one_device({"q": q, "k": k, "v": v, "lr": lr, "log_decay": log_decay, **weights, **gates})
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, q)
    if not design.parametric:
        if design.learning.num_persistent > 0:
            _check_persistent(weights, design.learning.num_persistent, k, v)
            weights = {}
        given = [name for name, x in (("weights", weights), ("gates", gates)) if x]
        given += [name for name, x in (("lr", lr), ("log_decay", log_decay)) if x is not None]
        require(not given, f"a non-parametric design has no fast weights and takes no {', '.join(given)}")
        return
    steps = k.shape[1]
    if lr is None:
        raise ValueError("lr is missing: give the rates eta, [B, T, H] or [B, T, H, C]")
    _check_weights(weights, design, q, k, v)
    _check_gate("lr", lr, (k.shape[0], steps, k.shape[2]), design, k, v)
    if log_decay is not None:
        _check_gate("log_decay", log_decay, tuple(q.shape[:3]), design, k, v)
    declared = {gate.name for gate in design.gates}
    require(
        set(gates) == declared,
        f"gates given: {sorted(gates) or 'none'}; this design reads {sorted(declared) or 'none'}",
    )
    for name, gate in gates.items():
        _check_gate(name, gate, (k.shape[0], steps, k.shape[2]), design, None, None)


def _require_one_device(named: Mapping[str, object]) -> None:
    devices = {name: str(x.device) for name, x in named.items() if isinstance(x, Tensor)}
    if len(set(devices.values())) > 1:
        raise ValueError(f"tensors lie on several devices: {devices}; move them to one")


def _check_persistent(weights: Mapping[str, Tensor], count: int, k: Tensor, v: Tensor) -> None:
    wanted = {name: (x.shape[2], count, x.shape[3]) for name, x in (("keys", k), ("values", v))}
    given = {name: tuple(x.shape) for name, x in weights.items()}
    require(given == wanted, f"weights given: {given or 'none'}; {count} persistent tokens need {wanted}")


def check_state(state: State, design: Design, rows: int, k: Tensor, v: Tensor) -> None:
    """That a state is one of this design, at these sizes, where the keys are. Raises ValueError or TypeError."""
    wanted = MemoryState if design.parametric else AttentionState
    if not isinstance(state, wanted):
        raise TypeError(
            f"initial_state is a {type(state).__name__}; this design goes on from the {wanted.__name__} that an earlier "
            "call with it returned"
        )
    require(state.rows == rows, f"initial_state has {state.rows} rows; this call has {rows} sequences")
    held = next(x for x in state.tensors() if x.is_floating_point())
    _require_one_device({"k": k, "initial_state": held})
    heads = k.shape[2]
    if isinstance(state, MemoryState):
        if k.dtype != torch.float64 and any(x.dtype == torch.float64 for x in state.tensors()):
            raise TypeError(
                f"initial_state is in float64, and a call with k in {k.dtype} computes in float32, which would lose its "
                "digits; give q, k and v in float64, or map the state: "
                "initial_state.map(lambda x: x.float() if x.is_floating_point() else x)"
            )
        assert design.memory is not None
        shapes = design.memory.weights(k.shape[-1], v.shape[-1])
        expected = {name: (heads, design.learning.slots, x.d_in, x.d_out) for name, x in shapes.items()}
        given = {name: tuple(x.shape[1:]) for name, x in state.slots.items()}
    else:
        expected = {"keys": (heads, k.shape[-1]), "values": (heads, v.shape[-1])}
        given = {"keys": tuple(state.keys.shape[2:]), "values": tuple(state.values.shape[2:])}
    require(given == expected, f"initial_state holds {given} a row; this call needs {expected}")


def check_values(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    design: Design,
    weights: Mapping[str, Tensor],
    lr: Tensor | None,
    log_decay: Tensor | None,
    gates: Mapping[str, Tensor],
) -> None:
    """NaN and infinity anywhere, negative rates, positive log-decays, gates out of range. Raises ValueError."""
    named = {"q": q, "k": k, "v": v, "lr": lr, "log_decay": log_decay, **weights, **gates}
    for name, x in named.items():
        if x is not None and not _finite(x):
            raise ValueError(f"{name} holds NaN or infinite numbers ({int((~torch.isfinite(x)).sum())} of {x.numel()})")
    if lr is not None and bool((lr < 0).any()):
        raise ValueError(f"lr holds negative rates (smallest {float(lr.detach().min()):g}); eta must be >= 0")
    if log_decay is not None and bool((log_decay > 0).any()):
        raise ValueError(
            f"log_decay holds positive numbers (largest {float(log_decay.detach().max()):g}); it is log alpha with alpha in "
            "(0, 1], so it must be <= 0. Decay factors themselves? Pass their logarithm"
        )
    for gate in design.gates:
        values = gates[gate.name].detach()
        low, high = float(values.min()), float(values.max())
        require(
            gate.minimum <= low and high <= gate.maximum,
            f"gate {gate.name!r} lies in [{low:g}, {high:g}]; allowed: [{gate.minimum:g}, {gate.maximum:g}]",
        )


def _finite(x: Tensor) -> bool:
    """Whether all numbers are finite: one quick pass where their sum is, since none of them can then be infinite or NaN."""
    return bool(torch.isfinite(x.detach().sum())) or bool(torch.isfinite(x).all())


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, design: Design) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{name} has dtype {x.dtype}; allowed: float64, float32, bfloat16, float16")
        require(x.dim() == 4, f"{name} has shape {tuple(x.shape)}; must be [batch, time, heads, width]")
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        raise TypeError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; give all three the same")
    n = design.learning.micro_steps
    require(q.shape[1] > 0, f"q has shape {tuple(q.shape)}: the sequence is empty; give at least one token")
    require(q.shape[0] > 0, f"q has shape {tuple(q.shape)}: the batch is empty; give at least one row")
    expected = (q.shape[0], q.shape[1] * n, q.shape[2])
    steps = "" if n == 1 else f" ({n} gradient steps a token)"
    require(
        tuple(k.shape) == (*expected, q.shape[3]),
        f"k has shape {tuple(k.shape)}; with q {tuple(q.shape)} it must be {(*expected, q.shape[3])}{steps}",
    )
    require(
        tuple(v.shape[:3]) == expected,
        f"v has shape {tuple(v.shape)}; with q {tuple(q.shape)} it must be {(*expected, 'V')}{steps}",
    )


def _check_weights(weights: Mapping[str, Tensor], design: Design, q: Tensor, k: Tensor, v: Tensor) -> None:
    assert design.memory is not None
    shapes = design.memory.weights(k.shape[-1], v.shape[-1])
    heads = q.shape[2]
    allowed = {name: (heads, shape.d_in, shape.d_out) for name, shape in shapes.items()}
    optional = dict.fromkeys(design.slow_names(v.shape[-1]), (heads, v.shape[-1]))
    missing = [name for name in allowed if name not in weights]
    unknown = [name for name in weights if name not in allowed and name not in optional]
    require(
        not missing and not unknown,
        f"weights given: {sorted(weights) or 'none'}; {design.memory.kind} needs {allowed}"
        + (f" and may have {optional}" if optional else ""),
    )
    for name, x in weights.items():
        shape = allowed.get(name) or optional[name]
        require(tuple(x.shape) == shape, f"weight {name!r} has shape {tuple(x.shape)}; must be {shape} [H, d_in, d_out]")


def _check_gate(name: str, gate: Tensor, shape: tuple[int, ...], design: Design, k: Tensor | None, v: Tensor | None) -> None:
    if not isinstance(gate, Tensor) or not gate.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {getattr(gate, 'dtype', type(gate).__name__)}")
    if tuple(gate.shape) == shape:
        return
    if k is None or v is None:
        raise ValueError(f"{name} has shape {tuple(gate.shape)}; must be {shape} [B, T, H]")
    assert design.memory is not None
    width = k.shape[-1]
    require(
        tuple(gate.shape) == (*shape, width),
        f"{name} has shape {tuple(gate.shape)}; must be {shape} [B, T, H] or {(*shape, width)} [B, T, H, C]",
    )
    shapes = design.memory.weights(width, v.shape[-1])
    inner = [weight for weight, item in shapes.items() if item.channel_axis is None]
    require(
        not inner,
        f"{name} is per channel, but weights {inner} of {design.memory} have no model-width axis; give one number a head",
    )
    sizes = {weight: (item.d_in, item.d_out)[item.channel_axis or 0] for weight, item in shapes.items()}
    require(
        all(size == width for size in sizes.values()),
        f"{name} has {width} channels, but the weights' model-width axes are {sizes}; give one number a head, or use "
        "keys and values of one width",
    )


def _check_cu_seqlens(cu_seqlens: Tensor, q: Tensor) -> None:
    require(q.shape[0] == 1, f"cu_seqlens packs sequences into one row: the batch must be 1, got {q.shape[0]}")
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or cu_seqlens.numel() < 2:
        raise ValueError("cu_seqlens must be a one-dimensional integer tensor [0, end of first, ..., T]")
    bounds = cu_seqlens.tolist()
    require(
        bounds[0] == 0 and bounds[-1] == q.shape[1] and all(a < b for a, b in pairwise(bounds)),
        f"cu_seqlens={bounds}; must start at 0, rise strictly (no empty sequence) and end at T={q.shape[1]}",
    )
