"""Batches of images as a pure function of the global step, and evaluation batches."""

import numpy as np
from jaxtyping import Int64

from moejax.data.batches import Batch, endless_order
from moejax.errors import UserError
from moejax.tasks.images.dataset import Images

SHIFTS = 0x5F1F7
"""Keeps the draws of shifts apart from others with the same seed."""


class ImageBatches:
    """Shuffled batches of the training images, for any step, in any order.

    Args:
      images: the data.
      batch_size: images per global batch (B).
      seed: of the permutations and the shifts, in [0, 2**32).
      shift: every image is moved by up to so many pixels, down or up and right or left, small moves
        more often than large ones (a difference of two uniform numbers), drawn from (seed, step,
        place in the batch); what comes in is 0, black.
    """

    def __init__(self, images: Images, batch_size: int, seed: int, shift: int = 0):
        if batch_size < 1:
            raise UserError(f"train.batch_size: {batch_size} must be at least 1")
        if not 0 <= seed < 1 << 32:
            raise UserError(f"train.seed: {seed} is not in [0, 2**32)")
        size = images.train_NHWC.shape[1]
        if not 0 <= shift < size:
            raise UserError(f"task.shift: {shift} is not in [0, {size}), the size of an image")
        self.num_rows = len(images.train_NHWC)
        self._images, self._batch_size, self._seed, self._shift = images, batch_size, seed, shift
        self._order = endless_order(self.num_rows, seed)

    def batch(self, step: int) -> Batch:
        """The global batch of one step.

        Returns `image` float32 [B, H, W, C], normalised; `label` int32 [B]; `valid` bool [B], all
        true; `row` int32 [B], the global row id `step*B + i` modulo 2**31.
        """
        if step < 0:
            raise ValueError(f"step {step} is negative")
        positions = range(step * self._batch_size, (step + 1) * self._batch_size)
        chosen = np.array([int(self._order[position]) for position in positions], dtype=np.int64)
        pixels = self._images.train_NHWC[chosen]
        if self._shift:
            rng = np.random.default_rng([self._seed, SHIFTS, step])
            there, back = rng.integers(0, self._shift + 1, (2, len(pixels), 2))
            pixels = shifted(pixels, there - back)
        return {
            "image": self._images.normalise(pixels),
            "label": self._images.train_label_N[chosen],
            "valid": np.ones(len(positions), dtype=bool),
            "row": np.array([position % (1 << 31) for position in positions], dtype=np.int32),
        }


def shifted(pixels_NHWC: np.ndarray, moves_N2: np.ndarray) -> np.ndarray:
    """Every image moved down and right by its two amounts; what comes in is 0."""
    count, height, width, _ = pixels_NHWC.shape
    wide = int(np.abs(moves_N2).max())
    padded = np.pad(pixels_NHWC, ((0, 0), (wide, wide), (wide, wide), (0, 0)))
    row_NH = wide + np.arange(height) - moves_N2[:, :1]
    column_NW = wide + np.arange(width) - moves_N2[:, 1:]
    return padded[np.arange(count)[:, None, None], row_NH[:, :, None], column_NW[:, None]]


def image_eval_batches(images: Images, batch_size: int, rows: int) -> list[Batch]:
    """Batches of `rows` images spread evenly over the held-out side, the same at every call.

    All of them if there are fewer. The last batch is filled up with blank images of label 0 that
    are `valid=False`. Keys and shapes as in `ImageBatches.batch`; `row` counts the rows of this
    list.
    """
    chosen = image_eval_rows(len(images.heldout_NHWC), rows)
    batches = []
    for begin in range(0, len(chosen), batch_size):
        own = chosen[begin : begin + batch_size]
        image = np.zeros((batch_size, *images.heldout_NHWC.shape[1:]), np.float32)
        label, valid = np.zeros(batch_size, np.int32), np.zeros(batch_size, bool)
        image[: len(own)] = images.normalise(images.heldout_NHWC[own])
        label[: len(own)] = images.heldout_label_N[own]
        valid[: len(own)] = True
        row = np.arange(begin, begin + batch_size, dtype=np.int32)
        batches.append({"image": image, "label": label, "valid": valid, "row": row})
    return batches


def image_eval_rows(available: int, rows: int) -> Int64[np.ndarray, " N"]:
    """Which held-out images `image_eval_batches` takes."""
    if rows < 1:
        raise UserError(f"train.eval_rows: {rows} must be at least 1")
    count = min(rows, available)
    return np.array([j * available // count for j in range(count)], dtype=np.int64)
