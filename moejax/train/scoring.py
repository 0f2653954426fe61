"""Nats of given tokens under a run's language model, row by row."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from moejax.config import Config
from moejax.config.build import make_gate
from moejax.config.checks import has_experts
from moejax.config.tasks import LANGUAGE
from moejax.data.tokenizers.byte import ByteTokenizer
from moejax.data.tokenizers.interface import Tokenizer, before_documents
from moejax.data.tokenizers.load import load_tokenizer
from moejax.errors import UserError
from moejax.tasks.language.mixture import Mixture
from moejax.tasks.language.source import TextSource
from moejax.tasks.language.task import LanguageModel
from moejax.tasks.task import Batch
from moejax.train.processes import compiled_together, on_host
from moejax.train.setup import Run
from moejax.train.state import TrainState
from moejax.types import GateTraits


class Scored(NamedTuple):
    """The targets of one row of N + 1 tokens: the second and later ones."""

    nats_N: Float[np.ndarray, " N"]
    """-log p of each, given the row's earlier tokens; float32."""
    greedy_N: Bool[np.ndarray, " N"]
    """True where no other token is more likely."""


def check(config: Config, what: str) -> None:
    """Refuses runs whose model gives no probability to a text of one's own.

    Raises:
      UserError: another task, or a gate that routes recorded rows; names ``what`` was asked for.
    """
    if config.task.name != LANGUAGE:
        raise UserError(
            f"{what}: task.name={config.task.name} predicts no text; name the workdir of a run "
            f"with task.name={LANGUAGE}"
        )
    if has_experts(config) and GateTraits.of(make_gate(config)).check_rows is not None:
        raise UserError(
            f"{what}: moe.gate.name={config.moe.gate.name} routes the rows that it was recorded "
            "for, and this text is none of them; evaluate the run that was recorded"
        )


def tokenizer_of(run: Run, path: str = "") -> Tokenizer:
    """The tokenizer of a run's text; ``path`` names it where the text is prepared shards.

    Raises:
      UserError: it is not known, or has other tokens than the run's.
    """
    source = run.data
    assert isinstance(source, TextSource | Mixture), "see check"
    corpus = source.corpus
    if corpus.origin and not path:
        return corpus.origin.tokenizer
    if not path and (corpus.vocab_size, corpus.separator) == (256, 0):
        return ByteTokenizer()
    if not path:
        raise UserError(
            f"data.path={run.config.data.path!r} holds tokens and no tokenizer; name the "
            "tokenizer that they were made with, --tokenizer=FILE"
        )
    tokenizer = load_tokenizer(path, "auto" if corpus.opening else "none")
    if corpus.facts.arrays and tokenizer.vocab_size <= corpus.vocab_size:
        return tokenizer  # arrays of ids do not tell their separator
    own = tokenizer.vocab_size, tokenizer.separator, before_documents(tokenizer)
    if own != (corpus.vocab_size, corpus.separator, corpus.opening):
        raise UserError(
            f"--tokenizer={path!r} has {tokenizer.vocab_size} tokens, separator "
            f"{tokenizer.separator} and opening {list(own[2])}, but the run's text "
            f"{corpus.vocab_size}, {corpus.separator} and {list(corpus.opening)}; name the "
            "tokenizer of the run"
        )
    return tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """A run's model in evaluation. One program is compiled for each length of rows."""

    run: Run
    state: TrainState
    _programs: dict[int, Callable[..., Any]] = dataclasses.field(default_factory=dict)

    def __call__(
        self, rows: Sequence[Integer[np.ndarray, " N"]], length: int, first: int = 0
    ) -> Iterator[Scored]:
        """The targets of each row of 2 to ``length`` + 1 tokens, whose ids count from ``first``.

        Rows are computed ``train.batch_size`` at a time, with padding behind each, and rows of
        padding behind the last. Call it under the run's mesh.
        """
        size = self.run.config.train.batch_size
        for begin in range(0, len(rows), size):
            part = rows[begin : begin + size]
            batch = self._empty(length)
            batch["row"] += first + begin
            for i, row in enumerate(part):
                batch["tokens"][i, : len(row)] = row
                batch["valid"][i, : len(row) - 1] = True
            # One batch at a time: see Run.evaluate.
            nats_BL, greedy_BL = on_host(self._program(length)(self.state, self.run.put(batch)))
            for i, row in enumerate(part):
                yield Scored(nats_BL[i, : len(row) - 1], greedy_BL[i, : len(row) - 1])

    def _empty(self, length: int) -> dict[str, np.ndarray]:
        size = self.run.config.train.batch_size
        return {
            "tokens": np.zeros((size, length + 1), np.int32),
            "valid": np.zeros((size, length), bool),
            "row": np.arange(size, dtype=np.int32),
        }

    def _program(self, length: int) -> Callable[..., Any]:
        if length not in self._programs:
            task = self.run.task
            assert isinstance(task, LanguageModel), "see check"
            jitted = jax.jit(functools.partial(_scores, task=task))
            batch = self.run.put(self._empty(length))
            self._programs[length] = compiled_together(jitted, self.run.abstract_state, batch)
        return self._programs[length]


def _scores(
    state: TrainState, batch: Batch, *, task: LanguageModel
) -> tuple[Float[Array, "B L"], Bool[Array, "B L"]]:
    key = jax.random.wrap_key_data(state.key)
    logits_BLV, _ = task.apply(state.params, state.gate_state, batch, state.step, key, train=False)
    nats_BL = task.token_losses(logits_BLV, batch)
    target_BL1 = batch["tokens"][:, 1:, None]
    best_BL = jnp.max(logits_BLV, axis=-1)
    return nats_BL, jnp.take_along_axis(logits_BLV, target_BL1, axis=-1)[..., 0] >= best_BL
