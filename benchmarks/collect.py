"""Mean and spread over seeds of finished runs, as a Markdown table and a JSON file.

    for seed in 0 1 2; do
      miras train recipes/quickstart.yaml out=runs/seed$seed train.seed=$seed train.threads=1
      for model in moneta memora; do
        miras train recipes/quickstart.yaml out=runs/$model$seed train.seed=$seed train.threads=1 "compare=[]" \
          model.name=$model model.match_parameters=2250608
      done
    done
    python benchmarks/collect.py runs/* --out docs/results/quickstart
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from miras.train.folder import read_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for run in arguments.runs:
        found = [read_result(file.parent) for file in sorted(run.rglob("result.json"))]
        for result in found:
            if result is not None:
                rows.append({key: value for key, value in vars(result).items() if key not in ("folder", "sample")})
    by_model: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_model[row["model"]].append(row)
    lines = [
        "| model | parameters | seeds | validation loss (nats a token), mean +- sd | bits a byte | tokens a second |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in sorted(by_model.items(), key=lambda item: np.mean([row["loss"] for row in item[1]])):
        loss, bits, speed = (np.array([row[key] for row in found]) for key in ("loss", "bits_per_byte", "tokens_per_second"))
        spread = f"{loss.std(ddof=1):.3f}" if len(loss) > 1 else "-"
        seeds = ", ".join(str(row["seed"]) for row in found)
        lines.append(
            f"| {name} | {found[0]['parameters']:,} | {seeds} | {loss.mean():.3f} +- {spread} "
            f"({', '.join(f'{x:.3f}' for x in loss)}) | {bits.mean():.3f} | {np.median(speed):,.0f} |"
        )
    print("\n".join(lines))
    arguments.out.with_suffix(".json").write_text(json.dumps(rows, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
