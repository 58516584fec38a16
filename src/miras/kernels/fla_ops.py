"""The fla path: designs whose recurrence is that of an op of flash-linear-attention, by that op's Triton kernels.

For a matrix memory with D = A - a, a leaky learner and an affine gradient g_t = c_t y_t + b_t at P_t, which is D_{t-1} or
alpha_t D_{t-1},

    D_t = alpha_t D_{t-1} - (eta_t k_t)^T (c_t k_t P_t + e_t),    e_t = b_t + c_t k_t a,    o_t = q_t a + q_t D_t

so that the anchor changes values and read-outs only, and D_0 is the op's initial state. By what of it there is:

    c = 0     decay a head: `simple_gla` (linear attention, RetNet, Mamba2)       a channel: `gla` (GLA, HGRN2)
    c > 0, P_t decayed, eta a head
              decay a head: `gated_delta_rule` (DeltaNet, DeltaProduct, Longhorn) a channel: `kda`
    else      `dplr_delta_rule`, S_t = diag(alpha) S_{t-1} + k^T v + b^T (a S_{t-1})  (RWKV-7)

With n gradient steps a token an op takes n steps of which the last is read. Versions: fla-core 0.6.0.

An op multiplies in the type of its q, k and v (float32 mostly in TF32, Triton's default) and keeps its states in float32.
What it is given in their places is made in float32 and rounded to the type of the user's; decays and rates stay in float32.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from miras.design import Design
from miras.engine.chunk import shared_product
from miras.engine.errors import bias_gates
from miras.engine.problem import MemoryState, Problem
from miras.kernels import triton
from miras.learning import Learning

MAX_KEY_DIM = 256
"""Widest keys that the kernels of the delta rules take."""

GATES = ("g", "gk", "beta")
"""Inputs of the ops that are log-decays and rates."""


def unfit(design: Design) -> str | None:
    """Why no op computes a design; None where one does."""
    assert design.memory is not None and design.retention is not None
    shapes = list(design.memory.weights(1, 1).values())
    if not design.memory.linear or [shape.channel_axis for shape in shapes] != [0]:
        return f"memory {design.memory.kind} is not one matrix"
    if not design.retention.identity or design.retention.settles:
        return f"retention {design.retention.kind} is more than a decay"
    if not _leaky(design.learning):
        return f"learning {design.learning.kind} is not D_t = alpha_t D_{{t-1}} + u_t"
    if design.bias.slope == "general":
        return f"the gradient of bias {design.bias.kind} is not affine"
    if design.refresh > 1:
        return f"refresh={design.refresh}: the ops keep no gradient point of a window (they go with 1)"
    return None


def unavailable(device: torch.device, dtype: torch.dtype | None = None, widths: tuple[int, int] | None = None) -> str | None:
    """Why the ops cannot run here; None where they can."""
    missing = [name for name in ("fla", "triton") if not triton.installed(name)]
    if missing:
        return f"{' and '.join(missing)} not installed: pip install 'torch-miras[gpu]'"
    if device.type != "cuda" and not triton.interpreted():
        return f"its Triton kernels need a CUDA device, not {device.type} (or TRITON_INTERPRET=1, to test them)"
    if dtype == torch.float64:
        return "its kernels compute in float32 at most, not in float64"
    if widths is not None and widths[0] > MAX_KEY_DIM:
        return f"its kernels take keys of up to {MAX_KEY_DIM} channels, not {widths[0]}"
    return None


def run_fla(
    problem: Problem, state: MemoryState, dtype: torch.dtype, bounds: Tensor | None = None, *, decays: bool = True
) -> tuple[Tensor, MemoryState]:
    """Outputs [B, N, H, V] and the final state by the op that fits; `bounds` [rows + 1] of sequences packed in one row.

    `dtype` is what the user gave q, k and v in; `decays` False says that log_decay is zero throughout.
    """
    ((name, weight),) = problem.weights.items()
    anchored = problem.design.anchor == "initial"
    op, inputs = op_of(problem, dtype, shared_product(problem.k, weight) if anchored else None, decays=decays)
    first = state.slots[name][:, :, 0].contiguous()
    out, final = op(**inputs, scale=1.0, initial_state=first, output_final_state=True, cu_seqlens=bounds)
    if anchored:
        out = out + shared_product(problem.q, weight).transpose(1, 2)
    return out, MemoryState({name: final.unsqueeze(2)}, {name: final}, state.phase)


def op_of(
    problem: Problem, dtype: torch.dtype, start: Tensor | None = None, *, decays: bool = True
) -> tuple[Any, dict[str, Tensor]]:
    """The op that computes a problem, and its inputs [B, N, H, ...] but for the state; `dtype` and `decays` as in `run_fla`.

    `start` [B, H, N, V] is the anchor's share k a of the predictions.
    """
    name, inputs = _inputs(problem, start, decays)
    module = "generalized_delta_rule" if name == "dplr_delta_rule" else name
    typed = {key: x if key in GATES else x.to(dtype) for key, x in inputs.items()}
    op: Any = getattr(importlib.import_module(f"fla.ops.{module}"), f"chunk_{name}")
    return op, {key: x.transpose(1, 2).contiguous() for key, x in typed.items()}


def _inputs(problem: Problem, start: Tensor | None, decays: bool) -> tuple[str, dict[str, Tensor]]:
    """The op's name and its inputs [B, H, N, ...] in the problem's type."""
    design, q, k, v, lr, g = problem.design, problem.q, problem.k, problem.v, problem.lr, problem.log_decay
    per_head, per_channel = lr.dim() < k.dim(), g.dim() == k.dim()
    rate = lr.unsqueeze(-1) if per_head else lr
    gates = bias_gates(design, k, lr, problem.gates)
    error = design.bias.gradient(torch.zeros_like(v), v, gates)
    if design.bias.slope == "constant":
        key, value = (k, -rate * error) if per_head else (rate * k, -error)
        return ("gla" if per_channel else "simple_gla"), {"q": q, "k": key, "v": value, "g": g}
    none = torch.zeros_like(v[..., :1])
    slope = design.bias.gradient(none + 1, none, gates) - design.bias.gradient(none, none, gates)
    error = error if start is None else error + slope * start
    # A slope that a gate makes can be zero, and values are divided by it.
    if per_head and not design.bias.gates and (design.gradient_at == "decayed" or not decays):
        op = "kda" if per_channel else "gated_delta_rule"
        return op, {"q": q, "k": k, "v": -error / slope, "g": g, "beta": (rate * slope).squeeze(-1)}
    decay = g if per_channel else g.unsqueeze(-1).expand_as(k)
    read = decay.exp() * k if design.gradient_at == "decayed" else k
    written = {"k": rate * k, "v": -error, "a": read, "b": -rate * slope * k}
    return "dplr_delta_rule", {"q": q, **written, "gk": decay}


def _leaky(learning: Learning) -> bool:
    if not (learning.linear and learning.slots == 1) or learning.settles or learning.gates:
        return False
    return learning.system(torch.zeros(1), {}).leaky
