"""The path "fla": what it accepts, what it says otherwise, and its kernels in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import miras
from miras import bias, learning, models, retention
from miras.engine.dispatch import plan
from miras.kernels import fla_ops, triton
from tests.kernels import fla_cases
from tests.kernels.fla_cases import CASES
from tests.problems import random_problem

FILE = Path(fla_cases.__file__)
QUICK = ("gated_deltanet, anchored",)
CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", [pytest.param(x, marks=[] if x in QUICK else pytest.mark.slow) for x in CASES])
def test_in_the_interpreter(name: str) -> None:
    """In a process of its own, since Triton has to be told before it is imported."""
    tests = [f"{FILE}::test_equals_the_reference[{name}-{dtype}]" for dtype in ("float32", "float16")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=FILE.parents[2], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton, "installed", lambda package: True)


@pytest.mark.usefixtures("installed")
def test_taken_by_itself_on_a_cuda_device_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for design, *_ in CASES.values():
        assert plan(design, device=CUDA).path == "fla"
        assert plan(design).path in ("native", "triangular")
        assert "need a CUDA device, not cpu" in plan(design).refusals["fla"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "ask for it by name" in plan(models.gla()).refusals["fla"]
    assert plan(models.gla(), "fla").path == "fla"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bias": bias.Huber("norm")}, "the gradient of bias Huber is not affine"),
        ({"retention": retention.LqRms(3.0)}, "retention LqRms is more than a decay"),
        ({"retention": retention.ProximalElasticNet(0.1)}, "retention ProximalElasticNet is more than a decay"),
        ({"learning": learning.Momentum()}, "learning Momentum is not"),
        ({"learning": learning.Omega(2)}, "learning Omega is not"),
        ({"bias": bias.Dot(), "refresh": 4, "gradient_at": "previous"}, "refresh=4: the ops keep no gradient point"),
        ({"memory": miras.memory.MLP(2)}, "memory MLP is not one matrix"),
        ({"memory": miras.memory.Vector()}, "memory Vector is not one matrix"),
    ],
)
def test_refuses_by_facts(change: dict[str, Any], reason: str) -> None:
    assert reason in plan(models.gated_deltanet(**change), device=CUDA).refusals["fla"]


@pytest.mark.usefixtures("installed")
def test_refuses_what_the_kernels_cannot_take() -> None:
    assert "not in float64" in str(miras.explain(models.gla(), device="cuda", dtype=torch.float64))
    assert "up to 256 channels, not 512" in plan(models.gla(), device=CUDA, widths=(512, 64)).refusals["fla"]


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "installed", lambda package: package != "triton")
    assert "triton not installed: pip install 'torch-miras[gpu]'" in str(miras.explain(models.gla(), device="cuda"))


@pytest.fixture
def looked_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The packages that are looked for, and not found."""
    names: list[str] = []
    monkeypatch.setattr(importlib.util, "find_spec", names.append)
    triton.installed.cache_clear()
    yield names
    triton.installed.cache_clear()


def test_packages_are_looked_for_once(looked_for: list[str]) -> None:
    for _ in range(3):
        assert "fla and triton not installed" in plan(models.gla(), device=CUDA).refusals["fla"]
    assert sorted(looked_for) == ["fla", "triton"]


def test_asked_for_by_name_it_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=r"path='fla' refuses this design: .*; able: triton, native, triangular"):
        miras.memorize(**random_problem(models.gla()), path="fla")


def test_leaky_learners() -> None:
    rules = [learning.GradientDescent(), learning.MultiStep(3), learning.Momentum(), learning.Omega(1), learning.Averaged()]
    assert [fla_ops._leaky(rule) for rule in rules] == [True, True, False, True, False]
