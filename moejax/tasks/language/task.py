"""Language modelling: the next token of a text."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from moejax.config import Config
from moejax.config.build import loss_weights, options_of, stack_options
from moejax.data.load import load
from moejax.data.source import Source
from moejax.errors import UserError
from moejax.losses import CONSISTENCY, symmetric_kl
from moejax.options import TextOptions
from moejax.record import experts
from moejax.tasks.language.mixture import Mixture, open_mixture
from moejax.tasks.language.model import LM, LMConfig
from moejax.tasks.language.source import TextSource
from moejax.tasks.language.stream import is_stream, open_stream
from moejax.tasks.task import Batch, Ratio, Task, Totals, Units
from moejax.types import Context, LayerAux, Tap

SECOND_PASS = 2**31 - 1
"""Derives the key of the second pass from that of the first."""


def build(config: Config) -> tuple[Task, Source]:
    """The decoder and its text.

    Raises:
      UserError: text or tokenizer that cannot be read, or a vocabulary that is too small.
    """
    source = _open(config)
    vocab_size = source.corpus.vocab_size
    if config.model.vocab_size and config.model.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's "
            f"{vocab_size}; raise it or set 0 to take the tokenizer's"
        )
    names = source.names if isinstance(source, Mixture) else ()
    task = LanguageModel.from_config(config, vocab_size, names)
    if isinstance(source, TextSource):
        choices = _choices(config.moe.replay, task.model, config.train.seq_len)
        source = dataclasses.replace(source, choices=choices)
    # Rows of windows are whole. In rows of documents, ``segment`` tells of places between them.
    return dataclasses.replace(task, padded_behind=True), source


def _open(config: Config) -> TextSource | Mixture:
    """The text, or the texts, of a config."""
    if is_stream(config.data):
        return open_stream(config)
    if config.data.mixture:
        return open_mixture(config)
    train = config.train
    return TextSource(
        load(config.data, config.model.vocab_size),
        train.seq_len,
        train.batch_size,
        train.seed,
        train.eval_rows,
        packing=config.data.packing,
    )


def _choices(path: str, model: LMConfig, length: int) -> experts.Choices | None:
    """The experts of a file for the model's MoE layers; None without a file.

    Raises:
      UserError: they cannot be read, or do not fit the model.
    """
    if not path:
        return None
    sparse = [layer for layer in range(model.num_layers) if model.is_sparse(layer)]
    num_experts = model.moe.num_experts
    try:
        return experts.fitted(
            experts.load(path),
            sparse,
            model.num_layers,
            model.gate.columns(num_experts),
            num_experts,
            length,
        )
    except ValueError as error:
        raise UserError(f"moe.replay={path!r} {error}") from error


@dataclasses.dataclass(frozen=True)
class LanguageModel(Task):
    """A decoder LM with its loss: cross-entropy of the next token.

    A batch may hold packed documents, with ``segment``: see `moejax.tasks.language.packing`.

    If a consistency loss runs the batch twice in training, tokens count once, ``metrics`` and
    ``stats`` are those of the first pass, and everything else is the mean of both passes.
    """

    seq_len: int
    padded_behind: bool = False
    """A property of the source's batches: see ``Context``."""
    sources: tuple[str, ...] = ()
    """Names of the texts of a mixture, which ``source`` int32[B] of a batch numbers: rows have the
    loss and the accuracy of each."""

    causal: ClassVar[bool] = True

    @classmethod
    def from_config(
        cls, config: Config, vocab_size: int, sources: tuple[str, ...] = ()
    ) -> "LanguageModel":
        model = config.model
        return cls(
            stack_options(
                config,
                LMConfig,
                experts={
                    "vocab_size": model.vocab_size or vocab_size,
                    "num_sources": max(len(sources), 1),
                },
                text=options_of(config, TextOptions),
            ),
            loss_weights(config),
            config.optim.output_z_loss,
            config.train.seq_len,
            sources=sources,
        )

    @property
    def units(self) -> Units:
        return Units("token", "nats/token", self.seq_len, self.seq_len)

    def module(self, rngs: nnx.Rngs) -> LM:
        return LM(self.model, rngs=rngs)

    def apply(
        self,
        params: PyTree,
        gate_state: PyTree,
        batch: Batch,
        step: Array,
        key: Array,
        train: bool,
        tap: Tap | None = None,
    ) -> tuple[Float[Array, "B L V"], LayerAux]:
        token_BL = batch["tokens"][:, :-1]
        context = Context.of(
            *token_BL.shape,
            token_BL=token_BL,
            segment_BL=batch.get("segment"),
            valid_BL=batch["valid"],
            row_B=batch["row"],
            step=step,
            key=jax.random.fold_in(key, step),
            # In packed rows the last token of a document may be padding: see `packing`.
            padded_behind=self.padded_behind and "segment" not in batch,
            expert_BLMK=batch.get("experts"),
            source_B=batch.get("source"),
        )
        return self.built(params)(token_BL, context, gate_state, train, tap)

    def forward(
        self, params: PyTree, gate_state: PyTree, batch: Batch, step: Array, key: Array, train: bool
    ) -> Totals:
        logits_BLV, aux = self.apply(params, gate_state, batch, step, key, train)
        totals = self._totals(logits_BLV, aux, batch)
        if not (train and dict(self.loss_weights).get(CONSISTENCY)):
            return totals
        key = jax.random.fold_in(key, SECOND_PASS)
        other_BLV, aux = self.apply(params, gate_state, batch, step, key, train)
        with jax.named_scope("loss"):
            divergence = symmetric_kl(logits_BLV, other_BLV, batch["valid"])
        return _mean_of_passes(totals, self._totals(other_BLV, aux, batch), divergence)

    def _totals(self, logits_BLV: Array, aux: LayerAux, batch: Batch) -> Totals:
        target_BL, valid_BL = batch["tokens"][:, 1:], batch["valid"]
        with jax.named_scope("loss"):
            log_z_BL, nats_BL = cross_entropy(logits_BLV, target_BL)
            hit_BL = jnp.argmax(logits_BLV, axis=-1) == target_BL
            apart = self._by_source(nats_BL, hit_BL, batch)
        metrics = {"accuracy": hit_BL.astype(jnp.int32), **apart}
        return self.totals(aux, nats_BL, valid_BL, metrics, -nats_BL, valid_BL, log_z_BL)

    def _by_source(self, nats_BL: Array, hit_BL: Array, batch: Batch) -> dict[str, Ratio]:
        """Loss and accuracy of the rows of each source."""
        metrics = {}
        for number, name in enumerate(self.sources):
            own_BL = jnp.broadcast_to(batch["source"][:, None] == number, nats_BL.shape)
            count_BL = own_BL.astype(jnp.int32)
            metrics[f"loss/{name}"] = Ratio(jnp.where(own_BL, nats_BL, 0.0), count_BL)
            metrics[f"accuracy/{name}"] = Ratio((hit_BL & own_BL).astype(jnp.int32), count_BL)
        return metrics

    def token_losses(self, predictions: Array, batch: Batch) -> Float[Array, "B L"]:
        return cross_entropy(predictions, batch["tokens"][:, 1:])[1]

    def nats(
        self, params: PyTree, gate_state: PyTree, batch: Batch, step: Array, key: Array
    ) -> Float[Array, "B L"]:
        """Cross-entropy of each target in evaluation, computed from the valid tokens alone."""
        inputs_BL = jnp.where(batch["valid"], batch["tokens"][:, :-1], 0)
        masked = {**batch, "tokens": jnp.pad(inputs_BL, ((0, 0), (0, 1)))}
        logits_BLV, _ = self.apply(params, gate_state, masked, step, key, train=False)
        return self.token_losses(logits_BLV, batch)


def _mean_of_passes(first: Totals, second: Totals, divergence: Array) -> Totals:
    """Totals of one batch run twice, with the divergence of the two predictions."""
    means = {
        name: jax.tree.map(lambda a, b: (a + b) / 2, getattr(first, name), getattr(second, name))
        for name in ("loss", "log_z_square", "auxiliary", "means", "mean_square")
    }
    means["auxiliary"] |= {CONSISTENCY: divergence * first.items}
    return first._replace(**means)


def cross_entropy(
    logits_BLV: Float[Array, "*B V"], target_BL: Int[Array, "*B"]
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """log Z and the nats of each target."""
    log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    target_logit_BL = jnp.take_along_axis(logits_BLV, target_BL[..., None], axis=-1)
    return log_z_BL, log_z_BL - target_logit_BL[..., 0]
