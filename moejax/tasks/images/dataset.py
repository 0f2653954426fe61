"""Labelled images: a folder per class, or the built-in digits, decoded once and split in two."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from moejax.data.split import EVAL_FOLDERS, check_fraction
from moejax.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
MODES = {1: "L", 3: "RGB"}
"""Pillow's pixel mode for each number of channels."""

SIDES = ("train", "training", *EVAL_FOLDERS)
"""Folder names that mean a side of a split and are hardly ever names of classes."""

DIGITS = "digits"
DIGITS_SIZE, DIGITS_TOP = 8, 16
"""scikit-learn's digits are 8 x 8 pixels with values from 0 to 16."""

SPLIT_SEED = 0
"""The same images are held out in all runs, so that accuracies can be compared."""


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Training and held-out images, kept in memory as decoded: 1 byte per pixel and channel.

    Attributes:
      train_NHWC, heldout_NHWC: pixels, from 0 to ``top``.
      train_label_N, heldout_label_N: class of each image, an index into ``classes``.
      classes: names of the classes, in the order of the labels.
      mean_C, std_C: mean and standard deviation of the training pixels over ``top``, by channel;
        the deviation is 1 where all pixels are equal.
      fingerprint: SHA-256 over shapes, ``top``, pixels and labels; equal means the same data.
      name: "digits", or the folder.
    """

    train_NHWC: UInt8[np.ndarray, "N H W C"]
    train_label_N: Int32[np.ndarray, " N"]
    heldout_NHWC: UInt8[np.ndarray, "M H W C"]
    heldout_label_N: Int32[np.ndarray, " M"]
    classes: tuple[str, ...]
    top: int
    mean_C: Float32[np.ndarray, " C"]
    std_C: Float32[np.ndarray, " C"]
    fingerprint: str
    name: str

    def normalise(self, pixels_NHWC: UInt8[np.ndarray, "N H W C"]) -> Float32[np.ndarray, "..."]:
        """Pixels scaled to [0, 1], standardised by the training mean and deviation."""
        return (pixels_NHWC.astype(np.float32) / self.top - self.mean_C) / self.std_C


def load_images(
    path: str = "", image_size: int = 8, channels: int = 1, eval_fraction: float = 0.2
) -> Images:
    """Read a folder of images (see ``find_images``), or the built-in digits for an empty path.

    Args:
      path: a folder with one folder per class, or with such folders ``train`` and ``val`` (or
        another of ``EVAL_FOLDERS``).
      image_size: height and width every image is cut and resized to (see ``read_images``).
      channels: 1 (grey) or 3 (RGB).
      eval_fraction: share of each class to hold out, in (0, 1), at least one image; unused if the
        folder has its own split.

    All images are decoded here, once, and stay in memory: N * image_size^2 * channels bytes.

    Raises UserError, in one line, for images that cannot be read, split or decoded.
    """
    if channels not in MODES:
        raise UserError(f"task.channels: {channels} is neither 1 (grey) nor 3 (RGB)")
    if image_size < 1:
        raise UserError(f"task.image_size: {image_size} must be at least 1")
    if not path:
        return _digits(image_size, channels, eval_fraction)
    require("PIL", "data.path: reading images")
    folder = find_images(path)
    name = os.path.basename(os.path.abspath(os.path.expanduser(path)))
    if folder.heldout is not None:
        sides = [
            (read_images(side.paths, image_size, channels), side.label_N)
            for side in (folder.train, folder.heldout)
        ]
    else:
        # Before decoding, which may take long.
        split = split_classes(folder.train.label_N, folder.classes, eval_fraction)
        pixels = read_images(folder.train.paths, image_size, channels)
        sides = [(pixels[side], folder.train.label_N[side]) for side in split]
    return _assemble(sides, folder.classes, 255, name)


def require(module: str, what: str) -> None:
    """Raise a UserError that names the extra if one of its packages is missing."""
    package = {"PIL": "pillow", "sklearn": "scikit-learn"}[module]
    try:
        __import__(module)
    except ImportError as error:
        raise UserError(
            f"{what} needs the package {package}; pip install 'moejax[vision]'"
        ) from error


def split_classes(
    label_N: Int32[np.ndarray, " N"], classes: tuple[str, ...], eval_fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and held-out images, sorted: ``eval_fraction`` of every class.

    In a class with n images round(n * eval_fraction) are held out, at least one and at most n - 1,
    by a permutation that depends only on the numbers of images.
    """
    check_fraction(eval_fraction)
    rng = np.random.default_rng(SPLIT_SEED)
    train, heldout = [], []
    for label, name in enumerate(classes):
        own = np.flatnonzero(label_N == label)
        if len(own) < 2:
            raise UserError(
                f"data.path: class {name!r} has {len(own)} image, too few to hold one out; add "
                "images, or give train/ and val/ folders"
            )
        count = min(max(round(eval_fraction * len(own)), 1), len(own) - 1)
        mixed = rng.permutation(own)
        heldout.append(mixed[:count])
        train.append(mixed[count:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(heldout))


def _digits(image_size: int, channels: int, eval_fraction: float) -> Images:
    """1,797 handwritten digits, 8 x 8, grey (UCI, test half of optdigits), from scikit-learn."""
    if (image_size, channels) != (DIGITS_SIZE, 1):
        raise UserError(
            f"task.image_size, task.channels: the built-in digits are {DIGITS_SIZE} x "
            f"{DIGITS_SIZE} and grey, not {image_size} and {channels} channels; set "
            f"{DIGITS_SIZE} and 1, or data.path"
        )
    require("sklearn", "data.path: the built-in digits")
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    pixels = digits.images.astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    classes = tuple(str(name) for name in digits.target_names)
    split = split_classes(labels, classes, eval_fraction)
    return _assemble([(pixels[side], labels[side]) for side in split], classes, DIGITS_TOP, DIGITS)


def _assemble(
    sides: list[tuple[np.ndarray, np.ndarray]], classes: tuple[str, ...], top: int, name: str
) -> Images:
    """The dataset made from pixels and labels of both sides."""
    (train, train_label), (heldout, heldout_label) = sides
    mean_C, std_C = _moments(train, top)
    digest = hashlib.sha256(f"{top} {train.shape} {heldout.shape}".encode())
    for part in (train, train_label, heldout, heldout_label):
        digest.update(part.tobytes())
    return Images(
        train_NHWC=train,
        train_label_N=train_label,
        heldout_NHWC=heldout,
        heldout_label_N=heldout_label,
        classes=classes,
        top=top,
        mean_C=mean_C,
        std_C=std_C,
        fingerprint=digest.hexdigest(),
        name=name,
    )


def _moments(pixels_NHWC: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation by channel, from exact counts, without a float copy of the data."""
    values = np.arange(256) / top
    means, stds = [], []
    for channel in range(pixels_NHWC.shape[-1]):
        share = np.bincount(pixels_NHWC[..., channel].ravel(), minlength=256) / (
            pixels_NHWC[..., channel].size
        )
        mean = share @ values
        means.append(mean)
        stds.append(np.sqrt(share @ np.square(values - mean)) or 1.0)
    return np.array(means, np.float32), np.array(stds, np.float32)


@dataclasses.dataclass(frozen=True)
class Listing:
    """Image files and their labels, sorted by class, then by path."""

    paths: tuple[str, ...]
    label_N: Int32[np.ndarray, " N"]


@dataclasses.dataclass(frozen=True)
class Folder:
    """Image files at a path. ``heldout`` is None if the folder has no split of its own."""

    classes: tuple[str, ...]
    train: Listing
    heldout: Listing | None


def find_images(path: str) -> Folder:
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


def _scan(folder: str) -> tuple[tuple[str, ...], Listing]:
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
    return tuple(entry.name for entry in classes), Listing(tuple(paths), np.array(labels, np.int32))


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


def read_images(
    paths: Sequence[str], image_size: int, channels: int
) -> UInt8[np.ndarray, "N H W C"]:
    """Decode files to squares of ``image_size`` pixels, in the given order, in a few threads.

    An image is rotated according to its EXIF data and converted to grey (``channels=1``, ITU-R 601
    luma) or RGB (3); its largest central square is resized with a bilinear filter as wide as a
    target pixel (antialiased). Only the first frame of an animation is used; transparency is
    ignored.

    Raises a UserError that names a file that is damaged, no image, or has more than 8 bits per
    channel.
    """
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(lambda path: read_image(path, image_size, channels), paths))
    return np.stack(images)


def read_image(path: str, image_size: int, channels: int) -> UInt8[np.ndarray, "H W C"]:
    """Decode one file as ``read_images`` does."""
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
    except Exception as error:  # every decoder raises its own exceptions for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"data.path: {path!r} is not a readable image ({reason}); repair or remove it"
        ) from error
    if deep or pixels is None:
        raise UserError(
            f"data.path: {path!r} has pixels of more than 8 bits (mode {mode}); convert it to 8"
        )
    return np.asarray(pixels, np.uint8).reshape(*square, channels)
