"""The store of a study: an SQLite file with one row per run, and claims so that no run is done twice at a time."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from miras.study.run import Row

FILE = "runs.sqlite"
SHARED = "one_process"
TYPES = {"int": "INTEGER", "float": "REAL"}  # of columns; anything else is text
WAIT = 60.0  # seconds for another process's write


class Store:
    """Rows by their run's hash, in `folder`/runs.sqlite; lists and dictionaries are JSON text.

    Writes are transactions, so a kill leaves whole rows. Claims are locks of the operating system, which a killed process
    gives back by itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        columns = [f'"{f.name}" {TYPES.get(str(f.type), "TEXT")}' for f in fields(Row)]
        columns[0] += " PRIMARY KEY"
        with self._open() as database:
            database.execute(f"CREATE TABLE IF NOT EXISTS runs ({', '.join(columns)})")

    def rows(self) -> dict[str, Row]:
        """Every row by its hash."""
        with self._open() as database:
            database.row_factory = sqlite3.Row
            found = [_row(dict(values)) for values in database.execute("SELECT * FROM runs")]
        return {row.key: row for row in found}

    def get(self, key: str) -> Row | None:
        """The row of a run, or None."""
        with self._open() as database:
            database.row_factory = sqlite3.Row
            values = database.execute("SELECT * FROM runs WHERE key = ?", (key,)).fetchone()
        return None if values is None else _row(dict(values))

    def put(self, row: Row) -> None:
        """Write a row, in place of an earlier one of the same run."""
        values = {
            name: json.dumps(value) if isinstance(value, (dict, list)) else value for name, value in asdict(row).items()
        }
        names, marks = ", ".join(f'"{name}"' for name in values), ", ".join("?" for _ in values)
        with self._open() as database:
            database.execute(f"INSERT OR REPLACE INTO runs ({names}) VALUES ({marks})", list(values.values()))

    def claim(self, key: str) -> FileLock | None:
        """The right to do a run, to be released after its row is written; None if another process has it."""
        folder = self.folder / "claims"
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / key)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock

    @property
    def shared(self) -> bool:
        """Whether one process has done several of the runs, without Ray."""
        return (self.folder / SHARED).exists()

    def share(self) -> None:
        """Note that one does."""
        (self.folder / SHARED).touch()

    @contextmanager
    def _open(self) -> Generator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.folder / FILE, timeout=WAIT)) as database, database:
            yield database


def _row(values: dict[str, Any]) -> Row:
    texts = {f.name for f in fields(Row) if not str(f.type).startswith(("dict", "list"))}
    return Row(**{name: value if name in texts else json.loads(value) for name, value in values.items()})
