"""Random problems for a design, runs of them, and comparisons in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import miras
from miras.design import Design
from miras.engine.problem import State

TOLERANCE = 1e-9

Problem = dict[str, Any]
"""Keyword arguments of `miras.memorize`, `design` among them."""


def random_problem(
    design: Design,
    *,
    batch: int = 2,
    tokens: int = 13,
    heads: int = 2,
    width: int = 4,
    value_width: int | None = None,
    rate: str = "head",
    decay: str | None = "head",
    slow: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Problem:
    """A problem tame enough that its recurrence is not chaotic: unit keys, rates below 0.4 a token, decays above 0.85.

    `rate` and `decay` are "head" or "channel" (`decay` also None); `slow` gives the memory's norm parameters.
    """
    g = torch.Generator().manual_seed(seed)
    steps = tokens * design.learning.micro_steps

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * torch.rand(*shape, generator=g, dtype=torch.float64)).to(dtype)

    value_width = width if value_width is None else value_width
    q = torch.nn.functional.normalize(normal(batch, tokens, heads, width), dim=-1)
    k = torch.nn.functional.normalize(normal(batch, steps, heads, width), dim=-1)
    v = normal(batch, steps, heads, value_width)
    if not design.parametric:
        persistent = getattr(design.learning, "persistent", 0)
        shared = {"keys": normal(heads, persistent, width), "values": normal(heads, persistent, value_width)}
        return {"design": design, "q": q, "k": k, "v": v} | ({"weights": shared} if persistent else {})
    assert design.memory is not None
    # Logits near 0 give nearly equal weights, whose products a norm would magnify beyond what float64 can compare.
    assert design.retention is not None
    spread = 1.5 if design.retention.logits else 0.5
    weights = {
        name: spread * normal(heads, shape.d_in, shape.d_out)
        for name, shape in design.memory.weights(width, value_width).items()
    }
    if slow:
        weights |= {
            name: neutral + 0.2 * normal(heads, value_width) for name, neutral in design.memory.slow(value_width).items()
        }
    channels = {"head": (), "channel": (width,)}
    log_decay = None if decay is None else -uniform(0.01, 0.15, batch, tokens, heads, *channels[decay])
    ranges = {"delta": (0.3, 4.0), "Delta": (0.05, 0.5), "mu": (0.1, 0.8), "ridge": (0.0, 1.5), "token": (0.2, 1.0)}
    return {
        "design": design,
        "q": q,
        "k": k,
        "v": v,
        "weights": weights,
        "lr": uniform(0.05, 0.4, batch, steps, heads, *channels[rate]) / design.learning.micro_steps,
        "log_decay": log_decay,
        "gates": {gate.name: uniform(*ranges[gate.name], batch, steps, heads) for gate in design.gates},
    }


SEQUENCES = ("q", "k", "v", "lr", "log_decay")


def run(problem: Problem, **options: Any) -> tuple[Tensor, Any]:
    """Outputs and final state."""
    return miras.memorize(**problem, output_final_state=True, **options)


def sliced(problem: Problem, start: int, stop: int, rows: slice = slice(None)) -> Problem:
    """Tokens start to stop of some rows."""
    n = problem["design"].learning.micro_steps
    cut = dict(problem)
    for name in SEQUENCES:
        if problem.get(name) is not None:
            factor = 1 if name in ("q", "log_decay") else n
            cut[name] = problem[name][rows, start * factor : stop * factor]
    if "gates" in problem:
        cut["gates"] = {name: x[rows, start * n : stop * n] for name, x in problem["gates"].items()}
    return cut


def packed(problems: list[Problem]) -> tuple[Problem, Tensor]:
    """Problems of one row each laid end to end in one row, and their borders."""
    joined = dict(problems[0])
    for name in SEQUENCES:
        if joined.get(name) is not None:
            joined[name] = torch.cat([p[name] for p in problems], dim=1)
    if "gates" in joined:
        joined["gates"] = {name: torch.cat([p["gates"][name] for p in problems], dim=1) for name in joined["gates"]}
    lengths = torch.tensor([0, *[p["q"].shape[1] for p in problems]])
    return joined, lengths.cumsum(0)


def leaves(problem: Problem) -> dict[str, Tensor]:
    """Every input tensor by name."""
    found = {name: problem[name] for name in SEQUENCES if problem.get(name) is not None}
    for group in ("weights", "gates"):
        found |= {f"{group}.{name}": x for name, x in problem.get(group, {}).items()}
    return found


def with_leaves(problem: Problem, tensors: Mapping[str, Tensor]) -> Problem:
    """The problem with some of its input tensors in the place of others, by name."""
    changed = dict(problem)
    for group in ("weights", "gates"):
        if group in problem:
            changed[group] = {name: tensors.get(f"{group}.{name}", x) for name, x in problem[group].items()}
    return changed | {name: tensors[name] for name in SEQUENCES if name in tensors}


def differentiable(problem: Problem) -> tuple[Problem, dict[str, Tensor]]:
    """A copy whose inputs are leaves of the graph, and these leaves."""
    found = {name: x.detach().clone().requires_grad_() for name, x in leaves(problem).items()}
    return with_leaves(problem, found), found


def probe(x: Tensor) -> Tensor:
    """A fixed, generic linear functional of a tensor."""
    weights = torch.sin(torch.arange(1, x.numel() + 1, dtype=torch.float64, device=x.device)).reshape(x.shape)
    return (x * weights).sum()


def probe_state(state: State) -> Tensor:
    """A fixed linear functional of a state."""
    return sum((probe(x) for x in state.tensors() if x.is_floating_point()), start=torch.zeros((), dtype=torch.float64))


def outcome(problem: Problem, **options: Any) -> dict[str, Tensor]:
    """Outputs, final state and the gradients of both in every input, by name."""
    tracked, found = differentiable(problem)
    out, state = run(tracked, **options)
    (probe(out) + 0.3 * probe_state(state)).backward()
    gradients = {f"d {name}": torch.zeros_like(x) if x.grad is None else x.grad for name, x in found.items()}
    return {"out": out.detach(), **state_tensors(state.detach()), **gradients}


def state_tensors(state: State) -> dict[str, Tensor]:
    """The tensors of a state by name."""
    named: dict[str, Tensor] = {}
    for item in dataclasses.fields(state):
        value = getattr(state, item.name)
        if isinstance(value, dict):
            named |= {f"{item.name}.{name}": x for name, x in value.items()}
        else:
            named[item.name] = value
    return named


def assert_close(actual: Tensor, expected: Tensor, name: str = "", tolerance: float = TOLERANCE) -> None:
    """Equal up to `tolerance` times the larger of 1 and the largest expected number."""
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)} is not {tuple(expected.shape)}"
    assert torch.isfinite(expected).all(), f"{name}: the expected numbers are not finite"
    if expected.numel() == 0:
        return
    size = max(1.0, float(expected.abs().max()))
    worst = float((actual.double() - expected.double()).abs().max())
    assert worst <= tolerance * size, f"{name}: off by {worst:.3g}, where numbers are up to {size:.3g}"


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = TOLERANCE) -> None:
    """Equal by name."""
    assert set(actual) == set(expected)
    for name, x in expected.items():
        assert_close(actual[name], x, name, tolerance)
