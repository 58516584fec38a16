"""Draw the figures of docs/guide.md from the numbers that its blocks leave behind: `python -m docs.figures.guide`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from miras.report.figures import STYLE
from tests.guide import PAGE, run

FOLDER = Path(__file__).parent
CURVES = {  # colour (Okabe and Ito's palette, safe for colour-blind readers), marker, line
    "Hebbian": ("#000000", "o", "-"),
    "delta rule": ("#0072B2", "s", "-"),
    "gated delta rule": ("#56B4E9", "D", "--"),
    "deep": ("#D55E00", "^", "-"),
    "deep, refresh 16": ("#E69F00", "v", "--"),
    "L2": ("#000000", "o", "-"),
    "Huber": ("#0072B2", "s", "-"),
    "l_3": ("#D55E00", "^", "-"),
}


def style(name: str) -> dict[str, Any]:
    """How a curve is drawn, and its label."""
    colour, marker, line = CURVES[name]
    return {"color": colour, "marker": marker, "linestyle": line, "markersize": 4.5, "linewidth": 1.6, "label": name}


def draw_recall(session: Mapping[str, Any]) -> Figure:
    """Share of values recalled against their age, averaged over four neighbouring ages."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, shares in session["recalled"].items():
        means = shares.view(-1, 4).mean(1)
        axes.plot([4 * i + 1.5 for i in range(len(means))], means, **style(name))
    axes.axhline(1 / session["T"], color="#6b6b6b", linewidth=1, linestyle=":", label="chance")
    axes.set(xlabel="age of the value (tokens since it was written)", ylabel="share of values recalled", ylim=(-0.02, 1.02))
    axes.set_xticks(range(0, session["T"] + 1, 16))  # the windows of refresh 16
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_outlier(session: Mapping[str, Any]) -> Figure:
    """How far one outlier moves the weights, and the answers at other keys, against its length."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    titles = ("Weights of the memory", "Answers at the other keys")
    for place, (axes, title) in enumerate(zip(figure.subplots(1, 2), titles, strict=True)):
        for name, pairs in session["moves"].items():
            axes.plot(session["sizes"], [pair[place] for pair in pairs], **style(name))
        axes.set(title=title, xlabel="length of the outlier (other values: 1)", xscale="log")
        axes.xaxis.set_major_formatter("{x:g}")
    figure.axes[0].set(ylabel="moved by (Euclidean norm)", yscale="log")
    figure.axes[1].set(ylabel="moved by (root mean square)", ylim=(0, 2.2))
    figure.axes[0].legend(loc="upper left")
    return figure


def draw(session: Mapping[str, Any], folder: Path) -> None:
    """Write recall.svg and outlier.svg."""
    with mpl.rc_context(STYLE):
        for name, function in {"recall": draw_recall, "outlier": draw_outlier}.items():
            function(session).savefig(folder / f"{name}.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    draw(run(PAGE.read_text())[1], FOLDER)
