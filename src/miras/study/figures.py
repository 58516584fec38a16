"""A study's figures, as SVG text: every seed with its mean and interval, curves, conditions, heat maps, sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter

from miras.report.figures import COLOURS, STYLE, svg
from miras.study.heat import Panel, tick
from miras.study.results import Cell, Results, place_name
from miras.study.run import Row
from miras.study.statistics import Estimate

MARKERS = ("o", "s", "^", "D", "v", "P")
"""With the colours: lines can be told apart without them too."""

HATCH = "#d5dade"
WIDTH = 11.0  # inches
COSTS: Mapping[str, Callable[[Row], float]] = {
    "FLOPs of the training (matrix products)": lambda row: row.flops * row.tokens,
    "parameters": lambda row: row.parameters,
}
"""What the metric is drawn against over the sizes."""


def dots(results: Results) -> str:
    """Each task and size: every seed of every model, with mean and interval."""
    places = list(dict.fromkeys((cell.task, cell.size) for cell in results.selected.values()))
    columns = min(2, len(places))
    models = max(sum((c.task, c.size) == place for c in results.selected.values()) for place in places)
    with rc_context(STYLE):
        rows = -(-len(places) // columns)
        figure = Figure(figsize=(WIDTH, rows * (0.9 + 0.34 * models)), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, place in zip(grid.flat, places, strict=False):
            cells = [cell for cell in results.selected.values() if (cell.task, cell.size) == place][::-1]
            metric = results.task(place[0]).metric
            for y, cell in enumerate(cells):
                values, colour = cell.values(metric), _style(results, cell.model)[0]
                axes.plot(
                    list(values.values()), [y] * len(values), "o", color=colour, alpha=0.35, markersize=6, markeredgewidth=0
                )
                _interval(axes, results.estimate(values), y, colour)
            axes.set_yticks(range(len(cells)), [cell.model for cell in cells])
            axes.set(title=place_name(*place), xlabel=metric, ylim=(-0.6, len(cells) - 0.4))
        for axes in list(grid.flat)[len(places) :]:
            axes.set_visible(False)
        return svg(figure)


def curves(results: Results) -> str:
    """Each task and size: training loss against tokens read, the mean over seeds of every model's selected setting."""

    def draw(axes: Axes, cell: Cell, look: Mapping[str, Any]) -> None:
        lines = [np.asarray(row.curve) for row in cell.done if row.curve]
        if lines and len({len(line) for line in lines}) == 1:
            mean = np.mean(lines, axis=0)
            tokens = cell.done[0].tokens / cell.done[0].steps
            axes.plot(mean[:, 0] * tokens, mean[:, 1], **look, markevery=max(1, len(mean) // 8))

    def finish(axes: Axes, place: tuple[str, str]) -> None:
        axes.set(title=place_name(*place), xlabel="tokens read", ylabel="training loss")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))

    places = list(dict.fromkeys((cell.task, cell.size) for cell in results.selected.values()))
    return _lines(results, [(place, list(results.selected.values())) for place in places], draw, finish)


def conditions(results: Results) -> str | None:
    """Each task whose conditions differ in a number (tokens, noise): the metric against it."""
    series: dict[tuple[str, str, str], list[tuple[float, str]]] = {}
    for cell in results.selected.values():
        for name in cell.conditions:
            found = re.match(r"(\D*)(\d+(?:\.\d+)?)(\D*)", name)
            if found:
                words = f"{found[1]} {found[3]}".strip(" ,")
                points = series.setdefault((cell.task, cell.size, words), [])
                points += [(float(found[2]), name)] if (float(found[2]), name) not in points else []
    for (task, _, words), points in series.items():
        own = _own_number(results, task, words)
        points += [(own, "")] if own is not None else []
    series = {key: sorted(points) for key, points in series.items() if len({x for x, _ in points}) > 1}
    if not series:
        return None
    panels = [((task, size, words), list(results.selected.values())) for task, size, words in series]

    def draw(axes: Axes, cell: Cell, look: Mapping[str, Any], place: tuple[str, str, str]) -> None:
        metric = results.task(cell.task).metric
        _band(axes, [(x, results.estimate(cell.values(metric, name))) for x, name in series[place]], look)

    def finish(axes: Axes, place: tuple[str, str, str]) -> None:
        axes.set(title=place_name(*place[:2]), xlabel=place[2], ylabel=results.task(place[0]).metric)
        xs = [x for x, _ in series[place]]
        if min(xs) > 0 and max(xs) / min(xs) >= 4:
            axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(set(xs)), [f"{x:g}" for x in sorted(set(xs))])
        axes.minorticks_off()

    return _lines(results, panels, draw, finish, with_place=True)


def _own_number(results: Results, task: str, words: str) -> float | None:
    """The number that the first condition, the unnamed one, has where others are named by it: 128 of "256 tokens"."""
    first = results.task(task).tests().get("")
    word = words.split(",")[0]
    value = getattr(first, f"num_{word}", getattr(first, word, None)) if first is not None and word.isidentifier() else None
    return float(value) if isinstance(value, (int, float)) else None


def scaling(results: Results) -> str | None:
    """Each task: the metric against the FLOPs of the training and the parameters, over the sizes; None for one size.

    Sizes of as many parameters each have the first panel alone.
    """
    if len(results.study.sizes) < 2:
        return None

    def draw(axes: Axes, cell: Cell, look: Mapping[str, Any], place: tuple[str, str]) -> None:
        metric = results.task(cell.task).metric
        same = [c for c in results.selected.values() if (c.task, c.model) == (cell.task, cell.model) and c.done]
        if not same or cell is not same[0]:  # One line for all sizes, drawn with the first.
            return
        measured = [(COSTS[place[1]](c.done[0]), results.estimate(c.values(metric))) for c in same]
        _band(axes, sorted(measured, key=lambda point: point[0]), look)

    def finish(axes: Axes, place: tuple[str, str]) -> None:
        axes.set(title=place[0], xlabel=place[1], ylabel=results.task(place[0]).metric, xscale="log")
        if place[1] == "parameters":
            counts = _asked_parameters(results, place[0])
            axes.set_xticks(counts, [EngFormatter(sep="")(count) for count in counts])
            axes.minorticks_off()

    panels = [(task, cost) for task in results.study.tasks for cost in COSTS]
    panels = [place for place in panels if place[1] != "parameters" or len(_asked_parameters(results, place[0])) > 1]
    cells = list(results.selected.values())
    return _lines(results, [(place, cells) for place in panels], draw, finish, with_place=True, any_size=True)


def _asked_parameters(results: Results, task: str) -> list[int]:
    """How many parameters the sizes of a task ask for."""
    return sorted({run.run.size["parameters"] for cell in results.cells if cell.task == task for run in cell.runs.values()})


def heatmap(panels: Sequence[Panel]) -> str | None:
    """One entry of the study's heat maps."""
    if not panels:
        return None
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    tall = max(len(panel.ys) for panel in panels)
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(WIDTH, rows * (1.3 + 0.42 * tall)), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw_panel(axes, panel)
            axes.set(xlabel=panel.x, ylabel=panel.y)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        return svg(figure)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    """Light is good, dark is bad, whichever way the metric goes."""
    shades = colormaps["cividis" if panel.higher_is_better else "cividis_r"]
    values = panel.values
    image = axes.imshow(np.ma.masked_invalid(values), cmap=shades, aspect="auto", origin="lower")
    for y, x in np.ndindex(values.shape):
        at, value = (panel.xs[x], panel.ys[y]), float(values[y, x])
        if at in panel.estimates:
            _write(axes, x, y, value, image.norm, shades)
        else:
            _hatch(axes, x, y, panel.words.get(at, ""))
    axes.set_xticks(range(len(panel.xs)), [tick(x) for x in panel.xs])
    axes.set_yticks(range(len(panel.ys)), [tick(y) for y in panel.ys])
    axes.set_title(panel.title, fontsize=9.5)


def _lines(
    results: Results,
    panels: Sequence[tuple[Any, list[Cell]]],
    draw: Callable[..., None],
    finish: Callable[..., None],
    with_place: bool = False,
    any_size: bool = False,
) -> str:
    """A grid of line plots, each of the cells of its place, with one legend below for all."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.5 + 3.1 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, (place, cells) in zip(grid.flat, panels, strict=False):
            for cell in cells:
                if cell.task == place[0] and (any_size or cell.size == place[1]):
                    colour, marker, dash = _style(results, cell.model)
                    look = {"color": colour, "marker": marker, "linestyle": dash, "markersize": 4.5, "linewidth": 1.7}
                    draw(axes, cell, {**look, "label": cell.model}, *([place] if with_place else []))
            finish(axes, place)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        handles: dict[str, Any] = {}
        for axes in grid.flat:
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, max(1, len(handles))))
        return svg(figure)


def _style(results: Results, model: str) -> tuple[str, str, str]:
    """A model's colour, marker and dash, the same in every figure."""
    names = list(dict.fromkeys(cell.model for cell in results.cells))
    place = names.index(model)
    dash = ("-", "--", ":")[place // len(COLOURS) % 3]
    return COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)], dash


def _band(axes: Axes, points: Sequence[tuple[float, Estimate | None]], look: Mapping[str, Any]) -> None:
    """A line through the means, with the band of their intervals."""
    kept = [(x, value) for x, value in points if value is not None]
    axes.plot([x for x, _ in kept], [value.mean for _, value in kept], **look)
    low, high = [value.low for _, value in kept], [value.high for _, value in kept]
    axes.fill_between([x for x, _ in kept], low, high, color=look["color"], alpha=0.12, linewidth=0)


def _interval(axes: Axes, value: Estimate | None, y: float, colour: str) -> None:
    if value is None:
        return
    if not math.isnan(value.low):
        axes.plot([value.low, value.high], [y, y], "-", color=colour, linewidth=2.2)
    axes.plot([value.mean], [y], "|", color=colour, markersize=15, markeredgewidth=2.6)


def _write(axes: Axes, x: int, y: int, value: float, norm: Callable[[Any], Any], shades: Callable[[Any], Any]) -> None:
    """A cell's number, dark on light and light on dark."""
    red, green, blue, _ = (1.0, 1.0, 1.0, 1.0) if math.isnan(value) else shades(norm(value))
    bright = 0.299 * red + 0.587 * green + 0.114 * blue
    axes.text(x, y, f"{value:.3g}", ha="center", va="center", fontsize=8.5, color="#1d252c" if bright > 0.5 else "white")


def _hatch(axes: Axes, x: int, y: int, word: str) -> None:
    """A cell without a number, and why; without a word where nothing is planned."""
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="white", edgecolor=HATCH, hatch="////", linewidth=0))
    if word:
        box = {"fc": "white", "ec": "none", "pad": 1}
        axes.text(x, y, word, ha="center", va="center", fontsize=8, color="#5a646d", bbox=box)
