"""What is trained: the language-modelling task, as pure functions of plain pytrees."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from moejax.config import Config, make_gate, moe_config
from moejax.losses import CONSISTENCY, policy_gradient, symmetric_kl
from moejax.models.lm import LM, LMConfig, LMOutput
from moejax.models.stack import Watch
from moejax.train.state import from_tree, to_tree
from moejax.types import Context, MoEStats

Batch = dict[str, Array]
"""``tokens`` int32[B, L + 1], ``valid`` bool[B, L], ``row`` int32[B] (global ids)."""

SECOND_PASS = 2**31 - 1
"""Makes the key of the second pass from that of the first."""


class Totals(NamedTuple):
    """Sums over valid tokens, and statistics of the layers: all add up over micro-batches.

    ``auxiliary`` are token-weighted sums of the layers' mean losses, ``mean_square`` of the layers'
    mean squares, so dividing by ``tokens`` gives the means over the whole batch.

    Where a consistency loss runs the batch twice, tokens count once, ``correct`` and ``stats`` are
    those of the first pass, and everything else is the mean of the two.
    """

    tokens: Int[Array, ""]
    cross_entropy: Float[Array, ""]
    correct: Int[Array, ""]
    log_z_square: Float[Array, ""]
    auxiliary: dict[str, Float[Array, ""]]
    mean_square: Float[Array, "layers"]
    stats: MoEStats | None


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A decoder LM with its loss: cross-entropy + weighted router losses + output z-loss."""

    model: LMConfig
    loss_weights: tuple[tuple[str, float], ...]
    output_z_loss: float

    @classmethod
    def from_config(cls, config: Config, vocab_size: int) -> "LanguageModel":
        model, moe = config.model, config.moe
        return cls(
            LMConfig(
                vocab_size=model.vocab_size or vocab_size,
                d_model=model.d_model,
                d_ff=model.d_ff,
                num_layers=model.num_layers,
                num_heads=model.num_heads,
                num_kv_heads=model.num_kv_heads,
                head_dim=model.head_dim or model.d_model // model.num_heads,
                activation=model.activation,
                rope_theta=model.rope_theta,
                norm_eps=model.norm_eps,
                tie_embeddings=model.tie_embeddings,
                dtype=model.dtype,
                remat=model.remat,
                attention=model.attention,
                mod_capacity=model.mod_capacity,
                mod_every=model.mod_every,
                mod_predictor=model.mod_predictor,
                moa_experts=model.moa_experts,
                moa_k=model.moa_k,
                every=moe.every,
                first_dense=moe.first_dense,
                moe=moe_config(config),
                gate=make_gate(config),
                expert_d_ff=moe.d_ff,
                expert_activation=moe.activation,
                shared_experts=moe.shared_experts,
                shared_gate=moe.shared_gate,
                residual=moe.residual,
                balance_scope=moe.balance_scope,
            ),
            tuple(sorted(moe.losses.items())),
            config.optim.output_z_loss,
        )

    def countable(self) -> "LanguageModel":
        """The same computation in the form whose FLOPs count as the model's own.

        No capacity padding, no recomputation, and attention as matrix products that can be seen.
        """
        moe = dataclasses.replace(self.model.moe, transport="dropless", eval_transport="dropless")
        model = dataclasses.replace(self.model, moe=moe, remat="none", attention="xla")
        return dataclasses.replace(self, model=model)

    def init(self, key: Array) -> PyTree:
        """Fresh parameters, a nested dict."""
        return to_tree(nnx.state(LM(self.model, rngs=nnx.Rngs(params=key))))

    def init_gate_state(self, token_counts: Callable[[], np.ndarray] | None = None) -> PyTree:
        """Before the first step; ``token_counts`` of the training text, for gates that ask."""
        graph, template = self._split()
        return nnx.merge(graph, template).init_gate_state(token_counts)

    def update_gate_state(self, gate_state: PyTree, totals: Totals) -> PyTree:
        graph, template = self._split()
        return nnx.merge(graph, template).update_gate_state(gate_state, totals.stats)

    def forward(
        self, params: PyTree, gate_state: PyTree, batch: Batch, step: Array, key: Array, train: bool
    ) -> Totals:
        """Runs the model on a batch and adds up everything anyone wants to know of it.

        Once; in training twice, with different noise, where ``consistency`` has a weight.
        """
        out = self.apply(params, gate_state, batch, step, key, train)
        totals = self._totals(out, batch)
        if not (train and dict(self.loss_weights).get(CONSISTENCY)):
            return totals
        key = jax.random.fold_in(key, SECOND_PASS)
        other = self.apply(params, gate_state, batch, step, key, train)
        with jax.named_scope("loss"):
            divergence = symmetric_kl(out.logits_BLV, other.logits_BLV, batch["valid"])
        return _mean_of_passes(totals, self._totals(other, batch), divergence)

    def _totals(self, out: LMOutput, batch: Batch) -> Totals:
        target_BL = batch["tokens"][:, 1:]
        valid = batch["valid"]
        tokens = jnp.sum(valid, dtype=jnp.int32)
        with jax.named_scope("loss"):
            log_z_BL, nats_BL = cross_entropy(out.logits_BLV, target_BL)
            hit_BL = jnp.argmax(out.logits_BLV, axis=-1) == target_BL
        losses = dict(out.found.losses)
        if out.found.policy is not None:
            losses |= policy_gradient(out.found.policy, -nats_BL, valid)
        return Totals(
            tokens=tokens,
            cross_entropy=jnp.sum(jnp.where(valid, nats_BL, 0.0)),
            correct=jnp.sum(valid & hit_BL, dtype=jnp.int32),
            log_z_square=jnp.sum(jnp.where(valid, jnp.square(log_z_BL), 0.0)),
            auxiliary=jax.tree.map(lambda loss: loss * tokens, losses),
            mean_square=out.found.mean_square * tokens,
            stats=out.found.stats,
        )

    def nats(
        self, params: PyTree, gate_state: PyTree, batch: Batch, step: Array, key: Array
    ) -> Float[Array, "B L"]:
        """Cross-entropy of each target in evaluation, from the valid tokens and nothing else."""
        inputs_BL = jnp.where(batch["valid"], batch["tokens"][:, :-1], 0)
        targets_BL = batch["tokens"][:, 1:]
        masked = {**batch, "tokens": jnp.pad(inputs_BL, ((0, 0), (0, 1)))}
        out = self.apply(params, gate_state, masked, step, key, train=False)
        return cross_entropy(out.logits_BLV, targets_BL)[1]

    def apply(
        self,
        params: PyTree,
        gate_state: PyTree,
        batch: Batch,
        step: Array,
        key: Array,
        train: bool,
        watch: Watch | None = None,
    ) -> LMOutput:
        """The model on a batch's inputs; ``watch``: see ``LM``."""
        graph, template = self._split()
        model = nnx.merge(graph, from_tree(template, params))
        token_BL = batch["tokens"][:, :-1]
        context = Context.of(
            *token_BL.shape,
            token_BL=token_BL,
            valid_BL=batch["valid"],
            row_B=batch["row"],
            step=step,
            key=jax.random.fold_in(key, step),
        )
        return model(token_BL, context, gate_state, train, watch)

    def objective(self, totals: Totals, tokens: Array) -> Array:
        """The share of these totals in the loss of a batch with ``tokens`` valid tokens."""
        loss = totals.cross_entropy + self.output_z_loss * totals.log_z_square
        weights = dict(self.loss_weights)
        for name, value in totals.auxiliary.items():
            loss += weights.get(name, 1.0) * value
        return loss / tokens

    def hold(self, updates: PyTree, step: Array) -> PyTree:
        """The updates, with zeros for what the gate says is frozen at this step.

        No gradient is not enough: momentum goes on, and a sign of it at full speed.
        """
        frozen = getattr(self.model.gate, "frozen", None)
        if frozen is None or not self.model.num_moe_layers:
            return updates
        still = frozen(step)

        def held(path: tuple[Any, ...], update: Array) -> Array:
            *nodes, name = (str(getattr(key, "key", key)) for key in path)
            if "router" in nodes and name in still:
                return jnp.where(still[name], jnp.zeros_like(update), update)
            return update

        return jax.tree_util.tree_map_with_path(held, updates)

    def _split(self) -> tuple[nnx.GraphDef, PyTree]:
        return nnx.split(nnx.eval_shape(lambda: LM(self.model, rngs=nnx.Rngs(0))))


def _mean_of_passes(first: Totals, second: Totals, divergence: Array) -> Totals:
    """One batch seen twice, and how far the two predictions are apart."""
    means = {
        name: jax.tree.map(lambda a, b: (a + b) / 2, getattr(first, name), getattr(second, name))
        for name in ("cross_entropy", "log_z_square", "auxiliary", "mean_square")
    }
    means["auxiliary"] |= {CONSISTENCY: divergence * first.tokens}
    return first._replace(**means)


def cross_entropy(
    logits_BLV: Float[Array, "B L V"], target_BL: Int[Array, "B L"]
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """log Z and the nats of each target."""
    log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    target_logit_BL = jnp.take_along_axis(logits_BLV, target_BL[..., None], axis=-1)
    return log_z_BL, log_z_BL - target_logit_BL[..., 0]
