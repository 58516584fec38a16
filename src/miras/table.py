"""The Miras paper's Table 1 from the code: each named model as its four choices, with what it holds and computes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from miras.choice import Choice
from miras.cost import measure, state_formula
from miras.describe import decays, label, parts
from miras.design import Design
from miras.models import NAMED

if TYPE_CHECKING:
    from rich.table import Table

NUMBERS = ("refresh", "state", "numbers", "flops")
"""Columns that are set to the right."""

WHOLE = ("model", "state", "flops")
"""Columns that are not to be broken where a terminal is narrow."""

STACKED = (
    ("model",),
    ("memory", "bias"),
    ("retention", "decay"),
    ("learning", "refresh"),
    ("state", "numbers"),
    ("flops", "path"),
)
"""Columns that share a place in a narrow terminal, one under the other."""


class Row(NamedTuple):
    """A layer of a named model, ready to print; the sizes are one head's, t being the tokens so far.

    decay    how the decay towards the anchor is gated; the retention is "none" where there is none, and an identity link
    refresh  gradient steps that share a gradient point, "decayed" where it is the decayed state
    state    numbers of the recurrent state as a formula in the head width d, `numbers` their count
    flops    to write and read one token, on the engine's `path`
    """

    model: str
    memory: str
    bias: str
    retention: str
    decay: str
    learning: str
    refresh: str
    state: str
    numbers: str
    flops: str
    path: str


HEADINGS = [{"flops": "FLOPs"}.get(name, name) for name in Row._fields]


def rows(head_dim: int = 64, models: Mapping[str, Choice] | None = None) -> list[Row]:
    """A row for each distinct layer of each model (default: of every named one), for heads of `head_dim` channels."""
    models = {name: function() for name, function in NAMED.items()} if models is None else models
    return [
        _row(f"{name} {place}".strip(), design, head_dim) for name, model in models.items() for place, design in parts(model)
    ]


def markdown(table: Sequence[Row]) -> str:
    """The rows as GitHub Markdown."""
    rule = ["---:" if name in NUMBERS else "---" for name in Row._fields]
    lines = [HEADINGS, rule, *([f"`{row.model}`", *row[1:]] for row in table)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def terminal(table: Sequence[Row], head_dim: int, width: int) -> Table:
    """The rows for rich to print in `width` columns: a line a row if they fit."""
    from rich import box
    from rich.table import Table

    needed = sum(1 + max(map(len, cells)) for cells in zip(HEADINGS, *table, strict=True))
    columns = tuple((name,) for name in Row._fields) if needed <= width else STACKED
    headings = dict(zip(Row._fields, HEADINGS, strict=True))
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.caption, shown.caption_justify = caption(head_dim), "left"
    for names in columns:
        heading = "\n".join(headings[name] for name in names)
        justify = "right" if names[0] in NUMBERS else "left"
        fixed = names[0] in WHOLE
        shown.add_column(
            heading, justify=justify, style="bold" if names == ("model",) else "", no_wrap=fixed, overflow="fold"
        )
    for row in table:
        cells = row if columns is not STACKED else Row(*(folded(cell) for cell in row))
        shown.add_row(*("\n".join(getattr(cells, name) for name in names) for names in columns))
    return shown


def folded(cell: str, width: int = 15) -> str:
    """A cell on lines of at most `width` characters, broken behind brackets, commas, equals signs and spaces."""
    lines = [""]
    for piece in re.split(r"(?<=[(,= ])", cell):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def caption(head_dim: int) -> str:
    """What the numbers of a table mean."""
    return (
        f"One head of d = {head_dim} channels; t: tokens so far. state: numbers held between tokens, all slots of the "
        "learner and with refresh > 1 the gradient point, without convolution tails. FLOPs: matrix products that write and "
        "read one token on the engine's path, two for a multiply-add."
    )


def _row(model: str, design: Design, head_dim: int) -> Row:
    cost = measure(design, head_dim)
    each = " t" if cost.grows else ""
    return Row(
        model=model,
        memory="-" if design.memory is None else label(design.memory),
        bias=label(design.bias),
        retention=_retention(design),
        decay=_decay(design),
        learning=label(design.learning),
        refresh=_refresh(design),
        state=state_formula(design) or "-",
        numbers=f"{cost.state:,}{each}",
        flops=f"{cost.flops:,.0f}{each}",
        path=cost.plan.path,
    )


def _retention(design: Design) -> str:
    if design.retention is None:
        return "-"
    keeps = design.retention.identity and not design.retention.settles and not decays(design)
    return "none" if keeps else label(design.retention)


def _decay(design: Design) -> str:
    decay = design.inputs.decay
    if not design.parametric or not decays(design):
        return "-"
    if decay is None:
        return "by features"
    return f"{'' if decay.projected else 'fixed, '}a {'channel' if decay.per_channel else 'head'}"


def _refresh(design: Design) -> str:
    if design.memory is None:
        return "-"
    if design.memory.linear and design.bias.slope == "constant":
        return "any"
    return f"{design.refresh}, decayed" if design.gradient_at == "decayed" else str(design.refresh)
