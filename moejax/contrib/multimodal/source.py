"""Images of digits with captions that name them: pairs for contrastive learning."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from moejax.data.batches import TrainBatches
from moejax.data.source import Batch
from moejax.errors import UserError
from moejax.tasks.images.dataset import Images
from moejax.tasks.images.source import image_eval_batches, image_train_batches

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a photo of the digit {}",
    "{}",
    "the number {}",
    "a handwritten {}",
    "{}, written by hand",
    "an image of a {}",
)
"""Templates of captions; the first is also the prompt of a class."""
MODALITIES = ("image", "text")
"""The tasks of the routing, in this order."""
BYTES = 256
CAPTIONS = 1
"""Separates the random stream of captions from others with the same seed."""


def encode(
    captions: Sequence[str], length: int
) -> tuple[Int32[np.ndarray, "N T"], Bool[np.ndarray, "N T"]]:
    """Captions as bytes, padded with 0, and a mask of the bytes that are not padding.

    Raises:
      UserError: a caption is longer than ``length``.
    """
    shape = (len(captions), length)
    ids, valid = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for row, caption in enumerate(captions):
        content = np.frombuffer(caption.encode(), np.uint8)
        if len(content) > length:
            raise UserError(
                f"task.caption_length={length} is too short for {caption!r}, which has "
                f"{len(content)} bytes; use {len(content)} or more"
            )
        ids[row, : len(content)], valid[row, : len(content)] = content, True
    return ids, valid


def prompts() -> tuple[str, ...]:
    """One caption per class, for zero-shot classification."""
    return tuple(TEMPLATES[0].format(name) for name in CLASSES)


@dataclasses.dataclass(frozen=True, eq=False)
class PairSource:
    """Images of digits with captions; the caption of an image is drawn anew at each step.

    A batch: ``image`` float32[B, H, W, 1], ``text`` int32[B, T] (bytes), ``text_valid`` bool[B, T],
    ``label`` int32[B], ``valid`` bool[B], ``row`` int32[B].

    In gates and recordings a pair is one row of 2 L tokens, L = max(patches, T): the patches of the
    image, whose ids follow those of bytes, then the caption, each padded to L.
    """

    images: Images
    patch_size: int
    caption_length: int
    batch_size: int
    seed: int
    eval_rows: int
    """Most pairs of an evaluation. The baseline is computed on the same pairs."""

    @property
    def name(self) -> str:
        return "digits and their names"

    @property
    def fingerprint(self) -> str:
        content = (self.images.fingerprint, CLASSES, TEMPLATES)
        return hashlib.sha256(repr(content).encode()).hexdigest()

    @property
    def image_size(self) -> int:
        return self.images.train_NHWC.shape[1]

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def length(self) -> int:
        """L: positions of each modality."""
        return max(self.patches, self.caption_length)

    @functools.cached_property
    def _captions(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes [classes * templates, T] and the mask of valid ones."""
        captions = [template.format(name) for name in CLASSES for template in TEMPLATES]
        return encode(captions, self.caption_length)

    def size(self) -> tuple[int, int]:
        return len(self.images.train_label_N), len(self.images.heldout_label_N)

    def shapes(self, rows: int) -> Batch:
        size = self.image_size
        return {
            "image": np.zeros((rows, size, size, 1), np.float32),
            "text": np.zeros((rows, self.caption_length), np.int32),
            "text_valid": np.zeros((rows, self.caption_length), np.bool_),
            "label": np.zeros(rows, np.int32),
            "valid": np.zeros(rows, np.bool_),
            "row": np.zeros(rows, np.int32),
        }

    @functools.cached_property
    def _train(self) -> TrainBatches:
        return image_train_batches(self.images, self.batch_size, self.seed)

    def train_batch(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, CAPTIONS, step])
        template_B = rng.integers(len(TEMPLATES), size=self.batch_size)
        return self._captioned(self._train.batch(step), template_B)

    def eval_batches(self, batch_size: int, rows: int) -> list[Batch]:
        """Row j has template j modulo their number."""
        batches = image_eval_batches(self.images, batch_size, rows)
        return [self._captioned(batch, batch["row"] % len(TEMPLATES)) for batch in batches]

    def baselines(self) -> dict[str, float]:
        return self._baselines

    @functools.cached_property
    def _baselines(self) -> dict[str, float]:
        """Held-out loss at equal similarities: log n for each of the n valid pairs of a batch,
        averaged over pairs. The last batch may have fewer pairs than the others."""
        batches = self.eval_batches(self.batch_size, self.eval_rows)
        pairs = [int(batch["valid"].sum()) for batch in batches]
        return {"uniform": sum(n * math.log(n) for n in pairs) / sum(pairs)}

    def about(self) -> dict[str, Any]:
        return {"classes": CLASSES, "templates": TEMPLATES}

    def eval_extras(self, loss: float) -> dict[str, float]:
        return {}

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """Expected counts over the draw of captions, times the number of templates to be whole."""
        label_N = self.images.train_label_N
        text_XT, valid_XT = self._captions
        images_X = np.repeat(np.bincount(label_N, minlength=len(CLASSES)), len(TEMPLATES))
        counts = np.zeros(vocab_size, np.int64)
        np.add.at(counts, text_XT[valid_XT], np.repeat(images_X, valid_XT.sum(axis=1)))
        counts[BYTES : BYTES + self.patches] = len(label_N) * len(TEMPLATES)
        return counts

    def tokens(self, batch: Batch) -> np.ndarray:
        rows = len(batch["row"])
        token = np.zeros((rows, 2, self.length), np.int32)
        token[:, 0, : self.patches] = BYTES + np.arange(self.patches)
        token[:, 1, : self.caption_length] = batch["text"]
        return token.reshape(rows, -1)

    def probe_arrays(self, batch: Batch, eval_rows: int) -> dict[str, Any]:
        """The target of a token is the next token of its sequence, and 0 after the last."""
        rows, token_NL = len(batch["row"]), self.tokens(batch)
        valid = np.zeros((rows, 2, self.length), bool)
        valid[:, 0, : self.patches] = batch["valid"][:, None]
        valid[:, 1, : self.caption_length] = batch["text_valid"] & batch["valid"][:, None]
        valid_NL = valid.reshape(rows, -1)
        following = np.where(valid, token_NL.reshape(valid.shape), 0)
        following = np.pad(following[..., 1:], ((0, 0), (0, 0), (0, 1)))
        side = self.image_size // self.patch_size
        patches = [f"patch {i},{j}" for i in range(side) for j in range(side)]
        label = np.broadcast_to(np.arange(2)[:, None], valid.shape).reshape(rows, -1)
        return {
            "token": token_NL,
            "target": following.reshape(rows, -1),
            "valid": valid_NL,
            "row": batch["row"],
            "token_text": [*(chr(byte) for byte in range(BYTES)), *patches],
            "label": label,
            "label_names": MODALITIES,
        }

    def _captioned(self, batch: Batch, template_B: np.ndarray) -> Batch:
        """A batch of images with captions; padding has none."""
        text_XT, valid_XT = self._captions
        caption_B, real_B1 = batch["label"] * len(TEMPLATES) + template_B, batch["valid"][:, None]
        return {
            **batch,
            "text": np.where(real_B1, text_XT[caption_B], 0),
            "text_valid": valid_XT[caption_B] & real_B1,
        }
