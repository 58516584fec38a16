"""The report's figures, as SVG text."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from torch import Tensor

from miras.report.inspection import Inspection, LayerTrace

COLOURS = ("#0f6e84", "#d9772b", "#7a5aa6", "#4c8c3f", "#b8405e", "#6b6b6b")
HEADS = ("#0f6e84", "#d9772b", "#7a5aa6", "#4c8c3f", "#b8405e", "#8a6d3b", "#3d6fb6", "#6b6b6b")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa3ab",
    "axes.labelcolor": "#3a444d",
    "text.color": "#1d252c",
    "xtick.color": "#5a646d",
    "ytick.color": "#5a646d",
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.grid": True,
    "grid.color": "#e7eaed",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "miras",  # the same figure is the same text
}
SHOWN_LAYERS = 4
LONGEST_HALF_LIFE = 1e6  # tokens; a gate that forgets nothing is drawn here


@dataclass(frozen=True)
class Curve:
    """A run's course: training loss and validation loss, with the tokens and training seconds at each point."""

    label: str
    train: np.ndarray  # [N, 3] tokens, seconds, nats a token
    validation: np.ndarray  # [M, 3]


def loss_curves(curves: Sequence[Curve]) -> str:
    """Training and validation loss against tokens read and against training time."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.1), layout="constrained")
        by_tokens, by_time = figure.subplots(1, 2, sharey=True)
        for curve, colour in zip(curves, _cycled(COLOURS, len(curves)), strict=True):
            for axes, column, scale in ((by_tokens, 0, 1.0), (by_time, 1, 1 / 60)):
                _line(axes, curve.train[:, column] * scale, _smooth(curve.train[:, 2]), colour, alpha=0.35)
                axes.plot(
                    curve.validation[:, column] * scale,
                    curve.validation[:, 2],
                    "o-",
                    color=colour,
                    markersize=4,
                    linewidth=1.8,
                    label=curve.label,
                )
        by_tokens.set(title="Loss against tokens read", xlabel="tokens read", ylabel="loss (nats per token)")
        by_tokens.xaxis.set_major_formatter(EngFormatter(sep=""))
        by_time.set(title="Loss against training time", xlabel="training time (minutes)")
        by_time.legend(title="validation (pale: training)", title_fontsize=8.5, loc="upper right")
        _zoom(by_tokens, curves)
        return svg(figure)


def memory_gates(inspection: Inspection) -> str | None:
    """Per layer and head: the inner learning rate and the half-life that the retention gate gives, at every token."""
    layers = _shown([layer for layer in inspection.layers if "lr" in layer.measures or "log_decay" in layer.measures])
    if not layers:
        return None
    with rc_context(STYLE):
        figure, grid = _grid(layers, columns=2)
        for (left, right), layer in zip(grid, layers, strict=True):
            _heads(left, layer.measures.get("lr"))
            left.set(title=f"{_layer_title(layer)}: inner learning rate", ylabel="$\\eta_t$")
            _heads(right, _half_life(layer.measures.get("log_decay")), logarithmic=True)
            right.set(title=f"{_layer_title(layer)}: half-life of what is stored", ylabel="tokens")
        _finish_grid(grid, figure)
        return svg(figure)


def memory_losses(inspection: Inspection) -> str | None:
    """Per layer: the memory's own loss at (k_t, v_t) before and after writing, and how far its weights have moved."""
    layers = _shown([layer for layer in inspection.layers if "loss_before" in layer.measures])
    if not layers:
        return None
    with rc_context(STYLE):
        figure, grid = _grid(layers, columns=2)
        for (left, right), layer in zip(grid, layers, strict=True):
            for key, label, colour in (
                ("loss_before", "before writing", "#d9772b"),
                ("loss_after", "after", "#0f6e84"),
            ):
                if key in layer.measures:
                    values = layer.measures[key].mean(1).numpy()
                    _line(left, np.arange(len(values)), values, colour, alpha=0.22)
                    _line(left, np.arange(len(values)), _smooth(values), colour, width=1.9, label=label)
            left.set(title=f"{_layer_title(layer)}: the memory's own loss", ylabel="loss at $(k_t, v_t)$")
            _heads(right, layer.measures.get("drift"), smooth=False)
            right.set(title=f"{_layer_title(layer)}: change of the weights", ylabel="$\\|A_t - A_0\\|$")
        grid[0][0].legend(loc="upper right", ncols=2)
        _finish_grid(grid, figure)
        return svg(figure)


def _grid(layers: Sequence[LayerTrace], columns: int) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(11, 0.5 + 2.25 * len(layers)), layout="constrained")
    return figure, [list(row) for row in figure.subplots(len(layers), columns, squeeze=False, sharex=True)]


def _finish_grid(grid: list[list[Axes]], figure: Figure) -> None:
    for axes in grid[-1]:
        axes.set_xlabel("token of the passage")
    figure.align_ylabels()
    handles, labels = grid[0][-1].get_legend_handles_labels()
    if 1 < len(labels) <= len(HEADS):
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def _heads(axes: Axes, values: Tensor | None, logarithmic: bool = False, smooth: bool = True) -> None:
    """One line a head: its values pale, their running mean bold."""
    if values is None:
        axes.text(0.5, 0.5, "not a part of this design", ha="center", transform=axes.transAxes, color="#7a848d")
        return
    heads = values.numpy().astype(np.float64)
    x, heads = np.arange(len(heads)), np.log10(heads) if logarithmic else heads
    for head, colour in enumerate(_cycled(HEADS, heads.shape[1])):
        y = heads[:, head]
        if smooth:
            _line(axes, x, y, colour, alpha=0.16, width=0.6)
        _line(axes, x, _smooth(y) if smooth else y, colour, width=1.5, label=f"head {head + 1}")
    axes.yaxis.set_major_locator(MaxNLocator(4))
    if logarithmic:
        axes.yaxis.set_major_formatter(lambda y, _: _short(10.0**y))


def _short(number: float) -> str:
    """Two significant digits with a metric suffix: 1300 is 1.3k."""
    return EngFormatter(sep="")(float(f"{number:.2g}"))


def _half_life(log_decay: Tensor | None) -> Tensor | None:
    """ln 2 / -log_decay: the tokens after which half of a write is forgotten, at most LONGEST_HALF_LIFE."""
    if log_decay is None or not bool((log_decay < 0).any()):
        return None
    return (math.log(2.0) / (-log_decay).clamp(min=math.log(2.0) / LONGEST_HALF_LIFE)).clamp(min=1e-2)


def _line(
    axes: Axes,
    x: np.ndarray,
    y: np.ndarray,
    colour: str,
    alpha: float = 1.0,
    width: float = 1.2,
    label: str | None = None,
) -> None:
    axes.plot(x, y, color=colour, alpha=alpha, linewidth=width, label=label)


def _zoom(axes: Axes, curves: Sequence[Curve]) -> None:
    """Leave out the steep start, which would press the curves together."""
    losses = [curve.validation[:, 2] for curve in curves if len(curve.validation)]
    if losses:
        high = max(loss.max() for loss in losses)
        low = min(*(loss.min() for loss in losses), *(_smooth(c.train[:, 2]).min() for c in curves if len(c.train)), high)
        axes.set_ylim(low - 0.06 * (high - low) - 0.02, high + 0.25 * (high - low) + 0.05)


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over a sixteenth of the points, shorter at the ends, so that nothing is shifted."""
    half = max(1, len(values) // 32)
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / np.maximum(high - low, 1)


def _shown(layers: Sequence[LayerTrace]) -> list[LayerTrace]:
    """All layers if they are few, else some spread evenly from first to last."""
    if len(layers) <= SHOWN_LAYERS:
        return list(layers)
    return [layers[round(i * (len(layers) - 1) / (SHOWN_LAYERS - 1))] for i in range(SHOWN_LAYERS)]


def _layer_title(layer: LayerTrace) -> str:
    numbers = [part for part in layer.name.split(".") if part.isdigit()]
    return f"Layer {int(numbers[0]) + 1}" if numbers else layer.name or "Memory"


def _cycled(colours: Sequence[str], count: int) -> list[str]:
    return [colours[i % len(colours)] for i in range(count)]


def svg(figure: Figure) -> str:
    """The figure as an <svg> element that scales with the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("<svg ", '<svg class="figure" role="img" ', 1)
