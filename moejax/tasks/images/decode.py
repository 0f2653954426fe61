"""Pictures as squares of pixels: decoding, cropping and resizing."""

import io
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Int, UInt8

from moejax.errors import UserError
from moejax.tasks.images.formats.format import Picture, Pictures

MODES = {1: "L", 3: "RGB"}
"""Pillow's pixel mode for each number of channels."""

EACH = 16
"""Pictures that a thread decodes before it asks for more; a small one takes microseconds."""

AT_ONCE = 8 * EACH
"""Pictures that are decoded together, while those before are in memory, and no others."""


def decode(
    pictures: Pictures, image_size: int, channels: int, place_N: Int[np.ndarray, " N"] | None = None
) -> UInt8[np.ndarray, "N H W C"]:
    """Decode pictures to squares of ``image_size`` pixels, in a few threads, while they are read.

    Picture i becomes row ``place_N[i]`` of the result (row i by default). See ``read_picture``.

    Raises:
      UserError: a picture that cannot be decoded, or other pictures than when labels were read.
    """
    count = len(pictures.label_N)
    place_N = np.arange(count) if place_N is None else place_N
    pixels = np.empty((count, image_size, image_size, channels), np.uint8)
    done, stream = 0, pictures.stream()

    def squares_of(part: list[Picture]) -> list[np.ndarray]:
        return [read_picture(picture, image_size, channels) for picture in part]

    with ThreadPoolExecutor() as pool:
        while block := list(itertools.islice(stream, AT_ONCE)):
            if done + len(block) > count:
                break
            places = place_N[done : done + len(block)]
            parts = [block[begin : begin + EACH] for begin in range(0, len(block), EACH)]
            squares = pool.map(squares_of, parts)
            for place, square in zip(places, itertools.chain.from_iterable(squares), strict=True):
                pixels[place] = square
            done += len(block)
    if block or done != count:
        raise UserError("data.path: the files changed while they were read; run again")
    return pixels


def read_image(path: str, image_size: int, channels: int) -> UInt8[np.ndarray, "H W C"]:
    """Decode one file: see ``read_picture``."""
    return read_picture(Picture(path, path), image_size, channels)


def read_picture(picture: Picture, image_size: int, channels: int) -> UInt8[np.ndarray, "H W C"]:
    """Decode one picture to a square of ``image_size`` pixels.

    It is rotated according to its EXIF data and converted to grey (``channels=1``, ITU-R 601 luma)
    or RGB (3); its largest central square is resized with a bilinear filter as wide as a target
    pixel (antialiased), and left as it is if it has that size. Only the first frame of an animation
    is used; transparency is ignored.

    Raises a UserError that names a picture that is damaged, no picture, or has more than 8 bits per
    channel.
    """
    from PIL import Image, ImageOps  # an extra

    place, content = picture
    square = (image_size, image_size)
    try:
        with (
            Image.fromarray(content)
            if isinstance(content, np.ndarray)
            else Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)
        ) as image:
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
            f"data.path: {place!r} is not a readable image ({reason}); repair or remove it"
        ) from error
    if deep or pixels is None:
        raise UserError(
            f"data.path: {place!r} has pixels of more than 8 bits (mode {mode}); convert it to 8"
        )
    return np.asarray(pixels, np.uint8).reshape(*square, channels)
