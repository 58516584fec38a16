"""What holds for every legal design (docs/equations.md), over the table and softmax attention."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
import torch

from miras import bias, learning, memory, models, retention
from miras.choice import Choice
from miras.design import Design
from miras.engine import MemoryState
from miras.layer import MemoryLayer
from tests.problems import (
    Problem,
    assert_close,
    assert_same,
    differentiable,
    leaves,
    outcome,
    packed,
    probe,
    probe_state,
    random_problem,
    run,
    sliced,
    state_tensors,
    with_leaves,
)
from tests.table import TABLE, Row
from tests.test_choice import public_classes

ATTENTION = [
    Row(models.transformer(learning=learning.NonParametric(window, persistent)), "head", None, False)
    for window, persistent in ((None, 0), (1, 0), (4, 0), (None, 2), (4, 2))
]
ROWS = [*TABLE, *ATTENTION]

SHORT = {1: 5, 5: 8, 16: 18}
"""Lengths with a window end inside, ending in the middle of a window."""


def problem_of(row: Row, **sizes: Any) -> Problem:
    return row.problem(**{"tokens": SHORT.get(row.design.refresh, 7), **sizes})


def assert_same_state(actual: Any, expected: Any) -> None:
    if isinstance(expected, MemoryState):
        assert_same(state_tensors(actual), state_tensors(expected))


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_causality_to_the_bit(row: Row) -> None:
    """Changing everything at token t of one row changes its outputs from t on, and nothing else."""
    problem = problem_of(row)
    out, _ = run(problem)
    num_tokens = out.shape[1]
    for t in (num_tokens // 2, num_tokens - 1):
        other = problem_of(row, seed=7)
        changed = {}
        for name, x in leaves(problem).items():
            changed[name] = x.clone()
            if not name.startswith("weights."):
                start = t * (x.shape[1] // num_tokens)
                changed[name][0, start:] = leaves(other)[name][0, start:]
        after, _ = run(with_leaves(problem, changed))
        assert torch.equal(after[:, :t], out[:, :t])
        assert torch.equal(after[1], out[1])
        assert float((after[0, t:] - out[0, t:]).abs().amax((1, 2)).min()) > 1e-9


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_rows_and_heads_are_independent(row: Row) -> None:
    problem = row.problem(batch=3, tokens=7, seed=2)
    out, state = run(problem)
    for index in range(3):
        alone, alone_state = run(sliced(problem, 0, out.shape[1], slice(index, index + 1)))
        assert_close(alone[0], out[index], "row", tolerance=1e-11)
        if isinstance(state, MemoryState):
            assert_same_state(alone_state, state.index_select(torch.tensor([index])))
    heads = {name: x[:1] if name.startswith("weights.") else x[:, :, :1] for name, x in leaves(problem).items()}
    assert_close(run(with_leaves(problem, heads))[0], out[:, :, :1], "head", tolerance=1e-11)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_split_equals_one_call(row: Row) -> None:
    """At every point of a short sequence; around the window's end and in its middle where the window is long."""
    problem = problem_of(row, seed=3)
    out, state = run(problem)
    num_tokens = out.shape[1]
    for split in range(1, num_tokens) if num_tokens < 10 else (1, 6, 15, 16, 17):
        first, middle = run(sliced(problem, 0, split))
        second, end = run(sliced(problem, split, num_tokens), initial_state=middle)
        assert_close(torch.cat((first, second), 1), out, f"split at {split}")
        assert_same_state(end, state)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_token_by_token_equals_one_call(row: Row) -> None:
    """Decoding, by the default path and by the reference."""
    problem = problem_of(row, seed=4)
    out, state = run(problem)
    for path in (None, "reference") if row.design.parametric else (None,):
        pieces, now = [], None
        for t in range(out.shape[1]):
            piece, now = run(sliced(problem, t, t + 1), initial_state=now, path=path)
            pieces.append(piece)
        assert_close(torch.cat(pieces, 1), out, str(path))
        assert_same_state(now, state)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_gradients_through_a_split(row: Row) -> None:
    """The state hands the graph on."""
    problem = problem_of(row, seed=5)
    expected = outcome(problem) if row.design.parametric else None
    tracked, found = differentiable(problem)
    num_tokens = problem["q"].shape[1]
    split = num_tokens // 2
    first, middle = run(sliced(tracked, 0, split))
    second, end = run(sliced(tracked, split, num_tokens), initial_state=middle)
    (probe(torch.cat((first, second), 1)) + 0.3 * probe_state(end)).backward()
    assert all(x.grad is not None for x in found.values())
    if expected is not None:
        assert_same(
            {f"d {name}": x.grad for name, x in found.items()},
            {name: x for name, x in expected.items() if name.startswith("d ")},
        )


LENGTHS = (1, 6, 3, 6)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_packed_equals_separate(row: Row) -> None:
    """Ragged sequences end to end, begun afresh and gone on with at different phases of the window."""
    first = [row.problem(batch=1, tokens=n, seed=i) for i, n in enumerate(LENGTHS)]
    second = [row.problem(batch=1, tokens=n, seed=10 + i) for i, n in enumerate(reversed(LENGTHS))]
    shared = first[0].get("weights")
    for p in (*first, *second):
        p.update({"weights": shared} if shared is not None else {})
    separate, states = zip(*[run(p) for p in first], strict=True)
    later, finals = zip(*[run(p, initial_state=state) for p, state in zip(second, states, strict=True)], strict=True)
    joined, bounds = packed(first)
    out, state = run(joined, cu_seqlens=bounds)
    assert_close(out, torch.cat(separate, 1), "packed")
    joined, bounds = packed(second)
    out, final = run(joined, cu_seqlens=bounds.int(), initial_state=state)
    assert_close(out, torch.cat(later, 1), "packed, gone on")
    for index in range(len(LENGTHS)):
        rows = torch.tensor([index])
        if isinstance(state, MemoryState):
            assert_same_state(state.index_select(rows), states[index])
            assert_same_state(final.index_select(rows), finals[index])
        else:
            assert final.length[index] == finals[index].length[0]


@pytest.mark.parametrize("row", TABLE[::3], ids=str)
def test_gradients_of_packed_equal_separate(row: Row) -> None:
    parts = [row.problem(batch=1, tokens=n, seed=i) for i, n in enumerate((3, 6, 1))]
    for p in parts:
        p["weights"] = parts[0]["weights"]
    joined, bounds = packed(parts)
    tracked, found = differentiable(joined)
    probe(run(tracked, cu_seqlens=bounds)[0]).backward()
    again, expected = differentiable(joined)
    pieces = [
        run(sliced(again, start, stop))[0] for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    ]
    probe(torch.cat(pieces, 1)).backward()
    assert_same({n: x.grad for n, x in found.items()}, {n: x.grad for n, x in expected.items()})


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_rows_in_different_phases(row: Row) -> None:
    """A batch whose rows stand at different places of their windows, as after prompts of different lengths."""
    prompts = [row.problem(batch=1, tokens=n, seed=i) for i, n in enumerate((2, 5, 3))]
    going_on = row.problem(batch=3, tokens=6, seed=20)
    for p in (*prompts, going_on):
        p.update({"weights": prompts[0]["weights"]} if "weights" in p else {})
    joined, bounds = packed(prompts)
    _, state = run(joined, cu_seqlens=bounds)
    out, end = run(going_on, initial_state=state)
    for index, prompt in enumerate(prompts):
        _, middle = run(prompt)
        alone, final = run(sliced(going_on, 0, 6, slice(index, index + 1)), initial_state=middle)
        assert_close(alone[0], out[index])
        if isinstance(end, MemoryState):
            assert_same_state(end.index_select(torch.tensor([index])), final)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_no_dead_inputs(row: Row) -> None:
    """Every input has a gradient, q at every token, and v too (but where Huber clips an error)."""
    d = row.design
    if d.parametric:
        found = outcome(row.problem(tokens=8, seed=6))
    else:
        tracked, tensors = differentiable(row.problem(tokens=8))
        probe(run(tracked)[0]).backward()
        found = {f"d {name}": x.grad for name, x in tensors.items() if name == "v" or d.learning.window != 1}
    gradients = {name: x for name, x in found.items() if name.startswith("d ")}
    for name, x in gradients.items():
        assert torch.isfinite(x).all(), name
        assert float(x.abs().max()) > 1e-9, f"{name} is dead"
    if d.parametric:
        assert float(gradients["d q"].abs().amax((2, 3)).min()) > 1e-9
    if not isinstance(d.bias, bias.Huber):
        assert float(gradients["d v"].abs().amax((0, 2, 3)).min()) > 0


# Every option changes the output. ---------------------------------------------------------------------------------------

BASE = Design(
    memory.MLP(2, 2.0), bias.L2(), retention.L2(), learning.GradientDescent(), refresh=4, link_at="token", anchor="initial"
)
ONLINE = replace(BASE, memory=memory.Matrix(), refresh=1)
LINKED = replace(BASE, memory=memory.Matrix(), retention=retention.LqMirror(4.0))

OPTIONS: dict[tuple[type, str], tuple[Design, Design]] = {
    (Design, "memory"): (replace(BASE, memory=memory.Vector()), replace(BASE, memory=memory.Matrix())),
    (Design, "bias"): (BASE, replace(BASE, bias=bias.Lp(3.0))),
    (Design, "retention"): (BASE, replace(BASE, retention=retention.SignedKL())),
    (Design, "learning"): (BASE, replace(BASE, learning=learning.Omega(3))),
    (Design, "refresh"): (BASE, replace(BASE, refresh=3)),
    (Design, "link_at"): (LINKED, replace(LINKED, link_at="refresh")),
    (Design, "gradient_at"): (ONLINE, replace(ONLINE, gradient_at="decayed")),
    (Design, "anchor"): (BASE, replace(BASE, anchor="origin")),
}


def option(part: str, a: Choice, b: Choice, base: Design = BASE) -> tuple[Design, Design]:
    return replace(base, **{part: a}), replace(base, **{part: b})


for _cls, _part, _changes in (
    (memory.MLP(), "memory", {"activation": "tanh", "residual": False, "norm": "rms", "fast_bias": True}),
    (bias.Lp(), "bias", {"p": 2.5}),
    (bias.Huber("norm"), "bias", {"form": "coordinate"}),
    (retention.Lq(), "retention", {"q": 5.0}),
    (retention.LqRms(), "retention", {"q": 5.0, "scale": 0.5}),
    (retention.LqMirror(), "retention", {"q": 5.0}),
    (retention.KL(2.0), "retention", {"mass": 3.0}),
    (retention.SignedKL(2.0), "retention", {"mass": 3.0}),
    (retention.FDivergence("chi2", 2.0), "retention", {"name": "hellinger", "mass": 3.0}),
    (retention.ElasticNet(0.1), "retention", {"threshold": 0.2}),
    (retention.ProximalElasticNet(0.1), "retention", {"threshold": 0.2}),
    (learning.Omega(3), "learning", {"window": 2}),
    (learning.Muon(5), "learning", {"steps": 3}),
    (learning.OmegaMuon(), "learning", {"steps": 3, "window": 2}),
):
    for _field, _value in _changes.items():
        OPTIONS[type(_cls), _field] = option(_part, _cls, replace(_cls, **{_field: _value}))
OPTIONS[bias.Envelope, "bias"] = option("bias", bias.Envelope(bias.L2()), bias.Envelope(bias.Robust()), ONLINE)
OPTIONS[learning.NonParametric, "window"] = models.transformer(None), models.transformer(2)
OPTIONS[learning.NonParametric, "persistent"] = (
    models.transformer(),
    models.transformer(learning=learning.NonParametric(persistent=2)),
)

SHAPES = {(memory.MLP, "depth"), (memory.MLP, "expansion"), (memory.GatedMLP, "expansion"), (learning.MultiStep, "n")}
"""Options that change the shapes of weights or inputs (tests/test_memory.py, tests/engine/test_memorize.py)."""

SINGLE = {(retention.Bregman, "name")}
"""Options with one value so far."""


def test_options_are_complete() -> None:
    engine = {"memory", "bias", "retention", "learning", "design"}
    wanted = {
        (cls, field.name)
        for cls in public_classes()
        if cls.family in engine and (cls is Design or cls.family != "design")  # arrangements: tests/test_arrangement.py
        for field in dataclasses.fields(cls)
    }
    assert wanted - set(OPTIONS) - SHAPES - SINGLE == {(Design, "inputs")}  # for which see tests/test_inputs.py


@pytest.mark.parametrize("key", OPTIONS, ids=lambda key: f"{key[0].__name__}.{key[1]}")
def test_every_option_changes_the_output(key: tuple[type, str]) -> None:
    one, two = OPTIONS[key]
    problem = random_problem(one, tokens=11)
    other = random_problem(two, tokens=11)
    if one.parametric and one.memory.weights(4, 4) == two.memory.weights(4, 4):
        other = {**other, "weights": problem["weights"]}
    a, b = run(problem)[0], run(other)[0]
    assert float((a - b).abs().max()) > 1e-4


@pytest.mark.parametrize(("cls", "field"), sorted(SHAPES, key=str), ids=str)
def test_options_of_shapes_change_the_shapes(cls: type, field: str) -> None:
    value = {"depth": 3, "expansion": 3.0, "n": 3}[field]
    part = "learning" if cls is learning.MultiStep else "memory"
    one, two = option(part, cls(), replace(cls(), **{field: value}))
    with pytest.raises(ValueError, match=r"must be|needs"):
        run({**random_problem(one), "design": two})


# Stability. -------------------------------------------------------------------------------------------------------------


def named_models() -> dict[str, Design]:
    """Every design that a named model is made of; softmax attention with a window, as its cache grows without one."""
    found = {"transformer, window": models.transformer(window=64)}
    for name, function in models.NAMED.items():
        for index, design in enumerate(function().parts):
            if design.parametric:
                found[f"{name} {index}"] = design
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", named_models())
def test_finite_after_100_000_tokens(name: str) -> None:
    """Random tokens in float32 through a layer at its default initialisation, 2,000 at a time."""
    layer = MemoryLayer(16, 1, named_models()[name])
    state, largest = None, 0.0
    with torch.no_grad():
        for _ in range(50):
            out, state = layer.mix(torch.randn(1, 2000, 16), state, keep=True)
            largest = max(largest, float(out.abs().max()))
            assert torch.isfinite(out).all()
            assert all(torch.isfinite(x).all() for x in state.memory.tensors())
    assert largest < 1e4


@pytest.mark.parametrize("name", named_models())
def test_finite_at_default_initialisation(name: str) -> None:
    """The same for 1,000 tokens, with gradients of the layer's parameters at both ends; none is dead."""
    layer = MemoryLayer(16, 1, named_models()[name])
    x = torch.randn(1, 1000, 16)
    with torch.no_grad():
        _, state = layer.mix(x[:, :800], keep=True)
        assert all(torch.isfinite(part).all() for part in state.memory.tensors())
    for out in (layer.mix(x[:, :100])[0], layer.mix(x[:, 800:], state)[0]):
        out.square().mean().backward()
        for parameter, p in layer.named_parameters():
            assert p.grad is not None, f"{parameter} is dead"
            assert torch.isfinite(p.grad).all(), parameter
