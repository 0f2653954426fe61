"""Images in the form that the training loop asks for: rows are images, tokens are patches."""

import dataclasses
import functools
from typing import Any

import numpy as np

from moejax.data.batches import TrainBatches, heldout_batches, spread_evenly
from moejax.data.source import Batch, few_rows
from moejax.errors import UserError
from moejax.tasks.images.dataset import Images

SHIFTS = 0x5F1F7
"""Separates the random stream of shifts from others with the same seed."""


def image_train_batches(images: Images, batch_size: int, seed: int, shift: int = 0) -> TrainBatches:
    """Training batches: ``image`` float32[B, H, W, C], normalised, ``label``, ``valid``, ``row``.

    Every image is moved by up to ``shift`` pixels, down or up and right or left, small moves more
    often than large ones (a difference of two uniform numbers), drawn from (seed, step, place in
    the batch). Uncovered pixels are 0, black.
    """
    size = images.train_NHWC.shape[1]
    if not 0 <= shift < size:
        raise UserError(f"task.shift: {shift} is not in [0, {size}), the size of an image")

    def read(row_B: np.ndarray, position_B: np.ndarray) -> Batch:
        pixels = images.train_NHWC[row_B]
        if shift and len(row_B):
            rng = np.random.default_rng([seed, SHIFTS, int(position_B[0]) // batch_size])
            forward, back = rng.integers(0, shift + 1, (2, batch_size, 2))
            pixels = shifted(pixels, (forward - back)[position_B % batch_size])
        return _batch(images.normalise(pixels), images.train_label_N[row_B])

    return TrainBatches(len(images.train_NHWC), batch_size, seed, read)


def image_eval_batches(images: Images, batch_size: int, rows: int) -> list[Batch]:
    """Held-out batches with the keys and shapes of training batches: see ``heldout_batches``."""

    def read(row_B: np.ndarray, position_B: np.ndarray) -> Batch:
        return _batch(images.normalise(images.heldout_NHWC[row_B]), images.heldout_label_N[row_B])

    return heldout_batches(len(images.heldout_NHWC), batch_size, rows, read)


def _batch(image_BHWC: np.ndarray, label_B: np.ndarray) -> Batch:
    return {"image": image_BHWC, "label": label_B, "valid": np.ones(len(label_B), dtype=bool)}


def shifted(pixels_NHWC: np.ndarray, moves_N2: np.ndarray) -> np.ndarray:
    """Every image moved down and right by its two amounts; uncovered pixels are 0."""
    count, height, width, _ = pixels_NHWC.shape
    wide = int(np.abs(moves_N2).max())
    padded = np.pad(pixels_NHWC, ((0, 0), (wide, wide), (wide, wide), (0, 0)))
    row_NH = wide + np.arange(height) - moves_N2[:, :1]
    column_NW = wide + np.arange(width) - moves_N2[:, 1:]
    return padded[np.arange(count)[:, None, None], row_NH[:, :, None], column_NW[:, None]]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSource:
    """Images with their classes.

    A batch: ``image`` float32[B, H, W, C], ``label`` int32[B], ``valid`` bool[B], ``row`` int32[B].
    The token id of a patch is its position in the image, in reading order, in every image.
    """

    images: Images
    patch_size: int
    batch_size: int
    seed: int
    eval_rows: int
    """Most images of an evaluation. The baseline is computed on the same images."""
    shift: int = 0
    """Largest move of a training image: see ``image_train_batches``."""

    @property
    def name(self) -> str:
        return self.images.name

    @property
    def fingerprint(self) -> str:
        return self.images.fingerprint

    @property
    def side(self) -> int:
        """Patches along each side of an image."""
        return self.images.train_NHWC.shape[1] // self.patch_size

    @functools.cached_property
    def train(self) -> TrainBatches:
        return image_train_batches(self.images, self.batch_size, self.seed, self.shift)

    def size(self) -> tuple[int, int]:
        return len(self.images.train_NHWC), len(self.images.heldout_NHWC)

    def shapes(self, rows: int) -> Batch:
        return {
            "image": np.zeros((rows, *self.images.train_NHWC.shape[1:]), np.float32),
            "label": np.zeros(rows, np.int32),
            "valid": np.zeros(rows, np.bool_),
            "row": np.zeros(rows, np.int32),
        }

    def train_batch(self, step: int) -> Batch:
        return self.train.batch(step)

    def eval_batches(self, batch_size: int, rows: int) -> list[Batch]:
        return image_eval_batches(self.images, batch_size, rows)

    def baselines(self) -> dict[str, float]:
        return self._baselines

    @functools.cached_property
    def _baselines(self) -> dict[str, float]:
        """Loss of predicting the class frequencies of training, in nats per evaluated image."""
        images = self.images
        row_N = spread_evenly(len(images.heldout_label_N), self.eval_rows)
        count_V = np.bincount(images.train_label_N, minlength=len(images.classes))
        share_N = (count_V / count_V.sum())[images.heldout_label_N[row_N]]
        return {"class prior": float(-np.log(share_N).mean())}

    def about(self) -> dict[str, Any]:
        return {"classes": list(self.images.classes)}

    def facts(self) -> dict[str, str]:
        return {"format": self.images.source} if self.images.source else {}

    def warnings(self) -> list[str]:
        return few_rows(len(self.images.heldout_label_N), "image")

    def eval_extras(self, loss: float) -> dict[str, float]:
        return {}

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """Every image has each patch once."""
        counts = np.zeros(max(vocab_size, self.side**2), np.int64)
        counts[: self.side**2] = len(self.images.train_NHWC)
        return counts

    def tokens(self, batch: Batch) -> np.ndarray:
        position_L = np.arange(self.side**2, dtype=np.int32)
        return np.broadcast_to(position_L, (len(batch["row"]), len(position_L))).copy()

    def probe_arrays(self, batch: Batch, eval_rows: int) -> dict[str, Any]:
        """A patch is named by its row and column. Its target and its label are the image's class,
        whose names follow those of the patches. Labels are stored as bytes, so that more than 256
        classes have none."""
        token_NL = self.tokens(batch)
        label_NL = np.broadcast_to(batch["label"][:, None], token_NL.shape)
        patches = [f"row {i // self.side}, column {i % self.side}" for i in range(self.side**2)]
        arrays = {
            "token": token_NL,
            "target": label_NL + len(patches),
            "valid": np.broadcast_to(batch["valid"][:, None], token_NL.shape),
            "row": batch["row"],
            "token_text": [*patches, *self.images.classes],
        }
        if len(self.images.classes) <= 256:
            arrays |= {"label": label_NL, "label_names": list(self.images.classes)}
        return arrays
