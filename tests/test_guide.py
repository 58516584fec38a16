"""docs/guide.md runs from top to bottom, prints what it shows, and links to what exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from docs.figures import guide as figures
from tests import guide

Session = tuple[str, dict[str, Any]]


@pytest.fixture(scope="module")
def page() -> str:
    return guide.PAGE.read_text()


@pytest.fixture(scope="module")
def session(page: str) -> Session:
    return guide.run(page)


def test_outputs_are_real(page: str, session: Session) -> None:
    assert session[0] == page, "if the new outputs are right: python -m tests.guide --write"


def test_every_block_of_code_is_run(page: str) -> None:
    assert len(guide.CELL.findall(page)) == page.count("```python\n") > 15


def test_an_output_that_is_missing_stale_or_too_much_is_seen() -> None:
    silent, loud, shown = "```python\nx = 1\n```\n", "```python\nprint(1)\n```\n", "\n```text\n1\n```\n"
    for page, real in (
        (loud, loud + shown),
        (loud + "\n```text\n2\n```\n", loud + shown),
        (silent + shown, silent),
        (silent + loud + shown, silent + loud + shown),
    ):
        assert guide.run(page)[0] == real


def test_figures_are_drawn_from_the_page(page: str, session: Session, tmp_path: Path) -> None:
    figures.draw(session[1], tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == set(re.findall(r"\]\(figures/(.+?)\)", page))
    assert all((figures.FOLDER / name).stat().st_size < 100_000 for name in drawn)


def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((?!http)(.+?)\)", page):
        path, _, anchor = link.partition("#")
        target = (guide.PAGE.parent / path).resolve()
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in [title.lower().replace(" ", "-") for title in titles], link
