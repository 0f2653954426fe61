"""Bytes as tokens."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt

from moejax.data.documents import Piece
from moejax.data.tokenizers.interface import SIZE, escaped


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
