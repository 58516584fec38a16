"""Softmax attention, whole and windowed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from miras.bias import L2
from miras.design import Design
from miras.inputs import (
    Inputs,
    Output,
    Rotary,
)
from miras.learning import NonParametric


def transformer(window: int | None = None, **overrides: Any) -> Design:
    """Transformer++: softmax attention with rotary positions, over a sliding window if one is given.

    Source: Miras Sec. 4, Eq. 10 (Nadaraya-Watson); backbone as in Llama.
    """
    base = Design(
        memory=None,
        bias=L2(),
        retention=None,
        learning=NonParametric(window),
        inputs=Inputs(Rotary(), conv_size=0, activation=None, output=Output(norm=None, gate=None)),
    )
    return replace(base, **overrides)


def swa(window: int = 256, **overrides: Any) -> Design:
    """Sliding-window attention: `transformer` over the last `window` tokens. Source: arXiv 2004.05150, Sec. 3.1."""
    return transformer(window, **overrides)
