"""The fused path: the reference's numbers, gradients and states over many windows, and where it is taken."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import miras
from miras import bias, learning, memory, retention
from miras.design import Design
from miras.engine import MemoryState, dispatch
from miras.kernels import fused, native
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
PLAIN = Design(MLP, bias.L2(), retention.L2(), learning.GradientDescent(), refresh=4)

DESIGNS = {
    "descent": PLAIN,
    "momentum from the origin": replace(PLAIN, learning=learning.Momentum(), anchor="origin", bias=bias.Huber("switch")),
    "one layer": replace(PLAIN, memory=memory.MLP(1, norm="rms"), bias=bias.Lp(3.0)),
    "three layers": replace(PLAIN, memory=memory.MLP(3, 1.0, "silu"), bias=bias.Robust()),
    "a user's bias": replace(PLAIN, bias=LogCosh()),
    "scale link": replace(PLAIN, retention=retention.LqMirror(4.0), link_at="refresh"),
    "scale link at every token": replace(PLAIN, retention=retention.LqRms(4.0, 0.3), bias=bias.Lp(3.0)),
    "printed Lq at every token": replace(
        PLAIN, retention=retention.Lq(2.5), learning=learning.Momentum(), anchor="origin", refresh=3
    ),
    "pointwise link": replace(PLAIN, retention=retention.KL(5.0), link_at="refresh", learning=learning.Momentum()),
    "settling": replace(PLAIN, learning=learning.Muon(2)),
    "windows of two blocks": replace(PLAIN, refresh=6),
}


@pytest.fixture(autouse=True)
def not_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or that path would be taken first."""
    monkeypatch.setattr(native, "compiler", lambda: ())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one window, blocks of at most four gradient steps."""
    monkeypatch.setattr(fused, "STEP_LENGTH", 1)
    monkeypatch.setattr(miras.engine.dispatch, "TILES", {"fused": 4, "frozen": 4})


def problem_of(design: Design, **sizes: Any) -> Problem:
    return random_problem(design, **{"tokens": 15, "slow": True, **sizes})


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", DESIGNS)
def test_equals_reference(name: str) -> None:
    problem = problem_of(DESIGNS[name])
    assert_same(outcome(problem, path="fused"), outcome(problem, path="reference"))


@pytest.mark.usefixtures("small")
def test_rates_and_decays_per_channel() -> None:
    """Products are turned here of which views are taken afterwards."""
    bare = memory.MLP(2, 1.5, "tanh", residual=False, norm=None)
    problem = problem_of(replace(PLAIN, memory=bare, retention=retention.LqRms(3.5, 0.7)), rate="channel", decay="channel")
    assert_same(outcome(problem, path="fused"), outcome(problem, path="reference"))


def test_several_windows_a_step() -> None:
    problem = problem_of(PLAIN, tokens=35)
    assert_same(outcome(problem, path="fused"), outcome(problem, path="reference"))


def handed(problem: Problem, state: MemoryState, path: str) -> dict[str, Tensor]:
    """Outputs, state and gradients, those in each tensor of an initial state too."""
    tracked, found = differentiable(problem)
    leaves = state.map(lambda x: x.clone().requires_grad_() if x.is_floating_point() else x)
    out, final = run(tracked, initial_state=leaves, path=path)
    (probe(out) + 0.3 * probe_state(final)).backward()
    found |= {name: x for name, x in state_tensors(leaves).items() if x.requires_grad}
    gradients = {f"d {name}": torch.zeros_like(x) if x.grad is None else x.grad for name, x in found.items()}
    return {"out": out, **state_tensors(final), **gradients}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("begun", [4, 6], ids=["at a window's start", "inside a window"])
@pytest.mark.parametrize("name", ["momentum from the origin", "pointwise link", "scale link at every token"])
def test_from_a_state(name: str, begun: int) -> None:
    problem = problem_of(DESIGNS[name], tokens=24)
    _, state = run(sliced(problem, 0, begun))
    rest = sliced(problem, begun, 24)
    assert_same(handed(rest, state.detach(), "fused"), handed(rest, state.detach(), "reference"))


@pytest.mark.usefixtures("small")
def test_rows_in_different_phases() -> None:
    problem = problem_of(PLAIN, batch=3, tokens=13)
    states = [run(sliced(problem, 0, begun))[1] for begun in (4, 5, 8)]
    state = states[0]
    for row, other in enumerate(states):
        state = state.put(torch.tensor([row]), other.index_select(torch.tensor([row])))
    assert_same(handed(problem, state.detach(), "fused"), handed(problem, state.detach(), "reference"))


@pytest.mark.usefixtures("small")
def test_gradients_of_some_inputs_only() -> None:
    problem, results = problem_of(PLAIN), []
    for path in ("fused", "reference"):
        tracked = {**problem, "k": problem["k"].clone().requires_grad_()}
        out, _ = run(tracked, path=path)
        results.append(torch.autograd.grad(probe(out), tracked["k"])[0])
    assert_close(*results)


@pytest.mark.usefixtures("small")
def test_graphs_are_traced_once_a_shape() -> None:
    problem = problem_of(replace(PLAIN, bias=bias.Lp(2.5)))
    outcome(problem, path="fused")
    before = (fused._forward_graph.cache_info().misses, fused._backward_graph.cache_info().misses)
    outcome({**problem, "design": replace(problem["design"])}, path="fused")
    assert before == (fused._forward_graph.cache_info().misses, fused._backward_graph.cache_info().misses)


@dataclass(frozen=True)
class Branching(bias.Bias):
    """A user's bias whose Python depends on the numbers, so that no graph holds for all of them."""

    def loss(self, y: Tensor, v: Tensor, gates: bias.Gates) -> Tensor:
        e = y - v
        return e.square().sum(-1) if bool(e.abs().max() < 1) else e.abs().sum(-1)


def test_what_cannot_be_traced_runs_as_frozen_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "MIN_WORK", 0)
    problem = problem_of(replace(PLAIN, bias=Branching()), tokens=40)
    expected = outcome(problem, path="frozen")
    with pytest.warns(UserWarning, match="path 'fused' cannot run this design here, which runs as 'frozen': "):
        assert_same(outcome(problem), expected)
    with pytest.raises(ValueError, match="path='fused' cannot run this design here"):
        run(problem, path="fused")


@pytest.mark.usefixtures("small")
def test_second_derivatives_are_refused() -> None:
    tracked, found = differentiable(problem_of(PLAIN))
    out, _ = run(tracked, path="fused")
    with pytest.raises(
        RuntimeError, match=r"path='fused' has no second derivatives \(create_graph=True\); path='frozen' has"
    ):
        torch.autograd.grad(out.sum(), found["v"], create_graph=True)


@dataclass(frozen=True)
class Listed(bias.L2):
    """A user's bias with a field that has no hash."""

    scales: Any = (1.0,)


def test_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(design: Design = PLAIN, **facts: Any) -> Any:
        return miras.engine.plan(design, **facts)

    monkeypatch.setattr(fused, "has_compiler", lambda: True)
    assert plan().path == plan(work=fused.MIN_WORK).path == "fused"
    assert "not worth compiling" in plan(work=fused.MIN_WORK - 1).refusals["fused"]
    with fused.compiled_from(7):
        assert plan(work=7).path == "fused"
        assert "(7.0e+00 are)" in plan(work=6).refusals["fused"]
    assert "not worth compiling" in plan(work=7).refusals["fused"]
    assert "packed" in plan(packed=True).refusals["fused"]
    assert "per channel" in plan(per_channel=True).refusals["fused"]
    assert "CPUs only" in plan(device=torch.device("cuda")).refusals["fused"]
    assert "is linear" in plan(replace(PLAIN, memory=memory.Matrix())).refusals["fused"]
    assert "every token" in plan(replace(PLAIN, retention=retention.KL())).refusals["fused"]
    assert "more than 256 steps" in plan(replace(PLAIN, refresh=512)).refusals["fused"]
    assert "cannot be hashed" in plan(replace(PLAIN, bias=Listed([1.0]))).refusals["fused"]
    monkeypatch.setattr(fused, "has_compiler", lambda: False)
    assert "no C++ compiler" in plan().refusals["fused"]
    assert plan(path="fused").path == "fused"


def test_where_it_compiles_when_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def windows(*_: Any, compiled: bool, **__: Any) -> None:
        raise Asked(compiled)

    monkeypatch.setattr(dispatch, "run_fused", windows)
    monkeypatch.setattr(fused, "has_compiler", lambda: True)
    # A GPU refuses the path by itself; by name it compiles there as here.
    monkeypatch.setattr(dispatch, "unprofitable", lambda *_, **__: "it has been measured on CPUs only, not on cuda")
    problem = random_problem(PLAIN, tokens=32)
    for least, compiled in ((0, "True"), (2**40, "False")):
        with fused.compiled_from(least), pytest.raises(Asked, match=compiled):
            run(problem, path="fused")
    monkeypatch.setattr(fused, "has_compiler", lambda: False)
    with fused.compiled_from(0), pytest.raises(Asked, match="False"):
        run(problem, path="fused")


@pytest.mark.slow
# Raised by torch, where its own compiler imports a module.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.skipif(not fused.has_compiler(), reason="torch.compile needs a C++ compiler on a CPU; install g++")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("link", [retention.L2(), retention.LqRms(4.0, 0.3)], ids=lambda x: x.kind)
def test_compiled(link: retention.Retention, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "MIN_WORK", 1)
    design = replace(PLAIN, refresh=16, learning=learning.Momentum(), retention=link)
    problem = problem_of(design, tokens=70, width=8, dtype=dtype)
    assert miras.engine.plan(problem["design"], work=1).path == "fused"
    assert_same(outcome(problem), outcome(problem, path="frozen"), tolerance)
