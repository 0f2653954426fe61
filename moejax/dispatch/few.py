"""The transport of a step that decodes: few tokens, and so few experts."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax import experts
from moejax.dispatch.all_experts import AllExperts
from moejax.dispatch.dropless import Dropless
from moejax.kernels.support import match_varying
from moejax.types import Counts, Dispatched, ExpertWeights, Job, Tokens, Transport

MOST_TOKENS = 16
"""Up to this many tokens, the time of an expert is that of reading its weights."""


@dataclasses.dataclass(frozen=True)
class Few(Transport):
    """``Dropless`` in the form that reads the fewest weights, for evaluation alone.

    Fewer pairs than experts: pair by pair, so that experts without a token are never read.
    Otherwise every expert on all tokens while these are few, and ``Dropless`` for many. Where the
    experts are split over devices, always ``Dropless``.
    """

    calls_grouped_matmul = True

    def run(self, tokens: Tokens, weights: ExpertWeights, job: Job) -> Dispatched:
        expert_tK = tokens.flat()[1]
        if job.site.expert_axis is not None or len(expert_tK) > MOST_TOKENS:
            return Dropless().run(tokens, weights, job)
        if job.site.tensor_axis is not None or expert_tK.size >= job.num_experts:
            return AllExperts().run(tokens, weights, job)
        return _pair_by_pair(tokens, weights, job)

    def rows(self, counts: Counts) -> tuple[float, float | None]:
        return counts.kept, counts.pairs


@jax.named_scope("experts")
def _pair_by_pair(tokens: Tokens, weights: ExpertWeights, job: Job) -> Dispatched:
    x_tD, expert_tK, weight_tK = tokens.flat()
    columns = expert_tK.shape[1]
    expert_N, weight_N = expert_tK.reshape(-1), weight_tK.reshape(-1)

    def add_pair(index: Array, y_tD: Array) -> Array:
        own = jax.tree.map(
            lambda w: jax.lax.dynamic_index_in_dim(w, expert_N[index], keepdims=False), weights
        )
        x_1D = jax.lax.dynamic_slice_in_dim(x_tD, index // columns, 1)
        out_1D = experts.ffn_one(own, x_1D, job.activation).astype(jnp.float32)
        # An inactive pair may have any expert, and so any output.
        out_1D = jnp.where(weight_N[index] > 0, weight_N[index] * out_1D, 0.0)
        return y_tD.at[index // columns].add(out_1D[0])

    zero_tD, *_ = match_varying(
        jnp.zeros(x_tD.shape, jnp.float32), x_tD, expert_N, weight_N, *jax.tree.leaves(weights)
    )
    y_tD = jax.lax.fori_loop(0, expert_N.size, add_pair, zero_tD)
    return tokens.grouped(y_tD.astype(x_tD.dtype), weight_tK > 0)
