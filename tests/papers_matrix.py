"""Layers with a matrix memory, each typed from its own paper: hidden states in, hidden states out, one token at a time.

A layer is a function of one sequence x [T, M], of its parameters by their names in the layer's state_dict, and of the number
of heads; it is differentiable in x and in every parameter. Its recurrence, on q, k, v [T, H, width] and on the paper's own
gates, is a function by itself. A state is laid out as its paper does: [K, V] where it writes k^T v, [V, K] where it writes
v k^T. Nothing here comes from the package, and nothing is blocked, so that an error would have to be made twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Params = Mapping[str, Tensor]

EPS = 1e-5


# Pieces. ----------------------------------------------------------------------------------------------------------------


def linear(x: Tensor, p: Params, name: str) -> Tensor:
    return x @ p[f"{name}.weight"].mT


def low_rank(x: Tensor, p: Params, name: str, between: Callable[[Tensor], Tensor] = lambda y: y) -> Tensor:
    return linear(between(linear(x, p, f"{name}.0")), p, f"{name}.1")


def split(x: Tensor, heads: int) -> Tensor:
    """[T, H * width] -> [T, H, width]."""
    return x.unflatten(-1, (heads, -1))


def outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


def times(q: Tensor, s: Tensor) -> Tensor:
    """q S for rows q [H, K] and S [H, K, V]."""
    return (q[..., None, :] @ s).squeeze(-2)


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def normal(x: Tensor, eps: float = EPS) -> Tensor:
    """Layer normalisation without affine part."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def conv(y: Tensor, p: Params, name: str) -> Tensor:
    """y_t[c] = sum_{s < 4} w[c, 3 - s] y_{t-s}[c] (+ bias[c]), zero before the sequence."""
    past = torch.cat((y.new_zeros(3, y.shape[1]), y))
    out = torch.stack([(p[f"{name}.weight"][:, 0].mT * past[t : t + 4]).sum(0) for t in range(len(y))])
    return out + p[f"{name}.bias"] if f"{name}.bias" in p else out


def rotary(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """RoFormer Eq. 14: pairs (x_i, x_{i + K/2}), as complex numbers, times exp(sqrt(-1) t theta^(-2i/K))."""
    half = x.shape[-1] // 2
    angle = outer(positions.to(x.dtype), theta ** (-torch.arange(half, dtype=x.dtype) / half))[:, None]
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


def projected(x: Tensor, p: Params, heads: int) -> tuple[Tensor, ...]:
    """q, k, v [T, H, width]: the projections as they are."""
    return tuple(split(linear(x, p, f"{name}_proj"), heads) for name in "qkv")


def convolved(x: Tensor, p: Params, heads: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """q, k, v [T, their heads, width]: projected, convolved, and through SiLU."""
    parts = zip("qkv", heads, strict=True)
    return tuple(split(F.silu(conv(linear(x, p, f"{n}_proj"), p, f"{n}_conv1d")), h) for n, h in parts)


def rate(x: Tensor, p: Params) -> Tensor:
    """beta = sigmoid(x W + b)."""
    return torch.sigmoid(linear(x, p, "b_proj.proj") + p["b_proj.bias"])


def mamba_decay(x: Tensor, p: Params) -> Tensor:
    """alpha = exp(-exp(A_log) softplus(x W + dt_bias))."""
    return torch.exp(-p["a_proj.A_log"].exp() * F.softplus(linear(x, p, "a_proj.proj") + p["a_proj.dt_bias"]))


def head_norm(out: Tensor, p: Params) -> Tensor:
    return (rms(out) * p["o_norm.weight"]).flatten(1)


def width_norm(out: Tensor, p: Params) -> Tensor:
    return rms(out.flatten(1)) * p["o_norm.weight"]


def standard_output(out: Tensor, x: Tensor, p: Params) -> Tensor:
    return linear(head_norm(out, p) * F.silu(linear(x, p, "g_proj")), p, "o_proj")


# Outer products and decay. ----------------------------------------------------------------------------------------------


def linear_attention_recurrence(q: Tensor, k: Tensor, v: Tensor, normalizer: bool = False) -> Tensor:
    """s_i = s_{i-1} + phi(k_i)^T v_i, z_i = z_{i-1} + phi(k_i), y_i = phi(q_i) s_i (/ (phi(q_i) z_i))."""
    s, z, out = torch.zeros_like(outer(k[0], v[0])), torch.zeros_like(k[0]), []
    for q_t, k_t, v_t in zip(q, k, v, strict=True):
        s, z = s + outer(k_t, v_t), z + k_t
        y = times(q_t, s)
        out.append(y / ((q_t * z).sum(-1, keepdim=True) + 1e-6) if normalizer else y)
    return torch.stack(out)


def linear_attention(x: Tensor, p: Params, heads: int, *, normalizer: bool = False) -> Tensor:
    """Linear attention (2006.16236), Eq. 7 and 16-20, without its normaliser or with it; phi is divided by sqrt(K)."""
    q, k, v = projected(x, p, heads)
    phi_q, phi_k = ((1 + F.elu(y)) / math.sqrt(y.shape[-1]) for y in (q, k))
    return standard_output(linear_attention_recurrence(phi_q, phi_k, v, normalizer), x, p)


def retention(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
    """S_n = gamma S_{n-1} + K_n^T V_n, o_n = Q_n S_n; gamma [H]."""
    s, out = torch.zeros_like(outer(k[0], v[0])), []
    for q_t, k_t, v_t in zip(q, k, v, strict=True):
        s = gamma[:, None, None] * s + outer(k_t, v_t)
        out.append(times(q_t, s))
    return torch.stack(out)


def retnet(x: Tensor, p: Params, heads: int) -> Tensor:
    """RetNet (2307.08621), Eq. 6 and 8: rotations, then retention at gamma = 1 - 2^(-5-h), then a gated norm a head."""
    q, k, v = projected(x, p, heads)
    positions = torch.arange(len(x))
    q, k = rotary(q, positions) / math.sqrt(q.shape[-1]), rotary(k, positions)
    gamma = 1 - 2.0 ** (-5 - torch.arange(heads, dtype=x.dtype))
    return standard_output(retention(q, k, v, gamma), x, p)


def lightning_attention(x: Tensor, p: Params, heads: int) -> Tensor:
    """Lightning Attention-2 (2401.04658) in MiniMax-01's block (2501.08313): kv_t = lambda kv_{t-1} + k_t^T v_t."""
    q, k, v = (F.silu(y) for y in projected(x, p, heads))
    slope = 2.0 ** (-8 * torch.arange(1, heads + 1, dtype=x.dtype) / heads)
    out = width_norm(retention(q, k, v, (-slope).exp()), p)
    return linear(out * torch.sigmoid(linear(x, p, "g_proj")), p, "o_proj")


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor) -> Tensor:
    """S_t = (alpha_t^T 1) o S_{t-1} + k_t^T v_t, o_t = q_t S_t; alpha [T, H, K]."""
    s, out = torch.zeros_like(outer(k[0], v[0])), []
    for q_t, k_t, v_t, alpha_t in zip(q, k, v, alpha, strict=True):
        s = outer(alpha_t, torch.ones_like(v_t)) * s + outer(k_t, v_t)
        out.append(times(q_t, s))
    return torch.stack(out)


def gla(x: Tensor, p: Params, heads: int) -> Tensor:
    """GLA (2312.06635), Eq. 3 and Sec. 4.4: alpha_t = sigmoid(x_t W_1 W_2 + b)^(1/16)."""
    q, k, v = projected(x, p, heads)
    gate = split(low_rank(x, p, "a_proj.proj"), heads) + p["a_proj.bias"].view(heads, -1)
    out = gated_linear_attention(q / math.sqrt(q.shape[-1]), k, v, torch.sigmoid(gate) ** (1 / 16))
    return standard_output(out, x, p)


def hgrn2_recurrence(o: Tensor, f: Tensor, i: Tensor) -> Tensor:
    """h_t = h_{t-1} Diag(f_t) + i_t (1 - f_t)^T, y_t = h_t o_t; the state is [V, K]."""
    h, out = torch.zeros_like(outer(i[0], f[0])), []
    for o_t, f_t, i_t in zip(o, f, i, strict=True):
        h = h * f_t[:, None, :] + outer(i_t, 1 - f_t)
        out.append(times(o_t, h.mT))
    return torch.stack(out)


def hgrn2(x: Tensor, p: Params, heads: int, *, lower_bound: float = 0.0) -> Tensor:
    """HGRN2 (2404.07904), Sec. 3: one minus the forget gate, which is bounded from below, is the key."""
    o, f, i = projected(x, p, heads)
    f = lower_bound + (1 - lower_bound) * torch.sigmoid(f)
    return linear(width_norm(hgrn2_recurrence(F.silu(o), f, i), p), p, "o_proj")


def state_space(c: Tensor, b: Tensor, x: Tensor, dt: Tensor, a: Tensor, d: Tensor) -> Tensor:
    """h_t = exp(dt_t A) h_{t-1} + (dt_t B_t)^T x_t, y_t = C_t h_t + D x_t; A, D [H], dt [T, H], B and C of one head."""
    h, out = torch.zeros_like(outer(b[0], x[0])), []
    for c_t, b_t, x_t, dt_t in zip(c, b, x, dt, strict=True):
        h = (dt_t * a).exp()[:, None, None] * h + outer(dt_t[:, None] * b_t, x_t)
        out.append(times(c_t, h) + d[:, None] * x_t)
    return torch.stack(out)


def mamba2(x: Tensor, p: Params, heads: int) -> Tensor:
    """Mamba-2 (2405.21060), Eq. 1 with a scalar A, and Sec. 7: one B and one C for all heads, the norm after the gate."""
    c, b, v = convolved(x, p, (1, 1, heads))
    dt = F.softplus(linear(x, p, "b_proj.proj") + p["b_proj.dt_bias"])
    y = state_space(c, b, v, dt, -p["features.A_log"].exp(), p["features.D"])
    return linear(rms(y.flatten(1) * F.silu(linear(x, p, "g_proj"))) * p["o_norm.weight"], p, "o_proj")


# Delta rules. -----------------------------------------------------------------------------------------------------------


def householder(beta: Tensor, k: Tensor) -> Tensor:
    """I - beta k k^T for beta [H], k [H, K]."""
    return torch.eye(k.shape[-1], dtype=k.dtype) - beta[:, None, None] * outer(k, k)


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, alpha: Tensor) -> Tensor:
    """S_t = S_{t-1} (alpha_t (I - beta_t k_t k_t^T)) + beta_t v_t k_t^T, o_t = S_t q_t; alpha, beta [T, H]."""
    s, out = torch.zeros_like(outer(v[0], k[0])), []
    for q_t, k_t, v_t, beta_t, alpha_t in zip(q, k, v, beta, alpha, strict=True):
        s = s @ (alpha_t[:, None, None] * householder(beta_t, k_t)) + outer(beta_t[:, None] * v_t, k_t)
        out.append(times(q_t, s.mT))
    return torch.stack(out)


def deltanet(x: Tensor, p: Params, heads: int, *, negative_eigenvalues: bool = False) -> Tensor:
    """DeltaNet (2406.06484), Eq. 3 and Sec. 3.3; beta in [0, 2] with negative eigenvalues (2411.12537)."""
    q, k, v = convolved(x, p, (heads, heads, heads))
    beta = (2 if negative_eigenvalues else 1) * rate(x, p)
    out = gated_delta_rule(unit(q), unit(k), v, beta, torch.ones_like(beta))
    return linear(head_norm(out, p), p, "o_proj")


def gated_deltanet(x: Tensor, p: Params, heads: int) -> Tensor:
    """Gated DeltaNet (2412.06464), Eq. 10 and Sec. 3.4."""
    q, k, v = convolved(x, p, (heads, heads, heads))
    return standard_output(gated_delta_rule(unit(q), unit(k), v, rate(x, p), mamba_decay(x, p)), x, p)


def kimi_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, alpha: Tensor) -> Tensor:
    """S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t; alpha [T, H, K]."""
    s, out = torch.zeros_like(outer(k[0], v[0])), []
    for q_t, k_t, v_t, beta_t, alpha_t in zip(q, k, v, beta, alpha, strict=True):
        s = householder(beta_t, k_t) @ torch.diag_embed(alpha_t) @ s + outer(beta_t[:, None] * k_t, v_t)
        out.append(times(q_t, s))
    return torch.stack(out)


def kda(x: Tensor, p: Params, heads: int) -> Tensor:
    """Kimi Delta Attention (2510.26692), Eq. 1 and Sec. 4: a decay a channel, a low-rank sigmoid gate on the output."""
    q, k, v = convolved(x, p, (heads, heads, heads))
    step = F.softplus(split(low_rank(x, p, "a_proj.proj"), heads) + p["a_proj.dt_bias"].view(heads, -1))
    alpha = torch.exp(-p["a_proj.A_log"].view(heads, 1).exp() * step)
    out = head_norm(kimi_delta_rule(unit(q), unit(k), v, rate(x, p), alpha), p)
    return linear(out * torch.sigmoid(low_rank(x, p, "g_proj") + p["g_proj.1.bias"]), p, "o_proj")


def delta_product_recurrence(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    """H_i = A_i H_{i-1} + B_i with A_i = g_i prod_j (I - beta_ij k_ij k_ij^T), later factors on the left, and

    B_i = sum_j prod_{l > j} (I - beta_il k_il k_il^T) beta_ij k_ij v_ij^T;  k, v [T, n, H, width], beta [T, n, H], g [T, H].
    """
    h, out = torch.zeros_like(outer(k[0, 0], v[0, 0])), []
    for q_t, k_t, v_t, beta_t, g_t in zip(q, k, v, beta, g, strict=True):
        factors = [householder(*pair) for pair in zip(beta_t, k_t, strict=True)]
        after = torch.eye(k.shape[-1], dtype=k.dtype)
        b = torch.zeros_like(h)
        for j in reversed(range(len(factors))):
            b = b + after @ outer(beta_t[j][:, None] * k_t[j], v_t[j])
            after = after @ factors[j]
        h = g_t[:, None, None] * after @ h + b
        out.append(times(q_t, h))
    return torch.stack(out)


def _delta_product(x: Tensor, p: Params, heads: int, n: int, g: Tensor) -> Tensor:
    q, k, v = convolved(x, p, (heads, n * heads, n * heads))
    k, v = (y.unflatten(1, (n, heads)) for y in (unit(k), v))
    beta = 2 * torch.sigmoid(linear(x, p, "b_proj.proj").unflatten(1, (n, heads)) + p["b_proj.bias"])
    return delta_product_recurrence(unit(q), k, v, beta, g)


def deltaproduct(x: Tensor, p: Params, heads: int, *, n: int = 2) -> Tensor:
    """DeltaProduct (2502.10297), Eq. 4-5: n Householder steps a token, beta in [0, 2]."""
    out = _delta_product(x, p, heads, n, x.new_ones(len(x), heads))
    return linear(head_norm(out, p), p, "o_proj")


def gated_deltaproduct(x: Tensor, p: Params, heads: int, *, n: int = 2) -> Tensor:
    """Gated DeltaProduct (2502.10297), Eq. 4-5 with one forget gate a token on A_i."""
    return standard_output(_delta_product(x, p, heads, n, mamba_decay(x, p)), x, p)


def implicit_recurrence(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """S_t = argmin_S norm(S - S_{t-1})^2 + beta_t norm(k_t S - v_t)^2, by its normal equations

    (I + beta_t k_t^T k_t) S_t = S_{t-1} + beta_t k_t^T v_t.
    """
    s, out = torch.zeros_like(outer(k[0], v[0])), []
    for q_t, k_t, v_t, beta_t in zip(q, k, v, beta, strict=True):
        s = torch.linalg.solve(householder(-beta_t, k_t), s + outer(beta_t[:, None] * k_t, v_t))
        out.append(times(q_t, s))
    return torch.stack(out)


def diagonal_recurrence(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """S_t = (1 - Delta_t k_t^2) o S_{t-1} + (Delta_t v_t) k_t, Delta_t = beta_t / (1 + beta_t k_t^T k_t); S is [V, K]."""
    s, out = torch.zeros_like(outer(v[0], k[0])), []
    for q_t, k_t, v_t, beta_t in zip(q, k, v, beta, strict=True):
        delta = (beta_t / (1 + beta_t * k_t.square().sum(-1)))[:, None].expand_as(v_t)
        s = (1 - outer(delta, k_t.square())) * s + outer(delta * v_t, k_t)
        out.append(times(q_t, s.mT))
    return torch.stack(out)


def longhorn(x: Tensor, p: Params, heads: int) -> Tensor:
    """Longhorn (2407.14207): the exact implicit update of its objective, online associative recall."""
    q, k, v = convolved(x, p, (heads, heads, heads))
    return standard_output(implicit_recurrence(q, k, v, rate(x, p)), x, p)


def longhorn_diagonal(x: Tensor, p: Params, heads: int) -> Tensor:
    """Longhorn (2407.14207), Alg. 1: only the transition's diagonal, which is what the published model runs."""
    q, k, v = convolved(x, p, (heads, heads, heads))
    return standard_output(diagonal_recurrence(q, k, v, rate(x, p)), x, p)


def wkv(r: Tensor, w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor) -> Tensor:
    """wkv_t = wkv_{t-1} (diag(w_t) - kappa_t^T (a_t o kappa_t)) + v_t^T k_t, out wkv_t r_t^T; the state is [V, K]."""
    s, out = torch.zeros_like(outer(v[0], k[0])), []
    for r_t, w_t, k_t, v_t, kappa_t, a_t in zip(r, w, k, v, kappa, a, strict=True):
        s = s @ (torch.diag_embed(w_t) - outer(kappa_t, a_t * kappa_t)) + outer(v_t, k_t)
        out.append(times(r_t, s.mT))
    return torch.stack(out)


def rwkv7(x: Tensor, p: Params, heads: int, *, v_first: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """RWKV-7 (2503.14456), Sec. 4.1 (time mixing), with the values v [T, H, V] beside the output.

    `v_first` is the first layer's v, for the layers after it; None in the first.
    """
    before = torch.cat((torch.zeros_like(x[:1]), x[:-1]))

    def lerp(name: str) -> Tensor:
        return x + (before - x) * p[f"token_shift.{name}"]

    def gate(name: str, source: str, between: Callable[[Tensor], Tensor] = lambda y: y) -> Tensor:
        return torch.sigmoid(
            split(low_rank(lerp(source), p, f"{name}.proj", between), heads) + p[f"{name}.bias"].view(heads, -1)
        )

    r, k, v = (split(linear(lerp(name), p, f"{name}_proj"), heads) for name in "qkv")
    k_k, k_a, r_k = (p[f"features.{name}"].view(heads, -1) for name in ("k_k", "k_a", "r_k"))
    a = gate("b_proj", "rate")
    w = torch.exp(-math.exp(-0.5) * gate("a_proj", "decay", torch.tanh))
    kappa, k = unit(k * k_k), k * torch.lerp(torch.ones_like(a), a, k_a.expand_as(a))
    if v_first is not None:
        v = torch.lerp(v, v_first, gate("gate_projs.residual", "v"))
    out = normal(wkv(r, w, k, v, kappa, a), 64e-5).flatten(1) * p["o_norm.weight"] + p["o_norm.bias"]
    bonus = (r * r_k * k).sum(-1, keepdim=True) * v
    return linear((out + bonus.flatten(1)) * low_rank(lerp("gate"), p, "g_proj", torch.sigmoid), p, "o_proj"), v
