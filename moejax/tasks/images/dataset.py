"""Labelled images: pictures of any format or the built-in digits, decoded once, in two sides."""

import dataclasses
import hashlib

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from moejax.data.paths import name_of
from moejax.data.split import check_fraction
from moejax.errors import UserError
from moejax.tasks.images.decode import MODES, decode
from moejax.tasks.images.decode import read_image as read_image
from moejax.tasks.images.digits import DIGITS, TOP, read_digits
from moejax.tasks.images.formats.files import SIDES as SIDES
from moejax.tasks.images.formats.format import Found
from moejax.tasks.images.formats.table import find_pictures

PART = 256
"""Images that are counted together."""

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
      name: "digits", the folder or file, or the list or glob as written.
      source: the format and number of files; empty for the digits and a folder per class.
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
    source: str = ""

    def normalise(self, pixels_NHWC: UInt8[np.ndarray, "N H W C"]) -> Float32[np.ndarray, "..."]:
        """Pixels scaled to [0, 1], standardised by the training mean and deviation."""
        return (pixels_NHWC.astype(np.float32) / self.top - self.mean_C) / self.std_C


def load_images(
    path: str = "", image_size: int = 8, channels: int = 1, eval_fraction: float = 0.2
) -> Images:
    """Read pictures (see ``find_pictures``), or the built-in digits for an empty path.

    Args:
      path: a folder with one folder per class, or with such folders ``train`` and ``val`` (or
        another of ``EVAL_FOLDERS``); or files of Parquet, WebDataset, MNIST or CIFAR.
      image_size: height and width every image is cut and resized to (see ``read_picture``).
      channels: 1 (grey) or 3 (RGB).
      eval_fraction: share of each class to hold out, in (0, 1), at least one image; unused if the
        pictures have their own split.

    All images are decoded here, once, and stay in memory: N * image_size^2 * channels bytes.

    Raises UserError, in one line, for images that cannot be read, split or decoded.
    """
    if channels not in MODES:
        raise UserError(f"task.channels: {channels} is neither 1 (grey) nor 3 (RGB)")
    if image_size < 1:
        raise UserError(f"task.image_size: {image_size} must be at least 1")
    if not path:
        require("sklearn", "data.path: the built-in digits")
        pixels, labels, classes = read_digits(image_size, channels)
        split = split_classes(labels, classes, eval_fraction)
        sides = [(pixels[side], labels[side]) for side in split]
        return _assemble(sides, classes, TOP, DIGITS)
    require("PIL", "data.path: reading images")
    found = find_pictures(path)
    sides = _decode_sides(found, image_size, channels, eval_fraction)
    return dataclasses.replace(
        _assemble(sides, found.classes, 255, name_of(path)), source=found.source
    )


def _decode_sides(
    found: Found, image_size: int, channels: int, eval_fraction: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pixels and labels of both sides. A share is chosen before decoding, which may take long."""
    if found.heldout is not None:
        return [
            (decode(side, image_size, channels), side.label_N)
            for side in (found.train, found.heldout)
        ]
    label_N = found.train.label_N
    train, heldout = split_classes(label_N, found.classes, eval_fraction)
    # Decoded into their places, so that nothing is copied when the sides are taken apart.
    order = np.concatenate([train, heldout])
    place_N = np.empty(len(order), np.int64)
    place_N[order] = np.arange(len(order))
    pixels = decode(found.train, image_size, channels, place_N)
    return [(pixels[: len(train)], label_N[train]), (pixels[len(train) :], label_N[heldout])]


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
        if len(own) == 0:  # named by the files, but without pictures in them
            continue
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


def _assemble(
    sides: list[tuple[np.ndarray, np.ndarray]], classes: tuple[str, ...], top: int, name: str
) -> Images:
    """The dataset made from pixels and labels of both sides."""
    (train, train_label), (heldout, heldout_label) = sides
    mean_C, std_C = _moments(train, top)
    digest = hashlib.sha256(f"{top} {train.shape} {heldout.shape}".encode())
    for part in (train, train_label, heldout, heldout_label):
        digest.update(np.ascontiguousarray(part).data)
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
    counts = np.zeros((pixels_NHWC.shape[-1], 256), np.int64)
    for begin in range(0, len(pixels_NHWC), PART):  # bincount makes 8 bytes of one
        for channel, count in enumerate(counts):
            count += np.bincount(
                pixels_NHWC[begin : begin + PART, ..., channel].ravel(), minlength=256
            )
    means, stds = [], []
    for count in counts:
        share = count / count.sum()
        mean = share @ values
        means.append(mean)
        stds.append(np.sqrt(share @ np.square(values - mean)) or 1.0)
    return np.array(means, np.float32), np.array(stds, np.float32)
