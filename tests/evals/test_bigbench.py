"""BIG-bench's tasks, from an archive of the package's layout made here."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from miras.evals import bigbench
from miras.evals.harness import run_tasks
from tests.evals.tasks import make, make_words_tokenizer


def example(text: str, *choices: str, right: int = 0) -> dict[str, Any]:
    return {"input": text, "target_scores": {choice: int(i == right) for i, choice in enumerate(choices)}}


CONTENT = {
    "social_iqa/task.json": [example("the king speaks. why? ", "no more", "words", right=1), example("do? ", "a", "b", "c")],
    "strategyqa/task.json": [example("is night fair?", "Yes", "No")],
    **{
        f"subject_verb_agreement/{name}.json": [example(f"the {name} king ", "speaks", "speak")]
        for name in bigbench.AGREEMENT
    },
}


def write_archive(file: Path, content: dict[str, list[dict[str, Any]]] = CONTENT) -> Path:
    with tarfile.open(file, "w:gz") as tar:
        for name, rows in {**content, "other/task.json": []}.items():
            text = json.dumps({"examples": rows}).encode()
            member = tarfile.TarInfo(f"bigbench-1.0.0/bigbench/benchmark_tasks/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return file


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIRAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "cache"


def pip(archive: Path | None, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stand for `pip download`: the archive comes from a file, or not at all."""
    calls: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        calls.append([*command, Path(command[command.index("-r") + 1]).read_text()])
        if archive is None:
            return subprocess.CompletedProcess(command, 1, b"Collecting\nERROR: no route to the index\n")
        archive.rename(Path(command[command.index("-d") + 1]) / "bigbench-1.0.0.tar.gz")
        return subprocess.CompletedProcess(command, 0, b"")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_examples_have_one_right_answer_and_no_order_of_condition() -> None:
    kept = [example(f"the {i} king ", "speaks", "speak", right=i // 10) for i in range(20)]
    rows = bigbench.examples([*kept, example("one ", "speaks"), example("none", "speaks", "speak", right=7)])
    assert rows == bigbench.examples(kept[::-1])
    assert len(rows) == 20
    by_input = {row["input"]: row for row in rows}
    assert by_input["the 13 king"] == {"input": "the 13 king", "choices": ["speaks", "speak"], "answer": 1}
    assert 2 <= sum(row["answer"] for row in rows[:10]) <= 8


def test_fetched_tasks_run(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write_archive(tmp_path / "a.tar.gz")
    monkeypatch.setattr(bigbench, "SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    calls = pip(archive, monkeypatch)
    with pytest.raises(FileNotFoundError, match="--download"):
        bigbench.tasks_folder()
    folder = bigbench.fetch()
    assert folder == bigbench.fetch() == bigbench.tasks_folder()
    assert len(calls) == 1
    assert calls[0][-1] == f"bigbench==1.0.0 --hash=sha256:{bigbench.SHA256}\n"
    assert "--require-hashes" in calls[0]
    assert list(cache.iterdir()) == [folder]
    assert not list(folder.glob("*.gz"))

    tokenizer = make_words_tokenizer()
    rows = run_tasks(make("gated_deltanet", tokenizer), tokenizer, bigbench.TASKS)
    scores = {(row.task, row.metric): row for row in rows}
    assert scores["bigbench_social_iqa", "acc"].n == 2
    assert scores["bigbench_social_iqa", "acc_norm"].chance == pytest.approx((1 / 2 + 1 / 3) / 2)
    agreement = "bigbench_subject_verb_agreement"
    parts = [scores[f"{agreement}_{name}", "acc"].value for name in bigbench.AGREEMENT]
    assert scores[agreement, "acc"].value == pytest.approx(sum(parts) / 12)
    assert (scores[agreement, "acc"].n, scores[agreement, "acc"].chance) == (12, 0.5)
    social = json.loads((folder / "bigbench_social_iqa.jsonl").read_text().splitlines()[0])
    assert set(social) == {"input", "choices", "answer"}


def test_what_goes_wrong_leaves_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write_archive(tmp_path / "a.tar.gz")
    with monkeypatch.context() as patch:
        pip(None, patch)
        with pytest.raises(FileNotFoundError, match=r"could not download bigbench 1\.0\.0 .*ERROR: no route to the index"):
            bigbench.fetch()
    with monkeypatch.context() as patch:
        pip(archive, patch)
        with pytest.raises(ValueError, match=r"has SHA-256 [0-9a-f]{64}, not bigbench 1\.0\.0's 1bb398a"):
            bigbench.fetch()
    assert not list(cache.iterdir())
    less = {name: rows for name, rows in CONTENT.items() if "strategyqa" not in name}
    with pytest.raises(ValueError, match=r"holds no strategyqa/task\.json"):
        bigbench.write_tasks(write_archive(tmp_path / "b.tar.gz", less), tmp_path / "tasks")
