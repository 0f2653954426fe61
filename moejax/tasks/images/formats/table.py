"""The formats of pictures, and the choice of one by the files at a path."""

import functools
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np

from moejax.errors import UserError
from moejax.tasks.images.formats.cifar import CIFAR10, CIFAR100
from moejax.tasks.images.formats.classes import check_classes, number_labels
from moejax.tasks.images.formats.files import (
    File,
    Files,
    Sides,
    list_files,
    split_files,
    without_packed,
)
from moejax.tasks.images.formats.folder import find_images
from moejax.tasks.images.formats.format import SUFFIXES, Format, Found, Labels, Picture, Pictures
from moejax.tasks.images.formats.idx import Idx
from moejax.tasks.images.formats.parquet import Parquet
from moejax.tasks.images.formats.webdataset import WebDataset

FORMATS: tuple[Format, ...] = (Parquet(), WebDataset(), Idx(), CIFAR10, CIFAR100)

REFUSED = (
    (
        re.compile(r"data_batch_\d|test_batch|batches\.meta|meta"),
        "CIFAR's python version, which is pickle and can run any program; name the folder of the "
        "binary version (cifar-10-binary.tar.gz or cifar-100-binary.tar.gz, unpacked)",
    ),
    (
        re.compile(r".*\.(pkl|pickle|pt|pth)", re.I),
        "pickle, which can run any program; save the pictures as files in a folder per class",
    ),
    (
        re.compile(r".*\.arrow", re.I),
        "Arrow, as datasets.save_to_disk writes it; write it with datasets.Dataset.to_parquet",
    ),
    (
        re.compile(r".*\.(npz|npy|mat|h5|hdf5|tfrecord|tfrecords|zip|mdb)", re.I),
        "no format of pictures that is read here; save them as files in a folder per class",
    ),
)
"""Names of files with other formats, looked for only where none of ``FORMATS`` is found."""


def find_pictures(path: str) -> Found:
    """The labelled pictures at ``path``: files of one of ``FORMATS``, or else a folder per class.

    Labels are read here, pixels later. Several files form one set in the order of their names.

    Raises:
      UserError: files of several formats, an incomplete set, one side of a split without the other,
        a damaged file, labels that are missing or do not fit, or what ``find_images`` refuses.
    """
    found = list_files(path)
    owned = [
        (form, without_packed([f for f in found.files if form.owns(f.path)])) for form in FORMATS
    ]
    owned = [(form, files) for form, files in owned if files]
    if not owned:
        _refuse_others(found)
        return find_images(path)
    form, files = owned[0]
    loose = [f.path for f in found.files if f.path.lower().endswith(SUFFIXES)]
    for name, path_of_other in [
        *((other.name, others[0].path) for other, others in owned[1:]),
        *(("a picture file", each) for each in loose[:1]),
    ]:
        raise UserError(
            f"data.path: {files[0].path!r} is {form.name}, and {path_of_other!r} {name}; name the "
            "files of one format, or a folder that has no others"
        )
    sides = split_files(files, [form.side(f.name) for f in files], found.whole, path)
    if found.whole:
        _check_sets(form, sides.train)
        _check_sets(form, sides.heldout)
    return _found(form, sides)


def _found(form: Format, sides: Sides) -> Found:
    """Both sides, with their classes numbered alike."""
    paths = [file.path for file in (*sides.train, *sides.heldout)]
    labels: list[Labels] = []
    for path in paths:
        labels.append(form.labels(path))
        if not len(labels[-1].values):
            raise UserError(f"data.path: {path!r} holds no pictures; remove it or name another")
    classes, numbers = number_labels(paths, labels)
    cut = len(sides.train)
    train = _pictures(form, paths[:cut], numbers[:cut])
    heldout = _pictures(form, paths[cut:], numbers[cut:]) if sides.heldout else None
    if len(np.unique(train.label_N)) < 2:
        raise UserError(
            f"data.path: all pictures of {paths[0]!r} are of class {classes[train.label_N[0]]!r}; "
            "at least 2 classes are needed"
        )
    if heldout:
        names = [sides.train_name, sides.heldout_name]
        check_classes(classes, train.label_N, heldout.label_N, names)
    return Found(classes, train, heldout, f"{form.name}, {len(paths)} file{'s'[: len(paths) - 1]}")


def _pictures(form: Format, paths: Sequence[str], numbers: Sequence[np.ndarray]) -> Pictures:
    return Pictures(np.concatenate(numbers), functools.partial(_stream, form, tuple(paths)))


def _stream(form: Format, paths: Sequence[str]) -> Iterator[Picture]:
    for path in paths:
        yield from form.pictures(path)


def _check_sets(form: Format, files: Sequence[File]) -> None:
    """Raise UserError if a side has a part of a set, as after a broken copy, or two sets."""
    there = {file.path for file in files}
    folders: dict[str, str] = {}
    for file in files:
        folder, base = os.path.split(file.path)
        if base in folders or not (together := form.companions(base)):
            if folders.get(base, folder) != folder:
                raise UserError(
                    f"data.path: {file.path!r} and the file of that name in {folders[base]!r} are "
                    "of two sets; name the folder of one (or all files, data.path=FILE,FILE)"
                )
            continue
        for name in together:
            folders[name] = folder
            if os.path.join(folder, name) not in there:
                raise UserError(
                    f"data.path: {file.path!r} belongs to a set without its {name!r}; add it, or "
                    "name the files to read (data.path=FILE,FILE)"
                )


def _refuse_others(found: Files) -> None:
    """Refuse files of other formats where no picture is."""
    if any(file.path.lower().endswith(SUFFIXES) for file in found.files):
        return
    for pattern, reason in REFUSED:
        for file in found.files:
            if pattern.fullmatch(os.path.basename(file.path)):
                raise UserError(f"data.path: {file.path!r} is {reason}")
