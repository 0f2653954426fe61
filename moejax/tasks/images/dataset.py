"""Labelled images: training and held-out sides, decoded once, with what normalises their pixels."""

import dataclasses
import hashlib
import os
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from moejax.errors import UserError
from moejax.tasks.images.folder import MODES, find_images, read_images

DIGITS = "digits"
DIGITS_SIZE, DIGITS_TOP = 8, 16
"""scikit-learn's digits are 8 x 8 and count from 0 to 16."""

SPLIT_SEED = 0
"""Which images are held out is the same in all runs: their accuracies are compared."""


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Images of two sides, in memory as decoded: 1 byte per pixel and channel.

    Attributes:
      train_NHWC, heldout_NHWC: pixels, from 0 to ``top``.
      train_label_N, heldout_label_N: class of each image, an index into ``classes``.
      classes: their names, in the order of the labels.
      mean_C, std_C: of the training pixels over ``top``, by channel; std is 1 where all are equal.
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
        """Pixels scaled to [0, 1], less the training mean, over the training deviation."""
        return (pixels_NHWC.astype(np.float32) / self.top - self.mean_C) / self.std_C


def load_images(
    path: str = "", image_size: int = 8, channels: int = 1, eval_fraction: float = 0.2
) -> Images:
    """Reads a folder of images (see ``find_images``), or the built-in digits for an empty path.

    Args:
      path: a folder with one folder per class, or with ``train`` and ``val`` of these (or one
        of ``image_folder.EVAL_FOLDERS``).
      image_size: height and width every image is cut and resized to (see ``read_images``).
      channels: 1 (grey) or 3 (RGB).
      eval_fraction: share of each class to hold out, in (0, 1), at least one image; unused where
        the folder has a split of its own.

    All images are decoded here, once, and stay in memory: N * image_size^2 * channels bytes.

    Raises UserError, in one line, for what cannot be read, split or decoded.
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
        # Before anything is decoded, which may take long.
        split = split_classes(folder.train.label_N, folder.classes, eval_fraction)
        pixels = read_images(folder.train.paths, image_size, channels)
        sides = [(pixels[side], folder.train.label_N[side]) for side in split]
    return _assemble(sides, folder.classes, 255, name)


def require(module: str, what: str) -> None:
    """Raises UserError naming the extra where one of its packages is missing."""
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

    Of a class with n images round(n * eval_fraction) are held out, at least one and at most n - 1,
    by a permutation that depends on the numbers of images and nothing else.
    """
    if not 0.0 < eval_fraction < 1.0:
        raise UserError(
            f"data.eval_fraction: {eval_fraction} is not between 0 and 1 (both excluded)"
        )
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

    found: Any = load_digits()
    pixels = found.images.astype(np.uint8)[..., None]
    labels = found.target.astype(np.int32)
    classes = tuple(str(name) for name in found.target_names)
    split = split_classes(labels, classes, eval_fraction)
    return _assemble([(pixels[side], labels[side]) for side in split], classes, DIGITS_TOP, DIGITS)


def _assemble(
    sides: list[tuple[np.ndarray, np.ndarray]], classes: tuple[str, ...], top: int, name: str
) -> Images:
    """From pixels and labels of both sides."""
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
    """Mean and deviation by channel, from exact counts: no float copy of the data is made."""
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
