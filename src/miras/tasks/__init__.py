"""What sequence models are asked to do in the experiments: each task draws its own examples, by seed."""

from miras.tasks.dna import DNA
from miras.tasks.language import LanguageModelling
from miras.tasks.mad import (
    Compression,
    FuzzyInContextRecall,
    InContextRecall,
    Memorization,
    NoisyInContextRecall,
    SelectiveCopying,
)
from miras.tasks.needle import NumberNeedle, PassKeyNeedle, UuidNeedle
from miras.tasks.recall import MQAR, MajorityRecall, MQARMixture, zoology_grid
from miras.tasks.states import GroupWords, Parity
from miras.tasks.task import IGNORED, Batch, Continuous, Discrete, Task
from miras.tasks.vectors import VectorRecall, mean_of_showings, median_of_showings
from miras.tasks.weather import Weather, ridge

__all__ = [
    "DNA",
    "IGNORED",
    "MQAR",
    "Batch",
    "Compression",
    "Continuous",
    "Discrete",
    "FuzzyInContextRecall",
    "GroupWords",
    "InContextRecall",
    "LanguageModelling",
    "MQARMixture",
    "MajorityRecall",
    "Memorization",
    "NoisyInContextRecall",
    "NumberNeedle",
    "Parity",
    "PassKeyNeedle",
    "SelectiveCopying",
    "Task",
    "UuidNeedle",
    "VectorRecall",
    "Weather",
    "mean_of_showings",
    "median_of_showings",
    "ridge",
    "zoology_grid",
]
