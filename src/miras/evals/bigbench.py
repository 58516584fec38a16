"""Three BIG-bench tasks as local files for the harness: social_iqa, subject_verb_agreement and strategyqa.

They come from the package bigbench on PyPI, which is fetched only by `fetch`; nothing of it but these tasks is kept, and
none of its code is run. Never train on them.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from miras.train.data import cache_folder

VERSION = "1.0.0"
SHA256 = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
MEGABYTES = 358
LAYOUT = 1  # of the files that `write_tasks` writes

QUESTIONS = ("social_iqa", "strategyqa")
AGREEMENT = tuple(
    f"{part}_english"
    for part in (
        "simple",
        "adv",
        "adv_adv",
        "adv_conjunction",
        "namepp",
        "nounpp_adv",
        "nounpp",
        "long_nested_inner",
        "long_nested_outer",
        "linzen2016",
        "gulordava_nonce",
        "frequency_disbalance_nonce",
    )
)
"""The twelve constructions that BIG-bench's own subject_verb_agreement averages over."""

TASKS = ("bigbench_social_iqa", "bigbench_strategyqa", "bigbench_subject_verb_agreement")


def tasks_folder() -> Path:
    """The folder of the tasks' YAML and data files. Raises FileNotFoundError, saying what to do, before `fetch`."""
    folder = _folder()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{', '.join(TASKS)} are not on this machine. `miras eval ... --download` fetches them: {MEGABYTES} MB from "
            f"PyPI (bigbench {VERSION}), of which about 9 MB stay in {folder}"
        )
    return folder


def fetch() -> Path:
    """Download bigbench's source archive (358 MB), check its SHA-256 and write the three tasks' files into the cache.

    Raises:
        FileNotFoundError: pip is missing, or cannot get the archive.
        ValueError: the archive is not the known one.
    """
    folder = _folder()
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=folder.parent) as building:
        archive = _download(Path(building))
        check(archive)
        write_tasks(archive, Path(building) / "tasks", folder)
        (Path(building) / "tasks").rename(folder)
    return folder


def check(archive: Path) -> None:
    """Raise ValueError unless `archive` has the known SHA-256."""
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(f"{archive.name} has SHA-256 {found}, not bigbench {VERSION}'s {SHA256}; nothing was kept of it")


def write_tasks(archive: Path, folder: Path, home: Path | None = None) -> None:
    """Write each task's examples (JSON lines) and its description for the harness (YAML) into `folder`.

    `home` is where the folder will lie in the end: the harness wants absolute paths of the data.
    """
    folder.mkdir()
    home = (home or folder).resolve()
    files = [f"{name}/task.json" for name in QUESTIONS] + [f"subject_verb_agreement/{name}.json" for name in AGREEMENT]
    found = _members(archive, files)
    for name in QUESTIONS:
        _write_task(folder, home, f"bigbench_{name}", found[f"{name}/task.json"], "Q: {{input}}\nA:")
    names = [f"bigbench_subject_verb_agreement_{name}" for name in AGREEMENT]
    for name, file in zip(names, files[len(QUESTIONS) :], strict=True):
        _write_task(folder, home, name, found[file], "{{input}}")
    mean = [{"metric": metric, "aggregation": "mean", "weight_by_size": False} for metric in ("acc", "acc_norm")]
    group = {"group": "bigbench_subject_verb_agreement", "task": names, "aggregate_metric_list": mean}
    _write_yaml(folder / "subject_verb_agreement.yaml", group)


def examples(raw: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """BIG-bench's examples as input, choices and the right one's index, in an order that any first part is fair to.

    The source sorts them by condition, singular first; here they are sorted by hash. An example without exactly one
    right answer among at least two is left out (one of linzen2016's 500).
    """
    rows: list[dict[str, Any]] = []
    for example in raw:
        scores: dict[str, float] = example["target_scores"]
        right = [index for index, score in enumerate(scores.values()) if score == 1]
        if len(scores) > 1 and len(right) == 1:
            rows.append({"input": example["input"].strip(), "choices": list(scores), "answer": right[0]})
    return sorted(rows, key=lambda row: hashlib.sha256(json.dumps(row).encode()).digest())


def _folder() -> Path:
    return cache_folder() / f"bigbench-{VERSION}-{LAYOUT}"


def _download(folder: Path) -> Path:
    """The source archive, by pip, which checks the hash before it reads the package's metadata."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"bigbench=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    options = ["--no-deps", "--no-binary", "bigbench", "--require-hashes", "-r", str(requirements), "-d", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    archives = list(folder.glob("bigbench-*.tar.gz"))
    if done.returncode or not archives:
        said = done.stdout.decode(errors="replace").strip().splitlines() or ["nothing"]
        raise FileNotFoundError(f"pip could not download bigbench {VERSION} ({MEGABYTES} MB); it said: {said[-1]}")
    return archives[0]


def _members(archive: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The named files under benchmark_tasks, read in one pass without unpacking the archive."""
    wanted = {f"bigbench-{VERSION}/bigbench/benchmark_tasks/{name}": name for name in names}
    found: dict[str, dict[str, Any]] = {}
    with tarfile.open(archive, "r|gz") as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name in wanted else None
            if file is not None:
                found[wanted[member.name]] = json.load(file)
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{archive.name} holds no {', '.join(missing)}")
    return found


def _write_task(folder: Path, home: Path, name: str, content: dict[str, Any], prompt: str) -> None:
    rows = examples(content["examples"])
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(home / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": prompt,
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": metric} for metric in ("acc", "acc_norm")],
        "metadata": {"version": LAYOUT},
    }
    _write_yaml(folder / f"{name}.yaml", task)


def _write_yaml(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")  # JSON is YAML
