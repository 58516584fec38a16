"""The table of designs that the engine's tests run over: every pair of members of every two choices occurs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miras import bias, learning, memory, retention
from miras.design import Design
from tests.problems import Problem, random_problem


@dataclass(frozen=True)
class LogCosh(bias.Bias):
    """A user's bias, sum log cosh e, which leaves its gradient to automatic differentiation."""

    def loss(self, y: Tensor, v: Tensor, gates: bias.Gates) -> Tensor:
        return torch.log(torch.cosh(y - v)).sum(-1)


FACTORS: dict[str, list[Any]] = {
    "memory": [
        memory.Vector(),
        memory.Matrix(),
        memory.MLP(depth=1, norm="rms"),
        memory.MLP(depth=2, expansion=2.0),
        memory.MLP(depth=3, expansion=1.0, activation="silu"),
        memory.MLP(depth=2, expansion=1.5, activation="tanh", residual=False, norm=None),
        memory.MLP(depth=1, fast_bias=True),
        memory.MLP(depth=2, expansion=2.0, activation="gelu_tanh", fast_bias=True),
        memory.GatedMLP(expansion=1.5),
    ],
    "bias": [
        bias.Dot(),
        bias.L2(),
        bias.RidgeDot(),
        bias.Lp(3.0),
        bias.Lp(1.5),
        bias.Huber("coordinate"),
        bias.Huber("norm"),
        bias.Huber("switch"),
        bias.Robust(),
        bias.Envelope(bias.L2()),
        bias.Envelope(bias.Huber("norm")),
        bias.Envelope(bias.Robust()),
        LogCosh(),
    ],
    "retention": [
        retention.L2(),
        retention.Lq(4.0),
        retention.LqRms(3.5, scale=0.7),
        retention.LqMirror(4.0),
        retention.KL(mass=5.0),
        retention.SignedKL(),
        retention.ElasticNet(0.05),
        retention.ProximalElasticNet(0.02),
        retention.Bregman("sigmoid"),
        retention.FDivergence("chi2"),
        retention.FDivergence("hellinger", mass=3.0),
    ],
    "learning": [
        learning.GradientDescent(),
        learning.Momentum(),
        learning.MultiStep(2),
        learning.MultiStep(3),
        learning.Omega(3),
        learning.Muon(2),
        learning.OmegaMuon(3, steps=2),
        learning.Averaged(),
    ],
    "refresh": [1, 5, 16],
    "link_at": ["token", "refresh"],
    "gradient_at": ["previous", "decayed"],
    "anchor": ["initial", "origin"],
    "rate": ["head", "channel"],
    "decay": [None, "head", "channel"],
    "slow": [False, True],
}

DESIGN_FIELDS = ("memory", "bias", "retention", "learning", "refresh", "link_at", "gradient_at", "anchor")

TOKENS = {1: 9, 5: 13, 16: 19}
"""Lengths that are no multiples of the window, and longer than one."""


@dataclass(frozen=True)
class Row:
    """One row of the table: a design and how its rates, decays and slow parameters are given."""

    design: Design
    rate: str
    decay: str | None
    slow: bool

    def problem(self, **sizes: Any) -> Problem:
        """A random problem for the row; keys and values differ in width where the memory allows it."""
        square = not isinstance(self.design.memory, (memory.Matrix, memory.GatedMLP)) and not _free_widths(self.design)
        apart = not square and ("channel" not in (self.rate, self.decay) or isinstance(self.design.memory, memory.Matrix))
        defaults = {"tokens": TOKENS.get(self.design.refresh, 13), "width": 4, "value_width": 3 if apart else 4}
        return random_problem(self.design, rate=self.rate, decay=self.decay, slow=self.slow, **{**defaults, **sizes})

    def __str__(self) -> str:
        d = self.design
        parts = [str(x).replace(" ", "") for x in (d.memory, d.bias, d.retention, d.learning)]
        return "-".join(
            [*parts, str(d.refresh), d.link_at, d.gradient_at, d.anchor, self.rate, str(self.decay), str(self.slow)]
        )


def _free_widths(design: Design) -> bool:
    return isinstance(design.memory, memory.MLP) and not design.memory.residual


def legal(partial: Mapping[str, Any]) -> bool:
    """Whether the values chosen so far can be completed."""
    chosen = {name: value for name, value in partial.items() if value is not None}
    if isinstance(chosen.get("bias"), bias.Envelope) and not isinstance(
        chosen.get("memory", memory.Matrix()), memory.Matrix
    ):
        return False
    if chosen.get("gradient_at") == "decayed" and chosen.get("refresh", 1) != 1:
        return False
    try:
        Design(
            chosen.get("memory", memory.Matrix()), bias.L2(), chosen.get("retention", retention.L2()), FACTORS["learning"][0]
        )
    except ValueError:
        return False
    m = chosen.get("memory")
    inner = isinstance(m, memory.MLP) and (m.depth > 2 or (m.depth > 1 and m.fast_bias))
    return not (inner and "channel" in (chosen.get("rate"), chosen.get("decay")))


def covering(
    factors: Mapping[str, Sequence[Any]], allowed: Callable[[Mapping[str, Any]], bool], seed: int
) -> list[dict[str, Any]]:
    """Greedy pairwise covering: full assignments in which every legal pair of values of two factors occurs."""
    rng = random.Random(seed)
    index = {name: list(range(len(values))) for name, values in factors.items()}

    def values(chosen: Mapping[str, int]) -> dict[str, Any]:
        return {name: factors[name][i] for name, i in chosen.items()}

    pairs = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(factors, 2)
        for i in index[a]
        for j in index[b]
        if allowed(values({a: i, b: j}))
    }
    rank = {name: place for place, name in enumerate(factors)}

    def gain(chosen: Mapping[str, int], name: str, i: int) -> int:
        """How many uncovered pairs the value i of `name` makes with what is chosen."""
        new = (name, i)
        return sum((((o, j), new) if rank[o] < rank[name] else (new, (o, j))) in pairs for o, j in chosen.items())

    rows: list[dict[str, Any]] = []
    while pairs:
        chosen = dict(min(pairs))
        for name in rng.sample([n for n in factors if n not in chosen], len(factors) - 2):
            options = [i for i in index[name] if allowed(values({**chosen, name: i}))]
            rng.shuffle(options)
            gains = [gain(chosen, name, i) for i in options]
            chosen[name] = options[gains.index(max(gains))]
        ordered = [(name, chosen[name]) for name in factors]
        pairs -= set(itertools.combinations(ordered, 2))
        rows.append(values(chosen))
    return rows


def build_table() -> list[Row]:
    """Rows that cover every legal pair; by this seed no row has gradients above 3e4, so that 1e-9 can be asked of all."""
    return [
        Row(Design(**{name: row[name] for name in DESIGN_FIELDS}), row["rate"], row["decay"], row["slow"])
        for row in covering(FACTORS, legal, seed=3)
    ]


TABLE = build_table()
