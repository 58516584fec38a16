"""What the tasks share: what they refuse, and their longer forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from miras.choice import require
from miras.tasks.task import Task

Kind = TypeVar("Kind", bound=Task)


def with_longer(task: Kind) -> dict[str, Kind]:
    """A task with the fields `num_tokens` and `longer`, and its forms with so many times the tokens."""
    sized: Any = task
    forms = {k * sized.num_tokens: replace(sized, num_tokens=k * sized.num_tokens, longer=()) for k in sized.longer}
    return {"": task} | {f"{num_tokens} tokens": form for num_tokens, form in forms.items()}


def require_counts(**counts: int) -> None:
    """Raise ValueError unless every count is a whole number of at least 1."""
    for name, count in counts.items():
        require(isinstance(count, int) and count >= 1, f"{name}={count!r}; must be a whole number, at least 1")


def require_even(**counts: int) -> None:
    """Raise ValueError unless every count is even and at least 2."""
    require_counts(**counts)
    for name, count in counts.items():
        require(count % 2 == 0, f"{name}={count}; must be even: keys and values stand in pairs of tokens")


def require_share(limit: float = 1.0, **shares: float) -> None:
    """Raise ValueError unless 0 <= share < limit."""
    for name, share in shares.items():
        require(0.0 <= share < limit, f"{name}={share}; must be at least 0 and below {limit:g}")


def require_longer(longer: Sequence[int]) -> None:
    """Raise ValueError unless `longer` holds factors of at least 2."""
    require(
        all(isinstance(factor, int) and factor >= 2 for factor in longer),
        f"longer={tuple(longer)}; give whole factors of the training length, each at least 2, for example (2, 4)",
    )
