"""Named models: each is four choices and the parametrisation of their gates, a few lines over the pieces.

Every function takes overrides for any field of `Design` (`yaad(refresh=1)`, `memora(retention=KL())`) and returns what
`MirasConfig(design=...)` takes. Where a default departs from the printed formula, docs/results/parametrisation.md has the
figures.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from miras.bias import L2, Bias, Dot, Huber, Lp
from miras.choice import Choice
from miras.design import Design, LayerDesign, MemoryAsContext, MemoryAsGate, Pattern
from miras.inputs import Constant, Inputs, LogDecay, MambaDecay, Normalized, Positive, Rotary, Sigmoid
from miras.learning import GradientDescent, Learning, Momentum, NonParametric
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


def gated_deltanet(**overrides: Any) -> Design:
    """Gated DeltaNet: matrix memory, L2 loss at the decayed state, one decay a head, exact online.

    S_t = alpha_t (I - eta_t k_t k_t^T) S_{t-1} + eta_t k_t v_t^T. Source: arXiv 2412.06464, Eq. 10.
    """
    base = replace(_online(L2(), Inputs(rate=Sigmoid(), decay=MambaDecay(), weight_std=0.0)), gradient_at="decayed")
    return replace(base, **overrides)


def deltanet(**overrides: Any) -> Design:
    """DeltaNet: matrix memory, L2 loss, nothing forgotten, exact online. Source: arXiv 2406.06484, Eq. 3."""
    return replace(_online(L2(), Inputs(rate=Sigmoid(), decay=None, weight_std=0.0)), **overrides)


def linear_attention(**overrides: Any) -> Design:
    """Linear attention: matrix memory, dot-product bias, nothing forgotten, keys and queries 1 + elu(x), no normaliser.

    Source: Katharopoulos et al. 2020 (arXiv 2006.16236), Eq. 4 and 7.
    """
    inputs = Inputs(Positive(), rate=Constant(1.0), decay=None, conv_size=0, activation=None, weight_std=0.0)
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
        inputs=Inputs(Rotary(), conv_size=0, activation=None, output_norm=False, output_gate=False),
    )
    return replace(base, **overrides)


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
        gated_deltanet,
        deltanet,
        linear_attention,
        transformer,
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


def _online(bias: Bias, inputs: Inputs) -> Design:
    """A matrix memory that learns exactly online, from zero."""
    return Design(Matrix(), bias, Decay(), GradientDescent(), refresh=1, anchor="origin", inputs=inputs)


def _hybrid(design: Design, window: int) -> Pattern:
    return Pattern((design, transformer(window)))
