"""A learning rule as block matrices equals the rule applied step by step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from miras import learning
from miras.engine.chunk import token_deviations, written
from miras.engine.errors import Factors
from miras.memory import WeightShape
from miras.system import System, build_system, decayed
from tests.problems import assert_close

LINEAR = [
    learning.GradientDescent(),
    learning.Momentum(),
    learning.MultiStep(2),
    learning.Omega(1),
    learning.Omega(2),
    learning.Omega(4),
    learning.Omega(12),
    learning.Muon(2),
    learning.OmegaMuon(1, steps=2),
    learning.OmegaMuon(3, steps=2),
    learning.OmegaMuon(12, steps=2),
    learning.Averaged(),
]


def gates_of(rule: learning.Learning, size: int) -> dict[str, Tensor]:
    return {gate.name: torch.rand(size, dtype=torch.float64) for gate in rule.gates}


def by_steps(rule: learning.Learning, z: tuple[Tensor, ...], u: Tensor, decay: Tensor, gates: dict) -> list:
    """Slots after every step, for numbers in the place of matrices."""
    found = []
    for t in range(len(u)):
        z = rule.step(z, u[t], decay[t], {name: x[t] for name, x in gates.items()})
        found.append(z)
    return found


@pytest.mark.parametrize("rule", LINEAR, ids=str)
def test_system_equals_repeated_steps(rule: learning.Learning) -> None:
    size = 7
    log_decay, gates = -torch.rand(size, dtype=torch.float64), gates_of(rule, size)
    z = tuple(torch.randn(rule.slots, dtype=torch.float64))
    u = torch.randn(size, dtype=torch.float64)
    expected = by_steps(rule, z, u, log_decay.exp(), gates)
    system = rule.system(log_decay, gates)
    read = system.mix @ u + sum(c * x for c, x in zip(system.carry, z, strict=True))
    assert_close(read, torch.stack([x[0] for x in expected]), "D_t")
    for slot in range(rule.slots):
        moved = sum(m * x for m, x in zip(system.move[slot], z, strict=True) if m is not None)
        assert_close(moved + system.write[slot] @ u, expected[-1][slot], f"slot {slot}")
    assert len(system.carry) == len(system.write) == len(system.move) == rule.slots


@pytest.mark.parametrize("rule", LINEAR, ids=str)
@pytest.mark.parametrize("at_decayed", [False, True])
def test_system_before_a_step(rule: learning.Learning, at_decayed: bool) -> None:
    size = 5
    log_decay, gates = -torch.rand(size, dtype=torch.float64), gates_of(rule, size)
    z, u = tuple(torch.randn(rule.slots, dtype=torch.float64)), torch.randn(size, dtype=torch.float64)
    after = torch.stack([x[0] for x in by_steps(rule, z, u, log_decay.exp(), gates)])
    expected = torch.cat((z[0][None], after[:-1]))
    expected = expected * log_decay.exp() if at_decayed else expected
    system = rule.system(log_decay, gates)
    mix, carry = system.before(log_decay if at_decayed else None)
    assert_close(mix @ u + sum(c * x for c, x in zip(carry, z, strict=True)), expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("rule", LINEAR, ids=str)
def test_decay_per_channel_acts_on_its_axis(rule: learning.Learning, axis: int) -> None:
    size, shape = 6, WeightShape(3, 4, axis)
    channels = (shape.d_in, shape.d_out)[axis]
    log_decay, gates = -torch.rand(size, channels, dtype=torch.float64), gates_of(rule, size)
    pairs = Factors(torch.randn(size, 3, dtype=torch.float64), torch.randn(size, 4, dtype=torch.float64))
    z = tuple(torch.randn(rule.slots, 3, 4, dtype=torch.float64))
    alpha = log_decay.exp().unsqueeze(-1 if axis == 0 else -2)
    u = pairs.x.unsqueeze(-1) * pairs.g.unsqueeze(-2)
    expected = by_steps(rule, z, u, alpha, gates)
    system = rule.system(log_decay.mT, {name: x.unsqueeze(-2) for name, x in gates.items()})
    assert_close(token_deviations(z, system, pairs, shape), torch.stack([x[0] for x in expected]))
    for slot in range(rule.slots):
        total = written(pairs, system.write[slot], shape)
        for m, x in zip(system.move[slot], z, strict=True):
            if m is not None:
                total = total + m.unsqueeze(-1 if axis == 0 else -2) * x
        assert_close(total, expected[-1][slot], f"slot {slot}")


def test_a_longer_chain() -> None:
    """Three leaky integrators, one feeding the next at the same step."""
    size = 6
    logs = tuple(-torch.rand(size, dtype=torch.float64) for _ in range(3))
    z, u = torch.randn(3, dtype=torch.float64), torch.randn(size, dtype=torch.float64)
    system, now, read = build_system(logs), z.clone(), []
    for t in range(size):
        c = logs[2][t].exp() * now[2] + u[t]
        b = logs[1][t].exp() * now[1] + c
        now = torch.stack((logs[0][t].exp() * now[0] + b, b, c))
        read.append(now[0])
    assert_close(system.mix @ u + sum(c * x for c, x in zip(system.carry, z, strict=True)), torch.stack(read))
    for slot in range(3):
        total = system.write[slot] @ u
        total = total + sum(m * x for m, x in zip(system.move[slot], z, strict=True) if m is not None)
        assert_close(total, now[slot])


def test_block_picks_one_of_a_batch() -> None:
    logs = -torch.rand(4, 2, 5, dtype=torch.float64)
    batch = build_system((logs, 2 * logs))
    alone: System = build_system((logs[1], 2 * logs[1]))
    picked = batch.unbind()[1]
    assert torch.equal(picked.mix, alone.mix)
    assert all(torch.equal(a, b) for a, b in zip(picked.carry, alone.carry, strict=True))


def test_huge_decays_underflow_to_zero() -> None:
    system = build_system((torch.full((4,), -1e4, dtype=torch.float64),))
    assert torch.equal(system.mix, torch.eye(4, dtype=torch.float64))
    assert float(system.carry[0].abs().max()) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vanishing_decays_are_zero_before_their_products_are_denormal(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    total = torch.linspace(-2.5, 0, 98, dtype=dtype).mul(-math.log(tiny)).requires_grad_()
    found = decayed(total)
    exact = total.detach().double().exp()
    kept = exact**2 >= tiny
    assert 0 < int(kept.sum()) < len(total)
    torch.testing.assert_close(found.detach().double(), exact * kept, rtol=1e-4 if dtype == torch.float32 else 1e-12, atol=0)
    assert torch.equal(torch.autograd.grad(found.sum(), total)[0], found)
    assert not bool(((found * found > 0) & (found * found < tiny)).any())
