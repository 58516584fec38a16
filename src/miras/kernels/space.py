"""Memory that passes use one after another, since the system clears what is new to a process page by page."""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

LEAST = 2**25
"""Bytes from which on it pays: the C library itself keeps what is smaller."""

_free: list[Tensor] = []
"""Bytes that no tensor lies in, any more."""

_lock = threading.Lock()


def empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """`like.new_empty(shape)`, on CPU in memory that is kept for the next one when nothing refers to this one any more.

    What is kept but too small for a new tensor, or more than twice too large, is given back to the system.
    """
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or size < LEAST:
        return like.new_empty(shape)
    lent = (ctypes.c_char * size).from_address((memory := _taken(size)).data_ptr())
    # A tensor holds on to what it was made from, and so does every view of it.
    weakref.finalize(lent, _free.append, memory)
    return torch.frombuffer(lent, dtype=like.dtype).view(tuple(shape))


def _taken(size: int) -> Tensor:
    """At least so many bytes."""
    with _lock:
        fitting = [(len(x), i) for i, x in enumerate(_free) if size <= len(x) <= 2 * size]
        if fitting:
            return _free.pop(min(fitting)[1])
        _free.clear()
    return torch.empty(size, dtype=torch.uint8)


def forget() -> None:
    """Give all that is kept back to the system."""
    _free.clear()
