"""A study's tables: means with intervals, comparisons with baselines, ablations, conditions, failures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from miras.study.heat import Panel, tick
from miras.study.plan import shown, varied
from miras.study.results import Cell, Results, place_name
from miras.study.run import reference_metric
from miras.study.statistics import Comparison, Estimate, compare, corrected


@dataclass(frozen=True)
class Table:
    """Rows of text. `strong` are the (row, column) of cells to stress, `left` the columns set to the left."""

    title: str
    note: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: frozenset[tuple[int, int]] = frozenset()
    left: frozenset[int] = field(default_factory=lambda: frozenset({0}))

    def markdown(self) -> str:
        """As GitHub Markdown, with its title and note."""
        rule = ["---" if column in self.left else "---:" for column in range(len(self.headings))]
        body = [
            [
                f"**{text}**" if (row, column) in self.strong else text.replace("|", "\\|")
                for column, text in enumerate(cells)
            ]
            for row, cells in enumerate(self.rows)
        ]
        lines = "\n".join(f"| {' | '.join(cells)} |" for cells in [list(self.headings), rule, *body])
        return f"## {self.title}\n\n{self.note}\n\n{lines}\n"


def main_table(results: Results) -> Table:
    """Each task, size and model with its selected setting: the metric, and what it cost."""
    cells, rows, strong = list(results.selected.values()), list[list[str]](), set[tuple[int, int]]()
    sized, tuned = any(cell.size for cell in cells), any(cell.settings for cell in cells)
    for place, cell in enumerate(cells):
        metric = results.task(cell.task).metric
        best = _best(results, [other for other in cells if (other.task, other.size) == (cell.task, cell.size)], metric)
        if cell is best:
            strong.add((place, 2 + sized + tuned))
        done = cell.done
        rows.append(
            [
                cell.task,
                *([cell.size] if sized else []),
                cell.model,
                *([cell.label] if tuned else []),
                f"{metric} {_estimate(results.estimate(cell.values(metric)))}",
                f"{len(done)} of {len(cell.runs)}",
                f"{done[0].parameters:,}" if done else "",
                f"{done[0].tokens:,}" if done else "",
                f"{done[0].flops / 1e6:.2f}" if done else "",
                f"{_mean([row.tokens_per_second for row in done]):,.0f}" if done else "",
                f"{max(row.peak_memory for row in done) / 1e6:,.0f}" if done else "",
            ]
        )
    headings = ["task", *(["size"] if sized else []), "model", *(["selected setting"] if tuned else []), "mean [interval]"]
    headings += ["seeds", "parameters", "tokens", "MFLOPs/token", "tokens/s", "peak MB"]
    settings = results.study.statistics
    selected = " Of several settings the one that is best on validation draws is shown, on test draws." if tuned else ""
    note = (
        f"Mean over seeds and its {settings.confidence:.0%} {settings.interval} bootstrap interval, under each task's first "
        f"condition. Tokens are those of one run's training, FLOPs those of its matrix products, peak memory the largest of "
        f"a whole process.{selected}"
    )
    return Table("Results", note, headings, rows, frozenset(strong), frozenset(range(2 + sized + tuned)))


def comparison_table(results: Results) -> Table | None:
    """Every model against every baseline, on the same tasks and seeds; one family of tests."""
    names = results.study.baselines
    pairs = [
        (cell, results.selected[cell.task, cell.size, name])
        for cell in results.selected.values()
        for place, name in enumerate(names)
        # Two baselines meet once; ablated models have a table of their own.
        if cell.model in results.study.models and cell.model not in names[: place + 1]
    ]
    return _pairs(results, "Against the baselines", "baseline", [(cell, base, base.model) for cell, base in pairs])


def ablation_table(results: Results) -> Table | None:
    """Each ablated model against its original: what reverting one choice costs."""
    found: list[tuple[Cell, Cell, str]] = []
    for (task, size, name), cell in results.selected.items():
        for entry in results.study.ablations:
            if name in [f"{entry['of']}: {label}" for label in entry["revert"]]:
                found.append((cell, results.selected[task, size, entry["of"]], entry["of"]))
    return _pairs(results, "Ablation: one choice at a time", "original", found)


def condition_tables(results: Results) -> list[Table]:
    """For each task with several conditions or with references, and size: models by conditions."""
    found: list[Table] = []
    for task, size in dict.fromkeys((cell.task, cell.size) for cell in results.selected.values()):
        cells = [cell for cell in results.selected.values() if (cell.task, cell.size) == (task, size)]
        conditions = list(dict.fromkeys(name for cell in cells for name in cell.conditions))
        references = _reference_rows(results, cells, conditions)
        if len(conditions) < 2 and not references:
            continue
        metric, strong = results.task(task).metric, set[tuple[int, int]]()
        for column, condition in enumerate(conditions):
            best = _best(results, cells, metric, condition)
            strong |= {(row, column + 1) for row, cell in enumerate(cells) if cell is best}
        rows = [
            [cell.model, *(_estimate(results.estimate(cell.values(metric, condition))) for condition in conditions)]
            for cell in cells
        ]
        rows += references
        headings = ["model", *(condition or _unnamed(results, task) for condition in conditions)]
        title = f"{place_name(task, size)}: {metric} by condition"
        found.append(Table(title, "Mean over seeds and its interval.", headings, rows, frozenset(strong)))
    return found


def _reference_rows(results: Results, cells: Sequence[Cell], conditions: Sequence[str]) -> list[list[str]]:
    """The task's references, each on the tests of the model that has it for the most seeds."""
    prefix = reference_metric(results.task(cells[0].task), "")
    tests = [test for cell in cells for row in cell.done for test in row.tests]
    measured = dict.fromkeys(metric for test in tests for metric in test["metrics"] if metric.startswith(prefix))

    def most(metric: str, condition: str) -> dict[int, float]:
        return max((cell.values(metric, condition) for cell in cells), key=len)

    return [
        [f"({metric.removeprefix(prefix)})", *(_estimate(results.estimate(most(metric, name))) for name in conditions)]
        for metric in measured
    ]


def _unnamed(results: Results, name: str) -> str:
    """The unnamed condition for people: as trained, or how it differs from that, as the keys of fuzzy recall do."""
    task = results.task(name)
    trained = task.to_dict()
    fields = task.tests().get("", task).to_dict().items()
    # Held-out data are as trained; the list of longer forms is none of a form's own.
    other = [(key, value) for key, value in fields if key not in ("split", "longer") and value != trained.get(key)]
    return f"with {shown(other)}" if other else "as trained"


def changed_tables(results: Results) -> list[Table]:
    """For each task and condition: trained models run with other settings, and by how much that changes their outputs."""
    found: list[Table] = []
    for task in results.study.tasks:
        cells = [cell for cell in results.cells if cell.task == task and any(run.run.evaluate for run in cell.runs.values())]
        settings = [item["settings"] for cell in cells for run in cell.runs.values() for item in run.run.evaluate]
        settings = list({shown(setting.items(), varied(results.study)): setting for setting in settings}.items())
        if not settings:
            continue
        for condition in dict.fromkeys(name for cell in cells for name in cell.conditions):
            for metric in (results.task(task).metric, "deviation"):
                found.append(_changed_table(results, cells, settings, metric, condition))
    return found


def _changed_table(
    results: Results, cells: list[Cell], settings: list[tuple[str, dict[str, Any]]], metric: str, condition: str
) -> Table:
    """A metric under one condition: trained settings by those of the run, which come with their names."""
    rows = [
        [
            " ".join(part for part in (cell.model, cell.size) if part),
            cell.label,
            *(_estimate(results.estimate(cell.values(metric, condition, setting))) for _, setting in settings),
        ]
        for cell in cells
    ]
    note = (
        f"How far outputs are from those with {settings[0][0]}: |o - o'| / |o'|, norms over all positions."
        if metric == "deviation"
        else "The trained model, run with other settings than it was trained with."
    )
    headings = ["model", "trained with", *(f"run with {name}" for name, _ in settings)]
    place = ", ".join(part for part in (cells[0].task, condition) if part)
    return Table(f"{place}: {metric} at run time", note, headings, rows, left=frozenset({0, 1}))


def heat_table(panel: Panel) -> Table:
    """A heat map in numbers, rows from the top down."""
    texts = {**panel.words, **{at: _estimate(value) for at, value in panel.estimates.items()}}
    rows = [[tick(y), *(texts.get((x, y), "") for x in panel.xs)] for y in panel.ys[::-1]]
    title = f"{', '.join(panel.title.splitlines())} by {panel.y or 'model'} and {panel.x or 'model'}"
    headings = [panel.y or "model", *(tick(x) for x in panel.xs)]
    return Table(title, "Mean over seeds and its interval.", headings, rows)


def settings_table(results: Results) -> Table | None:
    """Every setting of every model."""
    if all(len(cell.settings) == 0 for cell in results.cells):
        return None
    rows = [
        [
            cell.task,
            *([cell.size] if results.study.sizes else []),
            cell.model,
            cell.label,
            "not all done" if cell.score is None else f"{cell.score:.4g}",
            _estimate(results.estimate(cell.values(results.task(cell.task).metric))),
            f"{len(cell.done)} of {len(cell.runs)}",
        ]
        for cell in results.cells
    ]
    sized = ["size"] if results.study.sizes else []
    headings = ["task", *sized, "model", "setting", "validation", "test [interval]", "seeds"]
    return Table("Every setting", "The metric of each task.", headings, rows, left=frozenset(range(3 + len(sized))))


def failure_table(results: Results) -> Table | None:
    """Runs that diverged or failed."""
    if not results.failures:
        return None
    rows = [
        [run.task, run.size, run.model, run.words, str(run.run.seed), row.status, row.error] for run, row in results.failures
    ]
    headings = ["task", "size", "model", "setting", "seed", "status", "error"]
    return Table("Runs that did not finish", "They count in no mean.", headings, rows, left=frozenset(range(7)))


def _pairs(results: Results, title: str, against: str, pairs: Sequence[tuple[Cell, Cell, str]]) -> Table | None:
    found: list[tuple[Cell, Cell, str, str | None, Comparison]] = []
    for cell, base, name in pairs:
        metric = results.task(cell.task).metric
        for condition in results.study.compare.get(cell.task, [None]):
            values = cell.values(metric, condition), base.values(metric, condition)
            compared = compare(*values, results.study.statistics)
            if compared is not None:
                found.append((cell, base, name, condition, compared))
    if not found:
        return None
    family = corrected([item[-1] for item in found], results.study.statistics)
    rows = [
        [
            f"{cell.task}: {condition}" if condition else cell.task,
            *([cell.size] if results.study.sizes else []),
            cell.model,
            name,
            f"{results.task(cell.task).metric} {_estimate(compared.difference, signed=True)}",
            _verdict(results, cell, compared),
            str(len(compared.difference.values)),
            _p(compared.p),
            _p(compared.corrected),
            "yes" if _same_examples(cell, base) else "NO",
        ]
        for (cell, base, name, condition, _), compared in zip(found, family, strict=True)
    ]
    strong = frozenset((i, len(rows[i]) - 2) for i, item in enumerate(family) if item.corrected < _alpha(results))
    settings = results.study.statistics
    test = "paired t-test" if settings.test == "t" else "paired sign-flip permutation test"
    tests = sum(not math.isnan(item.p) for item in family)
    note = (
        f"The model less the {against}, on the same examples and seeds, with the interval of the difference; {test} over "
        f"seeds, p corrected for {tests} tests ({settings.correction})."
    )
    sized = ["size"] if results.study.sizes else []
    headings = ["task", *sized, "model", against, "difference [interval]", "", "pairs", "p", "corrected p", "same examples"]
    return Table(title, note, headings, rows, strong, frozenset({*range(3 + len(sized)), 4 + len(sized)}))


def _verdict(results: Results, cell: Cell, compared: Comparison) -> str:
    """Better or worse only where the corrected test says so."""
    if math.isnan(compared.corrected):
        return "no test"
    if not compared.corrected < _alpha(results):
        return "not distinguishable"
    return "better" if (compared.difference.mean > 0) == results.task(cell.task).higher_is_better else "worse"


def _alpha(results: Results) -> float:
    return 1.0 - results.study.statistics.confidence


def _same_examples(cell: Cell, other: Cell) -> bool:
    """Whether both saw the same training inputs, seed by seed."""
    finished = [{row.config["seed"]: row.examples for row in each.done} for each in (cell, other)]
    return all(finished[0][seed] == finished[1][seed] for seed in set(finished[0]) & set(finished[1]))


def _best(results: Results, cells: Sequence[Cell], metric: str, condition: str | None = None) -> Cell | None:
    """The cell with the best mean, if there are others."""
    means = [(_mean(list(values.values())), cell) for cell in cells if (values := cell.values(metric, condition))]
    if len(means) < 2:
        return None
    pick = max if results.task(cells[0].task).higher_is_better else min
    return pick(means, key=lambda pair: pair[0])[1]


def _estimate(value: Estimate | None, signed: bool = False) -> str:
    if value is None:
        return "none"
    sign = "+" if signed else ""
    digits = 3 if abs(value.mean) < 10 else 1
    mean = f"{value.mean:{sign}.{digits}f}"
    return mean if math.isnan(value.low) else f"{mean} [{value.low:{sign}.{digits}f}, {value.high:{sign}.{digits}f}]"


def _p(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
