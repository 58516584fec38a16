"""Table 1 from the code, and the page that shows it."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from rich.console import Console

from miras import models, retention
from miras.cost import measure
from miras.describe import parts
from miras.design import Pattern
from miras.inputs import Constant, Inputs, LogDecay, Normalized
from miras.table import Row, caption, folded, markdown, rows, terminal

PAGE = Path(__file__).parent.parent / "docs" / "models.md"


def printed(width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(terminal(rows(), 64, width))
    return console.file.getvalue()


def test_a_row_for_each_distinct_layer() -> None:
    found = [row.model for row in rows()]
    assert found == [f"{name} {place}".strip() for name, make in models.NAMED.items() for place, _ in parts(make())]
    two = Pattern((models.yaad(), models.deltanet(), models.yaad()))
    assert [row.model for row in rows(models={"two": two})] == ["two 1/3, 3/3", "two 2/3"]


def test_rows() -> None:
    found = {row.model: row for row in rows(head_dim=32)}
    assert found["gated_deltanet"][1:] == (
        *("Matrix", "L2", "L2", "a head", "GradientDescent", "1, decayed"),
        *("d^2", "1,024", f"{measure(models.gated_deltanet(), 32).flops:,.0f}", "triangular"),
    )
    assert found["moneta"][1:7] == ("MLP(2)", "Lp(3)", "LqRms(4, 0.3)", "a head", "GradientDescent", "16")
    assert found["transformer"][1:] == ("-", "L2", "-", "-", "NonParametric", "-", "2 d t", "64 t", "128 t", "attention")
    assert found["yaad_h 2/2"].state == "510 d"
    assert found["linear_attention"].refresh == "any"


def test_what_is_forgotten() -> None:
    def row(**changes: object) -> Row:
        return rows(models={"": models.deltanet(**changes)})[0]

    @dataclass(frozen=True)
    class Tied(Normalized):
        makes_decay: ClassVar[bool] = True

    assert row()[3:5] == ("none", "-")
    assert row(inputs=Inputs(Tied(), decay=None))[3:5] == ("L2", "by features")
    assert row(retention=retention.ElasticNet())[3:5] == ("ElasticNet(0.01)", "-")
    assert row(retention=retention.ProximalElasticNet())[3:5] == ("ProximalElasticNet(0.001)", "-")
    assert row(inputs=Inputs(decay=LogDecay(per_channel=True)))[3:5] == ("L2", "a channel")
    assert row(inputs=Inputs(decay=Constant(-0.1)))[3:5] == ("L2", "fixed, a head")


@pytest.mark.parametrize("width", [100, 140])
def test_terminals_show_every_cell_whole(width: int) -> None:
    text = printed(width)
    assert max(map(len, text.splitlines())) <= width
    for row in rows():
        for cell in row:
            for line in folded(cell).splitlines():
                assert line in text, f"{cell!r} is broken at {width} columns"
    assert re.sub(r"\s+", " ", caption(64)) in re.sub(r"\s+", " ", text)


def test_wide_terminals_have_a_line_a_row() -> None:
    def whole(width: int) -> int:
        return sum("yaad " in line and "MLP(2)" in line and "frozen" in line for line in printed(width).splitlines())

    assert (whole(100), whole(200)) == (0, 1)


def test_the_page_shows_the_code() -> None:
    found = re.search(r"<!-- miras table -->\n(.*?)\n<!-- /miras table -->", PAGE.read_text(), re.DOTALL)
    assert found is not None
    assert found[1] == markdown(rows()), "put the output of `miras table --markdown` between the markers of docs/models.md"
