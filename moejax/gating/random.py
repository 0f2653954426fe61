"""Random routing: the baseline for a learned router."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.gating import ops
from moejax.gating.gate import FixedK, Unlearned
from moejax.types import GateContext, GateOutput, GateParams, GateState, GateTraits


@dataclasses.dataclass(frozen=True)
class Random(Unlearned, FixedK):
    r"""k distinct experts drawn anew for every token, step and layer, each with weight 1/k.

    .. math:: S_t = \operatorname{top}_k(\text{Gumbel noise}), \qquad
       y_t = \frac{1}{k} \sum_{e \in S_t} f_e(x_t)

    Draws are keyed by (seed, step, layer, row, position) and are the same on every mesh. There is
    nothing to learn and nothing to balance. Evaluation draws too, from the run's seed, so that its
    loss is reproducible, and needs a key.

    Visibility: neither a token's experts nor their free slots depend on any token.

    Reference: Zuo et al., arXiv 2110.04260, who compare random with learned routing.
    """

    k: Annotated[int, "experts per token"] = 2

    def check(self, num_experts: int, train: bool) -> None:
        ops.check_k(self.k, num_experts)

    def traits(self) -> GateTraits:
        return GateTraits(reads_past=True)  # a sequence's noise is one draw

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        num_experts = state["expert_E"].size
        noise_GTE = ops.row_noise(jax.random.gumbel, context, (num_experts,))
        expert_GTK, _ = ops.local_top_k(noise_GTE, self.k, False)
        weight_GTK = jnp.full(expert_GTK.shape, 1.0 / self.k, jnp.float32)
        routing = ops.masked(expert_GTK, weight_GTK, context.valid_GT)
        return GateOutput(routing, ops.uniform_stats(num_experts, *x_GTD.shape[:2]))
