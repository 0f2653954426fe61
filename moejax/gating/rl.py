"""RL-R: routing as a policy, trained by REINFORCE with a learned baseline."""

import dataclasses
import math
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.gating import ops
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
class RL(ops.Stateless):
    r"""Samples one expert in proportion to its probability; the reward teaches which were good.

    .. math::
       \pi = \operatorname{softmax}(x W), \quad
       a \sim \pi \text{ (training)}, \; \operatorname{argmax} \pi \text{ (evaluation)}, \quad
       y = f_a(x), \quad b = x \cdot v + c

    The weight of the chosen expert is the constant 1: the task gives the router no gradient, only
    the policy does. The reward of a token is the log-likelihood of its target, b what was expected.
    Losses: ``moe.losses.policy`` = -(reward - b) log pi(a) and ``moe.losses.baseline`` = (reward -
    b)^2, weighed by the preset, and in training ``rl_entropy`` = -entropy_weight H(pi), which
    keeps it exploring. The policy's gradient reaches the tokens below the router too; the
    baseline's stops at the router.

    Visibility: a draw is the token's own; a token sees others only through capacity.

    Reference: the third method of Clark et al., "Unified Scaling Laws for Routed Language Models",
    arXiv 2202.01169 (its appendix was not available: architecture of the baseline and all weights
    are ours); Williams 1992. A token's reward is its own target's alone, although its choice also
    moves later tokens through attention.
    """

    entropy_weight: Annotated[float, "of the entropy bonus, in nats"] = 0.01
    init_scale: Annotated[float, "router init: std = sqrt(init_scale / d_model)"] = 0.1

    trained_by: ClassVar[TrainedBy] = "policy"

    def check(self, num_experts: int, train: bool) -> None:
        ops.check_positive("init_scale", self.init_scale)
        if self.entropy_weight < 0:
            raise ValueError(f"gate.entropy_weight={self.entropy_weight} must be 0 or more")

    def columns(self, num_experts: int) -> int:
        return 1

    def init(self, key: Array, spec: GateSpec) -> GateParams:
        # What a model that knows nothing can expect: every choice would look bad next to 0.
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
            # The largest of logits with Gumbel noise is a sample of their softmax.
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

    def capacity(self, num_tokens: int, num_experts: int, factor: float) -> int:
        return ops.token_choice_capacity(num_tokens, num_experts, 1, factor)

    def visibility(self, moe: MoEConfig) -> Visibility:
        return ops.capacity_visibility(1, moe, with_gate=ops.by_position)  # weights are all equal
