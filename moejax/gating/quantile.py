"""Quantile balancing: prices of a balanced assignment, one coordinate-descent step per batch."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.gating import ops
from moejax.gating.gate import INIT_SCALE, InitScale, LinearRouter, Renormalize, TokenChoice
from moejax.mesh import group_local
from moejax.types import (
    GateContext,
    GateOutput,
    GateParams,
    GateSpec,
    GateState,
    MoEStats,
    TrainedBy,
)


def quantile_prices(
    logits_TE: Float[Array, "T E"], price_E: Float[Array, "E"], valid_T: Bool[Array, "T"], k: int
) -> Float[Array, "E"]:
    r"""One step of dual coordinate descent for giving each of E experts T k / E of T tokens.

    .. math::
       \alpha_t = \text{(k+1)-th largest of } h_t - \beta, \qquad
       \beta_e' = (\lfloor T k / E \rfloor + 1)\text{-th largest of } h_{te} - \alpha_t

    over the valid tokens t. If tokens kept their thresholds alpha, floor(T k / E) of them would
    choose e at a price just below beta', apart from ties. Zeros where there is nothing to balance:
    k = E, or no valid token.
    """
    num_experts = logits_TE.shape[1]
    if k == num_experts:
        return jnp.zeros_like(price_E)
    alpha_T1 = jax.lax.top_k(logits_TE - price_E, k + 1)[0][:, k:]
    margin_TE = jnp.where(valid_T[:, None], logits_TE - alpha_T1, -jnp.inf)
    count = jnp.sum(valid_T)
    sorted_TE = -jnp.sort(-margin_TE, axis=0)
    # k < E, so that the index stays below the number of valid tokens.
    price_E = jnp.take(sorted_TE, count * k // num_experts, axis=0)
    return jnp.where(count > 0, price_E, 0.0)


@dataclasses.dataclass(frozen=True)
class Quantile(LinearRouter, TokenChoice):
    r"""Top-k of logits minus prices that balance the load, learned from earlier batches.

    .. math::
       h = x W, \quad S = \operatorname{top}_k(h - \beta), \quad
       g = \operatorname{softmax}_S(h), \qquad
       \beta \leftarrow \operatorname{mean}_{\text{groups}} \beta'(h, \beta)

    beta' are quantiles (``quantile_prices``) of each routing group of the batch, averaged with the
    groups' valid tokens as weights. A batch uses the prices from the batches before it, and
    evaluation the last ones, so no token influences another. Prices carry no gradient and do not
    enter the weights. There is no rate to choose, and no auxiliary loss is needed (the preset
    switches it off).

    BASE solves the same problem exactly, for the current batch; loss-free balancing moves its bias
    by a fixed amount per step.

    Visibility: a token sees neither later tokens nor other sequences (of its own batch), except
    through capacity.

    Reference: J. Su, "MoE: optimal allocation" (kexue.fm/archives/11619, 2026); Megatron-Core's
    router offers it as quantile balancing. Deviation: the quantile is over a routing group
    (``moe.group=batch`` with ``dropless`` is one group), in Megatron over a micro-batch.
    """

    k: Annotated[int, "experts per token"] = 2
    renormalize: Renormalize = True
    init_scale: InitScale = INIT_SCALE

    trained_by: ClassVar[TrainedBy] = "task"

    def check(self, num_experts: int, train: bool) -> None:
        ops.check_k(self.k, num_experts)
        ops.check_positive("init_scale", self.init_scale)
        ops.check_trains(self.k, self.renormalize, num_experts, train)

    def init_state(self, spec: GateSpec) -> GateState:
        return {"price_E": jnp.zeros(spec.num_experts, jnp.float32)}

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        logits_GTE = ops.router_logits(x_GTD, params["router_DE"])
        fixed_GTE = jax.lax.stop_gradient(logits_GTE)
        expert_GTK = ops.local_best(fixed_GTE - state["price_E"], self.k)
        weight_GTK = ops.softmax_weights(logits_GTE, expert_GTK, self.renormalize)
        routing = ops.masked(expert_GTK, weight_GTK, context.valid_GT)
        means = {}
        if context.train:

            def prices(logits_TE: Array, price_E: Array, valid_T: Array) -> Array:
                return quantile_prices(logits_TE, price_E, valid_T, self.k)

            price_GE = jnp.broadcast_to(state["price_E"], (len(x_GTD), logits_GTE.shape[-1]))
            args = (fixed_GTE, price_GE, context.valid_GT)
            means["price"] = group_local(jax.vmap(prices))(*args)
        return GateOutput(routing, ops.softmax_stats(logits_GTE), means=means)

    def update(self, state: GateState, stats: MoEStats) -> GateState:
        if "price" not in stats.gate:  # statistics of an evaluation
            return state
        mean_E = stats.gate["price"] / jnp.maximum(stats.tokens, 1).astype(jnp.float32)
        return {"price_E": jnp.where(stats.tokens > 0, mean_E, state["price_E"])}
