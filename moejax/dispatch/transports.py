"""The transports: pack, exchange, experts, exchange, unpack.

The named scopes are the parts that ``moejax profile`` tells apart.

Each takes this device's tokens and experts and runs inside ``shard_map`` (or on its own, without a
mesh). Weights are float32 and already carry 0 for inactive columns.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax import experts
from moejax.dispatch import exchange, pack
from moejax.dispatch.exchange import Site
from moejax.kernels.vma import match_varying
from moejax.types import ExpertWeights, Priority


class Job(NamedTuple):
    """The static side of a dispatch."""

    num_experts: int
    activation: str
    site: Site
    capacity: int = 0
    priority: Priority = "position"


class Tokens(NamedTuple):
    """A device's tokens and where they go, group by group."""

    x_gTD: Float[Array, "g T D"]
    expert_gTK: Int[Array, "g T K"]
    weight_gTK: Float[Array, "g T K"]
    score_gT: Float[Array, "g T"]

    def flat(self) -> tuple[Array, Array, Array]:
        """x_tD, expert_tK, weight_tK with groups laid end to end."""
        arrays = (self.x_gTD, self.expert_gTK, self.weight_gTK)
        x_tD, expert_tK, weight_tK = (a.reshape(-1, a.shape[-1]) for a in arrays)
        return x_tD, expert_tK, weight_tK


Result = tuple[Float[Array, "g T D"], Bool[Array, "g T K"]]


def cells(tokens: Tokens, weights: ExpertWeights, job: Job) -> Result:
    """C slots per (group, expert), one all-to-all each way; what finds no slot is dropped.

    Static shapes, plain batched matmuls, and a send of k * capacity_factor copies per token.
    """
    x_tD, _, weight_tK = tokens.flat()
    shards, width = job.site.shards, x_tD.shape[1]
    with jax.named_scope("pack"):
        plan = pack.plan_cells(
            tokens.expert_gTK,
            tokens.weight_gTK,
            tokens.score_gT,
            num_experts=job.num_experts,
            capacity=job.capacity,
            priority=job.priority,
        )
        rows_SXD = pack.gather_rows(x_tD, plan).reshape(shards, -1, width)
    rows_SXD = exchange.swap_shards(rows_SXD, job.site)
    rows_SeXD = rows_SXD.reshape(shards, job.num_experts // shards, -1, width)
    with jax.named_scope("experts"):
        out_SeXD = experts.ffn_cells(weights, rows_SeXD, job.activation)
    out_SXD = exchange.swap_shards(out_SeXD.reshape(rows_SXD.shape), job.site)
    y_tD = _combine(out_SXD.reshape(-1, width), weight_tK, plan)
    return _finish(exchange.sum_over_tensor(y_tD, job.site), plan.kept_tK, tokens)


def dropless(tokens: Tokens, weights: ExpertWeights, job: Job) -> Result:
    """Pairs sorted by expert, sent to the owners as they are, and multiplied group by group.

    The receive buffer has room for the worst case (every token of every shard), so nothing is ever
    dropped; only the rows that exist are sent and computed.
    """
    x_tD, expert_tK, weight_tK = tokens.flat()
    rows = expert_tK.size
    with jax.named_scope("pack"):
        plan, size_E = pack.plan_sorted(
            expert_tK, weight_tK, num_experts=job.num_experts, rows=rows
        )
        rows_ND = pack.gather_rows(x_tD, plan)
    if job.site.expert_axis is None:
        with jax.named_scope("experts"):
            out_ND = experts.ffn_sorted(weights, rows_ND, size_E, job.activation)
    else:
        traffic = exchange.plan_traffic(size_E, job.site)
        received_MD = exchange.send_rows(rows_ND, traffic, _worst_case(expert_tK, job), job.site)
        with jax.named_scope("experts"):
            out_MD = experts.ffn_sorted(weights, received_MD, traffic.size_e, job.activation)
        out_ND = exchange.return_rows(out_MD, traffic, rows, job.site)
    y_tD = _combine(out_ND, weight_tK, plan)
    return _finish(exchange.sum_over_tensor(y_tD, job.site), plan.kept_tK, tokens)


def dropless_once(tokens: Tokens, weights: ExpertWeights, job: Job) -> Result:
    """As dropless, but a token goes once to each shard that has experts of it, and one row returns.

    With it go its experts and weights, 2 K floats, by which the shard finds the token's experts and
    adds up their outputs. Fewer bytes than dropless where tokens have several experts on one shard.
    """
    site = job.site
    if site.expert_axis is None:
        return dropless(tokens, weights, job)
    x_tD, expert_tK, weight_tK = tokens.flat()
    own, room = job.num_experts // site.shards, site.shards * len(x_tD)
    with jax.named_scope("pack"):
        visits, size_S = pack.plan_visits(expert_tK, weight_tK, shards=site.shards, own=own)
        rows_ND = pack.gather_rows(x_tD, visits)
        # In float32 ids up to 2^24 are exact, and weights keep their gradient.
        about_tJ = jnp.concatenate([expert_tK.astype(jnp.float32), weight_tK], axis=1)
        about_NJ = pack.gather_rows(about_tJ, visits)
    traffic = exchange.plan_traffic(size_S, site)
    received_MD = exchange.send_rows(rows_ND, traffic, room, site)
    about_MJ = exchange.send_rows(about_NJ, traffic, room, site)
    with jax.named_scope("pack"):
        # Rows that nobody sent may look like a token with experts.
        about_MJ = jnp.where(jnp.arange(room)[:, None] < traffic.size_e, about_MJ, 0.0)
        sent_MK, weight_MK = jnp.split(about_MJ, 2, axis=1)
        expert_MK = sent_MK.astype(jnp.int32) - exchange.shard_index(site) * own
        plan, size_e = pack.plan_sorted(
            expert_MK, weight_MK, num_experts=own, rows=_worst_case(expert_tK, job)
        )
        rows_PD = pack.gather_rows(received_MD, plan)
    with jax.named_scope("experts"):
        out_PD = experts.ffn_sorted(weights, rows_PD, size_e, job.activation)
    partial_MD = _combine(out_PD, weight_MK, plan)
    returned_ND = exchange.return_rows(partial_MD, traffic, len(rows_ND), site)
    with jax.named_scope("unpack"):
        y_tD = pack.sum_rows(returned_ND, visits)
    return _finish(exchange.sum_over_tensor(y_tD, site), weight_tK > 0, tokens)


def gather(tokens: Tokens, weights: ExpertWeights, job: Job) -> Result:
    """All tokens to every shard, each computes its own experts, reduce-scatter back.

    Exactly dropless with static shapes; sends S copies of a token instead of k, so it is best when
    k is near the number of expert shards.
    """
    x_tD, expert_tK, weight_tK = tokens.flat()
    own = job.num_experts // job.site.shards
    x_TD = exchange.gather_tokens(x_tD, job.site)
    weight_TK = exchange.gather_tokens(weight_tK, job.site)
    first = exchange.shard_index(job.site) * own
    expert_TK = exchange.gather_tokens(expert_tK, job.site) - first
    with jax.named_scope("pack"):
        plan, size_e = pack.plan_sorted(
            expert_TK, weight_TK, num_experts=own, rows=_worst_case(expert_tK, job)
        )
        rows_MD = pack.gather_rows(x_TD, plan)
    with jax.named_scope("experts"):
        out_MD = experts.ffn_sorted(weights, rows_MD, size_e, job.activation)
    y_tD = exchange.scatter_sum(_combine(out_MD, weight_TK, plan), job.site)
    return _finish(exchange.sum_over_tensor(y_tD, job.site), weight_tK > 0, tokens)


def all_experts(tokens: Tokens, weights: ExpertWeights, job: Job) -> Result:
    """Every expert on every token, one expert at a time; for gates that use most experts."""
    x_tD, expert_tK, weight_tK = tokens.flat()
    own = job.num_experts // job.site.shards
    x_TD = exchange.gather_tokens(x_tD, job.site)
    expert_TK = exchange.gather_tokens(expert_tK, job.site)
    # The select keeps inactive columns inactive in the backward pass too.
    weight_TK = exchange.gather_tokens(jnp.where(weight_tK > 0, weight_tK, 0.0), job.site)
    first = exchange.shard_index(job.site) * own

    # Without the checkpoint the hidden layers of all experts would live until the backward pass.
    @jax.checkpoint
    @jax.named_scope("experts")
    def one_expert(
        y_TD: Array, local: tuple[Array, ExpertWeights], x_TD: Array
    ) -> tuple[Array, None]:
        index, expert = local
        weight_T = jnp.sum(jnp.where(expert_TK == index + first, weight_TK, 0.0), axis=-1)
        out_TD = experts.ffn_one(expert, x_TD, job.activation).astype(jnp.float32)
        return y_TD + weight_T[:, None] * out_TD, None

    zero_TD, *_ = match_varying(jnp.zeros(x_TD.shape, jnp.float32), x_TD, *jax.tree.leaves(weights))
    y_TD, _ = jax.lax.scan(
        lambda y, local: one_expert(y, local, x_TD), zero_TD, (jnp.arange(own), weights)
    )
    y_tD = exchange.scatter_sum(y_TD.astype(x_tD.dtype), job.site)
    return _finish(exchange.sum_over_tensor(y_tD, job.site), weight_tK > 0, tokens)


def _worst_case(expert_tK: Array, job: Job) -> int:
    """Rows that one shard could have to compute: every token of every shard on its experts."""
    tokens, columns = expert_tK.shape
    return job.site.shards * tokens * min(columns, job.num_experts // job.site.shards)


@jax.named_scope("unpack")
def _combine(rows_MD: Array, weight_tK: Array, plan: pack.Plan) -> Array:
    rows_MD, weight_tK = match_varying(rows_MD, weight_tK)
    return pack.combine_rows(rows_MD, weight_tK, plan)


def _finish(y_tD: Array, kept_tK: Array, tokens: Tokens) -> Result:
    return y_tD.reshape(tokens.x_gTD.shape), kept_tK.reshape(tokens.expert_gTK.shape)
