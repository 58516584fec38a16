"""Every test is seeded, runs on one thread, and sees NaN in memory that nobody has written."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.utils.deterministic

STARTED = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--minutes N`, with which .ci/run ends in time on a slow machine."""
    parser.addoption("--minutes", type=float, default=float("inf"), help="skip what has not begun after so many minutes")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, and say so, what `--minutes` has no room for."""
    minutes = item.config.getoption("--minutes")
    if time.monotonic() - STARTED > 60 * minutes:
        pytest.skip(f"not begun after {minutes:g} minutes")


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` and its relatives hold NaN, so that reading them before writing them shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True, scope="session")
def quickly_built() -> Iterator[None]:
    """Native programs are built with few optimisations, which take the compiler long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIRAS_CXXFLAGS", "-O1")
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
