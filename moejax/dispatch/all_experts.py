"""The transport without packing: every expert on every token."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax import experts
from moejax.dispatch import exchange
from moejax.kernels.support import match_varying
from moejax.types import Counts, Dispatched, ExpertWeights, Job, Tokens, Transport


@dataclasses.dataclass(frozen=True)
class AllExperts(Transport):
    """Every expert on every token, one expert at a time; for gates that use most experts."""

    def run(self, tokens: Tokens, weights: ExpertWeights, job: Job) -> Dispatched:
        x_tD, expert_tK, weight_tK = tokens.flat()
        own = job.own_experts
        x_TD = exchange.gather_tokens(x_tD, job.site)
        expert_TK = exchange.gather_tokens(expert_tK, job.site)
        # The select keeps inactive columns inactive in the backward pass too.
        weight_TK = exchange.gather_tokens(jnp.where(weight_tK > 0, weight_tK, 0.0), job.site)
        first = exchange.shard_index(job.site) * own

        # Without the checkpoint the hidden layers of all experts would live until the backward.
        @jax.checkpoint
        @jax.named_scope("experts")
        def one_expert(
            y_TD: Array, local: tuple[Array, ExpertWeights], x_TD: Array
        ) -> tuple[Array, None]:
            index, expert = local
            weight_T = jnp.sum(jnp.where(expert_TK == index + first, weight_TK, 0.0), axis=-1)
            out_TD = experts.ffn_one(expert, x_TD, job.activation).astype(jnp.float32)
            return y_TD + weight_T[:, None] * out_TD, None

        zero_TD, *_ = match_varying(
            jnp.zeros(x_TD.shape, jnp.float32), x_TD, *jax.tree.leaves(weights)
        )
        y_TD, _ = jax.lax.scan(
            lambda y, local: one_expert(y, local, x_TD), zero_TD, (jnp.arange(own), weights)
        )
        y_tD = exchange.scatter_sum(y_TD.astype(x_tD.dtype), job.site)
        return tokens.grouped(exchange.sum_over_tensor(y_tD, job.site), weight_tK > 0)

    def rows(self, counts: Counts) -> tuple[float, float | None]:
        return counts.tokens * counts.num_experts, counts.tokens * counts.shards
