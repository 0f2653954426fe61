"""Text as rows of tokens: a corpus in the form that the training loop asks for."""

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from moejax.data.baselines import ngram_baselines
from moejax.data.batches import TrainBatches, heldout_batches, spread_evenly
from moejax.data.corpus import Corpus
from moejax.data.domains import CODE, NAMES, heldout_labels
from moejax.data.source import Batch
from moejax.errors import UserError
from moejax.record.experts import Choices
from moejax.tasks.language import remarks
from moejax.tasks.language.documents import Documents
from moejax.tasks.language.rows import Rows, heldout_rows, train_rows

AT_ONCE = 64
"""Rows that are read at a time."""


@dataclasses.dataclass(frozen=True, eq=False)
class TextSource:
    """Rows of ``seq_len`` tokens of a corpus, with the token that follows each as its target.

    A batch: ``tokens`` int32[B, L + 1], ``valid`` bool[B, L], ``row`` int32[B]; with ``packing``
    also ``segment`` int32[B, L], see `moejax.tasks.language.packing`; with ``choices`` also
    ``experts`` int32[B, L, M, K], see ``Context.expert_BLMK``.
    """

    corpus: Corpus
    seq_len: int
    batch_size: int
    seed: int
    eval_rows: int
    """Most rows of an evaluation. Baselines and bits per byte are computed on the same rows."""
    choices: Choices | None = None
    """Experts that were chosen elsewhere for rows of this text."""
    packing: str = "none"
    """"none": windows of all documents joined. Else rows of whole documents, see `Documents`."""

    @property
    def name(self) -> str:
        return self.corpus.name

    @property
    def fingerprint(self) -> str:
        return self.corpus.fingerprint

    @functools.cached_property
    def train_rows(self) -> Rows:
        """Raises UserError if the text has no row, or cannot be packed."""
        return train_rows(self.corpus, self.seq_len, self.packing)

    @functools.cached_property
    def heldout_rows(self) -> Rows:
        """Raises UserError if the text has no row, or cannot be packed."""
        return heldout_rows(self.corpus, self.seq_len, self.packing)

    @functools.cached_property
    def train(self) -> TrainBatches:
        rows = self.train_rows
        return TrainBatches(len(rows), self.batch_size, self.seed, rows.read)

    def of_length(self, seq_len: int) -> "TextSource":
        """The same text in rows of another length."""
        return dataclasses.replace(self, seq_len=seq_len)

    def size(self) -> tuple[int, int]:
        return self.corpus.train_N.size, self.corpus.heldout_N.size

    def shapes(self, rows: int) -> Batch:
        shapes = {
            "tokens": np.zeros((rows, self.seq_len + 1), np.int32),
            "valid": np.zeros((rows, self.seq_len), np.bool_),
            "row": np.zeros(rows, np.int32),
        }
        if self.packing != "none":
            shapes["segment"] = np.zeros((rows, self.seq_len), np.int32)
        return self._with_experts(shapes)

    def train_batch(self, step: int) -> Batch:
        return self._with_experts(self.train.batch(step))

    def eval_batches(self, batch_size: int, rows: int) -> list[Batch]:
        return list(map(self._with_experts, self._heldout(batch_size, rows)))

    def _heldout(self, batch_size: int, rows: int) -> list[Batch]:
        return heldout_batches(len(self.heldout_rows), batch_size, rows, self.heldout_rows.read)

    def check_rows(self, train_steps: int) -> None:
        """Raises UserError unless all rows to train on are among the ``choices``, and of the
        held-out rows all or none; all, where nothing is trained."""
        if self.choices is None:
            return
        for step in range(train_steps):
            place_B = self.choices.find(self.tokens(self.train.batch(step)))
            if np.any(place_B < 0):
                raise UserError(
                    f"moe.replay: row {np.argmax(place_B < 0)} of the batch of step {step} is not "
                    "in the file; its rows must be those of this text, train.seq_len and train.seed"
                )
        batches = self._heldout(self.batch_size, self.eval_rows)
        missing_N = np.concatenate(
            [
                self.choices.find(self.tokens(batch))[batch["valid"].any(axis=1)] < 0
                for batch in batches
            ]
        )
        if missing_N.any() and not (train_steps and missing_N.all()):
            raise UserError(
                f"moe.replay: held-out row {np.argmax(missing_N)} is not in the file, which has "
                f"{np.sum(~missing_N)} of {missing_N.size}; record all of them (the same text, "
                "train.seq_len and train.eval_rows), or train without any"
            )

    def _with_experts(self, batch: Batch) -> Batch:
        if self.choices is None:
            return batch
        return {**batch, "experts": self.choices.of(self.tokens(batch))}

    def _evaluated_rows(self, rows: int) -> np.ndarray:
        """The rows of ``eval_batches``."""
        return spread_evenly(len(self.heldout_rows), rows)

    @functools.cached_property
    def evaluated(self) -> dict[str, int]:
        """Rows of an evaluation, their targets, and the bytes of text that the targets encode."""
        row_N = self._evaluated_rows(self.eval_rows)
        size_M = self.corpus.heldout_size_M
        tokens = size = 0
        for begin in range(0, len(row_N), AT_ONCE):
            row_B = row_N[begin : begin + AT_ONCE]
            valid_BL = self.heldout_rows.read(row_B, np.arange(len(row_B)))["valid"]
            tokens += int(valid_BL.sum())
            if size_M is not None:
                place_T = self.heldout_rows.places(row_B)[valid_BL] + 1
                inside_T = place_T < len(size_M)
                separators = len(place_T) - int(inside_T.sum())  # of one byte, behind the stream
                size += int(size_M[place_T[inside_T]].sum(dtype=np.int64)) + separators
        counts = {"rows": len(row_N), "tokens": tokens}
        return counts if size_M is None else {**counts, "bytes": size}

    def baselines(self) -> dict[str, float]:
        return self._baselines

    @functools.cached_property
    def _baselines(self) -> dict[str, float]:
        corpus = self.corpus
        batches = self._heldout(AT_ONCE, self.eval_rows)
        if self.packing == "none":
            rows = (batch["tokens"][batch["valid"].all(axis=1)] for batch in batches)
            return ngram_baselines(corpus.train_N, rows, corpus.vocab_size)
        rows = (batch["tokens"] for batch in batches)
        return ngram_baselines(corpus.train_N, rows, corpus.vocab_size, map(inputs_known, batches))

    def about(self) -> dict[str, Any]:
        """The split, the evaluated rows, and the overlap of the two sides."""
        corpus, shared = self.corpus, self.corpus.overlap
        return {
            "text": {
                **dataclasses.asdict(corpus.facts),
                "train_tokens": len(corpus.train_N),
                "heldout_tokens": len(corpus.heldout_N),
                "overlap": dataclasses.asdict(shared) if shared else None,
            },
            "evaluated": self.evaluated,
            **({"packing": packed} if (packed := self._packed()) else {}),
        }

    def _packed(self) -> dict[str, Any]:
        """Numbers of rows, padding and cut documents of each side; empty for windows."""
        sides = {"train": self.train_rows, "heldout": self.heldout_rows}
        return {
            side: {"rows": len(rows), "padding": rows.padding, "cut": rows.cut}
            for side, rows in sides.items()
            if isinstance(rows, Documents)
        }

    def facts(self) -> dict[str, str]:
        lines = remarks.text_lines(self.corpus)
        evaluated = self.evaluated
        lines["evaluation"] = (
            f"{evaluated['rows']} rows, {evaluated['tokens']} tokens"
            + (f", {evaluated['bytes']} bytes" if "bytes" in evaluated else "")
            + f" of the {len(self.corpus.heldout_N)} tokens held out"
        )
        if packed := self._packed().get("train"):
            lines["packing"] = (
                f"{self.packing}: {packed['rows']} rows, {packed['padding']:.1%} of the slots are "
                f"padding, {remarks.documents(packed['cut'])} longer than a row "
                f"{'is' if packed['cut'] == 1 else 'are'} cut"
            )
        return lines

    def warnings(self) -> list[str]:
        return remarks.text_warnings(self.corpus)

    def eval_extras(self, loss: float) -> dict[str, float]:
        evaluated = self.evaluated
        if "bytes" not in evaluated:
            return {}
        return {"bits_per_byte": loss / math.log(2) / (evaluated["bytes"] / evaluated["tokens"])}

    def token_counts(self, vocab_size: int) -> np.ndarray:
        return self.corpus.token_counts(vocab_size)

    def tokens(self, batch: Batch) -> np.ndarray:
        return batch["tokens"][:, :-1]

    def probe_arrays(self, batch: Batch, eval_rows: int) -> dict[str, Any]:
        corpus = self.corpus
        # Prepared shards have ids but no text.
        unknown = [f"<{index}>" for index in range(corpus.vocab_size)]
        arrays = {
            "token": batch["tokens"][:, :-1],
            "target": batch["tokens"][:, 1:],
            "valid": batch["valid"],
            "row": batch["row"],
            "token_text": corpus.origin.tokenizer.token_text() if corpus.origin else unknown,
        }
        label_BL = self.labels(batch["row"], eval_rows)
        if label_BL is not None:
            arrays |= {"label": label_BL, "label_names": NAMES}
        return arrays

    def labels(self, row_B: np.ndarray, eval_rows: int) -> np.ndarray | None:
        """The labels of the inputs of rows of ``eval_batches(_, eval_rows)``, uint8[B, L]; of
        padding, any. None for a text without labels."""
        label_N = heldout_labels(self.corpus)
        if label_N is None:
            return None
        # The separator before the text has the label of those within.
        place_BL = self.heldout_rows.places(self._evaluated_rows(eval_rows)[row_B])
        label_BL = np.where(place_BL < 0, CODE, label_N[np.maximum(place_BL, 0)])
        return label_BL.astype(np.uint8)


def inputs_known(batch: Batch) -> np.ndarray:
    """The number of inputs that each target may be predicted from, int[B, L]: those of its document
    in its row; 0 for no target."""
    valid_BL = batch["valid"]
    at_L = np.arange(valid_BL.shape[1])
    segment_BL = batch.get("segment", np.zeros(valid_BL.shape, np.int32))
    starts_BL = np.ones(valid_BL.shape, bool)
    starts_BL[:, 1:] = ~valid_BL[:, :-1] | (np.diff(segment_BL, axis=1) != 0)
    first_BL = np.maximum.accumulate(np.where(starts_BL, at_L, 0), axis=1)
    return np.where(valid_BL, at_L - first_BL + 1, 0)
