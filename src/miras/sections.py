"""Typed sections read from YAML files and `key=value` overrides: recipes and studies. Unknown keys are refused."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

Section = TypeVar("Section")

SHAPES = ((dict, "mapping, {name: value, ...}"), ((list, tuple), "list, [value, ...]"))
"""Kinds of containers, and what they look like in a file."""


def read_mapping(path: str | Path, noun: str, section: type, where: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        FileNotFoundError: there is no such file; `where` says where the repository's are.
        ValueError: it is not YAML or not a mapping.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no {noun} at {file}; the repository's are in {where}")
    try:
        raw = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(file)) or {})
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{file} is not a readable {noun}: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file} is not a {noun}: it must be a mapping with {_listed(_names(section))}")
    return raw


def sections_from(
    section: type[Section], raw: Mapping[str, Any], overrides: Iterable[str] = (), noun: str = "recipe"
) -> Section:
    """A dataclass of sections from nested mappings and `key=value` overrides.

    Raises:
        ValueError: unknown keys (with the allowed ones and the closest), wrong types.
    """
    chosen = read_overrides(overrides, noun)
    try:
        given = OmegaConf.merge(OmegaConf.create(dict(raw)), chosen)
        plain = cast(dict[str, Any], OmegaConf.to_container(given))
        _check_keys(plain, section, "", section, noun)
        merged = OmegaConf.merge(OmegaConf.structured(section), given)
        OmegaConf.resolve(merged)
        return cast(Section, OmegaConf.to_object(cast(DictConfig, merged)))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(_explained(error, noun)) from error


def read_overrides(items: Iterable[str], noun: str = "recipe") -> dict[str, Any]:
    """Nested mappings from `key=value` items with dots in their keys. Raises ValueError for other items."""
    dotlist = list(items)
    for item in dotlist:
        if "=" not in item or item.startswith("="):
            raise ValueError(f"override {item!r} is not of the form key=value, for example train.lr=3e-4")
    try:
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist(dotlist)))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(_explained(error, noun)) from error


def _check_keys(node: Mapping[str, Any], section: type, path: str, root: type, noun: str) -> None:
    """Raise a ValueError that names the first key of `node` which `section` does not have, or has in another shape."""
    known = _names(section)
    for key, value in node.items():
        if key not in known:
            raise ValueError(_unknown_key(f"{path}{key}", str(key), known, path.rstrip("."), root, noun))
        default = _default(section, key)
        if dataclasses.is_dataclass(default):
            if not isinstance(value, Mapping):
                raise ValueError(f"{path}{key} is a section with {_listed(_names(type(default)))}; got {value!r}")
            _check_keys(value, type(default), f"{path}{key}.", root, noun)
        for shape, example in SHAPES:
            # A string may refer to another key, as in ${name}: whether it fits is known when that is resolved.
            fits = isinstance(value, shape) or (isinstance(value, str) and "${" in value)
            if isinstance(default, shape) and not fits:
                raise ValueError(f"{noun} key {path}{key} is {value!r}; give a {example}")


def _unknown_key(full: str, key: str, known: list[str], section: str, root: type, noun: str) -> str:
    everywhere = {f"{name}.{k}" for name in _names(root) for k in _names(type(_default(root, name)))}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    near = [f"{section}.{near[0]}".lstrip(".")] if near else [k for k in everywhere if k.split(".")[1] == key]
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"unknown {noun} key {full}{hint} Allowed in {section or f'a {noun}'}: {_listed(known)}"


def _names(section: type) -> list[str]:
    return [f.name for f in dataclasses.fields(section)] if dataclasses.is_dataclass(section) else []


def _default(section: type, name: str) -> Any:
    return getattr(section(), name)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _explained(error: Exception, noun: str) -> str:
    key = getattr(error, "full_key", None)
    first = str(error).splitlines()[0]
    return f"{noun} key {key}: {first}" if key else f"{noun}: {first}"
