"""What every path that scans generated programs is tested with: see `triton_cases.py` and `test_native.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from miras import bias, learning, memory, retention
from miras.design import Design
from miras.engine import MemoryState
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


def home(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.cpu() for name, x in found.items()}


CASES = [pytest.param(*case, id=f"{group}: {name}") for group, cases in GROUPS.items() for name, case in cases.items()]


@dataclass(frozen=True)
class Sorted(bias.Bias):
    """A user's bias with an operation that no program has."""

    def loss(self, y: Tensor, v: Tensor, gates: bias.Gates) -> Tensor:
        return cast(Tensor, (y - v).sort(-1).values.square()).sum(-1)


class Scans:
    """A path against the reference."""

    path: str
    device = "cpu"
    dtype, tolerance = torch.float64, 1e-9

    def problem_of(self, design: Design, **sizes: Any) -> Problem:
        defaults = {"tokens": 48, "width": 16, "batch": 1, "heads": 2, "slow": True, "dtype": self.dtype}
        return random_problem(design, **{**defaults, **sizes})

    def moved(self, problem: Problem) -> Problem:
        return with_leaves(problem, {name: x.to(self.device) for name, x in leaves(problem).items()})

    @pytest.mark.parametrize(("design", "sizes"), CASES)
    def test_equals_reference(self, design: Design, sizes: dict[str, Any]) -> None:
        problem = self.problem_of(design, **sizes)
        found = home(outcome(self.moved(problem), path=self.path))
        assert_same(found, outcome(problem, path="reference"), self.tolerance)

    def handed(self, problem: Problem, state: MemoryState, path: str) -> dict[str, Tensor]:
        """Outputs, state and gradients, those in each tensor of an initial state too."""
        tracked, found = differentiable(problem)
        there = state.to(problem["k"].device)
        tensors = there.map(lambda x: x.clone().requires_grad_() if x.is_floating_point() else x)
        out, final = run(tracked, initial_state=tensors, path=path)
        (probe(out).cpu() + 0.3 * sum(probe(x).cpu() for x in final.tensors() if x.is_floating_point())).backward()
        found |= {name: x for name, x in state_tensors(tensors).items() if x.requires_grad}
        gradients = {f"d {name}": torch.zeros_like(x) if x.grad is None else x.grad for name, x in found.items()}
        return home({"out": out, **state_tensors(final), **gradients})

    @pytest.mark.parametrize("begun", [16, 10], ids=["at a window's start", "inside a window"])
    @pytest.mark.parametrize("link", [retention.L2(), retention.KL(5.0)], ids=lambda x: x.kind)
    def test_sequences_from_a_state(self, begun: int, link: retention.Retention) -> None:
        design = replace(PLAIN, retention=link, link_at="refresh", learning=learning.Momentum())
        problem = self.problem_of(design, tokens=36)
        _, state = run(sliced(problem, 0, begun))
        rest = sliced(problem, begun, 36)
        expected = self.handed(rest, state.detach(), "reference")
        assert_same(self.handed(self.moved(rest), state.detach(), self.path), expected, self.tolerance)

    @pytest.mark.parametrize("refresh", [1, 4])
    def test_sequences_decoded_token_by_token(self, refresh: int) -> None:
        problem = self.problem_of(replace(PLAIN, refresh=refresh), tokens=7)
        expected, _ = run(problem, path="reference")
        there, state, outputs = self.moved(problem), None, []
        with torch.no_grad():
            for t in range(7):
                out, state = run(sliced(there, t, t + 1), initial_state=state, path=self.path)
                outputs.append(out.cpu())
        assert_close(torch.cat(outputs, dim=1), expected, "out", self.tolerance)

    def test_sequences_at_either_gradient_point(self) -> None:
        """Programs of designs that differ in nothing else, one after the other."""
        for point in ("previous", "decayed"):
            design = replace(online(PLAIN), memory=memory.Matrix(), gradient_at=point)
            problem = self.problem_of(design, tokens=3, width=4)
            found = home(outcome(self.moved(problem), path=self.path))
            assert_same(found, outcome(problem, path="reference"), self.tolerance)

    def test_sequences_packed(self) -> None:
        problem = self.problem_of(PLAIN, tokens=21)
        borders = torch.tensor([0, 16, 21])
        expected = run(problem, path="reference", cu_seqlens=borders)
        out, state = run(self.moved(problem), path=self.path, cu_seqlens=borders.to(self.device))
        assert_close(out.cpu(), expected[0], "out", self.tolerance)
        assert_same(home(state_tensors(state)), state_tensors(expected[1]), self.tolerance)

    def test_sequences_of_some_gradients_only(self) -> None:
        problem, results = self.problem_of(PLAIN, tokens=16), []
        for inputs, path in ((self.moved(problem), self.path), (problem, "reference")):
            tracked = {**inputs, "k": inputs["k"].clone().requires_grad_()}
            out, _ = run(tracked, path=path)
            results.append(torch.autograd.grad(probe(out), tracked["k"])[0].cpu())
        assert_close(*results, "d k", self.tolerance)

    def test_sequences_have_no_second_derivatives(self) -> None:
        tracked, found = differentiable(self.moved(self.problem_of(PLAIN, tokens=16)))
        out, _ = run(tracked, path=self.path)
        with pytest.raises(RuntimeError, match=f"path='{self.path}' has no second derivatives"):
            torch.autograd.grad(probe(out), found["v"], create_graph=True)
