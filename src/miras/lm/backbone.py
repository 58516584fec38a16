"""The block of the language model: Llama's, with a memory layer in attention's place."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from miras.arrangement import make_mixer
from miras.lm.config import MirasConfig
from miras.mixer import LayerCache
from miras.packing import Packing


class GatedMLP(nn.Module):
    """SwiGLU: (silu(x gate) * (x up)) down."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., hidden_size]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MirasBlock(GradientCheckpointingLayer):
    """x + memory(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: MirasConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = make_mixer(
            config.layer_design(layer_idx),
            config.hidden_size,
            config.num_heads,
            head_dim=config.head_dim,
            norm_eps=config.norm_eps,
            layer_idx=layer_idx,
        )
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: LayerCache | None = None,
        use_cache: bool = False,
        packing: Packing | None = None,
    ) -> Tensor:
        """[B, T, hidden_size], or [1, N, hidden_size] packed, to the same."""
        mixed, _, _ = self.attn(
            self.attn_norm(hidden_states), past_key_values=past_key_values, use_cache=use_cache, packing=packing
        )
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))
