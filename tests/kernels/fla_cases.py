"""The path "fla" against the reference: on a GPU by `make test-gpu`, in Triton's interpreter by `test_fla_ops.py`.

Not collected by itself, since the interpreter has to be chosen before anything in the process imports Triton. What it lacks
is put in its place: integers of a loop have no `.to`, an alias of `tl.gather` is not interpreted (fla has another way), and
there is nothing to tune by timing. It has no bfloat16.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from miras import models
from miras.design import Design
from miras.kernels.triton import interpreted
from tests.kernels.scan_cases import home
from tests.problems import (
    Problem,
    assert_same,
    leaves,
    outcome,
    packed,
    probe,
    random_problem,
    run,
    sliced,
    with_leaves,
)

CASES: dict[str, tuple[Design, str, str | None, str]] = {
    "linear_attention": (models.linear_attention(), "head", None, "simple_gla"),
    "retnet": (models.retnet(), "head", "head", "simple_gla"),
    "retnet, anchored": (models.retnet(anchor="initial"), "channel", "head", "simple_gla"),
    "gla": (models.gla(), "head", "channel", "gla"),
    "gla, rates a channel": (models.gla(anchor="initial"), "channel", "channel", "gla"),
    "deltanet": (models.deltanet(), "head", None, "gated_delta_rule"),
    "deltaproduct": (models.deltaproduct(), "head", None, "gated_delta_rule"),
    "gated_deltanet": (models.gated_deltanet(), "head", "head", "gated_delta_rule"),
    "gated_deltanet, anchored": (models.gated_deltanet(anchor="initial"), "head", "head", "gated_delta_rule"),
    "longhorn": (models.longhorn(anchor="initial"), "head", None, "gated_delta_rule"),
    "kda": (models.kda(anchor="initial"), "head", "channel", "kda"),
    "rwkv7": (models.rwkv7(), "channel", "channel", "dplr_delta_rule"),
    "deltanet with decay": (models.deltanet(anchor="initial"), "head", "head", "dplr_delta_rule"),
}
"""{name: (design, rates and decays a head or a channel, the op it must take)}."""

DEVICE, TOKENS, WIDTH = ("cpu", 37, 16) if interpreted() else ("cuda", 150, 64)

TOLERANCES = {"float32": 1e-5, "float16": 2.5e-3} if interpreted() else {"bfloat16": 2e-2}
"""By the dtype of q, k and v: rounded to it, numbers are off by 2^-11 of their size in float16, 2^-8 in bfloat16."""


def problem_of(name: str, dtype: str, device: str, **sizes: Any) -> Problem:
    """A case's, with q, k and v in a dtype."""
    design, rate, decay, _ = CASES[name]
    problem = random_problem(design, width=WIDTH, value_width=WIDTH, rate=rate, decay=decay, dtype=torch.float32, **sizes)
    narrow = {key: problem[key].to(getattr(torch, dtype)) for key in "qkv"}
    return with_leaves(problem, {key: x.to(device) for key, x in {**leaves(problem), **narrow}.items()})


class Index(int):
    """A loop's integer, that converts as a scalar of Triton does."""

    def to(self, dtype: Any) -> Any:
        semantic: Any = importlib.import_module("triton.runtime.interpreter").interpreter_semantic
        return semantic.to_tensor(int(self), False).to(dtype)


def indices(*bounds: Any) -> Iterator[Index]:
    return map(Index, range(*map(int, bounds)))


def interpret() -> None:
    """Let fla's ops run interpreted."""
    import fla.utils
    from triton.runtime.autotuner import Autotuner

    Autotuner._bench = lambda *args, **kwargs: [1.0, 1.0, 1.0]
    fla.utils.IS_GATHER_SUPPORTED = False
    importlib.import_module("fla.ops")
    for module in [module for name, module in sys.modules.items() if name.startswith("fla.ops")]:
        vars(module)["range"] = indices


class Call(NamedTuple):
    """The name of an op, and the types of what it is given."""

    op: str
    dtypes: dict[str, torch.dtype]


def watched() -> list[Call]:
    """The ops that are called from now on."""
    import fla.ops

    calls: list[Call] = []

    def watch(op: str, kernel: Any, **options: Any) -> Any:
        numbers = {key: x for key, x in options.items() if isinstance(x, Tensor) and x.is_floating_point()}
        calls.append(Call(op, {key: x.dtype for key, x in numbers.items()}))
        return kernel(**options)

    for op in {op for *_, op in CASES.values()}:
        module = getattr(fla.ops, "generalized_delta_rule" if op == "dplr_delta_rule" else op)
        setattr(module, f"chunk_{op}", functools.partial(watch, op, getattr(module, f"chunk_{op}")))
    return calls


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    with warnings.catch_warnings(action="ignore"):  # of what fla imports
        if interpreted():
            interpret()
        return watched()


def one_call(name: str, dtype: str, path: str, device: str) -> dict[str, Tensor]:
    """Outputs, the state and all gradients."""
    tokens = TOKENS // CASES[name][0].learning.micro_steps
    return home(outcome(problem_of(name, dtype, device, tokens=tokens), path=path))


def packed_in_two_calls(name: str, dtype: str, path: str, device: str) -> dict[str, Tensor]:
    """The second from the first one's states, and the weights' gradient through both."""
    parts = [problem_of(name, dtype, device, batch=1, tokens=n, seed=n) for n in (5, 12)]
    weights = parts[0]["weights"]["W"].requires_grad_()
    state, outs = None, []
    for cuts in (((0, 2), (0, 7)), ((2, 5), (7, 12))):
        pieces = [sliced(part, *cut) for part, cut in zip(parts, cuts, strict=True)]
        joined, borders = packed([{**piece, "weights": {"W": weights}} for piece in pieces])
        out, state = run(joined, cu_seqlens=borders.to(device), initial_state=state, path=path)
        outs.append(out)
    whole = torch.cat(outs, dim=1)
    (grad,) = torch.autograd.grad(probe(whole) + probe(state.slots["W"]), weights)
    return home({"out": whole, "state": state.slots["W"], "d weights": grad})


@pytest.mark.filterwarnings("ignore:.*does not support float32 on some platforms:RuntimeWarning")
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str, dtype: str, calls: list[Call]) -> None:
    calls.clear()
    for outcomes in (one_call, packed_in_two_calls):
        found = outcomes(name, dtype, "fla", DEVICE)
        expected = outcomes(name, dtype, "reference", "cpu")
        assert_same(found, expected, TOLERANCES[dtype])
        assert {key: x.dtype for key, x in found.items()} == {key: x.dtype for key, x in expected.items()}
    wide = {"g": torch.float32, "gk": torch.float32, "beta": torch.float32, "initial_state": torch.float32}
    assert len(calls) == 3
    for op, dtypes in calls:
        assert op == CASES[name][3]
        assert dtypes == {key: wide.get(key, getattr(torch, dtype)) for key in dtypes}
        assert {"q", "k", "v", "initial_state"} < set(dtypes)
