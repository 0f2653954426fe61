"""Bytes as tokens, Hugging Face tokenizer files, and training a byte-level BPE.

A tokenised corpus is one stream: the documents in order, with a separator token between every two.
All tokenizers here are lossless, so that a loss in nats per token converts exactly to bits per byte
of that stream, in which a separator counts as one byte.
"""

import functools
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from moejax.data.census import Census
from moejax.data.documents import Document, Piece, piece_batches, pieces
from moejax.data.split import open_text
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
"""Tokens that end a document; the first one in a vocabulary becomes the separator."""

SIZE = np.dtype("<u4")
"""The element type of bytes per token."""


class ByteTokenizer:
    """Every byte is a token; byte 0, which text does not contain, separates documents.

    In a binary file, which may contain it, a byte 0 is indistinguishable from a separator.
    """

    name = "bytes"
    is_byte_level = True
    vocab_size = 256
    separator = 0
    separator_token = "byte 0"
    opening: tuple[int, ...] = ()

    def encode(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        """Token ids of each piece."""
        return [np.frombuffer(piece.data, dtype=np.uint8) for piece in pieces]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; bytes that are not UTF-8 become replacement characters."""
        return bytes(tokens).decode("utf-8", "replace")

    def token_bytes(self) -> Int[np.ndarray, " V"]:
        """Bytes of text per token id."""
        return np.ones(self.vocab_size, dtype=np.int64)

    def sizes(self, piece: Piece, tokens: np.ndarray) -> UInt[np.ndarray, " N"]:
        """Bytes of the piece per token."""
        return np.ones(len(tokens), dtype=SIZE)

    def token_text(self) -> list[str]:
        """Each token in readable form: ASCII as it is, other bytes as escapes (``\\xe9``)."""
        return [escaped(chr(byte)) if byte < 128 else f"\\x{byte:02x}" for byte in range(256)]


class JsonTokenizer:
    """A tokenizer file of the Hugging Face `tokenizers` library.

    It must have a token that ends a document (see `SEPARATORS`) and be lossless on UTF-8 text,
    which is verified on all encoded text. Truncation, padding, dropout of merges and added start or
    end tokens set in the file are switched off; the text of a special token inside a document is
    encoded as plain text.
    """

    def __init__(self, path: str):
        self.name = os.path.basename(path)
        self._path = path
        self._tokenizer = _read_tokenizer(path)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        if getattr(self._tokenizer.model, "dropout", None):  # of BPE: tokens would be random
            self._tokenizer.model.dropout = None
        ids = {token: self._tokenizer.token_to_id(token) for token in SEPARATORS}
        known = [token for token in SEPARATORS if ids[token] is not None]
        if not known:
            raise UserError(
                f"data.tokenizer: {path!r} has no token to put between documents, such as "
                f"{', '.join(map(repr, SEPARATORS[:3]))} or '</s>'; add one with "
                f"tokenizers.Tokenizer.add_special_tokens([{DOCUMENT_TOKEN!r}]) and save the file"
            )
        self.separator_token = known[0]
        self.separator: int = ids[known[0]]
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def opening(self) -> tuple[int, ...]:
        """The tokens that the file puts before a text, such as <s>; prompts begin with them."""
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        return tuple(
            whole[: next((i for i in range(len(whole)) if whole[i:][: len(plain)] == plain), 0)]
        )

    def encode(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        """Token ids of each piece; UserError for bytes not in UTF-8 and for a lossy encoding."""
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

    def sizes(self, piece: Piece, tokens: np.ndarray) -> UInt[np.ndarray, " N"]:
        """Bytes of the piece per token; they add up to the size of the piece.

        A token that is not a string of bytes covers the characters between its predecessor's end
        and its own; tokens with the same end (bytes of one character) share them evenly.
        """
        if self.is_byte_level:
            sizes = self._token_bytes[tokens]
        else:
            text = _text(piece)
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            sizes = _sizes_from_ends(text, [end for _, end in encoding.offsets])
        if len(sizes) != len(tokens) or sizes.sum() != len(piece.data):
            raise UserError(
                f"data.tokenizer: {self._path!r} does not determine which bytes of "
                f"{piece.document.path!r} its tokens encode; use a byte-level tokenizer"
            )
        return sizes.astype(SIZE)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, separators included as spelled in the vocabulary."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    @functools.cached_property
    def is_byte_level(self) -> bool:
        """True if its tokens are strings of bytes."""
        decoder = json.loads(self._tokenizer.to_str())["decoder"] or {}
        return "ByteLevel" in [d.get("type") for d in (decoder, *decoder.get("decoders", ()))]

    @functools.cached_property
    def _token_bytes(self) -> np.ndarray:
        return self.token_bytes()

    def token_text(self) -> list[str]:
        """Each token in readable form, control characters as escapes (``\\n``).

        A part of a character is spelled as in the file's vocabulary; an id without a token is "".
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
        sizes[self.separator] = 1  # by definition, see the docstring of the module
        return sizes


def escaped(text: str) -> str:
    """The text with unprintable characters as escapes of Python."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _text(piece: Piece) -> str:
    try:
        return piece.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{piece.document.field}: {piece.document.path!r} is not UTF-8 ({error.reason}); "
            "convert or remove it, or leave data.tokenizer empty to train on bytes"
        ) from error


Tokenizer = ByteTokenizer | JsonTokenizer


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of `data.tokenizer`: bytes if it is empty, or a `tokenizers` JSON file."""
    return JsonTokenizer(os.path.expanduser(path)) if path else ByteTokenizer()


def token_dtype(vocab_size: int) -> np.dtype:
    """Little-endian uint16 where all ids fit, otherwise uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def encode_documents(
    documents: Sequence[Document], tokenizer: Tokenizer, census: Census | None = None
) -> Iterator[tuple[UInt[np.ndarray, " N"], int]]:
    """The token stream of the documents, in parts, each with the number of bytes that it encodes.

    A `census` counts the documents as they are read.
    """
    for piece, tokens in _parts(documents, tokenizer, census):
        yield tokens, len(piece.data) if piece else 1


def encode_sized(
    documents: Sequence[Document], tokenizer: Tokenizer, census: Census | None = None
) -> Iterator[tuple[UInt[np.ndarray, " N"], UInt[np.ndarray, " N"]]]:
    """The same stream; each part with the number of bytes that each of its tokens encodes."""
    for piece, tokens in _parts(documents, tokenizer, census):
        yield tokens, tokenizer.sizes(piece, tokens) if piece else np.ones(1, dtype=SIZE)


def _parts(
    documents: Sequence[Document], tokenizer: Tokenizer, census: Census | None
) -> Iterator[tuple[Piece | None, np.ndarray]]:
    """Pieces with their tokens, and None with a separator between two documents."""
    dtype = token_dtype(tokenizer.vocab_size)
    separator = np.array([tokenizer.separator], dtype=dtype)
    is_start = True
    for batch in piece_batches(documents):
        for piece, tokens in zip(batch, tokenizer.encode(batch), strict=True):
            if piece.is_first and not is_start:
                yield None, separator
            is_start = False
            if census is not None:
                census.add(piece)
            yield piece, tokens.astype(dtype)


def _sizes_from_ends(text: str, ends: list[int]) -> np.ndarray:
    """Bytes per token, from the character positions at which the tokens end."""
    code_N = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    wide_N = 1 + (code_N >= 0x80) + (code_N >= 0x800) + (code_N >= 0x10000)
    bytes_before = np.concatenate([[0], np.cumsum(wide_N)])
    end_N = np.maximum.accumulate(np.array(ends, dtype=np.int64))
    end_N[end_N == end_N[-1:]] = len(text)  # the last token covers the rest of the text
    stop, first, count = np.unique(end_N, return_index=True, return_counts=True)
    span = np.diff(bytes_before[stop], prepend=0)
    sizes = np.repeat(span // count, count)
    sizes[first] += span % count
    return sizes


def train_bpe(
    path: str,
    vocab_size: int,
    out: str,
    *,
    eval_fraction: float = 0.05,
    eval_path: str = "",
    census: Census | None = None,
) -> int:
    """Train a byte-level BPE on the training split of `path` and write it to `out`.

    Args:
      path: a file or folder of UTF-8 text; empty for the built-in corpus.
      vocab_size: size of the vocabulary, including the 256 bytes and `<|doc|>`; at least 257.
      out: the JSON file to write, for `data.tokenizer`. Must not exist.
      eval_fraction: share of the bytes to hold out; use the same in `data.eval_fraction`.
      eval_path: a text to hold out instead, as in `data.eval_path`.
      census: counts the documents as they are read.

    Returns the size of the vocabulary, less than `vocab_size` if the text has too few pairs to
    merge. The tokenizer encodes any UTF-8 text without loss; bytes that are not UTF-8 raise
    UserError, in training and in encoding.
    """
    out = os.path.expanduser(out)
    if vocab_size < 257:
        raise UserError(f"vocab_size: {vocab_size} is below 257 (256 bytes and {DOCUMENT_TOKEN})")
    if os.path.exists(out):
        raise UserError(f"out: {out!r} exists; remove it or choose another name")
    train = open_text(path, eval_fraction, eval_path).split.train
    tokenizer = _fit_bpe(train, vocab_size, census)
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


def _fit_bpe(documents: Sequence[Document], vocab_size: int, census: Census | None) -> Any:
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

    def texts() -> Iterator[str]:
        for piece in pieces(documents):
            if census is not None:
                census.add(piece)
            yield _text(piece)

    tokenizer.train_from_iterator(texts(), trainer=trainer)
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
    except Exception as error:  # the library raises a plain Exception for a malformed file
        raise UserError(
            f"data.tokenizer: {path!r} is not a file of the `tokenizers` library: {error}"
        ) from error
