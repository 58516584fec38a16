"""The README's Python runs as it stands, and what it says exists."""

import re
from pathlib import Path

import pytest
import torch

import miras

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_blocks_run(block, capsys):
    torch.manual_seed(0)
    names = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), names)
    if "explain" in block:
        assert re.search("path: (native|fused|frozen)", capsys.readouterr().out)
    if "LogCosh" in names:
        made = names["LogCosh"](0.5)
        assert miras.bias.Bias.from_dict(made.to_dict()) == made


def test_the_table_lists_every_model_and_choice():
    for name in miras.models.NAMED:
        assert f"`{name}`" in README
    for family in (miras.memory.Memory, miras.bias.Bias, miras.retention.Retention, miras.learning.Learning):
        own = [c for c in family.__subclasses__() if c.__module__.startswith("miras.")]
        for choice in own:
            assert f"`{choice.__name__}`" in README
        assert own


def test_the_commands_are_make_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
