"""The engine: runs any design, token by token (the definition) or block by block."""

from miras.engine.dispatch import PATHS, Plan, explain, memorize, plan, recall
from miras.engine.problem import AttentionState, MemoryState

__all__ = ["PATHS", "AttentionState", "MemoryState", "Plan", "explain", "memorize", "plan", "recall"]
