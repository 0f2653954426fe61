"""The built-in images: scikit-learn's digits."""

from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from moejax.errors import UserError

DIGITS = "digits"
SIZE, TOP = 8, 16
"""scikit-learn's digits are 8 x 8 pixels with values from 0 to 16."""


def read_digits(
    image_size: int, channels: int
) -> tuple[UInt8[np.ndarray, "N H W 1"], Int32[np.ndarray, " N"], tuple[str, ...]]:
    """1,797 handwritten digits, 8 x 8, grey (UCI, test half of optdigits): pixels, labels, names.

    Raises UserError for another size, which they do not have.
    """
    if (image_size, channels) != (SIZE, 1):
        raise UserError(
            f"task.image_size, task.channels: the built-in digits are {SIZE} x {SIZE} and grey, "
            f"not {image_size} and {channels} channels; set {SIZE} and 1, or data.path"
        )
    from sklearn.datasets import load_digits  # an extra

    digits: Any = load_digits()
    pixels = digits.images.astype(np.uint8)[..., None]
    return pixels, digits.target.astype(np.int32), tuple(str(n) for n in digits.target_names)
