"""What gates without a router share: nothing to learn, and no token has a say."""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.gating import ops
from moejax.types import (
    GateParams,
    GateSpec,
    GateState,
    MoEConfig,
    RouterStats,
    TrainedBy,
    Visibility,
)


class Unlearned(ops.Stateless):
    """The methods that do not depend on who goes where.

    Nobody's experts, and so nobody's slots, depend on what any token is.
    """

    trained_by: ClassVar[TrainedBy] = "none"

    def init(self, key: Array, spec: GateSpec) -> GateParams:
        return {}

    def init_state(self, spec: GateSpec) -> GateState:
        """The experts' ids. They never change; without parameters they tell how many there are."""
        return {"expert_E": jnp.arange(spec.num_experts, dtype=jnp.int32)}

    def visibility(self, moe: MoEConfig) -> Visibility:
        return Visibility()


def constant_stats(prob_E: Float[Array, "E"], groups: int, tokens: int) -> RouterStats:
    """Statistics of a router that gives every token the same distribution."""
    shape = (groups, tokens, prob_E.size)
    probs_GTE = jnp.broadcast_to(prob_E, shape)
    logits_E = jnp.log(jnp.maximum(prob_E, jnp.finfo(jnp.float32).tiny))
    return RouterStats(jnp.broadcast_to(logits_E, shape), probs_GTE, probs_GTE)


def uniform_stats(num_experts: int, groups: int, tokens: int) -> RouterStats:
    """Statistics of a router that prefers nobody."""
    return constant_stats(jnp.full(num_experts, 1.0 / num_experts, jnp.float32), groups, tokens)
