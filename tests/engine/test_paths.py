"""Every path that accepts a design gives the reference's outputs, final state and gradients of all inputs."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from miras import PATHS, bias, learning, memory, retention
from miras.choice import Choice
from miras.design import Design
from miras.engine import chunk, dispatch
from miras.kernels import fused
from tests.problems import assert_close, assert_same, outcome, random_problem, run
from tests.table import DESIGN_FIELDS, FACTORS, TABLE, Row, legal


def able(design: Design) -> list[str]:
    """Paths other than the reference that accept a design."""
    # Those left out need a GPU, or a program for each design: tests/kernels has tests of their own.
    paths = [path for path in PATHS if path not in ("reference", "fla", "triton", "native")]
    return [path for path in paths if dispatch.refusal(path, design) is None]


PAIRS = [
    # Tracing a window takes a second or more.
    pytest.param(row, path, marks=pytest.mark.slow if path == "fused" else [])
    for row in TABLE
    for path in able(row.design)
]


@pytest.fixture(autouse=True)
def single_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the fused path take one window a step, of which a row has few."""
    monkeypatch.setattr(fused, "STEP_LENGTH", 1)


@pytest.mark.parametrize(("row", "path"), PAIRS, ids=lambda x: str(x))
def test_path_equals_reference(row: Row, path: str) -> None:
    problem = row.problem()
    assert_same(outcome(problem, path=path), outcome(problem, path="reference"))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TILES", {"triangular": 4, "substituted": 3, "fused": 3, "frozen": 3})
    monkeypatch.setattr(dispatch, "CHANNEL_TILE", 2)
    monkeypatch.setattr(chunk, "MAX_RUN", 2)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("row", "path"), PAIRS, ids=lambda x: str(x))
def test_block_sizes_do_not_matter(row: Row, path: str) -> None:
    problem = row.problem(seed=1)
    expected_out, expected = run(problem, path="reference")
    out, state = run(problem, path=path)
    assert_close(out, expected_out, "out")
    for name in expected.slots:
        assert_close(state.slots[name], expected.slots[name], f"slots.{name}")
        assert_close(state.point[name], expected.point[name], f"point.{name}")
    assert torch.equal(state.phase, expected.phase)


LONG = {
    "triangular": Design(memory.Matrix(), bias.L2(), retention.L2(), learning.Momentum(), refresh=1),
    "triangular, constant": Design(memory.Matrix(), bias.Dot(), retention.L2(), learning.GradientDescent(), refresh=16),
    "triangular, Longhorn": Design(
        memory.Matrix(), bias.Envelope(), retention.L2(), learning.MultiStep(2), refresh=1, anchor="origin"
    ),
    "substituted": Design(memory.MLP(2, 1.0, norm=None), bias.L2(), retention.L2(), learning.GradientDescent(), refresh=1),
    "frozen": Design(memory.MLP(2, 1.0, norm=None), bias.L2(), retention.L2(), learning.GradientDescent(), refresh=100),
}


@pytest.mark.parametrize("name", LONG)
def test_default_blocks_in_long_sequences(name: str) -> None:
    problem = random_problem(LONG[name], batch=1, tokens=139, heads=1, width=3, rate="channel", decay="head")
    problem["lr"] = 0.3 * problem["lr"]
    assert_same(outcome(problem, path=name.split(",")[0]), outcome(problem, path="reference"))


SCALED = Design(memory.MLP(2, 2.0), bias.Lp(3.0), retention.LqRms(), learning.GradientDescent(), refresh=6, link_at="token")
LEARNINGS = {
    "descent": learning.GradientDescent(),
    "momentum": learning.Momentum(),
    "omega": learning.Omega(3),
    "muon": learning.Muon(2),
    "micro-steps": learning.MultiStep(2),
}


@pytest.mark.parametrize("gates", ["head", "channel"])
@pytest.mark.parametrize("rule", LEARNINGS)
@pytest.mark.parametrize("q", [2.5, 3.0, 4.0])
@pytest.mark.parametrize("kind", [retention.Lq, retention.LqRms], ids=lambda x: x.__name__)
def test_scale_links_at_every_token(
    kind: type[retention.Lq | retention.LqRms], q: float, rule: str, gates: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "CHANNEL_TILE", 4)
    design = replace(SCALED, retention=kind(q), learning=LEARNINGS[rule], anchor="origin" if q == 4 else "initial")
    problem = random_problem(design, tokens=11, slow=True, rate=gates, decay=gates)
    assert_same(outcome(problem, path="frozen"), outcome(problem, path="reference"))


def test_scale_links_where_decays_vanish() -> None:
    problem = random_problem(replace(SCALED, refresh=16, learning=learning.Momentum()), tokens=35)
    problem["log_decay"] = 300 * problem["log_decay"]
    assert_same(outcome(problem, path="frozen"), outcome(problem, path="reference"))


def test_strong_decay_has_no_overflow() -> None:
    design = Design(memory.Matrix(), bias.L2(), retention.L2(), learning.Momentum(), refresh=1, anchor="origin")
    problem = random_problem(design, tokens=40, decay="channel")
    problem["log_decay"] = 300 * problem["log_decay"]
    assert_same(outcome(problem), outcome(problem, path="reference"))


def test_zero_rates_and_no_decay_leave_the_memory_alone() -> None:
    for row in TABLE[::9]:
        problem = row.problem()
        problem["lr"], problem["log_decay"] = torch.zeros_like(problem["lr"]), None
        if row.design.retention.settles or row.design.learning.settles:
            continue
        _, state = run(problem)
        for name, x in state.slots.items():
            deviation = 0 if row.design.anchor == "initial" else problem["weights"][name]
            assert_close(x[:, :, 0], torch.zeros_like(x[:, :, 0]) + deviation, name)


def test_momentum_without_memory_is_descent() -> None:
    titans = Design(memory.Matrix(), bias.L2(), retention.L2(), learning.Momentum(), refresh=4)
    plain = Design(memory.Matrix(), bias.L2(), retention.L2(), learning.GradientDescent(), refresh=4)
    problem = random_problem(titans)
    problem["gates"]["mu"].zero_()
    expected, _ = run({**problem, "design": plain, "gates": {}})
    for path in able(titans):
        assert_close(run(problem, path=path)[0], expected, path)


def test_table_covers_every_pair() -> None:
    rows = [
        {**{name: getattr(row.design, name) for name in DESIGN_FIELDS}, "rate": row.rate, "decay": row.decay}
        | {"slow": row.slow}
        for row in TABLE
    ]
    for a, b in itertools.combinations(FACTORS, 2):
        wanted = {
            (i, j)
            for (i, x), (j, y) in itertools.product(enumerate(FACTORS[a]), enumerate(FACTORS[b]))
            if legal({a: x, b: y})
        }
        found = {(FACTORS[a].index(row[a]), FACTORS[b].index(row[b])) for row in rows}
        assert wanted <= found, (a, b)


def test_table_has_every_member_of_every_choice() -> None:
    for name, module in (("memory", memory), ("bias", bias), ("retention", retention), ("learning", learning)):
        members = {
            x
            for x in vars(module).values()
            if isinstance(x, type) and issubclass(x, Choice) and x.__module__ == module.__name__ and "family" not in vars(x)
        }
        missing = members - {type(x) for x in FACTORS[name]} - {learning.NonParametric}
        assert not missing, f"add {missing} to tests/table.py"
