"""Images as the training loop asks for them: rows are images, tokens are patches."""

import dataclasses
import functools
from typing import Any

import numpy as np

from moejax.data.source import Batch, few_rows
from moejax.tasks.images.batches import ImageBatches, image_eval_batches, image_eval_rows
from moejax.tasks.images.dataset import Images


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSource:
    """Images with their classes.

    A batch: ``image`` float32[B, H, W, C], ``label`` int32[B], ``valid`` bool[B], ``row`` int32[B].
    The token id of a patch is its place in the image, in reading order: all images have the same.
    """

    images: Images
    patch_size: int
    batch_size: int
    seed: int
    eval_rows: int
    """Images of an evaluation, at most: what the baseline is of."""
    shift: int = 0
    """Of training images: see ImageBatches."""

    @property
    def name(self) -> str:
        return self.images.name

    @property
    def fingerprint(self) -> str:
        return self.images.fingerprint

    @property
    def side(self) -> int:
        """Patches along one side of an image."""
        return self.images.train_NHWC.shape[1] // self.patch_size

    @functools.cached_property
    def train(self) -> ImageBatches:
        return ImageBatches(self.images, self.batch_size, self.seed, self.shift)

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
        """Predicting every class as often as it is in training, in nats per evaluated image."""
        images = self.images
        chosen = image_eval_rows(len(images.heldout_label_N), self.eval_rows)
        count_V = np.bincount(images.train_label_N, minlength=len(images.classes))
        log_V = np.log(count_V / count_V.sum())
        return {"class prior": float(-log_V[images.heldout_label_N[chosen]].mean())}

    def about(self) -> dict[str, Any]:
        return {"classes": list(self.images.classes)}

    def facts(self) -> dict[str, str]:
        return {}

    def warnings(self) -> list[str]:
        return few_rows(len(self.images.heldout_label_N), "image")

    def eval_extras(self, loss: float) -> dict[str, float]:
        return {}

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """Every image has every patch once."""
        counts = np.zeros(max(vocab_size, self.side**2), np.int64)
        counts[: self.side**2] = len(self.images.train_NHWC)
        return counts

    def tokens(self, batch: Batch) -> np.ndarray:
        place_L = np.arange(self.side**2, dtype=np.int32)
        return np.broadcast_to(place_L, (len(batch["row"]), len(place_L))).copy()

    def told(self, batch: Batch, eval_rows: int) -> dict[str, Any]:
        """A patch is called by its row and column; its target and its label are the image's class,
        whose names follow those of the patches. The file's labels are a byte: no more classes."""
        token_NL = self.tokens(batch)
        label_NL = np.broadcast_to(batch["label"][:, None], token_NL.shape)
        places = [f"row {i // self.side}, column {i % self.side}" for i in range(self.side**2)]
        found = {
            "token": token_NL,
            "target": label_NL + len(places),
            "valid": np.broadcast_to(batch["valid"][:, None], token_NL.shape),
            "row": batch["row"],
            "token_text": [*places, *self.images.classes],
        }
        if len(self.images.classes) <= 256:
            found |= {"label": label_NL, "label_names": list(self.images.classes)}
        return found
