"""Files as documents: finding them, reading them in pieces."""

import dataclasses
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import BinaryIO

from moejax.data.containers import refuse_containers
from moejax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Document:
    """`size` bytes of one file from `start` on; `name` is its path below the corpus folder, with
    "/", and `field` the config field that names the folder."""

    name: str
    path: str
    size: int  # bytes
    start: int = 0
    field: str = "data.path"

    def read(self) -> bytes:
        """The document's bytes. Raises UserError if the file cannot be read or has changed size."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                data = file.read(self.size)
        except OSError as error:
            raise UserError(f"{self.field}: cannot read {self.path!r}: {error.strerror}") from error
        if len(data) != self.size:
            raise UserError(
                f"{self.field}: {self.path!r} became shorter while it was read; run again"
            )
        return data


def find_documents(path: str, field: str = "data.path") -> list[Document]:
    """The documents at or below `path` (see `list_documents`), all of which may be text.

    Raises UserError for a file that is not text (see `containers`), and like `list_documents`.
    """
    documents = list_documents(path, field=field)
    refuse_containers([document.path for document in documents], field)
    return documents


def list_documents(
    path: str, *, field: str = "data.path", skip_folders: Collection[str] = ()
) -> list[Document]:
    """The non-empty files at or below `path`, sorted by relative path.

    Hidden files and folders (a leading dot) and folders named in `skip_folders` are left out;
    links to folders are not followed. Raises UserError if `path` does not exist, is neither file
    nor folder, contains no bytes, or has an unreadable file or folder.
    """
    path = os.path.expanduser(path)
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            files = _scan(path, "", skip_folders)
            documents = sorted(files, key=lambda document: os.fsencode(document.name))
        elif stat.S_ISREG(mode):
            documents = [Document(os.path.basename(path), path, os.stat(path).st_size)]
        else:
            raise UserError(f"{field}: {path!r} is neither a file nor a folder")
    except OSError as error:
        where = error.filename if error.filename is not None else path
        raise UserError(f"{field}: cannot read {where!r}: {error.strerror}") from error
    documents = [document for document in documents if document.size > 0]
    if not documents:
        raise UserError(f"{field}: {path!r} holds no text; name a file or folder with text in it")
    return [dataclasses.replace(document, field=field) for document in documents]


def _scan(root: str, prefix: str, skip_folders: Collection[str]) -> Iterator[Document]:
    """Regular files below `root`, in any order. Broken links and missing access raise OSError."""
    with os.scandir(os.path.join(root, prefix)) as entries:
        for entry in entries:
            name = prefix + entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if entry.name not in skip_folders and not entry.is_symlink():
                    yield from _scan(root, name + "/", skip_folders)
                continue
            info = entry.stat()  # follows links to files
            if stat.S_ISREG(info.st_mode):
                yield Document(name, entry.path, info.st_size)


def character_start(data: bytes, at: int) -> int:
    """The start of the UTF-8 character that byte `at` belongs to; `at` itself in other bytes."""
    for start in range(at, max(at - 4, -1), -1):
        if data[start] & 0xC0 != 0x80:
            return start
    return at


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a document, small enough to tokenise at once."""

    document: Document
    data: bytes
    is_first: bool


PIECE = 1 << 20
"""Most bytes of a piece."""


def pieces(documents: Sequence[Document], max_bytes: int = PIECE) -> Iterator[Piece]:
    """The documents in order, read and cut into pieces, of which memory holds one.

    Raises:
      UserError: a file that cannot be read, or has become shorter.
    """
    for document in documents:
        try:
            with open(document.path, "rb") as file:
                file.seek(document.start)
                yield from _pieces(document, file, max_bytes)
        except OSError as error:
            raise UserError(
                f"{document.field}: cannot read {document.path!r}: {error.strerror}"
            ) from error


def _pieces(document: Document, file: BinaryIO, max_bytes: int) -> Iterator[Piece]:
    left, rest, is_first = document.size, b"", True
    while left or rest:
        wanted = min(max_bytes + 1 - len(rest), left)  # one more tells whether there is an end
        data = rest + file.read(wanted)
        if len(data) != len(rest) + wanted:
            raise UserError(
                f"{document.field}: {document.path!r} became shorter while it was read; run again"
            )
        left -= wanted
        end = _end(data, 0, max_bytes)
        yield Piece(document, data[:end], is_first)
        rest, is_first = data[end:], False


def cut(document: Document, data: bytes, max_bytes: int = PIECE) -> Iterator[Piece]:
    """A document, whose bytes are ``data``, in pieces of at most ``max_bytes``.

    A cut falls after a newline if there is one, otherwise between two UTF-8 characters.
    """
    begin = 0
    while begin < len(data):
        end = _end(data, begin, max_bytes)
        yield Piece(document, data[begin:end], is_first=begin == 0)
        begin = end


def _end(data: bytes, begin: int, max_bytes: int) -> int:
    """The end of a piece that begins at ``begin``."""
    end = min(begin + max_bytes, len(data))
    if end == len(data):
        return end
    newline = data.rfind(b"\n", begin, end)
    return newline + 1 if newline >= 0 else max(character_start(data, end), begin + 1)


def piece_batches(documents: Sequence[Document], max_bytes: int = 8 << 20) -> Iterator[list[Piece]]:
    """`pieces`, gathered into lists for tokenizers that work in parallel."""
    return gathered(pieces(documents), max_bytes)


def gathered(pieces: Iterable[Piece], max_bytes: int) -> Iterator[list[Piece]]:
    """The pieces in lists of about `max_bytes`."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.data)
        if size >= max_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
