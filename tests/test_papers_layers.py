"""The layers typed from their papers: what they read, what they see of the past, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests import papers_deep as deep
from tests import papers_matrix as matrix

TOKENS, HEADS, KEYS, HIDDEN = 20, 2, 6, 12
Shapes = dict[str, tuple[int, ...]]


class Layer(NamedTuple):
    """A layer's function and its parameters' shapes."""

    function: Callable[..., Any]
    shapes: Shapes


def low_rank(name: str, out: int, rank: int = 3) -> Shapes:
    return {f"{name}.0.weight": (rank, HIDDEN), f"{name}.1.weight": (out, rank)}


def frame(key: int = KEYS, value: int = KEYS, *, n: int = 1, key_heads: int = HEADS, conv: bool = True) -> Shapes:
    """Projections of q, k, v and o, and convolutions, for `key` and `value` channels a head."""
    sizes = {"q": key_heads * key, "k": n * key_heads * key, "v": n * HEADS * value}
    shapes: Shapes = {f"{name}_proj.weight": (size, HIDDEN) for name, size in sizes.items()}
    if conv:
        shapes |= {f"{name}_conv1d.weight": (size, 1, 4) for name, size in sizes.items()}
    return shapes | {"o_proj.weight": (HIDDEN, HEADS * value)}


def gated(value: int = KEYS) -> Shapes:
    """The standard output's norm and gate."""
    return {"o_norm.weight": (value,), "g_proj.weight": (HEADS * value, HIDDEN)}


WIDE: Shapes = {"o_norm.weight": (HIDDEN,)}
RATE: Shapes = {"b_proj.proj.weight": (HEADS, HIDDEN), "b_proj.bias": (HEADS,)}
DECAY: Shapes = {"a_proj.proj.weight": (HEADS, HIDDEN), "a_proj.A_log": (HEADS,), "a_proj.dt_bias": (HEADS,)}
CHANNELS = HEADS * KEYS
DELTA = frame() | RATE


def product(n: int) -> Shapes:
    """DeltaProduct's n rates, and n keys and values."""
    return frame(n=n) | {"b_proj.proj.weight": (n * HEADS, HIDDEN), "b_proj.bias": (HEADS,)}


MAMBA2 = (
    frame(12, 12, key_heads=1)
    | {"q_conv1d.bias": (12,), "k_conv1d.bias": (12,), "v_conv1d.bias": (24,), "g_proj.weight": (24, HIDDEN)}
    | {"b_proj.proj.weight": (HEADS, HIDDEN), "b_proj.dt_bias": (HEADS,), "features.A_log": (HEADS,), "features.D": (HEADS,)}
    | {"o_norm.weight": (24,)}
)
KDA = (
    DELTA
    | low_rank("a_proj.proj", CHANNELS)
    | {"a_proj.A_log": (HEADS, 1), "a_proj.dt_bias": (HEADS, KEYS), "o_norm.weight": (KEYS,)}
    | low_rank("g_proj", CHANNELS)
    | {"g_proj.1.bias": (CHANNELS,)}
)
RWKV7 = (
    frame(conv=False)
    | {f"token_shift.{name}": (HIDDEN,) for name in ("q", "k", "v", "decay", "rate", "gate")}
    | {f"features.{name}": (HEADS, KEYS) for name in ("k_k", "k_a", "r_k")}
    | low_rank("b_proj.proj", CHANNELS)
    | low_rank("a_proj.proj", CHANNELS)
    | {"b_proj.bias": (HEADS, KEYS), "a_proj.bias": (HEADS, KEYS)}
    | low_rank("g_proj", CHANNELS)
    | {"o_norm.weight": (CHANNELS,), "o_norm.bias": (CHANNELS,)}
)
RESIDUAL = low_rank("gate_projs.residual.proj", CHANNELS) | {"gate_projs.residual.bias": (HEADS, KEYS)}
FAST_NORM: Shapes = {"memory.norm_weight": (HEADS, KEYS), "memory.norm_bias": (HEADS, KEYS)}
TTT = DELTA | FAST_NORM | {"o_norm.weight": (CHANNELS,), "o_norm.bias": (CHANNELS,), "gate_projs.token.shift": (16,)}
TTT_LINEAR = TTT | {"memory.up": (HEADS, KEYS, KEYS), "memory.up_bias": (HEADS, 1, KEYS)}
TTT_MLP = (
    TTT
    | {"memory.up": (HEADS, KEYS, 4 * KEYS), "memory.up_bias": (HEADS, 1, 4 * KEYS)}
    | {"memory.down": (HEADS, 4 * KEYS, KEYS), "memory.down_bias": (HEADS, 1, KEYS)}
)
POLYNOMIAL = KEYS + KEYS * (KEYS + 1) // 2
OMEGA = (
    DELTA
    | gated()
    | FAST_NORM
    | {"a_proj.proj.weight": (HEADS, HIDDEN), "a_proj.bias": (HEADS,), "features.coefficient": ()}
    | {"memory.up": (HEADS, POLYNOMIAL, 8), "memory.down": (HEADS, 8, KEYS)}
)
MU: Shapes = {"gate_projs.mu.proj.weight": (HEADS, HIDDEN), "gate_projs.mu.bias": (HEADS,)}


def later_rwkv7(x: Tensor, p: matrix.Params, heads: int) -> Tensor:
    """A layer after the first, whose v is x itself."""
    return matrix.rwkv7(x, p, heads, v_first=x.view(len(x), heads, -1))[0]


LAYERS = {
    "linear_attention": Layer(matrix.linear_attention, frame(conv=False) | gated()),
    "linear_attention, normalised": Layer(partial(matrix.linear_attention, normalizer=True), frame(conv=False) | gated()),
    "retnet": Layer(matrix.retnet, frame(value=12, conv=False) | gated(12)),
    "lightning_attention": Layer(matrix.lightning_attention, frame(conv=False) | gated() | WIDE),
    "gla": Layer(matrix.gla, frame(key=3, conv=False) | gated() | low_rank("a_proj.proj", 6) | {"a_proj.bias": (HEADS, 3)}),
    "mamba2": Layer(matrix.mamba2, MAMBA2),
    "hgrn2": Layer(matrix.hgrn2, frame(conv=False) | WIDE),
    "hgrn2, bounded": Layer(partial(matrix.hgrn2, lower_bound=0.3), frame(conv=False) | WIDE),
    "deltanet": Layer(matrix.deltanet, DELTA | {"o_norm.weight": (KEYS,)}),
    "deltanet, negative": Layer(partial(matrix.deltanet, negative_eigenvalues=True), DELTA | {"o_norm.weight": (KEYS,)}),
    "gated_deltanet": Layer(matrix.gated_deltanet, DELTA | DECAY | gated()),
    "kda": Layer(matrix.kda, KDA),
    "deltaproduct, 2": Layer(matrix.deltaproduct, product(2) | {"o_norm.weight": (KEYS,)}),
    "deltaproduct, 3": Layer(partial(matrix.deltaproduct, n=3), product(3) | {"o_norm.weight": (KEYS,)}),
    "gated_deltaproduct, 2": Layer(matrix.gated_deltaproduct, product(2) | DECAY | gated()),
    "gated_deltaproduct, 3": Layer(partial(matrix.gated_deltaproduct, n=3), product(3) | DECAY | gated()),
    "longhorn": Layer(matrix.longhorn, DELTA | gated()),
    "longhorn_diagonal": Layer(matrix.longhorn_diagonal, DELTA | gated()),
    "rwkv7": Layer(lambda x, p, heads: matrix.rwkv7(x, p, heads)[0], RWKV7),
    "rwkv7, later": Layer(later_rwkv7, RWKV7 | RESIDUAL),
    "ttt_linear": Layer(deep.ttt_linear, TTT_LINEAR),
    "ttt_mlp": Layer(deep.ttt_mlp, TTT_MLP),
    "omeganet": Layer(deep.omeganet, OMEGA),
    "atlas": Layer(deep.atlas, OMEGA | MU),
}


class Recorded(dict[str, Tensor]):
    """Parameters that remember which of them were read."""

    def __init__(self, shapes: Shapes) -> None:
        values = {name: torch.randn(shape, dtype=torch.float64) / 2 for name, shape in shapes.items()}
        if "gate_projs.token.shift" in values:  # where a token's rate is clamped to 0 nothing is learned
            values["gate_projs.token.shift"].abs_()
        super().__init__({name: x.requires_grad_() for name, x in values.items()})
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str) -> None:
    """Every parameter is read and has a gradient; nothing before a token sees it, and everything after it may."""
    function, shapes = LAYERS[name]
    p = Recorded(shapes)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    out = function(x, p, HEADS)
    assert out.shape == x.shape
    assert p.read == set(shapes)
    for place in (0, 7, 15, 16, TOKENS - 1):
        (dx,) = torch.autograd.grad(out[place].square().sum(), x, retain_graph=True)
        assert not dx[place + 1 :].any()
        assert dx[: place + 1].any(dim=1).all(), "a token that is never seen"
    grads = torch.autograd.grad(out.square().sum(), list(p.values()))
    for parameter, grad in zip(p, grads, strict=True):
        assert torch.isfinite(grad).all(), parameter
        assert grad.any(), parameter


@pytest.mark.parametrize("name", LAYERS)
def test_layer_gradients(name: str) -> None:
    """In x and in all parameters, along random directions, they are finite differences."""
    function, shapes = LAYERS[name]
    p = Recorded(shapes)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    names = list(p)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return function(x, dict(zip(names, parameters, strict=True)), HEADS)

    assert torch.autograd.gradcheck(run, (x, *p.values()), fast_mode=True)
