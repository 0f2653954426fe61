"""A .model file of Google's SentencePiece library (Kudo and Richardson, arXiv 1808.06226)."""

import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from moejax.data.documents import Piece
from moejax.data.tokenizers.interface import SEPARATORS, SIZE, escaped, text_of
from moejax.data.tokenizers.named import UNSAID, Special
from moejax.errors import UserError

SPACE = "\u2581"
"""The library's sign for a space."""
LOSSLESS = "normalization_rule_name=identity, remove_extra_whitespaces=False, byte_fallback=True"
"""The trainer's settings for a model that gives every text back, except U+2581."""


class SentencePieceTokenizer:
    """Unigram or BPE pieces, with bytes to fall back on.

    The separator is the file's token for the end of a text (EOS), and `opening` that for the
    beginning (BOS), if it has one. It must be lossless, which is verified on all encoded text; by
    default the library's trainer makes models that are not. The spelling of a control token
    inside a document is encoded as plain text.
    """

    is_byte_level = False

    def __init__(self, path: str, special: Special = UNSAID, opens: bool = True, name: str = ""):
        self.name = name or os.path.basename(path)
        self._path = path
        self._processor = _read(path)
        self.vocab_size: int = self._processor.get_piece_size()
        self.separator = self._control(special.eos, self._processor.eos_id(), *SEPARATORS)
        if self.separator < 0:
            raise UserError(
                f"data.tokenizer: {path!r} has no token that ends a text, to put between documents;"
                " train it with an eos_id (3, say)"
            )
        self.separator_token: str = self._processor.id_to_piece(self.separator)
        bos = self._control(special.bos, self._processor.bos_id())
        opens = opens and bos >= 0 and special.adds_bos is not False
        self.opening: tuple[int, ...] = (bos,) if opens else ()

    def _control(self, *names: str | int) -> int:
        """The first of the tokens that the file has as a control token; -1 if it has none."""
        for token in names:
            index = token if isinstance(token, int) else self._processor.piece_to_id(token)
            if index >= 0 and self._processor.is_control(index):
                return index
        return -1

    def encode(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        """Token ids of each piece; UserError for bytes not in UTF-8 and for a lossy encoding."""
        texts = [text_of(piece) for piece in pieces]
        ids = self._processor.encode(texts)
        for piece, text, restored in zip(pieces, texts, self._processor.decode(ids), strict=True):
            if text != restored:
                raise self._lossy(piece, text, restored)
        return [np.array(row, dtype=np.uint32) for row in ids]

    def _lossy(self, piece: Piece, text: str, restored: str) -> UserError:
        at = len(os.path.commonprefix([text, restored]))
        lost, given = text[at : at + 12], restored[at : at + 12]
        if lost[:1] == SPACE and given[:1] == " ":
            return UserError(
                f"data.tokenizer: {self._path!r} cannot give back the character U+2581 of "
                f"{piece.document.path!r}, with which SentencePiece spells a space; remove it "
                "there, or use a byte-level tokenizer"
            )
        return UserError(
            f"data.tokenizer: {self._path!r} does not give back the text of "
            f"{piece.document.path!r} ({lost!r} becomes {given!r}); train it with {LOSSLESS}, or "
            "use a byte-level tokenizer"
        )

    def sizes(self, piece: Piece, tokens: np.ndarray) -> UInt[np.ndarray, " N"]:
        """Bytes of the piece per token; they add up to the size of the piece.

        The space that most models put before every text is no part of it and counts 0.
        """
        sizes = self._piece_bytes[tokens]
        added = sizes.sum() - len(piece.data)
        if added == 1 and self._processor.id_to_piece(int(tokens[0])).startswith(SPACE):
            sizes[0] -= added
        if sizes.sum() != len(piece.data):
            raise UserError(
                f"data.tokenizer: {self._path!r} does not determine which bytes of "
                f"{piece.document.path!r} its tokens encode; use a byte-level tokenizer"
            )
        return sizes.astype(SIZE)

    @functools.cached_property
    def _piece_bytes(self) -> np.ndarray:
        """Bytes of each token within a text, where a space is one."""
        processor, ids = self._processor, range(self.vocab_size)
        return np.array(
            [
                1 if processor.is_byte(i)
                else len(processor.id_to_piece(i).replace(SPACE, " ").encode())
                for i in ids
            ]
        )  # fmt: skip

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, control tokens as spelled in the vocabulary."""
        text, run = [], []
        for token in map(int, tokens):
            if self._processor.is_control(token):
                text += [self._processor.decode(run), self._processor.id_to_piece(token)]
                run = []
            else:
                run.append(token)
        return "".join([*text, self._processor.decode(run)])

    def token_text(self) -> list[str]:
        """Each token in readable form, control characters as escapes (``\\n``).

        A byte that is no character is spelled as in the file's vocabulary, ``<0xE9>``.
        """
        texts = []
        for index in range(self.vocab_size):
            spelled = self._processor.id_to_piece(index)
            if self._processor.is_byte(index) and int(spelled[1:-1], 16) < 128:
                spelled = chr(int(spelled[1:-1], 16))
            texts.append(escaped(spelled.replace(SPACE, " ")))
        return texts

    def token_bytes(self) -> Int[np.ndarray, " V"]:
        """Raises UserError: the same token has other bytes at the start of a text."""
        raise UserError(
            f"data.tokenizer: {self._path!r} is not byte-level: its tokens cannot be mapped "
            "to bytes; use a byte-level tokenizer"
        )


def _read(path: str) -> Any:
    import sentencepiece  # only where such a file is used

    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise UserError(f"data.tokenizer: cannot read {path!r}: {error.strerror}") from error
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(data)
    except RuntimeError as error:
        raise UserError(
            f"data.tokenizer: {path!r} is not a model of SentencePiece; name a tokenizer.json or a "
            "model that its trainer wrote"
        ) from error
    return processor
