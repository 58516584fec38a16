"""Results for people: a table and a plot."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from miras.bench.case import Case
from miras.bench.measure import Measurement, Results
from miras.report.figures import COLOURS, STYLE


def label(case: Case) -> str:
    """A case in a few words."""
    refresh = f"refresh {case.design.refresh}, " if case.design.parametric else ""
    return f"{case.model}, {refresh}T={case.tokens}"


def table(results: Results) -> Table:
    """One row a measurement; `x miras` is its median over that of our default path on the same case and mode.

    `of GEMM`: its FLOP rate over that of the same matrix products alone.
    """
    shown = Table(caption=machine_line(results), caption_justify="left")
    for name in ("case", "mode", "contender"):
        shown.add_column(name)
    for name in ("ms", "low-high", "tokens/s", "GFLOP/s", "of GEMM", "peak MB", "x miras"):
        shown.add_column(name, justify="right")
    before: tuple[Case, str] | None = None
    for m in results.measurements:
        if before is not None and (m.case, m.mode) != before:
            shown.add_section()
        before = (m.case, m.mode)
        shown.add_row(label(m.case), m.mode, m.name, *row(results, m))
    return shown


def row(results: Results, m: Measurement) -> list[str]:
    """A measurement's figures as text."""
    floor, ours = (results.find(name, m.mode, m.case) for name in ("floor", "miras"))
    rate, base = m.flop_rate, floor.flop_rate if floor is not None else None
    return [
        f"{1e3 * m.median:.1f}",
        f"{1e3 * min(m.seconds):.1f}-{1e3 * max(m.seconds):.1f}",
        f"{m.tokens_per_second:,.0f}",
        f"{rate / 1e9:.1f}" if rate is not None else "-",
        f"{rate / base:.0%}" if rate is not None and base is not None else "-",
        f"{m.peak_bytes / 1e6:,.0f}" if m.peak_bytes is not None else "-",
        f"{m.median / ours.median:.2f}" if ours is not None else "-",
    ]


def markdown(results: Results) -> str:
    """The table for a page."""
    shown = table(results)
    names = [str(column.header) for column in shown.columns]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join([label(m.case), m.mode, m.name, *row(results, m)]) + " |" for m in results.measurements]
    return "\n".join(lines)


def machine_line(results: Results) -> str:
    """What the figures were taken on."""
    m = results.machine
    device = m["gpu"] or m["processor"]
    load = f", load {m['load']:.1f}" if m["load"] is not None else ""
    return f"{device}, {m['cores']} cores, {m['threads']} threads, PyTorch {m['torch']}{load}"


def plot(results: Results, file: Path) -> None:
    """Time against tokens where lengths differ, else a bar a measurement; one panel a mode, in the format of the suffix."""
    from matplotlib import rc_context

    modes = list(dict.fromkeys(m.mode for m in results.measurements))
    with rc_context(STYLE):
        figure = Figure(figsize=(6.0 * len(modes), 4.2), layout="constrained")
        for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
            found = [m for m in results.measurements if m.mode == mode]
            if len({m.case.tokens for m in found}) > 1:
                _lines(axes, found)
            else:
                _bars(axes, found)
            axes.set_title(mode)
        figure.savefig(file)


def _lines(axes: Axes, found: list[Measurement]) -> None:
    groups: dict[str, list[Measurement]] = {}
    for m in found:
        groups.setdefault(f"{m.name}, refresh {m.case.design.refresh}", []).append(m)
    for index, (name, rows) in enumerate(groups.items()):
        x, y = [m.case.tokens for m in rows], [1e3 * m.median for m in rows]
        axes.plot(x, y, "o-", label=name, color=COLOURS[index % len(COLOURS)], markersize=4)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds")
    axes.legend()


def _bars(axes: Axes, found: list[Measurement]) -> None:
    names = [f"{m.name}\n{label(m.case)}" for m in found]
    medians = [1e3 * m.median for m in found]
    below = [1e3 * (m.median - min(m.seconds)) for m in found]
    above = [1e3 * (max(m.seconds) - m.median) for m in found]
    place = range(len(found))
    axes.barh(place, medians, xerr=(below, above), color=COLOURS[0], height=0.7, error_kw={"lw": 1})
    axes.set_yticks(place, names)
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds (median; lowest to highest)")
