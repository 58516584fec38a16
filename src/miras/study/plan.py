"""From a study to its runs: every setting of the axes, resolved to plain numbers and named by a hash of them."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from miras import models
from miras.sections import sections_from
from miras.study.config import MODEL_PARTS, SizeSection, Study, TrainSection, ablated, merged
from miras.study.model import fitted, measures
from miras.tasks import Task

VERSION = 1
"""Part of every hash: raised when the same configuration no longer means the same run."""

ROOTS = ("train", "size", "design")
SAME_FOR_ALL = ("train.steps", "train.batch_size", "train.num_tests", "size.parameters")
"""What a comparison needs to be equal: the examples that a run sees, and the parameters."""

HEATMAP_KEYS = ("x", "y", "metric", "condition", "models")
MODEL_KEYS = ("name", *MODEL_PARTS)


@dataclass(frozen=True)
class Run:
    """All that makes a run what it is, as plain dictionaries: one training and its tests.

    evaluate   settings to run the trained model with, each {"settings": {key: value}, "design": ...}
    """

    task: dict[str, Any]
    design: dict[str, Any]
    size: dict[str, Any]
    train: dict[str, Any]
    seed: int
    evaluate: list[dict[str, Any]]

    @cached_property
    def key(self) -> str:
        """Hash of the resolved configuration, by which a finished run is recognised."""
        text = json.dumps([VERSION, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True)
class Planned:
    """A run and its place in the study: task, size, model, the values of the axes (and in words), the seed."""

    task: str
    size: str
    model: str
    settings: tuple[tuple[str, Any], ...]
    words: str
    run: Run

    @property
    def label(self) -> str:
        """For logs: model, task and whatever else tells it apart."""
        parts = [f"{self.model} on {self.task}", self.size, self.words, f"seed {self.run.seed}"]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Axis:
    """A key and its values, or the range from `low` to `high` that a search draws from."""

    key: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False

    def draw(self, rng: np.random.Generator) -> Any:
        """A value at random: one of `values`, or from the range, evenly or evenly in the logarithm."""
        if self.values:
            return self.values[int(rng.integers(len(self.values)))]
        if self.integer and not self.log:
            return int(rng.integers(int(self.low), int(self.high) + 1))
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = float(rng.uniform(low, high))
        value = math.exp(value) if self.log else value
        return round(value) if self.integer else value

    @property
    def spread(self) -> dict[str, Any]:
        """The range's bounds."""
        return {"low": self.low, "high": self.high, "log": self.log}


@dataclass(frozen=True)
class Group:
    """A task, a size and a model, which have axes in common: one search."""

    task: str
    size: str
    model: str
    axes: tuple[Axis, ...]


def groups(study: Study) -> list[Group]:
    """Every task, size and model. Raises ValueError for axes that are none."""
    return [
        Group(task, size, model, axes_of(merged(study.axes, entry.get("axes", {})), study.search.kind))
        for task, size, (model, entry) in itertools.product(study.tasks, study.sizes or [""], all_models(study).items())
    ]


def check_heatmaps(study: Study) -> None:
    """Refuse heat maps over what does not vary, and of models, metrics and conditions that are none. Raises ValueError."""
    models = all_models(study)
    axes = {axis.key for group in groups(study) for axis in group.axes}
    changes = {
        f"evaluate.{key}" for entry in models.values() for key, _ in _flat(merged(study.evaluate, entry.get("evaluate", {})))
    }
    allowed = [*sorted(axes | changes), "model"]
    for entry in study.heatmaps:
        if not isinstance(entry, Mapping) or not {"x", "y"} <= set(entry) <= set(HEATMAP_KEYS):
            raise ValueError(
                f"study: heat map {entry!r}; its keys are {', '.join(HEATMAP_KEYS)}, of which x and y are needed"
            )
        conditions = sorted({name for task in study.tasks.values() for name in _task(task).tests()})
        for key, names, known in (
            ("models", entry.get("models", []), list(models)),
            ("condition", [entry.get("condition") or ""], conditions),
        ):
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"study: a heat map's {key}: {unknown[0]!r}; there are {', '.join(map(repr, known))}")
        _check_metric(study, entry)
        for side in ("x", "y"):
            if entry[side] not in allowed:
                raise ValueError(f"study: heat map over {entry[side]!r}, which does not vary; allowed: {', '.join(allowed)}")


def _check_metric(study: Study, entry: Mapping[str, Any]) -> None:
    """Refuse a heat map of what no task measures."""
    tasks, metric = [_task(task) for task in study.tasks.values()], entry.get("metric")
    changed = ["deviation"] if any(str(entry[side]).startswith("evaluate.") for side in ("x", "y")) else []
    if metric in (None, *changed, *(task.metric for task in tasks)):
        return
    known = sorted({*changed, *(name for task in tasks for name in measures(task))})
    if metric not in known:
        hint = "; deviation needs an evaluate.* for x or y" if metric == "deviation" else ""
        raise ValueError(f"study: a heat map's metric: {metric!r}; there are {', '.join(map(repr, known))}{hint}")


def check_tasks(study: Study) -> None:
    """Draw an example of every task and condition, and refuse those that give none. Raises ValueError.

    Also refuses comparisons under conditions that a task does not test.
    """
    for name, entry in study.tasks.items():
        try:
            task = _task(entry)
            conditions = task.tests()
            for each in (task, task.validation(), *conditions.values()):
                each.sample(1, np.random.default_rng(0))
        except (TypeError, ValueError) as error:
            raise ValueError(f"study: task {name}: {error}") from error
        for condition in study.compare.get(name, []):
            if condition not in conditions:
                known = ", ".join(map(repr, conditions))
                raise ValueError(f"study: compare.{name} names {condition!r}; that task tests {known}")


def _task(entry: Mapping[str, Any]) -> Task:
    """The task of an entry of `tasks`."""
    return Task.from_dict({key: value for key, value in entry.items() if key not in ("train", "size")})


def all_models(study: Study) -> dict[str, dict[str, Any]]:
    """The models and those of the ablations, by name. Raises ValueError for entries that are none."""
    found = {**study.models, **ablated(study)}
    for name, entry in found.items():
        if "name" not in entry:
            raise ValueError(f"study: model {name!r} is {entry!r}; give {{name: a function of miras.models, ...}}")
        for key in entry:
            if key not in MODEL_KEYS:
                raise ValueError(f"study: model {name!r} has the key {key!r}; allowed: {', '.join(MODEL_KEYS)}")
    return found


def grid(group: Group) -> list[dict[str, Any]]:
    """Every combination of the axes' values."""
    keys = [axis.key for axis in group.axes]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(axis.values for axis in group.axes))]


def random_settings(group: Group, trials: int, seed: int) -> list[dict[str, Any]]:
    """`trials` combinations at random, which depend on the seed and the group's names alone."""
    words = hashlib.sha256(json.dumps([seed, group.task, group.size, group.model]).encode()).digest()
    rng = np.random.default_rng(np.frombuffer(words, np.uint32))
    return [{axis.key: axis.draw(rng) for axis in group.axes} for _ in range(trials)]


def plan(study: Study, group: Group, settings: Mapping[str, Any]) -> list[Planned]:
    """The runs of one setting, a seed each.

    Raises:
        ValueError: a setting that no run could have; the message says which.
    """
    task, model, by_size = study.tasks[group.task], all_models(study)[group.model], study.sizes.get(group.size, {})
    own, words = {part: nested(settings, part) for part in ROOTS}, shown(settings.items(), varied(study))
    by_task = {"train": task.get("train", {}), "size": task.get("size", {})}
    _refuse_unequal(group.model, model)
    try:
        asked = _task(task)
        if both := sorted({*by_task["size"]} & {*by_size}):
            raise ValueError(f"both the task and the size set size.{both[0]}; leave it to one of them")
        train = _section(TrainSection, "train", study.train, by_task["train"], model.get("train", {}), own["train"])
        size = _section(SizeSection, "size", study.size, by_size, by_task["size"], model.get("size", {}), own["size"])
        changes = merged(model.get("design", {}), own["design"])
        design = models.named(model["name"], **changes).to_dict()
        if size["parameters"] is None:
            raise ValueError("size.parameters is missing: say how many every model gets, so that they are comparable")
        size = fitted(asked, design, size, group.model)
        evaluate = _evaluations(model, changes, merged(study.evaluate, model.get("evaluate", {})))
    except (TypeError, ValueError) as error:
        where = ", ".join(part for part in (group.task, group.size, group.model, words) if part)
        raise ValueError(f"study: {where}: {error}") from error
    run = Run(asked.to_dict(), design, size, train, 0, evaluate)
    return [
        Planned(group.task, group.size, group.model, tuple(settings.items()), words, replace(run, seed=seed))
        for seed in study.seeds
    ]


def axes_of(raw: Mapping[str, Any], search: str) -> tuple[Axis, ...]:
    """Axes from lists and ranges by dotted or nested keys. Raises ValueError for what is none.

    Refused too are axes over what all runs of a task and a size have in common: among those no setting could be selected.
    """
    found: dict[str, Axis] = {}
    for key, value in _flat(raw):
        if key in SAME_FOR_ALL or key.startswith("task."):
            raise ValueError(
                f"study: axis {key}; settings of a model are compared at equal examples and parameters. "
                "Give several `tasks` (each may have a `train` of its own) or `sizes`"
            )
        if key.split(".")[0] not in ROOTS or "." not in key:
            raise ValueError(f"study: axis {key!r}; a key begins with {', '.join(f'{root}.' for root in ROOTS)}")
        if isinstance(value, list) and value:
            found[key] = Axis(key, tuple(value))
        elif isinstance(value, Mapping) and search != "grid":
            found[key] = Axis(key, **_range(key, value))
        else:
            hint = "; a range needs search.kind random or optuna" if isinstance(value, Mapping) else ""
            raise ValueError(f"study: axis {key} is {value!r}; give a list of values{hint}")
    return tuple(found.values())


def shown(settings: Iterable[tuple[str, Any]], keys: Iterable[str] = ()) -> str:
    """Settings for people: each key, no longer than tells it from all of `keys`, and its value."""
    return ", ".join(f"{short(key, keys)} {_value(value)}" for key, value in settings)


def short(key: str, keys: Iterable[str]) -> str:
    """The last parts of a dotted key, as many as none of the others ends in."""
    parts, others = key.split("."), [f".{other}" for other in keys if other != key]
    endings = [".".join(parts[begin:]) for begin in range(len(parts) - 1, 0, -1)]
    return next((end for end in endings if not any(other.endswith(f".{end}") for other in others)), key)


def varied(study: Study) -> set[str]:
    """The keys of all axes, and of `evaluate`."""
    entries = [{"axes": study.axes, "evaluate": study.evaluate}, *all_models(study).values()]
    return {key for entry in entries for part in ("axes", "evaluate") for key, _ in _flat(entry.get(part, {}))}


def nested(settings: Mapping[str, Any], root: str) -> dict[str, Any]:
    """The settings under a root, as nested mappings: {"design.bias.p": 3} is {"bias": {"p": 3}} under design."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        first, *path = key.split(".")
        if first == root:
            for part in reversed(path):
                value = {part: value}
            found = merged(found, value)
    return found


def _section(kind: type[Any], name: str, base: Any, *changes: Mapping[str, Any]) -> dict[str, Any]:
    """A section with changes laid over it, checked: unknown keys are refused."""
    values = asdict(base)
    for change in changes:
        values = merged(values, change)
    return {**asdict(sections_from(kind, values, noun=name))}


def _evaluations(model: Mapping[str, Any], changes: Mapping[str, Any], raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    axes = axes_of(raw, "grid")
    if any(not axis.key.startswith("design.") for axis in axes):
        raise ValueError(
            f"evaluate has the keys {', '.join(axis.key for axis in axes)}; only design.* can change after training"
        )
    found: list[dict[str, Any]] = []
    for settings in grid(Group("", "", "", axes)) if axes else []:
        design = models.named(model["name"], **merged(changes, nested(settings, "design")))
        found.append({"settings": settings, "design": design.to_dict()})
    return found


def _refuse_unequal(name: str, model: Mapping[str, Any]) -> None:
    """Refuse a model's own parameters or examples: that comparison would not be equal."""
    own = [key for part in ("train", "size") for key, _ in _flat(model.get(part, {}), f"{part}.") if key in SAME_FOR_ALL]
    if own:
        raise ValueError(
            f"study: model {name!r} has its own {', '.join(own)}; all models get the same. Set it for all of them"
        )


def _flat(raw: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in raw.items():
        if isinstance(value, Mapping) and not {"low", "high"} & set(value):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _range(key: str, value: Mapping[str, Any]) -> dict[str, Any]:
    allowed = ("low", "high", "log", "integer")
    if not {"low", "high"} <= set(value) <= set(allowed) or not value["low"] < value["high"]:
        raise ValueError(f"study: axis {key} is {dict(value)!r}; a range has low < high, and perhaps log and integer")
    if value.get("log") and value["low"] <= 0:
        raise ValueError(f"study: axis {key} has low {value['low']}; a logarithmic range is positive")
    return dict(value)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        kind = [str(value["kind"])] if "kind" in value else []
        return " ".join([*kind, *(f"{key}={_value(item)}" for key, item in value.items() if key != "kind")])
    return f"{value:.3g}" if isinstance(value, float) else str(value)
