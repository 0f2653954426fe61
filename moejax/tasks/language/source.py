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

FEW = 10_000
"""Held-out tokens below which a run warns: with a deviation of 2 nats between tokens, the mean loss
of so many has a standard error of 0.02 nats."""


MUCH = 0.2
"""Share of held-out bytes in the training text above which a run warns."""


def few_held_out(tokens: int) -> str:
    """The warning of a small held-out side."""
    return (
        f"only {tokens} tokens are held out, and a held-out loss of fewer than {FEW} is mostly "
        "noise; raise data.eval_fraction, name a text in data.eval_path or give more text"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class TextSource:
    """Windows of ``seq_len`` tokens of a corpus, with the token that follows each as its target.

    A batch: ``tokens`` int32[B, L + 1], ``valid`` bool[B, L], ``row`` int32[B].
    """

    corpus: Corpus
    seq_len: int
    batch_size: int
    seed: int
    eval_rows: int
    """Rows of an evaluation, at most: what baselines and bits per byte are of."""

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

    @functools.cached_property
    def evaluated(self) -> dict[str, int]:
        """Rows of an evaluation, their targets, and the bytes of text that these stand for."""
        corpus, length = self.corpus, self.seq_len
        windows = batches.eval_windows(len(corpus.heldout_N), length, self.eval_rows)
        found = {"rows": len(windows), "tokens": len(windows) * length}
        if corpus.heldout_size_M is not None:
            sizes = (corpus.heldout_size_M[w * length + 1 :][:length] for w in windows)
            found["bytes"] = sum(int(size.sum(dtype=np.int64)) for size in sizes)
        return found

    def baselines(self) -> dict[str, float]:
        return self._baselines

    @functools.cached_property
    def _baselines(self) -> dict[str, float]:
        corpus = self.corpus
        rows = (b["tokens"][b["valid"].all(axis=1)] for b in self.eval_batches(64, self.eval_rows))
        return ngram_baselines(corpus.train_N, rows, corpus.vocab_size)

    def about(self) -> dict[str, Any]:
        """The split, what was evaluated, and what the held-out side shares with the other."""
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
        seen = self.evaluated
        said = {}
        if facts.split:
            beside = f", {facts.unread_documents} are not read" if facts.unread_documents else ""
            copies = f", {facts.copies} near copies left out" if facts.copies else ""
            said["held out"] = (
                f"{facts.split}: {_documents(facts.heldout_documents)} beside "
                f"{facts.train_documents} to train on{beside}{copies}"
            )
        said["evaluation"] = (
            f"{seen['rows']} rows, {seen['tokens']} tokens"
            + (f", {seen['bytes']} bytes" if "bytes" in seen else "")
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
            said["overlap"] = (
                f"{shared.share:.1%} of held-out bytes are in a {shared.window}-byte window that "
                f"the training text has too{compared}"
            )
        if facts.separator and corpus.vocab_size != 256:
            said["separator"] = f"{facts.separator} between documents"
        return said

    def warnings(self) -> list[str]:
        corpus, shared = self.corpus, self.corpus.overlap
        said = [corpus.facts.warning] if corpus.facts.warning else []
        if len(corpus.heldout_N) < FEW:
            said.append(few_held_out(len(corpus.heldout_N)))
        if shared and shared.share > MUCH:
            said.append(
                f"{shared.share:.0%} of held-out bytes occur in the training text too, so that the "
                "held-out loss is partly one of training text; remove copies from data.path or "
                "name another text in data.eval_path"
            )
        if "bytes" not in self.evaluated:
            said.append(
                "these shards are of an older version and do not say which bytes their tokens "
                "stand for, so there are no bits per byte; prepare the text again for them"
            )
        return said

    def eval_extras(self, loss: float) -> dict[str, float]:
        seen = self.evaluated
        if "bytes" not in seen:
            return {}
        return {"bits_per_byte": loss / math.log(2) / (seen["bytes"] / seen["tokens"])}

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


def _documents(count: int) -> str:
    return "1 document" if count == 1 else f"{count} documents"
