"""docs/equations.md names every public choice and model, and everything that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from miras import models
from tests.test_choice import public_classes

ROOT = Path(__file__).parent.parent

ROW = re.compile(r"^\| (?P<equation>.+) \| `(?P<name>\w+)` \| (?P<file>\S+) \| (?P<test>\S+) \|$")


def rows() -> list[dict[str, str]]:
    lines = (ROOT / "docs" / "equations.md").read_text().splitlines()
    body = [line for line in lines if line.startswith("|") and not re.match(r"^\|(---\|)+$|^\| Equation \|", line)]
    found = [ROW.match(line) for line in body]
    wrong = [line for line, match in zip(body, found, strict=True) if match is None]
    assert not wrong, f"rows must read | equation | `name` | file | test |: {wrong}"
    return [match.groupdict() for match in found if match is not None]


def definitions(path: Path) -> set[str]:
    """Names of the top-level classes and functions of a file."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, kinds)}


def test_every_choice_and_model_is_listed() -> None:
    listed = {(row["name"], row["file"]) for row in rows()}
    wanted = {(cls.__name__, f"src/{cls.__module__.replace('.', '/')}.py") for cls in public_classes()}
    wanted |= {(name, f"src/{f.__module__.replace('.', '/')}.py") for name, f in models.NAMED.items()}
    assert not wanted - listed, f"add a row to docs/equations.md for {sorted(wanted - listed)}"


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["name"])
def test_what_is_listed_exists(row: dict[str, str]) -> None:
    source = ROOT / row["file"]
    assert source.exists(), row["file"]
    assert row["name"] in definitions(source), f"no {row['name']} in {row['file']}"
    path, _, test = row["test"].partition("::")
    assert (ROOT / path).exists(), path
    assert test.startswith("test_"), row["test"]
    assert test in definitions(ROOT / path), f"no {test} in {path}"
