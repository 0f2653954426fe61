"""M6's expert prototyping: one expert from each of k groups of experts."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.gating import ops
from moejax.gating.gate import INIT_SCALE, FixedK, InitScale, LinearRouter, Stateless
from moejax.gating.visibility import capacity_visibility
from moejax.types import (
    GateContext,
    GateOutput,
    GateParams,
    GateState,
    MoEConfig,
    RouterStats,
    TrainedBy,
    Visibility,
)


@dataclasses.dataclass(frozen=True)
class Prototypes(Stateless, LinearRouter, FixedK):
    r"""Experts are split into k prototypes; a token visits the best expert of each ("k top-1").

    .. math::
       p_z = \operatorname{softmax}(h_z), \quad e_z = \operatorname{argmax} p_z, \quad
       y = \sum_{z=1}^{k} p_{z, e_z} f_{e_z}(x)

    with h = x W, where prototype z has the experts z E/k .. (z+1) E/k - 1. The output is the sum of
    k Switch layers with E/k experts each and the same input. Column z of the routing is prototype
    z, so drops by choice are drops by prototype.

    The reported probabilities are p / k, so ``moe.losses.load_balance`` is the mean over prototypes
    of the Switch loss, 1 at balance. (The paper sums over prototypes: k times this loss.)

    Visibility: a token sees neither later tokens nor other sequences, except through capacity.
    Columns never compete for the same expert, so priority "choice" is causal too.

    Reference: Yang et al., "M6-T: Exploring Sparse Expert Models and Beyond", arXiv 2105.15082.
    Deviation: capacity is ceil(T k / E * factor), as for all gates here.
    """

    k: Annotated[int, "prototypes, and experts per token: one of each; divides num_experts"] = 2
    init_scale: InitScale = INIT_SCALE

    trained_by: ClassVar[TrainedBy] = "task"

    def check(self, num_experts: int, train: bool) -> None:
        ops.check_k(self.k, num_experts)
        ops.check_positive("init_scale", self.init_scale)
        if num_experts % self.k:
            raise ValueError(
                f"gate.k={self.k} prototypes do not divide num_experts={num_experts}; use "
                f"num_experts={(num_experts // self.k + 1) * self.k}"
            )
        if train and self.k == num_experts > 1:
            raise ValueError(
                f"gate.k={self.k} prototypes of num_experts={num_experts} have one expert each, "
                "whose weight is the constant 1, so the router gets no gradient; lower gate.k"
            )

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        logits_GTE = ops.router_logits(x_GTD, params["router_DE"])
        num_experts = logits_GTE.shape[-1]
        size = num_experts // self.k
        # The axis of experts becomes two: prototypes, and the experts of each.
        apart = logits_GTE.reshape(*logits_GTE.shape[:-1], self.k, size)
        probs_GTE = jax.nn.softmax(apart, axis=-1).reshape(logits_GTE.shape)
        first_K = size * jnp.arange(self.k, dtype=jnp.int32)
        expert_GTK = first_K + jnp.argmax(apart, axis=-1).astype(jnp.int32)
        routing = ops.masked(expert_GTK, ops.at_expert(probs_GTE, expert_GTK), context.valid_GT)
        share_GTE = probs_GTE / self.k
        return GateOutput(routing, RouterStats(logits_GTE, share_GTE, share_GTE))

    def visibility(self, moe: MoEConfig) -> Visibility:
        return capacity_visibility(self.k, moe, columns=1)
