"""DNA: the next base of a bacterium's genome."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from miras.choice import require
from miras.tasks.windows import NextToken
from miras.train.data import cache_folder

PACKAGE = "bowtie-examples"
GENOME_FILE = "NC_008253.fna.gz"
GENOME_SHA256 = "cdd0874c881adf3e1819d22b7e49cffa3c761b0793a1b1f10b1c074eeadb4789"
"""Of the FASTA text."""
BASES = b"ACGT"
UNCERTAIN = b"NRYSWKMBDHV"
"""IUPAC's letters for a base that is not known, or not for certain."""
SPLITS = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}
"""Stretches of the genome."""


@dataclass(frozen=True)
class DNA(NextToken):
    """The next base (A, C, G, T are 0 to 3) of windows of a genome.

    `path` is a FASTA file, plain or gzipped; without it, E. coli 536 (NC_008253, 4,938,920 bases), which
    `python -m miras.tasks` fetches. Records follow one another; bases that are not known for certain (N and IUPAC's other
    letters) are left out, and their neighbours follow one another too. `split` is train (the first 90 % of the bases),
    validation or test (5 % each; the tests). Chance is ln 4 = 1.386 nats, 2 bits a base.

    Source: the DNA modelling of HyenaDNA (arXiv 2306.15794), which trains on the human genome, here on a bacterium's.
    """

    source: ClassVar[str] = "arXiv 2306.15794"
    unit: ClassVar[str] = "base"
    splits: ClassVar[tuple[str, ...]] = tuple(SPLITS)
    vocab_size = 4

    path: str | None = None

    @property
    def ids(self) -> np.ndarray:
        """The split's bases. Raises as `read_genome`."""
        genome = read_genome(self.path)
        begin, end = SPLITS[self.split]
        return genome[round(begin * len(genome)) : round(end * len(genome))]


def genome_file() -> Path:
    """Where the fetched genome is kept."""
    return cache_folder() / PACKAGE / GENOME_FILE


@lru_cache(maxsize=2)
def read_genome(path: str | None) -> np.ndarray:
    """The bases of a FASTA file, records one after the other, without the `UNCERTAIN` ones, as 0 to 3.

    Raises:
        FileNotFoundError: there is no such file; the message says how to get the default one.
        ValueError: letters that stand for no base, no letters that do, or a default genome that is not the known one.
    """
    file = genome_file() if path is None else Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"no genome at {file}: run `python -m miras.tasks` once (it takes Debian's package {PACKAGE} through "
            "apt-get and dpkg-deb), or give DNA(path=...) a FASTA file"
        )
    raw = file.read_bytes()
    text = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    if path is None and hashlib.sha256(text).hexdigest() != GENOME_SHA256:
        raise ValueError(f"{file} is not E. coli 536 (SHA-256 {GENOME_SHA256[:12]}...): delete it and fetch it again")
    letters = np.frombuffer(
        b"".join(line for line in text.splitlines() if not line.startswith(b">")).upper(), dtype=np.uint8
    )
    code = np.full(256, 5, dtype=np.uint8)
    code[list(BASES)], code[list(UNCERTAIN)] = range(4), 4
    ids = code[letters]
    allowed = f"give FASTA of the letters A, C, G and T; {UNCERTAIN.decode()} may be among them and are left out"
    other = letters[ids == 5][:1].tobytes().decode("latin-1")
    require(not other, f"{file} has the letter {other!r}; {allowed}")
    require(bool((ids < 4).any()), f"{file} has no base; {allowed}")
    return ids[ids < 4]


def fetch() -> Path:
    """Take the genome out of Debian's package into the cache folder.

    Raises:
        FileNotFoundError: there is no apt-get or dpkg-deb on this machine.
        subprocess.CalledProcessError: they failed; their message is on the standard error.
        ValueError: the package holds another genome.
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True)
        [package] = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), folder], check=True)
        [found] = Path(folder).rglob(GENOME_FILE)
        genome_file().parent.mkdir(parents=True, exist_ok=True)
        genome_file().write_bytes(found.read_bytes())
    read_genome(None)
    return genome_file()
