"""Files at a path, and the sides of a split in their names."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from moejax.data.split import EVAL_FOLDERS, TRAIN_NAMES
from moejax.errors import UserError

SIDES = (*TRAIN_NAMES, *EVAL_FOLDERS)
"""Names that mean a side of a split and are hardly ever names of classes."""
BETWEEN_WORDS = re.compile(r"[-_. \d]+")
SHARD = re.compile(r"(.*-)(\d{5})-of-(\d{5})(\..*)?")
"""A file of a numbered set, as Hugging Face and TensorFlow name it."""


class File(NamedTuple):
    """``name`` is the path below the folder that was named, with "/"."""

    name: str
    path: str


class Files(NamedTuple):
    """Files at a path. ``whole``: a folder was named, and not a choice of files."""

    files: list[File]
    whole: bool


def list_files(path: str) -> Files:
    """Files at ``path``: a file, a folder, a glob, or several of them with commas between.

    Hidden files and folders (a leading dot) are left out, and links to folders below a folder are
    not followed. Empty if there is nothing at a single path.
    """
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return Files(list(_below(path)), True)
    if os.path.exists(path):
        return Files([File(os.path.basename(path), path)], False)
    paths = []
    parts = [os.path.expanduser(part.strip()) for part in path.split(",") if part.strip()]
    for part in parts:
        found = sorted(glob.glob(part, recursive=True))
        if not found and (len(parts) > 1 or glob.has_magic(part)):
            raise UserError(f"data.path: {part!r} matches no file; correct or remove it")
        for each in found:
            paths += [file.path for file in _below(each)] if os.path.isdir(each) else [each]
    paths = list({os.path.realpath(each): each for each in reversed(paths)}.values())[::-1]
    root = os.path.commonpath([os.path.dirname(os.path.abspath(each)) for each in paths] or ["/"])
    names = [os.path.relpath(os.path.abspath(each), root).replace(os.sep, "/") for each in paths]
    return Files([File(*pair) for pair in zip(names, paths, strict=True)], False)


def _below(folder: str) -> Iterator[File]:
    """Files below a folder, sorted by name."""

    def fail(error: OSError) -> None:
        raise UserError(f"data.path: cannot read {error.filename!r}: {error.strerror}") from error

    found = []
    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(parent, name) for name in files if not name.startswith(".")]
    start = len(os.path.join(folder, ""))
    for path in sorted(found):
        yield File(path[start:].replace(os.sep, "/"), path)


def without_packed(files: Sequence[File]) -> list[File]:
    """The files without those that lie beside their unpacked form, as some downloads leave them."""
    paths = {file.path for file in files}
    return [f for f in files if not (f.path.endswith(".gz") and f.path[:-3] in paths)]


def side_of(name: str) -> str:
    """The side in a file's name, or "".

    It is the name of the outermost folder that is one, or else the only one among the words of the
    file's name, as in imagenet-val-000017.tar.
    """
    *folders, file = name.lower().split("/")
    for folder in folders:
        if folder in SIDES:
            return folder
    words = set(BETWEEN_WORDS.split(file)) & set(SIDES)
    return words.pop() if len(words) == 1 else ""


def shards_of(name: str) -> tuple[str, ...]:
    """All names of the numbered set that a file is of, such as train-00000-of-00002.parquet."""
    match = SHARD.fullmatch(name)
    if not match or int(match[3]) > 99_999:
        return ()
    start, _, count, suffix = match.groups()
    return tuple(f"{start}{i:05}-of-{count}{suffix or ''}" for i in range(int(count)))


class Sides(NamedTuple):
    """Files of both sides with the names of the sides; ``heldout`` is empty without a split."""

    train: list[File]
    heldout: list[File]
    train_name: str = ""
    heldout_name: str = ""


def split_files(files: Sequence[File], sides: Sequence[str], whole: bool, path: str) -> Sides:
    """Divide files into sides by names; ``sides`` has the side of each file, or "".

    The held-out side is the first of ``EVAL_FOLDERS`` that exists; others are not read.

    Raises:
      UserError: a file on no side beside others with one; in a whole folder, one side alone.
    """
    by_side: dict[str, list[File]] = {}
    for file, side in zip(files, sides, strict=True):
        by_side.setdefault("train" if side in TRAIN_NAMES else side, []).append(file)
    names = sorted(side for side in by_side if side)
    if not names or (len(by_side) == 1 and not whole):
        return Sides(list(files), [])
    if "" in by_side:
        raise UserError(
            f"data.path: {by_side[''][0].path!r} is on no side of a split, while others are on "
            f"{', '.join(map(repr, names))}; give all of them names of sides, or none"
        )
    heldout = next((name for name in EVAL_FOLDERS if name in by_side), "")
    if "train" not in by_side or not heldout:
        found = " and ".join(map(repr, names))
        other = "'val' or 'test'" if "train" in by_side else "'train'"
        raise UserError(
            f"data.path: {path!r} has files of {found} and none of {other}; add them, or name the "
            f"files themselves (data.path={by_side[names[0]][0].path}) to hold out a share of them"
        )
    return Sides(by_side["train"], by_side[heldout], "train", heldout)
