"""Several texts with weights, as one source of rows: ``data.mixture``.

Every row is from one text. The order of rows takes turns among the texts (``moejax.data.shares``):
which text and which of its rows is at a position follows from the seed and the position alone, on
any number of hosts. The share of a text among all rows so far is its weight, to within a few rows,
and a text that is at its end begins again, in another order.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int64

from moejax.config.mixture import FIELD, Part, parts_of
from moejax.config.tree import Config
from moejax.data.batches import TrainBatches, batches_of, spread_evenly
from moejax.data.corpus import COUNTED, Corpus
from moejax.data.load import load
from moejax.data.shards import is_prepared
from moejax.data.shares import Turns, apportioned, interleaved, mixed_order
from moejax.data.source import Batch
from moejax.errors import UserError
from moejax.tasks.language.rows import Rows
from moejax.tasks.language.source import TextSource

T = TypeVar("T")

SOURCE = "source"
"""The array of a batch that numbers the text of each row."""
REPEATED = 4.0
"""Epochs of a text above which a run warns: up to 4, text that is repeated costs next to nothing
compared with as much new text, and with more epochs its value decays to zero (Muennighoff et al.
2023, "Scaling Data-Constrained Language Models", arXiv 2305.16264)."""


def open_mixture(config: Config) -> "Mixture":
    """The texts of ``data.mixture``.

    Raises:
      UserError: a text that cannot be read, is too short for a row, or has other tokens.
    """
    parts, train = parts_of(config.data.mixture), config.train
    corpus_of = {part.name: _load(config, part) for part in parts}
    (first, common), *others = corpus_of.items()
    for name, corpus in others:
        if _tokens(corpus) != _tokens(common):
            raise UserError(
                f"{FIELD}: {name!r} has {_tokens(corpus)}, and {first!r} has {_tokens(common)}; a "
                "model reads the tokens of one tokenizer, so make both with the same "
                "(data.tokenizer, or moejax data prepare --tokenizer)"
            )
    counts = apportioned(train.eval_rows, [part.share for part in parts])
    members = [
        TextSource(
            corpus_of[part.name],
            train.seq_len,
            train.batch_size,
            train.seed,
            count,
            packing=config.data.packing,
        )
        for part, count in zip(parts, counts, strict=True)
    ]
    return Mixture(
        parts, tuple(members), train.batch_size, train.seed, train.eval_rows, train.steps
    )


def _load(config: Config, part: Part) -> Corpus:
    own = Config(config.data.to_dict())
    own.path, own.mixture = part.path, ""
    if is_prepared(os.path.expanduser(part.path)):  # its tokens are compared with the others'
        own.tokenizer = ""
    with _named(part.name):
        return load(own, config.model.vocab_size)


def _tokens(corpus: Corpus) -> str:
    """The tokens of a text in words: equal for texts of one tokenizer."""
    opening = f" and {corpus.opening} before each" if corpus.opening else ""
    return f"{corpus.vocab_size} tokens with {corpus.separator} between documents{opening}"


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Puts the name of a text before the mistakes that are found in it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{FIELD}: source {name!r}: {error}") from error


@dataclasses.dataclass(frozen=True, eq=False)
class _Joined:
    """Rows of several texts, numbered one after the other. ``read`` also gives ``source``."""

    sides: Sequence[Rows]

    @functools.cached_property
    def begins(self) -> Int64[np.ndarray, " S"]:
        """The first row of each text."""
        return np.cumsum([0, *map(len, self.sides)], dtype=np.int64)[:-1]

    def __len__(self) -> int:
        return sum(map(len, self.sides))

    def read(self, row_B: Int64[np.ndarray, " B"], position_B: Int64[np.ndarray, " B"]) -> Batch:
        source_B = np.searchsorted(self.begins, row_B, side="right") - 1
        arrays: Batch = {}
        for source in np.unique(source_B):
            own = source_B == source
            part = self.sides[source].read(row_B[own] - self.begins[source], position_B[own])
            for name, values in part.items():
                shape = (len(row_B), *values.shape[1:])
                arrays.setdefault(name, np.zeros(shape, values.dtype))[own] = values
        return {**arrays, SOURCE: source_B.astype(np.int32)}


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """Rows of several texts in the shares of their weights.

    A batch is one of ``TextSource`` with ``source`` int32[B], the number of each row's text. Of the
    held-out rows each text has its share, and the loss of an evaluation is their mean.
    """

    parts: tuple[Part, ...]
    members: tuple[TextSource, ...]
    """The texts; each evaluates its share of ``eval_rows``."""
    batch_size: int
    seed: int
    eval_rows: int
    steps: int
    """Steps of the run, for the number of epochs of each text."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts)

    def by_name(self) -> dict[str, TextSource]:
        return dict(zip(self.names, self.members, strict=True))

    @property
    def name(self) -> str:
        return "mixture of " + ", ".join(f"{p.name} ({float(p.share):.3g})" for p in self.parts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, weights and the texts' fingerprints."""
        content = [
            (part.name, str(part.share), member.fingerprint)
            for part, member in zip(self.parts, self.members, strict=True)
        ]
        return hashlib.sha256(repr(content).encode()).hexdigest()

    @property
    def corpus(self) -> Corpus:
        """A text whose tokenizer is known, if there is one; all have the same tokens."""
        corpora_ = [member.corpus for member in self.members]
        return next((corpus for corpus in corpora_ if corpus.origin), corpora_[0])

    @functools.cached_property
    def _train_rows(self) -> _Joined:
        """Raises UserError if a text is too short for one row, or cannot be packed."""
        return _Joined(self._each(lambda member: member.train_rows))

    @functools.cached_property
    def _heldout_rows(self) -> _Joined:
        """Raises UserError if a text is too short for one row, or cannot be packed."""
        return _Joined(self._each(lambda member: member.heldout_rows))

    def _each(self, read: Callable[[TextSource], T]) -> list[T]:
        """The values that ``read`` gives of the texts; a mistake names the text."""
        found = []
        for name, member in self.by_name().items():
            with _named(name):
                found.append(read(member))
        return found

    @property
    def _shares(self) -> list[Fraction]:
        return [part.share for part in self.parts]

    @functools.cached_property
    def train(self) -> TrainBatches:
        rows = self._train_rows
        lengths = list(map(len, rows.sides))
        order = mixed_order(lengths, self._shares, self.names, self.seed)
        return TrainBatches(len(rows), self.batch_size, self.seed, rows.read, order)

    def of_length(self, seq_len: int) -> "Mixture":
        """The same texts in rows of another length."""
        members = tuple(member.of_length(seq_len) for member in self.members)
        return dataclasses.replace(self, members=members)

    def size(self) -> tuple[int, int]:
        sizes = [member.size() for member in self.members]
        return sum(train for train, _ in sizes), sum(heldout for _, heldout in sizes)

    def shapes(self, rows: int) -> Batch:
        return {**self.members[0].shapes(rows), SOURCE: np.zeros(rows, np.int32)}

    def train_batch(self, step: int) -> Batch:
        return self.train.batch(step)

    def eval_batches(self, batch_size: int, rows: int) -> list[Batch]:
        """The held-out rows of each text, evenly spread over it, in turns."""
        joined = self._heldout_rows
        counts = [
            min(count, len(side))
            for count, side in zip(apportioned(rows, self._shares), joined.sides, strict=True)
        ]
        source_N = interleaved(counts)
        row_N = np.zeros(len(source_N), np.int64)
        for source, (side, count) in enumerate(zip(joined.sides, counts, strict=True)):
            if count:
                own_N = joined.begins[source] + spread_evenly(len(side), count)
                row_N[source_N == source] = own_N
        return batches_of(row_N, batch_size, joined.read)

    @functools.cached_property
    def epochs(self) -> dict[str, float]:
        """Times that each text is read in the whole run."""
        counts = Turns(self._shares).counts(self.steps * self.batch_size)
        sides = self._train_rows.sides
        return {
            name: count / len(side)
            for name, count, side in zip(self.names, counts, sides, strict=True)
        }

    @functools.cached_property
    def evaluated(self) -> dict[str, int]:
        """Rows of an evaluation, their targets, and the bytes of text that the targets encode."""
        counts = self._each(lambda member: member.evaluated)
        known = set.intersection(*(set(count) for count in counts))
        return {key: sum(count[key] for count in counts) for key in counts[0] if key in known}

    def extras_apart(self, row: dict[str, Any]) -> dict[str, float]:
        return {
            f"{extra}/{name}": value
            for name, member in self.by_name().items()
            for extra, value in member.eval_extras(row[f"loss/{name}"]).items()
        }

    def baselines(self) -> dict[str, float]:
        """The mean over the evaluated targets of the texts' own baselines."""
        tokens = [member.evaluated["tokens"] for member in self.members]
        each = [member.baselines() for member in self.members]
        return {
            name: sum(n * own[name] for n, own in zip(tokens, each, strict=True)) / sum(tokens)
            for name in each[0]
        }

    def about(self) -> dict[str, Any]:
        """The share and the epochs of each text, beside what a run on it alone would say."""
        mixture = {
            part.name: {
                "share": float(part.share),
                "epochs": self.epochs[part.name],
                "corpus": member.name,
                "fingerprint": member.fingerprint,
                "baselines": member.baselines(),
                **member.about(),
            }
            for part, member in zip(self.parts, self.members, strict=True)
        }
        return {"mixture": mixture, "evaluated": self.evaluated}

    def facts(self) -> dict[str, str]:
        """The share and the epochs of each text, and what a run on it alone would say."""
        rows = Turns(self._shares).counts(self.steps * self.batch_size)
        lines, each = {}, {}
        for i, (part, member) in enumerate(zip(self.parts, self.members, strict=True)):
            lines[f"source {part.name}"] = (
                f"{float(part.share):.3g} of the rows; {self.epochs[part.name]:.2f} epochs of "
                f"{member.name} in {self.steps} steps ({rows[i]} rows read, of "
                f"{len(self._train_rows.sides[i])})"
            )
            for heading, text in member.facts().items():
                each.setdefault(heading, {})[part.name] = text
        for heading, by_name in each.items():
            alike = len(set(by_name.values())) == 1 and len(by_name) == len(self.parts)
            texts = [f"{name}: {text}" for name, text in by_name.items()]
            lines[heading] = f"each: {texts[0].partition(': ')[2]}" if alike else "; ".join(texts)
        return lines

    def warnings(self) -> list[str]:
        lines = []
        for part, member in zip(self.parts, self.members, strict=True):
            lines += [f"source {part.name}: {text}" for text in member.warnings()]
        lines += [
            f"{FIELD}: {name!r} is read {epochs:.3g} times in train.steps={self.steps}, and text "
            f"read more than {REPEATED:g} times teaches less and less; lower its weight or "
            "train.steps, or give more of it"
            for name, epochs in self.epochs.items()
            if epochs > REPEATED
        ]
        return lines + self._unequal()

    def _unequal(self) -> list[str]:
        """Texts with fewer held-out rows than their share."""
        wanted = apportioned(self.eval_rows, self._shares)
        found = [member.evaluated["rows"] for member in self.members]
        return [
            f"{FIELD}: {name!r} has {there} held-out rows, fewer than its share of {count} of "
            f"train.eval_rows={self.eval_rows}, so that it counts {there / sum(found):.2g} in the "
            "held-out loss; lower train.eval_rows or raise data.eval_fraction"
            for name, count, there in zip(self.names, wanted, found, strict=True)
            if there < count
        ]

    def eval_extras(self, loss: float) -> dict[str, float]:
        evaluated = self.evaluated
        if "bytes" not in evaluated:
            return {}
        return {"bits_per_byte": loss / math.log(2) / (evaluated["bytes"] / evaluated["tokens"])}

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """Counts in proportion to those of training: each text's shares, in its own share."""
        expected = np.zeros(max(vocab_size, self.corpus.vocab_size))
        for part, member in zip(self.parts, self.members, strict=True):
            counts = member.token_counts(vocab_size)
            expected += float(part.share) * counts / max(counts.sum(), 1)
        return np.ceil(COUNTED * expected).astype(np.int64)

    def tokens(self, batch: Batch) -> np.ndarray:
        return batch["tokens"][:, :-1]

    def probe_arrays(self, batch: Batch, eval_rows: int) -> dict[str, Any]:
        """Those of a text; the label of a token is the text that it is from."""
        corpus = self.corpus
        unknown = [f"<{index}>" for index in range(corpus.vocab_size)]
        return {
            "token": batch["tokens"][:, :-1],
            "target": batch["tokens"][:, 1:],
            "valid": batch["valid"],
            "row": batch["row"],
            "token_text": corpus.origin.tokenizer.token_text() if corpus.origin else unknown,
            "label": np.broadcast_to(batch[SOURCE][:, None], batch["valid"].shape).astype(np.uint8),
            "label_names": self.names,
        }
