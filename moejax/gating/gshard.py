"""GShard's top-2 gate with a random second expert."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.gating import ops
from moejax.gating.gate import INIT_SCALE, InitScale, LinearRouter, Stateless, TokenChoice
from moejax.types import GateContext, GateOutput, GateParams, GateState, TrainedBy

SECOND_POLICIES = ("random", "all")


@dataclasses.dataclass(frozen=True)
class GShard(Stateless, LinearRouter, TokenChoice):
    r"""Two experts per token; the second one is visited at random, in proportion to its weight.

    .. math::
       p = \operatorname{softmax}(x W), \quad g_i = p_i / (p_1 + p_2), \quad
       \text{keep the second if } U < g_2 / \text{threshold}

    Weights are normalised over the two experts before the second is skipped, and the first is not
    renormalised afterwards. Only training draws; evaluation visits both. (Mesh TensorFlow draws in
    evaluation too, which makes its evaluation random.)

    Visibility: a token sees neither later tokens nor other sequences, except through capacity.

    Reference: Lepikhin et al., "GShard", arXiv 2006.16668, algorithm 1 (threshold 0.5: U < 2 g2).
    """

    second_policy: Annotated[str, "'random' (the paper's) or 'all' (always visit both)"] = "random"
    threshold: Annotated[float, "second weight from which the second expert is always kept"] = 0.5
    init_scale: InitScale = INIT_SCALE

    k: ClassVar[int] = 2
    trained_by: ClassVar[TrainedBy] = "task"

    def check(self, num_experts: int, train: bool) -> None:
        if num_experts < 2:
            raise ValueError(f"num_experts={num_experts}: gate gshard needs at least 2 experts")
        ops.check_choice("second_policy", self.second_policy, SECOND_POLICIES)
        ops.check_positive("threshold", self.threshold)
        ops.check_positive("init_scale", self.init_scale)

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        logits_GTE = ops.router_logits(x_GTD, params["router_DE"])
        expert_GTK, weight_GTK = ops.local_top_k(logits_GTE, 2, True)
        if self.second_policy == "random" and context.train:
            uniform_GT = ops.row_noise(jax.random.uniform, context, ())
            keep_GT = uniform_GT < weight_GTK[..., 1] / self.threshold
            skipped_GTK = jnp.stack([jnp.ones_like(keep_GT), keep_GT], axis=-1)
            weight_GTK = jnp.where(skipped_GTK, weight_GTK, 0.0)
        routing = ops.masked(expert_GTK, weight_GTK, context.valid_GT)
        return GateOutput(routing, ops.softmax_stats(logits_GTE))
