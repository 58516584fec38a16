"""Several models trained on the same tokens with as many parameters, each in a process of its own."""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
from pathlib import Path

from miras.train.config import Recipe, compared_recipe
from miras.train.folder import Result, read_result, world_size
from miras.train.run import train

log = logging.getLogger("miras")


def train_all(recipe: Recipe, overwrite: bool = False) -> list[Result]:
    """Train the recipe's model, then each of `recipe.compare` beside it; a comparison that fails is left out.

    Each comparison has its own process, so that peak memory and speed are its own.
    Raises as `train`; ValueError for a comparison under torchrun.
    """
    if recipe.compare and world_size() > 1:
        raise ValueError("compare runs its models one after the other in one process; under torchrun give compare=[]")
    results = [train(recipe, overwrite)]
    for entry in recipe.compare:
        other = compared_recipe(recipe, entry, results[0].parameters)
        result = read_result(Path(other.out)) or _train_apart(other)
        if result is None:
            log.warning("%s did not finish; it is missing from the comparison", other.out)
        else:
            results.append(result)
    return results


def _train_apart(recipe: Recipe) -> Result | None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(recipe.to_yaml(), encoding="utf-8")
        command = [sys.executable, "-m", "miras.cli", "train", str(file), "--no-report", "--quiet"]
        subprocess.run(command, check=False)
    return read_result(Path(recipe.out))
