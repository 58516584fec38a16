"""A learning rule over a block of b gradient steps, as four small matrices.

With slots z_0 at the block's start and inputs u_1 .. u_b (u_i = -eta_i G_i):

    D_t   = sum_l carry[l][t] z_0[l] + sum_{i <= t} mix[t, i] u_i
    z_b[j] = sum_l move[j][l] z_0[l] + sum_i write[j][i] u_i

Decay products are differences of log sums, masked before the exponential. Gates per channel put an axis C in front.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class System(NamedTuple):
    """mix [..., (C), b, b]; carry[l] [..., (C), b]; write[j] [..., (C), b]; move[j][l] [..., (C)] or None for zero.

    `leaky` says that the rule is D_t = alpha_t D_{t-1} + u_t and nothing else.
    """

    mix: Tensor
    carry: tuple[Tensor, ...]
    write: tuple[Tensor, ...]
    move: tuple[tuple[Tensor | None, ...], ...]
    leaky: bool = False

    def before(self, log_decay: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """mix and carry one step earlier (for predictions), times alpha_t where its logarithm is given."""
        if self.leaky and log_decay is not None:
            return self.mix.tril(-1), self.carry
        mix = torch.cat((torch.zeros_like(self.mix[..., :1, :]), self.mix[..., :-1, :]), dim=-2)
        carry = tuple(
            torch.cat((torch.full_like(x[..., :1], float(slot == 0)), x[..., :-1]), dim=-1)
            for slot, x in enumerate(self.carry)
        )
        if log_decay is None:
            return mix, carry
        alpha = log_decay.exp()
        return mix * alpha.unsqueeze(-1), tuple(x * alpha for x in carry)

    def unbind(self) -> list[System]:
        """Each of a batch of systems, along the first axis."""
        count = len(self.mix)
        move = [[(None,) * count if x is None else x.unbind() for x in row] for row in self.move]
        rows = zip(self.mix.unbind(), _rows(self.carry), _rows(self.write), strict=True)
        return [System(*row, tuple(tuple(x[i] for x in line) for line in move)) for i, row in enumerate(rows)]


def _rows(batches: tuple[Tensor, ...]) -> zip[tuple[Tensor, ...]]:
    return zip(*(x.unbind() for x in batches), strict=True)


def build_system(log_decays: tuple[Tensor, ...], window: int = 1) -> System:
    """The system of a chain of leaky integrators with the given log-decays [..., (C), b], the first one being D's.

    The last of them is fed, at each step, the sum of the last `window` inputs; with more than one, the window - 1 inputs
    before the block are further slots, the latest first.
    """
    sums = [x.cumsum(-1) for x in log_decays]
    masks = [decay_mask(x) for x in sums]
    recent = _recent(masks[0], window)
    carries, mixes = [], []
    for first in range(len(sums)):
        carry, product = [], None
        for mask, total in zip(masks[first:], sums[first:], strict=True):
            start = decayed(total)
            carry.append(start if product is None else (product @ start.unsqueeze(-1)).squeeze(-1))
            product = mask if product is None else product @ mask
        assert product is not None
        # The input of j - 1 steps before the block is in the window of its first window - j steps.
        carry += [product[..., : window - j].sum(-1) for j in range(1, window)]
        carries.append(carry)
        mixes.append(product if window == 1 else product @ recent)
    move = [(*[None] * first, *[x[..., -1] for x in carry]) for first, carry in enumerate(carries)]
    kept = _kept(carries[0][0], len(sums), window)
    write = (*[x[..., -1, :] for x in mixes], *[x for x, _ in kept])
    return System(mixes[0], tuple(carries[0]), write, (*move, *[x for _, x in kept]), leaky=len(sums) * window == 1)


def decay_mask(total: Tensor) -> Tensor:
    """exp(total_t - total_i) for i <= t, else 0, of cumulative log-decays [..., b]."""
    size = total.shape[-1]
    future = torch.ones(size, size, dtype=torch.bool, device=total.device).triu(1)
    return decayed((total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(future, -torch.inf))


def decayed(total: Tensor) -> Tensor:
    """exp(total), and 0 below the root of the smallest normal number (1e-19 in float32).

    What is left of a gradient there is far below the rounding of its neighbours', and products of two such factors would be
    denormal numbers, which processors multiply some hundred times as slowly.
    """
    least = 0.5 * math.log(torch.finfo(total.dtype).tiny)
    return total.masked_fill(total < least, -torch.inf).exp()


def _recent(mask: Tensor, window: int) -> Tensor:
    """[b, b]: 1 where input i is among the last `window` at step t."""
    return mask.new_ones(mask.shape[-2:]).tril().triu(1 - window)


def _kept(like: Tensor, chain: int, window: int) -> list[tuple[Tensor, tuple[Tensor | None, ...]]]:
    """Rows of write and move for the slots that keep inputs: the one of j - 1 steps before the block's end."""
    size = like.shape[-1]
    rows: list[tuple[Tensor, tuple[Tensor | None, ...]]] = []
    for j in range(1, window):
        write = torch.zeros_like(like)
        move: list[Tensor | None] = [None] * (chain + window - 1)
        if j <= size:
            write[..., size - j] = 1
        else:
            move[chain + j - size - 1] = torch.ones_like(like[..., 0])
        rows.append((write, tuple(move)))
    return rows
