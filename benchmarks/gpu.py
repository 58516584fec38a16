"""How fast path "triton" is on a GPU: runs `miras bench` on it and writes docs/results/gpu.md (`make bench-gpu`).

    python benchmarks/gpu.py --out docs/results/gpu.md [--keep runs/gpu]

Sections whose figures are in the folder --keep already are not measured again. Whole language models are decoded by
benchmarks/decode.py.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from miras.bench import Results, markdown
from miras.bench.show import machine_line

PLAIN = "titans_lmm learning.kind=GradientDescent"
TYPES = "--device cuda --dtype bfloat16 --batch 8 --path triton"
SIZES = f"{TYPES} --heads 16 --head-dim 64"

SECTIONS: dict[str, tuple[str, str]] = {
    "plain": (
        "MLP 64->256->64, L2, gradient descent",
        f"{PLAIN} {SIZES} --path fused --tokens 4096 --refresh 16,64 --peers floor,ttt-mlp,titans-pytorch,sdpa",
    ),
    "momentum": ("The same with momentum (Titans)", f"titans_lmm {SIZES} --tokens 4096 --refresh 16,64 --peers floor"),
    "yaad": ("Yaad", f"yaad {SIZES} --tokens 4096 --peers floor"),
    "matrix": ("A matrix memory", f"{PLAIN} memory.kind=Matrix {SIZES} --tokens 4096 --refresh 64 --peers floor,sdpa"),
    "online": ("Exact online: refresh 1", f"{PLAIN} {SIZES} --tokens 4096 --refresh 1 --peers floor"),
    "wide": ("Heads of 128 channels", f"{PLAIN} {TYPES} --heads 8 --head-dim 128 --tokens 4096 --refresh 64 --peers floor"),
    "length": (
        "Sequence length, one sequence",
        f"{PLAIN} {SIZES} --batch 1 --tokens 8192,32768,131072 --refresh 64 --mode forward+backward --repeats 3",
    ),
    "decode": ("Decoding 64 tokens after a context", f"yaad {SIZES} --tokens 1024 --mode decode --repeats 3 --no-memory"),
}
"""Per section its heading and the arguments of `miras bench`."""

DECODING = "--device cuda --dtype bfloat16 --width 1024 --layers 24 --heads 16 --vocabulary 32000 --contexts 2048"
"""Arguments of benchmarks/decode.py."""

HEAD = """
Time, FLOP rate and peak memory of `miras.memorize` on one GPU, in bfloat16, with its peers in turn within one run. `triton`
is the path of that name (docs/gpu.md), `fused` that of a window as one PyTorch graph, `miras` the default one, `floor` the
matrix products alone, in bfloat16 too. Columns are those of `miras bench`; `of GEMM` divides by the floor's rate. The page
is written by

    make bench-gpu
"""


def measured(arguments: str, file: Path) -> Results:
    """The figures of a section, from its command unless they are there already."""
    if not file.exists():
        command = [sys.executable, "-m", "miras.cli", "bench", *shlex.split(arguments), "--json", str(file)]
        subprocess.run(command, check=True)
    return Results.from_dict(json.loads(file.read_text()))


def decoding(file: Path) -> str:
    """What benchmarks/decode.py prints, from running it unless that is there already."""
    if not file.exists():
        command = [sys.executable, str(Path(__file__).with_name("decode.py")), *shlex.split(DECODING)]
        file.write_text(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return file.read_text()


def page(found: dict[str, Results], decoded: str) -> str:
    """The page."""
    machine = machine_line(next(iter(found.values())))
    lines = ["# Speed on a GPU", "", HEAD.strip(), "", f"Machine: {machine}"]
    for name, (heading, arguments) in SECTIONS.items():
        refused = [f"- not run: {x.name}, {x.mode}: {x.reason}" for x in found[name].refusals]
        lines += ["", f"## {heading}", "", f"    miras bench {arguments}", "", markdown(found[name]), "", *refused]
    lines += ["", "## Language models of 340 to 380M parameters, one sequence", ""]
    lines += [f"    python benchmarks/decode.py {DECODING}", "", "Columns: [decode.md](decode.md).", "", decoded.strip()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", type=Path, default=Path("runs/gpu"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device is usable here; this page is measured on a GPU only")
    arguments.keep.mkdir(parents=True, exist_ok=True)
    found = {name: measured(command, arguments.keep / f"{name}.json") for name, (_, command) in SECTIONS.items()}
    arguments.out.write_text(page(found, decoding(arguments.keep / "decode.txt")))


if __name__ == "__main__":
    main()
