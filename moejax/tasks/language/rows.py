"""Rows of one side of a corpus, in one of the ways of ``data.packing``."""

from typing import Protocol, runtime_checkable

from jaxtyping import Int64
from numpy import ndarray

from moejax.data.corpus import Corpus
from moejax.data.joined import Tokens
from moejax.data.source import Batch
from moejax.tasks.language.documents import Documents
from moejax.tasks.language.windows import Windows


@runtime_checkable
class Rows(Protocol):
    """Numbered rows of ``seq_len`` inputs of a token stream, read in any order."""

    def __len__(self) -> int: ...

    def read(self, row_B: Int64[ndarray, " B"], position_B: Int64[ndarray, " B"]) -> Batch:
        """``tokens`` int32[B, L + 1], ``valid`` bool[B, L], and for packed documents ``segment``
        int32[B, L]: see `moejax.tasks.language.packing`. ``position_B`` makes no difference."""
        ...

    def places(self, row_B: Int64[ndarray, " B"]) -> Int64[ndarray, "B L"]:
        """The place of each input in the stream; its target is one behind it.

        Inputs that are not ``valid`` have any place. -1 is the separator that the stream's first
        document has before it, and the target of its last token is the one behind the stream.
        """
        ...


def train_rows(corpus: Corpus, seq_len: int, packing: str) -> Rows:
    """Rows to train on. Raises UserError if there are none, or the text cannot be packed."""
    if packing == "none":
        return Windows(corpus.train_N, seq_len, "training")
    return _documents(corpus, corpus.train_N, corpus.train_start_D, seq_len, packing)


def heldout_rows(corpus: Corpus, seq_len: int, packing: str) -> Rows:
    """Held-out rows. Raises UserError if there are none, or the text cannot be packed."""
    if packing == "none":
        return Windows(corpus.heldout_N, seq_len, "held-out")
    return _documents(corpus, corpus.heldout_N, corpus.heldout_start_D, seq_len, packing)


def _documents(
    corpus: Corpus, tokens_N: Tokens, start_D: ndarray | None, seq_len: int, packing: str
) -> Documents:
    return Documents(
        tokens_N, start_D, corpus.separator, bool(corpus.opening), seq_len, packing, corpus.name
    )
