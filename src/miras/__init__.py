"""Miras: sequence models as associative memories that learn at test time."""

from miras import bias, inputs, learning, memory, models, retention
from miras.design import Design, Pattern
from miras.engine import PATHS, AttentionState, MemoryState, explain, memorize

__version__ = "0.1.0"

__all__ = [
    "PATHS",
    "AttentionState",
    "Design",
    "MemoryState",
    "Pattern",
    "bias",
    "explain",
    "inputs",
    "learning",
    "memorize",
    "memory",
    "models",
    "retention",
]
