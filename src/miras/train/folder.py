"""The run folder: what lies in it, whether a run may go on there, and its result."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from miras.train.config import Recipe, read_recipe

RECIPE, RESULT, METRICS = "recipe.yaml", "result.json", "metrics.jsonl"
MAY_CHANGE = ("compare", "sample", "out")  # on resuming: they do not change the training


@dataclass(frozen=True)
class Result:
    """What a finished run came to; `result.json` in its folder."""

    model: str
    folder: str
    parameters: int
    steps: int
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float
    validation_tokens: int
    validation_documents: tuple[str, ...]
    tokens_per_second: float
    peak_memory: int
    seconds: float
    seed: int
    device: str
    sample: str


def open_run(folder: Path, recipe: Recipe, overwrite: bool) -> Result | None:
    """Make the run folder and write the recipe into it; the result if the run is already finished.

    Raises ValueError if the folder holds a run of a different recipe.
    """
    if (folder / RECIPE).exists() and overwrite and is_main():
        shutil.rmtree(folder)
    if (folder / RECIPE).exists() and (last_checkpoint(folder) or read_result(folder)):
        changed = _differences(read_recipe(folder / RECIPE), recipe)
        if changed:
            raise ValueError(
                f"{folder} holds a run of another recipe; it differs in {', '.join(changed)}. "
                "Give the new run its own folder (out=...) or replace the old one (--overwrite)"
            )
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
    return read_result(folder)


def read_result(folder: Path) -> Result | None:
    """The result of a finished run, or None."""
    file = folder / RESULT
    if not file.exists():
        return None
    fields = json.loads(file.read_text(encoding="utf-8"))
    return Result(**fields | {"folder": str(folder), "validation_documents": tuple(fields["validation_documents"])})


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint. One that a kill cut short is removed: the Trainer writes its state file last."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        try:
            found.append((int(json.loads((path / "trainer_state.json").read_text())["global_step"]), path))
        except (OSError, ValueError, KeyError):
            if is_main():
                shutil.rmtree(path)
    return max(found)[1] if found else None


def is_main() -> bool:
    """Whether this is the process that writes files."""
    return int(os.environ.get("RANK", "0")) == 0


def world_size() -> int:
    """The number of processes that torchrun or accelerate started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _differences(old: Recipe, new: Recipe) -> list[str]:
    """Dotted keys whose values differ, of those that shape the training."""
    changed: list[str] = []
    for section, value in asdict(new).items():
        before = asdict(old)[section]
        if section in MAY_CHANGE or value == before:
            continue
        changed += [f"{section}.{key}" for key in value if value[key] != before[key]]
    return changed
