"""What `miras bench` does with its options."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from miras.bench.case import MODES, Case, named_design, with_refresh
from miras.bench.contenders import contenders
from miras.bench.measure import Results, measure
from miras.bench.show import plot, table
from miras.choice import require, require_one_of

PLOTS = (".png", ".svg", ".pdf")


def run_bench(
    model: str,
    overrides: Sequence[str],
    *,
    batch: int,
    tokens: str,
    heads: int,
    head_dim: int,
    refresh: str | None,
    mode: str,
    peers: str,
    paths: Sequence[str],
    dtype: str,
    device: str,
    threads: int | None,
    repeats: int,
    memory: bool,
    json_file: Path | None,
    plot_file: Path | None,
) -> Results:
    """Measure, print a table, and write what is asked for. Raises ValueError for options that mean nothing."""
    modes, chosen = _names(mode), contenders(_names(peers), list(paths))
    for name in modes:
        require_one_of("mode", name, MODES)
    require(len(modes) > 0, f"mode is empty; give some of {', '.join(MODES)}")
    require(threads is None or threads >= 1, f"threads={threads}; must be at least 1")
    for file in (json_file, plot_file):
        require(file is None or file.parent.is_dir(), f"{file}: there is no folder {file.parent if file else ''}")
    require(plot_file is None or plot_file.suffix in PLOTS, f"{plot_file}: a plot ends in one of {', '.join(PLOTS)}")
    if threads is not None:
        torch.set_num_threads(threads)
    design = named_design(model, overrides)
    name = " ".join((model, *overrides))
    cases = [Case(name, design, batch, size, heads, head_dim, dtype, device) for size in _numbers("tokens", tokens)]
    if refresh is not None:
        cases = [with_refresh(case, window) for window in _numbers("refresh", refresh) for case in cases]
    results = measure(cases, modes, chosen, repeats, memory, progress=lambda line: print(line, file=sys.stderr))
    Console(width=None if sys.stdout.isatty() else 150).print(table(results))
    for refusal in results.refusals:
        print(f"not run: {refusal.name}, {refusal.mode}: {refusal.reason}")
    if json_file is not None:
        json_file.write_text(json.dumps(results.to_dict(), indent=1) + "\n")
    if plot_file is not None:
        plot(results, plot_file)
    return results


def _names(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _numbers(name: str, text: str) -> list[int]:
    items = _names(text)
    bad = [item for item in items if not item.isdigit() or int(item) < 1]
    require(
        len(items) > 0 and not bad, f"{name}={text!r}; must be whole numbers from 1 on, by commas, for example 2048,4096"
    )
    return [int(item) for item in items]
