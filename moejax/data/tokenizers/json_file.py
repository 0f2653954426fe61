"""A tokenizer.json of the Hugging Face library `tokenizers`."""

import functools
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from moejax.data.documents import Piece
from moejax.data.tokenizers.interface import DOCUMENT_TOKEN, SEPARATORS, SIZE, escaped, text_of
from moejax.data.tokenizers.named import UNSAID, Special
from moejax.errors import UserError


class JsonTokenizer:
    """A tokenizer file of the Hugging Face `tokenizers` library.

    It must have a token that ends a document (see `SEPARATORS`) and be lossless on UTF-8 text,
    which is verified on all encoded text. Truncation, padding, dropout of merges and added start or
    end tokens set in the file are switched off; the text of a special token inside a document is
    encoded as plain text.
    """

    def __init__(self, path: str, special: Special = UNSAID, opens: bool = True, name: str = ""):
        self.name = name or os.path.basename(path)
        self._path = path
        self._tokenizer = _read_tokenizer(path)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        if getattr(self._tokenizer.model, "dropout", None):  # of BPE: tokens would be random
            self._tokenizer.model.dropout = None
        ends = (special.eos, *SEPARATORS)
        known = [x for x in ends if x and self._tokenizer.token_to_id(x) is not None]
        if not known:
            raise UserError(
                f"data.tokenizer: {path!r} has no token to put between documents, such as "
                f"{', '.join(map(repr, SEPARATORS[:3]))} or '</s>'; add one with "
                f"tokenizers.Tokenizer.add_special_tokens([{DOCUMENT_TOKEN!r}]) and save the file"
            )
        self.separator_token = known[0]
        self.separator: int = self._tokenizer.token_to_id(known[0])
        # Special tokens alone are never found in a text, and not every file calls its own special.
        added = self._tokenizer.get_added_tokens_decoder().get(self.separator)
        if added and not added.special:
            self._tokenizer.add_special_tokens([known[0]])
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.opening = self._opening() if opens else ()

    def _opening(self) -> tuple[int, ...]:
        """The tokens that the file puts before a text, such as <s>."""
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        return tuple(
            whole[: next((i for i in range(len(whole)) if whole[i:][: len(plain)] == plain), 0)]
        )

    def encode(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        """Token ids of each piece; UserError for bytes not in UTF-8 and for a lossy encoding."""
        texts = [text_of(piece) for piece in pieces]
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
            text = text_of(piece)
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

    @property
    def is_byte_level(self) -> bool:
        """True if its tokens are strings of bytes."""
        return self._is_byte_level

    @functools.cached_property
    def _is_byte_level(self) -> bool:
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
        sizes[list(self.opening)] = 0  # by definition, see `interface`
        sizes[self.separator] = 1
        return sizes


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
