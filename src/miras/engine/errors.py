"""Errors of a block: the back-propagated output gradients that, with the inputs, make every gradient a rank-one product.

Three ways to the same factors (x_i, g_i) of u_i = -eta_i grad_W = x_i g_i^T, one pair per weight and gradient step:
`frozen_errors` at weights that stand still over the block, `TriangularSolver` and `substituted_errors` for the exact
online learner, whose weights move at every step (docs/equations.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from miras.design import Design
from miras.engine.reference import smoothing
from miras.memory import Linear, WeightShape


class Factors(NamedTuple):
    """u_i = x_i g_i^T for the steps of a block: x [..., b, d_in], g [..., b, d_out], rate and sign included."""

    x: Tensor
    g: Tensor


class Steps(NamedTuple):
    """Gradient steps of a block: k [..., b, K], v [..., b, V], lr [..., b] or [..., b, C], bias gates [..., b, 1]."""

    k: Tensor
    v: Tensor
    lr: Tensor
    gates: dict[str, Tensor]
    slow: dict[str, Tensor]

    def split(self) -> list[Steps]:
        """Each step by itself."""
        axis = self.k.dim() - 2
        gates = {name: x.split(1, axis) for name, x in self.gates.items()}
        rows = zip(self.k.split(1, axis), self.v.split(1, axis), self.lr.split(1, axis), strict=True)
        return [Steps(*row, {name: x[i] for name, x in gates.items()}, self.slow) for i, row in enumerate(rows)]

    def unbind(self) -> list[Steps]:
        """Each of a batch of blocks, along the first axis."""
        gates = {name: x.unbind() for name, x in self.gates.items()}
        rows = zip(self.k.unbind(), self.v.unbind(), self.lr.unbind(), strict=True)
        return [Steps(*row, {name: x[i] for name, x in gates.items()}, self.slow) for i, row in enumerate(rows)]


def bias_gates(design: Design, k: Tensor, lr: Tensor, gates: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gates that the bias reads, [..., 1], with the smoothing of an implicit one."""
    found = {gate.name: gates[gate.name].unsqueeze(-1) for gate in design.bias.gates}
    if design.bias.implicit:
        found["smoothing"] = smoothing(k, lr)
    return found


def frozen_errors(
    design: Design, shapes: dict[str, WeightShape], weights: dict[str, Tensor], steps: Steps
) -> dict[str, Factors]:
    """Factors of a block whose gradients are all taken at `weights` [..., d_in, d_out]."""
    return scaled(raw_errors(design, shapes, steps, lambda name, x: x @ weights[name]), steps.lr, shapes)


def raw_errors(design: Design, shapes: dict[str, WeightShape], steps: Steps, linear: Linear) -> dict[str, Factors]:
    """What every product reads and the error at its output, rates and signs left out: grad_W = x_i g_i^T."""
    memory, outer = design.memory, torch.is_grad_enabled()
    assert memory is not None
    if memory.linear:
        (name,) = shapes
        return {name: Factors(steps.k, design.bias.gradient(linear(name, steps.k), steps.v, steps.gates))}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def record(name: str, x: Tensor) -> Tensor:
        z = linear(name, x)
        z = z if z.requires_grad else z.detach().requires_grad_()
        inputs[name], outputs[name] = x, z
        return z

    with torch.enable_grad():
        y = memory(steps.k, record, steps.slow)
        error = design.bias.gradient(y if outer else y.detach(), steps.v, steps.gates)
        grads = torch.autograd.grad(y, list(outputs.values()), error, create_graph=outer)
    pairs = zip(outputs, grads, strict=True)
    return {name: Factors(inputs[name] if outer else inputs[name].detach(), g) for name, g in pairs}


def scaled(raw: dict[str, Factors], lr: Tensor, shapes: dict[str, WeightShape]) -> dict[str, Factors]:
    """Raw factors times -eta, per channel on the model-width side, in the order of `shapes`."""
    return {name: _factors(*raw[name], lr, shape) for name, shape in shapes.items()}


def _factors(x: Tensor, g: Tensor, lr: Tensor, shape: WeightShape) -> Factors:
    if lr.dim() < x.dim():
        return Factors(x, -lr.unsqueeze(-1) * g)
    return Factors(-lr * x, g) if shape.channel_axis == 0 else Factors(x, -lr * g)


class Past(NamedTuple):
    """What a block's steps read before its own factors: anchors [H, d_in, d_out] by weight (none at the origin), slots by
    weight, and one step earlier carry[slot] [..., (C), b] and the mix [..., (C), b, b] of the block's factors."""

    anchor: dict[str, Tensor]
    slots: dict[str, list[Tensor]]
    carry: list[Tensor]
    mix: Tensor

    def initial(self, name: str, x: Tensor, shape: WeightShape) -> Tensor:
        """What the anchor and the slots give at x [..., b, d_in]."""
        y = carried(x, self.slots[name], self.carry, shape)
        return shared_product(x, self.anchor[name]) + y if name in self.anchor else y

    def at(self, t: int) -> Past:
        """Step t alone."""
        return Past(self.anchor, self.slots, [c[..., t : t + 1] for c in self.carry], self.mix[..., t : t + 1, :])


Substitute = Callable[[Design, dict[str, WeightShape], Steps, Past], dict[str, Factors]]


def substituted_errors(design: Design, shapes: dict[str, WeightShape], steps: Steps, past: Past) -> dict[str, Factors]:
    """Exact online factors for any memory and bias, by forward substitution through its layers, one step at a time.

    Step t's prediction reads each weight as it is before the step, never formed: the block's initial slots, and the
    earlier factors weighed by past.mix.
    """
    # What multiplies the keys themselves, whose products with a block's initial slots wait for no step.
    early: dict[str, Sequence[Tensor]] = {}
    found = {
        name: Factors(*(steps.k.new_zeros(*steps.k.shape[:-1], width) for width in (shape.d_in, shape.d_out)))
        for name, shape in shapes.items()
    }
    for t, here in enumerate(steps.split()):
        now = past.at(t)

        def linear(name: str, x: Tensor, t: int = t, k: Tensor = here.k, now: Past = now) -> Tensor:
            if x is k:
                if name not in early:
                    early[name] = past.initial(name, steps.k, shapes[name]).split(1, dim=-2)
                y = early[name][t]
            else:
                y = now.initial(name, x, shapes[name])
            return y if t == 0 else y + masked_product(x, found[name], now.mix, shapes[name].channel_axis)

        raw = raw_errors(design, shapes, here, linear)
        for name, pair in scaled(raw, here.lr, shapes).items():
            found[name] = Factors(
                *(x.select_scatter(row.select(-2, 0), -2, t) for x, row in zip(found[name], pair, strict=True))
            )
    return found


class TriangularSolver:
    """Exact online errors of a linear memory with an affine gradient g = c_t y + b_t, for a batch of blocks.

    (I + c P o K K^T) g = c y_0 + b,  P the mix one step earlier and y_0 = K a + sum_l carry_l (K z_l): the WY form's
    triangular system. It does not depend on the state, so that all blocks are solved at once for what the slots z at a
    block's start are multiplied by. With rates and signs in them, the factors of a block are x and

        g = base + sum_l reads[l] @ z_l

    `start` [..., b, V] is the anchor's share K a of the predictions.
    """

    def __init__(
        self, design: Design, shape: WeightShape, steps: Steps, start: Tensor | None, mix: Tensor, carry: tuple[Tensor, ...]
    ) -> None:
        k, v, gates = steps.k, steps.v, steps.gates
        per_head = steps.lr.dim() < k.dim()
        lr = steps.lr.unsqueeze(-1) if per_head else steps.lr
        self.x = k if per_head else -lr * k
        self.reads: list[Tensor] = []
        error = design.bias.gradient(torch.zeros_like(v), v, gates)
        if design.bias.slope == "constant":
            self.base = -lr * error if per_head else error
            return
        none = torch.zeros_like(v[..., :1])
        slope = design.bias.gradient(none + 1, none, gates) - design.bias.gradient(none, none, gates)
        error = error if start is None else slope * start + error
        error, slope = (-lr * error, lr * slope) if per_head else (error, -slope)
        rows = slope * k
        # Of a unit triangular system only what is below the diagonal is read.
        system = scores(rows, self.x, mix, shape.channel_axis)
        identity = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
        inverse = torch.linalg.solve_triangular(system, identity.expand_as(system), upper=False, unitriangular=True)
        self.base = inverse @ error
        self.reads = [inverse @ (rows * -(c.unsqueeze(-1) if c.dim() < k.dim() else c.mT)) for c in carry]


def scores(h: Tensor, x: Tensor, mix: Tensor, channel_axis: int | None) -> Tensor:
    """(h_t . x_i) mix[t, i], with mix per channel of the input axis weighing each product."""
    if mix.dim() == h.dim():
        return (h @ x.mT) * mix
    assert channel_axis == 0
    return torch.einsum("...tc,...cti,...ic->...ti", h, mix, x)


def masked_product(h: Tensor, factors: Factors, mix: Tensor, channel_axis: int | None) -> Tensor:
    """sum_i mix[t, i] (h_t . x_i) g_i for h [..., t, d_in], mix [..., (C), t, i]: a gated linear attention."""
    if mix.dim() == h.dim() or channel_axis == 0:
        return scores(h, factors.x, mix, channel_axis) @ factors.g
    return torch.einsum("...ti,...cti,...ic->...tc", h @ factors.x.mT, mix, factors.g)


def shared_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight for x [..., H, b, d_in] and weight [H, d_in, d_out], as one large product a head."""
    rows = x.movedim(-3, 0)
    return (rows.flatten(1, -2) @ weight).unflatten(1, rows.shape[1:-1]).movedim(0, -3)


def carried(h: Tensor, slots: Sequence[Tensor], carry: Sequence[Tensor], shape: WeightShape) -> Tensor:
    """sum_l carry[l][t] (h_t @ slots[l]) for h [..., b, d_in] and carry [..., (C), b]."""
    total: Tensor | None = None
    for z, c in zip(slots, carry, strict=True):
        if c.dim() < h.dim():
            part = c.unsqueeze(-1) * (h @ z)
        elif shape.channel_axis == 0:
            part = (c.mT * h) @ z
        else:
            part = c.mT * (h @ z)
        total = part if total is None else total + part
    assert total is not None
    return total
