"""A study's report: one self-contained HTML page, and the same tables as Markdown."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment

from miras.report.page import STYLE
from miras.study import figures, tables
from miras.study.config import Study
from miras.study.heat import heat
from miras.study.results import Results, collect
from miras.study.statistics import smallest_p
from miras.study.store import Store
from miras.study.tables import Table

TEMPLATE = Path(__file__).with_name("study.html.jinja")
COLUMNS = (
    *("task", "size", "model", "setting", "seed", "status", "commit"),
    *("parameters", "tokens", "flops_per_token", "tokens_per_second", "peak_bytes"),
    *("condition", "changed", "metric", "value"),
)
FEW = 6
"""Fewer seeds than this get a word of caution."""


@dataclass(frozen=True)
class Section:
    """A part of the page: figures (SVG text), then tables; `folded` tables open on a click."""

    title: str
    note: str = ""
    figures: Sequence[str] = ()
    tables: Sequence[Table] = ()
    folded: bool = False


def write_study_report(study: Study, command: str) -> tuple[Path, Path]:
    """Write report.html, report.md, results.csv and figures/ in the study's folder, from its store; return the first two.

    `command` makes them again. results.csv has a line for every run, condition, changed setting and metric, with settings
    as JSON; figures/ has the page's figures, each as an SVG file.

    Raises:
        ValueError: no run has finished.
    """
    folder = Path(study.out)
    results = collect(study, Store(folder))
    if not any(cell.done for cell in results.cells):
        failed = "; ".join(sorted({row.error for _, row in results.failures})[:3])
        raise ValueError(f"{folder} holds no finished run of this study{f' ({failed})' if failed else ''}; run it first")
    parts, notes, summary = sections(results), cautions(results), summarised(results)
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    html = page.render(
        style=STYLE.read_text(encoding="utf-8"),
        name=study.name,
        about=study.about,
        summary=summary,
        command=command,
        notes=notes,
        sections=parts,
        study=study.to_yaml(),
    )
    text = [f"# Study: {study.name}\n", study.about, summary, *notes, f"    {command}", ""]
    text += [table.markdown() for section in parts for table in section.tables]
    page_file, markdown_file = folder / "report.html", folder / "report.md"
    page_file.write_text(html, encoding="utf-8")
    markdown_file.write_text("\n".join(text).replace("\n\n\n", "\n\n"), encoding="utf-8")
    with (folder / "results.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *measurements(results)])
    save_figures(parts, folder / "figures")
    return page_file, markdown_file


def save_figures(parts: Sequence[Section], folder: Path) -> None:
    """Every figure of the page as a file of its own, named by its section; in the place of older ones."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()
    for section in parts:
        name = section.title.lower().replace(" ", "-")
        for place, figure in enumerate(section.figures):
            (folder / f"{name}{f'-{place + 1}' if place else ''}.svg").write_text(figure, encoding="utf-8")


def measurements(results: Results) -> Iterator[tuple[Any, ...]]:
    """Every figure of every run, under the headings of `COLUMNS`."""
    for cell in results.cells:
        for seed, row in cell.rows.items():
            run = (cell.task, cell.size, cell.model, _in_full(cell.settings), seed, row.status, row.commit)
            cost = (row.parameters, row.tokens, round(row.flops), round(row.tokens_per_second), row.peak_memory)
            for test in row.tests or [{"condition": "", "settings": {}, "metrics": {"": ""}}]:
                for metric, value in test["metrics"].items():
                    found = f"{value:.6g}" if metric else ""
                    yield (*run, *cost, test["condition"], _in_full(test["settings"]), metric, found)


def _in_full(settings: Any) -> str:
    """Settings to be read back: JSON of keys and values, empty without any."""
    return json.dumps(dict(settings)) if settings else ""


def sections(results: Results) -> list[Section]:
    """The parts of the page that this study has."""
    main = tables.main_table(results)
    panels = [heat(results, entry) for entry in results.study.heatmaps]
    maps = [figures.heatmap(found) for found in panels]
    in_numbers = [tables.heat_table(panel) for found in panels for panel in found]
    return [
        *_section(main.title, main.note, [figures.dots(results)], [main]),
        *_section("Against the baselines", "", [], [tables.comparison_table(results)]),
        *_section("Ablation: one choice at a time", "", [], [tables.ablation_table(results)]),
        *_section("By condition", "", [figures.conditions(results)], tables.condition_tables(results)),
        *_section("Heat maps", "Means over seeds; hatched without a word where no run is planned.", maps, []),
        *_section("Heat maps in numbers", "", [], in_numbers, folded=True),
        *_section("Run with other settings", "", [], tables.changed_tables(results), folded=True),
        *_section(
            "Against FLOPs and parameters",
            "FLOPs of the matrix products, counted on one example; parameters in all, embeddings included.",
            [figures.scaling(results)],
            [],
        ),
        *_section("Learning curves", "Training loss, mean over seeds.", [figures.curves(results)], []),
        *_section("Runs that did not finish", "", [], [tables.failure_table(results)]),
        *_section("Every setting", "", [], [tables.settings_table(results)], folded=True),
    ]


def summarised(results: Results) -> str:
    """How many runs, where and from which commits."""
    rows = results.rows
    failed = Counter(row.status for row in rows if row.status != "done")
    said = [f"{len(rows)} runs"]
    said += [f"{number} of them {status}" for status, number in failed.items()]
    said += [f"{len({item.run.key for item in results.missing})} not yet done"] if results.missing else []
    devices = Counter(row.device for row in rows if row.device)
    said += [
        "on " + " and ".join(f"{device} ({number})" if len(devices) > 1 else device for device, number in devices.items())
    ]
    said += ["commit " + ", ".join(sorted({row.commit for row in rows if row.commit}) or ["unknown"])]
    said += sorted({row.versions for row in rows if row.versions})
    hours = sum(row.seconds for row in rows) / 3600
    return (
        "; ".join(said) + f"; {hours:.2f} hours in training steps, parameters within {_spread(results):.1%} of each other."
    )


def cautions(results: Results) -> list[str]:
    """What the reader must know before believing the tables."""
    study, notes = results.study, list[str]()
    seeds = len(study.seeds)
    if seeds == 1:
        notes.append("One seed: there are no intervals and no tests, and differences may be chance.")
    elif seeds < FEW:
        normal = "; the t-test takes differences for normal" if study.statistics.test == "t" else ""
        notes.append(
            f"{seeds} seeds: bootstrap intervals of so few values are too narrow, within the range of the values, and a "
            f"difference that is not distinguishable may be real all the same{normal}."
        )
    if study.search.seeds is not None and study.search.seeds < seeds:
        notes.append(
            f"Of each model's settings, the one that was best on validation draws went on from {study.search.seeds} to all "
            f"{seeds} seeds."
        )
    least = smallest_p(seeds, study.statistics)
    if study.baselines and seeds > 1 and least > 1 - study.statistics.confidence:
        notes.append(
            f"No p-value of {seeds} pairs can be below {least:g} with the permutation test: nothing can be significant."
        )
    if study.resources.process_runs > 1:
        shared = study.resources.process_runs
        notes.append(f"Up to {shared} runs shared a process: the peak memory of each includes what earlier ones left.")
    if Store(Path(study.out)).shared:
        notes.append("Runs done with --workers 0 shared a process: the peak memory of each includes what earlier ones left.")
    if results.missing:
        notes.append(f"{len(results.missing)} planned runs are not done yet; means are over the others.")
    if results.failures:
        notes.append(f"{len(results.failures)} runs did not finish; they are listed below and count in no mean.")
    return notes


def _spread(results: Results) -> float:
    """The largest relative difference of parameter counts between models of one task and size."""
    counts: dict[tuple[str, str], list[int]] = {}
    for cell in results.selected.values():
        counts.setdefault((cell.task, cell.size), []).extend(row.parameters for row in cell.done)
    return max((max(found) / min(found) - 1 for found in counts.values() if found), default=0.0)


def _section(
    title: str, note: str, drawn: Sequence[str | None], made: Sequence[Table | None], folded: bool = False
) -> list[Section]:
    """The section, if there is anything in it."""
    kept = [figure for figure in drawn if figure], [table for table in made if table]
    return [Section(title, note, *kept, folded)] if any(kept) else []
