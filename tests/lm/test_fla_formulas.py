"""The written-out models of flash-linear-attention: its own recurrences, causality, and every weight and field in its place.

The second opinion is the `naive.py` files of `fla-core`, each loaded by itself: the package imports Triton, they do not.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fla_formulas import decayed, delta_rule, logits, retention_decay, wkv7
from fla_states import CONFIGS, random_state, shapes
from torch import Tensor

B, T, H, K, V = 2, 9, 3, 4, 5

# Fields that change the logits of the same weights.
MATHS: list[tuple[str, dict[str, Any]]] = [
    ("gla", {"clamp_min": -0.05}),
    ("gla", {"norm_eps": 1e-2}),
    ("gla", {"tie_word_embeddings": True}),
    ("retnet", {"norm_eps": 1e-2}),
    ("delta_net", {"allow_neg_eigval": True}),
    ("delta_net", {"qk_norm": "sum"}),
    ("delta_net", {"qk_activation": "relu"}),
    ("delta_net", {"qk_activation": "elu"}),
    ("delta_net", {"qk_activation": "identity"}),
    ("delta_net", {"norm_eps": 1e-2}),
    ("gated_deltanet", {"allow_neg_eigval": True}),
    ("gated_deltanet", {"output_gate_activation": "sigmoid"}),
    ("gated_deltanet", {"norm_eps": 1e-2}),
    ("rwkv7", {"fuse_norm": False}),
    ("rwkv7", {"hidden_act": "relu"}),
    ("rwkv7", {"norm_eps": 1e-2}),
    ("mamba2", {"dt_limit": [0.3, 2.0]}),
    ("mamba2", {"norm_before_gate": True}),
    ("mamba2", {"norm_eps": 1e-2}),
]

# Fields that change which weights there are, or their shapes.
LAYOUT: list[tuple[str, dict[str, Any]]] = [
    ("gla", {"expand_k": 1.0}),
    ("gla", {"expand_v": 2.0}),
    ("gla", {"use_short_conv": True}),
    ("gla", {"use_output_gate": False}),
    ("gla", {"elementwise_affine": False}),
    ("gla", {"num_kv_heads": 1}),
    ("gla", {"fuse_norm": False}),
    ("gla", {"tie_word_embeddings": True}),
    ("gla_ratio", {"hidden_ratio": 30}),
    ("gla_conv", {"conv_size": 4}),
    ("retnet", {"expand_k": 0.5}),
    ("retnet", {"expand_v": 1.0}),
    ("retnet", {"num_kv_heads": 1}),
    ("delta_net", {"expand_k": 2.0}),
    ("delta_net", {"expand_v": 2.0}),
    ("delta_net", {"use_gate": True}),
    ("delta_net", {"use_beta": False}),
    ("delta_net", {"use_short_conv": False}),
    ("gated_deltanet", {"expand_v": 1.0}),
    ("gated_deltanet", {"head_dim": 8}),
    ("gated_deltanet", {"num_v_heads": 4}),
    ("gated_deltanet", {"use_gate": False}),
    ("gated_deltanet", {"use_short_conv": False}),
    ("rwkv7", {"decay_low_rank_dim": 6}),
    ("rwkv7", {"gate_low_rank_dim": 6}),
    ("rwkv7", {"a_low_rank_dim": 6}),
    ("rwkv7", {"v_low_rank_dim": 6}),
    ("rwkv7", {"head_dim": 4}),
    ("rwkv7", {"norm_first": False}),
    ("rwkv7", {"norm_bias": False}),
    ("rwkv7", {"hidden_ratio": 2}),
    ("mamba2", {"expand": 1}),
    ("mamba2", {"n_groups": 2}),
    ("mamba2", {"state_size": 8}),
    ("mamba2", {"head_dim": 4}),
    ("mamba2", {"conv_kernel": 3}),
    ("mamba2", {"use_conv_bias": False}),
    ("mamba2", {"use_bias": True}),
    ("mamba2", {"rmsnorm": False}),
    ("mamba2", {"D_has_hdim": True}),
]


def naive(operation: str) -> ModuleType:
    """The reference file of one of fla's operations, without the package around it."""
    package = importlib.util.find_spec("fla")
    assert package is not None and package.origin, "no flash-linear-attention: pip install --no-deps fla-core==0.6.0 einops"
    path = Path(package.origin).parent / "ops" / operation / "naive.py"
    spec = importlib.util.spec_from_file_location(f"naive_{path.parent.name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def log_decay(*shape: int) -> Tensor:
    return -torch.rand(shape, dtype=torch.float64)


def single(*tensors: Tensor) -> list[Tensor]:
    return [tensor.float() for tensor in tensors]


def head_first(*tensors: Tensor) -> list[Tensor]:
    return [tensor.float().transpose(1, 2) for tensor in tensors]


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """fla's references compute in float32."""
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-5, atol=1e-5)


def sample(name: str, **changes: Any) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """A config with changes, random weights of the config without them, and token ids."""
    generator = torch.Generator().manual_seed(0)
    config = CONFIGS[name]
    return config | changes, random_state(config, generator), torch.randint(0, 23, (2, 7), generator=generator)


def test_gla_recurrence() -> None:
    q, k, v, g = random(B, T, H, K), random(B, T, H, K), random(B, T, H, V), log_decay(B, T, H, K)
    assert_same(decayed(q / K**0.5, k, v, g), naive("gla").naive_recurrent_gla(*single(q, k, v, g))[0])


def test_mamba2_recurrence() -> None:
    """The state space recurrence is GLA's with one decay a head: C reads, dt B writes, nothing is scaled."""
    q, k, v, g = random(B, T, H, K), random(B, T, H, K), random(B, T, H, V), log_decay(B, T, H)
    theirs = naive("simple_gla").naive_recurrent_simple_gla(*single(q, k, v, g), scale=1.0)[0]
    assert_same(decayed(q, k, v, g[..., None]), theirs)


def test_retention() -> None:
    q, k, v = random(B, T, H, K), random(B, T, H, K), random(B, T, H, V)
    theirs = naive("retention").naive_retention(*head_first(q, k, v)).transpose(1, 2)
    assert_same(decayed(q / K**0.5, k, v, retention_decay(q)), theirs)


def test_delta_rule() -> None:
    q, k, v = random(B, T, H, K), random(B, T, H, K) / K**0.5, random(B, T, H, V)
    beta = torch.rand(B, T, H, dtype=torch.float64)
    theirs = naive("delta_rule").delta_rule_recurrence(*head_first(q, k, v, beta))[0].transpose(1, 2)
    assert_same(delta_rule(q / K**0.5, k, v, beta, torch.zeros_like(beta)), theirs)


def test_gated_delta_rule() -> None:
    q, k, v = random(B, T, H, K), random(B, T, H, K) / K**0.5, random(B, T, H, V)
    beta, g = torch.rand(B, T, H, dtype=torch.float64), log_decay(B, T, H)
    theirs = naive("gated_delta_rule").naive_recurrent_gated_delta_rule(*single(q, k, v, beta, g))[0]
    assert_same(delta_rule(q / K**0.5, k, v, beta, g), theirs)


def test_rwkv7_recurrence() -> None:
    """fla writes RWKV-7 as a diagonal plus low rank transition, with alpha = -kappa and beta = a * kappa."""
    r, k, v, w = random(B, T, H, K), random(B, T, H, K), random(B, T, H, V), log_decay(B, T, H, K)
    kappa = torch.nn.functional.normalize(random(B, T, H, K), dim=-1)
    a = torch.rand(B, T, H, K, dtype=torch.float64)
    arguments = head_first(r, k, v, -kappa, a * kappa, w)
    theirs = naive("generalized_delta_rule/dplr").dplr_recurrence(*arguments)[0].transpose(1, 2)
    assert_same(wkv7(r / K**0.5, w, k, v, kappa, a), theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_causal(name: str) -> None:
    config, state, ids = sample(name)
    before = logits(config, state, ids)
    ids[:, 4] = (ids[:, 4] + 1) % 23
    after = logits(config, state, ids)
    assert torch.equal(before[:, :4], after[:, :4])
    assert ((before - after)[:, 4:].abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_shows(name: str) -> None:
    """The logits have a gradient with respect to every tensor, so that none is read by the wrong name or not at all."""
    config, state, ids = sample(name)
    for tensor in state.values():
        tensor.requires_grad_()
    logits(config, state, ids).square().mean().backward()
    assert not [key for key, tensor in state.items() if tensor.grad is None or tensor.grad.abs().max() < 1e-6]


@pytest.mark.parametrize(("name", "change"), MATHS)
def test_fields_change_the_logits(name: str, change: dict[str, Any]) -> None:
    config, state, ids = sample(name)
    assert (logits(config, state, ids) - logits(config | change, state, ids)).abs().max() > 1e-8


@pytest.mark.parametrize(("name", "change"), LAYOUT)
def test_fields_change_the_layout(name: str, change: dict[str, Any]) -> None:
    assert shapes(CONFIGS[name]) != shapes(CONFIGS[name] | change)
