"""A guard on speed: a few ratios of times within this run against the committed ones; `make bench-check`.

    python benchmarks/check.py [--write] [--threads 2] [--repeats 7]

Ratios of things measured in turn in one run hold from run to run, times do not. Prints every ratio, says which moved by more
than the baseline's tolerance, and exits with 1 if any did. After a change that is meant, or on another machine, --write
keeps this run's ratios.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from miras.bench import Case, Results, contenders, measure, named_design
from miras.bench.measure import machine

BASELINE = Path(__file__).with_name("baseline.json")
TOLERANCE = 0.2
"""Share by which a ratio may move, for a baseline that is written now."""

BOTH = "forward+backward"
TOKENS = 1024


@dataclass(frozen=True)
class Ratio:
    """Time of `ours` over that of `peer`, for a design at TOKENS tokens of B = 2, H = 4, d = 64, float32."""

    name: str
    design: str
    peer: str
    mode: str = BOTH

    def case(self) -> Case:
        model, *overrides = self.design.split()
        return Case(self.design, named_design(model, overrides), tokens=TOKENS)


PLAIN = "titans_lmm learning.kind=GradientDescent"

RATIOS = (
    Ratio("refresh 16 / TTT-MLP", f"{PLAIN} refresh=16", "ttt-mlp"),
    Ratio("refresh 64 / matrix products", f"{PLAIN} refresh=64", "floor"),
    Ratio("momentum, refresh 16 / TTT-MLP", "titans_lmm refresh=16", "ttt-mlp"),
    Ratio("Yaad, refresh 64 / matrix products", "yaad refresh=64", "floor"),
    Ratio("refresh 1 / matrix products", f"{PLAIN} refresh=1", "floor"),
    Ratio("Moneta, link at every token / matrix products", "moneta link_at=token", "floor"),
    Ratio("Gated DeltaNet / softmax attention", "gated_deltanet", "sdpa"),
)


def per_token(results: Results, name: str, mode: str) -> float:
    """Seconds a token in the fastest repeat: what else runs on the machine only adds."""
    return next(min(m.seconds) / m.tokens for m in results.measurements if (m.name, m.mode) == (name, mode))


def measured(repeats: int) -> dict[str, float]:
    """Every ratio, now."""
    found: dict[str, float] = {}
    for ratio in RATIOS:
        results = measure([ratio.case()], [ratio.mode], contenders([ratio.peer], []), repeats, memory=False)
        found[ratio.name] = per_token(results, "miras", ratio.mode) / per_token(results, ratio.peer, ratio.mode)
    yaad = Case("yaad", named_design("yaad"), tokens=TOKENS)
    results = measure([yaad], ["forward", "decode"], contenders([], []), repeats, memory=False)
    found["Yaad, a decoded token / a token of a forward pass"] = per_token(results, "miras", "decode") / per_token(
        results, "miras", "forward"
    )
    return found


def moved(now: dict[str, float], before: dict[str, float], tolerance: float) -> dict[str, float]:
    """Ratios that grew or shrank by more than the tolerance, as factors; those measured on one side only are NaN."""
    names = sorted({*now, *before})
    factors = {name: now.get(name, math.nan) / before.get(name, math.nan) for name in names}
    return {name: x for name, x in factors.items() if not 1 / (1 + tolerance) <= x <= 1 + tolerance}


def report(now: dict[str, float], before: dict[str, float], found: dict[str, float]) -> str:
    """A line a ratio."""
    lines: list[str] = []
    for name in [*now, *(name for name in before if name not in now)]:
        factor = found.get(name)
        word = "ok" if factor is None else "NEW OR GONE" if math.isnan(factor) else f"MOVED by {factor - 1:+.0%}"
        lines.append(f"{now.get(name, math.nan):8.2f}  was {before.get(name, math.nan):8.2f}  {word:16}  {name}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep this run's ratios as the baseline")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    now = measured(arguments.repeats)
    if arguments.write:
        rounded = {name: round(x, 3) for name, x in now.items()}
        BASELINE.write_text(json.dumps({"machine": machine(), "tolerance": TOLERANCE, "ratios": rounded}, indent=1) + "\n")
    baseline = json.loads(BASELINE.read_text())
    found = moved(now, baseline["ratios"], baseline["tolerance"])
    print(report(now, baseline["ratios"], found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
