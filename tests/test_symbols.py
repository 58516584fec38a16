"""The formulas that choices give as text are true: read as formulas, they give the choices' own tensors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from miras import bias, features, inputs, learning, memory, retention
from miras.choice import Choice, exponent, quotient
from miras.design import Design, MemoryAsContext, MemoryAsGate, Pattern
from miras.inputs import Inputs, Output
from tests.formulas import evaluate
from tests.test_choice import MEMBERS, public_classes

TOLERANCE = 2e-5
"""What the small numbers added under roots and powers leave out of the texts come to (Lp: 1e-6 inside a power)."""


def members(family: type[Choice]) -> list[Any]:
    return [x for x in MEMBERS if isinstance(x, family) and x.symbols]


def equations(choice: Choice) -> dict[str, str]:
    return dict(line.split(" = ", 1) for line in choice.symbols.splitlines())


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found.expand_as(wanted), wanted, rtol=tolerance, atol=tolerance)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def named(choice: Any) -> str:
    return str(choice)[:60]


def test_every_public_choice_has_its_own() -> None:
    whole = {Inputs, Output, Design, Pattern, MemoryAsGate, MemoryAsContext}
    missing = {cls.__name__ for cls in public_classes() - whole if "symbols" not in vars(cls)}
    assert not missing, f"give {sorted(missing)} a property `symbols`, its formula as text"
    for member in MEMBERS:
        if type(member) in public_classes() - whole:
            assert member.symbols.isascii() and member.symbols, member


def test_numbers_of_formulas() -> None:
    assert [quotient(1, 3.0), quotient(2, 4), quotient(1, 1.5), quotient(3.0), quotient(0)] == [
        "1/3",
        "1/2",
        "2/3",
        "3",
        "0",
    ]
    assert [exponent(2), exponent(1.5), exponent(2, 4.0)] == ["^2", "^(3/2)", "^(1/2)"]


def bias_case(member: bias.Bias) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Names for the text, and gates for the class; errors of all sizes, on both sides of every threshold."""
    size = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64).repeat(20).unsqueeze(-1)
    v, e = normal(60, 3), size * (normal(60, 3).sign() * (0.3 + torch.rand(60, 3, dtype=torch.float64)))
    gates = {gate.name: 0.2 + torch.rand(60, 1, dtype=torch.float64) for gate in member.gates}
    gates["smoothing"] = 0.1 + torch.rand(60, 1, dtype=torch.float64)
    names = {"y": (v + e).requires_grad_(), "v": v, "s_t": gates["smoothing"]}
    return names | {f"{name}_t": gate for name, gate in gates.items()}, gates


@pytest.mark.parametrize("member", members(bias.Bias), ids=named)
def test_biases(member: bias.Bias) -> None:
    names, gates = bias_case(member)
    texts, y, v = equations(member), names["y"], names["v"]
    if member.implicit:
        assert texts.pop("s_t") == "eta_t ||k_t||^2"
        names["p"] = member.bias.proximal(y, v, gates, gates["smoothing"]).detach()
        texts["l"] = texts["l"].removeprefix("min_p ")
    names["e"] = y - v
    loss, gradient = evaluate(texts["l"], names), evaluate(texts["g"], names)
    close(loss.squeeze(-1), member.loss(y, v, gates), TOLERANCE)
    close(gradient, member.gradient(y, v, gates), TOLERANCE)
    (derived,) = torch.autograd.grad(loss.sum(), y)
    close(gradient, derived, TOLERANCE)
    if member.implicit:
        for step in (1e-2, 0.3):
            moved = evaluate(texts["l"], {**names, "p": names["p"] + step * normal(60, 3)})
            assert bool((moved >= loss - 1e-12).all())


@pytest.mark.parametrize("member", members(retention.Retention), ids=named)
def test_retentions(member: retention.Retention) -> None:
    dual = 0.3 * normal(2, 4, 3)
    link, *settling = member.symbols.splitlines()
    text, _, condition = link.removeprefix("W = ").partition(", zeta such that sum_in W = ")
    names = {"A": dual, "n": torch.tensor(4.0, dtype=torch.float64)}
    weight = member.link(dual)
    if condition:
        names["zeta"] = (dual - member.unlink(weight)).mean(-2, keepdim=True)
        close(weight.sum(-2, keepdim=True), evaluate(condition, names).expand(2, 1, 3))
    close(evaluate(text, names, axes=(-2, -1)), weight)
    settled = dual
    for line in settling:
        settled = evaluate(re.fullmatch(r"A <- (.+) at window ends", line)[1], names, axes=(-2, -1))
    close(settled, member.settle(dual))


@pytest.mark.parametrize("member", members(memory.Memory), ids=named)
def test_memories(member: memory.Memory) -> None:
    weights = {name: normal(shape.d_in, shape.d_out) for name, shape in member.weights(4, 4).items()}
    x = normal(5, 4)
    found = evaluate(member.symbols, {"x": x, **weights}, weights=tuple(weights))
    close(found, member(x, lambda name, h: h @ weights[name], {}))


def past_names(member: learning.Learning) -> list[str]:
    """Names of the slots before a step."""
    if isinstance(member, learning.Averaged):
        return ["D_{t-1}", "P_{t-1}", "S_{t-1}"]
    kept = ["D_{t-1}", "S_{t-1}"] if isinstance(member, learning.Momentum) else ["D_{t-1}"]
    return kept + [f"u_{{t-{i}}}" for i in range(1, member.slots - len(kept) + 1)]


@pytest.mark.parametrize("member", [x for x in members(learning.Learning) if x.parametric], ids=named)
def test_learners(member: learning.Learning) -> None:
    z, alpha = tuple(normal(4, 3) for _ in range(member.slots)), torch.tensor(0.9, dtype=torch.float64)
    past = past_names(member)
    gates = {gate.name: torch.tensor(0.6, dtype=torch.float64) for gate in member.gates}
    names = {**dict(zip(past, z, strict=True)), "alpha_t": alpha, **{f"{name}_t": gate for name, gate in gates.items()}}
    inputs = [normal(4, 3) for _ in range(member.micro_steps)]
    names |= {"u_t": inputs[0], **{f"u_t{j}": u for j, u in enumerate(inputs, start=1)}}
    for j, u in enumerate(inputs):
        z = member.step(z, u, alpha if j == 0 else torch.ones_like(alpha), gates)
    found = []
    for line in member.symbols.splitlines():
        name, text = re.fullmatch(r"(\w+) = (.+?)(?: inside a window| at (?:its|a window) end)?", line).groups()
        sizes = {"d_in": torch.tensor(4.0).double(), "d_out": torch.tensor(3.0).double()}
        names[name] = evaluate(
            text, {**names, **sizes}, axes=(-2, -1), functions={"NS": lambda s: iterated(s, member.steps)}
        )
        found += [names[name]] if name == "D_t" else []
    close(found[0], z[0])
    if isinstance(member, learning.Averaged):  # whose other slots settle
        for slot, settled in zip("DPS", member.settle(z), strict=True):
            close(names[f"{slot}_t"], settled)
    elif member.settles:
        close(found[1], member.settle(z)[0])


def iterated(s: Tensor, steps: int) -> Tensor:
    """Newton-Schulz towards the polar factor, by singular values."""
    left, x, right = torch.linalg.svd(s, full_matrices=False)
    x = x / x.square().sum().sqrt()
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return left @ x.diag() @ right


def test_long_sums_are_cut_short() -> None:
    assert learning.Omega(1).symbols == "D_t = alpha_t D_{t-1} + u_t"
    assert learning.Omega(9).symbols == "D_t = alpha_t D_{t-1} + u_t + .. + u_{t-8}"
    assert learning.MultiStep(7).symbols == "D_t = alpha_t D_{t-1} + u_t1 + .. + u_t7"


@pytest.mark.parametrize("member", members(inputs.GateMap), ids=named)
def test_gates(member: inputs.GateMap) -> None:
    """At a projection, or at positions; with as many channels as heads where there is one number a channel."""
    shape = (2, 2) if member.per_channel else (2,)
    p = {name: value.double() for name, value in member.parameters(shape).items()}
    x = normal(5, *shape) if member.projected else torch.arange(5.0, dtype=torch.float64).unsqueeze(1).expand(5, 2)
    names = {"x": x, **p, "h": torch.arange(2.0, dtype=torch.float64), "H": torch.tensor(2.0, dtype=torch.float64)}
    text, _, place = member.symbols.partition(", j = t mod ")
    if place:
        names["j"] = x % int(place)
        names["shift_j"] = p["shift"][names["j"].long()]
    close(evaluate(text, names), member(x, p).double())


FEATURES = [
    inputs.Plain(),
    inputs.Normalized(),
    inputs.Normalized(True),
    *(inputs.Positive(name) for name in inputs.POSITIVE_MAPS),
    features.ForgetKeys(),
    features.ForgetKeys(0.25),
    features.DiagonalImplicit(),
    features.Discretized(),
]


@pytest.mark.parametrize("member", FEATURES, ids=named)
def test_features(member: inputs.Features) -> None:
    """q, k, v, the rate, the decay and what is read; the other maps' texts are not of this form."""
    streams, p = {name: normal(1, 5, 2, 4) for name in "qkv"}, {}
    for name, x in member.parameters(2, 4, 4).items():
        p[name] = x.double() + 0.1 * normal(*x.shape)
    lr, out = torch.rand(1, 5, 2, dtype=torch.float64), normal(1, 5, 2, 4)
    made = member(inputs.Stream(**streams, lr=lr, log_decay=None, gates={}, positions=torch.arange(5).unsqueeze(0)), p)
    names = {**streams, "K": torch.tensor(4.0, dtype=torch.float64), "eta_t": lr.unsqueeze(-1), "o": out}
    names |= {name: x.unsqueeze(-1) for name, x in p.items()}
    lines = [line.partition(", with")[0] for line in member.symbols.splitlines()]
    for name, text in (line.split(" = ") for line in lines if " = " in line):
        names[name] = evaluate(text, names)
    wanted = {"eta_t": made.lr, "log alpha_t": made.log_decay, "o": member.read(out, made, p, lambda y: y)}
    for left, text in (line.split(" <- ") for line in lines if " <- " in line):
        values = [evaluate(part, names) for part in text.split(", ")]
        if left == "q, k, v":
            for value, x in zip(values, (made.q, made.k, made.v), strict=True):
                close(value, x, TOLERANCE)
            continue
        names[left] = values[0]
        target = wanted.pop(left)
        close(values[0], target if target.dim() == 4 else target.unsqueeze(-1))
    assert wanted.pop("eta_t", lr) is lr
    assert wanted.get("log alpha_t") is None
    assert torch.equal(wanted.get("o", out), out)
