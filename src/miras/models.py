"""Named models: each is four choices and the parametrisation of their gates, a few lines over the pieces.

Every function takes overrides for any field of `Design` (`yaad(refresh=1)`, `memora(retention=KL())`) and returns what
`MirasConfig(design=...)` takes. Where a default departs from the printed formula, docs/results/parametrisation.md has the
figures.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from miras.bias import L2, Bias, Dot, Envelope, Huber, Lp, RidgeDot
from miras.choice import Choice
from miras.design import Design, LayerDesign, MemoryAsContext, MemoryAsGate, Pattern
from miras.features import (
    BoundedDecay,
    DiagonalImplicit,
    Discretized,
    FixedDecay,
    ForgetKeys,
    InContext,
    MiniBatch,
    Polynomial,
    TimeStep,
    WindowRate,
)
from miras.inputs import (
    Constant,
    Features,
    Inputs,
    LogDecay,
    MambaDecay,
    Normalized,
    Output,
    Plain,
    Positive,
    Rotary,
    Sigmoid,
)
from miras.learning import Averaged, GradientDescent, Learning, Momentum, MultiStep, NonParametric, Omega, OmegaMuon
from miras.memory import MLP, Matrix, Memory
from miras.retention import L2 as Decay
from miras.retention import LqRms, Retention, SignedKL


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
    base = omeganet(window, learning=OmegaMuon(window=window), inputs=deep_inputs(0.5 / window, features=Polynomial()))
    return replace(base, **overrides)


def ttt_linear(**overrides: Any) -> Design:
    """TTT-Linear: M(x) = x + LN(x W + b) with learned norm, L2 loss, nothing forgotten, mini-batches of `refresh` tokens.

    A window's gradients count as a whole by a token rate, 1 over the place in the window plus a learned shift.
    Source: TTT (arXiv 2407.04620) Sec. 2.3-2.7 and its published code (learned inner and token rates).
    """
    return _ttt(MLP(depth=1, fast_bias=True), overrides)


def ttt_mlp(**overrides: Any) -> Design:
    """TTT-MLP: M(x) = x + LN(gelu(x W_1 + b_1) W_2 + b_2), as `ttt_linear` otherwise. Source: arXiv 2407.04620, Sec. 2.7."""
    return _ttt(MLP(depth=2, activation="gelu_tanh", fast_bias=True), overrides)


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


NAMED: dict[str, Callable[..., LayerDesign | Pattern]] = {
    function.__name__: function
    for function in (
        moneta,
        yaad,
        memora,
        moneta_h,
        yaad_h,
        memora_h,
        titans_lmm,
        titans_mac,
        titans_mag,
        titans_mal,
        omeganet,
        atlas,
        ttt_linear,
        ttt_mlp,
        gated_deltanet,
        kda,
        deltanet,
        deltaproduct,
        gated_deltaproduct,
        longhorn,
        longhorn_diagonal,
        rwkv7,
        linear_attention,
        retnet,
        lightning_attention,
        gla,
        mamba2,
        hgrn2,
        transformer,
        swa,
    )
}
"""Every named model by its name."""


def named(name: str, **overrides: Any) -> LayerDesign | Pattern:
    """A named model, with overrides that may be dictionaries, as recipes give them.

    `named("yaad", refresh=64, bias={"kind": "Lp", "p": 2.0}, inputs={"weight_std": 1.0})`; fields of `inputs` that are not
    given keep the model's own.

    Raises:
        ValueError: unknown name, kind or field.
    """
    if name not in NAMED:
        near = difflib.get_close_matches(name, NAMED, n=1)
        raise ValueError(
            f"no model {name!r}; allowed: {', '.join(sorted(NAMED))}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    families: dict[str, type[Choice]] = {"memory": Memory, "bias": Bias, "retention": Retention, "learning": Learning}
    for field, value in overrides.items():
        if isinstance(value, Mapping) and field in families:
            overrides[field] = families[field].from_dict(value)
    if isinstance(overrides.get("inputs"), Mapping):
        own = NAMED[name]().parts[0].inputs.to_dict()
        overrides["inputs"] = Inputs.from_dict({**own, **overrides["inputs"]})
    try:
        return NAMED[name](**overrides)
    except TypeError as error:
        raise ValueError(
            f"model {name!r}: {error}; a design has memory, bias, retention, learning, refresh, link_at, "
            "gradient_at, anchor and inputs"
        ) from error


def _hebbian(features: Features, **changes: Any) -> Inputs:
    """Inputs of models that write at a fixed rate and convolve nothing."""
    own: dict[str, Any] = {"rate": Constant(1.0), "conv_size": 0, "activation": None, "weight_std": 0.0}
    return Inputs(features, **{**own, **changes})


def _ungated(negative_eigenvalues: bool) -> Inputs:
    """Inputs of models that forget nothing and gate nothing."""
    return Inputs(rate=_beta(negative_eigenvalues), decay=None, weight_std=0.0, output=Output(gate=None))


def _online(bias: Bias, inputs: Inputs, **changes: Any) -> Design:
    """A matrix memory that learns exactly online, from zero."""
    base = Design(Matrix(), bias, Decay(), GradientDescent(), refresh=1, anchor="origin", inputs=inputs)
    return replace(base, **changes)


def _ttt(memory: MLP, overrides: Mapping[str, Any]) -> Design:
    refresh = overrides.get("refresh", 16)
    inputs = Inputs(
        MiniBatch(length=refresh),
        rate=Sigmoid(0.5),
        decay=None,
        gates={"token": WindowRate(refresh)},
        activation=None,
        weight_std=0.16,
        norm_gain=8.0,
        output=Output("layer", groups=1, gate=None),
    )
    return replace(Design(memory, L2(), Decay(), Averaged(), refresh=refresh, inputs=inputs), **overrides)


def _beta(negative_eigenvalues: bool) -> Sigmoid:
    return Sigmoid(1.0, 2.0) if negative_eigenvalues else Sigmoid()


def _hybrid(design: Design, window: int) -> Pattern:
    return Pattern((design, transformer(window)))
