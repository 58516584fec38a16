"""State sizes against the states that layers return, FLOPs against torch's own counter on the path that runs."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import miras
from miras import bias, learning, memory, models, retention
from miras.cost import Cost, fit, inner_weights, measure, state_formula
from miras.describe import parts
from miras.design import Design
from miras.engine import memorize
from miras.inputs import Inputs, LogDecay, Output, Sigmoid

DESCENT = learning.GradientDescent()
CHANNELS = Inputs(rate=Sigmoid(), decay=LogDecay(per_channel=True))

NAMED = {f"{name} {place}".strip(): d for name, make in models.NAMED.items() for place, d in parts(make())}

DESIGNS = {
    "substituted": Design(memory.MLP(), bias.Lp(3.0), retention.L2(), DESCENT, refresh=1),
    "substituted, origin": Design(memory.MLP(3, 1.0), bias.L2(), retention.L2(), DESCENT, refresh=1, anchor="origin"),
    "substituted matrix": Design(memory.Matrix(), bias.Lp(3.0), retention.L2(), DESCENT, refresh=1),
    "vector": Design(memory.Vector(), bias.L2(), retention.L2(), DESCENT, refresh=1),
    "gated": Design(memory.GatedMLP(), bias.Robust(), retention.L2(), DESCENT),
    "recurrent": Design(memory.MLP(), bias.L2(), retention.KL(), DESCENT, refresh=1),
    "recurrent tangent": Design(memory.MLP(), bias.L2(), retention.Lq(), DESCENT, refresh=1, link_at="refresh"),
    "settling": Design(memory.MLP(), bias.L2(), retention.ProximalElasticNet(), DESCENT, refresh=8),
    "token links": Design(memory.MLP(), bias.L2(), retention.LqRms(), DESCENT, refresh=64),
    "uneven blocks": Design(memory.MLP(), bias.L2(), retention.SignedKL(), DESCENT, refresh=100, link_at="refresh"),
    "constant gradient": Design(memory.Matrix(), bias.Dot(), retention.L2(), DESCENT, refresh=100),
    "implicit": Design(memory.Matrix(), bias.Envelope(), retention.L2(), DESCENT, refresh=1),
    "two steps": Design(memory.Matrix(), bias.L2(), retention.L2(), learning.MultiStep(2), refresh=1, anchor="origin"),
    "two deep steps": Design(memory.MLP(), bias.L2(), retention.L2(), learning.MultiStep(2)),
    "omega": Design(memory.MLP(), bias.L2(), retention.L2(), learning.Omega(4), refresh=4),
    "muon": Design(memory.MLP(), bias.L2(), retention.L2(), learning.Muon(3), refresh=8),
    "momentum": Design(memory.Matrix(), bias.L2(), retention.L2(), learning.Momentum(), refresh=1),
    "channels": Design(memory.Matrix(), bias.L2(), retention.L2(), DESCENT, refresh=1, inputs=CHANNELS),
    "deep channels": Design(memory.MLP(), bias.L2(), retention.L2(), DESCENT, inputs=CHANNELS),
}

PARAMETRIC = {name: design for name, design in {**NAMED, **DESIGNS}.items() if design.parametric}

HEAD_DIM = 16


def own(design: Design, cost: Cost) -> int:
    """The most FLOPs a token that a block's own b x b matrices take, where a learner of several slots multiplies masks.

    `count_flops` leaves them out and torch's counter sees them; a triangular system's inverse it does not see.
    """
    block, slots = cost.plan.tile, design.learning.slots
    return 0 if slots == 1 or cost.plan.path == "reference" else 2 * (slots - 1) * (block**2 + block)


def counted(design: Design, tokens: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """FLOPs a token as torch counts them where a layer runs its memory, without its projections."""
    totals = []

    def counting(*args: Any, **options: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            result = memorize(*args, **options)
        totals.append(counter.get_total_flops())
        return result

    monkeypatch.setattr(miras.layer, "memorize", counting)
    with torch.no_grad():
        miras.MemoryLayer(HEAD_DIM, 1, design)(torch.randn(1, tokens, HEAD_DIM))
    return totals[0] / tokens


@pytest.mark.parametrize("name", PARAMETRIC)
def test_flops_are_what_torch_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last one over whole windows, but for what a block does on its own."""
    design = PARAMETRIC[name]
    cost = measure(design, HEAD_DIM)
    window = design.refresh if design.refresh > 1 else cost.plan.tile
    tokens = 2 * window // design.learning.micro_steps
    rest = counted(design, tokens, monkeypatch) - cost.flops
    assert -1e-6 <= rest <= own(design, cost) + 1e-6


def test_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch counts T keys a query, those that the mask hides too."""
    tokens, designs = 32, (models.transformer(), models.transformer(8))
    whole, window = (measure(design, HEAD_DIM) for design in designs)
    seen = [counted(design, tokens, monkeypatch) for design in designs]
    assert whole.grows and whole.flops * tokens == seen[0]
    assert not window.grows and window.flops == seen[1] * 8 / tokens
    assert held(designs[0], tokens) == tokens * whole.state
    assert held(designs[1], tokens) == window.state


def test_persistent_tokens_count_once() -> None:
    assert measure(models.transformer(8, learning=learning.NonParametric(8, 4)), 16).flops == 2 * 32 * (8 + 4)
    assert measure(models.transformer(learning=learning.NonParametric(persistent=4)), 16).flops == 2 * 32


def test_heads_that_share_cost_what_others_do() -> None:
    """Keys for groups of heads, and norms over them, need several heads."""
    alone = measure(models.gla(), 16)
    shared = replace(models.gla().inputs, key_heads=2, output=Output(groups=3))
    assert measure(models.gla(inputs=shared), 16) == alone


def held(design: Design, tokens: int = 20) -> int:
    """Numbers that a head's state holds after some tokens, by its bytes: floats of four, and where it is in int64."""
    layer = miras.MemoryLayer(HEAD_DIM, 1, design, layer_idx=0)
    cache = miras.MirasCache()
    layer(torch.randn(1, tokens, HEAD_DIM), past_key_values=cache, use_cache=True)
    state = cache.read(0).memory
    numbers, rest = divmod(state.nbytes - 8, 4)
    assert rest == 0
    if design.parametric and design.refresh == 1:
        # The gradient point is the memory itself, a copy that nothing needs.
        for weight, point in state.point.items():
            assert torch.equal(point, state.slots[weight][:, :, 0])
            numbers -= point.numel()
    return numbers


@pytest.mark.parametrize("name", PARAMETRIC)
def test_state_is_what_a_layer_holds(name: str) -> None:
    design, cost = PARAMETRIC[name], measure(PARAMETRIC[name], HEAD_DIM)
    assert cost.state == held(design)
    assert cost.copies * sum(d_in * d_out for d_in, d_out in cost.weights.values()) == cost.state


def test_formulas_of_states() -> None:
    assert state_formula(models.gated_deltanet()) == "d^2"
    assert state_formula(models.titans_lmm()) == "24 d^2"
    assert state_formula(models.yaad(refresh=1)) == "8 d^2"
    assert state_formula(models.yaad(memory=memory.MLP(3, 0.5))) == "5/2 d^2"
    assert state_formula(DESIGNS["vector"]) == "d"
    assert state_formula(models.transformer()) == "2 d t"
    assert state_formula(models.transformer(64)) == "126 d"
    assert state_formula(models.yaad(memory=memory.MLP(expansion=0.3))) is None


def test_fit() -> None:
    points = [(x, 2 * x**3 + x**2 + 5) for x in (1, 2, 4, 7, 9, 11)]
    assert fit(points) == [5, 0, 1, 2, 0]
    assert fit([(2, 2), (4, 8), (6, 18), (8, 32)]) == [0, 0, Fraction(1, 2)]
    assert fit([(1, 1), (2, 2), (3, 4)]) is None


def test_errors_pass_back_through_inner_weights() -> None:
    for member, inner in ((memory.MLP(3), {"hidden1", "down"}), (memory.GatedMLP(), {"down"}), (memory.Vector(), set())):
        weights = {name: (shape.d_in, shape.d_out) for name, shape in member.weights(8, 8).items()}
        assert inner_weights(member, weights, 8) == inner


def test_measuring_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    measure(models.gated_deltanet(), 64)
    assert torch.equal(before, torch.get_rng_state())
