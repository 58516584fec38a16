"""docs/guide.md as one session: `python -m tests.guide` checks what its blocks print, with --write it rewrites the page."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "guide.md"

CELL = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n.*?^```\n)?", re.DOTALL | re.MULTILINE)
"""A block of code and, if it prints, what it printed."""


def run(page: str) -> tuple[str, dict[str, Any]]:
    """The page with what its blocks print, and the names that they leave behind."""
    session: dict[str, Any] = {}

    def cell(match: re.Match[str]) -> str:
        # Empty lines before the code, so that a traceback shows the page's own line.
        lines = "\n" * (page.count("\n", 0, match.start()) + 1)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(lines + match["code"], str(PAGE), "exec"), session)
        shown = f"\n```text\n{printed.getvalue()}```\n" if printed.getvalue() else ""
        return f"```python\n{match['code']}```\n{shown}"

    dtype = torch.get_default_dtype()
    try:
        return CELL.sub(cell, page), session
    finally:
        torch.set_default_dtype(dtype)


def main() -> None:
    page = PAGE.read_text()
    real, _ = run(page)
    if "--write" in sys.argv[1:]:
        PAGE.write_text(real)
    elif real != page:
        sys.exit(f"{PAGE} shows other outputs than its blocks print; python -m tests.guide --write")


if __name__ == "__main__":
    main()
