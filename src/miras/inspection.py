"""What a memory does at each token: its inner loss before and after the write, and how far it has drifted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from miras.design import Design
from miras.engine import memorize
from miras.engine.problem import MemoryState


def inspect_stream(design: Design, weights: Mapping[str, Tensor], stream: Any) -> dict[str, Tensor]:
    """Run the memory token by token over `stream` (a layer's `Stream`).

    Returns {"lr", "log_decay", each gate, "loss_before", "loss_after", "drift"}; see `MemoryLayer.inspect`.
    """
    assert design.memory is not None
    n, state = design.learning.micro_steps, None
    origin = {name: weights[name] for name in design.memory.weights(stream.k.shape[-1], stream.v.shape[-1])}
    dual = {name: x.expand(stream.q.shape[0], *x.shape) for name, x in origin.items()}
    columns: dict[str, list[Tensor]] = {"loss_before": [], "loss_after": [], "drift": []}
    for t in range(stream.q.shape[1]):
        steps = slice(t * n, (t + 1) * n)
        token: dict[str, Any] = {
            "lr": stream.lr[:, steps],
            "gates": {name: x[:, steps] for name, x in stream.gates.items()},
        }
        k, v = stream.k[:, steps], stream.v[:, steps]
        columns["loss_before"].append(_loss(design, dual, weights, k, v, **token))
        decay = None if stream.log_decay is None else stream.log_decay[:, t : t + 1]
        _, state = memorize(
            stream.q[:, t : t + 1],
            k,
            v,
            design=design,
            weights=weights,
            log_decay=decay,
            initial_state=state,
            output_final_state=True,
            check=False,
            **token,
        )
        assert isinstance(state, MemoryState)
        dual = _dual(design, state, origin)
        columns["loss_after"].append(_loss(design, dual, weights, k, v, **token))
        moved = torch.stack([(dual[name] - origin[name]).square().sum((-2, -1)) for name in dual]).sum(0)
        columns["drift"].append(moved.sqrt())
    seen = {"lr": stream.lr, **stream.gates}
    if stream.log_decay is not None:
        seen["log_decay"] = stream.log_decay
    shown = {name: x.detach() for name, x in seen.items()}
    return shown | {name: torch.stack(x, dim=1) for name, x in columns.items()}


def _dual(design: Design, state: MemoryState, origin: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A_t [B, H, d_in, d_out] of every weight."""
    anchored = design.anchor == "initial"
    return {name: x[:, :, 0] + (origin[name] if anchored else 0) for name, x in state.slots.items()}


def _loss(
    design: Design,
    dual: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    gates: Mapping[str, Tensor],
) -> Tensor:
    """[B, H]: the bias at (k, v) [B, n, H, D] and W = link(A), its mean over a token's n micro-steps."""
    assert design.memory is not None
    linked = {name: design.link(x) for name, x in dual.items()}
    dtype = next(iter(linked.values())).dtype
    k, v = k.transpose(1, 2).to(dtype), v.transpose(1, 2).to(dtype)
    slow = {name: weights[name].unsqueeze(1) for name in design.slow_names(v.shape[-1]) if name in weights}
    y = design.memory(k, lambda name, x: x @ linked[name], slow)
    read = {name: x.transpose(1, 2).unsqueeze(-1) for name, x in gates.items()}
    if design.bias.implicit:
        rate = lr.transpose(1, 2)
        rate = rate if rate.dim() == k.dim() else rate.unsqueeze(-1)
        read["smoothing"] = (rate * k.square()).sum(-1, keepdim=True)
    return design.bias.loss(y, v, read).mean(-1)
