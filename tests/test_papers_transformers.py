"""Whole layers typed from their papers against transformers' own modules, in float32 to 1e-5.

Its delta rules scale q by 1 / sqrt(K), which a norm a head takes out again, but for its eps: theirs is ours over K.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import KimiLinearConfig, Mamba2Config, MiniMaxConfig, Qwen3NextConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from tests import papers_matrix as papers

TOKENS, HIDDEN, HEADS, WIDTH = 20, 12, 2, 6


def drawn(module: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module, in evaluation and with random parameters, and those."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
    return module.eval(), {name: p.detach() for name, p in module.named_parameters()}


def convolutions(weight: Tensor, bias: Tensor | None, sizes: dict[str, int]) -> dict[str, Tensor]:
    """One convolution over all channels as those of its parts, in order."""
    found = {f"{n}_conv1d.weight": w for n, w in zip(sizes, weight.split(list(sizes.values())), strict=True)}
    if bias is not None:
        found |= {f"{n}_conv1d.bias": b for n, b in zip(sizes, bias.split(list(sizes.values())), strict=True)}
    return found


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs[0], atol=1e-5, rtol=1e-5)


def test_lightning_attention() -> None:
    """Theirs multiplies the slopes by 1 - layer / layers + 1e-5, which ours leaves out: in layer 0 it is nearly 1."""
    config = MiniMaxConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        head_dim=WIDTH,
        num_hidden_layers=2,
        layer_types=["linear_attention"] * 2,
    )
    module, w = drawn(MiniMaxLightningAttention(config, layer_idx=0))
    module.norm.variance_epsilon = papers.EPS
    qkv = w["qkv_proj.weight"].view(HEADS, 3, WIDTH, HIDDEN)
    p = {f"{n}_proj.weight": qkv[:, i].flatten(0, 1) for i, n in enumerate("qkv")}
    p |= {"o_norm.weight": w["norm.weight"], "g_proj.weight": w["output_gate.weight"], "o_proj.weight": w["out_proj.weight"]}
    x = torch.randn(TOKENS, HIDDEN)
    theirs, _ = module(x[None], position_embeddings=None, attention_mask=None)
    torch.testing.assert_close(papers.lightning_attention(x, p, HEADS), theirs[0], atol=1e-4, rtol=1e-4)


def test_mamba2() -> None:
    config = Mamba2Config(
        hidden_size=HIDDEN,
        num_heads=HEADS,
        head_dim=12,
        state_size=12,
        n_groups=1,
        expand=2,
        num_hidden_layers=1,
        chunk_size=8,
    )
    module, w = drawn(Mamba2Mixer(config, layer_idx=0))
    names = ("g", "v", "k", "q")
    parts = w["in_proj.weight"].split([24, 24, 12, 12, HEADS])
    p = {f"{n}_proj.weight": part for n, part in zip(names, parts, strict=False)}
    p |= convolutions(w["conv1d.weight"], w["conv1d.bias"], {"v": 24, "k": 12, "q": 12})
    p |= {"b_proj.proj.weight": parts[-1], "b_proj.dt_bias": w["dt_bias"], "features.A_log": w["A_log"]}
    p |= {"features.D": w["D"], "o_norm.weight": w["norm.weight"], "o_proj.weight": w["out_proj.weight"]}
    x = torch.randn(TOKENS, HIDDEN)
    assert_same(papers.mamba2(x, p, HEADS), module(x[None]))


def test_gated_deltanet() -> None:
    config = Qwen3NextConfig(
        hidden_size=HIDDEN,
        linear_num_value_heads=HEADS,
        linear_num_key_heads=HEADS,
        linear_key_head_dim=WIDTH,
        linear_value_head_dim=WIDTH,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        rms_norm_eps=papers.EPS / WIDTH,
    )
    module, w = drawn(Qwen3NextGatedDeltaNet(config, layer_idx=0))
    qkvz = w["in_proj_qkvz.weight"].view(HEADS, 4, WIDTH, HIDDEN)
    p = {f"{n}_proj.weight": qkvz[:, i].flatten(0, 1) for i, n in enumerate("qkvg")}
    p |= convolutions(w["conv1d.weight"], None, dict.fromkeys("qkv", HEADS * WIDTH))
    p |= {f"{n}_proj.proj.weight": w["in_proj_ba.weight"].view(HEADS, 2, HIDDEN)[:, i] for i, n in enumerate("ba")}
    p |= {"b_proj.bias": torch.zeros(HEADS), "a_proj.A_log": w["A_log"], "a_proj.dt_bias": w["dt_bias"]}
    p |= {"o_norm.weight": w["norm.weight"], "o_proj.weight": w["out_proj.weight"]}
    x = torch.randn(TOKENS, HIDDEN)
    assert_same(papers.gated_deltanet(x, p, HEADS), module(x[None]))


def test_kda() -> None:
    """Theirs has no bias in the output gate."""
    config = KimiLinearConfig(
        hidden_size=HIDDEN,
        linear_num_heads=HEADS,
        linear_head_dim=WIDTH,
        linear_conv_kernel_dim=4,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        rms_norm_eps=papers.EPS / WIDTH,
    )
    module, w = drawn(KimiLinearDeltaAttention(config, layer_idx=0))
    p = {f"{n}_proj.weight": w[f"{n}_proj.weight"] for n in "qkvo"}
    p |= convolutions(w["conv1d.weight"], None, dict.fromkeys("qkv", HEADS * WIDTH))
    p |= {"b_proj.proj.weight": w["b_proj.weight"], "b_proj.bias": torch.zeros(HEADS)}
    p |= {f"a_proj.proj.{i}.weight": w[f"forget_gate.f_{n}_proj.weight"] for i, n in enumerate("ab")}
    p |= {"a_proj.A_log": w["forget_gate.A_log"].view(HEADS, 1), "a_proj.dt_bias": w["forget_gate.dt_bias"].view(HEADS, -1)}
    p |= {f"g_proj.{i}.weight": w[f"g_{n}_proj.weight"] for i, n in enumerate("ab")}
    p |= {"g_proj.1.bias": torch.zeros(HEADS * WIDTH), "o_norm.weight": w["o_norm.weight"]}
    x = torch.randn(TOKENS, HIDDEN)
    assert_same(papers.kda(x, p, HEADS), module(x[None]))
