"""Bytes as tokens, Hugging Face tokenizer files, and training a byte-level BPE.

A tokenised corpus is one stream: the documents in order, with one separator token between two of
them. Every tokenizer here is lossless, so a loss in nats per token converts exactly to bits per
byte of that stream, in which a separator counts as one byte.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from moejax.data.builtin import builtin_documents
from moejax.data.documents import Document, Piece, find_documents, piece_batches, split_documents
from moejax.errors import UserError

DOCUMENT_TOKEN = "<|doc|>"


class ByteTokenizer:
    """Every byte is a token; the separator (between documents) is byte 0, which text does not hold.

    Binary files may: then a byte 0 inside a document cannot be told from a separator.
    """

    name = "bytes"
    is_byte_level = True
    vocab_size = 256
    separator = 0

    def encode(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        """Token ids of each piece."""
        return [np.frombuffer(piece.data, dtype=np.uint8) for piece in pieces]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; bytes that are no UTF-8 become replacement characters."""
        return bytes(tokens).decode("utf-8", "replace")

    def token_bytes(self) -> Int[np.ndarray, " V"]:
        """How many bytes of text each token id stands for."""
        return np.ones(self.vocab_size, dtype=np.int64)

    def token_text(self) -> list[str]:
        """Each token in readable form: ASCII as it is, other bytes as escapes (``\\xe9``)."""
        return [escaped(chr(byte)) if byte < 128 else f"\\x{byte:02x}" for byte in range(256)]


class JsonTokenizer:
    """A tokenizer file of the Hugging Face `tokenizers` library.

    It must know the token `<|doc|>` (the separator) and be lossless on UTF-8 text, which is
    verified on all text it encodes. Truncation, padding and added start or end tokens set in the
    file are switched off; the text of a special token inside a document is encoded as plain text.
    """

    def __init__(self, path: str):
        self.name = os.path.basename(path)
        self._path = path
        self._tokenizer = _read_tokenizer(path)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        separator = self._tokenizer.token_to_id(DOCUMENT_TOKEN)
        if separator is None:
            raise UserError(
                f"data.tokenizer: {path!r} has no token {DOCUMENT_TOKEN!r} to put between "
                "documents; add it with tokenizers.Tokenizer.add_special_tokens("
                f"[{DOCUMENT_TOKEN!r}]) and save the file"
            )
        self.separator: int = separator
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        """Token ids of each piece; UserError for bytes not UTF-8 and text that does not survive."""
        texts = [_text(piece) for piece in pieces]
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [encoding.ids for encoding in encoded]
        decoded = self._tokenizer.decode_batch(ids, skip_special_tokens=False)
        for piece, text, restored in zip(pieces, texts, decoded, strict=True):
            if text != restored:
                raise UserError(
                    f"data.tokenizer: {self._path!r} does not give back the text of "
                    f"{piece.document.path!r} (it is not lossless); use a byte-level tokenizer"
                )
        return [np.array(row, dtype=np.uint32) for row in ids]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, separators as they are spelled."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    @property
    def is_byte_level(self) -> bool:
        """Whether its tokens are strings of bytes."""
        return (json.loads(self._tokenizer.to_str())["decoder"] or {}).get("type") == "ByteLevel"

    def token_text(self) -> list[str]:
        """Each token in readable form, control characters as escapes (``\\n``).

        A part of a character is spelled as in the file's vocabulary; an id that has no token is "".
        """
        ids = range(self.vocab_size)
        spelled = [self._tokenizer.id_to_token(index) or "" for index in ids]
        decoded = self._tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
        return [
            spelling if "\ufffd" in text else escaped(text)
            for spelling, text in zip(spelled, decoded, strict=True)
        ]

    def token_bytes(self) -> Int[np.ndarray, " V"]:
        """Bytes per token id; raises UserError unless the tokenizer is byte-level."""
        if not self.is_byte_level:
            raise UserError(
                f"data.tokenizer: {self._path!r} is not byte-level: its tokens cannot be mapped "
                "to bytes; use a byte-level tokenizer"
            )
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._tokenizer.get_vocab(with_added_tokens=False).items():
            sizes[index] = len(token)  # byte-level BPE spells each byte as one character
        for index, token in self._tokenizer.get_added_tokens_decoder().items():
            sizes[index] = len(token.content.encode("utf-8"))
        sizes[self.separator] = 1  # by definition, see the module's docstring
        return sizes


def escaped(text: str) -> str:
    """The text with what cannot be printed as Python's escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _text(piece: Piece) -> str:
    try:
        return piece.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.path: {piece.document.path!r} is not UTF-8 ({error.reason}); convert or remove "
            "it, or leave data.tokenizer empty to train on bytes"
        ) from error


Tokenizer = ByteTokenizer | JsonTokenizer


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of `data.tokenizer`: bytes if it is empty, else a `tokenizers` JSON file."""
    return JsonTokenizer(os.path.expanduser(path)) if path else ByteTokenizer()


def token_dtype(vocab_size: int) -> np.dtype:
    """Little-endian uint16 where all ids fit, else uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def encode_documents(
    documents: Sequence[Document], tokenizer: Tokenizer
) -> Iterator[tuple[UInt[np.ndarray, " N"], int]]:
    """The token stream of the documents, in parts; each with the number of bytes it stands for."""
    dtype = token_dtype(tokenizer.vocab_size)
    separator = np.array([tokenizer.separator], dtype=dtype)
    is_start = True
    for batch in piece_batches(documents):
        for piece, tokens in zip(batch, tokenizer.encode(batch), strict=True):
            if piece.is_first and not is_start:
                yield separator, 1
            is_start = False
            yield tokens.astype(dtype), len(piece.data)


def train_bpe(path: str, vocab_size: int, out: str, *, eval_fraction: float = 0.05) -> int:
    """Trains a byte-level BPE on the training split of `path` and writes it to `out`.

    Args:
      path: a file or folder of UTF-8 text; empty for the built-in corpus.
      vocab_size: tokens wanted, with the 256 bytes and `<|doc|>`; at least 257.
      out: the JSON file to write, for `data.tokenizer`. Must not exist.
      eval_fraction: share of the files held out; use the same in `data.eval_fraction`.

    Returns the size of the vocabulary, less than `vocab_size` if the text has too few pairs to
    merge. The tokenizer encodes any UTF-8 text without loss; bytes that are not UTF-8 raise
    UserError, here and when encoding.
    """
    out = os.path.expanduser(out)
    if vocab_size < 257:
        raise UserError(f"vocab_size: {vocab_size} is below 257 (256 bytes and {DOCUMENT_TOKEN})")
    if os.path.exists(out):
        raise UserError(f"out: {out!r} exists; remove it or choose another name")
    documents = find_documents(path) if path else builtin_documents()
    train = split_documents(documents, eval_fraction).train
    tokenizer = _fit_bpe(train, vocab_size)
    folder = os.path.dirname(os.path.abspath(out))
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tokenizer-") as temporary:
            partial = os.path.join(temporary, "tokenizer.json")
            with open(partial, "w", encoding="utf-8") as file:
                file.write(tokenizer.to_str(pretty=True))
            os.replace(partial, out)
    except OSError as error:
        raise UserError(f"out: cannot write {out!r}: {error.strerror}") from error
    return tokenizer.get_vocab_size(with_added_tokens=True)


def _fit_bpe(documents: Sequence[Document], vocab_size: int) -> Any:
    import tokenizers  # only where a tokenizer file is used

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[DOCUMENT_TOKEN],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (_text(piece) for batch in piece_batches(documents) for piece in batch)
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def _read_tokenizer(path: str) -> Any:
    import tokenizers

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"data.tokenizer: cannot read {path!r}: {reason}") from error
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception for every malformed file
        raise UserError(
            f"data.tokenizer: {path!r} is not a file of the `tokenizers` library: {error}"
        ) from error
