"""What every named model costs: training, reading and decoding, in time and memory; writes docs/results/models.md.

    OMP_NUM_THREADS=2 python benchmarks/models.py --out docs/results/models.md [--models yaad transformer]

Language models of one size (width 256, 4 layers, 4 heads, 4,096 tokens of vocabulary, random weights, float32), each in a
process of its own. Models whose figures are in the folder --keep already are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import miras
from miras.bench.measure import machine
from miras.lm import MirasCache, MirasConfig, MirasForCausalLM
from miras.train.callbacks import peak_memory, reset_peak_memory
from miras.train.model import parameter_count

BATCH, TOKENS, DECODED = 2, 1024, 64

HEAD = f"""
Language models of one size but for what mixes their tokens (width 256, 4 layers, 4 heads of 64, feed-forward of the default
width, 4,096 tokens of vocabulary, random weights, float32), on their default paths, each in a process of its own, one after
the other. The page is written by

    OMP_NUM_THREADS=2 python benchmarks/models.py --out docs/results/models.md

- train: one step (forward, backward, AdamW) on {BATCH} sequences of {TOKENS:,} tokens; peak MB: resident memory of such
  a step above that of the process before it had a model, so weights, gradients and AdamW's state are part of it.
- read: the same tokens without gradients, states kept. decode: one sequence after {TOKENS:,} tokens, token by token in a
  bare loop, as it is and after `miras.compile_decoding`; cache: what that sequence holds then.
- tokens/s and ms: medians of {{repeats}} steps (of {DECODED} tokens for decode), training's with the lowest and the highest.
  first s: seconds of the first training step, which is where programs are built or found on disk.
"""


def measured(name: str, repeats: int, threads: int) -> dict[str, Any]:
    """The figures of a model, in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    reset_peak_memory()
    before = peak_memory(True)
    config = MirasConfig(
        miras.models.named(name), vocab_size=4096, hidden_size=256, num_hidden_layers=4, num_heads=4, use_cache=False
    )
    model = MirasForCausalLM(config)
    ids = torch.randint(0, config.vocab_size, (BATCH, TOKENS))
    optimiser = torch.optim.AdamW(model.parameters())

    def train() -> None:
        model(ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=False)

    (first,) = seconds(train, 1)
    reset_peak_memory()
    steps = seconds(train, repeats)
    found = {"parameters": parameter_count(model), "first": first, "train": steps, "peak": peak_memory(True) - before}
    model.eval()
    with torch.no_grad():
        found["read"] = seconds(lambda: model(ids, use_cache=True), repeats + 1)[1:]
        cache = MirasCache()
        model(ids[:1], past_key_values=cache, use_cache=True)
        found |= {"cache": cache.nbytes, "decode": decoded(model, cache)}
        try:
            miras.compile_decoding(model)
        except ValueError as error:
            found |= {"compiled": None, "why": str(error)}
        else:
            found["compiled"] = decoded(model, cache)
    return found | {"machine": machine()}


def seconds(work: Callable[[], object], repeats: int) -> list[float]:
    """Of each repeat."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return found


def decoded(model: MirasForCausalLM, cache: MirasCache) -> float:
    """Median seconds of a token, after as many that are not counted."""
    token, past = torch.zeros(1, 1, dtype=torch.long), copy.deepcopy(cache)
    return statistics.median(seconds(lambda: model(token, past_key_values=past, use_cache=True), 2 * DECODED)[DECODED:])


def row(name: str, found: dict[str, Any]) -> str:
    """A line of the table."""
    if "memory" in found:
        return f"| {name} | killed: {found['memory'] / 2**30:.0f} GB of memory were not enough |" + 8 * " |"
    rates = [BATCH * TOKENS / x for x in found["train"]]
    compiled = "-" if found["compiled"] is None else f"{1e3 * found['compiled']:.1f}"
    cells = [
        name,
        f"{found['parameters'] / 1e6:.1f}",
        f"{statistics.median(rates):,.0f}",
        f"{min(rates):,.0f}-{max(rates):,.0f}",
        f"{found['peak'] / 2**20:,.0f}",
        f"{found['first']:.1f}",
        f"{BATCH * TOKENS / statistics.median(found['read']):,.0f}",
        f"{1e3 * found['decode']:.1f}",
        compiled,
        f"{found['cache'] / 2**20:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def page(found: dict[str, dict[str, Any]], repeats: int) -> str:
    """The page."""
    names = ("model", "million parameters", "train tokens/s", "low-high", "peak MB", "first s", "read tokens/s", "decode ms")
    names = (*names, "compiled ms", "cache MB")
    machines = [x["machine"] for x in found.values() if "machine" in x]
    loads = [x["load"] for x in machines if x["load"] is not None]
    about = "{processor}, {cores} cores, {threads} threads, PyTorch {torch}".format_map(machines[0])
    return "\n".join(
        [
            *("# What every named model costs", "", HEAD.strip().replace("{repeats}", str(repeats)), ""),
            f"Machine: {about}, load {min(loads):.1f} to {max(loads):.1f} when a model was done.",
            *("", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)),
            *(row(name, x) for name, x in found.items()),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(miras.models.NAMED))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--keep", type=Path, default=Path("runs/models"))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        (name,) = options.models
        options.out.write_text(json.dumps(measured(name, options.repeats, options.threads)))
        return
    options.keep.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in options.models:
        file = options.keep / f"{name}.json"
        if not file.exists():
            flags = ["--threads", str(options.threads), "--repeats", str(options.repeats), "--out", str(file)]
            done = subprocess.run([sys.executable, __file__, "--one", "--models", name, *flags], check=False)
            if done.returncode == -signal.SIGKILL:  # What the system does where memory runs out.
                file.write_text(json.dumps({"memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}))
            else:
                done.check_returncode()
        found[name] = json.loads(file.read_text())
        print(row(name, found[name]), flush=True)
    options.out.write_text(page(found, options.repeats) + "\n")


if __name__ == "__main__":
    main()
