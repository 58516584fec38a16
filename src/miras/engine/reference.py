"""The definition: one token at a time, gradients of the loss in the weights by automatic differentiation.

Every other path is an optimisation of this one and is tested against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miras.engine.problem import MemoryState, Problem
from miras.memory import WeightShape

Weights = dict[str, Tensor]


def run_reference(problem: Problem, state: MemoryState) -> tuple[Tensor, MemoryState]:
    """Outputs [B, H, N, V] and the state after the last token; all rows must be in the same phase."""
    design, memory = problem.design, problem.design.memory
    assert memory is not None and design.retention is not None
    anchor = {name: problem.anchor(name) for name in problem.weights}
    slots = {name: tuple(x.unbind(2)) for name, x in state.slots.items()}
    point, phase, outputs = dict(state.point), int(state.phase[0]), []
    for t in range(problem.num_steps):
        where = {name: anchor[name] + point[name] for name in anchor}
        if design.gradient_at == "decayed":
            alpha = {name: _spread(problem.log_decay[:, :, t].exp(), problem.shapes[name]) for name in anchor}
            where = {name: anchor[name] + alpha[name] * slots[name][0] for name in anchor}
        gradients = _gradients(problem, {name: design.link(x) for name, x in where.items()}, t)
        gates = {gate.name: problem.gates[gate.name][:, :, t, None, None] for gate in design.learning.gates}
        for name, shape in problem.shapes.items():
            u = -_spread(problem.lr[:, :, t], shape) * gradients[name]
            decay = _spread(problem.log_decay[:, :, t].exp(), shape)
            slots[name] = design.learning.step(slots[name], u, decay, gates)
        phase += 1
        ends = phase == design.refresh
        if ends:
            for name in slots:
                settled = design.learning.settle(slots[name])
                first = design.retention.settle(anchor[name] + settled[0]) - anchor[name]
                slots[name], point[name], phase = (first, *settled[1:]), first, 0
        weights = {name: _read_weight(problem, anchor[name], slots[name][0], point[name], ends) for name in slots}
        outputs.append(_predict(problem, weights, problem.q[:, :, t]))
    final = MemoryState(
        {name: torch.stack(z, dim=2) for name, z in slots.items()},
        point,
        torch.full_like(state.phase, phase),
    )
    return torch.stack(outputs, dim=2), final


def _gradients(problem: Problem, weights: Weights, t: int) -> Weights:
    """d loss / d W at `weights` for token t, [B, H, d_in, d_out] each; differentiable where the caller differentiates."""
    bias, outer = problem.design.bias, torch.is_grad_enabled()
    gates = {gate.name: problem.gates[gate.name][:, :, t, None] for gate in bias.gates}
    if bias.implicit:
        gates["smoothing"] = smoothing(problem.k[:, :, t], problem.lr[:, :, t])
    with torch.enable_grad():
        points = {name: x if x.requires_grad else x.detach().requires_grad_() for name, x in weights.items()}
        y = _predict(problem, points, problem.k[:, :, t])
        loss = bias.loss(y, problem.v[:, :, t], gates).sum()
        grads = torch.autograd.grad(loss, list(points.values()), create_graph=outer)
    return dict(zip(points, grads, strict=True))


def _predict(problem: Problem, weights: Weights, x: Tensor) -> Tensor:
    """M(W; x) for one token, x [B, H, K] and weights [B, H, d_in, d_out]."""
    memory = problem.design.memory
    assert memory is not None
    y = memory(x.unsqueeze(2), lambda name, h: h @ weights[name], problem.slow)
    return y.squeeze(2)


def _read_weight(problem: Problem, anchor: Tensor, now: Tensor, point: Tensor, exact: bool) -> Tensor:
    """W_t for the read-out: link(A_t), or inside a window of a link taken at refreshes its tangent from there."""
    design = problem.design
    assert design.retention is not None
    if design.link_at == "token" or exact:
        return design.link(anchor + now)
    start = design.link(anchor + point)
    return start + design.retention.tangent(anchor + point, start) * (now - point)


def _spread(gate: Tensor, shape: WeightShape) -> Tensor:
    """A rate or decay [B, H] or [B, H, C] broadcast against a weight [B, H, d_in, d_out]."""
    if gate.dim() == 2:
        return gate[..., None, None]
    return gate.unsqueeze(-1) if shape.channel_axis == 0 else gate.unsqueeze(-2)


def smoothing(k: Tensor, lr: Tensor) -> Tensor:
    """eta ||k||^2, [..., 1], with one rate a head or one a channel: what an implicit bias smooths by."""
    per_channel = lr.dim() == k.dim()
    return (k.square() * (lr if per_channel else lr.unsqueeze(-1))).sum(-1, keepdim=True)
