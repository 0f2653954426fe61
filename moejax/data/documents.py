"""Files as documents: finding them, holding some of them out, reading them in pieces."""

import dataclasses
import hashlib
import os
import stat
from collections.abc import Collection, Iterator, Sequence

from moejax.errors import UserError

# Any fixed value would do but for one file of the default corpus: its only English one, 6% of the
# bytes. With this value it is trained on, for eval_fraction up to 0.2.
_SPLIT_SALT = b"moejax held-out split 1\0"


@dataclasses.dataclass(frozen=True)
class Document:
    """The bytes `start..stop` of one file; `name` is its path below the corpus folder, with "/"."""

    name: str
    path: str
    size: int  # bytes
    start: int = 0

    def read(self) -> bytes:
        """The document's bytes. Raises UserError if the file cannot be read or has changed size."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                data = file.read(self.size)
        except OSError as error:
            raise UserError(f"data.path: cannot read {self.path!r}: {error.strerror}") from error
        if len(data) != self.size:
            raise UserError(f"data.path: {self.path!r} became shorter while it was read; run again")
        return data


@dataclasses.dataclass(frozen=True)
class Split:
    """Which documents are trained on and which are held out."""

    train: tuple[Document, ...]
    heldout: tuple[Document, ...]


def find_documents(path: str, *, skip_folders: Collection[str] = ()) -> list[Document]:
    """The non-empty files at or below `path`, sorted by relative path.

    Hidden files and folders (a leading dot) and folders named in `skip_folders` are left out, and
    links to folders are not followed. Raises UserError if `path` does not exist, is neither file
    nor folder, holds no bytes, or something in it cannot be read.
    """
    path = os.path.expanduser(path)
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            found = _scan(path, "", skip_folders)
            documents = sorted(found, key=lambda document: os.fsencode(document.name))
        elif stat.S_ISREG(mode):
            documents = [Document(os.path.basename(path), path, os.stat(path).st_size)]
        else:
            raise UserError(f"data.path: {path!r} is neither a file nor a folder")
    except OSError as error:
        where = error.filename if error.filename is not None else path
        raise UserError(f"data.path: cannot read {where!r}: {error.strerror}") from error
    documents = [document for document in documents if document.size > 0]
    if not documents:
        raise UserError(f"data.path: {path!r} holds no text; name a file or folder with text in it")
    return documents


def _scan(root: str, prefix: str, skip_folders: Collection[str]) -> Iterator[Document]:
    """Regular files below `root`, in any order. A broken link raises OSError, as does no access."""
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


def split_documents(documents: Sequence[Document], eval_fraction: float) -> Split:
    """Holds out `eval_fraction` of the documents, chosen by a hash of their names.

    The documents with the smallest hashes are held out: the choice does not depend on contents or
    order, and adding a file moves at most one other file across. At least one document goes to
    either side. A single document is cut, and its last `eval_fraction` of bytes held out.
    """
    if not 0.0 < eval_fraction < 1.0:
        raise UserError(
            f"data.eval_fraction: {eval_fraction} is not between 0 and 1 (both excluded)"
        )
    if len(documents) == 1:
        return _cut(documents[0], eval_fraction)
    count = min(max(round(eval_fraction * len(documents)), 1), len(documents) - 1)
    ranked = sorted(documents, key=lambda document: _name_hash(document.name))
    heldout = {document.name for document in ranked[:count]}
    return Split(
        train=tuple(document for document in documents if document.name not in heldout),
        heldout=tuple(document for document in documents if document.name in heldout),
    )


def _name_hash(name: str) -> bytes:
    return hashlib.sha256(_SPLIT_SALT + os.fsencode(name)).digest()


def _cut(document: Document, eval_fraction: float) -> Split:
    """Head and tail of one document, cut where no UTF-8 character is torn."""
    if document.size < 2:
        raise UserError(f"data.path: {document.path!r} holds 1 byte; nothing is left to hold out")
    cut = document.size - min(max(round(eval_fraction * document.size), 1), document.size - 1)
    data = document.read()
    cut = max(_character_start(data, cut), 1)
    tail = dataclasses.replace(document, size=document.size - cut, start=cut)
    return Split(train=(dataclasses.replace(document, size=cut),), heldout=(tail,))


def _character_start(data: bytes, at: int) -> int:
    """The start of the UTF-8 character that byte `at` belongs to; `at` itself in other bytes."""
    for start in range(at, max(at - 4, -1), -1):
        if data[start] & 0xC0 != 0x80:
            return start
    return at


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of a document, small enough to tokenise at once."""

    document: Document
    data: bytes
    is_first: bool


def pieces(documents: Sequence[Document], max_bytes: int = 1 << 20) -> Iterator[Piece]:
    """The documents in order, cut into pieces of at most `max_bytes`.

    A cut falls after a newline if there is one, else between two UTF-8 characters.
    """
    for document in documents:
        data, begin = document.read(), 0
        while begin < len(data):
            end = min(begin + max_bytes, len(data))
            if end < len(data):
                newline = data.rfind(b"\n", begin, end)
                if newline >= 0:
                    end = newline + 1
                else:
                    end = max(_character_start(data, end), begin + 1)
            yield Piece(document, data[begin:end], is_first=begin == 0)
            begin = end


def piece_batches(documents: Sequence[Document], max_bytes: int = 8 << 20) -> Iterator[list[Piece]]:
    """`pieces`, gathered into lists of about `max_bytes` for tokenizers that work in parallel."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces(documents):
        batch.append(piece)
        size += len(piece.data)
        if size >= max_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
