"""Decoding after long contexts: tokens a second, what `generate` adds, memory, and whether anything grows with the steps.

    python benchmarks/decode.py [--models yaad gated_deltanet] [--contexts 1024 4096 16384] [--threads 2] [--growth 2000]

Language models of the quickstart's kind (width 256, 4 layers, 4 heads, 4,096 tokens of vocabulary, random weights), batch 1,
float32, on a CPU; and of 340 to 380M parameters on a GPU, after 2,048 tokens:

    python benchmarks/decode.py --device cuda --dtype bfloat16 --width 1024 --layers 24 --heads 16 --vocabulary 32000 \
        --contexts 2048

The context comes in blocks of 2,048 tokens by `miras.stream`; then copies of its cache go on for 64 tokens: in a bare loop
that calls the model and takes the likeliest token, and by `generate` (the difference of 96 and 32 tokens, so that its
beginning does not count). "compiled" is the same after `miras.compile_decoding`; "first" are the seconds of its first
tokens, compiling included; "held" is the memory of the process, or what is allocated on the GPU. Run against an older
version of the package (PYTHONPATH), it gives the figures before it.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import time
import tracemalloc
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

import miras
from miras.bench.case import DTYPES
from miras.lm import MirasCache, MirasConfig, MirasForCausalLM


@dataclass(frozen=True)
class Kind:
    """Sizes of the models, and where they run."""

    width: int = 256
    layers: int = 4
    heads: int = 4
    vocabulary: int = 4096
    device: str = "cpu"
    dtype: str = "float32"

    def build(self, name: str) -> MirasForCausalLM:
        """A model of these sizes."""
        torch.manual_seed(0)
        sizes = {"vocab_size": self.vocabulary, "hidden_size": self.width, "num_hidden_layers": self.layers}
        config = MirasConfig(design=miras.models.named(name), num_heads=self.heads, **sizes)
        return MirasForCausalLM(config).eval().to(self.device, DTYPES[self.dtype])

    def tokens(self, count: int) -> Tensor:
        """Random tokens [1, count]."""
        return torch.randint(0, self.vocabulary, (1, count)).to(self.device)

    def held_mb(self) -> float:
        """Memory: resident in the process, or allocated on the GPU."""
        if self.device != "cpu":
            return torch.cuda.memory_allocated(self.device) / 2**20
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@torch.no_grad()
def bare(model: MirasForCausalLM, token: Tensor, cache: MirasCache, count: int) -> list[float]:
    """Seconds of each of `count` tokens, each known before the next begins."""
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        token.tolist()  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    return seconds


def generated(model: MirasForCausalLM, ids: Tensor, cache: MirasCache) -> float:
    """Seconds a token of `generate` going on after ids[:, :-1]."""
    seconds = []
    for count in (32, 96):
        past = copy.deepcopy(cache)
        began = time.perf_counter()
        model.generate(ids, past_key_values=past, max_new_tokens=count, do_sample=False, pad_token_id=0)
        seconds.append(time.perf_counter() - began)
    return (seconds[1] - seconds[0]) / 64


def contexts(kind: Kind, name: str, lengths: list[int]) -> None:
    """A row for each context and way of decoding."""
    plain = kind.build(name)
    ways = {"plain": plain}
    if hasattr(miras, "compile_decoding") and name != "transformer":
        ways["compiled"] = kind.build(name)
        miras.compile_decoding(ways["compiled"])
    ids = kind.tokens(max(lengths) + 1)
    cache, done, first = MirasCache(), 0, dict.fromkeys(ways, 0.0)
    for length in sorted(lengths):
        for _ in miras.stream(plain, ids[:, done:length], 2048, cache):
            pass
        done = length
        for way, model in ways.items():
            began = time.perf_counter()
            bare(model, ids[:, length : length + 1], copy.deepcopy(cache), 32)
            first[way] = first[way] or time.perf_counter() - began
        loops: dict[str, list[float]] = {way: [] for way in ways}
        whole: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(3):
            for way, model in ways.items():
                loops[way] += bare(model, ids[:, length : length + 1], copy.deepcopy(cache), 64)
                whole[way].append(generated(model, ids[:, : length + 1], cache))
        gc.collect()
        for way in ways:
            loop, generate = statistics.median(loops[way]), statistics.median(whole[way])
            print(
                f"| {name} | {length:,} | {way} | {1 / loop:,.0f} | {1e3 * loop:.2f} | {1e3 * generate:.2f} | "
                f"{cache.nbytes / 2**20:.1f} | {kind.held_mb():.0f} | {first[way]:.1f} |",
                flush=True,
            )


def growth(kind: Kind, name: str, steps: int) -> None:
    """What is held at an early step and at the last one (both at a window's end)."""
    model, cache = kind.build(name), MirasCache()
    if hasattr(miras, "compile_decoding") and name != "transformer":
        miras.compile_decoding(model)
    token = kind.tokens(1)
    bare(model, token.expand(1, 64), cache, 1)
    bare(model, token, cache, 192 - 1)
    tracemalloc.start()
    seen = []
    for count in (64, steps // 64 * 64):
        bare(model, token, cache, count)
        gc.collect()
        tensors = sum(type(x) is Tensor for x in gc.get_objects())
        seen.append((cache.nbytes, tensors, tracemalloc.get_traced_memory()[0] / 1024, kind.held_mb()))
    tracemalloc.stop()
    for what, before, after in zip(("cache bytes", "live tensors", "Python KB", "held MB"), *seen, strict=True):
        print(f"| {name} | {what} | {before:,.0f} | {after:,.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["yaad", "moneta", "memora", "gated_deltanet", "transformer"])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 65536, 100_000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--growth", type=int, metavar="STEPS", help="only look for growth over so many steps")
    for size in ("width", "layers", "heads", "vocabulary"):
        parser.add_argument(f"--{size}", type=int, default=getattr(Kind, size))
    parser.add_argument("--device", default=Kind.device, help="cpu or cuda")
    parser.add_argument("--dtype", choices=list(DTYPES), default=Kind.dtype)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kind = Kind(**{field.name: getattr(options, field.name) for field in fields(Kind)})
    if options.growth:
        print(f"| model | held | after 256 steps | after {options.growth // 64 * 64:,} more |\n|---|---|---|---|")
        for name in options.models:
            growth(kind, name, options.growth)
        return
    print("| model | context | steps | tokens/s | ms a token | ms by generate | cache MB | held MB | first s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.models:
        contexts(kind, name, options.contexts)


if __name__ == "__main__":
    main()
