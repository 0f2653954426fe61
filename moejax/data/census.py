"""How many documents do not look like text, counted while they are read."""

import dataclasses

from moejax.data.documents import Piece

CONTROL = bytes(byte for byte in range(32) if byte not in b"\a\b\t\n\v\f\r\x1b") + b"\x7f"
"""Characters that text has no use for."""
MOST_CONTROL = 0.01
"""Share of them from which a piece looks binary; NUL, which separates documents, is always said."""


@dataclasses.dataclass
class Census:
    """Documents seen, and those that are not UTF-8 or look binary: a name to each, and a count."""

    documents: int = 0
    not_utf8: int = 0
    first_not_utf8: str = ""
    binary: int = 0
    first_binary: str = ""

    def see(self, piece: Piece) -> None:
        """Counts one piece; the pieces of a document come one after the other."""
        if piece.is_first:
            self.documents += 1
            self._odd: set[str] = set()
        name = piece.document.name
        if "not_utf8" not in self._odd and not is_utf8(piece.data):
            self._odd.add("not_utf8")
            self.not_utf8, self.first_not_utf8 = self.not_utf8 + 1, self.first_not_utf8 or name
        if "binary" not in self._odd and looks_binary(piece.data):
            self._odd.add("binary")
            self.binary, self.first_binary = self.binary + 1, self.first_binary or name

    def warning(self) -> str:
        """One line for the user; empty if everything looks like text."""
        said = []
        if self.not_utf8:
            said.append(f"{self.not_utf8} are not UTF-8 (the first: {self.first_not_utf8!r})")
        if self.binary:
            said.append(
                f"{self.binary} hold NUL or many control characters, as binary files and UTF-16 do "
                f"(the first: {self.first_binary!r})"
            )
        if not said:
            return ""
        return (
            f"of {self.documents} documents {' and '.join(said)}; their bytes are trained on as "
            "they are: convert or remove them unless that is meant"
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
