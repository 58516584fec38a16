"""Layers with a deep or biased memory, each typed from its own paper or its authors' code; see papers_matrix.py.

Inner gradients are derived by hand, through the memory's own normalisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.papers_matrix import EPS, Params, conv, convolved, linear, normal, rate, rotary, split, standard_output, unit

Weights = dict[str, Tensor]


# Gradients of 1/2 norm(gain LN(z) + shift - target)^2. ------------------------------------------------------------------


def norm_l2_backward(z: Tensor, target: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """In z (`ln_fused_l2_bwd` of TTT's code): (g - mean(g) - z' mean(g z')) / std, z' = LN(z), g = gain (y - target)."""
    std = (z.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
    unscaled = (z - z.mean(-1, keepdim=True)) / std
    g = gain * (gain * unscaled + shift - target)
    return (g - g.mean(-1, keepdim=True) - unscaled * (g * unscaled).mean(-1, keepdim=True)) / std


def gelu_backward(x: Tensor) -> Tensor:
    """The slope of x Phi(x): Phi(x) + x phi(x)."""
    return (1 + torch.erf(x / math.sqrt(2))) / 2 + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def gelu_tanh_backward(x: Tensor) -> Tensor:
    """The slope of x / 2 (1 + tanh(c x (1 + 0.044715 x^2))) (`gelu_bwd` of TTT's code, with c = sqrt(2 / pi) in full)."""
    c = math.sqrt(2 / math.pi)
    tanh = torch.tanh(c * x * (1 + 0.044715 * x * x))
    return x / 2 * (1 - tanh * tanh) * c * (1 + 3 * 0.044715 * x * x) + (1 + tanh) / 2


class Network(NamedTuple):
    """A network up to its normalisation: z = predict(w, x), and d loss / d w by hand. Rows x [H, 1, d]."""

    predict: Callable[[Weights, Tensor], Tensor]
    gradients: Callable[[Weights, Tensor, Tensor, Tensor, Tensor], Weights]


def ttt_linear_predict(w: Weights, x: Tensor) -> Tensor:
    return x @ w["up"] + w["up_bias"]


def ttt_linear_gradients(w: Weights, x: Tensor, target: Tensor, gain: Tensor, shift: Tensor) -> Weights:
    dz = norm_l2_backward(ttt_linear_predict(w, x), target, gain, shift)
    return {"up": x.mT @ dz, "up_bias": dz}


def ttt_mlp_predict(w: Weights, x: Tensor) -> Tensor:
    return F.gelu(x @ w["up"] + w["up_bias"], approximate="tanh") @ w["down"] + w["down_bias"]


def ttt_mlp_gradients(w: Weights, x: Tensor, target: Tensor, gain: Tensor, shift: Tensor) -> Weights:
    z1 = x @ w["up"] + w["up_bias"]
    dz2 = norm_l2_backward(ttt_mlp_predict(w, x), target, gain, shift)
    dz1 = (dz2 @ w["down"].mT) * gelu_tanh_backward(z1)
    return {"up": x.mT @ dz1, "up_bias": dz1, "down": F.gelu(z1, approximate="tanh").mT @ dz2, "down_bias": dz2}


def mlp_predict(w: Weights, x: Tensor) -> Tensor:
    return F.gelu(x @ w["up"]) @ w["down"]


def mlp_gradients(w: Weights, x: Tensor, target: Tensor, gain: Tensor, shift: Tensor) -> Weights:
    dz = norm_l2_backward(mlp_predict(w, x), target, gain, shift)
    return {"up": x.mT @ ((dz @ w["down"].mT) * gelu_backward(x @ w["up"])), "down": F.gelu(x @ w["up"]).mT @ dz}


TTT_LINEAR = Network(ttt_linear_predict, ttt_linear_gradients)
TTT_MLP = Network(ttt_mlp_predict, ttt_mlp_gradients)


def memory_of(p: Params, *names: str) -> Weights:
    """The layer's initial fast weights [H, d_in, d_out]."""
    return {name: p[f"memory.{name}"] for name in names}


def memory_norm(p: Params) -> tuple[Tensor, Tensor]:
    """Gain and shift [H, 1, V]."""
    return p["memory.norm_weight"][:, None], p["memory.norm_bias"][:, None]


# TTT. -------------------------------------------------------------------------------------------------------------------


def ttt_recurrence(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, token: Tensor, w: Weights, gain: Tensor, shift: Tensor, network: Network
) -> Tensor:
    """Mini-batches of len(token): W_t = W_r - token_j sum_{r < i <= t} eta_i G_i(W_r), out_t = q_t + LN(z(W_t; q_t)).

    The targets of LN(z) are v - k; eta [T, H], token [b], gain and shift [H, 1, V].
    """
    out = []
    start = total = w
    for t in range(len(q)):
        place = t % len(token)
        if place == 0:
            start, total = w, {name: torch.zeros_like(x) for name, x in w.items()}
        gradients = network.gradients(start, k[t][:, None], (v[t] - k[t])[:, None], gain, shift)
        total = {name: x + eta[t][:, None, None] * gradients[name] for name, x in total.items()}
        w = {name: x - token[place] * total[name] for name, x in start.items()}
        out.append(q[t] + (gain * normal(network.predict(w, q[t][:, None])) + shift).squeeze(1))
    return torch.stack(out)


def _ttt(
    x: Tensor, p: Params, heads: int, network: Network, names: tuple[str, ...], refresh: int, base: float = 1.0
) -> Tensor:
    q, k, v = (split(conv(linear(x, p, f"{name}_proj"), p, f"{name}_conv1d"), heads) for name in "qkv")
    positions = torch.arange(len(x)) % refresh
    eta = base * rate(x, p) / q.shape[-1]
    token = (1 / torch.arange(1, refresh + 1, dtype=x.dtype) + p["gate_projs.token.shift"]).clamp_min(0)
    weights, affine = memory_of(p, *names), memory_norm(p)
    out = ttt_recurrence(rotary(q, positions), rotary(k, positions), v, eta, token, weights, *affine, network)
    return linear(normal(out.flatten(1)) * p["o_norm.weight"] + p["o_norm.bias"], p, "o_proj")


def ttt_linear(x: Tensor, p: Params, heads: int, *, refresh: int = 16) -> Tensor:
    """TTT-Linear (2407.04620), Eq. 4 with Sec. 2.4 and 2.7; learned token rates and rotations as in ttt-lm-pytorch."""
    return _ttt(x, p, heads, TTT_LINEAR, ("up", "up_bias"), refresh)


def ttt_mlp(x: Tensor, p: Params, heads: int, *, refresh: int = 16) -> Tensor:
    """TTT-MLP (2407.04620), Eq. 4 with Sec. 2.4 and 2.7; the same with a hidden layer of 4 d, eta_base 0.1."""
    return _ttt(x, p, heads, TTT_MLP, ("up", "up_bias", "down", "down_bias"), refresh, 0.1)


# Atlas. -----------------------------------------------------------------------------------------------------------------


def polynomial(x: Tensor, coefficient: Tensor) -> Tensor:
    """Atlas Sec. 3, degree 2: x and its products x_i x_j, i <= j; `coefficient` is one number, or one a head."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1])
    return torch.cat((x, coefficient.reshape(-1, 1) * x[..., i] * x[..., j]), -1)


def newton_schulz(s: Tensor, steps: int) -> Tensor:
    """norm(S) U f(Sigma) V^T / sqrt(min(d_in, d_out)), f being x -> 3.4445 x - 4.7750 x^3 + 2.0315 x^5, `steps` times over.

    By the singular values, which are the eigenvalues (with both signs, and zeros) of [[0, S], [S^T, 0]]. The derivative of
    such a function is its divided differences in the eigenvectors' basis (Daleckii and Krein), without poles at equal ones.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    rows, columns = s.shape[-2:]
    norm = (s.square().sum((-2, -1), keepdim=True) + 1e-12).sqrt()
    dilated = F.pad(s / norm, (rows, 0, 0, columns))
    dilated = dilated + dilated.mT
    x, basis = torch.linalg.eigh(dilated.detach())
    slope = torch.ones_like(dilated)
    for _ in range(steps):
        y, z = x[..., :, None], x[..., None, :]
        squares = y * y + y * z + z * z
        slope = slope * (a + b * squares + c * (squares * (y * y + z * z) - y * y * z * z))
        x = a * x + b * x**3 + c * x**5
    change = basis.mT @ (dilated - dilated.detach()) @ basis
    whole = basis @ (torch.diag_embed(x) + slope * change) @ basis.mT
    return norm * whole[..., :rows, rows:] / math.sqrt(min(rows, columns))


def omega_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    alpha: Tensor,
    mu: Tensor | None,
    w: Weights,
    gain: Tensor,
    shift: Tensor,
    window: int,
    refresh: int,
    steps: int = 5,
) -> Tensor:
    """A_t = A_0 + alpha_t (A_{t-1} - A_0) + S_t, S_t = -sum of the last `window` eta_i G_i, out_t = LN(z(A_t; q_t)).

    G_i is taken at the last token of the `refresh` window before i's. With mu, S_t has mu_t S_{t-1} besides, and enters A_t
    by Newton-Schulz at the last token of a `refresh` window. eta, alpha, mu [T, H].
    """
    start, point, recent, out = w, w, [], []
    momentum = {name: torch.zeros_like(x) for name, x in w.items()}
    for t in range(len(q)):
        if t % refresh == 0:
            point = w
        gradients = mlp_gradients(point, k[t][:, None], v[t][:, None], gain, shift)
        recent = [*recent, {name: eta[t][:, None, None] * g for name, g in gradients.items()}][-window:]
        for name in w:
            past = 0 if mu is None else mu[t][:, None, None] * momentum[name]
            momentum[name] = past - sum(g[name] for g in recent)
        muon = mu is not None and (t + 1) % refresh == 0
        step = {name: newton_schulz(s, steps) if muon else s for name, s in momentum.items()}
        w = {name: a + alpha[t][:, None, None] * (w[name] - a) + step[name] for name, a in start.items()}
        out.append((gain * normal(mlp_predict(w, q[t][:, None])) + shift).squeeze(1))
    return torch.stack(out)


def _atlas(
    x: Tensor, p: Params, heads: int, mu: Tensor | None, window: int, maximum: float, refresh: int, steps: int
) -> Tensor:
    q, k, v = (unit(y) for y in convolved(x, p, (heads, heads, heads)))
    q, k = (polynomial(y, p["features.coefficient"]) for y in (q, k))
    alpha = torch.sigmoid(linear(x, p, "a_proj.proj") + p["a_proj.bias"])
    eta, weights, affine = maximum * rate(x, p), memory_of(p, "up", "down"), memory_norm(p)
    return standard_output(omega_recurrence(q, k, v, eta, alpha, mu, weights, *affine, window, refresh, steps), x, p)


def omeganet(x: Tensor, p: Params, heads: int, *, window: int = 4, maximum: float = 1.0, refresh: int = 16) -> Tensor:
    """OmegaNet (2505.23735), Eq. 9, decaying towards A_0; polynomial features of q and k; the rate is maximum * sigmoid."""
    return _atlas(x, p, heads, None, window, maximum, refresh, steps=5)


def atlas(
    x: Tensor, p: Params, heads: int, *, window: int = 4, maximum: float = 1.0, refresh: int = 16, steps: int = 5
) -> Tensor:
    """Atlas (2505.23735), Sec. 5: OmegaNet with momentum, orthogonalised at window ends (Muon)."""
    mu = torch.sigmoid(linear(x, p, "gate_projs.mu.proj") + p["gate_projs.mu.bias"])
    return _atlas(x, p, heads, mu, window, maximum, refresh, steps)
