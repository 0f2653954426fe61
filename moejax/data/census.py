"""Counts of documents that do not look like text, made while they are read."""

import dataclasses

from moejax.data.documents import Piece

CONTROL = bytes(byte for byte in range(32) if byte not in b"\a\b\t\n\v\f\r\x1b") + b"\x7f"
"""Control characters that do not occur in text."""
MOST_CONTROL = 0.01
"""Share of control characters above which a piece looks binary. NUL, which separates documents, is
always reported."""


@dataclasses.dataclass
class Census:
    """Documents in all; number and first name of those not in UTF-8, and of binary ones."""

    documents: int = 0
    not_utf8: int = 0
    first_not_utf8: str = ""
    binary: int = 0
    first_binary: str = ""

    def __post_init__(self) -> None:
        self._odd: set[str] = set()  # what is already counted of the last document

    def following(self) -> "Census":
        """A new one, for pieces that may belong to the last document of this one."""
        census = Census()
        census._odd = self._odd
        return census

    def add(self, piece: Piece) -> None:
        """Count one piece; the pieces of a document follow one another."""
        if piece.is_first:
            self.documents += 1
            self._odd = set()
        name = piece.document.name
        if "not_utf8" not in self._odd and not is_utf8(piece.data):
            self._odd.add("not_utf8")
            self.not_utf8, self.first_not_utf8 = self.not_utf8 + 1, self.first_not_utf8 or name
        if "binary" not in self._odd and looks_binary(piece.data):
            self._odd.add("binary")
            self.binary, self.first_binary = self.binary + 1, self.first_binary or name

    def join(self, other: "Census") -> None:
        """Add the counts of documents that follow."""
        self.documents += other.documents
        self.not_utf8 += other.not_utf8
        self.first_not_utf8 = self.first_not_utf8 or other.first_not_utf8
        self.binary += other.binary
        self.first_binary = self.first_binary or other.first_binary

    def warning(self) -> str:
        """One line for the user; empty if everything looks like text."""
        parts = []
        if self.not_utf8:
            parts.append(f"{self.not_utf8} are not UTF-8 (the first: {self.first_not_utf8!r})")
        if self.binary:
            parts.append(
                f"{self.binary} hold NUL or many control characters, as binary files and UTF-16 do "
                f"(the first: {self.first_binary!r})"
            )
        if not parts:
            return ""
        return (
            f"of {self.documents} documents {' and '.join(parts)}; their bytes are trained on as "
            "they are: convert or remove them unless that is intended"
        )


def is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def looks_binary(data: bytes) -> bool:
    if b"\0" in data:
        return True
    return len(data) - len(data.translate(None, CONTROL)) > MOST_CONTROL * len(data)
