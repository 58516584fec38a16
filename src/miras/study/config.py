"""Study files: which tasks, models and sizes to train with which seeds and settings, and what to make of the figures."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from miras.sections import read_mapping, sections_from
from miras.train.config import Optimisation, check_optimisation, require_positive

SEARCHES = ("grid", "random", "optuna")
INTERVALS = ("percentile", "BCa")
TESTS = ("t", "permutation")
CORRECTIONS = ("holm", "bonferroni", "fdr_bh", "fdr_by")

MODEL_PARTS = ("design", "train", "size", "axes", "evaluate")
ENTRIES = {
    "tasks": ("{kind: MQAR, ...}", ("train", "size")),
    "models": ("{name: yaad, ...}", MODEL_PARTS),
    "sizes": ("{hidden_size: 64, ...}", ()),
}
"""Keys whose entries are mappings: what such an entry looks like, and which of its own entries are mappings again."""


@dataclass
class SizeSection:
    """The backbone. Every model gets `parameters` in all: the width of its feed-forward layers is what gives way."""

    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_heads: int = 2
    parameters: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainSection(Optimisation):
    """Optimisation of every run, and `num_tests` examples for each condition of a task's tests."""

    batch_size: int = 32
    num_tests: int = 256


@dataclass
class ResourcesSection:
    """What one run may use; it is no part of what the run is. Without `gpus` a run stays on the CPU.

    compile          also the windows of deep memories too small to be worth it for one run
    process_runs     runs that a process does, one after another: more of them share the imports and what was compiled, but
                     the peak memory of each includes what earlier ones left
    """

    threads: int = 1
    gpus: float = 0.0
    compile: bool = False
    process_runs: int = 1


@dataclass
class SearchSection:
    """How settings are drawn from the axes: every one, `trials` random ones, or `trials` guided by Optuna's TPE.

    Guided trials are proposed `batch` at a time, for each task, size and model, from the mean over the seeds of what the
    model is selected by: the same file proposes the same trials, whatever ran where.

    With `seeds` a grid or random search looks at that many seeds, the first ones, and for each task, size and model only
    the best setting goes on to the others.
    """

    kind: str = "grid"
    trials: int = 20
    batch: int = 4
    seed: int = 0
    seeds: int | None = None


@dataclass
class StatisticsSection:
    """Bootstrap intervals over seeds, paired tests against the baselines, and the correction for their number."""

    confidence: float = 0.95
    interval: str = "percentile"
    resamples: int = 9999
    test: str = "t"
    correction: str = "holm"


@dataclass
class Study:
    """A study.

    seeds      each run's seed: initial weights, and with the task what examples the run sees
    tasks      name: {kind: ..., fields of the task, train: {...}, size: {...}}
    models     name: {name: a function of miras.models, design, train, size, axes, evaluate: what differs for this one}
    sizes      name: fields of `size` that differ (default: one size)
    axes       key: [values], or {low, high, log, integer} for a search; keys train.*, size.* and design.*
    evaluate   design.*: [values] with which a trained model is run again, and by how much its outputs then deviate from
               those at the first values
    baselines  models that every other one is tested against
    compare    task: [conditions of its tests] under which they are, "" being the unnamed one (default: the first alone)
    ablations  {of: model, revert: {label: {design: ..., ...}}}: the model with one choice changed at a time
    heatmaps   {x: key, y: key, metric: ..., condition: ..., models: [...]}; `evaluate.` before a key of `evaluate`
    imports    modules to import first: where tasks and choices of your own are defined
    about      a sentence for the report
    """

    name: str = ""
    out: str = "runs/studies/${name}"
    about: str = ""
    imports: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    tasks: dict[str, Any] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)
    size: SizeSection = field(default_factory=SizeSection)
    sizes: dict[str, Any] = field(default_factory=dict)
    train: TrainSection = field(default_factory=TrainSection)
    axes: dict[str, Any] = field(default_factory=dict)
    search: SearchSection = field(default_factory=SearchSection)
    evaluate: dict[str, Any] = field(default_factory=dict)
    baselines: list[str] = field(default_factory=list)
    compare: dict[str, Any] = field(default_factory=dict)
    ablations: list[Any] = field(default_factory=list)
    heatmaps: list[Any] = field(default_factory=list)
    statistics: StatisticsSection = field(default_factory=StatisticsSection)
    resources: ResourcesSection = field(default_factory=ResourcesSection)

    def to_yaml(self) -> str:
        """The resolved study."""
        return OmegaConf.to_yaml(OmegaConf.structured(self), resolve=True)


def read_study(path: str | Path, overrides: Iterable[str] = ()) -> Study:
    """A study from a YAML file and `key=value` overrides such as `train.steps=50` or `seeds=[0]`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unknown keys (with the allowed ones and the closest), wrong types, impossible values.
    """
    raw = read_mapping(path, "study", Study, "recipes/studies/ (recipes/studies/recall.yaml)")
    return study_from({"name": Path(path).stem, **raw}, overrides)


def study_from(raw: Mapping[str, Any], overrides: Iterable[str] = ()) -> Study:
    """A study from nested mappings and `key=value` overrides. Raises ValueError as `read_study` does."""
    study = sections_from(Study, raw, overrides, "study")
    _check(study)
    _check_entries(study)
    import_all(study.imports)
    return study


def import_all(modules: Iterable[str]) -> None:
    """Import modules, for the tasks and choices that they define. Raises ValueError for one that is not found."""
    for module in modules:
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            raise ValueError(f"study: imports names {module}: {error}; is its folder in PYTHONPATH?") from error


def restricted(study: Study, tasks: Sequence[str] = (), models: Sequence[str] = ()) -> Study:
    """The part of a study with the tasks and models named, all where none is. Raises ValueError for unknown names.

    A model comes with its ablations; one of them by its own name, "of: label", with its original and no other.
    """
    for key, names, known in (("task", tasks, study.tasks), ("model", models, {**study.models, **ablated(study)})):
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise ValueError(
                    f"study: no {key} {name!r}; there are {', '.join(known)}{f'; did you mean {near[0]}?' if near else ''}"
                )
    names = models or list(study.models)
    ablations = [{**entry, "revert": _named(entry, names)} for entry in study.ablations]
    ablations = [entry for entry in ablations if entry["revert"]]
    kept = [name for name in study.models if name in names or name in [entry["of"] for entry in ablations]]
    return replace(
        study,
        tasks={name: task for name, task in study.tasks.items() if not tasks or name in tasks},
        compare={name: found for name, found in study.compare.items() if not tasks or name in tasks},
        models={name: study.models[name] for name in kept},
        baselines=[name for name in study.baselines if name in kept],
        ablations=ablations,
    )


def _named(entry: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The ablations of a model that is named itself, or those of them that are."""
    of, revert = entry["of"], entry["revert"]
    return {label: changes for label, changes in revert.items() if of in names or f"{of}: {label}" in names}


def ablated(study: Study) -> dict[str, dict[str, Any]]:
    """The models of the ablations by name, "of: label"; each is its original with the entry's fields laid over it."""
    found: dict[str, dict[str, Any]] = {}
    for entry in study.ablations:
        original = study.models[entry["of"]]
        for label, changes in entry["revert"].items():
            found[f"{entry['of']}: {label}"] = merged(original, changes)
    return found


def merged(mapping: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with changes laid over it, nested ones too. A choice of another `kind` replaces the old one whole."""
    result = dict(mapping)
    for key, value in changes.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and value.get("kind") in (None, old.get("kind")):
            value = merged(old, value)
        result[key] = value
    return result


def _check(study: Study) -> None:
    """Refuse what no study could use."""
    for key in ("name", "seeds", "tasks", "models"):
        if not getattr(study, key):
            raise ValueError(f"study: {key} is missing; recipes/studies/recall.yaml is an example")
    if study.train.steps is None:
        raise ValueError("study: train.steps is missing; every run takes as many steps, so that all see the same examples")
    if len(set(study.seeds)) < len(study.seeds):
        raise ValueError(f"study: seeds {study.seeds} repeat; a repeated seed is the same run again")
    check_optimisation(study.train)
    require_positive(
        {
            "train.num_tests": study.train.num_tests,
            "search.trials": study.search.trials,
            "search.batch": study.search.batch,
            "resources.threads": study.resources.threads,
            "resources.process_runs": study.resources.process_runs,
            "statistics.resamples": study.statistics.resamples,
        }
    )
    for key, value, allowed in (
        ("search.kind", study.search.kind, SEARCHES),
        ("statistics.interval", study.statistics.interval, INTERVALS),
        ("statistics.test", study.statistics.test, TESTS),
        ("statistics.correction", study.statistics.correction, CORRECTIONS),
    ):
        if value not in allowed:
            raise ValueError(f"{key} is {value!r}; allowed: {', '.join(allowed)}")
    first = study.search.seeds
    if first is not None and (study.search.kind == "optuna" or not 1 <= first <= len(study.seeds)):
        raise ValueError(
            f"search.seeds is {first} with search.kind {study.search.kind} and {len(study.seeds)} seeds; a grid or random "
            "search can look at 1 of them to all, a guided one looks at all (leave it out)"
        )
    if not 0.5 <= study.statistics.confidence < 1.0:
        raise ValueError(
            f"statistics.confidence is {study.statistics.confidence}; it is between 0.5 and 1, for example 0.95"
        )
    _check_names(study)


def _check_entries(study: Study) -> None:
    """Refuse tasks, models, sizes and ablations that are not mappings, or whose parts are not."""
    for key, (example, parts) in ENTRIES.items():
        for name, entry in getattr(study, key).items():
            _check_mapping(f"{key}.{name}", entry, example, parts)
    for entry in study.ablations:
        for label, changes in entry["revert"].items():
            _check_mapping(f"ablations of {entry['of']}: {label}", changes, "{design: {...}, ...}", MODEL_PARTS)


def _check_mapping(where: str, entry: Any, example: str, parts: Sequence[str] = ()) -> None:
    if not isinstance(entry, Mapping):
        raise ValueError(f"study: {where} is {entry!r}; give a mapping, {example}")
    for part in parts:
        if part in entry:
            _check_mapping(f"{where}.{part}", entry[part], "{key: value, ...}")


def _check_names(study: Study) -> None:
    """Refuse baselines and ablations of models that there are not."""
    for entry in study.ablations:
        if not isinstance(entry, Mapping) or set(entry) != {"of", "revert"} or not isinstance(entry["revert"], Mapping):
            raise ValueError(f"study: ablation {entry!r}; give {{of: a model, revert: {{label: changes}}}}")
    named = [("baselines", name) for name in study.baselines] + [("ablations", entry["of"]) for entry in study.ablations]
    for key, name in named:
        if name not in study.models:
            raise ValueError(f"study: {key} name {name!r}; the models are {', '.join(study.models)}")
    for task, conditions in study.compare.items():
        if task not in study.tasks:
            raise ValueError(f"study: compare names {task!r}; the tasks are {', '.join(study.tasks)}")
        if not isinstance(conditions, list) or not conditions:
            raise ValueError(f"study: compare.{task} is {conditions!r}; give a list of conditions of the task's tests")
