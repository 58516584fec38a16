"""What an ablation must be: another model than the one it is of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from miras.study.config import Study
from miras.study.plan import Group, groups, plan


def check_ablations(study: Study) -> None:
    """Refuse ablations that change nothing: each would be a test of a model against itself. Raises ValueError."""
    if not study.ablations:
        return
    first = {group.model: group for group in reversed(groups(study))}
    for entry in study.ablations:
        of = entry["of"]
        for label in entry["revert"]:
            if _trained(study, first[of]) == _trained(study, first[f"{of}: {label}"]):
                raise ValueError(
                    f"study: ablation {label!r} of {of} changes nothing, {of} is so already; revert another choice, "
                    "or leave this one out"
                )


def _trained(study: Study, group: Group) -> Any:
    """What is trained with the first settings of the axes, and the axes."""
    settings = {axis.key: axis.values[0] if axis.values else axis.low for axis in group.axes}
    return group.axes, replace(plan(study, group, settings)[0].run, evaluate=[])
