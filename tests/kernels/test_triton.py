"""The triton path in Triton's interpreter, and where the path is taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import miras
from miras import bias, learning, memory, retention
from miras.design import Design
from miras.kernels import triton
from tests.problems import random_problem, run

CASES = Path(__file__).with_name("triton_cases.py")
PLAIN = Design(memory.MLP(2, 2.0), bias.L2(), retention.L2(), learning.GradientDescent(), refresh=16)


def slow(group: str) -> Any:
    return pytest.param(group, marks=pytest.mark.slow)


@pytest.mark.parametrize("group", ["quick", *map(slow, ("memories", "biases", "links", "learnings", "shapes", "sequences"))])
def test_in_the_interpreter(group: str) -> None:
    """In a process of its own, since Triton has to be told before it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES), "-k", group]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = CASES.parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_compiled_for_a_gpu(tmp_path: Path) -> None:
    """Kernels of usual sizes compile for an H100 and fit into it, as `benchmarks/ptxas.py` says, which needs no GPU."""
    file = tmp_path / "ptxas.json"
    command = [sys.executable, "benchmarks/ptxas.py", "--cases", "matrix", "plain-16", "float32", "--json", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run(command, env=environment, cwd=CASES.parents[2], check=True)
    rows = json.loads(file.read_text())
    assert [x["block"] for x in rows] == [64, 64, 16, 16, 16, 16]
    for x in rows:
        assert 0 < x["shared"] <= 232_448, x
        assert 64 < x["registers"] <= 255, x
        assert x["products"] > 0, x


@dataclass(frozen=True)
class Listed(bias.L2):
    """A user's bias with a field that has no hash."""

    scales: Any = (1.0,)


@dataclass(frozen=True)
class StepByStep(learning.GradientDescent):
    """A user's rule that gives its step only."""

    linear = False


def test_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    cuda = torch.device("cuda")

    def refused(design: Design = PLAIN, device: torch.device = cuda, **facts: Any) -> str:
        return miras.explain(design, device=device, **facts).refusals["triton"]

    assert "has not been measured" in refused()
    assert "has not been measured" in refused(widths=(64, 64))
    assert "powers of two; keys of 48, values of 48" in refused(widths=(48, 48))
    assert "262144 numbers of state a head" in refused(widths=(256, 256))
    assert "needs a CUDA device, not cpu" in refused(device=torch.device("cpu"))
    assert "gives no block matrices" in refused(replace(PLAIN, learning=StepByStep()))
    assert "cannot be hashed" in refused(replace(PLAIN, bias=Listed([1.0])))
    assert miras.engine.plan(PLAIN, "triton", device=cuda).path == "triton"
    with pytest.raises(ValueError, match="path='triton' refuses this design: it needs a CUDA device, not cpu"):
        run(random_problem(PLAIN), path="triton")
    monkeypatch.setattr(triton, "installed", lambda package: False)
    assert "triton is not installed" in refused()


def test_blocks_fit_the_window() -> None:
    problem = random_problem(PLAIN)
    assert triton.unfit(PLAIN, (16, 16)) is None
    wide = replace(PLAIN, memory=memory.MLP(2, 4096.0))
    cases = [(PLAIN, *x) for x in ((1, 1), (8, 1), (16, 16), (48, 16), (96, 32), (64, 64), (256, 64))]
    for design, refresh, length, *operands in (*cases, (wide, 64, 16), (wide, 64, 1, "float32")):
        tensors = {name: problem[name].transpose(1, 2) for name in ("q", "k", "v", "lr", "log_decay")}
        shapes = design.memory.weights(4, 4)
        built = miras.engine.problem.Problem(
            replace(design, refresh=refresh), **tensors, gates={}, weights=problem["weights"], slow={}, shapes=shapes
        )
        assert triton.TritonPrograms(*operands or ["bfloat16"]).block_length(built) == length
