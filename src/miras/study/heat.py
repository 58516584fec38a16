"""Heat maps: a metric over two of a study's keys, as grids of estimates."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from miras.study.plan import short, shown, varied
from miras.study.results import Cell, Results, place_name
from miras.study.statistics import Estimate

Candidate = tuple[Cell, dict[str, Any]]
"""The runs of a setting, and with which settings of `evaluate` they are run."""


@dataclass(frozen=True)
class Panel:
    """A heat map: its axes' names and values, y from the bottom up, and the estimate at each (x, y) with finished runs.

    words   without a number: "failed" if all runs did, "not run" if some are yet to be, none if no run is planned
    """

    title: str
    x: str
    y: str
    xs: list[Any]
    ys: list[Any]
    estimates: Mapping[tuple[Any, Any], Estimate]
    words: Mapping[tuple[Any, Any], str]
    higher_is_better: bool

    @property
    def values(self) -> np.ndarray:
        """Means [y, x], NaN where no run finished."""
        at = self.estimates
        return np.array([[at[x, y].mean if (x, y) in at else math.nan for x in self.xs] for y in self.ys])


def heat(results: Results, entry: Mapping[str, Any]) -> list[Panel]:
    """The panels of a heat map. Where other axes differ too, the setting with the best validation score stands."""
    x_key, y_key = entry["x"], entry["y"]
    places: dict[tuple[str, str, str], dict[tuple[Any, Any], list[Candidate]]] = {}
    for cell in results.cells:
        if cell.model not in entry.get("models", [cell.model]):
            continue
        for point, changed in _points(cell, (x_key, y_key)):
            if x_key in point and y_key in point and not _unasked(results, entry, cell, changed):
                place = (cell.task, cell.size, "" if "model" in (x_key, y_key) else cell.model)
                places.setdefault(place, {}).setdefault((point[x_key], point[y_key]), []).append((cell, changed))
    return [_panel(results, entry, place, found) for place, found in places.items()]


def _panel(
    results: Results,
    entry: Mapping[str, Any],
    place: tuple[str, str, str],
    found: Mapping[tuple[Any, Any], list[Candidate]],
) -> Panel:
    metric, condition = _asked(results, entry, place[0])
    xs, ys = (_ordered(at[i] for at in found) for i in (0, 1))
    estimates, words = dict[tuple[Any, Any], Estimate](), dict[tuple[Any, Any], str]()
    for at, candidates in found.items():
        cell, changed = reduce(lambda one, other: other if results.better(other[0], one[0]) else one, candidates)
        value = results.estimate(cell.values(metric, condition, changed))
        if value is not None:
            estimates[at] = value
        else:
            words[at] = "not run" if any(set(each.runs) - set(each.rows) for each, _ in candidates) else "failed"
    measured = f"{place_name(*place[:2])}{f', {condition}' if condition else ''}: {metric}"
    title = "\n".join(part for part in (place[2], measured) if part)
    keys = varied(results.study)
    names = _axis(entry["x"], entry["y"], keys), _axis(entry["y"], entry["x"], keys)
    rows = ys if all(isinstance(y, (int, float)) for y in ys) else ys[::-1]  # The first of words is on top.
    task = results.task(place[0])
    return Panel(title, *names, xs, rows, estimates, words, task.higher_is_better and metric == task.metric)


def _asked(results: Results, entry: Mapping[str, Any], task: str) -> tuple[str, str | None]:
    """A heat map's metric, by default the task's, and its condition."""
    return entry.get("metric") or results.task(task).metric, entry.get("condition")


def _unasked(results: Results, entry: Mapping[str, Any], cell: Cell, changed: Mapping[str, Any]) -> bool:
    """Whether finished runs have nothing to show: another task's metric or condition is asked for."""
    return bool(cell.done) and not cell.values(*_asked(results, entry, cell.task), changed)


def _points(cell: Cell, keys: Sequence[str]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Coordinates of a cell, once for each setting of `evaluate` if one of the keys asks for it."""
    own = {**{key: _plain(value) for key, value in cell.settings}, "model": cell.model}
    if not any(key.startswith("evaluate.") for key in keys):
        return [(own, {})]
    changes = next((run.run.evaluate for run in cell.runs.values()), [])
    return [
        ({**own, **{f"evaluate.{key}": _plain(value) for key, value in item["settings"].items()}}, item["settings"])
        for item in changes
    ]


def tick(value: Any) -> str:
    """A coordinate for people."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _ordered(values: Iterable[Any]) -> list[Any]:
    """Each once: numbers from small to large, words as they come."""
    found = list(dict.fromkeys(values))
    return sorted(found) if all(isinstance(value, (int, float)) for value in found) else found


def _plain(value: Any) -> Any:
    """A coordinate: numbers and words as they are, choices as text."""
    return value if isinstance(value, (int, float, str)) else shown([("", value)]).strip()


def _axis(key: str, other: str, keys: Collection[str]) -> str:
    """A key for people: `evaluate.design.refresh` is the refresh that a model is run with."""
    word = "" if key == "model" else short(key.removeprefix("evaluate."), keys)
    if key.startswith("evaluate."):
        return f"{word} at run time"
    return f"{word} in training" if other.startswith("evaluate.") else word
