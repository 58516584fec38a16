"""The store: rows come back as they were, writers do not hurt each other, one claim at a time."""

import multiprocessing
from dataclasses import replace
from pathlib import Path

from miras.study.run import Row
from miras.study.store import Store

ROW = Row(
    "a",
    "done",
    config={"x": [1, {"y": None}]},
    tests=[{"metrics": {"accuracy": 0.1}}],
    curve=[[1, 2.5]],
    seconds=0.1,
    tokens=7,
)


def test_rows_come_back_equal_and_the_newest_stands(tmp_path: Path) -> None:
    store = Store(tmp_path / "new" / "folder")
    assert store.rows() == {}
    assert store.get("a") is None
    store.put(replace(ROW, status="failed", error="Error: 'quoted' \"text\""))
    store.put(ROW)
    store.put(replace(ROW, key="b"))
    assert Store(store.folder).rows() == {"a": ROW, "b": replace(ROW, key="b")}
    assert store.get("b") == replace(ROW, key="b")


def _write(folder: Path, name: str) -> None:
    store = Store(folder)
    for i in range(20):
        store.put(replace(ROW, key=f"{name}{i}"))


def test_processes_write_at_the_same_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(tmp_path, name)) for name in "pqr"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(Store(tmp_path).rows()) == 60


def _hold(folder: Path, held: "multiprocessing.synchronize.Event", release: "multiprocessing.synchronize.Event") -> None:
    claim = Store(folder).claim("a")
    assert claim is not None
    held.set()
    release.wait(30)


def test_a_claim_is_one_processs_and_dies_with_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, held, release))
    process.start()
    assert held.wait(30)
    store = Store(tmp_path)
    assert store.claim("a") is None
    other = store.claim("b")
    assert other is not None
    other.release()
    process.kill()
    process.join()
    mine = store.claim("a")
    assert mine is not None
    mine.release()
