"""What an ablation must be: another model than the one it is of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from miras.study.config import Study
from miras.study.plan import Group, groups, plan


def check_ablations(study: Study) -> None:
    """Refuse ablations that change nothing on any task and size: tests of a model against itself. Raises ValueError."""
    places = {(group.task, group.size, group.model): group for group in groups(study)} if study.ablations else {}
    for entry in study.ablations:
        of = entry["of"]
        for label in entry["revert"]:
            name = f"{of}: {label}"
            pairs = [(places[task, size, of], group) for (task, size, model), group in places.items() if model == name]
            if all(_trained(study, one) == _trained(study, other) for one, other in pairs):
                raise ValueError(
                    f"study: ablation {label!r} of {of} changes nothing, {of} is so already; revert another choice, "
                    "or leave this one out"
                )


def _trained(study: Study, group: Group) -> Any:
    """What is trained with the first settings of the axes, and the axes."""
    settings = {axis.key: axis.values[0] if axis.values else axis.low for axis in group.axes}
    return group.axes, replace(plan(study, group, settings)[0].run, evaluate=[])
