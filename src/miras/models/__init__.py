"""Named models: each is four choices and the parametrisation of their gates, a few lines over the pieces.

Every function takes overrides for any field of `Design` (`yaad(refresh=1)`, `memora(retention=KL())`) and returns what
`MirasConfig(design=...)` takes. Where a default departs from the printed formula, docs/results/parametrisation.md has the
figures.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from miras.bias import Bias
from miras.choice import Choice, require_types
from miras.design import Design, LayerDesign, Pattern
from miras.inputs import Features, GateMap, Inputs, Output
from miras.learning import Learning
from miras.memory import Memory
from miras.models.attention import swa, transformer
from miras.models.deep import (
    atlas,
    memora,
    memora_h,
    moneta,
    moneta_h,
    omeganet,
    titans_lmm,
    titans_mac,
    titans_mag,
    titans_mal,
    ttt_linear,
    ttt_mlp,
    yaad,
    yaad_h,
)
from miras.models.deep import (
    deep_inputs as deep_inputs,
)
from miras.models.matrix import (
    deltanet,
    deltaproduct,
    gated_deltanet,
    gated_deltaproduct,
    gla,
    hgrn2,
    kda,
    lightning_attention,
    linear_attention,
    longhorn,
    longhorn_diagonal,
    mamba2,
    retnet,
    rwkv7,
)
from miras.retention import Retention

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


CHOICES: dict[str, type[Choice]] = {"memory": Memory, "bias": Bias, "retention": Retention, "learning": Learning}
INPUTS: dict[str, type[Choice]] = {"features": Features, "rate": GateMap, "decay": GateMap, "output": Output}
"""Fields of a design, and of its inputs, that are choices, and of which family."""


def named(name: str, **overrides: Any) -> LayerDesign | Pattern:
    """A named model, with overrides that may be dictionaries, as recipes give them.

    `named("yaad", refresh=64, bias={"kind": "Lp", "p": 2.0}, inputs={"weight_std": 1.0})`; fields of `inputs` that are not
    given keep the model's own, and so do those of a choice without `kind`: `named("moneta", bias={"p": 2.0})`.

    Raises:
        ValueError: unknown name, kind or field, values of another type.
    """
    if name not in NAMED:
        near = difflib.get_close_matches(name, NAMED, n=1)
        raise ValueError(
            f"no model {name!r}; allowed: {', '.join(sorted(NAMED))}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    overrides = _chosen(overrides, CHOICES, lambda: NAMED[name]().parts[0])
    inputs = overrides.get("inputs")
    try:
        if isinstance(inputs, Mapping):
            # The model's own inputs depend on what else is given: its arguments, `refresh`.
            own = NAMED[name](**{field: value for field, value in overrides.items() if field != "inputs"}).parts[0].inputs
            gates = inputs.get("gates", own.gates)
            gates = _chosen(gates, dict.fromkeys(gates, GateMap), lambda: SimpleNamespace(**own.gates))
            chosen = {**_chosen(inputs, INPUTS, lambda: own), "gates": gates}
            overrides["inputs"] = Inputs.from_dict({**own.to_dict(), **chosen})
        require_types(Design, overrides)
        return NAMED[name](**overrides)
    except TypeError as error:
        raise ValueError(
            f"model {name!r}: {error}; a design has memory, bias, retention, learning, refresh, link_at, "
            "gradient_at, anchor and inputs"
        ) from error


def _chosen(fields: Mapping[str, Any], families: Mapping[str, type[Choice]], own: Callable[[], Any]) -> dict[str, Any]:
    """The fields, with choices in the place of dictionaries of them; one without `kind` changes the one that `own` has."""
    chosen = dict(fields)
    for field, value in fields.items():
        if isinstance(value, Mapping) and field in families:
            kept = getattr(own(), field, None) if "kind" not in value else None
            given = {**(kept.to_dict() if kept is not None else {}), **value}
            chosen[field] = families[field].from_dict({key: item for key, item in given.items() if key != "family"})
    return chosen
