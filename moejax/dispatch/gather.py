"""The transport that shows every shard all tokens."""

import dataclasses

import jax

from moejax import experts
from moejax.dispatch import exchange, pack
from moejax.types import Counts, Dispatched, ExpertWeights, Job, Tokens, Transport


@dataclasses.dataclass(frozen=True)
class Gather(Transport):
    """All tokens to every shard, each computes its own experts, reduce-scatter back.

    Exactly ``Dropless`` with static shapes; sends S copies of a token instead of k, so it is best
    when k is near the number of expert shards.
    """

    calls_grouped_matmul = True

    def run(self, tokens: Tokens, weights: ExpertWeights, job: Job) -> Dispatched:
        x_tD, expert_tK, weight_tK = tokens.flat()
        own = job.own_experts
        x_TD = exchange.gather_tokens(x_tD, job.site)
        weight_TK = exchange.gather_tokens(weight_tK, job.site)
        first = exchange.shard_index(job.site) * own
        expert_TK = exchange.gather_tokens(expert_tK, job.site) - first
        with jax.named_scope("pack"):
            plan, size_e = pack.plan_sorted(
                expert_TK, weight_TK, num_experts=own, rows=job.most_rows(expert_tK)
            )
            rows_MD = pack.gather_rows(x_TD, plan)
        with jax.named_scope("experts"):
            out_MD = experts.ffn_sorted(weights, rows_MD, size_e, job.activation)
        y_tD = exchange.scatter_sum(pack.unpack(out_MD, weight_TK, plan), job.site)
        return tokens.grouped(exchange.sum_over_tensor(y_tD, job.site), weight_tK > 0)

    def rows(self, counts: Counts) -> tuple[float, float | None]:
        return counts.kept, counts.tokens * counts.shards
