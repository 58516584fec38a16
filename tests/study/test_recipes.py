"""The studies of the repository: every run of each is legal and has the parameters that it should."""

from pathlib import Path

import numpy as np
import pytest

from miras.study.ablation import check_ablations
from miras.study.config import Study, read_study
from miras.study.plan import check_heatmaps, check_tasks
from miras.study.search import batches
from miras.tasks import dna

STUDIES = sorted((Path(__file__).parents[2] / "recipes" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_run_of_every_study_can_be_planned(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dna, "read_genome", lambda _: np.zeros(100_000, np.uint8))  # The genome is not in a Python package.
    study = read_study(path)
    assert isinstance(study, Study)
    check_heatmaps(study)
    check_tasks(study)
    check_ablations(study)
    runs = next(batches(study, lambda _: None))
    assert len(study.seeds) >= 3
    assert {item.run.seed for item in runs} == set(study.seeds[: study.search.seeds])
    assert {item.model for item in runs} >= set(study.models)
