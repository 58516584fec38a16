"""Designs that together use every branch of the layer, and token batches, at sizes for tests."""

from __future__ import annotations

import inspect
from dataclasses import replace

import torch
from torch import Tensor

from miras import models
from miras.bias import L2, Dot, Huber
from miras.design import Design, LayerDesign, MemoryAsContext, MemoryAsGate, Pattern
from miras.inputs import Constant, Inputs, LogDecay, Output, Positive, Rotary, Sigmoid, Softplus
from miras.learning import GradientDescent, Momentum, MultiStep, NonParametric
from miras.memory import MLP, GatedMLP, Matrix
from miras.retention import L2 as Decay
from miras.retention import ProximalElasticNet, SignedKL

ATTENTION = Design(
    memory=None,
    bias=L2(),
    retention=None,
    learning=NonParametric(window=5),
    inputs=Inputs(features=Rotary(), conv_size=0, activation=None, output=Output(norm=None, gate=None)),
)

PERSISTENT = replace(ATTENTION, learning=NonParametric(window=3, persistent=2))

TITANS = models.titans_lmm(refresh=4, memory=MLP(expansion=2.0))

HUBER = Design(
    memory=MLP(),
    bias=Huber("norm"),
    retention=Decay(),
    learning=GradientDescent(),
    refresh=4,
    inputs=Inputs(gates={"delta": Softplus(0.5)}, rate=Sigmoid(rank=3)),
)


def small(name: str) -> LayerDesign | Pattern:
    """A named model with windows that end within a test's sequences."""
    function = models.NAMED[name]
    changes: dict[str, int] = {}
    if any(part.refresh > 1 for part in function().parts if part.parametric):
        changes["refresh"] = 4
    if "window" in inspect.signature(function).parameters and name != "transformer":
        changes["window"] = 5
    return function(**changes)


DESIGNS: dict[str, LayerDesign | Pattern] = {
    "huber": HUBER,
    "momentum": replace(HUBER, bias=L2(), learning=Momentum(), anchor="origin", inputs=Inputs(conv_size=2)),
    "signed_kl": replace(
        HUBER, bias=L2(), retention=SignedKL(), link_at="refresh", inputs=Inputs(rate=Sigmoid(0.3), norm_gain=None)
    ),
    "settling": replace(
        HUBER,
        memory=GatedMLP(),
        bias=L2(),
        retention=ProximalElasticNet(),
        inputs=Inputs(rate=Constant(0.1), decay=None),
    ),
    "gated_delta": models.gated_deltanet(),
    "two_steps": Design(
        memory=Matrix(),
        bias=L2(),
        retention=Decay(),
        learning=MultiStep(2),
        refresh=1,
        inputs=Inputs(features=Rotary(), weight_std=0.1),
    ),
    "per_channel": Design(
        memory=Matrix(),
        bias=Dot(),
        retention=Decay(),
        learning=GradientDescent(),
        refresh=4,
        inputs=Inputs(
            features=Positive(),
            conv_size=0,
            decay=LogDecay(16.0, per_channel=True, rank=3),
            rate=Sigmoid(per_channel=True),
            output=Output(gate=None),
        ),
    ),
    "window": ATTENTION,
    "hybrid": Pattern((HUBER, ATTENTION)),
    **{name: small(name) for name in models.NAMED},
    "mac": models.titans_mac(num_persistent=2, refresh=4),
    "mac_online": MemoryAsContext(
        Design(MLP(), L2(), Decay(), MultiStep(2), refresh=2, inputs=Inputs(features=Rotary(), conv_size=0)),
        replace(PERSISTENT, learning=NonParametric(), inputs=Inputs(conv_size=3)),
    ),
    "mag": MemoryAsGate(TITANS, PERSISTENT),
    "mal": Pattern((TITANS, PERSISTENT)),
}

BLOCKS: dict[str, dict[str, object]] = {
    "rwkv7": {"norm": "layer", "mlp": "channel_mix", "embedding_norm": True},
    "mamba2": {"mlp": None},
}
"""The backbones of models that bring their own; keywords of MirasConfig."""


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 23, shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as a batch and its mask."""
    length = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, place], mask[i, place] = row, 1
    return ids, mask
