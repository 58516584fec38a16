"""Times and peak memory of contenders, taken in turn in one run, so that what slows the machine slows all of them."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch

from miras.bench.case import DECODED, Case
from miras.bench.contenders import Contender, Work
from miras.bench.delta_rule import BLOCK
from miras.choice import require
from miras.kernels import space
from miras.train.callbacks import peak_memory as process_peak
from miras.train.callbacks import reset_peak_memory


@dataclass(frozen=True)
class Measurement:
    """One contender on one case in one mode.

    seconds      of every repeat
    tokens       that a repeat works on
    flops        of its matrix products, nothing computed twice (the floor's: all that it computes); None if not counted
    peak_bytes   memory that one repeat needs beyond its inputs; None if not measured
    """

    name: str
    about: str
    mode: str
    case: Case
    tokens: int
    seconds: tuple[float, ...]
    flops: int | None = None
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.median

    @property
    def flop_rate(self) -> float | None:
        """FLOPs a second, at the median."""
        return None if self.flops is None else self.flops / self.median


@dataclass(frozen=True)
class Refusal:
    """A contender that was left out, and why."""

    name: str
    mode: str
    reason: str


@dataclass(frozen=True)
class Results:
    """What a run measured; serialises to JSON and back, equal."""

    machine: Mapping[str, Any]
    measurements: tuple[Measurement, ...]
    refusals: tuple[Refusal, ...] = field(default=())

    def find(self, name: str, mode: str, case: Case) -> Measurement | None:
        """The measurement of a contender."""
        same = (m for m in self.measurements if (m.name, m.mode, m.case) == (name, mode, case))
        return next(same, None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the derived figures beside the measured ones."""
        rows = [
            {**asdict(m), "case": m.case.to_dict(), "seconds": list(m.seconds)}
            | {"median": m.median, "tokens_per_second": m.tokens_per_second, "flop_rate": m.flop_rate}
            for m in self.measurements
        ]
        return {"machine": dict(self.machine), "measurements": rows, "refusals": [asdict(r) for r in self.refusals]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Results:
        """The results of a `to_dict`."""
        derived = ("median", "tokens_per_second", "flop_rate")
        rows = [
            Measurement(
                **{k: x for k, x in row.items() if k not in (*derived, "case", "seconds")},
                case=Case.from_dict(row["case"]),
                seconds=tuple(row["seconds"]),
            )
            for row in data["measurements"]
        ]
        return cls(data["machine"], tuple(rows), tuple(Refusal(**r) for r in data["refusals"]))


def measure(
    cases: Sequence[Case],
    modes: Sequence[str],
    chosen: Sequence[Contender],
    repeats: int = 5,
    memory: bool = True,
    progress: Callable[[str], object] = str,
) -> Results:
    """Measure every contender that can run on every case in every mode.

    After one repeat that is not counted, contenders take turns (A B C A B C ...); one that runs out of GPU memory, or whose
    path cannot run after all, is left out. Peak memory is that of one repeat in a fresh process for each: allocated on a
    GPU, resident otherwise, above what was there when it began.

    Raises:
        ValueError: no contender can run.
    """
    require(repeats >= 1, f"repeats={repeats}; must be at least 1")
    found: list[Measurement] = []
    refusals: list[Refusal] = []
    for case in cases:
        for mode in modes:
            reasons = [(contender, contender.refusal(case, mode)) for contender in chosen]
            able = [contender for contender, reason in reasons if reason is None]
            progress(f"{case.model}, {case.tokens} tokens, {mode}: {', '.join(c.name for c in able)}")
            seconds, failed = _timed(case, mode, able, repeats)
            refused = [Refusal(c.name, mode, reason) for c, reason in reasons if reason is not None]
            refusals = list(dict.fromkeys([*refusals, *refused, *failed]))
            found += [_measurement(case, mode, contender, times, memory) for contender, times in seconds.items()]
    require(len(found) > 0, "nothing to measure: " + "; ".join(f"{r.name} ({r.mode}): {r.reason}" for r in refusals))
    return Results(machine(), tuple(found), tuple(refusals))


def _measurement(case: Case, mode: str, contender: Contender, times: list[float], memory: bool) -> Measurement:
    return Measurement(
        contender.name,
        contender.describe(case, mode),
        mode,
        case,
        case.batch * (DECODED if mode == "decode" else case.tokens),
        tuple(times),
        contender.flops(case, mode),
        peak_memory(contender, case, mode) if memory else None,
    )


def _timed(
    case: Case, mode: str, able: Sequence[Contender], repeats: int
) -> tuple[dict[Contender, list[float]], list[Refusal]]:
    """Seconds of every repeat of every contender, taken in turn, and why those that are left out of them failed."""
    works: dict[Contender, Work] = {}
    seconds: dict[Contender, list[float]] = {contender: [] for contender in able}
    failed: list[Refusal] = []

    @contextlib.contextmanager
    def left_out_if_it_fails(contender: Contender) -> Generator[None]:
        try:
            yield
        except (torch.OutOfMemoryError, ValueError) as error:
            # A path that accepts a design by its facts may still find that it cannot run it: a ValueError of `memorize`.
            works.pop(contender, None)
            seconds.pop(contender, None)
            reason = "out of GPU memory" if isinstance(error, torch.OutOfMemoryError) else str(error)
            refresh = f", refresh {case.design.refresh}" if case.design.parametric else ""
            failed.append(Refusal(contender.name, mode, f"{case.tokens} tokens{refresh}: {reason}"))

    for contender in able:
        with left_out_if_it_fails(contender):
            works[contender] = contender.work(case, mode)
    gc.collect()
    for repeat in range(repeats + 1):
        for contender, work in list(works.items()):
            with left_out_if_it_fails(contender):
                _wait(case)
                start = time.perf_counter()
                work()
                _wait(case)
                if repeat > 0:
                    seconds[contender].append(time.perf_counter() - start)
    return seconds, failed


def _wait(case: Case) -> None:
    if case.device.startswith("cuda"):
        torch.cuda.synchronize(case.device)


def peak_memory(contender: Contender, case: Case, mode: str) -> int | None:
    """Bytes that one repeat needs beyond its inputs, in a fresh process; None if it was killed or ran out of GPU memory."""
    torch.cuda.empty_cache()  # the fresh process needs what this one only keeps for later
    with ProcessPoolExecutor(1, mp_context=_fresh()) as pool:
        try:
            return pool.submit(_peak, contender, case, mode, torch.get_num_threads()).result()
        except (BrokenProcessPool, torch.OutOfMemoryError):
            return None


def _fresh() -> BaseContext:
    """Processes that have imported this module and done nothing else."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _peak(contender: Contender, case: Case, mode: str, threads: int) -> int:
    """In the fresh process: a short repeat first, so that what a library allocates once is not counted."""
    torch.set_num_threads(threads)
    short = 2 * math.lcm(case.design.refresh, BLOCK)  # whole windows, and whole blocks of the peer that has its own
    contender.work(replace(case, tokens=min(case.tokens, short)), mode)()
    work = contender.work(case, mode)
    gc.collect()
    _release()
    _wait(case)
    on_cpu = not case.device.startswith("cuda")
    reset_peak_memory()
    before = process_peak(on_cpu)
    work()
    _wait(case)
    return process_peak(on_cpu) - before


def _release() -> None:
    """Give freed memory back to the system: what a repeat takes of it would not show."""
    space.forget()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def machine() -> dict[str, Any]:
    """What the figures were taken on, for JSON."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
