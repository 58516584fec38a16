"""The published formulation of TTT-MLP, written anew: a loop over mini-batches in their dual form.

Inner gradients are written by hand and everything is differentiated by autograd, as in its authors' PyTorch code. It is
`miras.models.ttt_mlp` in the other formulation (a test compares the two).

Source: TTT (arXiv 2407.04620) Sec. 2.4-2.7 and App. A, and its published code (ttt-lm-pytorch).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-5


def ttt_mlp(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, token: Tensor, weights: Mapping[str, Tensor], gain: Tensor, shift: Tensor
) -> Tensor:
    """q, k, v [B, T, H, d], lr [B, T, H], token rates [b] of a mini-batch, weights [H, ...], norm [H, d] -> [B, T, H, d]."""
    size = len(token)
    xq, xk, xv = (x.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4) for x in (q, k, v))
    rates = token[:, None] * lr.unflatten(1, (-1, size)).permute(1, 0, 3, 2).unsqueeze(-2)
    gain, shift = gain[:, None], shift[:, None]
    state = [weights[name].expand(q.shape[0], -1, -1, -1) for name in ("up", "up_bias", "down", "down_bias")]
    outputs: list[Tensor] = []
    for batch in zip(xq, xk, xv, rates, strict=True):
        out, state = _mini_batch(*batch, state, gain, shift)
        outputs.append(out)
    return torch.stack(outputs).permute(1, 0, 3, 2, 4).flatten(1, 2)


def _mini_batch(
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: list[Tensor], gain: Tensor, shift: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """One mini-batch [B, H, b, d], rates [B, H, b, b] of gradient i at token t: outputs and the next weights."""
    w1, b1, w2, b2 = state
    z1 = k @ w1 + b1
    x2 = F.gelu(z1, approximate="tanh")
    z2 = x2 @ w2 + b2
    g2 = _norm_l2_gradient(z2, v - k, gain, shift)
    g1 = g2 @ w2.mT * _gelu_slope(z1)
    rates = rates.tril()
    z1_bar = q @ w1 - (rates * (q @ k.mT)) @ g1 + b1 - rates @ g1
    x2_bar = F.gelu(z1_bar, approximate="tanh")
    z2_bar = x2_bar @ w2 - (rates * (x2_bar @ x2.mT)) @ g2 + b2 - rates @ g2
    out = q + gain * F.layer_norm(z2_bar, z2_bar.shape[-1:], eps=NORM_EPS) + shift
    last = rates[..., -1, :, None]
    moved = [
        w1 - (last * k).mT @ g1,
        b1 - (last * g1).sum(-2, keepdim=True),
        w2 - (last * x2).mT @ g2,
        b2 - (last * g2).sum(-2, keepdim=True),
    ]
    return out, moved


def _norm_l2_gradient(z: Tensor, target: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Gradient of 1/2 ||gain LN(z) + shift - target||^2 in z."""
    std = (z.var(-1, unbiased=False, keepdim=True) + NORM_EPS).sqrt()
    unit = (z - z.mean(-1, keepdim=True)) / std
    g = gain * (gain * unit + shift - target)
    return (g - g.mean(-1, keepdim=True) - unit * (g * unit).mean(-1, keepdim=True)) / std


def _gelu_slope(x: Tensor) -> Tensor:
    c = math.sqrt(2 / math.pi)
    tanh = torch.tanh(c * x * (1 + 0.044715 * x * x))
    return 0.5 * x * (1 - tanh * tanh) * c * (1 + 3 * 0.044715 * x * x) + 0.5 * (1 + tanh)
