"""The runs of a study in batches: a grid or random settings in one, guided trials as each batch's results come in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from miras.study.config import Study
from miras.study.plan import Group, Planned, grid, groups, plan, random_settings
from miras.study.run import Row
from miras.tasks import Task

if TYPE_CHECKING:
    from optuna.trial import Trial

Lookup = Callable[[str], Row | None]
"""A run's row by its hash, None if it is not done."""


def batches(study: Study, lookup: Lookup) -> Iterator[list[Planned]]:
    """Runs to do before the next batch can be said; with Optuna, each follows from the rows of those before it.

    Raises:
        ValueError: settings that no run could have, before anything has run (of guided trials: when they are proposed).
    """
    if study.search.kind == "optuna":
        yield from _guided(study, lookup)
        return
    search = study.search
    tried = [
        [
            plan(study, group, settings)
            for settings in (grid(group) if search.kind == "grid" else random_settings(group, search.trials, search.seed))
        ]
        for group in groups(study)
    ]
    seeds = search.seeds or len(study.seeds)
    yield [run for settings in tried for runs in settings for run in runs[:seeds]]
    if seeds < len(study.seeds):
        yield [run for settings in tried for run in _best(settings, seeds, lookup)[seeds:]]


def finished_batches(study: Study, lookup: Lookup) -> list[Planned]:
    """Every run that can be said from the rows there are."""
    found: list[Planned] = []
    for batch in batches(study, lookup):
        found += batch
        if any(lookup(planned.run.key) is None for planned in batch):
            break
    return found


def score(planned: list[Planned], lookup: Lookup) -> float | None:
    """What a setting is selected by: the mean over seeds of the task's metric on validation draws; None if a run failed."""
    rows = [lookup(item.run.key) for item in planned]
    metric = Task.from_dict(planned[0].run.task).metric
    values = [row.validation[metric] for row in rows if row is not None and row.status == "done"]
    return sum(values) / len(values) if len(values) == len(planned) and all(map(math.isfinite, values)) else None


def _best(settings: list[list[Planned]], seeds: int, lookup: Lookup) -> list[Planned]:
    """The runs of the setting with the best score on the first `seeds` seeds, of the first one if all failed."""
    higher = Task.from_dict(settings[0][0].run.task).higher_is_better
    scores = [score(runs[:seeds], lookup) for runs in settings]
    worst = -math.inf if higher else math.inf
    known = [worst if value is None else value for value in scores]
    return settings[known.index(max(known) if higher else min(known))]


def _guided(study: Study, lookup: Lookup) -> Iterator[list[Planned]]:
    try:
        import optuna
    except ImportError as error:
        raise ImportError("search.kind optuna needs Optuna: pip install 'torch-miras[study]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searches: list[tuple[Group, Any]] = []
    for group in groups(study):
        higher = Task.from_dict(
            {k: v for k, v in study.tasks[group.task].items() if k not in ("train", "size")}
        ).higher_is_better
        sampler = optuna.samplers.TPESampler(seed=study.search.seed, n_startup_trials=max(4, study.search.trials // 4))
        searches.append((group, optuna.create_study(direction="maximize" if higher else "minimize", sampler=sampler)))
    done = 0
    while done < study.search.trials:
        size = min(study.search.batch, study.search.trials - done)
        asked: list[tuple[Any, Trial, list[Planned]]] = []
        for group, search in searches:
            for _ in range(size):
                trial = search.ask()
                settings = {axis.key: _suggest(trial, axis) for axis in group.axes}
                asked.append((search, trial, plan(study, group, settings)))
        yield [run for _, _, runs in asked for run in runs]
        for search, trial, runs in asked:
            value = score(runs, lookup)
            search.tell(trial, value, state=optuna.trial.TrialState.FAIL if value is None else None)
        done += size


def _suggest(trial: Trial, axis: Any) -> Any:
    if axis.values:
        # Optuna wants plain values; a choice of a design is a dictionary.
        return axis.values[trial.suggest_categorical(axis.key, list(range(len(axis.values))))]
    if axis.integer:
        return trial.suggest_int(axis.key, int(axis.low), int(axis.high), log=axis.log)
    return trial.suggest_float(axis.key, axis.low, axis.high, log=axis.log)
