"""The transport with a fixed capacity: cells of slots, one all-to-all each way."""

import dataclasses

import jax

from moejax import experts
from moejax.dispatch import exchange, pack
from moejax.types import Counts, Dispatched, ExpertWeights, Job, SlotRules, Tokens, Transport


@dataclasses.dataclass(frozen=True)
class Cells(SlotRules, Transport):
    """C slots per (group, expert), one all-to-all each way; what finds no slot is dropped.

    Static shapes, plain batched matmuls, and a send of k * capacity_factor copies per token.
    """

    @property
    def slot_rules(self) -> SlotRules:
        return self

    def run(self, tokens: Tokens, weights: ExpertWeights, job: Job) -> Dispatched:
        x_tD, _, weight_tK = tokens.flat()
        shards, width = job.site.shards, x_tD.shape[1]
        with jax.named_scope("pack"):
            plan = pack.plan_cells(
                tokens.expert_gTK,
                tokens.weight_gTK,
                tokens.score_gT,
                num_experts=job.num_experts,
                capacity=job.capacity,
                priority=self.priority,
            )
            rows_SXD = pack.gather_rows(x_tD, plan).reshape(shards, -1, width)
        rows_SXD = exchange.swap_shards(rows_SXD, job.site)
        rows_SeXD = rows_SXD.reshape(shards, job.own_experts, -1, width)
        with jax.named_scope("experts"):
            out_SeXD = experts.ffn_cells(weights, rows_SeXD, job.activation)
        out_SXD = exchange.swap_shards(out_SeXD.reshape(rows_SXD.shape), job.site)
        y_tD = pack.unpack(out_SXD.reshape(-1, width), weight_tK, plan)
        return tokens.grouped(exchange.sum_over_tensor(y_tD, job.site), plan.kept_tK)

    def rows(self, counts: Counts) -> tuple[float, float | None]:
        return counts.slots, counts.slots
