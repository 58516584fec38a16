"""Deep memories: the models of the Miras paper, Titans and its arrangements, TTT, Atlas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from miras.bias import L2, Huber, Lp
from miras.design import Design, MemoryAsContext, MemoryAsGate, Pattern
from miras.features import (
    MiniBatch,
    Polynomial,
    WindowRate,
)
from miras.inputs import (
    Inputs,
    LogDecay,
    Normalized,
    Output,
    Sigmoid,
)
from miras.learning import Averaged, GradientDescent, Momentum, NonParametric, Omega, OmegaMuon
from miras.memory import MLP
from miras.models.attention import transformer
from miras.retention import L2 as Decay
from miras.retention import LqRms, SignedKL


def deep_inputs(rate: float = 1.0, **overrides: Any) -> Inputs:
    """How the deep memories are fed: unit q, k and v, a rate from `rate` to twice that, a decay over a thousand tokens."""
    base = Inputs(Normalized(values=True), Sigmoid(rate, 2 * rate), LogDecay(1000.0), aligned=True)
    return replace(base, **overrides)


def yaad(**overrides: Any) -> Design:
    """Yaad: MLP memory, Huber loss with a data-dependent threshold, decay to the initial memory.

    Source: Miras Sec. 5.3, Eq. 26. The printed switch between e and delta sign(e) is `Huber("switch")`.
    """
    base = Design(
        memory=MLP(),
        bias=Huber("coordinate"),
        retention=Decay(),
        learning=GradientDescent(),
        inputs=deep_inputs(),
    )
    return replace(base, **overrides)


def moneta(**overrides: Any) -> Design:
    """Moneta: MLP memory, l_p loss with p = 3, l_q retention with q = 4, and decay.

    Source: Miras Sec. 5.3, Eq. 24-25. The printed retention is `Lq(4)`.
    """
    base = Design(
        memory=MLP(),
        bias=Lp(3.0),
        retention=LqRms(4.0, 0.3),
        learning=GradientDescent(),
        link_at="refresh",
        inputs=deep_inputs(rate=3.0),
    )
    return replace(base, **overrides)


def memora(**overrides: Any) -> Design:
    """Memora: MLP memory, L2 loss, KL retention over signed weights (EG+-), and decay.

    Source: Miras Sec. 5.3, Eq. 27. The printed softmax is `KL()`, whose weights are positive.
    """
    base = Design(
        memory=MLP(),
        bias=L2(),
        retention=SignedKL(),
        learning=GradientDescent(),
        link_at="refresh",
        inputs=deep_inputs(),
    )
    return replace(base, **overrides)


def moneta_h(window: int = 256, **overrides: Any) -> Pattern:
    """Moneta-H: Moneta and sliding-window attention in turn (Samba's order: memory, MLP, attention, MLP)."""
    return _hybrid(moneta(**overrides), window)


def yaad_h(window: int = 256, **overrides: Any) -> Pattern:
    """Yaad-H: Yaad and sliding-window attention in turn."""
    return _hybrid(yaad(**overrides), window)


def memora_h(window: int = 256, **overrides: Any) -> Pattern:
    """Memora-H: Memora and sliding-window attention in turn."""
    return _hybrid(memora(**overrides), window)


def titans_lmm(**overrides: Any) -> Design:
    """Titans' long-term memory module: MLP memory, L2 loss, decay, momentum. Source: Titans (arXiv 2501.00663) Eq. 8-14."""
    base = Design(
        memory=MLP(),
        bias=L2(),
        retention=Decay(),
        learning=Momentum(),
        inputs=deep_inputs(rate=0.5),
    )
    return replace(base, **overrides)


def titans_mac(num_persistent: int = 4, **overrides: Any) -> MemoryAsContext:
    """Titans MAC: attention over segments of `refresh` tokens (64), persistent tokens and what the memory recalls.

    Source: Titans (arXiv 2501.00663) Sec. 4.1; strictly causal, also inside a segment (docs/equations.md).
    """
    memory = titans_lmm(**{"refresh": 64, **overrides})
    return MemoryAsContext(memory, transformer(learning=NonParametric(persistent=num_persistent)))


def titans_mag(window: int = 256, num_persistent: int = 4, **overrides: Any) -> MemoryAsGate:
    """Titans MAG: sliding-window attention with persistent tokens, gated by the memory. Source: Titans Sec. 4.2."""
    return MemoryAsGate(titans_lmm(**overrides), transformer(learning=NonParametric(window, num_persistent)))


def titans_mal(window: int = 256, num_persistent: int = 4, **overrides: Any) -> Pattern:
    """Titans MAL: the memory and sliding-window attention with persistent tokens, in turn. Source: Titans Sec. 4.3."""
    return Pattern((titans_lmm(**overrides), transformer(learning=NonParametric(window, num_persistent))))


def omeganet(window: int = 4, **overrides: Any) -> Design:
    """OmegaNet: MLP memory over polynomial keys, L2 loss, decay, the gradients of the last `window` tokens at every step.

    Source: Atlas (arXiv 2505.23735) Sec. 3.2 (Omega rule) and 5, with past gradients kept as they were taken.
    """
    rate = 1.0 / window
    base = Design(
        memory=MLP(residual=False),
        bias=L2(),
        retention=Decay(),
        learning=Omega(window),
        inputs=deep_inputs(rate, features=Polynomial()),
    )
    return replace(base, **overrides)


def atlas(window: int = 4, **overrides: Any) -> Design:
    """Atlas: OmegaNet whose momentum enters the memory orthogonalised. Source: Atlas (arXiv 2505.23735), its Muon update."""
    base = omeganet(window, learning=OmegaMuon(window), inputs=deep_inputs(0.5 / window, features=Polynomial()))
    return replace(base, **overrides)


def ttt_linear(**overrides: Any) -> Design:
    """TTT-Linear: M(x) = x + LN(x W + b) with learned norm, L2 loss, nothing forgotten, mini-batches of `refresh` tokens.

    A window's gradients count as a whole by a token rate, 1 over the place in the window plus a learned shift.
    Source: TTT (arXiv 2407.04620) Sec. 2.3-2.7 and its published code (learned inner and token rates).
    """
    return _ttt(MLP(depth=1, fast_bias=True), 1.0, overrides)


def ttt_mlp(**overrides: Any) -> Design:
    """TTT-MLP: M(x) = x + LN(gelu(x W_1 + b_1) W_2 + b_2) at a tenth of the rate, as `ttt_linear` otherwise.

    Source: TTT (arXiv 2407.04620) Sec. 2.7.
    """
    return _ttt(MLP(depth=2, activation="gelu_tanh", fast_bias=True), 0.1, overrides)


def _ttt(memory: MLP, rate: float, overrides: Mapping[str, Any]) -> Design:
    refresh = overrides.get("refresh", 16)
    inputs = Inputs(
        MiniBatch(length=refresh),
        rate=Sigmoid(rate / 2, rate),
        decay=None,
        gates={"token": WindowRate(refresh)},
        activation=None,
        weight_std=0.16,
        norm_gain=8.0,
        output=Output("layer", groups=1, gate=None),
    )
    return replace(Design(memory, L2(), Decay(), Averaged(), refresh=refresh, inputs=inputs), **overrides)


def _hybrid(design: Design, window: int) -> Pattern:
    return Pattern((design, transformer(window)))
