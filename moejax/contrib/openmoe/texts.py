"""The texts that a checkpoint routes: its own held-out one, and others by path."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from moejax.contrib.openmoe.interval import GROUPS
from moejax.data.corpus import Corpus
from moejax.data.documents import find_documents
from moejax.data.domains import NAMES
from moejax.data.load import load_corpus
from moejax.data.shards import is_prepared
from moejax.data.text_stream import encode_documents
from moejax.errors import UserError
from moejax.record.routing import Routed
from moejax.tasks.language.mixture import Mixture
from moejax.tasks.language.source import TextSource
from moejax.tasks.language.windows import heldout_windows
from moejax.train.setup import Run

OWN = "held out"
"""The name of the run's own text."""
MOSTLY = 0.5
"""A row belongs to a domain if more than this share of its tokens does."""


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """Rows of a text in batches, as ``eval_batches`` gives them."""

    name: str
    batches: list[dict[str, np.ndarray]]
    label_NL: Int[np.ndarray, "N L"] | None = None
    names: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.token_NL)

    @property
    def token_NL(self) -> Int[np.ndarray, "N L"]:
        """The tokens that are routed, without rows that only fill a batch up."""
        return np.concatenate([x["tokens"][x["valid"].any(axis=1), :-1] for x in self.batches])

    @property
    def valid_NL(self) -> Bool[np.ndarray, "N L"]:
        return np.concatenate([x["valid"][x["valid"].any(axis=1)] for x in self.batches])

    def head(self, rows: int) -> "Text":
        """About ``rows`` rows: whole batches spread over the text."""
        size = len(self.batches[0]["row"])
        count = min(max(rows // size, 1), len(self.batches))
        chosen = [self.batches[i * len(self.batches) // count] for i in range(count)]
        return Text(self.name, chosen)


def all_texts(run: Run, paths: Sequence[str], rows: int) -> list[Text]:
    """The run's held-out text and those at the paths, up to ``rows`` rows of each.

    Raises:
      UserError: nothing to read, a text too short for a row, or tokens of another vocabulary.
    """
    own = _own_texts(run, rows)
    others = {_name(path): path for path in paths}
    if len(others) < len(paths) or not {text.name for text in own}.isdisjoint(others):
        raise UserError(f"--data={' '.join(paths)}: the texts need names of their own; rename one")
    return [*own, *(_text(run, name, _tokens(run, path), rows) for name, path in others.items())]


def _own_texts(run: Run, rows: int) -> list[Text]:
    """The run's held-out text, or that of each source of a mixture."""
    data, batch_size = run.data, run.config.train.batch_size
    if isinstance(data, Mixture):
        sources = data.by_name().items()
        return [Text(name, member.eval_batches(batch_size, rows)) for name, member in sources]
    assert isinstance(data, TextSource), "only runs on text are measured"
    source = dataclasses.replace(data, choices=None)
    own = Text(OWN, source.eval_batches(batch_size, rows))
    label_NL = source.labels(np.arange(own.rows), rows)
    if label_NL is not None:
        own = dataclasses.replace(own, label_NL=label_NL, names=NAMES)
    return [own]


def corpus_of(run: Run) -> Corpus:
    """The text that a run has learned from, or a source of its mixture whose tokenizer is known."""
    assert isinstance(run.data, TextSource | Mixture), "only runs on text are measured"
    return run.data.corpus


def domains(routed: Routed) -> Iterator[tuple[str, np.ndarray]]:
    """The domains of a labelled text, each with the rows that mostly belong to it.

    Domains with too few rows for an interval are left out, and so is the only one.
    """
    if routed.label_NL is None:
        return
    named_rows = []
    for label, name in enumerate(routed.names):
        in_domain_NL = (routed.label_NL == label) & routed.valid_NL
        mostly_N = in_domain_NL.sum(axis=1) > MOSTLY * routed.valid_NL.sum(axis=1)
        if mostly_N.sum() >= GROUPS:
            named_rows.append((f"mostly {name}", np.flatnonzero(mostly_N)))
    if len(named_rows) > 1:
        yield from named_rows


def _text(run: Run, name: str, tokens_N: Any, rows: int) -> Text:
    train = run.config.train
    return Text(name, heldout_windows(tokens_N, train.seq_len, train.batch_size, rows))


def _name(path: str) -> str:
    return os.path.basename(os.path.abspath(os.path.expanduser(path)))


def _tokens(run: Run, path: str) -> np.ndarray:
    """The whole text at a path as the run's tokens; for prepared shards, their held-out part.

    Raises:
      UserError: see `all_texts`.
    """
    folder = os.path.expanduser(path)
    if not os.path.exists(folder):
        raise UserError(f"--data={path} does not exist; name a file or folder of text")
    corpus = corpus_of(run)
    if is_prepared(folder):
        return _same_vocabulary(corpus, load_corpus(path), path).heldout_N[:]
    if corpus.origin is None:
        raise UserError(
            f"--data={path}: the run was trained on prepared tokens, so its tokenizer is not "
            "known; prepare this text with it (moejax data prepare) and name the result"
        )
    documents = find_documents(path, "--data")
    parts = [tokens for tokens, _ in encode_documents(documents, corpus.origin.tokenizer)]
    return np.concatenate(parts)


def _same_vocabulary(own: Corpus, other: Corpus, path: str) -> Corpus:
    if other.vocab_size != own.vocab_size:
        raise UserError(
            f"--data={path} holds tokens of a vocabulary of {other.vocab_size}, the run's has "
            f"{own.vocab_size}; prepare the text with the run's tokenizer"
        )
    return other
