"""The dense gate: every expert sees every token, weighted by a softmax."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from moejax.gating import ops
from moejax.gating.gate import INIT_SCALE, EveryExpert, InitScale, LinearRouter, Stateless
from moejax.types import (
    GateContext,
    GateOutput,
    GateParams,
    GateState,
    MoEConfig,
    TrainedBy,
    Visibility,
)


@dataclasses.dataclass(frozen=True)
class Dense(Stateless, LinearRouter, EveryExpert):
    r"""A softmax over all experts: the classical mixture, at E times the compute.

    .. math:: y = \sum_{e=1}^{E} \operatorname{softmax}(x W)_e \, f_e(x)

    Nothing is selected, so every transport gives the same result; ``all_experts`` computes it
    without packing.

    Visibility: the token itself alone.

    References: Jacobs, Jordan, Nowlan, Hinton, "Adaptive Mixtures of Local Experts" (1991);
    Eigen, Ranzato, Sutskever, arXiv 1312.4314.
    """

    init_scale: InitScale = INIT_SCALE

    trained_by: ClassVar[TrainedBy] = "task"

    def check(self, num_experts: int, train: bool) -> None:
        ops.check_positive("init_scale", self.init_scale)

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        logits_GTE = ops.router_logits(x_GTD, params["router_DE"])
        stats = ops.softmax_stats(logits_GTE)
        expert_GTE = jnp.broadcast_to(
            jnp.arange(logits_GTE.shape[-1], dtype=jnp.int32), logits_GTE.shape
        )
        weight_GTE = ops.at_least_tiny(stats.probs_GTE)
        return GateOutput(ops.masked(expert_GTE, weight_GTE, context.valid_GT), stats)

    def visibility(self, moe: MoEConfig) -> Visibility:
        return Visibility()
