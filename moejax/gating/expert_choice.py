"""Expert choice: each expert takes its best tokens, instead of each token its best experts."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from moejax.gating import ops
from moejax.gating.column_choice import choose_tokens, slots
from moejax.mesh import group_local
from moejax.types import (
    GateContext,
    GateOutput,
    GateParams,
    GateSpec,
    GateState,
    MoEConfig,
    MoEStats,
    Order,
    SlotRules,
    TrainedBy,
    Visibility,
)

POLICIES = ("choice", "threshold", "position")


@dataclasses.dataclass(frozen=True)
class ExpertChoice:
    r"""Each expert takes the C tokens of a group that score highest with it.

    .. math::
       p = \operatorname{softmax}_e(x W), \qquad C = \lceil c \, T / E \rceil, \qquad
       S_e = \operatorname{top}_C(p_{\cdot e}), \qquad y_t = \sum_{e: t \in S_e} p_{te} f_e(x_t)

    Load is equal by construction; a token visits c = ``factor`` experts on average, some none and
    some many (``max_active`` bounds it; what it cuts counts as dropped). Weights are the
    probabilities, not renormalised. With ``cells`` every slot is filled, whatever the capacity
    factor. T counts valid tokens.

    A choice among all tokens of a sequence shows the future to the past. Surrogates, for training
    (``policy``) and evaluation (``eval_policy``) separately:

    * "choice": the paper's.
    * "threshold": a token visits the experts with p above the moving average, over training steps,
      of the C-th largest p of a group (state, one number per expert). Causal and independent of
      other tokens; load is equal only on average. With ``policy="threshold"`` capacity is that of
      token choice; after training by choice it stays C, whatever the evaluation's factor.
    * "position": each expert chooses among the i-th valid tokens of a group's rows. Causal, but
      sequences see each other; needs ``moe.group`` of E/c sequences or more, and ``dropless``.

    Preset ``expert_choice_causal`` trains by choice and evaluates by threshold.

    Visibility: "choice" sees the future and, in groups of several sequences, the others.

    Reference: Zhou et al., "Mixture-of-Experts with Expert Choice Routing", arXiv 2202.09368. Not
    here: its variant with a bound per token, solved by a linear program.
    """

    factor: Annotated[float, "experts per token, on average"] = 2.0
    policy: Annotated[str, "in training: 'choice', 'threshold' or 'position'"] = "choice"
    eval_policy: Annotated[str, "in evaluation: 'choice' (leaks), 'threshold', 'position'"] = (
        "choice"
    )
    ema_decay: Annotated[float, "of the thresholds' average, per step"] = 0.99
    max_active: Annotated[int, "most experts per token, the heaviest ones (0: all E)"] = 0
    init_scale: Annotated[float, "router init: std = sqrt(init_scale / d_model)"] = 0.1

    trained_by: ClassVar[TrainedBy] = "task"
    causal: ClassVar[Mapping[str, Any]] = {"eval_policy": "threshold"}

    @property
    def policies(self) -> tuple[str, str]:
        """In training and in evaluation."""
        return self.policy, self.eval_policy

    def check(self, num_experts: int, train: bool) -> None:
        for field in ("factor", "init_scale"):
            ops.check_positive(field, getattr(self, field))
        for field in ("policy", "eval_policy"):
            ops.check_choice(field, getattr(self, field), POLICIES)
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"gate.ema_decay={self.ema_decay} must lie in [0, 1)")
        ops.check_max_active(self.max_active, num_experts)

    def least_rows(self, num_experts: int) -> int:
        """Sequences a group must have, or a choice among them would take them all."""
        return math.ceil(num_experts / self.factor) if "position" in self.policies else 1

    def columns(self, num_experts: int) -> int:
        return self.max_active or num_experts

    def init(self, key: Array, spec: GateSpec) -> GateParams:
        return {"router_DE": ops.init_router(key, spec, self.init_scale)}

    def init_state(self, spec: GateSpec) -> GateState:
        if "threshold" not in self.policies:
            return ()
        uniform_E = jnp.full(spec.num_experts, 1.0 / spec.num_experts, jnp.float32)
        return {"threshold_E": uniform_E, "updates": jnp.int32(0)}

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        stats = ops.softmax_stats(ops.router_logits(x_GTD, params["router_DE"]))
        score_GTE = jax.lax.stop_gradient(stats.probs_GTE)
        policy, means = self.policies[0 if context.train else 1], {}
        observed = context.train and "threshold" in self.policies
        chosen_GTE = jnp.zeros(score_GTE.shape, bool)
        if policy == "choice" or observed:
            choose = group_local(jax.vmap(lambda s, v: choose_tokens(s, self.factor, v)))
            chosen_GTE, last_GE = choose(score_GTE, context.valid_GT)
            means = {"threshold": last_GE} if observed else {}
        if policy == "threshold":
            chosen_GTE = score_GTE >= state["threshold_E"]
        elif policy == "position":
            chosen_GTE = self._by_position(score_GTE, context)
        # A probability that underflows to 0 would mean: not sent.
        weight_GTE = ops.at_least_tiny(stats.probs_GTE)
        weight_GTE = jnp.where(chosen_GTE, weight_GTE, 0.0)
        routing, cut_GTE = ops.heaviest(weight_GTE, self.max_active, context.valid_GT)
        return GateOutput(routing, stats, means=means, cut_GTE=cut_GTE)

    def _by_position(self, score_GTE: Array, context: GateContext) -> Bool[Array, "G T E"]:
        rows = context.row_GR.shape[1]

        def choose(score_TE: Array, valid_T: Array) -> Array:
            score_RLE = score_TE.reshape(rows, -1, score_TE.shape[-1])
            valid_RL = valid_T.reshape(rows, -1)
            order = Order.of(valid_RL)  # padding shifts no position

            def one(score_RE: Array, valid_R: Array) -> Array:
                return choose_tokens(score_RE, self.factor, valid_R)[0]

            tokens = order.tokens(score_RLE), order.tokens(valid_RL)
            chosen_RLE = jax.vmap(one, in_axes=1, out_axes=1)(*tokens)
            return order.places(chosen_RLE).reshape(score_TE.shape)

        return group_local(jax.vmap(choose))(score_GTE, context.valid_GT)

    def update(self, state: GateState, stats: MoEStats) -> GateState:
        if "threshold" not in self.policies:
            return state
        # The first step's value replaces the initial one, then a plain mean until the EMA begins.
        done = state["updates"].astype(jnp.float32)
        keep = jnp.minimum(self.ema_decay, done / (done + 1.0))
        last_E = stats.gate["threshold"] / jnp.maximum(stats.tokens, 1).astype(jnp.float32)
        return {
            "threshold_E": keep * state["threshold_E"] + (1.0 - keep) * last_E,
            "updates": state["updates"] + 1,
        }

    def capacity(self, num_tokens: int, num_experts: int, factor: float) -> int:
        if "position" in self.policies:
            return num_tokens
        return slots(num_tokens, num_experts, self.factor * self._slack(factor))

    def _slack(self, factor: float) -> float:
        """Slots over what a choice fills: those of a choice are neither more nor fewer."""
        if self.policy == "choice":
            return 1.0
        return max(factor, 1.0) if self.eval_policy == "choice" else factor

    def visibility(self, moe: MoEConfig) -> Visibility:
        several = moe.group not in ("sequence", "1")
        selects = self.factor < moe.num_experts
        cuts = self.columns(moe.num_experts) < moe.num_experts

        def with_gate(rules: SlotRules) -> SlotRules:
            return dataclasses.replace(rules, capacity_factor=self._slack(rules.capacity_factor))

        columns = self.max_active if cuts else 1
        by_capacity = ops.capacity_visibility(self.factor, moe, columns, with_gate)
        train, evaluation = (
            {
                "choice": (selects, selects and several),
                "position": (False, selects and several),
                "threshold": (False, False) if "position" in self.policies else seen,
            }[policy]
            for policy, seen in zip(self.policies, (by_capacity[:2], by_capacity[2:]), strict=True)
        )
        return Visibility(*train, *evaluation)
