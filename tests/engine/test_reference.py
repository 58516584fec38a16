"""The reference engine against recurrences written out by hand, and its outer gradients against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from miras import bias, learning, memory, retention
from miras.design import Design
from tests import recurrences as r
from tests.problems import Problem, assert_close, differentiable, random_problem, run, with_leaves
from tests.table import TABLE, LogCosh, Row

MEMORIES: dict[type[memory.Memory], Callable[[Any], Any]] = {
    memory.Vector: lambda m: r.vector,
    memory.Matrix: lambda m: r.matrix,
    memory.MLP: lambda m: r.mlp(m.depth, m.activation, m.residual, m.norm),
    memory.GatedMLP: lambda m: r.gated_mlp,
}

IMPLICIT = {bias.L2: r.longhorn, bias.Huber: r.implicit_huber, bias.Robust: r.implicit_robust}

BIASES: dict[type[bias.Bias], Callable[[Any], Any]] = {
    bias.Dot: lambda b: r.dot,
    bias.L2: lambda b: r.square,
    bias.RidgeDot: lambda b: r.ridge,
    bias.Lp: lambda b: r.power(b.p),
    bias.Huber: lambda b: r.huber(b.form),
    bias.Robust: lambda b: r.robust,
    bias.Envelope: lambda b: IMPLICIT[type(b.bias)],
    LogCosh: lambda b: r.log_cosh,
}

RETENTIONS: dict[type[retention.Retention], Callable[[Any], r.Link]] = {
    retention.L2: lambda x: r.identity(),
    retention.Lq: lambda x: r.printed(x.q),
    retention.LqRms: lambda x: r.rms(x.q, x.scale),
    retention.LqMirror: lambda x: r.mirror(x.q),
    retention.KL: lambda x: r.softmax(x.mass),
    retention.SignedKL: lambda x: r.signed(x.mass),
    retention.ElasticNet: lambda x: r.elastic(x.threshold),
    retention.ProximalElasticNet: lambda x: r.proximal(x.threshold),
    retention.Bregman: lambda x: r.sigmoid(),
    retention.FDivergence: lambda x: r.chi2() if x.name == "chi2" else r.hellinger(x.mass),
}

LEARNINGS: dict[type[learning.Learning], Callable[[Any], r.Learner]] = {
    learning.GradientDescent: lambda x: r.descent(),
    learning.Momentum: lambda x: r.momentum(),
    learning.MultiStep: lambda x: r.descent(x.n),
    learning.Omega: lambda x: r.omega(x.window),
    learning.Muon: lambda x: r.muon(x.steps),
    learning.OmegaMuon: lambda x: r.omega_muon(x.steps, x.window),
    learning.Averaged: lambda x: r.averaged(),
}

AXES = {"W": 0, "w": 1, "up": 0, "gate": 0, "down": 1, "up_bias": 1, "down_bias": 1}


def by_hand(problem: Problem, row: int, head: int) -> tuple[r.Array, r.Weights]:
    """The hand-written recurrence on one head of one row of a problem."""
    d: Design = problem["design"]
    shapes = d.memory.weights(problem["k"].shape[-1], problem["v"].shape[-1])
    sequence = {name: problem[name][row, :, head].numpy() for name in ("q", "k", "v", "lr")}
    log_decay = problem["log_decay"]
    sequence["log_decay"] = np.zeros(len(sequence["q"])) if log_decay is None else log_decay[row, :, head].numpy()
    sequence["gates"] = {name: x[row, :, head].numpy() for name, x in problem["gates"].items()}
    return r.recurrence(
        sequence,
        {name: problem["weights"][name][head].numpy() for name in shapes},
        memory=MEMORIES[type(d.memory)](d.memory),
        loss=BIASES[type(d.bias)](d.bias),
        link=RETENTIONS[type(d.retention)](d.retention),
        learner=LEARNINGS[type(d.learning)](d.learning),
        slow={name: x[head].numpy() for name, x in problem["weights"].items() if name not in shapes},
        refresh=d.refresh,
        tangent=d.link_at == "refresh",
        decayed=d.gradient_at == "decayed",
        anchored=d.anchor == "initial",
        axes={name: AXES.get(name, 0) for name in shapes},
    )


def check_by_hand(problem: Problem) -> None:
    out, state = run(problem, path="reference")
    for row, head in ((0, 0), (1, 1)):
        expected, weights = by_hand(problem, row, head)
        assert_close(out[row, :, head], torch.from_numpy(expected), "out")
        for name, x in weights.items():
            a = problem["weights"][name][head] if problem["design"].anchor == "initial" else 0
            assert_close(a + state.slots[name][row, head, 0], torch.from_numpy(x), name)


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_reference_is_the_recurrence_written_by_hand(row: Row) -> None:
    check_by_hand(row.problem())


def deep(loss: bias.Bias, **changes: Any) -> Design:
    choices = {
        "memory": memory.MLP(depth=2, expansion=2.0),
        "bias": loss,
        "retention": retention.L2(),
        "learning": learning.GradientDescent(),
        "refresh": 4,
    }
    return Design(**{**choices, **changes})


SELECTED = {
    "deep L2": deep(bias.L2()),
    "deep L2 online, to the origin": deep(bias.L2(), refresh=1, anchor="origin"),
    "deep L2 online, decayed": deep(bias.L2(), refresh=1, gradient_at="decayed"),
    "deep Huber": deep(bias.Huber("switch"), refresh=1),
    "deep Lp": deep(bias.Lp(3.0), refresh=1),
    "Titans": deep(bias.L2(), learning=learning.Momentum()),
    "KL, tangent": deep(bias.L2(), retention=retention.KL(), link_at="refresh"),
    "signed KL, tangent": deep(bias.L2(), retention=retention.SignedKL(), link_at="refresh"),
    "mirror, tangent": deep(bias.Lp(3.0), retention=retention.LqMirror(4.0), link_at="refresh"),
    "printed Lq, tangent": deep(bias.Lp(3.0), retention=retention.Lq(4.0), link_at="refresh", anchor="origin"),
    "proximal, momentum": deep(bias.L2(), retention=retention.ProximalElasticNet(0.05), learning=learning.Momentum()),
    "three deep": deep(bias.L2(), memory=memory.MLP(3, 1.0, "relu", norm="rms"), learning=learning.MultiStep(3)),
    "DeltaProduct": deep(bias.L2(), memory=memory.Matrix(), learning=learning.MultiStep(2), refresh=1),
    "gated, Muon": deep(bias.Robust(), memory=memory.GatedMLP(2.0), learning=learning.Muon(5)),
}


@pytest.mark.parametrize("name", SELECTED)
@pytest.mark.parametrize("tokens", [3, 4, 11])
def test_selected_designs_by_hand(name: str, tokens: int) -> None:
    check_by_hand(random_problem(SELECTED[name], tokens=tokens, slow=True, seed=1))


CHECKED = {
    "momentum": deep(bias.L2(), refresh=2, learning=learning.Momentum()),
    "deep online Lp": deep(bias.Lp(3.0), refresh=1, memory=memory.MLP(2, 1.0)),
    "gated delta rule": deep(bias.L2(), refresh=1, memory=memory.Matrix(), gradient_at="decayed"),
    "online Huber": deep(bias.Huber("norm"), refresh=1, memory=memory.Matrix()),
    "KL": deep(bias.L2(), refresh=2, retention=retention.KL(), link_at="refresh", memory=memory.GatedMLP(1.0)),
    "Jensen-Shannon": deep(bias.Dot(), refresh=1, retention=retention.FDivergence("jensen_shannon"), memory=memory.Matrix()),
    "Muon": deep(bias.L2(), refresh=2, retention=retention.LqMirror(4.0), learning=learning.Muon(2)),
    "implicit": deep(bias.Envelope(bias.Robust()), refresh=2, memory=memory.Matrix(), learning=learning.MultiStep(2)),
}


@pytest.mark.parametrize("path", ["reference", None])
@pytest.mark.parametrize("name", CHECKED)
def test_outer_gradients_are_finite_differences(name: str, path: str | None) -> None:
    problem = random_problem(CHECKED[name], batch=1, tokens=3, heads=1, width=2, slow=True, seed=3)
    tracked, found = differentiable(problem)

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, state = run(with_leaves(tracked, dict(zip(found, tensors, strict=True))), path=path)
        return (out, *state.slots.values())

    assert torch.autograd.gradcheck(function, tuple(found.values()), eps=1e-6, atol=1e-6, rtol=1e-5)
