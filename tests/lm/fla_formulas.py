"""Six published language models, written out in float64 over the weights of their flash-linear-attention checkpoints.

`logits(config, state, ids)` is a plain, differentiable loop over tokens, typed from the papers and from the modelling code
of flash-linear-attention (fla) 0.6.0, with nothing of this package: what a converted model computes is compared with it.
`config` is a checkpoint's config.json, `state` its tensors by their names in the file.

Shapes: x [B, T, D]; queries and keys [B, T, H, K], values [B, T, H, V], states S [B, H, K, V].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]

# What a field is where config.json does not have it; fla's own defaults, for the fields that change the maths or a shape.
BACKBONE: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "vocab_size": 32000,
    "norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "fuse_norm": True,
}
MLP = {"hidden_ratio": 4, "intermediate_size": None}
CONVOLUTION = {"use_short_conv": True, "conv_size": 4}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gla": BACKBONE
    | MLP
    | CONVOLUTION
    | {"use_short_conv": False, "expand_k": 0.5, "expand_v": 1.0, "num_heads": 4, "num_kv_heads": None, "clamp_min": None}
    | {"use_output_gate": True, "elementwise_affine": True},
    "retnet": BACKBONE
    | MLP
    | {"hidden_ratio": 2, "expand_k": 1.0, "expand_v": 2.0, "num_heads": 8, "num_kv_heads": None}
    | {"use_output_gate": True, "elementwise_affine": True},
    "delta_net": BACKBONE
    | MLP
    | CONVOLUTION
    | {"expand_k": 1.0, "expand_v": 1.0, "num_heads": 16, "use_gate": False, "use_beta": True, "allow_neg_eigval": False}
    | {"qk_norm": "l2", "qk_activation": "silu"},
    "gated_deltanet": BACKBONE
    | MLP
    | CONVOLUTION
    | {"expand_v": 2.0, "head_dim": 256, "num_heads": 6, "num_v_heads": None, "num_hidden_layers": 21}
    | {"use_gate": True, "allow_neg_eigval": False, "output_gate_activation": "swish"},
    "rwkv7": BACKBONE
    | MLP
    | {"head_dim": 64, "num_heads": None, "norm_eps": 1e-5, "hidden_act": "sqrelu"}
    | {"norm_first": True, "norm_bias": True, "decay_low_rank_dim": 64, "gate_low_rank_dim": 128}
    | {"a_low_rank_dim": 64, "v_low_rank_dim": 16},
    "mamba2": BACKBONE
    | {"head_dim": 64, "state_size": 128, "expand": 2, "conv_kernel": 4, "n_groups": 1, "num_hidden_layers": 48}
    | {"norm_eps": 1e-5, "use_bias": False, "use_conv_bias": True, "rmsnorm": True, "norm_before_gate": False}
    | {"D_has_hdim": False, "dt_limit": (0.0, float("inf"))},
}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "sqrelu": lambda x: torch.relu(x).square(),
    "elu": lambda x: F.elu(x) + 1,
    "identity": lambda x: x,
}


def settings(config: dict[str, Any]) -> SimpleNamespace:
    """The fields of a config.json that count, with fla's defaults; parts that are not written out here must be off."""
    assert all(config.get(name) is None for name in ("attn", "feature_map", "attnres_block_size"))
    defaults = DEFAULTS[config["model_type"]]
    return SimpleNamespace(model_type=config["model_type"], **defaults | {k: v for k, v in config.items() if k in defaults})


def logits(config: dict[str, Any], state: Weights, ids: Tensor) -> Tensor:
    """Next-token logits [B, T, vocab] of token ids [B, T]."""
    c, w = settings(config), {name: tensor.double() for name, tensor in state.items()}
    body = "backbone" if c.model_type == "mamba2" else "model"
    x = MODELS[c.model_type](c, under(w, body), ids)
    return x @ w[f"{body}.embeddings.weight" if c.tie_word_embeddings else "lm_head.weight"].T


# Shared pieces. ------------------------------------------------------------------------------------------------------------


def under(w: Weights, prefix: str) -> Weights:
    """The tensors of one module."""
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in w.items() if name.startswith(f"{prefix}.")}


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """W x + b, with b where there is one."""
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) * weight, over the last dimension."""
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight


def layer_norm(w: Weights, name: str, x: Tensor, eps: float, groups: int = 1) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, the moments over each of `groups` runs of channels."""
    x = x.unflatten(-1, (groups, -1))
    x = x - x.mean(-1, keepdim=True)
    y = (x / (x.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * w[f"{name}.weight"]
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps)."""
    return x / (x.square().sum(-1, keepdim=True) + eps).sqrt()


def convolution(w: Weights, name: str, x: Tensor) -> Tensor:
    """y_t = sum_j kernel[j] * x_{t - size + 1 + j} + bias, by channel, over zeros before the first token."""
    kernel = w[f"{name}.weight"][:, 0]
    size = kernel.shape[-1]
    before = F.pad(x, (0, 0, size - 1, 0))
    y = sum(kernel[:, j] * before[:, j : j + x.shape[1]] for j in range(size))
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def rotary(x: Tensor) -> Tensor:
    """Channels i and i + K/2 turned by t 10000^(-2i/K), at token t."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** -(torch.arange(half, dtype=x.dtype) / half)
    angle = (torch.arange(x.shape[1], dtype=x.dtype)[:, None] * frequency)[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def swiglu(w: Weights, x: Tensor) -> Tensor:
    """down(silu(gate x) * up x)."""
    return linear(w, "down_proj", F.silu(linear(w, "gate_proj", x)) * linear(w, "up_proj", x))


def heads(x: Tensor, count: int, copies: int = 1) -> Tensor:
    """[B, T, count d] -> [B, T, count copies, d], the copies of a head side by side."""
    return x.unflatten(-1, (count, -1)).repeat_interleave(copies, 2)


def stack(mixer: Callable[[SimpleNamespace, Weights, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A pre-norm decoder: x += mixer(rms(x)); x += swiglu(rms(x)); and rms at the end."""

    def model(c: SimpleNamespace, w: Weights, ids: Tensor) -> Tensor:
        x = w["embeddings.weight"][ids]
        for index in range(c.num_hidden_layers):
            layer = under(w, f"layers.{index}")
            x = x + mixer(c, under(layer, "attn"), rms(x, layer["attn_norm.weight"], c.norm_eps))
            x = x + swiglu(under(layer, "mlp"), rms(x, layer["mlp_norm.weight"], c.norm_eps))
        return rms(x, w["norm.weight"], c.norm_eps)

    return model


# Recurrences, one token at a time. -----------------------------------------------------------------------------------------


def decayed(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t;  g [B, T, H, K] or [B, T, H, 1]."""
    s, out = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]), []
    for t in range(q.shape[1]):
        s = g[:, t].exp()[..., None] * s + k[:, t, :, :, None] * v[:, t, :, None]
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], s))
    return torch.stack(out, 1)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    """S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t;  beta, g [B, T, H]."""
    s, out = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]), []
    for t in range(q.shape[1]):
        s = g[:, t].exp()[..., None, None] * s
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], s)
        s = s + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None]
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], s))
    return torch.stack(out, 1)


def wkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor) -> Tensor:
    """S_t = (Diag(exp w_t) - (a_t * kappa_t) kappa_t^T) S_{t-1} + k_t v_t^T,  o_t = S_t^T r_t."""
    s, out = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]), []
    for t in range(r.shape[1]):
        removed = torch.einsum("bhk,bhkv->bhv", kappa[:, t], s)
        s = w[:, t].exp()[..., None] * s - (a * kappa)[:, t, :, :, None] * removed[:, :, None]
        s = s + k[:, t, :, :, None] * v[:, t, :, None]
        out.append(torch.einsum("bhk,bhkv->bhv", r[:, t], s))
    return torch.stack(out, 1)


# Models. -------------------------------------------------------------------------------------------------------------------


def swish_gated(c: SimpleNamespace, w: Weights, x: Tensor, o: Tensor) -> Tensor:
    """o_proj(rms_head(o) * silu(g_proj x)); the norm's name says whether fla fuses it with the gate."""
    o = rms(o, w.get("g_norm_swish_gate.weight", w.get("g_norm.weight")), c.norm_eps).flatten(-2)
    return linear(w, "o_proj", o * F.silu(linear(w, "g_proj", x)) if c.use_output_gate else o)


def gla(c: SimpleNamespace, w: Weights, x: Tensor) -> Tensor:
    """Gated linear attention (Yang et al., arXiv 2312.06635).

    S_t = Diag(alpha_t) S_{t-1} + k_t v_t^T,  alpha_t = sigmoid(W2 W1 x_t + b)^(1/16),  o_t = S_t^T q_t / sqrt(K).
    """
    q, k, v = (linear(w, f"{n}_proj", x) for n in "qkv")
    if c.use_short_conv:
        q, k, v = (F.silu(convolution(w, f"{n}_conv1d", y)) for n, y in zip("qkv", (q, k, v), strict=True))
    # 16 is fixed: neither the temperature nor the rank of the gate is a field of fla's config.
    g = F.logsigmoid(linear(w, "gk_proj.1", linear(w, "gk_proj.0", x))) / 16
    g = g if c.clamp_min is None else g.clamp_min(c.clamp_min)
    shared = c.num_kv_heads or c.num_heads
    k, v, g = (heads(y, shared, c.num_heads // shared) for y in (k, v, g))
    q = heads(q, c.num_heads)
    return swish_gated(c, w, x, decayed(q / q.shape[-1] ** 0.5, k, v, g))


def retnet(c: SimpleNamespace, w: Weights, x: Tensor) -> Tensor:
    """Retention (Sun et al., arXiv 2307.08621).

    S_t = gamma_h S_{t-1} + k_t v_t^T,  gamma_h = 1 - 2^(-5-h),  o_t = S_t^T q_t / sqrt(K), q and k rotated.
    """
    shared = c.num_kv_heads or c.num_heads
    q = rotary(heads(linear(w, "q_proj", x), c.num_heads))
    k = rotary(heads(linear(w, "k_proj", x), shared, c.num_heads // shared))
    v = heads(linear(w, "v_proj", x), shared, c.num_heads // shared)
    return swish_gated(c, w, x, decayed(q / q.shape[-1] ** 0.5, k, v, retention_decay(q)))


def retention_decay(q: Tensor) -> Tensor:
    """log gamma_h for every token, [B, T, H, 1]."""
    gamma = 1 - 2.0 ** (-5 - torch.arange(q.shape[2], dtype=q.dtype))
    return gamma.log()[:, None].expand(*q.shape[:-1], 1)


def delta_net(c: SimpleNamespace, w: Weights, x: Tensor) -> Tensor:
    """DeltaNet (Schlag et al., arXiv 2102.11174; Yang et al., arXiv 2406.06484, eq. 3).

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t / sqrt(K);  beta_t = sigmoid(b x_t), doubled
    where eigenvalues may be negative;  q, k = norm(activation(conv(x))), and v has SiLU whatever activation q and k have.
    """
    q, k, v = (linear(w, f"{n}_proj", x) for n in "qkv")
    if c.use_short_conv:
        q, k, v = (convolution(w, f"{n}_conv1d", y) for n, y in zip("qkv", (q, k, v), strict=True))
    q, k = (heads(ACTIVATIONS[c.qk_activation](y), c.num_heads) for y in (q, k))
    if c.qk_norm == "l2":
        q, k = unit(q), unit(k)
    else:
        q, k = (y / y.abs().sum(-1, keepdim=True).clamp_min(1e-6) for y in (q, k))
    beta = linear(w, "b_proj", x).sigmoid() if c.use_beta else torch.ones_like(q[..., 0])
    beta = 2 * beta if c.allow_neg_eigval else beta
    o = delta_rule(q / q.shape[-1] ** 0.5, k, heads(F.silu(v), c.num_heads), beta, torch.zeros_like(beta))
    o = rms(o, w["o_norm.weight"], c.norm_eps).flatten(-2)
    return linear(w, "o_proj", o * F.silu(linear(w, "g_proj", x)) if c.use_gate else o)


def gated_deltanet(c: SimpleNamespace, w: Weights, x: Tensor) -> Tensor:
    """Gated DeltaNet (Yang et al., arXiv 2412.06464, eq. 10).

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t / sqrt(K);
    alpha_t = exp(-exp(A_log) softplus(a x_t + dt_bias)); several heads of v share one of q and k.
    """
    q, k, v = (linear(w, f"{n}_proj", x) for n in "qkv")
    if c.use_short_conv:
        q, k, v = (convolution(w, f"{n}_conv1d", y) for n, y in zip("qkv", (q, k, v), strict=True))
    count = c.num_v_heads or c.num_heads
    q, k = (unit(heads(F.silu(y), c.num_heads, count // c.num_heads)) for y in (q, k))
    beta = linear(w, "b_proj", x).sigmoid() * (2 if c.allow_neg_eigval else 1)
    g = -w["A_log"].exp() * F.softplus(linear(w, "a_proj", x) + w["dt_bias"])
    o = delta_rule(q / q.shape[-1] ** 0.5, k, heads(F.silu(v), count), beta, g)
    o = rms(o, w["o_norm.weight"], c.norm_eps).flatten(-2)
    return linear(w, "o_proj", o * ACTIVATIONS[c.output_gate_activation](linear(w, "g_proj", x)) if c.use_gate else o)


def rwkv7(c: SimpleNamespace, w: Weights, ids: Tensor) -> Tensor:
    """RWKV-7 (Peng et al., arXiv 2503.14456): a norm on the embeddings, then time mixing and channel mixing by layer.

    Channel mixing: x += W_value act(W_key lerp(x_t, x_{t-1})).
    """
    x, first = w["embeddings.weight"][ids], None
    for index in range(c.num_hidden_layers):
        layer = under(w, f"layers.{index}")
        if index == 0 and c.norm_first:
            x = layer_norm(layer, "pre_norm", x, c.norm_eps)
        y, first = time_mixing(c, under(layer, "attn"), layer_norm(layer, "attn_norm", x, c.norm_eps), first)
        x = x + y
        ffn = under(layer, "ffn")
        k = linear(ffn, "key", lerp(layer_norm(layer, "ffn_norm", x, c.norm_eps), ffn["x_k"]))
        x = x + linear(ffn, "value", ACTIVATIONS[c.hidden_act](k))
    return layer_norm(w, "norm", x, c.norm_eps)


def lerp(x: Tensor, share: Tensor) -> Tensor:
    """x_t + (x_{t-1} - x_t) * share, and 0 before the first token."""
    return x + (F.pad(x, (0, 0, 1, -1)) - x) * share


def low_rank(w: Weights, name: str, x: Tensor, act: str = "identity") -> Tensor:
    """B act(A x) + bias."""
    inner = linear(w, f"{name}.lora.0", x)
    return linear(w, f"{name}.lora.2", inner.tanh() if act == "tanh" else ACTIVATIONS[act](inner))


def time_mixing(c: SimpleNamespace, w: Weights, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """Time mixing and the values of the first layer, which the others mix theirs with.

    S_t = (Diag(w_t) - (a_t * kappa_t) kappa_t^T) S_{t-1} + k'_t v_t^T,  o_t = S_t^T r_t,
    w_t = exp(-e^(-1/2) sigmoid(W_d(x))),  kappa = unit(k * k_k),  k' = k * (1 + (a - 1) * k_a),
    y_t = o_proj((group_norm(o_t) + (r_t . (r_k * k'_t)) v_t) * g_t).
    """
    r, k, v = (linear(w, f"{n}_proj", lerp(x, w[f"x_{n}"])) for n in "rkv")
    decay = -math.exp(-0.5) * low_rank(w, "w_lora", lerp(x, w["x_w"]), "tanh").sigmoid()
    a = low_rank(w, "a_lora", lerp(x, w["x_a"])).sigmoid()
    g = low_rank(w, "g_lora", lerp(x, w["x_g"]), "sigmoid")
    first = v if first is None else first
    if "v_lora.lora.0.weight" in w:
        v = v + (first - v) * low_rank(w, "v_lora", lerp(x, w["x_v"])).sigmoid()
    count = x.shape[-1] // (c.head_dim or x.shape[-1] // c.num_heads)
    # fla's fused norm adds its epsilon to the squares; the other, like RWKV's own code, bounds the length from below.
    kappa = heads(k * w["k_k"], count)
    kappa = unit(kappa) if c.fuse_norm else kappa / kappa.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    k = k * (1 + (a - 1) * w["k_a"])
    r, decay, k, v, a = (heads(y, count) for y in (r, decay, k, v, a))
    o = wkv7(r, decay, k, v, kappa, a).flatten(-2)
    o = layer_norm(w, "g_norm", o, c.norm_eps * k.shape[-1], groups=count)
    bonus = (r * w["r_k"] * k).sum(-1, keepdim=True) * v
    return linear(w, "o_proj", (o + bonus.flatten(-2)) * g), first


def number(value: Any) -> float:
    """A number of a config.json, where transformers writes infinity as {"__float__": "Infinity"}."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def mamba2(c: SimpleNamespace, w: Weights, ids: Tensor) -> Tensor:
    """Mamba-2 (Dao and Gu, arXiv 2405.21060): x += mixer(rms(x)) by layer, no MLP, and rms at the end."""
    x = w["embeddings.weight"][ids]
    for index in range(c.num_hidden_layers):
        layer = under(w, f"layers.{index}")
        x = x + ssd(c, under(layer, "mixer"), rms(x, layer["norm.weight"], c.norm_eps))
    return rms(x, w["norm_f.weight"], c.norm_eps)


def ssd(c: SimpleNamespace, w: Weights, x: Tensor) -> Tensor:
    """The state space layer, B and C shared by the heads of a group.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T,  y_t = C_t^T h_t + D x_t,  A = -exp(A_log),  dt_t = softplus(. + dt_bias).
    """
    inner = int(c.expand * c.hidden_size)
    count, state = inner // c.head_dim, c.n_groups * c.state_size
    z, xbc, dt = linear(w, "in_proj", x).split([inner, inner + 2 * state, count], -1)
    u, b, out = F.silu(convolution(w, "conv1d", xbc)).split([inner, state, state], -1)
    u = heads(u, count)
    b, out = (heads(y, c.n_groups, count // c.n_groups) for y in (b, out))
    dt = F.softplus(dt + w["dt_bias"]).clamp(*map(number, c.dt_limit))[..., None]
    y = decayed(out, dt * b, u, -w["A_log"].exp()[:, None] * dt)
    y = (y + w["D"].reshape(count, -1) * u).flatten(-2)
    if not c.rmsnorm:
        return linear(w, "out_proj", y * F.silu(z))
    y = (y if c.norm_before_gate else y * F.silu(z)).unflatten(-1, (c.n_groups, -1))
    y = rms(y, None, c.norm_eps).flatten(-2) * w["norm.weight"]
    return linear(w, "out_proj", y * F.silu(z) if c.norm_before_gate else y)


MODELS: dict[str, Callable[[SimpleNamespace, Weights, Tensor], Tensor]] = {
    "gla": stack(gla),
    "retnet": stack(retnet),
    "delta_net": stack(delta_net),
    "gated_deltanet": stack(gated_deltanet),
    "rwkv7": rwkv7,
    "mamba2": mamba2,
}
