"""Multi-query associative recall by the named models at their best honest settings.

    python benchmarks/mqar.py --out docs/results/mqar.json [--models yaad moneta] [--seeds 0 1 2]

128 tokens, 12 pairs, 2 layers of width 64 with 2 heads, 400 steps of batch 32 on fresh samples.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import miras
from miras.evals.recall import Recipe, solve
from miras.tasks import MQAR

FAST: dict[str, Any] = {"inputs": {"rate": {"family": "gate map", "kind": "Sigmoid", "initial": 4.0, "maximum": 8.0}}}
FASTER: dict[str, Any] = {"inputs": {"rate": {"family": "gate map", "kind": "Sigmoid", "initial": 6.0, "maximum": 12.0}}}
SLOW_DECAY: dict[str, Any] = {
    "inputs": {"aligned": True, "decay": {"family": "gate map", "kind": "LogDecay", "horizon": 1000.0}}
}
NO_RESIDUAL: dict[str, Any] = {"memory": {"kind": "MLP", "residual": False}}

SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "yaad, rate 4": (FAST, {"lr": 5e-3}),
    "memora, rate 4": (FAST, {"lr": 5e-3}),
    "moneta, rate 6, no residual": ({**FASTER, **NO_RESIDUAL}, {"lr": 5e-3}),
    "moneta, rate 6, no residual, lr 8e-3": ({**FASTER, **NO_RESIDUAL}, {"lr": 8e-3}),
    "moneta, rate 6": (FASTER, {"lr": 5e-3}),
    "yaad": ({}, {"lr": 5e-3}),
    "gated_deltanet": ({}, {"lr": 5e-3}),
    "gated_deltanet, aligned, slow decay": (SLOW_DECAY, {"lr": 5e-3}),
    "transformer": ({}, {"lr": 5e-3}),
}
"""Per row: overrides of the design that its name starts with, and of the training recipe."""


def run(name: str, seed: int, task: MQAR) -> dict[str, Any]:
    """One training run; its settings and what it gave."""
    overrides, training = SETTINGS[name]
    torch.manual_seed(seed)
    design = miras.models.named(name.split(",")[0], **overrides)
    config = miras.MirasConfig(design=design, vocab_size=task.vocab_size, hidden_size=64, num_hidden_layers=2, num_heads=2)
    model = miras.MirasForCausalLM(config)
    recipe = Recipe(seed=seed, **training)
    result = solve(model, task, recipe)
    return {
        "model": name,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": result.accuracy,
        "largest_gradient": result.largest_gradient,
        "seconds": result.seconds,
        "lr": recipe.lr,
        "losses": [round(sum(result.losses[i : i + 20]) / 20, 4) for i in range(0, len(result.losses), 20)],
        "design": overrides,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    done = {(row["model"], row["seed"]) for row in rows}
    for seed in arguments.seeds:
        for name in arguments.models:
            if (name, seed) in done:
                continue
            rows.append(run(name, seed, MQAR()))
            arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
            print(name, seed, f"{rows[-1]['accuracy']:.3f}", flush=True)


if __name__ == "__main__":
    main()
