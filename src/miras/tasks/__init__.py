"""What sequence models are asked to do in the experiments: each task draws its own examples, by seed."""

from miras.tasks.task import IGNORED, Batch, Continuous, Discrete, Task

__all__ = ["IGNORED", "Batch", "Continuous", "Discrete", "Task"]
