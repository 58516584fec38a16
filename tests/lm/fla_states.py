"""Tiny configs of six models as in their checkpoints' config.json, and random weights under the checkpoints' names."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from fla_formulas import settings
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def _config(model_type: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": model_type, "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 23} | fields


def _decoder(model_type: str, **fields: Any) -> dict[str, Any]:
    return _config(model_type, **{"num_heads": 2, "intermediate_size": 24, "hidden_act": "swish", "norm_eps": 1e-6} | fields)


RANKS = {"decay_low_rank_dim": 3, "gate_low_rank_dim": 5, "a_low_rank_dim": 4, "v_low_rank_dim": 2}


def _rwkv7_config(**fields: Any) -> dict[str, Any]:
    sizes = {"num_hidden_layers": 3, "head_dim": 8, "hidden_act": "sqrelu", "norm_eps": 1e-5}
    return _config("rwkv7", **sizes | RANKS | fields)


def _mamba2_config(**fields: Any) -> dict[str, Any]:
    return _config("mamba2", **{"head_dim": 8, "state_size": 4, "n_groups": 1, "expand": 2, "norm_eps": 1e-5} | fields)


CONFIGS: dict[str, dict[str, Any]] = {
    "gla": _decoder("gla"),
    "gla_ratio": _decoder("gla", intermediate_size=None, num_hidden_layers=1, expand_k=1.0, expand_v=2.0),
    "gla_conv": _decoder("gla", use_short_conv=True, conv_size=3, clamp_min=-0.05),
    "gla_unfused": _decoder("gla", fuse_norm=False, tie_word_embeddings=True),
    "gla_ungated": _decoder("gla", use_output_gate=False, elementwise_affine=False),
    "gla_shared": _decoder("gla", num_heads=4, num_kv_heads=2, expand_k=1.0),
    "retnet": _decoder("retnet"),
    "retnet_narrow": _decoder("retnet", expand_k=0.5, expand_v=1.0, intermediate_size=None, tie_word_embeddings=True),
    "retnet_shared": _decoder("retnet", num_heads=4, num_kv_heads=2, fuse_norm=False),
    "delta_net": _decoder("delta_net"),
    "delta_net_gate": _decoder("delta_net", use_gate=True, allow_neg_eigval=True, expand_v=2.0, tie_word_embeddings=True),
    "delta_net_bare": _decoder("delta_net", use_short_conv=False, use_beta=False),
    "delta_net_sum": _decoder("delta_net", qk_activation="elu", qk_norm="sum"),
    "delta_net_relu": _decoder("delta_net", qk_activation="relu", use_short_conv=False, expand_k=0.5),
    "delta_net_identity": _decoder("delta_net", qk_activation="identity", conv_size=2),
    "gated_deltanet": _decoder("gated_deltanet", head_dim=6),
    "gated_deltanet_shared": _decoder("gated_deltanet", head_dim=6, num_v_heads=4, expand_v=1.0, allow_neg_eigval=True),
    "gated_deltanet_ungated": _decoder("gated_deltanet", head_dim=6, use_gate=False, tie_word_embeddings=True),
    "gated_deltanet_bare": _decoder(
        "gated_deltanet", head_dim=6, use_short_conv=False, output_gate_activation="sigmoid", expand_v=1.5
    ),
    "rwkv7": _rwkv7_config(),
    "rwkv7_unfused": _rwkv7_config(fuse_norm=False, intermediate_size=40, tie_word_embeddings=True),
    "rwkv7_plain": _rwkv7_config(norm_first=False, norm_bias=False, hidden_act="relu", hidden_ratio=2),
    "rwkv7_ranks": _rwkv7_config(head_dim=None, num_heads=4, **dict.fromkeys(RANKS)),
    "mamba2": _mamba2_config(dt_limit=[0.0, {"__float__": "Infinity"}]),
    "mamba2_groups": _mamba2_config(n_groups=2, dt_limit=[0.3, 2.0], tie_word_embeddings=True),
    "mamba2_before": _mamba2_config(n_groups=2, norm_before_gate=True, D_has_hdim=True, conv_kernel=3),
    "mamba2_bias": _mamba2_config(use_bias=True, use_conv_bias=False, rmsnorm=False),
}


def shapes(config: dict[str, Any]) -> Shapes:
    """Names and shapes of the tensors in a checkpoint of fla's `...ForCausalLM` of this config."""
    c = settings(config)
    body = "backbone" if c.model_type == "mamba2" else "model"
    found: Shapes = {f"{body}.embeddings.weight": (c.vocab_size, c.hidden_size)}
    for index in range(c.num_hidden_layers):
        for name, shape in LAYERS[c.model_type](c, index).items():
            found[f"{body}.layers.{index}.{name}"] = shape
    final = "norm_f" if c.model_type == "mamba2" else "norm"
    found |= _norm(f"{body}.{final}", c.hidden_size, c.model_type == "rwkv7" and c.norm_bias)
    return found if c.tie_word_embeddings else found | {"lm_head.weight": (c.vocab_size, c.hidden_size)}


def random_state(config: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    """Random float64 weights of a config, spread so widely that every one of them shows in the logits."""
    return {name: _random(name, shape, generator) for name, shape in shapes(config).items()}


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Matrices ~ N(0, 1/fan_in); norms' weights in [0.5, 1.5]; token-shift shares in [0, 1]; everything else ~ N(0, 1)."""
    if "norm" in name and name.endswith("weight"):
        return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
    if name.rpartition(".")[2].startswith("x_"):
        return torch.rand(shape, generator=generator, dtype=torch.float64)
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
    if name.endswith("gk_proj.1.bias"):
        return 8 * tensor  # The logarithm of the decay is divided by 16.
    fan_in = 1 if "embeddings" in name or len(shape) == 1 or name.endswith("r_k") else math.prod(shape[1:])
    return tensor / math.sqrt(fan_in)


# Layers. -------------------------------------------------------------------------------------------------------------------


def _norm(name: str, size: int, bias: bool = False) -> Shapes:
    return {f"{name}.weight": (size,)} | ({f"{name}.bias": (size,)} if bias else {})


def _matrix(name: str, inputs: int, outputs: int, bias: bool = False) -> Shapes:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def _up(size: float, multiple: int) -> int:
    return multiple * -(int(size) // -multiple)


def _projections(c: SimpleNamespace, q: int, k: int, v: int, out: int) -> Shapes:
    """From the model to q, k and v, with their convolutions where there are any, and from `out` back."""
    found = _matrix("attn.o_proj", out, c.hidden_size)
    for name, size in (("q", q), ("k", k), ("v", v)):
        found |= _matrix(f"attn.{name}_proj", c.hidden_size, size)
        if getattr(c, "use_short_conv", False):
            found[f"attn.{name}_conv1d.weight"] = (size, 1, c.conv_size)
    return found


def _block(c: SimpleNamespace, mixer: Shapes) -> Shapes:
    """A mixer and a SwiGLU, each after a norm."""
    # fla's rule: two thirds of the ratio, since there are three matrices, and up to a multiple of 256.
    inner = c.intermediate_size or _up(int(c.hidden_size * c.hidden_ratio * 2 / 3), 256)
    found = _norm("attn_norm", c.hidden_size) | _norm("mlp_norm", c.hidden_size) | mixer
    found |= _matrix("mlp.gate_proj", c.hidden_size, inner) | _matrix("mlp.up_proj", c.hidden_size, inner)
    return found | _matrix("mlp.down_proj", inner, c.hidden_size)


def _retnet(c: SimpleNamespace, index: int) -> Shapes:
    copies = c.num_heads // (c.num_kv_heads or c.num_heads)
    key, value = round(c.hidden_size * c.expand_k), round(c.hidden_size * c.expand_v)
    found = _projections(c, key, key // copies, value // copies, value)
    if c.use_output_gate:
        found |= _matrix("attn.g_proj", c.hidden_size, value)
    if c.elementwise_affine:
        # fla names the norm by how it computes it: in one kernel with the gate, or before it.
        name = "g_norm_swish_gate" if c.fuse_norm and c.use_output_gate else "g_norm"
        found |= _norm(f"attn.{name}", value // c.num_heads)
    return _block(c, found)


def _gla(c: SimpleNamespace, index: int) -> Shapes:
    found = _retnet(c, index)
    key = found["attn.k_proj.weight"][0]
    return found | _matrix("attn.gk_proj.0", c.hidden_size, 16) | _matrix("attn.gk_proj.1", 16, key, bias=True)


def _delta_net(c: SimpleNamespace, index: int) -> Shapes:
    key, value = round(c.hidden_size * c.expand_k), round(c.hidden_size * c.expand_v)
    found = _projections(c, key, key, value, value) | _norm("attn.o_norm", value // c.num_heads)
    found |= _matrix("attn.b_proj", c.hidden_size, c.num_heads) if c.use_beta else {}
    return _block(c, found | (_matrix("attn.g_proj", c.hidden_size, value) if c.use_gate else {}))


def _gated_deltanet(c: SimpleNamespace, index: int) -> Shapes:
    count, wide = c.num_v_heads or c.num_heads, int(c.head_dim * c.expand_v)
    key, value = c.num_heads * c.head_dim, count * wide
    found = _projections(c, key, key, value, value) | _norm("attn.o_norm", wide)
    found |= {"attn.A_log": (count,), "attn.dt_bias": (count,)}
    found |= _matrix("attn.a_proj", c.hidden_size, count) | _matrix("attn.b_proj", c.hidden_size, count)
    return _block(c, found | (_matrix("attn.g_proj", c.hidden_size, value) if c.use_gate else {}))


def _rwkv7(c: SimpleNamespace, index: int) -> Shapes:
    size = c.hidden_size
    head = c.head_dim or size // c.num_heads
    found = _norm("pre_norm", size, c.norm_bias) if index == 0 and c.norm_first else {}
    found |= _norm("attn_norm", size, c.norm_bias) | _norm("ffn_norm", size, c.norm_bias)
    found |= {f"attn.x_{name}": (1, 1, size) for name in "rwkvag"}
    found |= {"attn.k_k": (size,), "attn.k_a": (size,), "attn.r_k": (size // head, head)}
    found |= _matrix("attn.r_proj", size, size) | _matrix("attn.k_proj", size, size)
    found |= _matrix("attn.v_proj", size, size) | _matrix("attn.o_proj", size, size) | _norm("attn.g_norm", size, bias=True)
    ranks = [
        ("w", c.decay_low_rank_dim, 2.5 * head / 64),
        ("a", c.a_low_rank_dim, 2.5 * head / 64),
        ("g", c.gate_low_rank_dim, 5),
    ]
    ranks += [("v", c.v_low_rank_dim, 1.7 * head / 64)] if index else []
    for name, rank, factor in ranks:
        rank = rank or max(32, round(factor * size**0.5 / 32) * 32)
        found |= _matrix(f"attn.{name}_lora.lora.0", size, rank)
        found |= _matrix(f"attn.{name}_lora.lora.2", rank, size, bias=name != "g")
    inner = c.intermediate_size or _up(size * c.hidden_ratio, 32)
    return found | {"ffn.x_k": (size,)} | _matrix("ffn.key", size, inner) | _matrix("ffn.value", inner, size)


def _mamba2(c: SimpleNamespace, index: int) -> Shapes:
    inner = int(c.expand * c.hidden_size)
    count, mixed = inner // c.head_dim, inner + 2 * c.n_groups * c.state_size
    found = _norm("norm", c.hidden_size) | (_norm("mixer.norm", inner) if c.rmsnorm else {})
    found |= _matrix("mixer.in_proj", c.hidden_size, inner + mixed + count, c.use_bias)
    found |= _matrix("mixer.out_proj", inner, c.hidden_size, c.use_bias)
    found |= {"mixer.conv1d.weight": (mixed, 1, c.conv_kernel)} | (
        {"mixer.conv1d.bias": (mixed,)} if c.use_conv_bias else {}
    )
    return found | {"mixer.A_log": (count,), "mixer.dt_bias": (count,), "mixer.D": (inner if c.D_has_hdim else count,)}


LAYERS = {
    "gla": _gla,
    "retnet": _retnet,
    "delta_net": _delta_net,
    "gated_deltanet": _gated_deltanet,
    "rwkv7": _rwkv7,
    "mamba2": _mamba2,
}
