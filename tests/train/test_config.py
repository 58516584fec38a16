"""Recipes: overrides, round trip, and errors that say what is allowed."""

from pathlib import Path

import pytest

from miras.train.config import Recipe, compared_recipe, read_recipe, recipe_from
from miras.train.model import meta_model, parameter_count

REPOSITORY = Path(__file__).parents[2]


def test_overrides_reach_sections_and_designs() -> None:
    recipe = recipe_from(
        {"train": {"steps": 5, "lr": 1e-3}}, ["train.lr=3e-4", "model.design.refresh=32", "train.betas=[0.8,0.9]"]
    )
    assert recipe.train.lr == 3e-4
    assert recipe.model.design == {"refresh": 32}
    assert tuple(recipe.train.betas) == (0.8, 0.9)
    assert recipe.out == "runs/yaad"


def test_yaml_round_trip(tmp_path: Path) -> None:
    recipe = recipe_from({"compare": ["transformer", {"name": "deltanet", "train.lr": 1e-3}]}, ["train.steps=5"])
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert read_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.steps=5", "train.warmpu=3"],
            r"unknown recipe key train.warmpu; did you mean train.warmup\? Allowed in",
        ),
        (["train.steps=5", "trian.lr=3"], r"unknown recipe key trian; did you mean train\?"),
        (["train.steps=5", "lr=3"], r"unknown recipe key lr; did you mean train.lr\?"),
        (["train.steps=5", "train.lr=fast"], r"recipe key train.lr: Value 'fast'"),
        (["train.steps"], r"not of the form key=value"),
        (["train=3"], r"train is a section with steps, batch_size"),
        ([], r"exactly one of train.steps and train.tokens"),
        (["train.steps=5", "train.tokens=100"], r"exactly one of train.steps and train.tokens"),
        (["train.steps=5", "train.dtype=fp8"], r"train.dtype is 'fp8'; allowed: fp32, bf16"),
        (["train.steps=5", "data.holdout=1.5"], r"data.holdout is 1.5"),
        (["train.steps=0"], r"train.steps is 0; it must be positive"),
        (["train.steps=5", "train.grad_clip=-1"], r"train.grad_clip is -1.0"),
        (["train.steps=5", "model.intermediate_size=8", "model.match_parameters=9"], r"not both"),
    ],
)
def test_errors_say_what_is_allowed(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_from({}, overrides)


def test_a_missing_or_broken_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"recipes/quickstart.yaml"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("train: [")
    with pytest.raises(ValueError, match=r"not a readable recipe"):
        read_recipe(tmp_path / "broken.yaml")


def test_tokens_become_steps() -> None:
    recipe = recipe_from({}, ["train.tokens=1001", "train.batch_size=2", "train.accumulate=5", "data.block_size=10"])
    assert recipe.steps_for(world_size=1) == 11
    assert recipe.steps_for(world_size=2) == 6


def test_compared_recipe_keeps_data_and_schedule() -> None:
    recipe = recipe_from({"train": {"steps": 5}, "model": {"design": {"refresh": 8}, "intermediate_size": 32}})
    other = compared_recipe(recipe, {"name": "transformer", "train.lr": 2e-3}, 1_000)
    assert (other.data, other.train.steps, other.train.lr) == (recipe.data, 5, 2e-3)
    assert (other.model.name, other.model.design, other.model.match_parameters) == ("transformer", {}, 1_000)
    assert other.model.intermediate_size is None
    assert other.out == "runs/yaad/compare/transformer"
    with pytest.raises(ValueError, match="give a model name"):
        compared_recipe(recipe, 3, 1_000)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_of_the_repository_is_readable(path: Path) -> None:
    recipe = read_recipe(path)
    assert isinstance(recipe, Recipe)
    for entry in recipe.compare:
        compared_recipe(recipe, entry, 1_000_000)


def test_the_340m_recipe_has_340m_parameters() -> None:
    recipe = read_recipe(REPOSITORY / "recipes" / "fineweb-340m.yaml")
    model = meta_model(recipe.model, vocab_size=50_277)
    assert parameter_count(model) == pytest.approx(340_000_000, rel=1e-3)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert recipe.steps_for(world_size=8) == pytest.approx(28_610, abs=1)
