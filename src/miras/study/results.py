"""A study's rows in their places: values by task, size, model, setting and seed, and the settings that are selected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from miras.study.config import Study
from miras.study.plan import Planned
from miras.study.run import Row
from miras.study.search import finished_batches, score
from miras.study.statistics import Estimate, estimate
from miras.study.store import Store
from miras.tasks import Task

Settings = tuple[tuple[str, Any], ...]


@dataclass
class Cell:
    """The runs of one task, size, model and setting, a seed each; `score` is what it is selected by, None if one failed."""

    task: str
    size: str
    model: str
    settings: Settings
    runs: dict[int, Planned]
    rows: dict[int, Row]
    score: float | None

    @property
    def done(self) -> list[Row]:
        """Rows of the runs that finished well."""
        return [row for row in self.rows.values() if row.status == "done"]

    def values(
        self, metric: str, condition: str | None = None, changed: Mapping[str, Any] | None = None
    ) -> dict[int, float]:
        """A metric by seed, under a condition (default: the first), with the settings of `evaluate` given."""
        found: dict[int, float] = {}
        for seed, row in self.rows.items():
            for test in row.tests if row.status == "done" else ():
                if (
                    condition in (None, test["condition"])
                    and test["settings"] == (changed or {})
                    and metric in test["metrics"]
                ):
                    found.setdefault(seed, test["metrics"][metric])
        return found

    @property
    def conditions(self) -> list[str]:
        """Of the tests, in their order."""
        return list(dict.fromkeys(test["condition"] for row in self.done for test in row.tests))

    @property
    def label(self) -> str:
        """The settings for people."""
        return next(iter(self.runs.values())).words


@dataclass
class Results:
    """Everything that a study has come to so far. `missing` runs have no row yet."""

    study: Study
    cells: list[Cell] = field(default_factory=list[Cell])
    missing: list[Planned] = field(default_factory=list[Planned])

    @cached_property
    def selected(self) -> dict[tuple[str, str, str], Cell]:
        """By task, size and model the setting with the best score on validation draws; unfinished ones come last."""
        found: dict[tuple[str, str, str], Cell] = {}
        for cell in self.cells:
            place = (cell.task, cell.size, cell.model)
            if place not in found or self.better(cell, found[place]):
                found[place] = cell
        return found

    def better(self, cell: Cell, other: Cell) -> bool:
        """Whether a cell is to be selected before another: the one that went on to more seeds, then the better one."""
        if len(cell.runs) != len(other.runs):
            return len(cell.runs) > len(other.runs)
        if cell.score is None or other.score is None:
            return cell.score is not None or (other.score is None and len(cell.done) > len(other.done))
        return cell.score > other.score if self.task(cell.task).higher_is_better else cell.score < other.score

    def task(self, name: str) -> Task:
        """A task by its name in the study."""
        return Task.from_dict({key: value for key, value in self.study.tasks[name].items() if key not in ("train", "size")})

    def estimate(self, values: Mapping[int, float]) -> Estimate | None:
        """Mean and interval over seeds; None without values."""
        return estimate(list(values.values()), self.study.statistics) if values else None

    @property
    def failures(self) -> list[tuple[Planned, Row]]:
        """Runs that did not finish well."""
        return [(cell.runs[seed], row) for cell in self.cells for seed, row in cell.rows.items() if row.status != "done"]

    @cached_property
    def rows(self) -> list[Row]:
        """All rows, each once."""
        return list({row.key: row for cell in self.cells for row in cell.rows.values()}.values())


def place_name(task: str, size: str) -> str:
    """A task and size for people."""
    return f"{task}, {size}" if size else task


def collect(study: Study, store: Store) -> Results:
    """The results of the runs that are in the store."""
    rows = store.rows()
    results = Results(study)
    places: dict[tuple[str, str, str, str], list[Planned]] = {}
    for planned in finished_batches(study, rows.get):
        places.setdefault((planned.task, planned.size, planned.model, repr(planned.settings)), []).append(planned)
        if planned.run.key not in rows:
            results.missing.append(planned)
    for runs in places.values():
        unique = {item.run.seed: item for item in runs}
        found = {seed: rows[item.run.key] for seed, item in unique.items() if item.run.key in rows}
        first = runs[0]
        results.cells.append(
            Cell(first.task, first.size, first.model, first.settings, unique, found, score(list(unique.values()), rows.get))
        )
    return results
