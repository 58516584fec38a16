"""What a design holds and computes: the numbers of its recurrent state and the FLOPs a token, for one head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from miras.design import Design
from miras.engine import Plan
from miras.engine.chunk import plan_runs
from miras.layer import MemoryLayer
from miras.learning import Learning
from miras.memory import Memory

Shape = tuple[int, int]
"""(d_in, d_out) of a fast weight."""

WIDTHS = (16, 32, 48, 64, 80, 96)
"""Head widths at which a size is counted to find its formula, and one more to check it."""


@dataclass(frozen=True)
class Cost:
    """Sizes of one head of a layer.

    weights  shape of each fast weight; none for softmax attention
    copies   matrices that the state keeps of each: the learning's slots, and with refresh > 1 the gradient point
    state    numbers held: all copies of all weights, or keys and values
    flops    a token, two for a multiply-add (see `count_flops`)
    grows    `state` and `flops` are for each token of context: softmax attention over all of them, persistent ones apart
    plan     the path that the engine takes, whatever the machine ("native" and "fused" need one with a compiler)
    """

    weights: dict[str, Shape]
    copies: int
    state: int
    flops: float
    grows: bool
    plan: Plan


def measure(design: Design, head_dim: int) -> Cost:
    """The cost of a head of `head_dim` channels; widths and path are those of a layer, made without storage."""
    # As many heads as the inputs may ask for, all alike.
    heads = math.lcm(design.inputs.key_heads or 1, design.inputs.output.groups or 1)
    with torch.device("meta"):
        layer = MemoryLayer(heads * head_dim, heads, design, head_dim)
    plan, key_dim, value_dim = layer.explain(), layer.key_dim, layer.value_dim
    if not design.parametric:
        window = design.learning.attended
        # The token's own key and value are the last of its window: the state keeps those before it.
        numbers = key_dim + value_dim
        if window is None:
            return Cost({}, 1, numbers, 2.0 * numbers, True, plan)
        seen = window + design.learning.num_persistent
        return Cost({}, 1, (window - 1) * numbers, 2.0 * seen * numbers, False, plan)
    weights = {name: (d_in, d_out) for name, (_, d_in, d_out) in layer.memory.shapes.items()}
    copies = design.learning.slots + int(design.refresh > 1)
    state = copies * sum(d_in * d_out for d_in, d_out in weights.values())
    return Cost(weights, copies, state, count_flops(design, weights, key_dim, plan), False, plan)


def count_flops(design: Design, weights: dict[str, Shape], key_dim: int, plan: Plan) -> float:
    """FLOPs of one token's write and read on a path, the mean over a window: twice the multiply-adds of matrix products.

    Counted is what grows with the weights: predictions, errors, steps, read-outs, orthogonalised momentum. Left out are
    element-wise work (links, activations, decay) and what a block makes of its own b x b matrices alone (products of decay
    masks, the inverse of a triangular system), some b^2 a token (and channel, with gates per channel).
    """
    assert design.memory is not None
    window = design.refresh if design.refresh > 1 else plan.tile
    inner = inner_weights(design.memory, weights, key_dim)
    total = 0.0
    for run in plan_runs(window, 0, design.refresh, plan.tile):
        for name, shape in weights.items():
            step = _step_flops(design, shape, name in inner, plan.path, run.length)
            end = _end_flops(design, shape, plan.path) if run.ends else 0
            total += run.blocks * (run.length * step + end)
    return design.learning.micro_steps * total / window


def inner_weights(memory: Memory, weights: dict[str, Shape], key_dim: int) -> set[str]:
    """Names of the weights whose inputs depend on other weights: errors pass back through these."""
    found: set[str] = set()

    def linear(name: str, x: Tensor) -> Tensor:
        if x.requires_grad:
            found.add(name)
        return x.new_empty(*x.shape[:-1], weights[name][1]).requires_grad_()

    memory(torch.empty(1, key_dim, device="meta"), linear, {})
    return found


def _step_flops(design: Design, shape: Shape, inner: bool, path: str, length: int) -> float:
    """FLOPs of one weight for one gradient step in a block of `length`: error, write and read."""
    assert design.retention is not None
    product, pair = 2 * shape[0] * shape[1], 2 * (shape[0] + shape[1])
    slots = design.learning.slots * product
    # A product with weights that were never formed: the anchor's share, the slots', and a pair (x_i, g_i) a step.
    start = slots + (product if design.anchor == "initial" else 0)
    passes = 2 if inner else 1
    if path == "reference":
        return (passes + 2) * product
    if path == "triangular":
        # Scores and solved errors are a pair, and what each slot is read with is solved for too.
        solved = length * (pair + 2 * design.learning.slots * shape[0])
        error = 0 if design.bias.slope == "constant" else start + solved
    elif path == "substituted":
        error = passes * (start + (length - 1) * pair)
    else:
        error = passes * product
    token = design.link_at == "token"
    if design.retention.identity or (token and design.retention.scales and length > 1):
        read = start + length * pair
    elif not token:
        read = product + slots + length * pair
    else:
        read = (length + 1) * product
    return error + slots + read


def _end_flops(design: Design, shape: Shape, path: str) -> float:
    """FLOPs of one weight at a window end: what settles there, and the read-out that a block takes again after it."""
    assert design.retention is not None
    settles = design.retention.settles or design.learning.settles
    again = settles or (design.link_at == "refresh" and not design.retention.identity)
    product = 2 * shape[0] * shape[1] if again and path != "reference" else 0
    return product + _settle_flops(design.learning, shape)


def _settle_flops(learning: Learning, shape: Shape) -> int:
    if not learning.settles:
        return 0
    with FlopCounterMode(display=False) as counter:
        learning.settle(tuple(torch.empty(shape, device="meta") for _ in range(learning.slots)))
    return counter.get_total_flops()


def state_formula(design: Design) -> str | None:
    """The state as a polynomial in the head width d, such as "8 d^2", times t where it grows with the tokens so far.

    None where it is no polynomial (a hidden width that had to be rounded).
    """
    costs = [measure(design, width) for width in WIDTHS]
    coefficients = fit([(width, cost.state) for width, cost in zip(WIDTHS, costs, strict=True)])
    if coefficients is None:
        return None
    terms = [_term(x, power) for power, x in reversed(list(enumerate(coefficients))) if x != 0]
    text = " + ".join(terms)
    if not costs[0].grows:
        return text
    return f"({text}) t" if len(terms) > 1 else f"{text} t"


def fit(points: list[tuple[int, int]]) -> list[Fraction] | None:
    """Coefficients, lowest first, of the polynomial through all points but the last; None if it misses that one."""
    *given, (last, value) = points
    total = [Fraction(0)] * len(given)
    for x, y in given:
        basis = [Fraction(y)]
        for other in (z for z, _ in given if z != x):
            # times (d - other) / (x - other)
            shifted = zip([Fraction(0), *basis], [*basis, Fraction(0)], strict=True)
            basis = [(up - other * here) / (x - other) for up, here in shifted]
        total = [a + b for a, b in zip(total, basis, strict=True)]
    return total if sum(c * last**power for power, c in enumerate(total)) == value else None


def _term(x: Fraction, power: int) -> str:
    letter = {0: "", 1: "d"}.get(power, f"d^{power}")
    return f"{x} {letter}".strip() if x != 1 or power == 0 else letter
