"""Choices as plain data: frozen, equal after a trip through JSON, and clear about what they refuse."""

from __future__ import annotations

import dataclasses
import enum
import json
from typing import Any

import numpy as np
import pytest

from miras import bias, design, features, gatemaps, inputs, learning, memory, models, retention, tasks
from miras.choice import Choice, require, require_one_of
from tests.table import FACTORS

MODULES = (memory, bias, retention, learning, gatemaps, inputs, features, design)

GATES = [
    inputs.Constant(0.5),
    inputs.Sigmoid(0.2, 2.0, per_channel=True, rank=8),
    inputs.Softplus(3.0),
    inputs.LogDecay(100.0, 2.0),
    inputs.MambaDecay(per_channel=True),
    features.FixedDecay("slopes", 0.5),
    features.BoundedDecay(per_channel=True, rank=4, between="tanh"),
    features.TimeStep(),
    features.WindowRate(8),
]

MEMBERS: list[Choice] = [
    *(member for name in ("memory", "bias", "retention", "learning") for member in FACTORS[name]),
    memory.MLP(4, 0.5, "relu", False, None),
    bias.Envelope(bias.Envelope(bias.Dot()).bias),
    *(retention.FDivergence(name, 2.0) for name in ("kl", "reverse_kl", "jensen_shannon")),
    learning.NonParametric(),
    learning.NonParametric(64),
    learning.NonParametric(64, persistent=4),
    *GATES,
    inputs.Normalized(),
    inputs.Normalized(values=True),
    inputs.Positive(),
    inputs.Rotary(500.0, scaled=True),
    inputs.Plain(),
    features.MiniBatch(length=8),
    features.ForgetKeys(0.2),
    features.DiagonalImplicit(),
    features.Discretized(),
    features.InContext(),
    features.Polynomial(),
    inputs.Output("layer", groups=2, gate="sigmoid", rank=3, gate_bias=True),
    inputs.Inputs(),
    inputs.Inputs(
        features=inputs.Positive(),
        rate=inputs.Softplus(0.1),
        decay=None,
        gates={"delta": inputs.Softplus(2.0), "mu": inputs.Sigmoid()},
        conv_size=0,
        activation=None,
        norm_gain=None,
    ),
    models.yaad(),
    models.transformer(window=8),
    design.Pattern((models.yaad(), models.transformer(16))),
    models.titans_mac(),
    models.titans_mag(),
    design.Pattern((models.titans_mag(), models.yaad())),
]


def public_classes() -> set[type[Choice]]:
    """Every choice that can be named in a design, families left out."""
    found = set()
    for module in MODULES:
        for x in vars(module).values():
            if isinstance(x, type) and issubclass(x, Choice) and x.__module__ == module.__name__:
                families = "family" in vars(x) and x not in (design.Design, design.Pattern, inputs.Inputs, inputs.Output)
                found |= set() if families else {x}
    return found


def test_members_are_complete() -> None:
    assert public_classes() <= {type(member) for member in MEMBERS}


@pytest.mark.parametrize("member", MEMBERS, ids=lambda x: str(x)[:60])
def test_json_round_trip(member: Choice) -> None:
    text = json.dumps(member.to_dict())
    again = type(member).from_dict(json.loads(text))
    assert again == member
    assert type(again) is type(member)
    assert json.dumps(again.to_dict()) == text
    assert member.to_dict()["kind"] == type(member).__name__ == member.kind


@pytest.mark.parametrize("member", MEMBERS, ids=lambda x: str(x)[:60])
def test_frozen_and_comparable(member: Choice) -> None:
    assert dataclasses.replace(member) == member
    for field in dataclasses.fields(member):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(member, field.name, None)


@pytest.mark.parametrize(
    ("family", "data", "message"),
    [
        (bias.Bias, {"kind": "Huberr"}, r"unknown bias kind 'Huberr'.*allowed:.*did you mean 'Huber'"),
        (bias.Bias, {}, "unknown bias kind None; allowed: .*L2"),
        (bias.Bias, {"kind": "Matrix"}, "unknown bias kind 'Matrix'"),
        (memory.Memory, {"kind": "MLP", "dept": 2}, r"MLP has no field 'dept'; allowed: .*did you mean 'depth'"),
        (memory.Memory, {"kind": "Matrix", "size": 2}, "Matrix has no field 'size'; allowed: none"),
        (retention.Retention, {"kind": "Lq", "q": 1.0}, "q=1.0; must be at least 2"),
        (learning.Learning, {"kind": "Omega", "window": 0}, "window=0; must be at least 1"),
        (memory.Memory, {"kind": "MLP", "depth": "2"}, "MLP: depth='2'; must be a whole number"),
        (memory.Memory, {"kind": "MLP", "depth": True}, "depth=True; must be a whole number"),
        (bias.Bias, {"kind": "Huber", "form": 3}, "Huber: form=3; must be text"),
        (bias.Bias, {"kind": "Lp", "p": None}, "Lp: p=None; must be a number"),
        (bias.Bias, {"kind": "Envelope", "bias": 3}, "Envelope: bias=3; must be one of the kinds of Bias"),
        (inputs.Inputs, {"kind": "Inputs", "conv_size": None}, "Inputs: conv_size=None; must be a whole number"),
        (inputs.Inputs, {"kind": "Inputs", "norm_gain": "1"}, "norm_gain='1'; must be a number or null"),
        (tasks.Task, {"kind": "MQAR", "longer": 2}, r"MQAR: longer=2; must be a list \[a whole number, ...\]"),
        (tasks.Task, {"kind": "MQARMixture", "testing": [[64, 4, 1]]}, r"must be a list \[a list \[a whole number, a whole"),
        (tasks.Task, {"kind": "MajorityRecall", "noise": "20%"}, "MajorityRecall: noise='20%'; must be a number"),
        (bias.Bias, {"kind": "Envelope", "bias": {"kind": "L2"}}, r"one of the kinds of Bias; .* needs its family too"),
        (bias.Bias, {"kind": "Envelope", "bias": {"family": "biass", "kind": "L2"}}, "unknown family 'biass'"),
        (design.Design, {"kind": "Designs"}, "did you mean 'Design'"),
    ],
)
def test_from_dict_says_what_is_allowed(family: type[Choice], data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        family.from_dict(data)


def test_a_class_of_the_users_own_goes_through_json() -> None:
    @dataclasses.dataclass(frozen=True)
    class Quartic(bias.Bias):
        weight: float = 2.0

    assert bias.Bias.from_dict(Quartic(3.0).to_dict()) == Quartic(3.0)
    nested = {"kind": "Quartic", "weight": 1.0, "family": "bias"}
    data = {**models.yaad().to_dict(), "bias": nested}
    assert design.design_from(data) == dataclasses.replace(models.yaad(), bias=Quartic(1.0))


class Way(enum.StrEnum):
    """A field's type that is neither plain nor a choice."""

    UP = "up"


def test_other_numbers_and_texts_are_taken() -> None:
    @dataclasses.dataclass(frozen=True)
    class Taken(bias.Bias):
        way: Way
        pair: tuple
        number: int
        share: float

    given = {"way": "up", "pair": [1, "a"], "number": np.int64(3), "share": np.float32(0.25)}
    assert bias.Bias.from_dict({"kind": "Taken", **given}) == Taken(Way.UP, (1, "a"), 3, 0.25)


def test_annotations_that_only_a_function_knows_are_not_checked() -> None:
    class Scale(float):
        """A type of the user's own."""

    @dataclasses.dataclass(frozen=True)
    class Scaled(bias.Bias):
        scale: Scale

    assert bias.Bias.from_dict({"kind": "Scaled", "scale": 3}) == Scaled(3)  # type: ignore[arg-type]


def test_families_are_not_members() -> None:
    for family in (memory.Memory, bias.Bias, retention.Retention, learning.Learning, inputs.GateMap, inputs.Features):
        with pytest.raises(ValueError, match="unknown"):
            family.from_dict({"kind": family.__name__})


def test_require() -> None:
    require(True, "never")
    with pytest.raises(ValueError, match="because"):
        require(False, "because")
    require_one_of("form", "a", ("a", "b"))
    with pytest.raises(ValueError, match="form='c'; allowed: 'a', 'b'"):
        require_one_of("form", "c", ("a", "b"))
