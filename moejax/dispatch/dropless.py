"""The transports that send as many rows as there are: one per pair, or one per token and shard."""

import dataclasses

import jax
import jax.numpy as jnp

from moejax import experts
from moejax.dispatch import exchange, pack
from moejax.types import Counts, Dispatched, ExpertWeights, Job, Tokens, Transport


@dataclasses.dataclass(frozen=True)
class Dropless(Transport):
    """Pairs sorted by expert, sent to the owners as they are, and multiplied group by group.

    The receive buffer has room for the worst case (every token of every shard), so nothing is ever
    dropped; only the rows that exist are sent and computed.
    """

    calls_grouped_matmul = True

    def run(self, tokens: Tokens, weights: ExpertWeights, job: Job) -> Dispatched:
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
            received_MD = exchange.send_rows(rows_ND, traffic, job.most_rows(expert_tK), job.site)
            with jax.named_scope("experts"):
                out_MD = experts.ffn_sorted(weights, received_MD, traffic.size_e, job.activation)
            out_ND = exchange.return_rows(out_MD, traffic, rows, job.site)
        y_tD = pack.unpack(out_ND, weight_tK, plan)
        return tokens.grouped(exchange.sum_over_tensor(y_tD, job.site), plan.kept_tK)

    def rows(self, counts: Counts) -> tuple[float, float | None]:
        return counts.kept, counts.pairs


@dataclasses.dataclass(frozen=True)
class DroplessOnce(Transport):
    """As ``Dropless``, but a token goes once to each shard with experts of it; one row returns.

    With it go its experts and weights, 2 K floats, by which the shard finds the token's experts and
    adds up their outputs. Fewer bytes than ``Dropless`` where tokens have several experts on one
    shard.
    """

    calls_grouped_matmul = True

    def run(self, tokens: Tokens, weights: ExpertWeights, job: Job) -> Dispatched:
        site, own = job.site, job.own_experts
        if site.expert_axis is None:
            return Dropless().run(tokens, weights, job)
        x_tD, expert_tK, weight_tK = tokens.flat()
        room = site.shards * len(x_tD)
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
            # Rows that no shard sent may look like a token with experts.
            about_MJ = jnp.where(jnp.arange(room)[:, None] < traffic.size_e, about_MJ, 0.0)
            sent_MK, weight_MK = jnp.split(about_MJ, 2, axis=1)
            expert_MK = sent_MK.astype(jnp.int32) - exchange.shard_index(site) * own
            plan, size_e = pack.plan_sorted(
                expert_MK, weight_MK, num_experts=own, rows=job.most_rows(expert_tK)
            )
            rows_PD = pack.gather_rows(received_MD, plan)
        with jax.named_scope("experts"):
            out_PD = experts.ffn_sorted(weights, rows_PD, size_e, job.activation)
        partial_MD = pack.unpack(out_PD, weight_MK, plan)
        returned_ND = exchange.return_rows(partial_MD, traffic, len(rows_ND), site)
        with jax.named_scope("unpack"):
            y_tD = pack.sum_rows(returned_ND, visits)
        return tokens.grouped(exchange.sum_over_tensor(y_tD, site), weight_tK > 0)

    def rows(self, counts: Counts) -> tuple[float, float | None]:
        return counts.kept, None  # counts of pairs do not tell which of them share a shard
