"""The block-parallel engine: a scan over blocks of gradient steps, each block read and written by matrix products.

A block never crosses a window end. Within a run of equally long blocks everything that does not depend on the state
(block systems, triangular inverses) is computed at once, the scan only takes errors and moves the slots, and all
read-outs of the run are again one batch. The leading axis n of a run counts its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from miras.engine.errors import (
    Factors,
    Past,
    Steps,
    Substitute,
    TriangularSolver,
    bias_gates,
    carried,
    frozen_errors,
    masked_product,
    shared_product,
    substituted_errors,
)
from miras.engine.problem import MemoryState, Problem
from miras.memory import Linear, WeightShape
from miras.system import System

Stacked = dict[str, tuple[list[Tensor], Factors]]
"""Per weight the slots [n, B, H, d_in, d_out] at the start of every block, and the factors of its steps."""

MAX_RUN = 64
"""Most blocks whose initial slots are kept at once for the batched read-out."""


class Run(NamedTuple):
    """`blocks` consecutive blocks of `length` gradient steps from `start`; `ends`: each one ends a window."""

    start: int
    blocks: int
    length: int
    ends: bool


@dataclass
class Slots:
    """State of the scan: per weight the slots [B, H, d_in, d_out] and the deviation at the last window end."""

    slots: dict[str, list[Tensor]]
    point: dict[str, Tensor]


def run_chunks(
    problem: Problem, state: MemoryState, path: str, tile: int, substitute: Substitute = substituted_errors
) -> tuple[Tensor, MemoryState]:
    """Outputs [B, H, N, V] and the final state by `path` (frozen, triangular, substituted or recurrent).

    `substitute` finds the errors of a block on path "substituted".
    """
    scan = Slots({name: list(x.unbind(2)) for name, x in state.slots.items()}, dict(state.point))
    out = run_blocks(problem, scan, int(state.phase[0]), path, tile, substitute)
    final = MemoryState(
        {name: torch.stack(z, dim=2) for name, z in scan.slots.items()},
        scan.point,
        (state.phase + problem.num_steps) % problem.design.refresh,
    )
    return out, final


def run_blocks(
    problem: Problem, scan: Slots, phase: int, path: str, tile: int, substitute: Substitute = substituted_errors
) -> Tensor:
    """Outputs [B, H, N, V] of all steps from `phase` on, moving the scan's state to the end."""
    runs = plan_runs(problem.num_steps, phase, problem.design.refresh, tile)
    return torch.cat([_RunScan(problem, run, path, substitute).scan(scan) for run in runs], dim=2)


def plan_runs(num_steps: int, phase: int, refresh: int, tile: int) -> list[Run]:
    """Cut num_steps into blocks of at most `tile` steps that no window end falls inside of, and gather equal ones."""
    runs: list[Run] = []
    start = 0
    while start < num_steps:
        length = min(tile, num_steps - start)
        if refresh > 1:
            length = min(length, refresh - phase)
        ends = (phase + length) % refresh == 0
        last = runs[-1] if runs else None
        if last is not None and last.length == length and last.ends == ends and last.blocks < MAX_RUN:
            runs[-1] = last._replace(blocks=last.blocks + 1)
        else:
            runs.append(Run(start, 1, length, ends))
        start, phase = start + length, (phase + length) % refresh
    return runs


class _RunScan:
    """One run of blocks: what is shared before the scan, the scan itself, and the read-out after it."""

    def __init__(self, problem: Problem, run: Run, path: str, substitute: Substitute) -> None:
        self.problem, self.run, self.path, self.substitute = problem, run, path, substitute
        self.design, self.shapes = problem.design, problem.shapes
        assert self.design.memory is not None and self.design.retention is not None
        self.memory, self.retention = self.design.memory, self.design.retention
        self.anchor = {name: problem.anchor(name) for name in problem.weights}
        self.anchored = self.design.anchor == "initial"
        k, lr = self._blocks(problem.k), self._blocks(problem.lr)
        gates = {name: self._blocks(x) for name, x in problem.gates.items()}
        self.steps = Steps(k, self._blocks(problem.v), lr, bias_gates(self.design, k, lr, gates), problem.slow)
        log_decay = self._blocks(problem.log_decay)
        per_channel = log_decay.dim() == k.dim()
        self.log_decay = log_decay.mT if per_channel else log_decay
        read = {gate.name: gates[gate.name] for gate in self.design.learning.gates}
        read = {name: x.unsqueeze(-2) for name, x in read.items()} if per_channel else read
        self.system = self.design.learning.system(self.log_decay, read)
        self.moving = path in ("triangular", "substituted")
        if self.moving:
            decayed = self.design.gradient_at == "decayed"
            self.mix_before, self.carry_before = self.system.before(self.log_decay if decayed else None)
        if path == "triangular":
            ((self.name, shape),) = self.shapes.items()
            self.solver = TriangularSolver(self.design, shape, self.steps, self.mix_before)
        # Where the weights at a window end differ from what the block's own read-out formula says.
        settles = self.retention.settles or self.design.learning.settles
        tangent = self.design.link_at == "refresh" and not self.retention.identity
        self.exact_end = run.ends and (settles or tangent)

    def _blocks(self, x: Tensor) -> Tensor:
        """[B, H, N, ...] -> [n, B, H, b, ...] for the steps of this run."""
        run = self.run
        x = x[:, :, run.start : run.start + run.blocks * run.length]
        return x.unflatten(2, (run.blocks, run.length)).movedim(2, 0).contiguous()

    def scan(self, state: Slots) -> Tensor:
        """Move the state over the run; outputs [B, H, n * b, V]."""
        starts: list[dict[str, list[Tensor]]] = []
        points: list[dict[str, Tensor]] = []
        factors: list[dict[str, Factors]] = []
        settled: list[dict[str, Tensor]] = []
        weights = self._point_weights(state)
        for index in range(self.run.blocks):
            starts.append({name: list(z) for name, z in state.slots.items()})
            points.append(dict(state.point))
            factors.append(self._errors(index, state, weights))
            self._write(index, state, factors[-1])
            if self.run.ends:
                self._settle(state)
                if not self.moving:
                    weights = self._point_weights(state)
            settled.append(dict(state.point))
        return self._read(starts, points, factors, settled)

    def _point_weights(self, state: Slots) -> dict[str, Tensor]:
        return {name: self.design.link(self.anchor[name] + x) for name, x in state.point.items()}

    def _errors(self, index: int, state: Slots, weights: dict[str, Tensor]) -> dict[str, Factors]:
        if not self.moving:
            return frozen_errors(self.design, self.shapes, self._frozen_at(index, state, weights), self._steps(index))
        carry = [x[index] for x in self.carry_before]
        if self.path == "triangular":
            k, slots = self.steps.k[index], state.slots[self.name]
            initial = self._start(self.name, k) + carried(k, slots, carry, self.shapes[self.name])
            return {self.name: self.solver.factors(index, initial)}

        past = Past(self.anchor if self.anchored else {}, state.slots, carry, self.mix_before[index])
        return self.substitute(self.design, self.shapes, self._steps(index), past)

    def _frozen_at(self, index: int, state: Slots, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradient point of a block: the last window end, or with decay applied where the design says so (b = 1)."""
        if self.design.gradient_at == "previous":
            return weights
        alpha = self.log_decay[index].exp()
        return {
            name: self.design.link(self.anchor[name] + spread(alpha[..., 0], shape) * state.slots[name][0])
            for name, shape in self.shapes.items()
        }

    def _steps(self, index: int) -> Steps:
        s = self.steps
        return Steps(s.k[index], s.v[index], s.lr[index], {name: x[index] for name, x in s.gates.items()}, s.slow)

    def _start(self, name: str, x: Tensor) -> Tensor:
        """The anchor's share of a product."""
        return shared_product(x, self.anchor[name]) if self.anchored else x.new_zeros(())

    def _write(self, index: int, state: Slots, factors: dict[str, Factors]) -> None:
        system = self.system.block(index)
        for name, shape in self.shapes.items():
            old = state.slots[name]
            state.slots[name] = [
                written(factors[name], write, shape)
                + sum(spread(move, shape) * z for move, z in zip(row, old, strict=True) if move is not None)
                for write, row in zip(system.write, system.move, strict=True)
            ]

    def _settle(self, state: Slots) -> None:
        for name, anchor in self.anchor.items():
            z = state.slots[name]
            if self.design.learning.settles:
                z = list(self.design.learning.settle(tuple(z)))
            if self.retention.settles:
                z = [self.retention.settle(anchor + z[0]) - anchor, *z[1:]]
            state.slots[name], state.point[name] = z, z[0]

    def _read(
        self,
        starts: list[dict[str, list[Tensor]]],
        points: list[dict[str, Tensor]],
        factors: list[dict[str, Factors]],
        settled: list[dict[str, Tensor]],
    ) -> Tensor:
        """Read-outs of all blocks of the run at once, [B, H, n * b, V]."""
        q = self._blocks(self.problem.q)
        stacked = {
            name: (
                [torch.stack([s[name][slot] for s in starts]) for slot in range(len(starts[0][name]))],
                Factors(torch.stack([f[name].x for f in factors]), torch.stack([f[name].g for f in factors])),
            )
            for name in self.shapes
        }
        if self.retention.identity:
            linear = self._plain_reader(stacked)
        elif self.design.link_at == "refresh":
            linear = self._tangent_reader(stacked, {name: torch.stack([p[name] for p in points]) for name in self.shapes})
        else:
            linear = self._token_reader(stacked)
        out = self.memory(q, linear, self.problem.slow)
        if self.exact_end:
            ends = {
                name: self.design.link(self.anchor[name] + torch.stack([s[name] for s in settled])) for name in self.shapes
            }
            last = self.memory(q[..., -1:, :], lambda name, h: h @ ends[name], self.problem.slow)
            out = torch.cat((out[..., :-1, :], last), dim=-2)
        return out.movedim(0, 2).flatten(2, 3)

    def _plain_reader(self, stacked: Stacked) -> Linear:
        """D_t = carry D_0 + mix-weighted factors, around the anchor."""

        def linear(name: str, h: Tensor) -> Tensor:
            return self._start(name, h) + self._deviation(name, h, stacked)

        return linear

    def _tangent_reader(self, stacked: Stacked, points: dict[str, Tensor]) -> Linear:
        """W_r + kappa_r (D_t - D_r)."""
        offsets, slopes = {}, {}
        for name, point in points.items():
            dual = self.anchor[name] + point
            weight = self.design.link(dual)
            slopes[name] = self.retention.tangent(dual, weight)
            offsets[name] = weight - slopes[name] * point

        def linear(name: str, h: Tensor) -> Tensor:
            return h @ offsets[name] + slopes[name] * self._deviation(name, h, stacked)

        return linear

    def _token_reader(self, stacked: Stacked) -> Linear:
        """link(A_t), with every A_t of the block formed: [n, B, H, b, d_in, d_out]."""
        weights = {
            name: self.design.link(
                self.anchor[name].unsqueeze(-3) + token_deviations(slots, self.system, pairs, self.shapes[name])
            )
            for name, (slots, pairs) in stacked.items()
        }
        return lambda name, h: (h.unsqueeze(-2) @ weights[name]).squeeze(-2)

    def _deviation(self, name: str, h: Tensor, stacked: Stacked) -> Tensor:
        slots, pairs = stacked[name]
        shape = self.shapes[name]
        return carried(h, slots, self.system.carry, shape) + masked_product(h, pairs, self.system.mix, shape.channel_axis)


def spread(gate: Tensor, shape: WeightShape) -> Tensor:
    """One number a head [B, H] or a channel [B, H, C] against a weight [B, H, d_in, d_out]."""
    if gate.dim() == 2:
        return gate[..., None, None]
    return gate.unsqueeze(-1) if shape.channel_axis == 0 else gate.unsqueeze(-2)


def written(factors: Factors, write: Tensor, shape: WeightShape) -> Tensor:
    """sum_i write[i] x_i g_i^T, [B, H, d_in, d_out]."""
    x, g = factors
    if write.dim() < x.dim():
        return x.mT @ (write.unsqueeze(-1) * g)
    return (write.mT * x).mT @ g if shape.channel_axis == 0 else x.mT @ (write.mT * g)


def token_deviations(slots: Sequence[Tensor], system: System, factors: Factors, shape: WeightShape) -> Tensor:
    """D_t after every step of a block, [..., b, d_in, d_out]."""
    x, g = factors
    per_channel = system.mix.dim() > x.dim()
    if not per_channel:
        total = (system.mix.unsqueeze(-1) * x.unsqueeze(-3)).mT @ g.unsqueeze(-3)
    elif shape.channel_axis == 0:
        total = (system.mix.movedim(-3, -1) * x.unsqueeze(-3)).mT @ g.unsqueeze(-3)
    else:
        total = x.unsqueeze(-3).mT @ (system.mix.movedim(-3, -1) * g.unsqueeze(-3))
    for z, c in zip(slots, system.carry, strict=True):
        if not per_channel:
            total = total + c[..., None, None] * z.unsqueeze(-3)
        else:
            total = total + (c.mT.unsqueeze(-1 if shape.channel_axis == 0 else -2)) * z.unsqueeze(-3)
    return total
