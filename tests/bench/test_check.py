"""What the guard on speed compares; it measures nothing here."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[2] / "benchmarks/check.py"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("check", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check"] = module  # where its dataclass looks its annotations up
    spec.loader.exec_module(module)
    return module


def test_what_moved() -> None:
    check = load()
    before = {"same": 2.0, "slower": 2.0, "faster": 2.0, "gone": 1.0}
    now = {"same": 2.39, "slower": 2.41, "faster": 1.66, "new": 1.0}
    found = check.moved(now, before, 0.2)
    assert set(found) == {"slower", "faster", "new", "gone"}
    assert math.isnan(found["new"])
    lines = check.report(now, before, found).splitlines()
    assert [line.split()[3] for line in lines] == ["ok", "MOVED", "MOVED", "NEW", "NEW"]
    assert "MOVED by +21%" in lines[1] and "MOVED by -17%" in lines[2]


def test_the_baseline_is_of_these_ratios() -> None:
    check = load()
    baseline = json.loads(check.BASELINE.read_text())
    assert {ratio.name for ratio in check.RATIOS} < set(baseline["ratios"])
    assert all(ratio.case().design.parametric for ratio in check.RATIOS)
    assert baseline["tolerance"] == check.TOLERANCE


def test_it_measures(monkeypatch: Any) -> None:
    """On sequences of 128 tokens, once each: every ratio is positive and is in the baseline."""
    check = load()
    monkeypatch.setattr(check, "TOKENS", 128)
    found = check.measured(1)
    assert set(found) == set(json.loads(check.BASELINE.read_text())["ratios"])
    assert all(x > 0 for x in found.values())
