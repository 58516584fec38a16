"""Choices: small frozen dataclasses that serialise to JSON and back, and the gates they declare."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from fractions import Fraction
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints

_REGISTRY: dict[str, dict[str, type[Choice]]] = {}
WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
"""Plain types, as a file's writer knows them."""


@dataclasses.dataclass(frozen=True)
class Gate:
    """A number per token and head that a choice reads, such as Huber's threshold delta.

    `minimum` and `maximum` bound its legal values; `initial` is what a layer starts it at.
    """

    name: str
    initial: float
    minimum: float = 0.0
    maximum: float = float("inf")


@dataclasses.dataclass(frozen=True)
class Choice:
    """One decision in a design: plain numbers with pure tensor methods.

    A subclass of a family (`Memory`, `Bias`, ...) registers itself under its class name, so that
    `family.from_dict(choice.to_dict()) == choice` also holds for classes that users define. The families themselves
    are declared with `abstract=True`.
    """

    family: ClassVar[str] = ""

    def __init_subclass__(cls, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not abstract:
            _REGISTRY.setdefault(cls.family, {})[cls.__name__] = cls

    @property
    def kind(self) -> str:
        """Name under which the choice is serialised: its class name."""
        return type(self).__name__

    @property
    def symbols(self) -> str:
        """Its formula in ASCII with its numbers filled in, a line an equation (see `miras.describe`); empty without one."""
        return ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary: `kind` plus the fields."""
        fields = {f.name: _encode(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"kind": self.kind, **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild a choice of this family.

        Raises:
            ValueError: unknown kind, unknown field, values of another type or that the choice refuses.
        """
        known = _REGISTRY.get(cls.family, {})
        kind = data.get("kind")
        if kind not in known:
            raise ValueError(
                f"unknown {cls.family} kind {kind!r}; allowed: {', '.join(sorted(known))}{_closest(kind, known)}"
            )
        target = known[kind]
        allowed = {f.name for f in dataclasses.fields(target)}
        for name in data:
            if name != "kind" and name not in allowed:
                raise ValueError(
                    f"{kind} has no field {name!r}; allowed: {', '.join(sorted(allowed)) or 'none'}{_closest(name, allowed)}"
                )
        needed = [f.name for f in dataclasses.fields(target) if _required(f) and f.name not in data]
        if needed:
            raise ValueError(
                f"{kind} needs {', '.join(needed)}; given: {', '.join(sorted(set(data) - {'kind'})) or 'nothing'}"
            )
        values = {name: _decode(value) for name, value in data.items() if name != "kind"}
        require_types(target, values)
        return target(**values)  # type: ignore[return-value]


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@cache
def _hints(target: type[Choice]) -> dict[str, Any]:
    """The types of its fields; none for a class whose annotations cannot be read, as those that name a function's own."""
    try:
        return get_type_hints(target)
    except (NameError, AttributeError, TypeError):
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type, as far as that is made of plain types, tuples and choices."""
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if isinstance(hint, type):
        plain = hint in (bool, str, NoneType) or issubclass(hint, Choice)
        return not plain or isinstance(value, hint)
    parts = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if get_origin(hint) is tuple and parts:
        wanted = parts[:1] * len(value) if isinstance(value, tuple) and parts[-1] is ... else parts
        return isinstance(value, tuple) and len(value) == len(wanted) and all(map(_fits, value, wanted))
    return True


def _in_words(hint: Any) -> str:
    parts = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_in_words, parts))
    if get_origin(hint) is tuple:
        each = f"{_in_words(parts[0])}, ..." if parts[-1] is ... else ", ".join(map(_in_words, parts))
        return f"a list [{each}]"
    return WORDS.get(hint) or f"one of the kinds of {getattr(hint, '__name__', hint)}"


def _encode(value: Any) -> Any:
    if isinstance(value, Choice):
        return {"family": value.family, **value.to_dict()}
    if isinstance(value, Mapping):
        return {name: _encode(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, Mapping) and "kind" in value and "family" in value:
        family = value["family"]
        known = _REGISTRY.get(family)
        if known is None:
            raise ValueError(f"unknown family {family!r}; allowed: {', '.join(sorted(_REGISTRY))}")
        return next(iter(known.values())).from_dict({name: item for name, item in value.items() if name != "family"})
    if isinstance(value, Mapping):
        return {name: _decode(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_decode(item) for item in value)
    return value


def _closest(name: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def quotient(a: float, b: float = 1.0) -> str:
    """a / b for a formula, as a fraction: quotient(2, 4) is "1/2"."""
    return str((Fraction(a) / Fraction(b)).limit_denominator(1000))


def exponent(a: float, b: float = 1.0) -> str:
    """The power a / b for a formula: "^2" or "^(1/2)"."""
    shown = quotient(a, b)
    return f"^({shown})" if "/" in shown else f"^{shown}"


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_types(target: type[Choice], values: Mapping[str, Any]) -> None:
    """Raise ValueError for the first of `values` that is not of the type of its field in `target`."""
    hints = _hints(target)
    for name, value in values.items():
        if not _fits(value, hints.get(name)):
            hint = (
                "; inside another choice it needs its family too" if isinstance(value, Mapping) and "kind" in value else ""
            )
            raise ValueError(f"{target.__name__}: {name}={value!r}; must be {_in_words(hints[name])}{hint}")


def require_one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        listed = ", ".join(repr(item) for item in allowed)
        raise ValueError(f"{name}={value!r}; allowed: {listed}")
