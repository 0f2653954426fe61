"""Text as rows of tokens: a corpus in the form that the training loop asks for."""

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from moejax.data.baselines import ngram_baselines
from moejax.data.batches import TrainBatches, spread_evenly
from moejax.data.corpus import Corpus
from moejax.data.domains import NAMES, heldout_labels
from moejax.data.source import Batch
from moejax.errors import UserError
from moejax.record.experts import Choices
from moejax.tasks.language.windows import Windows, heldout_windows, train_windows

FEW = 10_000
"""Held-out tokens below which a run warns. At a standard deviation of 2 nats between tokens, the
standard error of their mean loss is 0.02 nats."""

MUCH = 0.2
"""Share of held-out bytes found in the training text above which a run warns."""


def few_held_out(tokens: int) -> str:
    """The warning about a small held-out side."""
    return (
        f"only {tokens} tokens are held out, and a held-out loss of fewer than {FEW} is mostly "
        "noise; raise data.eval_fraction, name a text in data.eval_path or give more text"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class TextSource:
    """Windows of ``seq_len`` tokens of a corpus, with the token that follows each as its target.

    A batch: ``tokens`` int32[B, L + 1], ``valid`` bool[B, L], ``row`` int32[B]; with ``choices``
    also ``experts`` int32[B, L, M, K], see ``Context.expert_BLMK``.
    """

    corpus: Corpus
    seq_len: int
    batch_size: int
    seed: int
    eval_rows: int
    """Most rows of an evaluation. Baselines and bits per byte are computed on the same rows."""
    choices: Choices | None = None
    """Experts that were chosen elsewhere for rows of this text."""

    @property
    def name(self) -> str:
        return self.corpus.name

    @property
    def fingerprint(self) -> str:
        return self.corpus.fingerprint

    @functools.cached_property
    def train(self) -> TrainBatches:
        """Raises UserError if the text is too short for one row."""
        return train_windows(self.corpus.train_N, self.seq_len, self.batch_size, self.seed)

    def size(self) -> tuple[int, int]:
        return self.corpus.train_N.size, self.corpus.heldout_N.size

    def shapes(self, rows: int) -> Batch:
        shapes = {
            "tokens": np.zeros((rows, self.seq_len + 1), np.int32),
            "valid": np.zeros((rows, self.seq_len), np.bool_),
            "row": np.zeros(rows, np.int32),
        }
        return self._with_experts(shapes)

    def train_batch(self, step: int) -> Batch:
        return self._with_experts(self.train.batch(step))

    def eval_batches(self, batch_size: int, rows: int) -> list[Batch]:
        batches = heldout_windows(self.corpus.heldout_N, self.seq_len, batch_size, rows)
        return list(map(self._with_experts, batches))

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
        batches = heldout_windows(
            self.corpus.heldout_N, self.seq_len, self.batch_size, self.eval_rows
        )
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
        """The windows of ``eval_batches``."""
        return spread_evenly(len(Windows(self.corpus.heldout_N, self.seq_len, "held-out")), rows)

    @functools.cached_property
    def evaluated(self) -> dict[str, int]:
        """Rows of an evaluation, their targets, and the bytes of text that the targets encode."""
        corpus, length = self.corpus, self.seq_len
        row_N = self._evaluated_rows(self.eval_rows)
        counts = {"rows": len(row_N), "tokens": len(row_N) * length}
        if corpus.heldout_size_M is not None:
            sizes = (corpus.heldout_size_M[row * length + 1 :][:length] for row in row_N)
            counts["bytes"] = sum(int(size.sum(dtype=np.int64)) for size in sizes)
        return counts

    def baselines(self) -> dict[str, float]:
        return self._baselines

    @functools.cached_property
    def _baselines(self) -> dict[str, float]:
        corpus = self.corpus
        rows = (b["tokens"][b["valid"].all(axis=1)] for b in self.eval_batches(64, self.eval_rows))
        return ngram_baselines(corpus.train_N, rows, corpus.vocab_size)

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
        }

    def facts(self) -> dict[str, str]:
        corpus, facts, shared = self.corpus, self.corpus.facts, self.corpus.overlap
        evaluated = self.evaluated
        lines = {}
        if facts.split:
            unread = f", {facts.unread_documents} are not read" if facts.unread_documents else ""
            copies = f", {facts.copies} near copies left out" if facts.copies else ""
            lines["held out"] = (
                f"{facts.split}: {_documents(facts.heldout_documents)} beside "
                f"{facts.train_documents} to train on{unread}{copies}"
            )
        lines["evaluation"] = (
            f"{evaluated['rows']} rows, {evaluated['tokens']} tokens"
            + (f", {evaluated['bytes']} bytes" if "bytes" in evaluated else "")
            + f" of the {len(corpus.heldout_N)} tokens held out"
        )
        if shared:
            compared = (
                ""
                if shared.complete
                else (
                    f" at least ({shared.heldout_bytes / 2**20:.0f} MiB compared with "
                    f"{shared.train_bytes / 2**20:.0f} MiB of the training text)"
                )
            )
            lines["overlap"] = (
                f"{shared.share:.1%} of held-out bytes are in a {shared.window}-byte window that "
                f"the training text has too{compared}"
            )
        if facts.separator and corpus.vocab_size != 256:
            opening = f", {facts.opening} before each" if facts.opening else ""
            lines["separator"] = f"{facts.separator} between documents{opening}"
        return lines

    def warnings(self) -> list[str]:
        corpus, shared = self.corpus, self.corpus.overlap
        lines = [corpus.facts.warning] if corpus.facts.warning else []
        if len(corpus.heldout_N) < FEW:
            lines.append(few_held_out(len(corpus.heldout_N)))
        if shared and shared.share > MUCH:
            lines.append(
                f"{shared.share:.0%} of held-out bytes occur in the training text too, so that the "
                "held-out loss is partly a training loss; remove copies from data.path or "
                "name another text in data.eval_path"
            )
        if "bytes" not in self.evaluated:
            lines.append(
                "these shards are of an older version and do not record how many bytes each token "
                "encodes, so there are no bits per byte; prepare the text again to get them"
            )
        return lines

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
        labels_N = heldout_labels(corpus)
        if labels_N is not None:
            start_N = self._evaluated_rows(eval_rows)[batch["row"]] * self.seq_len
            label_NL = labels_N[start_N[:, None] + np.arange(self.seq_len)]
            arrays |= {"label": label_NL, "label_names": NAMES}
        return arrays


def _documents(count: int) -> str:
    return "1 document" if count == 1 else f"{count} documents"
