"""The report: figures of rows that are made up, selection, failures, and one page that needs nothing from outside."""

import csv
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from miras import cli
from miras.study.config import Study, restricted, study_from
from miras.study.figures import heatmap, scaling
from miras.study.heat import heat
from miras.study.page import cautions, write_study_report
from miras.study.plan import Planned
from miras.study.results import Results, collect
from miras.study.run import Row
from miras.study.runner import run_study
from miras.study.search import batches
from miras.study.store import Store
from miras.study.tables import (
    Table,
    ablation_table,
    changed_tables,
    comparison_table,
    condition_tables,
    heat_table,
    main_table,
)
from tests.study.conftest import raw_study

ACCURACY = {"Delta": 0.5, "Transformer": 0.4, "Delta: no gate": 0.3}


def made_up(planned: Planned, failed: bool) -> Row:
    """The better learning rate validates better and tests worse, so that selecting on the test would show."""
    settings = dict(planned.settings)
    better = settings.get("train.lr") == 0.02
    value = ACCURACY[planned.model] + 0.01 * planned.run.seed + (0.1 if planned.size == "large" else 0.0)
    if failed:
        return Row(planned.run.key, "diverged", "training stopped at step 3: loss nan", config=asdict(planned.run))
    tested = value - (0.1 if better else 0.0)
    tests: list[dict[str, Any]] = [
        {"condition": name, "settings": {}, "metrics": {"accuracy": tested - drop}, "count": 8}
        for name, drop in (("", 0), ("12 tokens", 0.3 if planned.model == "Transformer" else 0.2))
    ]
    tests += [
        {
            "condition": name,
            "settings": item["settings"],
            "metrics": {"accuracy": tested, "deviation": deviation},
            "count": 8,
        }
        for item in planned.run.evaluate
        for name, deviation in (("", 0.25), ("12 tokens", 0.5))
    ]
    return Row(
        planned.run.key,
        "done",
        config=asdict(planned.run),
        commit="0123456789ab",
        device="CPU, 1 thread",
        parameters=1500,
        steps=4,
        tokens=96,
        examples=f"seed {planned.run.seed}",
        flops=1e4 if planned.size == "small" else 4e4,
        curve=[[1, 2.0], [4, 1.0]],
        validation={"accuracy": value + (0.1 if better else 0.0)},
        tests=tests,
        seconds=1.0,
        tokens_per_second=96.0,
        peak_memory=10**8,
    )


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Two sizes, two learning rates, an ablation; the Transformer diverges at one rate with one seed."""
    raw = raw_study(
        tmp_path / "study",
        seeds=[0, 1, 2],
        sizes={"small": {}, "large": {"parameters": 2000}},
        axes={"train.lr": [0.01, 0.02]},
        baselines=["Transformer"],
        ablations=[{"of": "Delta", "revert": {"no gate": {"design": {"anchor": "initial"}}}}],
        heatmaps=[{"x": "train.lr", "y": "model"}, {"x": "train.lr", "y": "evaluate.design.link_at", "metric": "deviation"}],
    )
    raw["models"]["Delta"]["evaluate"] = {"design.link_at": ["token", "refresh"]}
    made = study_from(raw)
    store = Store(Path(made.out))
    for planned in next(batches(made, store.get)):
        failed = planned.model == "Transformer" and planned.settings == (("train.lr", 0.02),) and planned.run.seed == 2
        store.put(made_up(planned, failed))
    return made


@pytest.fixture
def results(study: Study) -> Results:
    """Of the rows that were made up."""
    return collect(study, Store(Path(study.out)))


def cells(table: Table | None, **wanted: str) -> dict[str, str]:
    """The one row with these cells, by heading."""
    assert table is not None
    rows = [dict(zip(table.headings, row, strict=True)) for row in table.rows]
    [found] = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return found


def test_settings_are_selected_on_validation_and_shown_on_the_test(results: Results) -> None:
    row = cells(main_table(results), model="Delta", size="small")
    assert row["selected setting"] == "lr 0.02"
    assert row["mean [interval]"].startswith("accuracy 0.410 [0.400, 0.420]")
    costs = ("seeds", "parameters", "tokens", "MFLOPs/token", "tokens/s", "peak MB")
    assert [row[name] for name in costs] == ["3 of 3", "1,500", "96", "0.01", "96", "100"]


def test_a_setting_with_failed_runs_is_selected_last(results: Results) -> None:
    row = cells(main_table(results), model="Transformer", size="small")
    assert (row["selected setting"], row["seeds"]) == ("lr 0.01", "3 of 3")
    assert len(results.failures) == 2


def test_comparisons_are_paired_by_seed_and_leave_ablations_to_their_table(results: Results) -> None:
    compared = comparison_table(results)
    row = cells(compared, model="Delta", size="large")
    assert (row["baseline"], row["pairs"], row["same examples"]) == ("Transformer", "3", "yes")
    assert row["difference [interval]"].startswith("accuracy +0.000")
    assert compared is not None
    assert len(compared.rows) == 2
    ablated = cells(ablation_table(results), model="Delta: no gate", size="small")
    assert (ablated["original"], ablated["difference [interval]"][:15]) == ("Delta", "accuracy -0.200")


def test_conditions_to_compare_under_are_one_family_of_tests(study: Study) -> None:
    both = collect(replace(study, compare={"echo": ["", "12 tokens"]}), Store(Path(study.out)))
    table = comparison_table(both)
    assert table is not None
    assert len(table.rows) == 4
    first = cells(table, task="echo", model="Delta", size="small")
    longer = cells(table, task="echo: 12 tokens", model="Delta", size="small")
    # The longer task costs the Transformer 0.3 and the other 0.2.
    assert (first["difference [interval]"][:15], longer["difference [interval]"][:15]) == (
        "accuracy +0.000",
        "accuracy +0.100",
    )


def test_after_a_search_on_the_first_seed_the_best_setting_goes_on(tmp_path: Path) -> None:
    raw = raw_study(tmp_path / "halved", seeds=[0, 1, 2], axes={"train.lr": [0.01, 0.02]}, search={"seeds": 1})
    study = study_from(raw)
    store = Store(Path(study.out))
    planned = list[Planned]()
    for batch in batches(study, store.get):
        planned += batch
        for item in batch:
            store.put(made_up(item, failed=False))
    # Two models: two rates each with seed 0, then the rate that validates better with the other seeds.
    assert [(dict(item.settings)["train.lr"], item.run.seed) for item in planned if item.model == "Delta"] == [
        (0.01, 0),
        (0.02, 0),
        (0.02, 1),
        (0.02, 2),
    ]
    found = collect(study, store)
    assert len(found.missing) == 0
    row = cells(main_table(found), model="Delta")
    assert (row["selected setting"], row["seeds"]) == ("lr 0.02", "3 of 3")
    # A setting that only did well on the seed it was tried with is not selected over the one that went on.
    [other] = [cell for cell in found.cells if cell.model == "Delta" and dict(cell.settings)["train.lr"] == 0.01]
    other.score = 1.0
    assert dict(replace(found).selected["echo", "", "Delta"].settings)["train.lr"] == 0.02


def test_one_pair_is_no_test(study: Study) -> None:
    one = collect(replace(study, seeds=[0]), Store(Path(study.out)))
    row = cells(comparison_table(one), model="Delta", size="small")
    assert (row[""], row["p"], row["pairs"]) == ("no test", "none", "1")


def test_other_examples_are_pointed_out(study: Study, results: Results) -> None:
    cell = results.selected["echo", "small", "Delta"]
    cell.rows[1] = Row(**{**asdict(cell.rows[1]), "examples": "others"})
    assert cells(comparison_table(results), model="Delta", size="small")["same examples"] == "NO"


def test_conditions_and_heat_maps(results: Results) -> None:
    small = condition_tables(results)[0]
    assert list(small.headings) == ["model", "as trained", "12 tokens"]
    assert cells(small, model="Delta")["12 tokens"].startswith("0.210")
    rates, evaluated = (heat(results, entry) for entry in results.study.heatmaps)
    assert rates[0].xs == [0.01, 0.02]
    assert rates[0].ys == ["Delta: no gate", "Transformer", "Delta"]
    assert rates[0].values[2].tolist() == pytest.approx([0.51, 0.41])
    assert evaluated[0].ys == ["refresh", "token"]
    assert (evaluated[0].values == 0.25).all()
    one, other = heat_table(rates[0]), heat_table(evaluated[0])
    assert (list(one.headings), one.title) == (["model", "0.01", "0.02"], "echo, small: accuracy by model and lr")
    assert cells(one, model="Delta")["0.02"] == "0.410 [0.400, 0.420]"
    assert [row[0] for row in other.rows] == ["token", "refresh"]
    assert other.title == "Delta, echo, small: deviation by link_at at run time and lr in training"
    [turned, _] = heat(results, {"x": "model", "y": "train.lr", "condition": "12 tokens"})
    assert (turned.xs, turned.ys) == (["Delta", "Transformer", "Delta: no gate"], [0.01, 0.02])
    assert heat_table(turned).title == "echo, small, 12 tokens: accuracy by lr and model"
    assert heat(results, {"x": "model", "y": "train.lr", "condition": "another task's"}) == []


def test_a_first_condition_that_is_not_as_trained_says_what_it_is(tmp_path: Path) -> None:
    fuzzy = {"kind": "FuzzyInContextRecall", "num_tokens": 24, "key_sizes": [1, 2], "value_size": 2}
    plays = {"kind": "LanguageModelling", "vocab_size": 512}  # held-out text
    study = study_from(raw_study(tmp_path / "study", tasks={"fuzzy": fuzzy, "plays": plays}), ["size.parameters=6000"])
    store = Store(Path(study.out))
    for planned in next(batches(study, store.get)):
        row = made_up(planned, failed=False)
        store.put(replace(row, validation={**row.validation, "loss": 1.0}))
    found = condition_tables(collect(study, store))
    assert [table.headings[1] for table in found] == ["with key_sizes [2]", "as trained"]


def test_a_heat_map_tells_failed_from_not_run_and_from_not_planned(tmp_path: Path) -> None:
    raw = raw_study(tmp_path / "study", heatmaps=[{"x": "train.lr", "y": "model"}])
    for name, rates in (("Delta", [0.01, 0.02, 0.04]), ("Transformer", [0.01, 0.02])):
        raw["models"][name]["axes"] = {"train.lr": rates}
    study = study_from(raw)
    store = Store(Path(study.out))
    for planned in next(batches(study, store.get)):
        place = planned.model, dict(planned.settings)["train.lr"], planned.run.seed
        if place not in (("Transformer", 0.02, 0), ("Transformer", 0.02, 1), ("Delta", 0.04, 1)):
            store.put(made_up(planned, failed=place[:2] in (("Transformer", 0.01), ("Delta", 0.04))))
    panels = heat(collect(study, store), study.heatmaps[0])
    rows = {row[0]: row[1:] for row in heat_table(panels[0]).rows}
    assert rows["Transformer"] == ["failed", "not run", ""]
    assert (rows["Delta"][0][:5], rows["Delta"][2]) == ("0.505", "not run")
    drawn = heatmap(panels)
    assert drawn is not None
    assert [drawn.count(f"<!-- {word} -->") for word in ("failed", "not run", "0.505")] == [1, 2, 1]


def test_references_stand_below_the_models(results: Results) -> None:
    for cell in results.cells:
        for row in cell.done:
            for test in row.tests[:2]:
                test["metrics"]["accuracy of saying 3"] = 0.125 if test["condition"] else 0.25
    small = next(table for table in condition_tables(results) if "small" in table.title)
    assert small.rows[-1] == ["(saying 3)", "0.250 [0.250, 0.250]", "0.125 [0.125, 0.125]"]
    assert len([row for row in small.rows if row[0].startswith("(")]) == 1
    for cell in results.cells:
        for row in cell.done:
            row.tests[:] = [test for test in row.tests if not test["condition"]]
            if cell.model == "Delta":  # As a run that is older than the task's references.
                del row.tests[0]["metrics"]["accuracy of saying 3"]
    assert [table.rows[-1] for table in condition_tables(results)] == [["(saying 3)", "0.250 [0.250, 0.250]"]] * 2


def test_the_page_says_everything_and_needs_nothing_from_outside(study: Study) -> None:
    page, markdown = (path.read_text() for path in write_study_report(study, "miras study some.yaml"))
    assert not re.search(r"(src|href)=[\"']?http", page)
    assert "<script" not in page
    assert page.count("<svg") == 6  # seeds, conditions, two heat maps, sizes, curves
    saved = {file.stem: file.read_text() for file in (Path(study.out) / "figures").iterdir()}
    assert sorted(saved) == [
        *("against-flops-and-parameters", "by-condition", "heat-maps", "heat-maps-2", "learning-curves", "results")
    ]
    assert all(figure in page for figure in saved.values())
    for text in (page, markdown):
        for said in ("miras study some.yaml", "36 runs; 2 of them diverged", "3 seeds: bootstrap intervals", "0123456789ab"):
            assert said in text
        for title in (
            "Results",
            "Against the baselines",
            "Ablation",
            "at run time",
            "did not finish",
        ):
            assert title in text
        assert "training stopped at step 3: loss nan" in text
    assert write_study_report(study, "miras study some.yaml")[0].read_text() == page


def test_sizes_are_drawn_by_flops_and_by_parameters_where_these_differ(study: Study, results: Results) -> None:
    def labels(found: Results) -> list[str]:
        return re.findall(r"<!-- (FLOPs of the training.*|parameters|1.5k|2k) -->", scaling(found) or "")

    assert labels(results) == ["FLOPs of the training (matrix products)", "1.5k", "2k", "parameters"]
    deep = replace(study, sizes={"small": {}, "other": {"extra": {"initializer_range": 0.1}}})
    assert labels(collect(deep, Store(Path(study.out)))) == ["FLOPs of the training (matrix products)"]


def test_runs_with_other_settings_have_a_table_for_every_condition(results: Results) -> None:
    found = {table.title: table for table in changed_tables(results)}
    assert [title.partition(": ")[2] for title in found] == ["accuracy at run time", "deviation at run time"] * 2
    for title, deviation in (("echo", "0.250"), ("echo, 12 tokens", "0.500")):
        row = found[f"{title}: deviation at run time"].rows[0]
        assert all(cell.startswith(deviation) for cell in row[2:])


def test_every_figure_is_in_the_table_of_results(study: Study) -> None:
    page, _ = write_study_report(study, "command")
    with (page.parent / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    [longer] = [
        line
        for line in lines
        if (line["size"], line["model"], line["setting"], line["seed"]) == ("small", "Delta", '{"train.lr": 0.01}', "1")
        and (line["condition"], line["changed"]) == ("12 tokens", "")
    ]
    found = [longer[name] for name in ("metric", "value", "parameters", "flops_per_token", "status")]
    assert found == ["accuracy", "0.31", "1500", "10000", "done"]
    changed = {(json.loads(line["changed"])["design.link_at"], line["metric"]) for line in lines if line["changed"]}
    assert changed == {(at, name) for at in ("token", "refresh") for name in ("accuracy", "deviation")}
    assert [line["value"] for line in lines if line["status"] == "diverged"] == ["", ""]


def test_settings_are_told_apart_by_name_and_can_be_read_back(tmp_path: Path) -> None:
    axes = {f"design.inputs.{gate}.initial": {"low": 0.5, "high": 0.9} for gate in ("rate", "gates.residual")}
    models = {
        "Delta": {"name": "rwkv7", "axes": axes},
        "Transformer": {"name": "deltanet", "axes": {"design.inputs.rate.initial": [0.5]}},
    }
    raw = raw_study(tmp_path / "study", models=models, heatmaps=[dict(zip("xy", axes, strict=True))])
    study = study_from({**raw, "search": {"kind": "random", "trials": 2}}, ["size.parameters=4000"])
    store = Store(Path(study.out))
    runs = next(batches(study, store.get))
    for planned in runs:
        store.put(made_up(planned, failed=False))
    results = collect(study, store)
    assert re.fullmatch(r"rate.initial 0\.\d+, residual.initial 0\.\d+", results.selected["echo", "", "Delta"].label)
    assert results.selected["echo", "", "Transformer"].label == "rate.initial 0.5"
    [panel] = heat(results, study.heatmaps[0])
    assert (panel.x, panel.y) == ("rate.initial", "residual.initial")
    page, _ = write_study_report(study, "command")
    with (page.parent / "results.csv").open(newline="") as file:
        settings = [json.loads(line["setting"]) for line in csv.DictReader(file)]
    assert all(dict(planned.settings) in settings for planned in runs)


def test_shared_processes_are_pointed_out(study: Study) -> None:
    for number in (1, 9):
        study.resources.process_runs = number
        _, markdown = write_study_report(study, "command")
        assert ("Up to 9 runs shared a process" in markdown.read_text()) == (number == 9)


def test_runs_in_one_process_without_ray_are_pointed_out(tiny: Study) -> None:
    for part, shared in ((restricted(replace(tiny, seeds=[0]), models=["Delta"]), False), (tiny, True)):
        run_study(part, workers=0)
        assert (
            "Runs done with --workers 0 shared a process" in " ".join(cautions(collect(part, Store(Path(part.out)))))
        ) is shared


def test_the_caution_on_the_t_test_is_for_the_t_test(study: Study, results: Results) -> None:
    for test in ("t", "permutation"):
        study.statistics.test = test
        [few] = [note for note in cautions(results) if note.startswith("3 seeds: bootstrap")]
        assert ("the t-test takes differences for normal" in few) is (test == "t")


def test_unfinished_studies_report_what_there_is(study: Study) -> None:
    more = study_from(raw_study(Path(study.out), seeds=[0, 1, 2, 3], axes={"train.lr": [0.01, 0.02]}, sizes=study.sizes))
    page, _ = write_study_report(more, "command")
    assert "planned runs are not done yet" in page.read_text()
    with pytest.raises(ValueError, match="holds no finished run of this study"):
        write_study_report(study_from(raw_study(Path(study.out), seeds=[9])), "command")


def test_a_part_of_a_study(study: Study) -> None:
    part = restricted(study, models=["Transformer"])
    assert (list(part.models), part.ablations, part.baselines) == (["Transformer"], [], ["Transformer"])
    again = [{"of": "Delta", "revert": {"no gate": {}, "other": {}}}]
    two = replace(study, ablations=again)
    assert restricted(two, models=["Delta"]).ablations == again
    one = restricted(two, models=["Delta: other", "Transformer"])
    assert (list(one.models), one.ablations) == (["Delta", "Transformer"], [{"of": "Delta", "revert": {"other": {}}}])
    with pytest.raises(ValueError, match=r"no model 'Transfomer'; there are .*no gate; did you mean Transformer"):
        restricted(study, models=["Transfomer"])


def test_the_command_trains_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(
        "tasks: {echo: {kind: TinyEcho}}\nmodels: {Delta: {name: deltanet}, Other: {name: longhorn}}\nseeds: [0]\n"
        "size: {hidden_size: 8, num_hidden_layers: 1, num_heads: 1, parameters: 1500}\n"
        "train: {steps: 2, batch_size: 2, num_tests: 2}\n"
    )
    arguments = ["study", str(file), "train.lr=1e-2", "--model", "Delta", "--out", str(tmp_path / "out")]
    for extra in (["--workers", "0"], ["--report-only"]):
        with pytest.raises(SystemExit, match="0"):
            cli.main([*arguments, *extra])
        assert "report.html" in capsys.readouterr().out
    file.write_text(f"{file.read_text()}ablations: [{{of: Delta, revert: {{nothing: {{}}}}}}]\n")
    with pytest.raises(SystemExit, match="1"):
        cli.main([*arguments, "--report-only"])
    assert "ablation 'nothing' of Delta changes nothing" in capsys.readouterr().err
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"miras study {file} train.lr=1e-2 --model Delta --out {tmp_path}/out" in page
    assert "One seed: there are no intervals and no tests" in page
