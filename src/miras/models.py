"""Named models: each a design, a few lines over the four choices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from miras.bias import L2, Dot, Huber, Lp
from miras.choice import Choice
from miras.design import Design, Pattern
from miras.inputs import Constant, Inputs, LogDecay, MambaDecay, Positive, Rotary, Sigmoid, Softplus
from miras.learning import GradientDescent, Momentum, NonParametric
from miras.memory import MLP, Matrix
from miras.retention import L2 as Decay
from miras.retention import LqRms, Retention, SignedKL


def yaad(**overrides: Any) -> Design:
    """Yaad: MLP memory, Huber loss with a data-dependent threshold, local and global L2 retention."""
    base = Design(
        memory=MLP(),
        bias=Huber("switch"),
        retention=Decay(),
        learning=GradientDescent(),
        inputs=Inputs(rate=Sigmoid(), decay=LogDecay(), gates={"delta": Softplus(3.5)}),
    )
    return replace(base, **overrides)


def moneta(**overrides: Any) -> Design:
    """Moneta: MLP memory, l_p loss, l_q retention and L2 decay."""
    base = Design(
        memory=MLP(),
        bias=Lp(3.0),
        retention=LqRms(4.0, 0.2),
        learning=GradientDescent(),
        link_at="refresh",
        inputs=Inputs(rate=Sigmoid(0.3), decay=LogDecay()),
    )
    return replace(base, **overrides)


def memora(**overrides: Any) -> Design:
    """Memora: MLP memory, L2 loss, KL retention."""
    base = Design(
        memory=MLP(),
        bias=L2(),
        retention=SignedKL(),
        learning=GradientDescent(),
        link_at="refresh",
        inputs=Inputs(rate=Sigmoid(0.3), decay=LogDecay()),
    )
    return replace(base, **overrides)


def titans_lmm(**overrides: Any) -> Design:
    """Titans' long-term memory: MLP, L2 loss, decay, momentum."""
    base = Design(memory=MLP(), bias=L2(), retention=Decay(), learning=Momentum())
    return replace(base, **overrides)


def gated_deltanet(**overrides: Any) -> Design:
    """Gated DeltaNet: matrix, L2 loss at the decayed state, decay per head, exact online."""
    base = Design(
        memory=Matrix(),
        bias=L2(),
        retention=Decay(),
        learning=GradientDescent(),
        refresh=1,
        gradient_at="decayed",
        anchor="origin",
        inputs=Inputs(rate=Sigmoid(), decay=MambaDecay(), weight_std=0.0),
    )
    return replace(base, **overrides)


def deltanet(**overrides: Any) -> Design:
    """DeltaNet: matrix, L2 loss, nothing forgotten, exact online."""
    base = Design(
        memory=Matrix(),
        bias=L2(),
        retention=Decay(),
        learning=GradientDescent(),
        refresh=1,
        anchor="origin",
        inputs=Inputs(rate=Sigmoid(), decay=None, weight_std=0.0),
    )
    return replace(base, **overrides)


def linear_attention(**overrides: Any) -> Design:
    """Linear attention: matrix, dot-product bias, nothing forgotten."""
    base = Design(
        memory=Matrix(),
        bias=Dot(),
        retention=Decay(),
        learning=GradientDescent(),
        refresh=1,
        anchor="origin",
        inputs=Inputs(features=Positive(), rate=Constant(1.0), decay=None, conv_size=0, activation=None, weight_std=0.0),
    )
    return replace(base, **overrides)


def transformer(window: int | None = None, **overrides: Any) -> Design:
    """Transformer++: softmax attention with rotary positions, over a sliding window if one is given."""
    base = Design(
        memory=None,
        bias=L2(),
        retention=None,
        learning=NonParametric(window),
        inputs=Inputs(features=Rotary(), conv_size=0, activation=None, output_norm=False, output_gate=False),
    )
    return replace(base, **overrides)
