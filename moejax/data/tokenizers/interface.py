"""The contract of tokenizers.

A tokenised corpus is one stream: the documents in order, with a separator token between every two,
and with the tokenizer's opening before each if it has one. All tokenizers are lossless, so that a
loss in nats per token converts exactly to bits per byte of that stream, in which a separator counts
as one byte and an opening as none.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt

from moejax.data.documents import Piece
from moejax.errors import UserError

DOCUMENT_TOKEN = "<|doc|>"
SEPARATORS = (
    DOCUMENT_TOKEN,
    "<|endoftext|>",  # GPT-2, OLMo, Qwen, Phi
    "<|end_of_text|>",  # Llama 3
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek
    "</s>",  # Llama 2, Mistral, T5
    "<eos>",  # Gemma
    "<|eos|>",
    "<EOS>",
    "[EOS]",
    "<|end|>",
    "<|eot|>",
)
"""Tokens that end a document; the first one in a vocabulary becomes the separator, unless the
tokenizer's files name another."""

SIZE = np.dtype("<u4")
"""The element type of bytes per token."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
      name: the file's name, or "bytes".
      is_byte_level: true if every token is a string of bytes.
      vocab_size: ids are below it.
      separator, separator_token: the token between two documents, and its spelling.
      opening: the tokens before every text, such as <s>; empty for most.
    """

    name: str
    vocab_size: int
    separator: int
    separator_token: str
    opening: tuple[int, ...]

    @property
    def is_byte_level(self) -> bool: ...

    def encode(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        """Token ids of each piece; UserError for text that they would not give back."""
        ...

    def sizes(self, piece: Piece, tokens: np.ndarray) -> UInt[np.ndarray, " N"]:
        """Bytes of the piece per token of `encode`; they add up to the size of the piece."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, separators and openings as spelled in the vocabulary."""
        ...

    def token_text(self) -> list[str]:
        """Each token in readable form, control characters as escapes (``\\n``)."""
        ...

    def token_bytes(self) -> Int[np.ndarray, " V"]:
        """Bytes per token id; raises UserError unless the tokenizer is byte-level."""
        ...


class Joint(NamedTuple):
    """Tokens that belong to no document, and the bytes that each counts as."""

    tokens: tuple[int, ...]
    sizes: tuple[int, ...]


def before_documents(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens at the start of every document of a stream.

    They are the tokenizer's opening, unless it is the separator itself, as in vocabularies with one
    token for both: it stands between the documents already, and is not repeated.
    """
    opening = tuple(tokenizer.opening)
    return () if opening == (tokenizer.separator,) else opening


def joints(tokenizer: Tokenizer) -> tuple[Joint, Joint]:
    """The tokens before the first document of a stream, and between two documents.

    A separator counts as one byte, an opening as none: a model that has learned the text predicts
    it without loss.
    """
    opening = before_documents(tokenizer)
    first = Joint(opening, (0,) * len(opening))
    return first, Joint((tokenizer.separator, *opening), (1, *first.sizes))


def before_text(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens to predict the first token of a text from: its opening, or the separator."""
    return tuple(tokenizer.opening) or (tokenizer.separator,)


def token_dtype(vocab_size: int) -> np.dtype:
    """Little-endian uint16 where all ids fit, otherwise uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def escaped(text: str) -> str:
    """The text with unprintable characters as escapes of Python."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def text_of(piece: Piece) -> str:
    """The characters of a piece. Raises UserError if it is not UTF-8."""
    try:
        return piece.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{piece.document.field}: {piece.document.path!r} is not UTF-8 ({error.reason}); "
            "convert or remove it, or leave data.tokenizer empty to train on bytes"
        ) from error
