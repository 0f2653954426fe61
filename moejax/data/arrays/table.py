"""The formats of token arrays, and the arrays that a path names."""

import dataclasses
import glob
import os
from collections.abc import Iterator, Sequence

from moejax.data.arrays import llmc, megatron, npy, raw
from moejax.data.arrays.array import Format, TokenArray
from moejax.errors import UserError

FORMATS: tuple[Format, ...] = (npy, megatron, llmc, raw)  # raw last: it takes any .bin file
SUFFIXES = (".bin", ".idx", ".npy")

BESIDE = (".json", ".lock", ".log", ".md", ".pkl", ".py", ".sh", ".yaml", ".yml")
"""Suffixes of files that programs write beside their arrays, and that hold no training text."""
BESIDE_NAMES = ("license", "readme")


@dataclasses.dataclass(frozen=True)
class ArrayFile:
    """A file of token ids that has not been read yet; ``name`` is its path below the folder that
    all files have in common, with "/"."""

    path: str
    name: str
    format: Format
    field: str

    @property
    def size(self) -> int:
        """Bytes of its ids."""
        return os.path.getsize(self.path)

    def read(self, vocab_size: int) -> TokenArray:
        """The ids, memory-mapped. Raises UserError if the file is damaged or holds no ids."""
        try:
            return self.format.read(self.path, self.field, vocab_size)
        except OSError as error:
            raise _unreadable(self.field, error.filename or self.path, error) from error


@dataclasses.dataclass(frozen=True)
class Found:
    """The arrays that a path names, and the other files there; ``name`` is that of the path."""

    name: str
    files: tuple[ArrayFile, ...]
    others: tuple[str, ...]


def find_arrays(path: str, field: str = "data.path") -> Found | None:
    """The token arrays at ``path``; None if it names none.

    ``path`` is a file, a folder, a glob, the common name of Megatron's two files without suffix, or
    several of these with commas between. Files of a folder come in the order of their names.

    Raises UserError for a file or folder that cannot be read.
    """
    try:
        paths = list(dict.fromkeys(_expand(path)))
        arrays = [p for p in paths if p.lower().endswith(SUFFIXES)]
        if not arrays:
            return None
        arrays = _without_indices(arrays)
        root = os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in arrays])
        files = tuple(
            ArrayFile(
                p,
                os.path.relpath(os.path.abspath(p), root).replace(os.sep, "/"),
                next(f for f in FORMATS if f.matches(p)),
                field,
            )
            for p in arrays
        )
    except OSError as error:
        raise _unreadable(field, error.filename or path, error) from error
    name = os.path.basename(os.path.abspath(os.path.expanduser(path)))
    return Found(name, files, tuple(p for p in paths if not p.lower().endswith(SUFFIXES)))


def check_others(found: Found, has_sides: bool) -> None:
    """Refuse files beside the arrays that may be text.

    Two named sides may have them in their own folders: nanoGPT has the text beside train.bin and
    val.bin.

    Raises UserError, naming one array and one other file.
    """
    own = {os.path.dirname(file.path) for file in found.files} if has_sides else ()
    others = [path for path in found.others if os.path.dirname(path) not in own]
    others = [path for path in others if not _is_beside(path)]
    if not others:
        return
    first = found.files[0]
    suffix = os.path.splitext(first.path)[1]
    raise UserError(
        f"{first.field}: {first.path!r} holds token ids and {others[0]!r} does not, and both are "
        f"not read together; name one kind of files, for example by a glob (FOLDER/*{suffix})"
    )


def _is_beside(path: str) -> bool:
    stem, suffix = os.path.splitext(os.path.basename(path).lower())
    return suffix in BESIDE or stem in BESIDE_NAMES


def _expand(path: str) -> Iterator[str]:
    """Files at a path, in order; nothing for a part that does not exist."""
    whole = os.path.exists(os.path.expanduser(path))  # a name may contain a comma
    parts = [path] if whole else [part.strip() for part in path.split(",")]
    for part in map(os.path.expanduser, filter(None, parts)):
        if os.path.exists(part):
            yield from _files(part)
        elif os.path.isfile(part + ".bin") and os.path.isfile(part + ".idx"):
            yield part + ".bin"
        else:
            for found in sorted(glob.glob(part, recursive=True), key=os.fsencode):
                yield from _files(found)


def _files(path: str) -> Iterator[str]:
    """The file itself, or those below a folder; hidden files and links to folders are left out."""
    if not os.path.isdir(path):
        yield path
        return
    below: list[str] = []
    for folder, folders, files in os.walk(path, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below += [os.path.join(folder, name) for name in files if not name.startswith(".")]
    yield from sorted(below, key=lambda p: os.fsencode(os.path.relpath(p, path)))


def _raise(error: OSError) -> None:
    raise error


def _without_indices(paths: Sequence[str]) -> list[str]:
    """The files without each .idx file whose .bin file is among them."""
    result = []
    for path in paths:
        stem, suffix = os.path.splitext(path)
        if suffix.lower() == ".idx":
            path = stem + ".bin" if os.path.isfile(stem + ".bin") else path
        result.append(path)
    return list(dict.fromkeys(result))


def _unreadable(field: str, path: str, error: OSError) -> UserError:
    return UserError(f"{field}: cannot read {path!r}: {error.strerror}")
