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
from miras.system import System, decayed

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


class Block(NamedTuple):
    """One block of a run, with its system one step earlier where errors are taken at moving weights."""

    steps: Steps
    system: System
    log_decay: Tensor
    mix_before: Tensor | None
    carry_before: tuple[Tensor, ...]


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
    out = run_blocks(problem, scan, state.phase.tolist()[0], path, tile, substitute)
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
    outputs = [scan_run(problem, scan, run, path, substitute) for run in runs]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def scan_run(problem: Problem, scan: Slots, run: Run, path: str, substitute: Substitute = substituted_errors) -> Tensor:
    """Outputs [B, H, n * b, V] of one run, moving the scan's state to its end."""
    return _RunScan(problem, run, path, substitute).scan(scan)


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
        self.system, self.read_gates = self.design.learning.system(self.log_decay, read), read
        self.moving = path in ("triangular", "substituted")
        if self.moving:
            at_decayed = self.design.gradient_at == "decayed"
            self.mix_before, self.carry_before = self.system.before(self.log_decay if at_decayed else None)
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
        out = self._scan_solved(state) if self.path == "triangular" else self._scan_blocks(state)
        return out.movedim(0, 2).flatten(2, 3)

    def _scan_solved(self, state: Slots) -> Tensor:
        """The same where all errors are solved for before the scan; outputs [n, B, H, b, V]."""
        ((name, shape),) = self.shapes.items()
        predicted = self.anchored and self.design.bias.slope != "constant"
        start = self._start(name, self.steps.k) if predicted else None
        solver = TriangularSolver(self.design, shape, self.steps, start, self.mix_before, self.carry_before)
        x = solver.x.mT
        writes = [x * (w.unsqueeze(-2) if w.dim() < x.dim() else w) for w in self.system.write]
        moves = [[None if m is None else m.reshape(*m.shape[:3], -1, 1) for m in row] for row in self.system.move]
        errors, starts, state.slots[name] = scan_solved(solver, writes, moves, state.slots[name])
        if self.run.ends:
            state.point[name] = state.slots[name][0]
        linear = self._plain_reader({name: (starts, Factors(solver.x, errors))})
        return self.memory(self._blocks(self.problem.q), linear, self.problem.slow)

    def _scan_blocks(self, state: Slots) -> Tensor:
        """The same block by block; outputs [n, B, H, b, V]."""
        starts: list[dict[str, list[Tensor]]] = []
        points: list[dict[str, Tensor]] = []
        factors: list[dict[str, Factors]] = []
        settled: list[dict[str, Tensor]] = []
        weights = self._point_weights(state)
        for block in self._each():
            starts.append({name: list(z) for name, z in state.slots.items()})
            points.append(dict(state.point))
            factors.append(self._errors(block, state, weights))
            self._write(block.system, state, factors[-1])
            if self.run.ends:
                self._settle(state)
                if not self.moving:
                    weights = self._point_weights(state)
            settled.append(dict(state.point))
        return self._read(starts, points, factors, settled)

    def _each(self) -> list[Block]:
        mixes: Sequence[Tensor | None] = [None] * self.run.blocks
        carries: Sequence[tuple[Tensor, ...]] = [()] * self.run.blocks
        if self.moving:
            mixes, carries = self.mix_before.unbind(), list(zip(*(x.unbind() for x in self.carry_before), strict=True))
        rows = zip(self.steps.unbind(), self.system.unbind(), self.log_decay.unbind(), mixes, carries, strict=True)
        return [Block(*row) for row in rows]

    def _point_weights(self, state: Slots) -> dict[str, Tensor]:
        return {name: self.design.link(self.anchor[name] + x) for name, x in state.point.items()}

    def _errors(self, block: Block, state: Slots, weights: dict[str, Tensor]) -> dict[str, Factors]:
        if block.mix_before is None:
            return frozen_errors(self.design, self.shapes, self._frozen_at(block, state, weights), block.steps)

        past = Past(self.anchor if self.anchored else {}, state.slots, list(block.carry_before), block.mix_before)
        return self.substitute(self.design, self.shapes, block.steps, past)

    def _frozen_at(self, block: Block, state: Slots, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradient point of a block: the last window end, or with decay applied where the design says so (b = 1)."""
        if self.design.gradient_at == "previous":
            return weights
        alpha = block.log_decay.exp()
        return {
            name: self.design.link(self.anchor[name] + spread(alpha[..., 0], shape) * state.slots[name][0])
            for name, shape in self.shapes.items()
        }

    def _start(self, name: str, x: Tensor) -> Tensor:
        """The anchor's share of a product."""
        return shared_product(x, self.anchor[name]) if self.anchored else x.new_zeros(())

    def _write(self, system: System, state: Slots, factors: dict[str, Factors]) -> None:
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
        """Read-outs of all blocks of the run at once, [n, B, H, b, V]."""
        q = self._blocks(self.problem.q)
        stacked = {
            name: (
                [_stacked([s[name][slot] for s in starts]) for slot in range(len(starts[0][name]))],
                Factors(_stacked([f[name].x for f in factors]), _stacked([f[name].g for f in factors])),
            )
            for name in self.shapes
        }
        if self.retention.identity:
            linear = self._plain_reader(stacked)
        elif self.design.link_at == "refresh":
            linear = self._tangent_reader(stacked, {name: _stacked([p[name] for p in points]) for name in self.shapes})
        elif self.retention.scales and self.run.length > 1:
            linear = self._scaled_reader(stacked)
        else:
            linear = self._token_reader(stacked)
        out = self.memory(q, linear, self.problem.slow)
        if self.exact_end:
            ends = {name: self.design.link(self.anchor[name] + _stacked([s[name] for s in settled])) for name in self.shapes}
            last = self.memory(q[..., -1:, :], lambda name, h: h @ ends[name], self.problem.slow)
            out = torch.cat((out[..., :-1, :], last), dim=-2)
        return out

    def _plain_reader(self, stacked: Stacked) -> Linear:
        """D_t = carry D_0 + mix-weighted factors, around the anchor."""

        def linear(name: str, h: Tensor) -> Tensor:
            # The sum lies in memory as its first term does: by rows, which the next product wants.
            return self._deviation(name, h, stacked) + self._start(name, h)

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

    def _scaled_reader(self, stacked: Stacked) -> Linear:
        """tangent(A_t) A_t: the product with A_t that the factors give, times one number a token."""
        scales = {name: self._scales(name, *stacked[name]) for name in self.shapes}
        plain = self._plain_reader(stacked)
        return lambda name, h: scales[name] * plain(name, h)

    def _scales(self, name: str, slots: list[Tensor], factors: Factors) -> Tensor:
        """tangent(A_t) after every step of the blocks, [n, B, H, b, 1], by the learning's own steps.

        There are only products of coordinates and sums between them: compiled, one loop that writes no A_t.
        """
        shape, z = self.shapes[name], tuple(slots)
        decays = _by_step(decayed(self.log_decay), shape, factors.x.dim())
        gates = {gate: _by_step(x, shape, factors.x.dim()) for gate, x in self.read_gates.items()}
        scales: list[Tensor] = []
        for t, decay in enumerate(decays):
            u = factors.x[..., t, :].unsqueeze(-1) * factors.g[..., t, :].unsqueeze(-2)
            z = self.design.learning.step(z, u, decay, {gate: x[t] for gate, x in gates.items()})
            dual = self.anchor[name] + z[0]
            scales.append(self.retention.tangent(dual, dual))
        return torch.cat(scales, dim=-2)

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


def scan_solved(
    solver: TriangularSolver, writes: Sequence[Tensor], moves: Sequence[Sequence[Tensor | None]], slots: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Errors g [n, B, H, b, V] of n blocks, the slots [n, B, H, d_in, d_out] at the start of each, and those at the end.

    g = base + sum_l reads[l] z_l,    z_j <- sum_l moves[j][l] z_l + writes[j] g
    """
    # Flat batches: with two leading axes every product would be reshaped to one and back.
    batch = solver.base.shape[1:3]
    base, *reads = (x.flatten(1, 2).unbind() for x in (solver.base, *solver.reads))
    rows = [x.flatten(1, 2).unbind() for x in writes]
    kept = [[None if x is None else x.flatten(1, 2).unbind() for x in row] for row in moves]
    z, errors, starts = [x.flatten(0, 1) for x in slots], [], []
    for i, g in enumerate(base):
        for read, x in zip(reads, z, strict=False):
            g = torch.baddbmm(g, read[i], x)
        errors.append(g)
        starts.append(z)
        z = [
            _moved(write[i] @ g, [None if m is None else m[i] for m in row], z)
            for write, row in zip(rows, kept, strict=True)
        ]
    stacked = [torch.stack(x).unflatten(1, batch) for x in zip(*starts, strict=True)]
    return torch.stack(errors).unflatten(1, batch), stacked, [x.unflatten(0, batch) for x in z]


def _moved(total: Tensor, row: Sequence[Tensor | None], slots: Sequence[Tensor]) -> Tensor:
    for move, z in zip(row, slots, strict=True):
        total = total if move is None else torch.addcmul(total, move, z)
    return total


def _stacked(blocks: Sequence[Tensor]) -> Tensor:
    """Tensors of n blocks as one [n, ...], uncopied if there is only one."""
    return blocks[0].unsqueeze(0) if len(blocks) == 1 else torch.stack(list(blocks))


def spread(gate: Tensor, shape: WeightShape) -> Tensor:
    """One number a head [B, H] or a channel [B, H, C] against a weight [B, H, d_in, d_out]."""
    if gate.dim() == 2:
        return gate[..., None, None]
    return gate.unsqueeze(-1) if shape.channel_axis == 0 else gate.unsqueeze(-2)


def _by_step(gates: Tensor, shape: WeightShape, dims: int) -> Sequence[Tensor]:
    """Gates [..., b] a head or, where they have all `dims`, [..., C, b] a channel, at every step against a weight.

    One a head is repeated for each row, so that its gradient is summed along rows first, in one loop with all others.
    """
    if gates.dim() < dims:
        rows = gates.unsqueeze(-2).expand(*gates.shape[:-1], shape.d_in, gates.shape[-1])
        return rows.unsqueeze(-2).unbind(-1)
    return gates.unsqueeze(-2 if shape.channel_axis == 0 else -3).unbind(-1)


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
