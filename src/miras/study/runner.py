"""Doing a study's runs: in this process, or on Ray with as many at a time as there are cores or a cluster has."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from miras.study.config import ResourcesSection, Study, import_all
from miras.study.plan import Planned, Run
from miras.study.run import Row, execute
from miras.study.search import batches
from miras.study.store import Store

log = logging.getLogger("miras")

POLL = 2.0  # seconds between looks at what another process is doing

Submit = Callable[[Run], Any]
Collect = Callable[[list[Any]], tuple[Any, Row]]
"""Waits for one of the submitted handles, and gives it with its row."""


def run_study(study: Study, address: str | None = None, workers: int | None = None, retry: bool = False) -> list[Planned]:
    """Do every run that the store does not have yet; all that the study planned.

    address   of a Ray cluster ("auto" for one that runs here); None for cores of this machine
    workers   runs at a time (default: all that the machine or cluster has room for); 0: in this process, without Ray
    retry     repeat the runs that failed or diverged

    Raises:
        ValueError: settings that no run could have, before anything has run.
        ImportError: Ray is not installed.
    """
    store, planned, done = Store(Path(study.out)), [], set[str]()
    (Path(study.out) / "study.yaml").write_text(study.to_yaml(), encoding="utf-8")

    def lookup(key: str) -> Row | None:
        row = store.get(key)
        again = retry and row is not None and row.status != "done" and key not in done
        return None if again else row

    with _machine(study, address, workers) as (submit, collect, room):
        for batch in batches(study, store.get):
            planned += batch
            missing = {item.run.key: item for item in batch if lookup(item.run.key) is None}
            if workers == 0 and len(done) + len(missing) > 1:
                store.share()
            _do(list(missing.values()), len(batch), store, lookup, (submit, collect, room))
            done |= set(missing)
    return planned


def _do(
    missing: list[Planned],
    total: int,
    store: Store,
    lookup: Callable[[str], Row | None],
    machine: tuple[Submit, Collect, int],
) -> None:
    """Do the missing runs, at most `room` at a time; those that another process has claimed are waited for."""
    submit, collect, room = machine
    progress = _Progress(len(missing), total)
    waiting, running = list(missing), dict[Any, tuple[Planned, Any]]()
    while waiting or running:
        elsewhere: list[Planned] = []
        while waiting and len(running) < room:
            planned = waiting.pop(0)
            claim = store.claim(planned.run.key)
            if claim is None:
                elsewhere.append(planned)
            elif lookup(planned.run.key) is not None:  # Done elsewhere since we looked.
                claim.release()
            else:
                running[submit(planned.run)] = (planned, claim)
        waiting += elsewhere
        if running:
            handle, row = collect(list(running))
            planned, claim = running.pop(handle)
            store.put(row)
            claim.release()
            progress.report(planned, row)
        elif elsewhere:
            time.sleep(POLL)


class _Progress:
    """A line a finished run, with how long the rest will take at this pace."""

    def __init__(self, missing: int, total: int) -> None:
        self.missing, self.done, self.began = missing, 0, time.monotonic()
        if total > missing:
            log.info("%d of %d runs are in the store already", total - missing, total)

    def report(self, planned: Planned, row: Row) -> None:
        """Say what a run came to."""
        self.done += 1
        left = (time.monotonic() - self.began) / self.done * (self.missing - self.done)
        first = row.tests[0]["metrics"] if row.tests else {}
        said = ", ".join(f"{name} {value:.4g}" for name, value in first.items()) if row.status == "done" else row.error
        status = "" if row.status == "done" else f"{row.status.upper()} "
        log.info(
            "[%d/%d] %s: %s%s (%.0f s; %.0f min left)",
            self.done,
            self.missing,
            planned.label,
            status,
            said,
            row.seconds,
            left / 60,
        )


@contextmanager
def _machine(study: Study, address: str | None, workers: int | None) -> Generator[tuple[Submit, Collect, int]]:
    """How to submit a run, how to collect one, and how many at a time."""
    resources, imports = study.resources, study.imports
    commit = commit_here()
    if workers == 0:
        if address is not None:
            raise ValueError(
                "--workers 0 does the runs in this process; leave --address out, or give the workers it may use"
            )
        yield (lambda run: run), (lambda handles: (handles[0], execute(handles[0], resources, commit))), 1
        return
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError as error:
        raise ImportError(
            "a study runs on Ray: pip install 'torch-miras[study]', or --workers 0 for one run at a time"
        ) from error
    cores = os.cpu_count() or 1
    local: dict[str, Any] = {"num_cpus": max(cores, (workers or 0) * resources.threads), "include_dashboard": False}
    # Each worker may use as many threads as a run has, and no more.
    variables = {"OMP_NUM_THREADS": str(resources.threads), "TOKENIZERS_PARALLELISM": "false"}
    ray.init(
        address=address or "local",
        runtime_env={"env_vars": variables},
        log_to_driver=False,
        configure_logging=False,
        **({} if address else local),
    )
    try:
        # By default a process for each run: peak memory is its own, and what one breaks does not reach the next.
        limits: Any = {"num_cpus": resources.threads, "num_gpus": resources.gpus, "max_calls": resources.process_runs}
        remote: Any = ray.remote(**limits, max_retries=0)(_remote)
        room = workers or max(1, int(ray.cluster_resources().get("CPU", 1) // resources.threads))
        runs: dict[Any, Run] = {}

        def submit(run: Run) -> Any:
            handle = remote.remote(asdict(run), asdict(resources), commit, imports)
            runs[handle] = run
            return handle

        def collect(handles: list[Any]) -> tuple[Any, Row]:
            [handle], _ = ray.wait(handles, num_returns=1)
            run = runs.pop(handle)
            try:
                return handle, Row(**ray.get(handle))
            except RayError as error:
                said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                return handle, Row(run.key, "failed", said, str(error), asdict(run), commit)

        yield submit, collect, room
    finally:
        ray.shutdown()


def _remote(run: dict[str, Any], resources: dict[str, Any], commit: str, imports: list[str]) -> dict[str, Any]:
    """A run in a worker of Ray."""
    import_all(imports)
    return asdict(execute(Run(**run), ResourcesSection(**resources), commit))


def commit_here() -> str:
    """The commit of the code, with "+" if files differ from it; empty where the package is not in a git checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        found = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
        return found.stdout.strip() if found.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if commit and git("status", "--porcelain", "--untracked-files=no", ".") else "")
    except OSError:
        return ""
