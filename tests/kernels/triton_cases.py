"""The triton path against the reference: on a GPU by `make test-gpu`, in Triton's interpreter by `test_triton.py`.

Not collected by itself, since the interpreter has to be chosen before anything in the process imports Triton.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from miras import bias, learning, memory, retention
from miras.design import Design
from miras.engine import MemoryState
from miras.kernels import block, scan
from tests.problems import (
    Problem,
    assert_close,
    assert_same,
    differentiable,
    leaves,
    outcome,
    probe,
    random_problem,
    run,
    sliced,
    state_tensors,
    with_leaves,
)
from tests.table import LogCosh

DEVICE = "cpu" if scan.interpreted() else "cuda"
DTYPE, TOLERANCE = (torch.float64, 1e-9) if DEVICE == "cpu" else (torch.float32, 2e-4)

PLAIN = Design(memory.MLP(2, 2.0), bias.L2(), retention.L2(), learning.GradientDescent(), refresh=16)


def online(design: Design) -> Design:
    return replace(design, refresh=1)


GROUPS: dict[str, dict[str, tuple[Design, dict[str, Any]]]] = {
    "quick": {
        "descent": (PLAIN, {"tokens": 32}),
        "exact online": (online(replace(PLAIN, bias=bias.Lp(3.0))), {"tokens": 5}),
    },
    "memories": {
        "one layer": (replace(PLAIN, memory=memory.MLP(1, norm="rms")), {}),
        "three layers": (replace(PLAIN, memory=memory.MLP(3, 1.0, "silu")), {}),
        "no residual, other widths": (replace(PLAIN, memory=memory.MLP(2, 2.0, "tanh", False, None)), {"value_width": 8}),
        "fast biases": (replace(PLAIN, memory=memory.MLP(2, 2.0, "gelu_tanh", fast_bias=True)), {"tokens": 16}),
        "gated": (replace(PLAIN, memory=memory.GatedMLP(2.0)), {}),
        "matrix": (replace(PLAIN, memory=memory.Matrix()), {"value_width": 32, "tokens": 64}),
        "vector": (replace(PLAIN, memory=memory.Vector()), {}),
        "matrix, online, at the decayed weights": (
            replace(online(PLAIN), memory=memory.Matrix(), gradient_at="decayed"),
            {"tokens": 6},
        ),
    },
    "biases": {
        str(x): (replace(PLAIN, bias=x), {"tokens": 16})
        for x in (
            bias.Dot(),
            bias.Lp(1.5),
            bias.Huber("coordinate"),
            bias.Huber("norm"),
            bias.Huber("switch"),
            bias.Robust(),
            LogCosh(),
        )
    }
    | {"implicit": (replace(PLAIN, memory=memory.Matrix(), bias=bias.Envelope(bias.Robust())), {"tokens": 16})},
    "links": {
        "scale, at window ends": (replace(PLAIN, retention=retention.LqMirror(4.0), link_at="refresh"), {}),
        "scale, at every token": (replace(PLAIN, retention=retention.LqRms(3.5, 0.7), refresh=4), {"tokens": 10}),
        "pointwise, at window ends": (replace(PLAIN, retention=retention.KL(5.0), link_at="refresh"), {}),
        "pointwise, at every token": (replace(PLAIN, retention=retention.SignedKL(), refresh=4), {"tokens": 6}),
        "pointwise, online": (online(replace(PLAIN, retention=retention.Bregman("sigmoid"))), {"tokens": 4}),
        "threshold on the state": (replace(PLAIN, retention=retention.ProximalElasticNet(0.02)), {"tokens": 16}),
    },
    "learnings": {
        "momentum from the origin": (replace(PLAIN, learning=learning.Momentum(), anchor="origin"), {}),
        "momentum, online": (online(replace(PLAIN, learning=learning.Momentum())), {"tokens": 5}),
        "several steps a token": (replace(PLAIN, learning=learning.MultiStep(2)), {"tokens": 16}),
        "orthogonalised": (replace(PLAIN, learning=learning.Muon(2)), {"tokens": 16}),
        "sliding window": (replace(PLAIN, refresh=4, learning=learning.Omega(3)), {"tokens": 7}),
        "averaged": (replace(PLAIN, refresh=4, learning=learning.Averaged()), {"tokens": 7}),
    },
    "shapes": {
        "several blocks a window": (replace(PLAIN, refresh=48), {"tokens": 96, "width": 4}),
        "windows of no power of two": (replace(PLAIN, refresh=3), {"tokens": 8}),
        "ragged end": (PLAIN, {"tokens": 37, "batch": 2, "heads": 3}),
        "wide": (replace(PLAIN, refresh=32), {"tokens": 32, "width": 32, "heads": 1}),
        "narrow": (PLAIN, {"width": 2}),
        "a channel's own rates and decays": (PLAIN, {"tokens": 18, "rate": "channel", "decay": "channel", "width": 4}),
    },
}


def problem_of(design: Design, **sizes: Any) -> Problem:
    defaults = {"tokens": 48, "width": 16, "batch": 1, "heads": 2, "slow": True, "dtype": DTYPE}
    return random_problem(design, **{**defaults, **sizes})


def moved(problem: Problem) -> Problem:
    return with_leaves(problem, {name: x.to(DEVICE) for name, x in leaves(problem).items()})


def home(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.cpu() for name, x in found.items()}


CASES = [pytest.param(*case, id=f"{group}: {name}") for group, cases in GROUPS.items() for name, case in cases.items()]


@pytest.mark.parametrize(("design", "sizes"), CASES)
def test_equals_reference(design: Design, sizes: dict[str, Any]) -> None:
    problem = problem_of(design, **sizes)
    found = home(outcome(moved(problem), path="triton"))
    assert_same(found, outcome(problem, path="reference"), TOLERANCE)


@pytest.mark.parametrize("rule", [learning.GradientDescent(), learning.Momentum()], ids=lambda x: x.kind)
def test_quick_weights_read_anew(rule: learning.Learning, monkeypatch: pytest.MonkeyPatch) -> None:
    """What large memories do, whose weights and gradients stay out of registers (an odd and an even number of blocks)."""
    monkeypatch.setattr(block, "REREAD", 0)
    block.backward_program.cache_clear()
    problem = problem_of(replace(PLAIN, learning=rule), tokens=48 if rule.slots == 1 else 32)
    found = home(outcome(moved(problem), path="triton"))
    block.backward_program.cache_clear()
    assert_same(found, outcome(problem, path="reference"), TOLERANCE)


def handed(problem: Problem, state: MemoryState, path: str) -> dict[str, Tensor]:
    """Outputs, state and gradients, those in each tensor of an initial state too."""
    tracked, found = differentiable(problem)
    tensors = state.to(problem["k"].device).map(lambda x: x.clone().requires_grad_() if x.is_floating_point() else x)
    out, final = run(tracked, initial_state=tensors, path=path)
    (probe(out).cpu() + 0.3 * sum(probe(x).cpu() for x in final.tensors() if x.is_floating_point())).backward()
    found |= {name: x for name, x in state_tensors(tensors).items() if x.requires_grad}
    gradients = {f"d {name}": torch.zeros_like(x) if x.grad is None else x.grad for name, x in found.items()}
    return home({"out": out, **state_tensors(final), **gradients})


@pytest.mark.parametrize("begun", [16, 10], ids=["at a window's start", "inside a window"])
@pytest.mark.parametrize("link", [retention.L2(), retention.KL(5.0)], ids=lambda x: x.kind)
def test_sequences_from_a_state(begun: int, link: retention.Retention) -> None:
    problem = problem_of(replace(PLAIN, retention=link, link_at="refresh", learning=learning.Momentum()), tokens=36)
    _, state = run(sliced(problem, 0, begun))
    rest = sliced(problem, begun, 36)
    expected = handed(rest, state.detach(), "reference")
    assert_same(handed(moved(rest), state.detach(), "triton"), expected, TOLERANCE)


@pytest.mark.parametrize("refresh", [1, 4])
def test_sequences_decoded_token_by_token(refresh: int) -> None:
    problem = problem_of(replace(PLAIN, refresh=refresh), tokens=7)
    expected, _ = run(problem, path="reference")
    there, state, outputs = moved(problem), None, []
    with torch.no_grad():
        for t in range(7):
            out, state = run(sliced(there, t, t + 1), initial_state=state, path="triton")
            outputs.append(out.cpu())
    assert_close(torch.cat(outputs, dim=1), expected, "out", TOLERANCE)


def test_sequences_packed() -> None:
    problem = problem_of(PLAIN, tokens=21)
    borders = torch.tensor([0, 16, 21])
    expected = run(problem, path="reference", cu_seqlens=borders)
    out, state = run(moved(problem), path="triton", cu_seqlens=borders.to(DEVICE))
    assert_close(out.cpu(), expected[0], "out", TOLERANCE)
    assert_same(home(state_tensors(state)), state_tensors(expected[1]), TOLERANCE)


def test_sequences_of_some_gradients_only() -> None:
    problem, results = problem_of(PLAIN, tokens=16), []
    for inputs, path in ((moved(problem), "triton"), (problem, "reference")):
        tracked = {**inputs, "k": inputs["k"].clone().requires_grad_()}
        out, _ = run(tracked, path=path)
        results.append(torch.autograd.grad(probe(out), tracked["k"])[0].cpu())
    assert_close(*results, "d k", TOLERANCE)


def test_sequences_in_half_precision() -> None:
    problem = problem_of(replace(PLAIN, refresh=16), tokens=64, dtype=torch.float32)
    halves = {name: problem[name].bfloat16() for name in ("q", "k", "v")}
    out, state = run(moved({**problem, **halves}), path="triton")
    expected, _ = run({**problem, **{name: x.float() for name, x in halves.items()}}, path="reference")
    assert out.dtype == torch.bfloat16
    assert {x.dtype for x in state.tensors()} == {torch.float32, torch.int64}
    worst = float((out.cpu().float() - expected).abs().max() / expected.abs().max())
    assert 1e-5 < worst < 0.02


def test_sequences_have_no_second_derivatives() -> None:
    tracked, found = differentiable(moved(problem_of(PLAIN, tokens=16)))
    out, _ = run(tracked, path="triton")
    with pytest.raises(RuntimeError, match="has no second derivatives"):
        torch.autograd.grad(probe(out), found["v"], create_graph=True)


@dataclass(frozen=True)
class Sorted(bias.Bias):
    """A user's bias with an operation that no kernel has."""

    def loss(self, y: Tensor, v: Tensor, gates: bias.Gates) -> Tensor:
        return cast(Tensor, (y - v).sort(-1).values.square()).sum(-1)


REFUSED = {
    "width": (PLAIN, {"width": 12}, "powers of two; keys of 12, values of 12, up's axis 0 of 12, up's axis 1 of 24"),
    "hidden width": (replace(PLAIN, memory=memory.MLP(2, 1.5)), {}, "powers of two; up's axis 1 of 24, down's axis 0 of 24"),
    "state": (replace(PLAIN, memory=memory.Matrix()), {"width": 512, "tokens": 1}, "262144 numbers of state a head"),
    "operation": (replace(PLAIN, bias=Sorted()), {"tokens": 16}, "aten.sort.default has no Triton form"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_quick_refusals(name: str) -> None:
    design, sizes, reason = REFUSED[name]
    with pytest.raises(ValueError, match=f"path='triton'.* {reason}"):
        run(moved(problem_of(design, **sizes)), path="triton")
