"""How fast the memories are on this machine: runs the commands of docs/results/speed.md and writes that page.

    python benchmarks/speed.py --out docs/results/speed.md [--threads 2] [--keep runs/speed]

With --keep, sections whose figures are in that folder already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from timeit import timeit

import torch

from miras.bench import Case, Measurement, Results, contenders, markdown, named_design
from miras.bench.show import machine_line

PLAIN = "titans_lmm learning.kind=GradientDescent"
ALL = "--peers floor,ttt-mlp,titans-pytorch,sdpa"

SECTIONS: dict[str, tuple[str, str]] = {
    "plain": (
        "MLP 64->256->64, L2, gradient descent (Titans without momentum)",
        f"{PLAIN} --refresh 16,64 --path fused --path frozen {ALL} --repeats 5",
    ),
    "momentum": ("The same with momentum (Titans)", "titans_lmm --refresh 16,64 --peers floor --repeats 5"),
    "yaad": ("Yaad", "yaad --peers floor"),
    "moneta": ("Moneta", "moneta --peers floor"),
    "memora": ("Memora", "memora --peers floor"),
    "refresh1": ("Exact online: refresh 1", f"{PLAIN} --refresh 1 --path fused --peers floor --repeats 3"),
    "delta": ("Gated DeltaNet", "gated_deltanet --path triangular --peers floor,delta-rule,sdpa"),
    "link_token": ("Moneta's link at every token", "moneta link_at=token --mode forward+backward --peers floor --repeats 3"),
    "scaling": (
        "Sequence length",
        f"{PLAIN} --refresh 64 --tokens 2048,4096,8192,16384 --mode forward+backward --peers sdpa --repeats 3 --no-memory",
    ),
    "decode": (
        "Decoding 64 tokens after a context",
        "yaad --tokens 1024,4096,16384 --mode decode --peers floor,sdpa --repeats 3 --no-memory",
    ),
}
"""Per section its heading and the arguments of `miras bench`."""

TURNS = {
    "momentum / plain descent, refresh 16": ("titans_lmm refresh=16", f"{PLAIN} refresh=16"),
    "momentum / plain descent, refresh 64": ("titans_lmm refresh=64", f"{PLAIN} refresh=64"),
    "refresh 1 / refresh 16": (f"{PLAIN} refresh=1", f"{PLAIN} refresh=16"),
    "Moneta's link at every token / at window ends": ("moneta link_at=token", "moneta"),
}
"""Pairs of designs, which are run in turn."""

BOTH = "forward+backward"


def measured(arguments: str, threads: int, file: Path) -> Results:
    """The figures of a section, from its command unless they are there already."""
    if not file.exists():
        command = [sys.executable, "-m", "miras.cli", "bench", *shlex.split(arguments)]
        subprocess.run([*command, "--threads", str(threads), "--json", str(file)], check=True)
    return Results.from_dict(json.loads(file.read_text()))


def in_turn(threads: int, file: Path, repeats: int = 9) -> dict[str, list[list[float]]]:
    """Seconds of both designs of each of TURNS, one after the other, unless they are there already."""
    if not file.exists():
        torch.set_num_threads(threads)
        (ours,) = contenders([], [])
        found: dict[str, list[list[float]]] = {}
        for name, designs in TURNS.items():
            works = [ours.work(_case(x), BOTH) for x in designs]
            for work in works:
                work()
            rounds = [[timeit(work, number=1) for work in works] for _ in range(repeats)]
            found[name] = [list(x) for x in zip(*rounds, strict=True)]
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


def _case(design: str) -> Case:
    name, *overrides = design.split()
    return Case(design, named_design(name, overrides))


def pick(
    results: Results, name: str, refresh: int | None = None, tokens: int | None = None, mode: str = BOTH
) -> Measurement:
    """The one measurement that fits."""
    return next(
        m
        for m in results.measurements
        if m.name == name and m.mode == mode and refresh in (None, m.case.design.refresh) and tokens in (None, m.case.tokens)
    )


def summary(found: dict[str, Results]) -> list[tuple[str, Measurement, Measurement]]:
    """Named pairs whose times are divided."""
    plain, scaling = found["plain"], found["scaling"]
    rows: list[tuple[str, Measurement, Measurement]] = []
    for refresh in (16, 64):
        ours = pick(plain, "miras", refresh)
        for peer in ("ttt-mlp", "titans-pytorch"):
            rows.append((f"{peer} / ours, refresh {refresh}", pick(plain, peer, refresh), ours))
        rows.append((f"ours / floor, refresh {refresh}", ours, pick(plain, "floor", refresh)))
    long, short = (pick(scaling, "miras", tokens=t) for t in (16384, 2048))
    rows.append(("ours at 16,384 tokens / ours at 2,048", long, short))
    rows.append(("sdpa / ours at 16,384 tokens", pick(scaling, "sdpa", tokens=16384), long))
    delta = found["delta"]
    rows.append(("gated delta rule / its triangular form in torch", pick(delta, "miras"), pick(delta, "delta-rule")))
    return rows


def memory(found: dict[str, Results]) -> Iterator[tuple[str, float, float]]:
    """Named pairs of peak memory, in bytes."""
    for refresh in (16, 64):
        eager, ours = (pick(found["plain"], name, refresh).peak_bytes for name in ("frozen", "miras"))
        assert eager is not None and ours is not None
        yield f"eager autograd / ours, refresh {refresh}", eager, ours


def page(found: dict[str, Results], turns: dict[str, list[list[float]]], threads: int) -> str:
    """The page."""
    machines = [machine_line(results) for results in found.values()]
    lines = ["# Speed", "", HEAD.strip(), "", f"Machine, with its load when each section ended: {machines[0]}"]
    loads = ", ".join(f"{name} {r.machine['load']:.1f}" for name, r in found.items())
    lines += [
        "",
        f"Loads: {loads}.",
        "",
        "## Ratios, forward + backward",
        "",
        "| ratio | of medians | of lowest |",
        "|---|---|---|",
    ]
    for name, over, under in summary(found):
        lowest = min(over.seconds) / min(under.seconds)
        lines.append(f"| {name} | {over.median / under.median:.2f} | {lowest:.2f} |")
    for name, (over, under) in turns.items():
        lines.append(f"| {name} * | {median(over) / median(under):.2f} | {min(over) / min(under):.2f} |")
    lines += ["", "\\* the two in turn, nine times, in a run of their own.", "", "Peak memory, forward + backward:", ""]
    lines += [
        f"- {name}: {over / under:.1f} ({over / 1e6:.0f} and {under / 1e6:.0f} MB)" for name, over, under in memory(found)
    ]
    for name, (heading, arguments) in SECTIONS.items():
        lines += [
            "",
            f"## {heading}",
            "",
            f"    miras bench {arguments} --threads {threads}",
            "",
            markdown(found[name]),
        ]
    return "\n".join(lines) + "\n"


HEAD = """
Time, FLOP rate and peak memory of `miras.memorize` (a layer's memory without its projections) and of its peers, in turn
within one run. Deep memories run on the path that `miras explain` names. B = 2, H = 4, d = 64, float32,
2,048 tokens unless a command says otherwise. Where the loads below are above the number of threads, other work shared the
cores: read ratios within a section, and their spread. The page is written by

    python benchmarks/speed.py --out docs/results/speed.md

- `miras` is our default path, "native" in all sections but decoding; `fused` our path by torch.compile; `frozen` that block
  by block in eager PyTorch; `triangular` a linear memory's errors from one triangular solve a block; `floor` the same
  matrix products alone (`torch.bmm` on reused operands; with a backward pass two more a product, and the forward ones once
  more, as if recomputed); `ttt-mlp` the published formulation of TTT-MLP, written anew in `src/miras/bench/ttt_mlp.py`;
  `titans-pytorch` its NeuralMemory 0.5.5, chunk_size and batch_size the refresh (one rate and decay a chunk: coarser, and
  much faster, than one a token), without its projections of q, k and v; `delta-rule` the gated delta rule by triangular
  solves in plain torch, `src/miras/bench/delta_rule.py`; `sdpa` PyTorch's causal attention.
- ms: median of the repeats, then the lowest and the highest. tokens/s: all sequences together. GFLOP/s: matrix products
  only, nothing counted twice (the floor's: all that it computes); `of GEMM` divides by the floor's rate. peak MB: resident
  memory of one repeat above its inputs, in a fresh process. `x miras`: time over ours.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path, default=Path("runs/speed"))
    arguments = parser.parse_args()
    arguments.keep.mkdir(parents=True, exist_ok=True)
    found = {
        name: measured(command, arguments.threads, arguments.keep / f"{name}.json")
        for name, (_, command) in SECTIONS.items()
    }
    turns = in_turn(arguments.threads, arguments.keep / "turns.json")
    arguments.out.write_text(page(found, turns, arguments.threads))


if __name__ == "__main__":
    main()
