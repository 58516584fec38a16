"""The online learner's steps traced one by one: the reference's numbers, gradients and states, and where they are taken."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import miras
from miras import bias, learning, memory, retention
from miras.design import Design
from miras.kernels import fused, native, online
from tests.problems import (
    Problem,
    assert_close,
    assert_same,
    differentiable,
    outcome,
    probe,
    probe_state,
    random_problem,
    run,
    sliced,
    state_tensors,
)
from tests.table import LogCosh

MLP = memory.MLP(2, 2.0)
PLAIN = Design(MLP, bias.L2(), retention.L2(), learning.GradientDescent(), refresh=1)

BIASES = (
    bias.Dot(),
    bias.RidgeDot(),
    bias.Lp(3.0),
    bias.Lp(1.5),
    bias.Huber("coordinate"),
    bias.Huber("norm"),
    bias.Huber("switch"),
    bias.Robust(),
    LogCosh(),
)

DESIGNS = {
    **{str(x): replace(PLAIN, bias=x) for x in BIASES},
    "descent": PLAIN,
    "from the origin": replace(PLAIN, anchor="origin", gradient_at="decayed"),
    "momentum": replace(PLAIN, learning=learning.Momentum()),
    "several steps a token": replace(PLAIN, learning=learning.MultiStep(2)),
    "a window of gradients": replace(PLAIN, learning=learning.Omega(3)),
    "one layer": replace(PLAIN, memory=memory.MLP(1, norm="rms"), bias=bias.Lp(3.0)),
    "three layers": replace(PLAIN, memory=memory.MLP(3, 1.0, "silu")),
    "fast biases": replace(PLAIN, memory=memory.MLP(2, 1.0, fast_bias=True)),
    "gated": replace(PLAIN, memory=memory.GatedMLP(1.5)),
    "a matrix with a general bias": replace(PLAIN, memory=memory.Matrix(), bias=bias.Envelope(bias.Robust())),
}


@pytest.fixture(autouse=True)
def not_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or that path would be taken first."""
    monkeypatch.setattr(native, "compiler", lambda: ())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of at most four gradient steps, of which the last is shorter."""
    monkeypatch.setattr(miras.engine.dispatch, "TILES", {"substituted": 4})


def problem_of(design: Design, **sizes: Any) -> Problem:
    return random_problem(design, **{"tokens": 7, "slow": True, **sizes})


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", DESIGNS)
def test_equals_reference(name: str) -> None:
    problem = problem_of(DESIGNS[name])
    assert_same(outcome(problem, path="fused"), outcome(problem, path="reference"))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("rate", "decay"), [("channel", "head"), ("head", "channel"), ("channel", "channel")])
@pytest.mark.parametrize("name", ["momentum", "gated"])
def test_gates_per_channel(name: str, rate: str, decay: str) -> None:
    problem = problem_of(DESIGNS[name], rate=rate, decay=decay)
    assert_same(outcome(problem, path="fused"), outcome(problem, path="reference"))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("split", range(1, 7))
def test_handed_over_at_any_split(split: int) -> None:
    """Two calls, the state in between with its graph, are one."""
    problem = problem_of(DESIGNS["momentum"])
    tracked, found = differentiable(problem)
    first, state = run(sliced(tracked, 0, split), path="fused")
    second, final = run(sliced(tracked, split, 7), initial_state=state, path="fused")
    out = torch.cat((first, second), dim=1)
    (probe(out) + 0.3 * probe_state(final)).backward()
    gradients = {f"d {name}": x.grad for name, x in found.items() if x.grad is not None}
    assert_same({"out": out, **state_tensors(final), **gradients}, outcome(problem, path="reference"))


@pytest.mark.usefixtures("small")
def test_gradients_of_some_inputs_only() -> None:
    problem, results = problem_of(PLAIN), []
    for path in ("fused", "reference"):
        tracked = {**problem, "k": problem["k"].clone().requires_grad_()}
        results.append(torch.autograd.grad(probe(run(tracked, path=path)[0]), tracked["k"])[0])
    assert_close(*results)


@pytest.mark.usefixtures("small")
def test_second_derivatives_are_refused() -> None:
    tracked, found = differentiable(problem_of(PLAIN))
    out, _ = run(tracked, path="fused")
    with pytest.raises(
        RuntimeError, match=r"path='fused' has no second derivatives \(create_graph=True\); path='substituted' has"
    ):
        torch.autograd.grad(out.sum(), found["v"], create_graph=True)


@pytest.mark.usefixtures("small")
def test_steps_are_traced_once_whatever_the_length() -> None:
    design = replace(PLAIN, bias=bias.Lp(2.5))
    outcome(problem_of(design), path="fused")
    before = (online._forward_graph.cache_info().misses, online._backward_graph.cache_info().misses)
    outcome(problem_of(replace(design), tokens=9), path="fused")
    assert before == (online._forward_graph.cache_info().misses, online._backward_graph.cache_info().misses)


@dataclass(frozen=True)
class Branching(bias.Bias):
    """A user's bias whose Python depends on the numbers, so that no graph holds for all of them."""

    def loss(self, y: Tensor, v: Tensor, gates: bias.Gates) -> Tensor:
        e = y - v
        return e.square().sum(-1) if bool(e.abs().max() < 1) else e.abs().sum(-1)


def test_what_cannot_be_traced_runs_as_substituted_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "MIN_WORK", 0)
    problem = problem_of(replace(PLAIN, bias=Branching()))
    expected = outcome(problem, path="substituted")
    with pytest.warns(UserWarning, match="path 'fused' cannot run this design here, which runs as 'substituted': "):
        assert_same(outcome(problem), expected)
    with pytest.raises(ValueError, match="path='fused' cannot run this design here"):
        run(problem, path="fused")


def test_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(design: Design = PLAIN, **facts: Any) -> Any:
        return miras.engine.plan(design, **facts)

    monkeypatch.setattr(fused, "has_compiler", lambda: True)
    assert plan().path == plan(work=fused.MIN_WORK).path == "fused"
    assert plan().tile == plan(path="substituted").tile
    assert plan(work=fused.MIN_WORK - 1).path == "substituted"
    assert plan(replace(PLAIN, memory=memory.Matrix())).path == "triangular"
    assert plan(replace(PLAIN, memory=memory.Matrix(), bias=bias.Robust())).path == "fused"
    assert "settles" in plan(replace(PLAIN, learning=learning.Muon())).refusals["fused"]
    assert "link" in plan(replace(PLAIN, retention=retention.LqRms())).refusals["fused"]
    for reason, facts in {"packed": {"packed": True}, "per channel": {"per_channel": True}}.items():
        assert reason in plan(**facts).refusals["fused"]
        assert plan(**facts).path == "substituted"


@pytest.mark.slow
# Raised by torch, where its own compiler imports a module.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.skipif(not fused.has_compiler(), reason="torch.compile needs a C++ compiler on a CPU; install g++")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)], ids=str)
def test_compiled(dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "MIN_WORK", 1)
    problem = problem_of(replace(PLAIN, bias=bias.Huber("norm")), tokens=38, width=8, dtype=dtype)
    problem["lr"] = 0.3 * problem["lr"]
    assert miras.engine.plan(problem["design"], work=1).path == "fused"
    assert_same(outcome(problem), outcome(problem, path="substituted"), tolerance)
