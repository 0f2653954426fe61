"""Expert choice: each expert takes its best tokens, instead of each token its best experts."""

import dataclasses
import math
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from moejax.gating import ops
from moejax.gating.gate import (
    INIT_SCALE,
    InitScale,
    LinearRouter,
    MaxActive,
    VariableK,
    token_choice_capacity,
)
from moejax.gating.visibility import capacity_visibility
from moejax.mesh import group_local
from moejax.types import (
    GateContext,
    GateOutput,
    GateParams,
    GateSpec,
    GateState,
    GateTraits,
    MoEConfig,
    MoEStats,
    Order,
    SlotRules,
    TrainedBy,
    Visibility,
)

POLICIES = ("choice", "threshold", "position")


@dataclasses.dataclass(frozen=True)
class ExpertChoice(LinearRouter, VariableK):
    r"""Each expert takes the C tokens of a group that score highest with it.

    .. math::
       p = \operatorname{softmax}_e(x W), \qquad C = \lceil c \, T / E \rceil, \qquad
       S_e = \operatorname{top}_C(p_{\cdot e}), \qquad y_t = \sum_{e: t \in S_e} p_{te} f_e(x_t)

    Load is equal by construction. A token visits c = ``factor`` experts on average; some tokens
    visit none and some many (``max_active`` bounds the number, and pairs that it cuts count as
    dropped). Weights are the probabilities, not renormalised. With ``cells`` every slot is filled,
    whatever the capacity factor. T counts valid tokens.

    A choice among all tokens of a sequence makes earlier tokens depend on later ones. Training
    (``policy``) and evaluation (``eval_policy``) each use the choice or a causal surrogate:

    * "choice": the choice of the paper.
    * "threshold": a token visits the experts with p above the moving average, over training steps,
      of the C-th largest p of a group (state, one number per expert). Causal and independent of
      other tokens, but load is equal only on average. With ``policy="threshold"`` capacity is that
      of token choice; after training by choice it stays C, whatever the evaluation's factor.
    * "position": each expert chooses among the i-th valid tokens of a group's rows. Causal, but
      sequences see each other. It needs ``moe.group`` of E/c sequences or more, and ``dropless``.

    Preset ``expert_choice_causal`` trains by choice and evaluates by threshold.

    Visibility: "choice" sees the future and, in groups of several sequences, the others.

    Reference: Zhou et al., "Mixture-of-Experts with Expert Choice Routing", arXiv 2202.09368. Its
    variant with a bound per token, solved by a linear program, is not implemented.
    """

    factor: Annotated[float, "experts per token, on average"] = 2.0
    policy: Annotated[str, "in training: 'choice', 'threshold' or 'position'"] = "choice"
    eval_policy: Annotated[str, "in evaluation: 'choice' (leaks), 'threshold', 'position'"] = (
        "choice"
    )
    ema_decay: Annotated[float, "of the thresholds' average, per step"] = 0.99
    max_active: MaxActive = 0
    init_scale: InitScale = INIT_SCALE

    trained_by: ClassVar[TrainedBy] = "task"

    @property
    def policies(self) -> tuple[str, str]:
        """The policies in training and in evaluation."""
        return self.policy, self.eval_policy

    def check(self, num_experts: int, train: bool) -> None:
        for field in ("factor", "init_scale"):
            ops.check_positive(field, getattr(self, field))
        for field in ("policy", "eval_policy"):
            ops.check_choice(field, getattr(self, field), POLICIES)
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"gate.ema_decay={self.ema_decay} must lie in [0, 1)")
        ops.check_max_active(self.max_active, num_experts)

    def traits(self) -> GateTraits:
        return GateTraits(
            least_rows=self._least_rows,
            reads_past=self.eval_policy == "choice",
            causal_fields={"eval_policy": "threshold"},
        )

    def _least_rows(self, num_experts: int) -> int:
        """With fewer sequences in a group, a choice among them would take them all."""
        return math.ceil(num_experts / self.factor) if "position" in self.policies else 1

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
        # A weight of 0 would mark the pair as absent.
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
        return token_choice_capacity(num_tokens, num_experts, 1, self.factor * self._slack(factor))

    def _slack(self, factor: float) -> float:
        """Slots over the pairs of a choice; 1 where the choice fills every slot."""
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
        by_capacity = capacity_visibility(self.factor, moe, columns, with_gate)
        train, evaluation = (
            {
                "choice": (selects, selects and several),
                "position": (False, selects and several),
                "threshold": (False, False) if "position" in self.policies else seen,
            }[policy]
            for policy, seen in zip(self.policies, (by_capacity[:2], by_capacity[2:]), strict=True)
        )
        return Visibility(*train, *evaluation)


def choose_tokens(
    score_TE: Float[Array, "T E"], factor: float, valid_T: Bool[Array, "T"] | None = None
) -> tuple[Bool[Array, "T E"], Float[Array, "E"]]:
    """Each expert's C best valid tokens, and the score of the last of them (0 if there are none).

    C = ceil(factor * T / E) for T valid tokens, at least 1 and at most T, so padding changes
    nothing. Ties go to the earlier token; a score that is NaN comes last.
    """
    tokens, num_experts = score_TE.shape
    valid_T1 = jnp.ones((tokens, 1), bool) if valid_T is None else valid_T[:, None]
    score_TE = jnp.where(valid_T1 & ~jnp.isnan(score_TE), score_TE, -jnp.inf)
    counts = range(1, tokens + 1)
    slots_N = np.array([0, *(token_choice_capacity(n, num_experts, 1, factor) for n in counts)])
    taken = jnp.asarray(slots_N, jnp.int32)[jnp.sum(valid_T1)]
    best_EC, _ = jax.lax.top_k(score_TE.T, slots_N[-1].item())
    last_E = jnp.take(best_EC, jnp.maximum(taken - 1, 0), axis=1)
    above_TE = score_TE > last_E
    level_TE = valid_T1 & (score_TE == last_E)
    room_E = taken - jnp.sum(above_TE, axis=0)
    chosen_TE = above_TE | (level_TE & (jnp.cumsum(level_TE, axis=0) <= room_E))
    return chosen_TE, jnp.where(jnp.isfinite(last_E), last_E, 0.0)
