"""Matrix memories: linear attention and its decays, the delta rule and its descendants."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from miras.bias import L2, Bias, Dot, Envelope, RidgeDot
from miras.design import Design
from miras.features import (
    BoundedDecay,
    DiagonalImplicit,
    Discretized,
    FixedDecay,
    ForgetKeys,
    InContext,
    TimeStep,
)
from miras.inputs import (
    Constant,
    Features,
    Inputs,
    LogDecay,
    MambaDecay,
    Output,
    Plain,
    Positive,
    Rotary,
    Sigmoid,
)
from miras.learning import GradientDescent, MultiStep
from miras.memory import Matrix
from miras.retention import L2 as Decay


def gated_deltanet(**overrides: Any) -> Design:
    """Gated DeltaNet: matrix memory, L2 loss at the decayed state, one decay a head, exact online.

    S_t = alpha_t (I - eta_t k_t k_t^T) S_{t-1} + eta_t k_t v_t^T. Source: arXiv 2412.06464, Eq. 10.
    """
    base = _online(L2(), Inputs(decay=MambaDecay(), weight_std=0.0), gradient_at="decayed")
    return replace(base, **overrides)


def kda(**overrides: Any) -> Design:
    """Kimi Delta Attention: Gated DeltaNet with a decay a channel. Source: Kimi Linear (arXiv 2510.26692) Eq. 1."""
    decay = MambaDecay(per_channel=True, rank=32)
    output = Output(gate="sigmoid", rank=32, gate_bias=True)
    return replace(_online(L2(), Inputs(decay=decay, weight_std=0.0, output=output), gradient_at="decayed"), **overrides)


def deltanet(negative_eigenvalues: bool = False, **overrides: Any) -> Design:
    """DeltaNet: matrix memory, L2 loss, nothing forgotten, exact online. Source: arXiv 2406.06484, Eq. 3.

    With `negative_eigenvalues` the rate goes up to 2 (arXiv 2411.12537).
    """
    return replace(_online(L2(), _ungated(negative_eigenvalues)), **overrides)


def deltaproduct(n: int = 2, negative_eigenvalues: bool = True, **overrides: Any) -> Design:
    """DeltaProduct: n steps of DeltaNet a token, on n keys and values. Source: arXiv 2502.10297, Eq. 4-5."""
    base = _online(L2(), _ungated(negative_eigenvalues), learning=MultiStep(n))
    return replace(base, **overrides)


def gated_deltaproduct(n: int = 2, negative_eigenvalues: bool = True, **overrides: Any) -> Design:
    """Gated DeltaProduct: one decay a token, then n steps of DeltaNet. Source: arXiv 2502.10297, Sec. 3."""
    inputs = Inputs(rate=_beta(negative_eigenvalues), decay=MambaDecay(), weight_std=0.0)
    return replace(_online(L2(), inputs, gradient_at="decayed", learning=MultiStep(n)), **overrides)


def longhorn(**overrides: Any) -> Design:
    """Longhorn: matrix memory, the implicit step on the L2 loss, rate eta / (1 + eta ||k||^2), nothing else forgotten.

    Source: Longhorn (arXiv 2407.14207), closed-form update, with one rate a head and its exact transition.
    """
    return replace(_online(Envelope(L2()), Inputs(Plain(), decay=None, weight_std=0.0)), **overrides)


def longhorn_diagonal(**overrides: Any) -> Design:
    """Longhorn as it is run in its paper: the transition I - e k^T k replaced by its diagonal, 1 - e k^2 a channel.

    Source: Longhorn (arXiv 2407.14207), diagonal approximation.
    """
    return replace(_online(Dot(), Inputs(DiagonalImplicit(), decay=None, weight_std=0.0)), **overrides)


def rwkv7(**overrides: Any) -> Design:
    """RWKV-7: matrix memory that forgets at a removal key, at one rate a channel, and then writes at another key.

    S_t = (diag(w_t) - (a_t o kk_t)^T kk_t) S_{t-1} + k_t^T v_t, as two steps a token. Source: arXiv 2503.14456, Sec. 4.1.
    """
    inputs = Inputs(
        InContext(),
        rate=Sigmoid(0.45, per_channel=True, rank=32),
        decay=BoundedDecay(per_channel=True, rank=32, between="tanh"),
        gates={"residual": Sigmoid(0.5, per_channel=True, rank=32)},
        conv_size=0,
        activation=None,
        token_shift=True,
        weight_std=0.0,
        output=Output("layer", shared=False, gate="identity", rank=64, between="sigmoid", eps=64e-5),
    )
    return replace(_online(RidgeDot(), inputs, learning=MultiStep(2)), **overrides)


def linear_attention(normalizer: bool = False, **overrides: Any) -> Design:
    """Linear attention: matrix memory, dot-product bias, nothing forgotten, keys and queries 1 + elu(x).

    Source: Katharopoulos et al. 2020 (arXiv 2006.16236), Eq. 4 and 7; `normalizer` divides by the summed keys, as printed.
    """
    return replace(_online(Dot(), _hebbian(Positive(normalizer=normalizer), decay=None)), **overrides)


def retnet(**overrides: Any) -> Design:
    """RetNet: linear attention with a fixed decay 1 - 2^(-5-h) for head h, rotary positions, values twice as wide as keys.

    Source: RetNet (arXiv 2307.08621) Eq. 6-8.
    """
    inputs = _hebbian(Rotary(scaled=True), decay=FixedDecay("retnet"), value_ratio=2.0)
    return replace(_online(Dot(), inputs), **overrides)


def lightning_attention(scale: float = 1.0, **overrides: Any) -> Design:
    """Lightning Attention: linear attention with a fixed decay exp(-scale 2^(-8 (h + 1) / H)) for head h, SiLU on q, k, v.

    TransNormer lowers `scale` from layer to layer: a `Pattern` of this function's designs. Source: Lightning Attention-2
    (arXiv 2401.04658), TransNormerLLM (arXiv 2307.14995) Sec. 3.
    """
    output = Output(groups=1, gate="sigmoid")
    inputs = _hebbian(Plain(), decay=FixedDecay("slopes", scale), activation="silu", output=output)
    return replace(_online(Dot(), inputs), **overrides)


def gla(**overrides: Any) -> Design:
    """Gated linear attention: a decay a channel, keys half as wide as values. Source: GLA (arXiv 2312.06635) Eq. 4."""
    decay = LogDecay(horizon=16 / math.log(2), temperature=16.0, per_channel=True, rank=16)
    return replace(_online(Dot(), _hebbian(Plain(scaled=True), decay=decay, key_ratio=0.5)), **overrides)


def mamba2(**overrides: Any) -> Design:
    """Mamba2: dot-product bias at rate dt, decay exp(-A dt), one key and query head for all, a skip D.

    Heads are twice as wide as head_dim (expand 2), and so is their state (128 for heads of 64).
    Source: Mamba2 (arXiv 2405.21060) Sec. 7.
    """
    inputs = Inputs(
        Discretized(),
        rate=TimeStep(),
        decay=None,
        conv_bias=True,
        key_ratio=2.0,
        value_ratio=2.0,
        key_heads=1,
        weight_std=0.0,
        output=Output(groups=1, gate_first=True),
    )
    return replace(_online(Dot(), inputs), **overrides)


def hgrn2(lower_bound: float = 0.0, **overrides: Any) -> Design:
    """HGRN2: a decay f a channel, whose key is 1 - f. Source: HGRN2 (arXiv 2404.07904) Sec. 3.

    The paper learns rising lower bounds of f over the layers; here each layer has its own, fixed: a `Pattern` of this
    function's designs gives them a rise.
    """
    inputs = _hebbian(ForgetKeys(lower_bound), decay=None, output=Output(groups=1, gate=None))
    return replace(_online(Dot(), inputs), **overrides)


def _hebbian(features: Features, **changes: Any) -> Inputs:
    """Inputs of models that write at a fixed rate and convolve nothing."""
    own: dict[str, Any] = {"rate": Constant(1.0), "conv_size": 0, "activation": None, "weight_std": 0.0}
    return Inputs(features, **{**own, **changes})


def _ungated(negative_eigenvalues: bool) -> Inputs:
    """Inputs of models that forget nothing and gate nothing."""
    return Inputs(rate=_beta(negative_eigenvalues), decay=None, weight_std=0.0, output=Output(gate=None))


def _online(bias: Bias, inputs: Inputs, **changes: Any) -> Design:
    """A matrix memory that learns exactly online, from zero."""
    own: dict[str, Any] = {"learning": GradientDescent(), "refresh": 1, "anchor": "origin"}
    return Design(Matrix(), bias, Decay(), inputs=inputs, **{**own, **changes})


def _beta(negative_eigenvalues: bool) -> Sigmoid:
    return Sigmoid(1.0, 2.0) if negative_eigenvalues else Sigmoid()
