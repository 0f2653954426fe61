"""S-BASE: Sinkhorn's algorithm balances the routing in training."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from moejax.gating import ops
from moejax.gating.gate import INIT_SCALE, InitScale, LinearRouter, token_choice_capacity
from moejax.gating.solvers.assignment import balanced_assignments
from moejax.gating.solvers.sinkhorn import sinkhorn_bias
from moejax.gating.visibility import balanced_visibility
from moejax.mesh import group_local, spreads
from moejax.types import (
    GateContext,
    GateOutput,
    GateParams,
    GateSpec,
    GateState,
    MoEConfig,
    MoEStats,
    TrainedBy,
    Visibility,
)

ROUNDINGS = ("capacity", "balanced")
EVALUATIONS = ("greedy", "ema")


@dataclasses.dataclass(frozen=True)
class SBase(LinearRouter):
    r"""Tokens go to the largest entries of an entropic transport plan with equal columns.

    .. math::
       h = x W, \qquad \Pi = \operatorname{Sinkhorn}_\epsilon(h), \qquad
       S_t = \operatorname{top}_k(\Pi_t) = \operatorname{top}_k(h_t + b), \qquad
       y_t = \sum_{e \in S_t} p_{te} f_e(x_t)

    b is one bias per expert, computed from the group at hand (`moejax.gating.solvers.sinkhorn`).
    Loss-free balancing has the same bias, computed from past batches. The plan carries no
    gradient; p is softmax(h) over all experts, or sigmoid(h).

    The plan is balanced, but its largest entries are only nearly so. ``rounding`` removes the
    remaining imbalance: "capacity" leaves it to the transport's slots and counts the dropped pairs;
    "balanced" (k = 1) uses the balanced assignment of the plan's logarithm, which is that of h
    because row and column factors change no assignment: BASE with other weights. Logged:
    ``moe/gate/residual_imbalance``, max_e n_e / mean - 1 per group, and ``moe/gate/column_error``,
    the same for the columns of the plan.

    ``evaluation``: "greedy" omits b (as the paper does); "ema" adds the moving average of the
    training biases, which is causal too. The average is state, updated once per step.

    Groups: ``group="sequence"``, or ``group="batch"``, which sums columns over the mesh in each
    iteration (E numbers).

    Visibility: in training a token's experts depend on later tokens of its group; in evaluation on
    itself alone, except through capacity.

    Reference: Clark et al., "Unified Scaling Laws for Routed Language Models", arXiv 2202.01169;
    Cuturi, "Sinkhorn Distances", arXiv 1306.0895. Deviation: the number of iterations is fixed
    unless ``tol`` is set (the paper does not state it). Megatron-Core takes sigmoid weights for
    k = 1.
    """

    k: Annotated[int, "experts per token"] = 1
    epsilon: Annotated[float, "weight of the plan's entropy, in units of the logits"] = 1.0
    num_iters: Annotated[int, "Sinkhorn iterations, or their bound when tol > 0"] = 50
    tol: Annotated[float, "stop when every column is this close to its share (0: never)"] = 0.0
    score: Annotated[str, "combine weights: 'softmax' over all experts, or 'sigmoid'"] = "softmax"
    rounding: Annotated[str, "'capacity', or 'balanced' (k=1): exactly equal loads"] = "capacity"
    evaluation: Annotated[str, "'greedy', or 'ema': with the mean of training biases"] = "greedy"
    ema_decay: Annotated[float, "of the bias average, per step"] = 0.99
    init_scale: InitScale = INIT_SCALE

    trained_by: ClassVar[TrainedBy] = "task"

    def check(self, num_experts: int, train: bool) -> None:
        ops.check_k(self.k, num_experts)
        for field in ("epsilon", "num_iters", "init_scale"):
            ops.check_positive(field, getattr(self, field))
        if self.tol < 0:
            raise ValueError(f"gate.tol={self.tol} must be 0 (never stop early) or more")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"gate.ema_decay={self.ema_decay} must lie in [0, 1)")
        ops.check_choice("score", self.score, ops.SCORES)
        ops.check_choice("rounding", self.rounding, ROUNDINGS)
        ops.check_choice("evaluation", self.evaluation, EVALUATIONS)
        if self.rounding == "balanced" and self.k != 1:
            raise ValueError(
                f"gate.rounding='balanced' assigns one expert per token, but gate.k={self.k}; "
                "use gate.k=1 or gate.rounding=capacity"
            )

    def columns(self, num_experts: int) -> int:
        return self.k

    def init_state(self, spec: GateSpec) -> GateState:
        if self.evaluation == "greedy":
            return ()
        return {"bias_E": jnp.zeros(spec.num_experts, jnp.float32), "mass": jnp.float32(0.0)}

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        logits_GTE = ops.router_logits(x_GTD, params["router_DE"])
        means = {}
        if context.train:
            bias_GE = self._bias(logits_GTE, context.valid_GT)
        elif self.evaluation == "ema":
            bias_GE = state["bias_E"] / jnp.maximum(state["mass"], jnp.finfo(jnp.float32).tiny)
        else:
            bias_GE = jnp.zeros(logits_GTE.shape[-1], jnp.float32)
        biased_GTE = jax.lax.stop_gradient(logits_GTE) + jnp.expand_dims(bias_GE, -2)
        if context.train and self.rounding == "balanced":
            best = balanced_assignments(biased_GTE, context.valid_GT)
            expert_GTK = jnp.maximum(best.expert_T, 0)[..., None]
        else:
            expert_GTK, _ = ops.local_top_k(biased_GTE, self.k, False)
        stats = ops.softmax_stats(logits_GTE)
        score_GTE = stats.probs_GTE if self.score == "softmax" else jax.nn.sigmoid(logits_GTE)
        weight_GTK = ops.at_expert(score_GTE, expert_GTK)
        weight_GTK = ops.at_least_tiny(weight_GTK)
        routing = ops.masked(expert_GTK, weight_GTK, context.valid_GT)
        if context.train:
            plan_GTE = jax.nn.softmax(biased_GTE / self.epsilon, axis=-1)
            plan_GTE = jnp.where(context.valid_GT[..., None], plan_GTE, 0.0)
            pairs_GTE = ops.has_pair(routing, logits_GTE.shape[-1])
            means = {
                "bias": bias_GE,
                "column_error": ops.imbalance(plan_GTE),
                "residual_imbalance": ops.imbalance(pairs_GTE.astype(jnp.float32)),
            }
        return GateOutput(routing, stats, means=means)

    def _bias(self, logits_GTE: Array, valid_GT: Array) -> Array:
        def one(logits_TE: Array, valid_T: Array) -> Array:
            return sinkhorn_bias(
                logits_TE,
                epsilon=self.epsilon,
                num_iters=self.num_iters,
                tol=self.tol or None,
                valid_T=valid_T,
            )

        # A group on one device needs no communication; the column sums of others cross the mesh.
        run = jax.vmap(one)
        bias_GE = (group_local(run) if spreads(len(valid_GT)) else run)(logits_GTE, valid_GT)
        return checkpoint_name(bias_GE, "routing")

    def update(self, state: GateState, stats: MoEStats) -> GateState:
        if self.evaluation == "greedy":
            return state
        bias_E = stats.gate["bias"] / jnp.maximum(stats.tokens, 1)
        keep = self.ema_decay
        return {
            "bias_E": keep * state["bias_E"] + (1.0 - keep) * bias_E,
            "mass": keep * state["mass"] + (1.0 - keep),
        }

    def capacity(self, num_tokens: int, num_experts: int, factor: float) -> int:
        factor = 1.0 if self.rounding == "balanced" else factor
        return token_choice_capacity(num_tokens, num_experts, self.k, factor)

    def visibility(self, moe: MoEConfig) -> Visibility:
        factor = 1.0 if self.rounding == "balanced" else None
        return balanced_visibility(moe, eval_factor=factor, k=self.k)
