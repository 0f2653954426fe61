"""RL-R: routing as a policy, trained by REINFORCE with a learned baseline."""

import dataclasses
import math
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.gating import ops
from moejax.gating.gate import INIT_SCALE, FixedK, InitScale, Stateless
from moejax.gating.visibility import by_position, capacity_visibility
from moejax.types import (
    GateContext,
    GateOutput,
    GateParams,
    GateSpec,
    GateState,
    MoEConfig,
    Policy,
    TrainedBy,
    Visibility,
)


@dataclasses.dataclass(frozen=True)
class RL(Stateless, FixedK):
    r"""One expert per token, sampled from the softmax; a reward trains the router.

    .. math::
       \pi = \operatorname{softmax}(x W), \quad
       a \sim \pi \text{ (training)}, \; \operatorname{argmax} \pi \text{ (evaluation)}, \quad
       y = f_a(x), \quad b = x \cdot v + c

    The weight of the chosen expert is the constant 1, so only the policy gradient trains the
    router, not the task's. The reward of a token is the log-likelihood of its target, and b is the
    expected reward. Losses: ``moe.losses.policy`` = -(reward - b) log pi(a) and
    ``moe.losses.baseline`` = (reward - b)^2, with the weights of the preset, and in training
    ``rl_entropy`` = -entropy_weight H(pi), which maintains exploration. The policy's gradient also
    reaches the tokens below the router; the baseline's stops at the router.

    Visibility: a token sees neither later tokens nor other sequences, except through capacity.

    Reference: the third method of Clark et al., "Unified Scaling Laws for Routed Language Models",
    arXiv 2202.01169 (its appendix was not available: the baseline's architecture and all weights
    are ours); Williams 1992. A token's reward is that of its own target alone, although its choice
    also affects later tokens through attention.
    """

    entropy_weight: Annotated[float, "of the entropy bonus, in nats"] = 0.01
    init_scale: InitScale = INIT_SCALE

    k: ClassVar[int] = 1
    trained_by: ClassVar[TrainedBy] = "policy"

    def check(self, num_experts: int, train: bool) -> None:
        ops.check_positive("init_scale", self.init_scale)
        ops.check_not_negative("entropy_weight", self.entropy_weight)

    def init(self, key: Array, spec: GateSpec) -> GateParams:
        # The reward of a uniform prediction; next to a baseline of 0, every choice would look bad.
        expected = -math.log(max(spec.vocab_size, 1))
        return {
            "router_DE": ops.init_router(key, spec, self.init_scale),
            "baseline_D": jnp.zeros(spec.d_model, jnp.float32),
            "baseline": jnp.float32(expected),
        }

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        logits_GTE = ops.router_logits(x_GTD, params["router_DE"])
        noisy_GTE, losses, policy = logits_GTE, {}, None
        if context.train:
            # The argmax of logits with Gumbel noise is a sample from their softmax.
            noisy_GTE = logits_GTE + ops.row_noise(
                jax.random.gumbel, context, logits_GTE.shape[-1:]
            )
        expert_GT = jnp.argmax(noisy_GTE, axis=-1).astype(jnp.int32)
        if context.train:
            log_GTE = jax.nn.log_softmax(logits_GTE, axis=-1)
            entropy_GT = -jnp.sum(jnp.exp(log_GTE) * log_GTE, axis=-1)
            losses["rl_entropy"] = -self.entropy_weight * ops.mean(entropy_GT, context)
            still_GTD = jax.lax.stop_gradient(x_GTD)
            value_GT1 = ops.router_logits(still_GTD, params["baseline_D"][:, None])
            policy = Policy(
                log_prob_GT=ops.at_expert(log_GTE, expert_GT[..., None])[..., 0],
                baseline_GT=value_GT1[..., 0] + params["baseline"],
            )
        weight_GT1 = context.valid_GT.astype(jnp.float32)[..., None]
        routing = ops.masked(expert_GT[..., None], weight_GT1, context.valid_GT)
        return GateOutput(routing, ops.softmax_stats(logits_GTE), losses, policy=policy)

    def visibility(self, moe: MoEConfig) -> Visibility:
        return capacity_visibility(self.k, moe, with_gate=by_position)  # all weights are equal
