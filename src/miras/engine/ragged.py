"""Rows of different lengths or in different phases of a window, as calls on rows that agree.

Since a memory's result does not depend on how a sequence is split into calls, rows in one phase run together up to the
shortest one's end, then without it to the next one's, and so on: no padding is computed, and every row's state is exact.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from miras.engine.problem import MemoryState, Problem

Run = Callable[[Problem, MemoryState], tuple[Tensor, MemoryState]]


def run_ragged(run: Run, problem: Problem, state: MemoryState, lengths: Tensor) -> tuple[Tensor, MemoryState]:
    """Outputs [B, H, N, V], zero after each row's own number of steps in `lengths` [B], and every row's last state."""
    if set(lengths.tolist()) == {problem.num_steps} and len(set(state.phase.tolist())) == 1:
        return run(problem, state)
    parts: list[tuple[Tensor, Tensor]] = []
    finished: list[tuple[Tensor, MemoryState]] = []
    for phase in state.phase.unique().tolist():
        rows = (state.phase == phase).nonzero().squeeze(1)
        out, ended = _run_group(run, problem, state, lengths, rows)
        parts.append((rows, out))
        finished.extend(ended)
    order = torch.cat([rows for rows, _ in parts]).argsort()
    out = torch.cat([out for _, out in parts]).index_select(0, order.to(problem.q.device))
    return out, _gather(finished)


def _run_group(
    run: Run, problem: Problem, state: MemoryState, lengths: Tensor, rows: Tensor
) -> tuple[Tensor, list[tuple[Tensor, MemoryState]]]:
    """The same for rows in one phase: outputs [rows, H, N, V], and (rows, state) wherever some end."""
    batch = len(rows)
    here = torch.arange(batch)
    now = state.index_select(rows)
    start, pieces, finished = 0, [], []
    for stop in lengths[rows].unique().tolist():
        out, now = run(problem.part(start, stop, rows[here]), now)
        full = out.new_zeros(batch, *out.shape[1:])
        pieces.append(full.index_copy(0, here.to(out.device), out))
        ends = lengths[rows[here]] == stop
        finished.append((rows[here[ends]], now.index_select(ends.nonzero().squeeze(1))))
        now = now.index_select((~ends).nonzero().squeeze(1))
        here, start = here[~ends], stop
    rest = problem.num_steps - start
    if rest > 0:
        pieces.append(pieces[0].new_zeros(batch, pieces[0].shape[1], rest, pieces[0].shape[3]))
    return torch.cat(pieces, dim=2), finished


def _gather(parts: list[tuple[Tensor, MemoryState]]) -> MemoryState:
    """One state, rows in their own order, from (rows, state) pairs that cover them."""
    order = torch.cat([rows for rows, _ in parts]).argsort()
    states = [state for _, state in parts]
    names = list(states[0].slots)
    joined = MemoryState(
        {name: torch.cat([s.slots[name] for s in states]) for name in names},
        {name: torch.cat([s.point[name] for s in states]) for name in names},
        torch.cat([s.phase for s in states]),
    )
    return joined.index_select(order)
