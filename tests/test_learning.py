"""Learning rules: one step against its formula, what they declare, and Newton-Schulz."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from miras.learning import (
    Averaged,
    GradientDescent,
    Learning,
    Momentum,
    MultiStep,
    Muon,
    NonParametric,
    Omega,
    OmegaMuon,
    orthogonalize,
)
from tests.problems import assert_close
from tests.test_bias import Recorder

RULES: dict[str, Learning] = {
    "descent": GradientDescent(),
    "momentum": Momentum(),
    "two steps": MultiStep(2),
    "omega 1": Omega(1),
    "omega 2": Omega(2),
    "omega 4": Omega(4),
    "muon": Muon(5),
    "omega muon": OmegaMuon(3, steps=5),
    "averaged": Averaged(),
}

STEPS, SHAPE = 9, (4, 3)


def drive(rule: Learning, alpha: Tensor, u: Tensor, gates: dict[str, Tensor]) -> Tensor:
    """D after every step, from zero."""
    z = tuple(torch.zeros(SHAPE, dtype=torch.float64) for _ in range(rule.slots))
    found = []
    for t in range(STEPS):
        z = rule.step(z, u[t], alpha[t], {name: x[t] for name, x in gates.items()})
        assert len(z) == rule.slots
        found.append(z[0])
    return torch.stack(found)


def example() -> tuple[Tensor, Tensor, Tensor]:
    alpha, mu = torch.rand(STEPS, dtype=torch.float64), torch.rand(STEPS, dtype=torch.float64)
    return alpha, torch.randn(STEPS, *SHAPE, dtype=torch.float64), mu


def retained(alpha: Tensor, start: int, stop: int) -> Tensor:
    """alpha_{start+1} ... alpha_stop."""
    return alpha[start + 1 : stop + 1].prod()


@pytest.mark.parametrize("name", ["descent", "two steps", "omega 1"])
def test_descent_in_closed_form(name: str) -> None:
    """D_t = sum_i prod_{j > i} alpha_j u_i."""
    alpha, u, _ = example()
    expected = [sum(retained(alpha, i, t) * u[i] for i in range(t + 1)) for t in range(STEPS)]
    assert_close(drive(RULES[name], alpha, u, {}), torch.stack(expected))


@pytest.mark.parametrize("name", ["momentum", "muon"])
def test_momentum_in_closed_form(name: str) -> None:
    """D_t = sum_s prod_{j > s} alpha_j S_s,  S_s = sum_i prod_{i < j <= s} mu_j u_i."""
    alpha, u, mu = example()
    speed = [sum(retained(mu, i, s) * u[i] for i in range(s + 1)) for s in range(STEPS)]
    expected = [sum(retained(alpha, s, t) * speed[s] for s in range(t + 1)) for t in range(STEPS)]
    assert_close(drive(RULES[name], alpha, u, {"mu": mu}), torch.stack(expected))


@pytest.mark.parametrize("window", [1, 2, 3, 4, 20])
def test_omega_in_closed_form(window: int) -> None:
    """Every step adds the last `window` gradients."""
    alpha, u, _ = example()
    recent = [u[max(0, s - window + 1) : s + 1].sum(0) for s in range(STEPS)]
    expected = [sum(retained(alpha, s, t) * recent[s] for s in range(t + 1)) for t in range(STEPS)]
    assert_close(drive(Omega(window), alpha, u, {}), torch.stack(expected))


@pytest.mark.parametrize("name", RULES)
def test_declared_facts(name: str) -> None:
    rule, (alpha, u, mu) = RULES[name], example()
    z = tuple(torch.randn(SHAPE, dtype=torch.float64) for _ in range(rule.slots))
    recorder = Recorder({"mu": mu[0], "token": mu[1]})
    rule.step(z, u[0], alpha[0], recorder)
    assert recorder.read == {gate.name for gate in rule.gates}
    settled = rule.settle(z)
    assert rule.settles == any(not torch.equal(a, b) for a, b in zip(z, settled, strict=True))
    assert rule.micro_steps == (2 if name == "two steps" else 1)
    assert rule.parametric
    assert rule.linear
    assert len(rule.start(z[0])) == rule.slots
    assert torch.equal(rule.start(z[0])[0], z[0])
    for gate in rule.gates:
        assert gate.minimum <= gate.initial <= gate.maximum


def test_a_rule_without_a_system_says_so() -> None:
    with pytest.raises(NotImplementedError, match="NonParametric gives no block matrices"):
        NonParametric().system(torch.zeros(3), {})


def test_momentum_at_its_edges() -> None:
    """mu = 0 and mu = 1 in the logarithm."""
    mu = torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64)
    system = Momentum().system(torch.zeros(3, dtype=torch.float64), {"mu": mu})
    expected = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 2, 1]], dtype=torch.float64)
    assert_close(system.mix, expected, tolerance=1e-11)


def test_averaged_in_closed_form() -> None:
    """D_t = prod alpha D_0 + c_t sum_i prod_{j > i} alpha_j u_i within a window, which then begins anew."""
    alpha, u, c = example()
    z = Averaged().start(torch.ones(SHAPE, dtype=torch.float64))
    begun, first = z[0], 0
    for t in range(STEPS):
        z = Averaged().step(z, u[t], alpha[t], {"token": c[t]})
        past = sum(retained(alpha, i, t) * u[i] for i in range(first, t + 1))
        assert_close(z[0], retained(alpha, first - 1, t) * begun + c[t] * past)
        if t % 4 == 3:
            z = Averaged().settle(z)
            begun, first = z[0], t + 1


def test_omega_muon_in_closed_form() -> None:
    """The momentum of the windowed sums."""
    alpha, u, mu = example()
    recent = [u[max(0, s - 2) : s + 1].sum(0) for s in range(STEPS)]
    speed = [sum(retained(mu, i, s) * recent[i] for i in range(s + 1)) for s in range(STEPS)]
    expected = [sum(retained(alpha, s, t) * speed[s] for s in range(t + 1)) for t in range(STEPS)]
    assert_close(drive(OmegaMuon(3, steps=2), alpha, u, {"mu": mu}), torch.stack(expected))


@pytest.mark.parametrize("shape", [(6, 6), (3, 8), (8, 3)])
def test_orthogonalize(shape: tuple[int, int]) -> None:
    """Singular values near one times norm / sqrt(rank), in any shape; vectors, sign and norm kept."""
    x = torch.randn(50, *shape, dtype=torch.float64)
    y = orthogonalize(x, 5)
    rank, norm = min(shape), x.norm(dim=(-2, -1), keepdim=True)
    values = torch.linalg.svdvals(y / norm * rank**0.5)
    conditioned = torch.linalg.svdvals(x / norm)[:, -1] > 0.02
    assert float(values[conditioned].min()) > 0.65
    assert float(values.max()) < 1.25
    ratio = (y.norm(dim=(-2, -1)) / norm.flatten())[conditioned]
    assert float((ratio - 1).abs().max()) < 0.25
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    rotated = left.mT @ y @ right.mT
    diagonal = torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))
    assert_close(rotated, diagonal, "the singular vectors stay", tolerance=1e-8)
    assert float(rotated.diagonal(dim1=-2, dim2=-1).min()) > 0
    assert_close(orthogonalize(x.mT, 5), y.mT)
    assert_close(orthogonalize(10 * x, 5), 10 * y)
    assert float((orthogonalize(x, 1) - y).abs().max()) > 0.01


def test_orthogonalize_leaves_an_idle_memory_idle() -> None:
    x = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    y = orthogonalize(x, 5)
    y.sum().backward()
    assert float(y.detach().abs().max()) == 0.0
    assert torch.isfinite(x.grad).all()


def test_muon_orthogonalises_what_enters_the_memory() -> None:
    """D_t = alpha D_{t-1} + NS(S_t) at a window end; the momentum itself goes on as it was."""
    d, s = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    first, second = Muon(3).settle((d + s, s))
    assert_close(first, d + orthogonalize(s, 3))
    assert torch.equal(second, s)


def test_non_parametric() -> None:
    rule = NonParametric(4)
    assert not rule.parametric
    assert not rule.linear
    assert rule.gates == ()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MultiStep(0), "n=0; must be at least 1"),
        (lambda: Omega(0), "window=0; must be at least 1"),
        (lambda: Muon(0), "steps=0; must be at least 1"),
        (lambda: OmegaMuon(steps=0), "steps=0; must be at least 1"),
        (lambda: OmegaMuon(0, steps=2), "window=0; must be at least 1"),
        (lambda: NonParametric(0), "window=0; must be at least 1"),
    ],
)
def test_illegal_values(build: Callable[[], Learning], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
