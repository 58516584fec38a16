"""The fused path beside the block-by-block one, the official TTT-MLP formulation, attention and the bare matrix products.

    python benchmarks/fused.py [--refresh 16 64] [--tokens 2048] [--threads 2] [--rounds 5] [--momentum] [--anchor origin]

Memory of a layer: B = 2, H = 4, d = 64, MLP 64 -> 256 -> 64, float32. Every round times every case once, one after the
other, so that all see the same machine; the table gives medians and ranges in ms, and each case's median over the floor's.
The floor is the time of the matrix products (bmm, mm) of the fused path's own graphs, backward with the forward recomputed.
Peak is what one forward and backward pass allocates at most, by torch's profiler.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad
from torch.fx import GraphModule, Interpreter
from torch.profiler import ProfilerActivity, profile

import miras
from miras import bias, learning, memory, retention
from miras.kernels import fused

Pass = Callable[[], Any]
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


def ttt_mlp(q: Tensor, k: Tensor, v: Tensor, lr: Tensor, weights: dict[str, Tensor], length: int) -> Tensor:
    """TTT-MLP's dual form, batch by batch: fast biases, tanh GELU, fused gradient of LN and L2, no decay (arXiv 2407.04620).

    Written anew after the published PyTorch code, with which it shares its operations one for one.
    """
    q, k, v, lr = (x.transpose(1, 2) for x in (q, k, v, lr))
    batch = q.shape[0]
    w1, w2 = (weights[name].expand(batch, *weights[name].shape) for name in ("up", "down"))
    b1, b2 = w1.new_zeros(batch, 4, 1, 256), w1.new_zeros(batch, 4, 1, 64)
    gamma, beta = w1.new_ones(4, 1, 64), w1.new_zeros(4, 1, 64)
    outputs = []
    for start in range(0, q.shape[2], length):
        xq, xk, xv, eta = (x[:, :, start : start + length] for x in (q, k, v, lr))
        rates = eta.unsqueeze(-2).expand(*eta.shape, eta.shape[-1]).tril()
        z1 = xk @ w1 + b1
        x2 = F.gelu(z1, approximate="tanh")
        z2 = x2 @ w2 + b2
        g2 = _norm_l2_gradient(z2, xv - xk, gamma, beta)
        g1 = g2 @ w2.mT * _gelu_slope(z1)
        read1 = xq @ w1 - (rates * (xq @ xk.mT).tril()) @ g1 + b1 - rates @ g1
        h = F.gelu(read1, approximate="tanh")
        read2 = h @ w2 - (rates * (h @ x2.mT).tril()) @ g2 + b2 - rates @ g2
        last = eta.unsqueeze(-1)
        w1, b1 = w1 - (last * xk).mT @ g1, b1 - (last * g1).sum(-2, keepdim=True)
        w2, b2 = w2 - (last * x2).mT @ g2, b2 - (last * g2).sum(-2, keepdim=True)
        mean, std = read2.mean(-1, keepdim=True), (read2.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        outputs.append(xq + gamma * (read2 - mean) / std + beta)
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _norm_l2_gradient(x: Tensor, target: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    width = x.shape[-1]
    mean, std = x.mean(-1, keepdim=True), (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    normal = (x - mean) / std
    g = (gamma * normal + beta - target) * gamma
    return (width * g - g.sum(-1, keepdim=True) - normal * (g * normal).sum(-1, keepdim=True)) / (width * std)


def _gelu_slope(x: Tensor) -> Tensor:
    tanh = torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))
    return 0.5 * x * ((1 - tanh * tanh) * (0.79788456 + 0.1070322243 * x * x)) + 0.5 * (1 + tanh)


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
    function()
    fused.graph_of = made
    fused._forward_graph.cache_clear()
    fused._backward_graph.cache_clear()
    return found


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


def cases(design: miras.Design, tokens: int) -> dict[str, tuple[Pass, Pass]]:
    """Forward, and forward and backward, of everything compared."""
    arguments = inputs(design, tokens)
    leaves, probe = learned(arguments), torch.randn(2, tokens, 4, 64)

    def both(forward: Callable[[], Tensor], wanted: list[Tensor]) -> tuple[Pass, Pass]:
        return torch.no_grad()(forward), lambda: grad(forward(), wanted, probe)

    def memory_by(path: str) -> Callable[[], Tensor]:
        return lambda: miras.memorize(**arguments, design=design, path=path, check=False)[0]

    def attention() -> Tensor:
        q, k, v = (arguments[name].transpose(1, 2) for name in ("q", "k", "v"))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def official() -> Tensor:
        return ttt_mlp(*leaves[:4], arguments["weights"], design.refresh)

    fused_passes = both(memory_by("fused"), leaves)
    forward, backward = products(fused_passes[1])
    steps = tokens // max(design.refresh, fused.STEP_LENGTH)

    def floor(calls: list[Any]) -> Pass:
        return torch.no_grad()(lambda: [product(*operands) for _ in range(steps) for product, operands in calls])

    return {
        "fused": fused_passes,
        "frozen (block by block)": both(memory_by("frozen"), leaves),
        "TTT-MLP, official formulation": both(official, [*leaves[:4], *leaves[5:]]),
        "causal SDPA": both(attention, leaves[:3]),
        "floor: its products alone": (floor(forward), floor(forward + backward)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refresh", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--momentum", action="store_true")
    parser.add_argument("--anchor", default="initial")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rule = learning.Momentum() if options.momentum else learning.GradientDescent()
    print("| refresh | case | forward ms | forward+backward ms | over floor | peak MB |\n|---|---|---|---|---|---|")
    for refresh in options.refresh:
        design = miras.Design(memory.MLP(2, 4.0), bias.L2(), retention.L2(), rule, refresh=refresh, anchor=options.anchor)
        compared = cases(design, options.tokens)
        began = time.perf_counter()
        for run in compared["fused"]:
            run()
        compiling = time.perf_counter() - began
        times: dict[tuple[str, int], list[float]] = {}
        for _ in range(options.rounds):
            for name, passes in compared.items():
                for which, run in enumerate(passes):
                    began = time.perf_counter()
                    run()
                    times.setdefault((name, which), []).append(1e3 * (time.perf_counter() - began))
        floors = [statistics.median(times["floor: its products alone", which]) for which in range(2)]
        for name, passes in compared.items():
            spans, ratios = [], []
            for which in range(2):
                measured = times[name, which]
                spans.append(f"{statistics.median(measured):.0f} ({min(measured):.0f}-{max(measured):.0f})")
                ratios.append(f"{statistics.median(measured) / floors[which]:.2f}")
            peak = "" if name.startswith("floor") else f"{peak_mb(passes[1]):.0f}"
            print(f"| {refresh} | {name} | {' | '.join(spans)} | {' / '.join(ratios)} | {peak} |", flush=True)
        print(f"first passes of refresh {refresh}, compiling included: {compiling:.0f} s", flush=True)


if __name__ == "__main__":
    main()
