"""Runs the path "fla" in Triton's interpreter on the CPU, in a process of its own: `python -m tests.kernels.fla_child NAME`.

Prints, as JSON, how far each output, state and gradient is from the reference's, in units of the larger of 1 and its largest
number. What the interpreter lacks is put in its place: integers of a loop have no `.to`, an alias of `tl.gather` is not
interpreted (fla has another way), and there is nothing to tune by timing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch

from miras import models
from miras.design import Design
from tests.problems import Problem, outcome, packed, probe, random_problem, run, sliced

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

TOKENS, WIDTH = 37, 16


def problem_of(name: str, **sizes: Any) -> Problem:
    design, rate, decay, _ = CASES[name]
    sizes = {"batch": 2, "tokens": TOKENS // design.learning.micro_steps, **sizes}
    return random_problem(design, width=WIDTH, value_width=WIDTH, rate=rate, decay=decay, dtype=torch.float32, **sizes)


class Index(int):
    """A loop's integer, that converts as a scalar of Triton does."""

    def to(self, dtype: Any) -> Any:
        from triton.runtime.interpreter import interpreter_semantic

        return interpreter_semantic.to_tensor(int(self), False).to(dtype)


def indices(*bounds: Any) -> Iterator[Index]:
    return map(Index, range(*map(int, bounds)))


def prepare() -> list[str]:
    """Let fla's ops run interpreted; returns the list in which the names of ops that are called will be."""
    import fla.utils
    from triton.runtime.autotuner import Autotuner

    Autotuner._bench = lambda *args, **kwargs: [1.0, 1.0, 1.0]
    fla.utils.IS_GATHER_SUPPORTED = False
    import fla.ops

    called: list[str] = []
    for module in [module for name, module in sys.modules.items() if name.startswith("fla.ops")]:
        module.range = indices
    for op in {op for *_, op in CASES.values()}:
        module = getattr(fla.ops, "generalized_delta_rule" if op == "dplr_delta_rule" else op)
        kernel = getattr(module, f"chunk_{op}")
        setattr(module, f"chunk_{op}", lambda op=op, kernel=kernel, **options: called.append(op) or kernel(**options))
    return called


def differences(name: str) -> dict[str, float]:
    """Of one call with all its gradients."""
    expected = outcome(problem_of(name), path="reference")
    found = outcome(problem_of(name), path="fla")
    return {key: distance(found[key], x) for key, x in expected.items()}


def continued(name: str) -> dict[str, float]:
    """Of two calls, the second on packed sequences from the first one's states, and the weights' gradient through both."""
    parts = [problem_of(name, batch=1, tokens=n, seed=n) for n in (5, 12)]
    weights = parts[0]["weights"]["W"].requires_grad_()
    found = []
    for path in ("fla", "reference"):
        states, outs = None, []
        for start, stops in ((0, (2, 7)), (1, (5, 12))):
            pieces = [sliced(p, 0 if start == 0 else a, b) for p, a, b in zip(parts, (2, 7), stops, strict=True)]
            joined, borders = packed([{**p, "weights": {"W": weights}} for p in pieces])
            out, states = run(joined, cu_seqlens=borders, initial_state=states, path=path)
            outs.append(out)
        whole = torch.cat(outs, dim=1)
        (grad,) = torch.autograd.grad(probe(whole) + probe(states.slots["W"]), weights)
        found.append({"out": whole, "state": states.slots["W"], "d weights": grad})
    return {key: distance(found[0][key], x) for key, x in found[1].items()}


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    size = max(1.0, float(expected.detach().abs().max()))
    return float((actual.detach().double() - expected.detach().double()).abs().max()) / size


def main(name: str) -> None:
    torch.set_num_threads(1)
    called = prepare()
    found = {"one call": differences(name), "packed, in two calls": continued(name)}
    print(json.dumps({"found": found, "called": sorted(set(called))}))


if __name__ == "__main__":
    main(sys.argv[1])
