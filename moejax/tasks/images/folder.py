"""Pictures on disk: one folder per class, found in a fixed order and decoded to square arrays."""

import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Int32, UInt8

from moejax.data.split import EVAL_FOLDERS
from moejax.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
MODES = {1: "L", 3: "RGB"}
"""Pillow's name of the pixels, by number of channels."""

SIDES = ("train", "training", *EVAL_FOLDERS)
"""Names that folders of a split have, and classes hardly ever."""


@dataclasses.dataclass(frozen=True)
class Listing:
    """Files of one folder of classes and their labels, sorted by class, then by path."""

    paths: tuple[str, ...]
    label_N: Int32[np.ndarray, " N"]


@dataclasses.dataclass(frozen=True)
class Folder:
    """What lies at a path. ``heldout`` is None if the folder has no split of its own."""

    classes: tuple[str, ...]
    train: Listing
    heldout: Listing | None


def find_images(path: str) -> Folder:
    """Lists ``path/CLASS/**``, or ``path/train/CLASS/**`` with ``path/val`` beside it (else the
    next of ``EVAL_FOLDERS`` that is there).

    This is the layout of torchvision's ImageFolder: classes are numbered in the order of their
    names, files are found below their class at any depth. Hidden files and folders (a leading
    dot), links to folders below a class and files that are no pictures by their name (see
    ``SUFFIXES``) are left out.

    Raises:
      UserError: not a folder; fewer than 2 classes; a class without images or on one side only;
        images beside the classes; a side of a split without the other; something that cannot be
        read.
    """
    root = os.path.expanduser(path)
    if not os.path.isdir(root):
        raise UserError(f"data.path: {path!r} is not a folder; name one with a folder per class")
    try:
        sides = _sides(root)
        if sides is None:
            _refuse_half_a_split(root)
            classes, train = _scan(root)
            return Folder(classes, train, None)
        (classes, train), (others, heldout) = (_scan(side) for side in sides)
    except OSError as error:
        raise UserError(f"data.path: cannot read {error.filename!r}: {error.strerror}") from error
    for name in sorted(set(classes) ^ set(others)):
        side, missing = sides if name in classes else sides[::-1]
        raise UserError(
            f"data.path: class {name!r} is in {side!r} but not in {missing!r}; both need it"
        )
    return Folder(classes, train, heldout)


def _sides(root: str) -> tuple[str, str] | None:
    """The folders ``train`` and held out, or None where ``root`` holds the classes."""
    train = os.path.join(root, "train")
    for name in EVAL_FOLDERS:
        heldout = os.path.join(root, name)
        if os.path.isdir(train) and os.path.isdir(heldout):
            return train, heldout
    return None


def _refuse_half_a_split(root: str) -> None:
    """Sides under names that ``_sides`` does not know would be trained as classes."""
    with os.scandir(root) as entries:
        found = sorted(e.name for e in entries if e.is_dir() and e.name.lower() in SIDES)
    if found:
        raise UserError(
            f"data.path: {root!r} has {', '.join(map(repr, found))}, which looks like a split and "
            "would be trained as classes; call its sides 'train' and 'val' (or "
            f"{', '.join(map(repr, EVAL_FOLDERS[1:]))}), or name the training folder itself, of "
            "which a share is held out; rename a class that is called so"
        )


def _scan(folder: str) -> tuple[tuple[str, ...], Listing]:
    """Names of the classes in a folder, and the images of all of them."""
    with os.scandir(folder) as entries:
        visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    for entry in visible:
        if not entry.is_dir() and _is_image(entry.name):
            raise UserError(
                f"data.path: {entry.path!r} is in no class; move it into the folder of its class"
            )
    classes = [entry for entry in visible if entry.is_dir()]
    if len(classes) < 2:
        found = ", ".join(repr(entry.name) for entry in classes) or "none"
        raise UserError(
            f"data.path: {folder!r} needs a folder for each of at least 2 classes, found {found}"
        )
    paths, labels = [], []
    for label, entry in enumerate(classes):
        found = _images_below(entry.path)
        if not found:
            raise UserError(
                f"data.path: class {entry.name!r} has no images: none of {', '.join(SUFFIXES)} "
                f"below {entry.path!r}"
            )
        paths += found
        labels += [label] * len(found)
    names = tuple(entry.name for entry in classes)
    return names, Listing(tuple(paths), np.array(labels, np.int32))


def _images_below(folder: str) -> list[str]:
    def fail(error: OSError) -> None:
        raise error  # os.walk would leave the folder out

    found = []
    for place, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(place, name) for name in files if _is_image(name)]
    return sorted(found)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def read_images(
    paths: Sequence[str], image_size: int, channels: int
) -> UInt8[np.ndarray, "N H W C"]:
    """Decodes files to ``image_size`` squares, in their order, in a few threads.

    An image is turned upright as its EXIF says, made grey (``channels=1``, ITU-R 601 luma) or RGB
    (3); the largest square in its middle is kept and resized with a bilinear filter as wide as a
    target pixel (antialiased). Of an animation the first frame counts; transparency is ignored.

    Raises UserError naming the file that is damaged, no image, or has more than 8 bits a channel.
    """
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(lambda path: read_image(path, image_size, channels), paths))
    return np.stack(images)


def read_image(path: str, image_size: int, channels: int) -> UInt8[np.ndarray, "H W C"]:
    """One file, as ``read_images`` reads it."""
    from PIL import Image, ImageOps  # an extra

    square = (image_size, image_size)
    try:
        with Image.open(path) as image:
            mode = image.mode
            if deep := mode == "F" or mode.startswith("I"):
                pixels = None
            else:
                upright = ImageOps.exif_transpose(image).convert(MODES[channels])
                side = min(upright.size)
                left, upper = ((length - side) // 2 for length in upright.size)
                middle = upright.crop((left, upper, left + side, upper + side))
                pixels = middle.resize(square, Image.Resampling.BILINEAR)
    except Exception as error:  # each decoder has exceptions of its own for a damaged file
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"data.path: {path!r} is not a readable image ({why}); repair or remove it"
        ) from error
    if deep or pixels is None:
        raise UserError(
            f"data.path: {path!r} has pixels of more than 8 bits (mode {mode}); convert it to 8"
        )
    return np.asarray(pixels, np.uint8).reshape(*square, channels)
