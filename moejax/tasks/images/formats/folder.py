"""A folder of picture files per class, torchvision's ImageFolder layout."""

import functools
import os
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int32

from moejax.data.split import EVAL_FOLDERS
from moejax.errors import UserError
from moejax.tasks.images.formats.files import SIDES
from moejax.tasks.images.formats.format import SUFFIXES, Found, Picture, Pictures


def find_images(path: str) -> Found:
    """List ``path/CLASS/**``, or ``path/train/CLASS/**`` and ``path/val/CLASS/**`` (or the first
    of ``EVAL_FOLDERS`` that exists instead of ``val``).

    This is the layout of torchvision's ImageFolder: classes are numbered in the order of their
    names, files are found at any depth below their class. Hidden files and folders (a leading
    dot), links to folders below a class and files without an image's suffix (see ``SUFFIXES``) are
    left out.

    Raises:
      UserError: not a folder; fewer than 2 classes; a class without images or on one side only;
        images beside the classes; one side of a split without the other; an unreadable file or
        folder.
    """
    root = os.path.expanduser(path)
    if not os.path.isdir(root):
        raise UserError(
            f"data.path: {path!r} is not a folder; name one with a folder per class, or files of "
            "Parquet, WebDataset (.tar), MNIST (idx3-ubyte) or CIFAR (.bin)"
        )
    try:
        sides = _sides(root)
        if sides is None:
            _refuse_half_a_split(root)
            classes, train = _scan(root)
            return Found(classes, train, None)
        (classes, train), (others, heldout) = (_scan(side) for side in sides)
    except OSError as error:
        raise UserError(f"data.path: cannot read {error.filename!r}: {error.strerror}") from error
    for name in sorted(set(classes) ^ set(others)):
        side, missing = sides if name in classes else sides[::-1]
        raise UserError(
            f"data.path: class {name!r} is in {side!r} but not in {missing!r}; both need it"
        )
    return Found(classes, train, heldout)


def _sides(root: str) -> tuple[str, str] | None:
    """The training and the held-out folder, or None if ``root`` holds the classes."""
    train = os.path.join(root, "train")
    for name in EVAL_FOLDERS:
        heldout = os.path.join(root, name)
        if os.path.isdir(train) and os.path.isdir(heldout):
            return train, heldout
    return None


def _refuse_half_a_split(root: str) -> None:
    """Refuse sides under names unknown to ``_sides``, which would be trained as classes."""
    with os.scandir(root) as entries:
        sides = sorted(e.name for e in entries if e.is_dir() and e.name.lower() in SIDES)
    if sides:
        raise UserError(
            f"data.path: {root!r} has {', '.join(map(repr, sides))}, which looks like a split and "
            "would be trained as classes; call its sides 'train' and 'val' (or "
            f"{', '.join(map(repr, EVAL_FOLDERS[1:]))}), or name the training folder itself, to "
            "hold out a share of it; rename a class that has such a name"
        )


def _scan(folder: str) -> tuple[tuple[str, ...], Pictures]:
    """Names of the classes in a folder, and their images."""
    with os.scandir(folder) as entries:
        visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    for entry in visible:
        if not entry.is_dir() and _is_image(entry.name):
            raise UserError(
                f"data.path: {entry.path!r} is in no class; move it into the folder of its class"
            )
    classes = [entry for entry in visible if entry.is_dir()]
    if len(classes) < 2:
        names = ", ".join(repr(entry.name) for entry in classes) or "none"
        raise UserError(
            f"data.path: {folder!r} needs a folder for each of at least 2 classes, found {names}"
        )
    paths, labels = [], []
    for label, entry in enumerate(classes):
        files = _images_below(entry.path)
        if not files:
            raise UserError(
                f"data.path: class {entry.name!r} has no images: none of {', '.join(SUFFIXES)} "
                f"below {entry.path!r}"
            )
        paths += files
        labels += [label] * len(files)
    label_N: Int32[np.ndarray, " N"] = np.array(labels, np.int32)
    pictures = Pictures(label_N, functools.partial(_stream, tuple(paths)))
    return tuple(entry.name for entry in classes), pictures


def _stream(paths: tuple[str, ...]) -> Iterator[Picture]:
    return (Picture(path, path) for path in paths)


def _images_below(folder: str) -> list[str]:
    def fail(error: OSError) -> None:
        raise error  # os.walk would skip the folder

    paths = []
    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [os.path.join(parent, name) for name in files if _is_image(name)]
    return sorted(paths)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")
