"""WebDataset: tar archives in which consecutive members of one name make a sample."""

import contextlib
import functools
import gzip
import json
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from moejax.errors import UserError
from moejax.tasks.images.formats.files import shards_of, side_of
from moejax.tasks.images.formats.format import (
    SUFFIXES,
    Labels,
    Picture,
    damaged,
    most_bytes,
    reading,
)

IMAGES = tuple(suffix[1:] for suffix in SUFFIXES)
LABELS = ("cls", "json")
"""Extensions of labels, in the order of preference."""
META = re.compile(r"__[^/]*__($|/)")
"""Members about the archive, which the library leaves out too."""
WHAT = "a tar archive"
LONGEST_NUMBER = 18
"""Digits of a label that is a number."""


class Sample(NamedTuple):
    """A sample: ``place`` for messages, and its members by extension. Those that were not asked
    for are empty."""

    place: str
    members: dict[str, bytes]


class WebDataset:
    """``key.jpg`` (or another picture) with ``key.cls`` or ``key.json`` behind or before it.

    The key is the path up to the first dot of the file name. ``.cls`` holds the class in text, a
    number or a word; ``.json`` an object with the field ``label``. Other members are not read.
    """

    name = "WebDataset"

    def owns(self, path: str) -> bool:
        return path.lower().endswith((".tar", ".tar.gz", ".tgz"))

    def side(self, name: str) -> str:
        return side_of(name)

    def companions(self, name: str) -> tuple[str, ...]:
        return shards_of(name)

    def labels(self, path: str) -> Labels:
        labels = []
        for sample in _samples(path, LABELS.__contains__):
            _image_of(sample)  # so that a sample without one is reported before decoding
            labels.append(_label_of(sample))
        return Labels(labels)

    def pictures(self, path: str) -> Iterator[Picture]:
        for sample in _samples(path, _is_image):
            yield Picture(sample.place, sample.members[_image_of(sample)])


def _samples(path: str, wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """The samples of an archive, with the content of members whose extension is ``wanted``."""
    number, last, members = 0, None, {}

    def sample() -> Sample:
        return Sample(f"{path}:{number} ({last})", members)

    for name, read in _members(path):
        folder, base = posixpath.split(name)
        if META.match(name) or base.startswith("."):
            continue
        stem, dot, extension = base.partition(".")
        if not dot or not stem:
            continue
        key = posixpath.join(folder, stem)
        if key != last:
            if last is not None:
                yield sample()
            number, last, members = number + 1, key, {}
        extension = extension.lower()
        if extension in members:
            raise UserError(f"data.path: {sample().place} has two members .{extension}; keep one")
        members[extension] = read() if wanted(extension) else b""
    if last is not None:
        yield sample()


def _members(path: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Names of the files in an archive, and the way to read each before the next is asked for.

    ``tarfile`` takes a broken header for the end, so the end is checked: zeros, to the last byte.
    """
    with reading(path, WHAT, tarfile.TarError), contextlib.ExitStack() as stack:
        packed = path.lower().endswith("gz")
        file = stack.enter_context(gzip.open(path) if packed else open(path, "rb"))
        tar = stack.enter_context(tarfile.open(fileobj=file, mode="r:"))
        limit = most_bytes(path, packed)
        for member in tar:
            if member.size > limit:
                raise damaged(path, WHAT, f"{member.name!r} is longer than the archive")
            if member.issym() or member.islnk():
                raise UserError(
                    f"data.path: {member.name!r} in {path!r} is a link; write the archive anew "
                    "with the files themselves (tar --dereference --hard-dereference)"
                )
            if member.isfile():
                yield member.name, functools.partial(_content, path, tar, member)
        file.seek(tar.offset)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            raise damaged(path, WHAT, "it ends without the mark of its end")
        while block:
            if any(block):
                raise damaged(path, WHAT, f"no header of a member at byte {tar.offset}")
            block = file.read(1 << 16)


def _content(path: str, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    with reading(path, WHAT, tarfile.TarError):
        file = tar.extractfile(member)
        if file is None:  # only for members that are no files
            raise tarfile.ReadError(f"{member.name} is no file")
        with file:
            return file.read()


def _is_image(extension: str) -> bool:
    """True for jpg, and also for image.jpg."""
    return extension.rpartition(".")[2] in IMAGES


def _image_of(sample: Sample) -> str:
    """The extension of the picture: one like jpg, or else the only one like image.jpg."""
    found = [name for name in sample.members if name in IMAGES]
    found = found or [name for name in sample.members if _is_image(name)]
    if len(found) != 1:
        has = ", ".join(f".{name}" for name in sample.members)
        number = "two pictures" if found else f"no picture ({', '.join(SUFFIXES)})"
        raise UserError(
            f"data.path: {sample.place} has {number}, only {has}; "
            "a sample has one, and its members stand one after the other (tar --sort=name)"
        )
    return found[0]


def _label_of(sample: Sample) -> int | str:
    extension = next((name for name in LABELS if name in sample.members), None)
    if extension is None:
        has = ", ".join(f".{name}" for name in sample.members)
        raise UserError(
            f"data.path: {sample.place} has no label (.cls, or .json with 'label'), only {has}; "
            "add one, behind its picture (tar --sort=name)"
        )
    try:
        text = sample.members[extension].decode("utf-8").strip()
        label = json.loads(text)["label"] if extension == "json" else _number_or_word(text)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _no_label(sample, extension, f"{type(error).__name__}: {error}") from error
    if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
        raise _no_label(sample, extension, repr(label))
    return label


def _number_or_word(text: str) -> int | str:
    digits = text.removeprefix("-")
    number = digits.isascii() and digits.isdigit() and len(digits) <= LONGEST_NUMBER
    return int(text) if number else text


def _no_label(sample: Sample, extension: str, reason: str) -> UserError:
    form = "an object with the field 'label'" if extension == "json" else "a number or a word"
    return UserError(
        f"data.path: the .{extension} of {sample.place} has no label ({' '.join(reason.split())}); "
        f"write {form} there"
    )
