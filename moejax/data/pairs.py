"""Images of digits with captions of their names: pairs for contrastive learning."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32

from moejax.data.source import Batch
from moejax.errors import UserError

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a photo of the digit {}",
    "{}",
    "the number {}",
    "a handwritten {}",
    "{}, written by hand",
    "an image of a {}",
)
"""Captions; the first is also the prompt of a class."""
MODALITIES = ("image", "text")
"""The tasks of the routing, in this order."""
BYTES = 256
SPLIT_SEED = 0
"""Which images are held out is the same in all runs: their accuracies are compared."""


@dataclasses.dataclass(frozen=True, eq=False)
class Digits:
    """Both sides of scikit-learn's digits, normalised by the training pixels' moments."""

    train_NHWC: Float32[np.ndarray, "N H W C"]
    train_label_N: Int32[np.ndarray, " N"]
    heldout_NHWC: Float32[np.ndarray, "M H W C"]
    heldout_label_N: Int32[np.ndarray, " M"]


def load_digits(eval_fraction: float) -> Digits:
    """1797 images of 8 x 8 pixels, grey; of each class at least ``eval_fraction`` is held out.

    Raises:
      UserError: scikit-learn is missing, or a side would have no image of some class.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise UserError(
            "task multimodal: the digits come with scikit-learn, which is not installed; pip "
            "install 'moejax[vision]'"
        ) from error
    found: Any = datasets.load_digits()
    rng, held_out = np.random.default_rng(SPLIT_SEED), []
    for label in range(len(CLASSES)):
        own = rng.permutation(np.flatnonzero(found.target == label))
        count = math.ceil(eval_fraction * len(own))
        if count >= len(own):
            raise UserError(
                f"data.eval_fraction={eval_fraction} leaves no {CLASSES[label]!r} to train on; "
                "use a smaller one, such as 0.2"
            )
        held_out.append(own[:count])
    is_held_out = np.zeros(len(found.target), bool)
    is_held_out[np.concatenate(held_out)] = True
    pixels, label = found.images.astype(np.float64)[..., None], found.target.astype(np.int32)
    train = pixels[~is_held_out]
    pixels = ((pixels - train.mean()) / train.std()).astype(np.float32)
    return Digits(
        pixels[~is_held_out], label[~is_held_out], pixels[is_held_out], label[is_held_out]
    )


def encode(
    captions: Sequence[str], length: int
) -> tuple[Int32[np.ndarray, "N T"], Bool[np.ndarray, "N T"]]:
    """Captions as bytes padded with 0, and which of these are theirs.

    Raises:
      UserError: one is longer.
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
    """One caption per class, by which images are classified."""
    return tuple(TEMPLATES[0].format(name) for name in CLASSES)


@dataclasses.dataclass(frozen=True, eq=False)
class PairSource:
    """Images with captions; which caption of its class an image gets is drawn anew at each step.

    A batch: ``image`` float32[B, H, W, 1], ``text`` int32[B, T] (bytes), ``text_valid`` bool[B, T],
    ``label`` int32[B], ``valid`` bool[B], ``row`` int32[B].

    For gates and recordings a pair is one row of 2 L tokens, L = max(patches, T): the patches of
    the image, whose ids follow those of bytes, then the caption, each padded to L.
    """

    digits: Digits
    patch_size: int
    caption_length: int
    batch_size: int
    seed: int

    @property
    def name(self) -> str:
        return "digits and their names"

    @property
    def fingerprint(self) -> str:
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(repr((CLASSES, TEMPLATES)).encode())
        for array in dataclasses.astuple(self.digits):
            digest.update(array.tobytes())
        return digest.hexdigest()

    @property
    def image_size(self) -> int:
        return self.digits.train_NHWC.shape[1]

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def length(self) -> int:
        """L: positions of each modality."""
        return max(self.patches, self.caption_length)

    @functools.cached_property
    def _captions(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes [classes * templates, T] and which are valid."""
        every = [template.format(name) for name in CLASSES for template in TEMPLATES]
        return encode(every, self.caption_length)

    def size(self) -> tuple[int, int]:
        return len(self.digits.train_label_N), len(self.digits.heldout_label_N)

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

    def train_batch(self, step: int) -> Batch:
        """Batch b is pairs b*B .. (b+1)*B of the epochs laid end to end, each a permutation."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        images = len(self.digits.train_label_N)
        position_B = step * self.batch_size + np.arange(self.batch_size)
        chosen_B = np.array([self._order(int(p) // images)[p % images] for p in position_B])
        rng = np.random.default_rng((self.seed, 1, step))
        template_B = rng.integers(len(TEMPLATES), size=self.batch_size)
        image, label = self.digits.train_NHWC[chosen_B], self.digits.train_label_N[chosen_B]
        row_B = (position_B % (1 << 31)).astype(np.int32)
        return self._batch(image, label, template_B, row_B)

    def eval_batches(self, batch_size: int, rows: int) -> list[Batch]:
        """Row j has template j modulo their number."""
        available = len(self.digits.heldout_label_N)
        count = min(rows, available)
        chosen = np.arange(count) * available // count
        batches = []
        for begin in range(0, count, batch_size):
            own = chosen[begin : begin + batch_size]
            row_B = np.arange(begin, begin + batch_size, dtype=np.int32)
            image, label = self.digits.heldout_NHWC[own], self.digits.heldout_label_N[own]
            real = self._batch(image, label, row_B[: len(own)] % len(TEMPLATES), row_B[: len(own)])
            batch = self.shapes(batch_size)
            for name, x in real.items():
                batch[name][: len(own)] = x
            batches.append({**batch, "row": row_B})
        return batches

    def baselines(self) -> dict[str, float]:
        """The loss of equal similarities."""
        return {"uniform": math.log(self.batch_size)}

    def about(self) -> dict[str, Any]:
        return {"classes": CLASSES, "templates": TEMPLATES}

    def eval_extras(self, loss: float) -> dict[str, float]:
        return {}

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """Expected over the draw of captions, times their number so that they are whole."""
        label_N = self.digits.train_label_N
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

    def told(self, batch: Batch, eval_rows: int) -> dict[str, Any]:
        """The target of a token is the next one of its sequence, and 0 behind the last."""
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

    def _batch(
        self, image: np.ndarray, label_B: np.ndarray, template_B: np.ndarray, row_B: np.ndarray
    ) -> Batch:
        text_XT, valid_XT = self._captions
        caption_B = label_B * len(TEMPLATES) + template_B
        return {
            "image": image,
            "text": text_XT[caption_B],
            "text_valid": valid_XT[caption_B],
            "label": label_B,
            "valid": np.ones(len(label_B), bool),
            "row": row_B,
        }

    @functools.cached_property
    def _order(self) -> Any:
        """The permutation of an epoch; the latest two are kept."""
        images = len(self.digits.train_label_N)

        @functools.lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng((self.seed, 0, epoch)).permutation(images)

        return order
