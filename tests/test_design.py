"""Designs: what is legal, what is refused and why, and their trip through JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from miras import bias, learning, memory, models, retention
from miras.design import Design, Pattern, design_from
from miras.features import DiagonalImplicit, Discretized, ForgetKeys, InContext, MiniBatch, WindowRate
from miras.inputs import Features, Inputs, Sigmoid
from tests.table import TABLE, Row

CHOICES: dict[str, Any] = {
    "memory": memory.Matrix(),
    "bias": bias.L2(),
    "retention": retention.L2(),
    "learning": learning.GradientDescent(),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"refresh": 0}, r"refresh=0; must be an integer >= 1"),
        ({"refresh": 2.0}, r"refresh=2.0; must be an integer >= 1"),
        ({"refresh": -16}, r"refresh=-16"),
        ({"link_at": "window"}, "link_at='window'; allowed: 'token', 'refresh'"),
        ({"gradient_at": "next"}, "gradient_at='next'; allowed: 'previous', 'decayed'"),
        ({"anchor": "zero"}, "anchor='zero'; allowed: 'initial', 'origin'"),
        ({"gradient_at": "decayed"}, "gradient_at='decayed' needs refresh=1, got refresh=16.*refresh=1"),
        (
            {"memory": memory.MLP(), "bias": bias.Envelope()},
            "Envelope takes an implicit step.*linear memory only; got MLP",
        ),
        ({"learning": learning.NonParametric()}, "NonParametric keeps no fast weights: leave memory=None"),
    ],
)
def test_illegal_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Design(**{**CHOICES, **changes})


@pytest.mark.parametrize("name", list(CHOICES))
@pytest.mark.parametrize("wrong", [None, "L2", bias.Dot, torch.ones(1)])
def test_wrong_types(name: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match=rf"{name}=.*must be an instance of a"):
        Design(**{**CHOICES, name: wrong})


def test_retention_of_attention_is_refused_too() -> None:
    with pytest.raises(ValueError, match="leave retention=None"):
        Design(None, bias.L2(), retention.L2(), learning.NonParametric())


def test_what_begins_anew_with_a_window_is_as_long() -> None:
    for changes in ({"features": models.ttt_linear(refresh=8).inputs.features}, {"gates": {"token": WindowRate(8)}}):
        with pytest.raises(ValueError, match=r"begins anew every 8 tokens, but a window has 16 gradient steps"):
            models.ttt_linear(inputs=replace(models.ttt_linear().inputs, **changes))
    with pytest.raises(ValueError, match=r"begins anew every 16 tokens, but a window has 32"):
        replace(models.ttt_linear(), refresh=32)


@pytest.mark.parametrize("row", TABLE[::5], ids=str)
def test_json_round_trip(row: Row) -> None:
    data = json.loads(json.dumps(row.design.to_dict()))
    assert design_from(data) == row.design
    assert Design.from_dict(data) == row.design


def test_design_from() -> None:
    yaad = models.yaad()
    pattern = Pattern((yaad, models.transformer(4), yaad))
    assert design_from(yaad) is yaad
    assert design_from(pattern) is pattern
    assert design_from(json.loads(json.dumps(pattern.to_dict()))) == pattern
    assert design_from({"family": "design", **yaad.to_dict()}) == yaad
    with pytest.raises(TypeError, match="must be a miras Design, a Pattern, or a dictionary of one; got str"):
        design_from("yaad")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has no field 'refres'.*did you mean 'refresh'"):
        design_from({**yaad.to_dict(), "refres": 3})


def test_pattern() -> None:
    with pytest.raises(ValueError, match="non-empty tuple of designs"):
        Pattern(())
    with pytest.raises(ValueError, match="non-empty tuple of designs"):
        Pattern((models.yaad(), "yaad"))  # type: ignore[arg-type]
    assert models.yaad().designs == (models.yaad(),)


@pytest.mark.parametrize("single", [memory.Vector(), memory.MLP(depth=1, fast_bias=True)], ids=str)
@pytest.mark.parametrize("simplex", [retention.KL(), retention.FDivergence()], ids=str)
def test_a_simplex_over_one_input_is_refused(single: memory.Memory, simplex: retention.Retention) -> None:
    with pytest.raises(ValueError, match=r"have one input: they could not learn. Use SignedKL\(\)"):
        Design(single, bias.L2(), simplex, learning.GradientDescent())
    Design(single, bias.L2(), retention.SignedKL(), learning.GradientDescent())


def test_features_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="InContext make the gates ridge; bias L2 and learning MultiStep read none"):
        models.rwkv7(bias=bias.L2())
    with pytest.raises(ValueError, match=r"make 2 steps a token, learning GradientDescent\(\) takes 1"):
        models.rwkv7(learning=learning.GradientDescent())
    with pytest.raises(ValueError, match=r"Discretized make one decay a key, learning MultiStep\(n=2\) takes one a token"):
        models.mamba2(learning=learning.MultiStep(2))


@pytest.mark.parametrize("features", [Discretized(), DiagonalImplicit(), ForgetKeys(), InContext(), MiniBatch()], ids=str)
def test_attention_refuses_what_belongs_to_fast_weights(features: Features) -> None:
    with pytest.raises(ValueError, match=rf"{features.kind} make or read the rates or decays.*NonParametric has none"):
        models.transformer(inputs=Inputs(features, decay=None))
    with pytest.raises(ValueError, match=r"inputs\.gates has delta; learning NonParametric reads no gates"):
        models.transformer(inputs=Inputs(gates={"delta": Sigmoid()}))


def test_facts() -> None:
    titans = Design(memory.MLP(), bias.Huber(), retention.L2(), learning.Momentum())
    assert [gate.name for gate in titans.gates] == ["delta", "mu"]
    assert titans.slow_names(8) == ("norm.weight", "norm.bias")
    assert Design(**CHOICES).slow_names(8) == ()
    assert titans.parametric
    attention = models.transformer()
    assert not attention.parametric
    assert attention.slow_names(8) == ()
    a = torch.randn(4, 4)
    assert torch.equal(replace(titans, retention=retention.KL()).link(a), retention.KL().link(a))


def test_a_dictionary_without_the_choices_says_what_it_needs():
    with pytest.raises(ValueError, match="Design needs memory, bias, retention, learning; given: nothing"):
        Design.from_dict({"kind": "Design"})
