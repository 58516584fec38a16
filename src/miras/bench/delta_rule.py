"""The gated delta rule by triangular solves, in plain PyTorch: the form that our path for it is measured beside.

The WY form of Gated DeltaNet. With c the cumulative log-decay of a block, L[t, i] = exp(c_t - c_i) for i <= t and K_b the
keys times their rates,

    A = strictly lower part of (K_b K^T) o L,    [U, W] = (I + A)^-1 [V_b, exp(c) o K_b]
    N = U - W S,    out = ((Q K^T) o L) N + (exp(c) o Q) S,    S <- exp(c_b) S + (exp(c_b - c) o K)^T N

Only the lines with S are taken block by block. It is `miras.models.gated_deltanet` (a test compares the two). The inverse
with blocks of 32 was the fastest of inverse and solve with blocks of 32 and 64, on two CPU threads with heads of 64.

Source: Gated DeltaNet (arXiv 2412.06464) Sec. 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor) -> Tensor:
    """q, k [B, T, H, K], v [B, T, H, V], rates beta and log-decays g [B, T, H], state [H, K, V] -> [B, T, H, V]."""

    def blocks(x: Tensor) -> Tensor:
        return x.transpose(1, 2).unflatten(2, (-1, BLOCK)).movedim(2, 0).contiguous()

    q, k, v, beta, g = blocks(q), blocks(k), blocks(v), blocks(beta).unsqueeze(-1), blocks(g)
    total = g.cumsum(-1)
    future = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=q.device).triu(1)
    mask = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(future, -torch.inf).exp()
    decay, rated = total.exp().unsqueeze(-1), beta * k
    system = ((rated @ k.mT) * mask).tril(-1)
    eye = torch.eye(BLOCK, dtype=q.dtype, device=q.device)
    inverse = torch.linalg.solve_triangular(system + eye, eye.expand_as(system), upper=False, unitriangular=True)
    u, w = (inverse @ torch.cat((beta * v, decay * rated), -1)).split([v.shape[-1], k.shape[-1]], -1)
    writes = ((total[..., -1:] - total).exp().unsqueeze(-1) * k).mT
    kept = decay[..., -1:, :]
    state = state.expand(q.shape[1], *state.shape)
    states: list[Tensor] = []
    errors: list[Tensor] = []
    for u_i, w_i, write, keep in zip(u.unbind(), w.unbind(), writes.unbind(), kept.unbind(), strict=True):
        error = torch.baddbmm(u_i.flatten(0, 1), w_i.flatten(0, 1), state.flatten(0, 1), alpha=-1).view_as(u_i)
        states.append(state)
        errors.append(error)
        state = keep * state + write @ error
    out = ((q @ k.mT) * mask) @ torch.stack(errors) + (decay * q) @ torch.stack(states)
    return out.movedim(0, 2).flatten(2, 3).transpose(1, 2)
