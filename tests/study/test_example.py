"""The study of docs/studies.md runs as it stands, for two steps."""

import re
import sys
from pathlib import Path

import pytest

from miras import cli

PAGE = (Path(__file__).parents[2] / "docs" / "studies.md").read_text()


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, name in (("python", "mine.py"), ("yaml", "mine.yaml")):
        [text] = re.findall(rf"```{kind}\n(.*?)```", PAGE, flags=re.DOTALL)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.chdir(tmp_path)
    short = ["seeds=[0]", "train.steps=2", "train.num_tests=2", "train.batch_size=2", "--workers", "0"]
    with pytest.raises(SystemExit, match="0"):
        cli.main(["study", "mine.yaml", *short])
    report = (tmp_path / "runs/studies/mine/report.md").read_text()
    assert "4 runs; on CPU" in report
    assert "| Delayed: 128 tokens | Yaad, smooth Huber | Gated DeltaNet |" in report
