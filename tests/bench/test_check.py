"""What the guard on speed compares; it measures nothing here."""

from __future__ import annotations

import json
import math
from typing import Any

from tests.bench.scripts import script


def test_what_moved() -> None:
    check = script("check")
    before = {"same": 2.0, "slower": 2.0, "faster": 2.0, "gone": 1.0}
    now = {"same": 2.39, "slower": 2.41, "faster": 1.66, "new": 1.0}
    found = check.moved(now, before, 0.2)
    assert set(found) == {"slower", "faster", "new", "gone"}
    assert math.isnan(found["new"])
    lines = check.report(now, before, found).splitlines()
    assert [line.split()[3] for line in lines] == ["ok", "MOVED", "MOVED", "NEW", "NEW"]
    assert "MOVED by +21%" in lines[1] and "MOVED by -17%" in lines[2]


def test_the_baseline_is_of_these_ratios() -> None:
    check = script("check")
    baseline = json.loads(check.BASELINE.read_text())
    assert {ratio.name for ratio in check.RATIOS} < set(baseline["ratios"])
    assert all(ratio.case().design.parametric for ratio in check.RATIOS)
    assert baseline["tolerance"] == check.TOLERANCE


def test_it_measures(monkeypatch: Any) -> None:
    """On sequences of 32 tokens, once each: every ratio is positive and is in the baseline."""
    check = script("check")
    monkeypatch.setattr(check, "TOKENS", 32)
    found = check.measured(1)
    assert set(found) == set(json.loads(check.BASELINE.read_text())["ratios"])
    assert all(x > 0 for x in found.values())
