"""EvoMoE's dense-to-sparse gate: Gumbel noise and a falling temperature make routing sparse."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.gating import ops
from moejax.gating.gate import (
    INIT_SCALE,
    InitScale,
    LinearRouter,
    MaxActive,
    Stateless,
    VariableK,
    token_choice_capacity,
)
from moejax.gating.visibility import capacity_visibility
from moejax.types import (
    GateContext,
    GateOutput,
    GateParams,
    GateState,
    MoEConfig,
    TrainedBy,
    Visibility,
)

SCHEDULES = ("exponential", "linear")
WEIGHTS = ("softmax", "gumbel")


@dataclasses.dataclass(frozen=True)
class EvoMoE(Stateless, LinearRouter, VariableK):
    r"""Every expert whose Gumbel-softmax share is above a threshold; later only the best one.

    .. math::
       \tilde{g} = \operatorname{softmax}((h + \text{Gumbel}) / \tau), \quad
       S = \{e : \tilde{g}_e > \text{threshold}\}, \quad
       y = \sum_{e \in S} \operatorname{softmax}(h)_e f_e(x), \quad h = x W

    At a high temperature a token visits all experts, at a low one a sample from softmax(h). tau
    falls over ``temperature_steps`` steps, by equal factors (``exponential``) or differences
    (``linear``), and then stays at ``min_temperature``. From ``hard_step`` on, S is the one expert
    with the largest noisy logit. Evaluation visits argmax h without noise. Weights are not
    renormalised; with ``weights=gumbel`` training uses g~ instead.

    At first the number of experts per token (``moe/experts_per_token``) depends on tau alone: use
    ``dropless`` (the preset), and ``max_active`` to bound memory.

    Visibility: a token sees neither later tokens nor other sequences, except through capacity.

    Reference: Nie et al., "EvoMoE: An Evolutional Mixture-of-Experts Training Framework via
    Dense-To-Sparse Gate", arXiv 2112.14397. The threshold and temperatures are the defaults of the
    authors' code; the numbers of steps are ours. Deviations: the balance loss is
    ``moe.losses.load_balance`` at all steps, computed from softmax(h) and the pairs' shares; theirs
    is computed from the kept weights and ends at the hard stage. Their first stage (one expert,
    copied) is a training scheme, not a gate. Their evaluation may draw noise; this one never does.
    """

    temperature: Annotated[float, "tau at step 0"] = 1.0
    min_temperature: Annotated[float, "final tau"] = 0.5
    temperature_steps: Annotated[int, "steps from one to the other"] = 200
    schedule: Annotated[str, "'exponential' or 'linear'"] = "exponential"
    threshold: Annotated[float, "experts with a larger share are visited; below 1/E"] = 0.001
    hard_step: Annotated[int, "step from which one expert per token is visited (-1: never)"] = 200
    weights: Annotated[str, "'softmax' of the clean logits, or the noisy 'gumbel' share"] = (
        "softmax"
    )
    max_active: MaxActive = 0
    init_scale: InitScale = INIT_SCALE

    trained_by: ClassVar[TrainedBy] = "task"

    def check(self, num_experts: int, train: bool) -> None:
        for field in ("min_temperature", "temperature_steps", "init_scale"):
            ops.check_positive(field, getattr(self, field))
        if self.temperature < self.min_temperature:
            raise ValueError(
                f"gate.temperature={self.temperature} must be at least gate.min_temperature="
                f"{self.min_temperature}"
            )
        ops.check_choice("schedule", self.schedule, SCHEDULES)
        ops.check_choice("weights", self.weights, WEIGHTS)
        if not 0.0 <= self.threshold < 1.0 / num_experts:
            raise ValueError(
                f"gate.threshold={self.threshold} must lie in [0, 1/num_experts="
                f"{1 / num_experts:g}), or a token might visit no expert"
            )
        if self.hard_step < -1:
            raise ValueError(f"gate.hard_step={self.hard_step} must be a step, or -1 for never")
        ops.check_max_active(self.max_active, num_experts)

    def temperature_at(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """The temperature tau at a step."""
        done = jnp.minimum(step.astype(jnp.float32) / self.temperature_steps, 1.0)
        if self.schedule == "linear":
            return self.temperature + (self.min_temperature - self.temperature) * done
        return self.temperature * (self.min_temperature / self.temperature) ** done

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        logits_GTE = ops.router_logits(x_GTD, params["router_DE"])
        stats, num_experts = ops.softmax_stats(logits_GTE), logits_GTE.shape[-1]
        share_GTE, means, noisy_GTE = stats.probs_GTE, {}, logits_GTE
        hard = jnp.bool_(True)
        if context.train:
            noisy_GTE += ops.row_noise(jax.random.gumbel, context, (num_experts,))
            temperature = self.temperature_at(context.step)
            share_GTE = jax.nn.softmax(noisy_GTE / temperature, axis=-1)
            means["temperature"] = jnp.broadcast_to(temperature, len(x_GTD))
            hard = (context.step >= self.hard_step) & (self.hard_step >= 0)
        best_GT1 = jnp.argmax(noisy_GTE, axis=-1, keepdims=True)
        best_GTE = best_GT1 == jnp.arange(num_experts)
        visited_GTE = jnp.where(hard, best_GTE, share_GTE > self.threshold)
        value_GTE = share_GTE if self.weights == "gumbel" else stats.probs_GTE
        # A weight of 0 would mark the pair as absent.
        value_GTE = ops.at_least_tiny(value_GTE)
        weight_GTE = jnp.where(visited_GTE, value_GTE, 0.0)
        routing, cut_GTE = ops.heaviest(weight_GTE, self.max_active, context.valid_GT)
        return GateOutput(routing, stats, means=means, cut_GTE=cut_GTE)

    def capacity(self, num_tokens: int, num_experts: int, factor: float) -> int:
        return token_choice_capacity(num_tokens, num_experts, 1, factor)

    def visibility(self, moe: MoEConfig) -> Visibility:
        # Without cuts column e is expert e, so service column by column favours no token; in
        # evaluation a token has one expert.
        cuts = self.columns(moe.num_experts) < moe.num_experts
        train = capacity_visibility(1, moe, columns=self.max_active if cuts else 1)
        evaluation = capacity_visibility(1, moe)
        return Visibility(*train[:2], *evaluation[2:])
