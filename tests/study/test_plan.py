"""Runs: equal parameters by construction, hashes that say what a run is, choices changed in part."""

from pathlib import Path

import pytest

from miras import models
from miras.bias import Lp
from miras.design import Design
from miras.study.config import Study, study_from
from miras.study.model import build
from miras.study.plan import Planned, short
from miras.study.search import batches
from miras.tasks import Task
from miras.train.model import parameter_count
from tests.study.conftest import raw_study


def planned(study: Study) -> list[Planned]:
    return next(batches(study, lambda _: None))


def test_every_model_has_the_parameters_that_were_asked_for() -> None:
    raw = raw_study(Path("none"), tasks={"echo": {"kind": "TinyEcho"}, "sum": {"kind": "TinySum"}}, seeds=[0])
    raw["models"]["Yaad"] = {"name": "yaad"}
    runs = [item.run for item in planned(study_from(raw))]
    assert len(runs) == 6
    one_more = 3 * 8  # parameters of one more unit in the one feed-forward layer
    for run in runs:
        count = parameter_count(build(Task.from_dict(run.task), run.design, run.size))
        assert abs(count - 1500) <= one_more / 2
    assert len({run.size["intermediate_size"] for run in runs}) > 1


def test_a_run_is_named_by_all_that_it_is_and_by_nothing_else(tiny: Study) -> None:
    keys = [item.run.key for item in planned(tiny)]
    assert len(set(keys)) == 4
    assert [item.run.key for item in planned(tiny)] == keys
    for override in (
        "train.lr=0.5",
        "size.parameters=1600",
        "train.num_tests=9",
        "seeds=[5]",
        "tasks.echo.num_tokens=7",
        "evaluate.design.link_at=[token]",
    ):
        changed = study_from(raw_study(Path("none")), [override])
        assert not set(keys) & {item.run.key for item in planned(changed)}, override
    for override in ("name=other", "resources.threads=2", "about=x", "baselines=[Delta]", "statistics.test=permutation"):
        assert [item.run.key for item in planned(study_from(raw_study(Path("none")), [override]))] == keys, override


def test_axes_reach_the_size_the_training_and_the_design() -> None:
    axes = {"train.lr": [0.1], "size.hidden_size": [6], "design.inputs.weight_std": [0.5]}
    raw = raw_study(
        Path("none"), axes=axes, models={"Moneta": {"name": "moneta", "axes": {"design.bias.p": [2.0, 1.5]}}}, seeds=[3]
    )
    runs = [item.run for item in planned(study_from(raw))]
    assert [(run.train["lr"], run.size["hidden_size"], run.seed) for run in runs] == [(0.1, 6, 3)] * 2
    assert [run.design["bias"] for run in runs] == [{"family": "bias", **Lp(p).to_dict()} for p in (2.0, 1.5)]
    assert runs[0].design["inputs"]["weight_std"] == 0.5
    assert runs[0].design["inputs"]["features"] == models.moneta().to_dict()["inputs"]["features"]


def test_keys_are_as_long_as_tells_them_apart() -> None:
    keys = ["design.inputs.rate.initial", "design.inputs.gates.delta.initial", "train.lr", "design.train.lr", "lr"]
    assert [short(key, keys) for key in keys] == ["rate.initial", "delta.initial", "train.lr", "design.train.lr", "lr"]
    assert short("design.bias.p", ["design.bias.p"]) == "p"


def test_sizes_and_tasks_may_differ_and_models_may_tune() -> None:
    raw = raw_study(Path("none"), sizes={"small": {}, "large": {"hidden_size": 16, "parameters": 4000}}, seeds=[0])
    raw["tasks"]["echo"]["train"] = {"steps": 7}
    raw["models"]["Delta"]["train"] = {"lr": 0.5}
    runs = {(item.size, item.model): item.run for item in planned(study_from(raw))}
    assert runs["large", "Delta"].size["hidden_size"] == 16
    assert runs["small", "Delta"].size["parameters"] == 1500
    assert {run.train["steps"] for run in runs.values()} == {7}
    assert (runs["small", "Delta"].train["lr"], runs["small", "Transformer"].train["lr"]) == (0.5, 1e-2)


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("moneta", {"bias": {"p": 2.0}}, models.moneta(bias=Lp(2.0))),
        ("moneta", {"inputs": {"rate": {"maximum": 9.0}}}, None),
        ("rwkv7", {"inputs": {"gates": {"residual": {"rank": 8}}}}, None),
    ],
)
def test_a_choice_without_kind_keeps_the_rest_of_the_models_own(name: str, overrides: dict, expected: Design | None) -> None:
    if expected is not None:
        assert models.named(name, **overrides) == expected
        return
    own, changed = models.NAMED[name]().to_dict()["inputs"], models.named(name, **overrides).to_dict()["inputs"]
    [(field, value)] = overrides["inputs"].items()
    if field == "rate":
        assert changed["rate"] == {**own["rate"], **value}
    else:
        assert changed["gates"]["residual"] == {**own["gates"]["residual"], "rank": 8}
