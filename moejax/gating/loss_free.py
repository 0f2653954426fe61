"""Loss-free balancing: a bias per expert steers the selection. DeepSeek-V3 and V2 are presets."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.gating import ops
from moejax.gating.gate import INIT_SCALE, InitScale, LinearRouter, TokenChoice
from moejax.mesh import group_local
from moejax.types import (
    GateContext,
    GateOutput,
    GateParams,
    GateSpec,
    GateState,
    GateTraits,
    MoEStats,
    RouterStats,
    Routing,
    TrainedBy,
)

GROUP_SCORES: tuple[str, ...] = ("top2", "max")


def _log_sqrt_softplus(logits_GTE: Array) -> Array:
    # Where exp(x) vanishes beside 1, softplus(x) is exp(x).
    softplus_GTE = jax.nn.softplus(jnp.maximum(logits_GTE, -15.0))
    return 0.5 * jnp.where(logits_GTE < -15.0, logits_GTE, jnp.log(softplus_GTE))


LOG_SCORES = {
    "sigmoid": jax.nn.log_sigmoid,
    "softmax": jax.nn.log_softmax,
    "sqrt_softplus": _log_sqrt_softplus,
}
"""The logarithm of each score. In logarithms scores that all underflow still have shares."""


@dataclasses.dataclass(frozen=True)
class LossFree(LinearRouter, TokenChoice):
    r"""Top-k of scores with a bias per expert that grows while the expert has too few tokens.

    .. math::
       s = \operatorname{sigmoid}(x W), \quad S = \operatorname{top}_k(s + b), \quad
       g_e = \lambda \, \frac{s_e}{\sum_{j \in S} s_j} \; (e \in S), \qquad
       b_e \leftarrow b_e + u \operatorname{sign}(\bar n - n_e)

    lambda is ``route_scale`` and u is ``bias_rate``. n_e counts the pairs of e in the whole batch
    before capacity, without padding. The update happens once per training step, so only earlier
    batches influence the routing of a batch. The bias is in units of the scores, carries no
    gradient and never enters the weights. ``score="softmax"`` replaces the sigmoid by a softmax
    over all experts, ``"sqrt_softplus"`` by sqrt(ln(1 + e^h)) of the logit h (DeepSeek-V4).
    ``renormalize=False`` omits the division.

    Group-limited routing: experts form ``num_groups`` groups (nodes, devices), and a token may use
    only the ``top_groups`` groups with the largest sum of two best biased scores ("top2", V3) or
    the largest biased score ("max", V2's device-limited routing).

    Its own losses are 1 at balance before their weights: ``sequence_balance``, E sum_e f_e P_e per
    sequence, with P the mean of the scores divided by their sum and f counted over the k best
    scores without bias and groups; and ``device_balance``, the same for whole groups, with f
    counted over the routing in use.

    Visibility: a token sees neither later tokens nor other sequences (of its own batch), except
    through capacity.

    References: Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
    arXiv 2408.15664; DeepSeek-AI, "DeepSeek-V3", arXiv 2412.19437, and "DeepSeek-V2", arXiv
    2405.04434. Deviations: V2's communication loss and its token dropping by device are omitted.
    """

    k: Annotated[int, "experts per token"] = 2
    score: Annotated[str, "'sigmoid', 'softmax' over all experts, or 'sqrt_softplus'"] = "sigmoid"
    renormalize: Annotated[bool, "divide the weights by their sum over the k"] = True
    route_scale: Annotated[float, "factor on the weights"] = 1.0
    bias_rate: Annotated[float, "change of the bias per step (0: it stays 0)"] = 0.001
    num_groups: Annotated[int, "groups of experts for limited routing (1: no limit)"] = 1
    top_groups: Annotated[int, "groups that a token may use"] = 1
    group_score: Annotated[str, "score of a group: 'top2' (sum of two best) or 'max'"] = "top2"
    sequence_loss: Annotated[float, "weight of the sequence-wise balance loss"] = 0.0001
    device_loss: Annotated[float, "weight of the balance loss over groups"] = 0.0
    init_scale: InitScale = INIT_SCALE

    trained_by: ClassVar[TrainedBy] = "task"

    def check(self, num_experts: int, train: bool) -> None:
        ops.check_k(self.k, num_experts)
        ops.check_choice("score", self.score, tuple(LOG_SCORES))
        ops.check_choice("group_score", self.group_score, GROUP_SCORES)
        ops.check_positive("route_scale", self.route_scale)
        ops.check_positive("init_scale", self.init_scale)
        for field in ("bias_rate", "sequence_loss", "device_loss"):
            ops.check_not_negative(field, getattr(self, field))
        check_groups(self.k, num_experts, self.num_groups, self.top_groups)
        ops.check_trains(self.k, self.renormalize, num_experts, train)

    def traits(self) -> GateTraits:
        return GateTraits(follows=True)

    def init_state(self, spec: GateSpec) -> GateState:
        return {"bias_E": jnp.zeros(spec.num_experts, jnp.float32)}

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        logits_GTE = ops.router_logits(x_GTD, params["router_DE"])
        log_GTE = LOG_SCORES[self.score](logits_GTE)
        score_GTE, probs_GTE = jnp.exp(log_GTE), jax.nn.softmax(log_GTE)

        expert_GTK, wrong_GT = group_local(self._select)(score_GTE + state["bias_E"]), None
        if context.expert_GTK is not None:
            expert_GTK, wrong_GT = ops.followed(expert_GTK, context, logits_GTE.shape[-1])
        log_GTK = ops.at_expert(log_GTE, expert_GTK)
        weight_GTK = jax.nn.softmax(log_GTK) if self.renormalize else jnp.exp(log_GTK)
        # A weight of 0 would mark the pair as absent.
        weight_GTK = ops.at_least_tiny(self.route_scale * weight_GTK)
        routing = ops.masked(expert_GTK, weight_GTK, context.valid_GT)
        own = {}
        if self.sequence_loss:
            best = ops.masked(ops.local_best(score_GTE, self.k), weight_GTK, context.valid_GT)
            own["sequence_balance"] = self.sequence_loss * group_balance(
                best, probs_GTE, context, probs_GTE.shape[-1]
            )
        if self.device_loss:
            own["device_balance"] = self.device_loss * group_balance(
                routing, probs_GTE, context, self.num_groups
            )
        stats = RouterStats(logits_GTE, probs_GTE, probs_GTE)
        return GateOutput(routing, stats, losses=own, identity_weight_GT=wrong_GT)

    def _select(self, biased_GTE: Array) -> Array:
        limited = limit_groups(biased_GTE, self.num_groups, self.top_groups, self.group_score)
        return jax.lax.top_k(limited, self.k)[1].astype(jnp.int32)

    def update(self, state: GateState, stats: MoEStats) -> GateState:
        load_E = stats.load_E.astype(jnp.float32)
        step_E = jnp.sign(jnp.mean(load_E) - load_E)
        return {"bias_E": state["bias_E"] + self.bias_rate * step_E}


def limit_groups(
    score_TE: Float[Array, "*T E"], num_groups: int, top_groups: int, group_score: str = "top2"
) -> Float[Array, "*T E"]:
    """The scores, with -inf for experts outside the ``top_groups`` best groups of a token.

    The score of a group is the sum of its two best scores ("top2") or its best one ("max"). Ties go
    to the group of lower ids. The mark is -inf, not 0, because scores with a bias may be negative.
    """
    shape = score_TE.shape
    apart = score_TE.reshape(*shape[:-1], num_groups, -1)
    counted = min(2 if group_score == "top2" else 1, apart.shape[-1])
    worth = jnp.sum(jax.lax.top_k(apart, counted)[0], axis=-1)
    _, chosen = jax.lax.top_k(worth, top_groups)
    allowed = jnp.any(chosen[..., None] == jnp.arange(num_groups), axis=-2)
    return jnp.where(allowed[..., None], apart, -jnp.inf).reshape(shape)


def group_balance(
    routing: Routing, probs_GTE: Float[Array, "G T E"], context: GateContext, num_groups: int
) -> Float[Array, ""]:
    r"""Switch's balance loss over groups of experts, 1 when all groups have the same load.

    .. math:: L = D \sum_d \Big( \sum_{e \in d} f_e \Big) \Big( \sum_{e \in d} P_e \Big)

    with f_e the share of e in the pairs of a sequence and P_e its mean probability in it. The mean
    over sequences is weighted by valid tokens. Groups of one expert give the usual loss. The
    gradient flows through P only.
    """
    num_experts, valid_GT1 = probs_GTE.shape[-1], context.valid_GT[..., None]

    def by_sequence(value_GTE: Array) -> Array:
        """Sums over the tokens of a sequence and the experts of a group."""
        value_QUE = value_GTE.reshape(context.row_GR.size, -1, num_experts)
        value_QE = jnp.sum(value_QUE.astype(jnp.float32), axis=1)
        return jnp.sum(value_QE.reshape(len(value_QE), num_groups, -1), axis=-1)

    load_Qd = by_sequence(ops.has_pair(routing, num_experts))
    share_Qd = load_Qd / jnp.maximum(jnp.sum(load_Qd, axis=-1, keepdims=True), 1.0)
    # Summed, not averaged: a sequence's loss is weighted by its tokens.
    mass_Qd = by_sequence(jnp.where(valid_GT1, probs_GTE, 0.0))
    total = num_groups * jnp.sum(jax.lax.stop_gradient(share_Qd) * mass_Qd)
    return total / jnp.maximum(jnp.sum(context.valid_GT, dtype=jnp.float32), 1.0)


def check_groups(k: int, num_experts: int, num_groups: int, top_groups: int) -> None:
    """Raises ValueError unless k experts fit in ``top_groups`` of ``num_groups`` equal groups."""
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(
            f"gate.num_groups={num_groups} does not divide num_experts={num_experts}; use a "
            "divisor, or gate.num_groups=1 for no groups"
        )
    if not 1 <= top_groups <= num_groups:
        raise ValueError(
            f"gate.top_groups={top_groups} must lie between 1 and gate.num_groups={num_groups}"
        )
    if k > top_groups * (num_experts // num_groups):
        raise ValueError(
            f"gate.k={k} experts do not fit in gate.top_groups={top_groups} groups of "
            f"{num_experts // num_groups} (num_experts={num_experts}, gate.num_groups="
            f"{num_groups}); lower gate.k, or raise num_experts or gate.top_groups"
        )
