"""Study files: what is refused, and with which words; what the axes become."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miras.study.ablation import check_ablations
from miras.study.config import ablated, merged, read_study, study_from
from miras.study.plan import axes_of, check_heatmaps, check_tasks, groups, nested, random_settings
from miras.study.search import batches
from tests.study.conftest import raw_study

YAAD = {"Yaad": {"name": "yaad"}}
ABLATION = [{"of": "Yaad", "revert": {"L2 bias": {"design": {"bias": {"kind": "L2"}}}}}]


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({}, ["train.stesp=3"], r"unknown study key train.stesp; did you mean train.steps\?"),
        ({}, ["trian.lr=3"], r"unknown study key trian; did you mean train\?"),
        ({}, ["train.lr=fast"], r"study key train.lr: Value 'fast'"),
        ({"tasks": ["MQAR"]}, [], r"study key tasks is \['MQAR'\]; give a mapping, \{name: value"),
        ({"models": None}, [], r"study key models is None; give a mapping"),
        ({"heatmaps": {"x": "train.lr"}}, [], r"study key heatmaps is \{'x': 'train.lr'\}; give a list, \[value"),
        ({"compare": [""]}, [], r"study key compare is \[''\]; give a mapping"),
        ({}, ["seeds=3"], r"study key seeds is 3; give a list"),
        ({}, ["size.extra=[1]"], r"study key size.extra is \[1\]; give a mapping"),
        ({"tasks": {"echo": "TinyEcho"}}, [], r"tasks.echo is 'TinyEcho'; give a mapping, \{kind: MQAR"),
        ({"tasks": {"echo": {"kind": "TinyEcho", "train": 5}}}, [], r"tasks.echo.train is 5; give a mapping, \{key: value"),
        ({"models": {"Yaad": "yaad"}}, [], r"models.Yaad is 'yaad'; give a mapping, \{name: yaad"),
        ({"models": {"Yaad": {"name": "yaad", "design": "x"}}}, [], r"models.Yaad.design is 'x'; give a mapping"),
        ({"sizes": {"S": 5}}, [], r"sizes.S is 5; give a mapping, \{hidden_size: 64"),
        ({"ablations": [{"of": "Delta", "revert": {"x": 5}}]}, [], r"ablations of Delta: x is 5; give a mapping, \{design"),
        ({"models": {}}, [], r"study: models is missing"),
        ({}, ["train.steps=null"], r"study: train.steps is missing"),
        ({}, ["train.num_tests=0"], r"train.num_tests is 0; it must be positive"),
        ({}, ["seeds=[1,1]"], r"seeds \[1, 1\] repeat"),
        ({}, ["search.kind=bayes"], r"search.kind is 'bayes'; allowed: grid, random, optuna"),
        ({}, ["statistics.test=z"], r"statistics.test is 'z'; allowed: t, permutation"),
        ({}, ["statistics.confidence=95"], r"statistics.confidence is 95.0; it is between"),
        ({"baselines": ["Mamba"]}, [], r"baselines name 'Mamba'; the models are Delta, Transformer"),
        ({"compare": {"ecko": [""]}}, [], r"compare names 'ecko'; the tasks are echo"),
        ({"compare": {"echo": "12 tokens"}}, [], r"compare.echo is '12 tokens'; give a list of conditions"),
        ({}, ["search.seeds=3"], r"search.seeds is 3 with search.kind grid and 2 seeds"),
        ({}, ["search.seeds=1", "search.kind=optuna"], r"a guided one looks at all"),
        ({}, ["resources.process_runs=0"], r"resources.process_runs is 0; it must be positive"),
        ({"ablations": [{"of": "Delta"}]}, [], r"give \{of: a model, revert"),
        ({"ablations": [{"of": "Delta", "revert": None}]}, [], r"give \{of: a model, revert"),
        ({"imports": ["no.such"]}, [], r"imports names no.such: No module named 'no'; is its folder in PYTHONPATH"),
        ({"ablations": ABLATION}, [], r"ablations name 'Yaad'; the models are"),
    ],
)
def test_studies_that_are_refused(changes: dict[str, Any], overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study_from({**raw_study(Path("none")), **changes}, overrides)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {"Yaad": {"design": {}}}}, r"model 'Yaad' is \{'design': \{\}\}; give \{name"),
        ({"models": {"Yaad": {"name": "yaad", "lr": 3}}}, r"model 'Yaad' has the key 'lr'; allowed: name, design"),
        ({"models": {"Yaad": {"name": "yad"}}}, r"echo, Yaad: no model 'yad'.*did you mean 'yaad'"),
        ({"models": {"Yaad": {"name": "yaad", "design": {"refesh": 3}}}}, r"refesh"),
        ({"models": {"Yaad": {"name": "yaad", "train": {"lrr": 3}}}}, r"unknown train key lrr; did you mean lr\?"),
        (
            {"models": {"Yaad": {"name": "yaad", "train": {"steps": 9}}}},
            r"'Yaad' has its own train.steps; all models get the same",
        ),
        ({"models": {"Yaad": {"name": "yaad", "size": {"parameters": 9}}}}, r"its own size.parameters"),
        ({"models": {"Yaad": {"name": "yaad", "axes": {"size.parameters": [1]}}}}, r"axis size.parameters; .*`sizes`"),
        (
            {"models": {"Yaad": {"name": "yaad", "axes": {"train": {"steps": [1, 9]}}}}},
            r"axis train.steps; .*equal examples",
        ),
        ({"axes": {"train": {"batch_size": [1]}}}, r"axis train.batch_size; .*equal examples"),
        ({"axes": {"task.num_tokens": [9]}}, r"axis task.num_tokens; .*Give several `tasks`"),
        ({"tasks": {"echo": {"kind": "TinyEko"}}}, r"unknown task kind 'TinyEko'.*TinyEcho"),
        ({"tasks": {"echo": {"kind": "TinyEcho", "num_toke": 3}}}, r"no field 'num_toke'.*did you mean 'num_tokens'"),
        ({"size": {"hidden_size": 8}}, r"size.parameters is missing"),
        ({"axes": {"size.extra.initializer_rnge": [0.1]}}, r"extra has .*'initializer_rnge'.*mean 'initializer_range'"),
        ({"size": {"hidden_size": 8, "num_heads": 1, "parameters": 10}}, r"10 parameters are out of reach: Delta"),
        ({"axes": {"lr": [1]}}, r"axis 'lr'; a key begins with train., size., design."),
        ({"axes": {"train.lr": 3}}, r"axis train.lr is 3; give a list of values"),
        ({"axes": {"train.lr": {"low": 1e-3, "high": 1e-2}}}, r"a range needs search.kind random or optuna"),
        ({"evaluate": {"train.lr": [1]}}, r"only design.\* can change after training"),
        ({"heatmaps": [{"x": "train.lr"}]}, r"its keys are x, y, metric"),
        ({"heatmaps": [{"x": "a", "y": "b", "models": ["Dleta"]}]}, r"map's models: 'Dleta'; there are 'Delta', 'Transf"),
        ({"heatmaps": [{"x": "a", "y": "b", "condition": "9"}]}, r"map's condition: '9'; there are '', '12 tokens'"),
        (
            {"heatmaps": [{"x": "a", "y": "b", "metric": "acuracy"}]},
            r"map's metric: 'acuracy'; there are 'accuracy', 'loss'$",
        ),
        ({"heatmaps": [{"x": "a", "y": "b", "metric": "deviation"}]}, r"deviation needs an evaluate.\* for x or y"),
        (
            {"sizes": {"S": {"parameters": 1600}}, "tasks": {"echo": {"kind": "TinyEcho", "size": {"parameters": 1700}}}},
            r"echo, S, Delta: both the task and the size set size.parameters",
        ),
        ({"compare": {"echo": ["13 tokens"]}}, r"compare.echo names '13 tokens'; that task tests '', '12 tokens'"),
        (
            {"tasks": {"needle": {"kind": "PassKeyNeedle", "num_tokens": 20, "vocab_size": 512}}},
            r"study: task needle: num_tokens=20 is too short",
        ),
        (
            {"tasks": {"weather": {"kind": "Weather", "num_hours": 1100, "longer": []}}},
            r"study: task weather: num_hours \+ horizon is 1124, but the validation split has 1080 hours",
        ),
        ({"heatmaps": [{"x": "train.lr", "y": "model"}]}, r"heat map over 'train.lr', which does not vary; allowed: model"),
    ],
)
def test_plans_that_are_refused(changes: dict[str, Any], message: str) -> None:
    study = study_from({**raw_study(Path("none")), **changes})
    with pytest.raises(ValueError, match=message):
        _ = check_heatmaps(study), check_tasks(study), check_ablations(study), next(batches(study, lambda _: None))


@pytest.mark.parametrize(
    ("changes", "model"),
    [
        ({}, {}),
        ({"evaluate": {"design.refresh": [1]}}, {}),
        ({"design": {"bias": {"form": "coordinate"}, "refresh": 16}}, {}),  # as every yaad has it
        ({"design": {"refresh": 4}, "train": {"lr": 1e-2}}, {"design": {"refresh": 4}}),
        ({"design": {"refresh": 4}}, {"axes": {"design.refresh": [8, 2]}}),  # the axis decides
    ],
)
def test_ablations_that_change_nothing_are_refused(changes: dict[str, Any], model: dict[str, Any]) -> None:
    raw = raw_study(Path("none"), models={"Yaad": {"name": "yaad", **model}})
    other = {
        "other": {"design": {"anchor": "origin"}},
        "loss": {"design": {"bias": {"kind": "L2"}}},
        "rate": {"train": {"lr": 1}},
    }
    check_ablations(study_from({**raw, "ablations": [{"of": "Yaad", "revert": other}]}))
    study = study_from({**raw, "ablations": [{"of": "Yaad", "revert": {**other, "same": changes}}]})
    with pytest.raises(
        ValueError, match="ablation 'same' of Yaad changes nothing, Yaad is so already; revert another choice"
    ):
        check_ablations(study)


def test_an_ablation_may_change_one_task_alone() -> None:
    tasks = {"slow": {"kind": "TinyEcho", "train": {"lr": 1e-3}}, "fast": {"kind": "TinyEcho"}}
    raw = raw_study(Path("none"), tasks=tasks, ablations=[{"of": "Delta", "revert": {"slower": {"train": {"lr": 1e-3}}}}])
    check_ablations(study_from(raw))


def test_files_are_read_by_their_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no study at .*recipes/studies"):
        read_study(tmp_path / "none.yaml")
    (tmp_path / "mine.yaml").write_text("tasks: {echo: {kind: TinyEcho}}\nmodels: {Y: {name: yaad}}\ntrain: {steps: 1e1}\n")
    with pytest.raises(ValueError, match=re.escape("study key train.steps")):
        read_study(tmp_path / "mine.yaml")
    study = read_study(tmp_path / "mine.yaml", ["train.steps=10"])
    assert (study.name, study.out, study.seeds, study.train.steps) == ("mine", "runs/studies/mine", [0, 1, 2], 10)


def test_a_list_may_be_that_of_another_key() -> None:
    study = study_from(raw_study(Path("none"), baselines="${imports}", imports=[]))
    assert study.baselines == []


def test_axes_by_dotted_and_nested_keys() -> None:
    first, second = axes_of({"train.lr": [1, 2], "design": {"bias": {"p": [3.0]}}}, "grid")
    assert (first.key, first.values) == ("train.lr", (1, 2))
    assert (second.key, second.values) == ("design.bias.p", (3.0,))
    assert nested({"design.bias.p": 3, "design.bias.q": 4, "train.lr": 1}, "design") == {"bias": {"p": 3, "q": 4}}
    [replaced] = axes_of({"train.lr": [1, 2], "train": {"lr": [5]}}, "grid")
    assert replaced.values == (5,)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"low": 2, "high": 1}, "low < high"),
        ({"low": 0, "high": 1, "log": True}, "positive"),
        ({"low": 0, "high": 1, "step": 1}, "perhaps log"),
    ],
)
def test_ranges_that_are_refused(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        axes_of({"train.lr": value}, "random")


def test_random_settings_depend_on_the_seed_and_stay_in_their_ranges() -> None:
    axes = {
        "train.lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "design.refresh": {"low": 1, "high": 4, "integer": True},
        "train.dtype": ["fp32"],
    }
    [group, other] = groups(study_from({**raw_study(Path("none"), axes=axes), "search": {"kind": "random"}}))
    drawn = random_settings(group, 300, 0)
    assert drawn == random_settings(group, 300, 0)
    assert drawn != random_settings(group, 300, 1)
    assert drawn != random_settings(other, 300, 0)
    rates = np.log10([settings["train.lr"] for settings in drawn])
    assert -4 <= rates.min() < -3.8
    assert -2.2 < rates.max() <= -2
    assert abs(rates.mean() + 3) < 0.15
    assert {settings["design.refresh"] for settings in drawn} == {1, 2, 3, 4}


def test_ablations_lay_their_changes_over_the_original() -> None:
    original = {"name": "yaad", "train": {"lr": 1e-3}, "design": {"bias": {"kind": "Huber", "form": "norm"}, "refresh": 4}}
    study = study_from(raw_study(Path("none"), models={"Yaad": original}, ablations=ABLATION))
    assert ablated(study) == {
        "Yaad: L2 bias": {"name": "yaad", "train": {"lr": 1e-3}, "design": {"bias": {"kind": "L2"}, "refresh": 4}}
    }
    assert merged({"a": {"kind": "X", "p": 1}}, {"a": {"p": 2}}) == {"a": {"kind": "X", "p": 2}}
