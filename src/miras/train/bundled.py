"""Texts that installed packages carry: encyclopedia articles (gensim) and Python code (the standard library)."""

from __future__ import annotations

import bz2
import hashlib
import importlib.metadata
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

GENSIM_VERSION = "4.4.0"
ENWIKI_FILE = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
ENWIKI_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"


def package_file(package: str, version: str, path: str, sha256: str) -> Path:
    """The file at `path` of an installed package, known by its content.

    Raises:
        ImportError: the package or the file is missing; the message says how to get it.
        ValueError: the file is another one.
    """
    advice = f"pip install {package}=={version} (or torch-miras[tasks])"
    try:
        file = Path(str(importlib.metadata.distribution(package).locate_file(path)))
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"{Path(path).name} comes from the package {package}, which is not installed: {advice}") from error
    if not file.is_file():
        raise ImportError(f"the installed {package} has no {path}: {advice}")
    if hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
        raise ValueError(f"{file} is not the known {Path(path).name} (SHA-256 {sha256[:12]}...): {advice}")
    return file


def enwiki() -> Iterator[tuple[str, str]]:
    """Title and text of the articles of English Wikipedia that gensim is tested on, their markup removed.

    Source: gensim's bundled enwiki sample, CC BY-SA. Raises as `package_file`.
    """
    file = package_file("gensim", GENSIM_VERSION, ENWIKI_FILE, ENWIKI_SHA256)
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    with bz2.open(file) as pages:
        for title, text, _ in extract_pages(pages, filter_namespaces=("0",)):  # pyright: ignore[reportArgumentType]
            if text and not text.lstrip().lower().startswith("#redirect"):
                plain = re.sub(r"'{2,}", "", str(filter_wiki(text)))
                yield str(title), re.sub(r"\n{3,}", "\n\n", plain).strip() + "\n"


def python_code() -> Iterator[tuple[str, str]]:
    """Path and text of the running Python's standard library, its tests and installed packages left out.

    The text is that of the Python version; results are comparable within one.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        inner = file.relative_to(root)
        if not {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"} & set(inner.parts):
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if text.strip() and "\0" not in text:
                yield inner.as_posix(), text


BUNDLED: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {"enwiki": enwiki, "python": python_code}
"""Corpora by the name that `data.corpus` gives them."""
