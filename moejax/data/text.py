"""Text as rows of tokens: a corpus as the training loop asks for it."""

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from moejax.data import batches
from moejax.data.baselines import ngram_baselines
from moejax.data.corpus import Corpus
from moejax.data.domains import NAMES, heldout_labels
from moejax.data.source import Batch


@dataclasses.dataclass(frozen=True, eq=False)
class TextSource:
    """Windows of ``seq_len`` tokens of a corpus, with the token that follows each as its target.

    A batch: ``tokens`` int32[B, L + 1], ``valid`` bool[B, L], ``row`` int32[B].
    """

    corpus: Corpus
    seq_len: int
    batch_size: int
    seed: int

    @property
    def name(self) -> str:
        return self.corpus.name

    @property
    def fingerprint(self) -> str:
        return self.corpus.fingerprint

    @functools.cached_property
    def train(self) -> batches.TrainBatches:
        """Raises UserError if the text is too short for one row."""
        return batches.TrainBatches(self.corpus.train_N, self.seq_len, self.batch_size, self.seed)

    def size(self) -> tuple[int, int]:
        return self.corpus.train_N.size, self.corpus.heldout_N.size

    def shapes(self, rows: int) -> Batch:
        return {
            "tokens": np.zeros((rows, self.seq_len + 1), np.int32),
            "valid": np.zeros((rows, self.seq_len), np.bool_),
            "row": np.zeros(rows, np.int32),
        }

    def train_batch(self, step: int) -> Batch:
        return self.train.batch(step)

    def eval_batches(self, batch_size: int, rows: int) -> list[Batch]:
        return batches.eval_batches(self.corpus.heldout_N, self.seq_len, batch_size, rows)

    def baselines(self) -> dict[str, float]:
        corpus = self.corpus
        return ngram_baselines(corpus.train_N, corpus.heldout_N, corpus.vocab_size)

    def about(self) -> dict[str, Any]:
        return {"heldout_bytes_per_token": self.corpus.heldout_bytes_per_token}

    def eval_extras(self, loss: float) -> dict[str, float]:
        return {"bits_per_byte": loss / math.log(2) / self.corpus.heldout_bytes_per_token}

    def token_counts(self, vocab_size: int) -> np.ndarray:
        return self.corpus.token_counts(vocab_size)

    def tokens(self, batch: Batch) -> np.ndarray:
        return batch["tokens"][:, :-1]

    def told(self, batch: Batch, eval_rows: int) -> dict[str, Any]:
        corpus = self.corpus
        # Of prepared shards the ids are all there is.
        unknown = [f"<{index}>" for index in range(corpus.vocab_size)]
        arrays = {
            "token": batch["tokens"][:, :-1],
            "target": batch["tokens"][:, 1:],
            "valid": batch["valid"],
            "row": batch["row"],
            "token_text": corpus.origin.tokenizer.token_text() if corpus.origin else unknown,
        }
        labels_N = heldout_labels(corpus)
        if labels_N is not None:
            windows = batches.eval_windows(len(corpus.heldout_N), self.seq_len, eval_rows)
            start_N = np.asarray(windows)[batch["row"]] * self.seq_len
            label_NL = labels_N[start_N[:, None] + np.arange(self.seq_len)]
            arrays |= {"label": label_NL, "label_names": NAMES}
        return arrays
