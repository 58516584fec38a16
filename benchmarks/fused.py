"""The fused path beside the block-by-block one, TTT-MLP, titans-pytorch, attention and the bare matrix products.

    python benchmarks/fused.py [--refresh 16 64] [--tokens 2048] [--threads 2] [--rounds 5] [--anchor origin]

Memory of a layer: B = 2, H = 4, d = 64, MLP 64 -> 256 -> 64, float32. Every round times every case once, one after the
other, so that all see the same machine; the table gives medians and ranges in ms, and each case's median over the floor's.
The floor is the time of the matrix products (bmm, mm) of the fused path's own graphs, backward with the forward recomputed.
Peak is what one forward and backward pass allocates at most, by torch's profiler.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad
from torch.fx import GraphModule, Interpreter
from torch.profiler import ProfilerActivity, profile

import miras
from miras import bias, learning, memory, retention
from miras.bench.case import Case
from miras.bench.contenders import PEERS
from miras.kernels import fused

Pass = Callable[[], Any]
Passes = tuple[Pass, Pass]
FLOOR = "floor: its products alone"
LONG = 8
PRODUCTS = (torch.ops.aten.bmm.default, torch.ops.aten.mm.default)


def inputs(design: miras.Design, tokens: int) -> dict[str, Any]:
    """Arguments of `memorize`, all but gates learned."""
    g = torch.Generator().manual_seed(0)
    sizes = (2, tokens, 4)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=g)).requires_grad_()

    def uniform(high: float) -> Tensor:
        return (high * torch.rand(*sizes, generator=g)).requires_grad_()

    q, k = (F.normalize(normal(*sizes, 64).detach(), dim=-1).requires_grad_() for _ in range(2))
    return {
        "q": q,
        "k": k,
        "v": normal(*sizes, 64),
        "lr": uniform(0.05),
        "log_decay": uniform(-0.02),
        "weights": {"up": normal(4, 64, 256, scale=0.125), "down": normal(4, 256, 64, scale=0.06)},
        "gates": {gate.name: uniform(0.8).detach() for gate in design.gates},
    }


def learned(arguments: dict[str, Any]) -> list[Tensor]:
    return [*(arguments[name] for name in ("q", "k", "v", "lr", "log_decay")), *arguments["weights"].values()]


def products(function: Callable[[], Any]) -> list[list[tuple[Any, tuple[Tensor, ...]]]]:
    """The matrix products, with operands, of each graph that the fused path makes in a pass."""
    found: list[list[tuple[Any, tuple[Tensor, ...]]]] = []

    class Recorder(Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target in PRODUCTS:
                found[-1].append((target, args))
            return super().call_function(target, args, kwargs)

    def graph(function: Any, examples: Any, _compiled: bool) -> GraphModule:
        traced = made(function, examples, False)
        found.append([])
        Recorder(traced).run(*examples)
        return traced

    made, fused.graph_of = fused.graph_of, graph
    _forget()
    function()
    _forget()
    fused.graph_of = made
    return found


def _forget() -> None:
    fused._forward_graph.cache_clear()
    fused._backward_graph.cache_clear()


def peak_mb(function: Pass) -> float:
    """Most bytes allocated at once during a call, in MB."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():  # pyright: ignore
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most / 2**20


def passes(forward: Callable[[], Tensor], wanted: Sequence[Tensor]) -> Passes:
    """Forward, and forward and backward."""
    with torch.no_grad():
        probe = torch.randn_like(forward())
    return torch.no_grad()(forward), lambda: grad(forward(), wanted, probe, allow_unused=True)


def ours(design: miras.Design, tokens: int, path: str) -> Passes:
    arguments = inputs(design, tokens)
    return passes(lambda: miras.memorize(**arguments, design=design, path=path, check=False)[0], learned(arguments))


def peer(name: str, design: miras.Design, tokens: int) -> Passes:
    return passes(*PEERS[name].forward(Case(name, design, tokens=tokens)))


def floor(design: miras.Design, tokens: int) -> Passes:
    forward, backward = products(ours(design, fused.STEP_LENGTH * design.refresh, "fused")[1])
    steps = tokens // max(design.refresh, fused.STEP_LENGTH)

    def run(calls: list[Any]) -> Pass:
        return torch.no_grad()(lambda: [product(*operands) for _ in range(steps) for product, operands in calls])

    return run(forward), run(forward + backward)


def cases(refresh: int, anchor: str, tokens: int) -> dict[str, Passes]:
    """Everything compared at a refresh."""
    descent = miras.Design(
        memory.MLP(2, 4.0), bias.L2(), retention.L2(), learning.GradientDescent(), refresh=refresh, anchor=anchor
    )
    momentum = replace(descent, learning=learning.Momentum())
    return {
        FLOOR: floor(descent, tokens),
        "fused": ours(descent, tokens, "fused"),
        "fused, momentum": ours(momentum, tokens, "fused"),
        "frozen (block by block)": ours(descent, tokens, "frozen"),
        "TTT-MLP, official formulation": peer("ttt-mlp", descent, tokens),
        "titans-pytorch": peer("titans-pytorch", descent, tokens),
        "titans-pytorch, momentum": peer("titans-pytorch", momentum, tokens),
        "causal SDPA": peer("sdpa", descent, tokens),
        f"fused, {LONG}x the tokens": ours(descent, LONG * tokens, "fused"),
        f"causal SDPA, {LONG}x the tokens": peer("sdpa", descent, LONG * tokens),
    }


def measured(compared: dict[str, Passes], rounds: int) -> dict[str, list[list[float]]]:
    """Milliseconds of both passes of every case; cases take turns, and one round goes before that is not counted."""
    times: dict[str, list[list[float]]] = {name: [[], []] for name in compared}
    for name, both in (item for _ in range(rounds + 1) for item in compared.items()):
        for run, taken in zip(both, times[name], strict=True):
            began = time.perf_counter()
            run()
            taken.append(1e3 * (time.perf_counter() - began))
    return {name: [taken[1:] for taken in both] for name, both in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refresh", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--anchor", default="initial")
    parser.add_argument("--only", default="", help="cases whose names contain this, beside the floor")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| refresh | case | forward ms | forward+backward ms | over floor | peak MB |\n|---|---|---|---|---|---|")
    for refresh in options.refresh:
        compared = cases(refresh, options.anchor, options.tokens)
        compared = {name: x for name, x in compared.items() if name == FLOOR or options.only in name}
        times = measured(compared, options.rounds)
        floors = [statistics.median(taken) for taken in times[FLOOR]]
        for name, both in times.items():
            spans = [f"{statistics.median(x):.0f} ({min(x):.0f}-{max(x):.0f})" for x in both]
            ratios = [f"{statistics.median(x) / least:.2f}" for x, least in zip(both, floors, strict=True)]
            peak = "" if name == FLOOR else f"{peak_mb(compared[name][1]):.0f}"
            print(f"| {refresh} | {name} | {' | '.join(spans)} | {' / '.join(ratios)} | {peak} |", flush=True)


if __name__ == "__main__":
    main()
