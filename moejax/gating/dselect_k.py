"""DSelect-k: a differentiable choice of at most k experts through binary codes."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.gating import ops
from moejax.gating.gate import ConstantState, MaxActive, PositiveWeights
from moejax.gating.solvers.selectors import TINY, code_bits, mix, selectors, smoothed_entropy
from moejax.types import (
    GateContext,
    GateOutput,
    GateParams,
    GateSpec,
    GateState,
    RouterStats,
    TrainedBy,
)


@dataclasses.dataclass(frozen=True)
class DSelectK(ConstantState, PositiveWeights):
    r"""k selectors, each a product of smoothed bits, mixed by a softmax.

    .. math:: q(x) = \sum_{i=1}^k \operatorname{softmax}(w(x))_i \, r(z_i(x)), \qquad
       y = \sum_{e: q_e > 0} q_e f_e(x)

    Trained by gradient descent alone: q is continuously differentiable in z and w. An undecided
    selector spreads over many experts, and every expert with q_e > 0 is visited: compute starts
    near E experts per token and falls towards k as bits are decided (``moe/experts_per_token``).
    ``max_active`` bounds it; the pairs that it cuts count as dropped.

    ``per_example``: z and w are affine in x; otherwise free parameters, equal for all tokens. With
    several tasks (``num_tasks`` of the layer) each task has its own gate.

    Losses of its own, in training, averaged over tokens (the published sums grow with the batch):
    ``dselect_entropy`` = entropy_weight * sum_i H(r(z_i)), ramped up linearly over
    ``entropy_steps``; and when E is no power of two ``dselect_range`` = penalty_weight *
    sum_i 1 / sum_e r_e(z_i), which keeps selectors off the codes that number no expert.

    Visibility: a token sees itself alone (a static gate not even that), except through capacity.

    Reference: Hazimeh et al., "DSelect-k", arXiv 2106.03760. Deviations: averages instead of sums;
    1e-6 is added inside the logarithm (as in theirs) and the reciprocal (not in theirs).
    """

    k: Annotated[int, "selectors: the most experts a decided token visits"] = 2
    gamma: Annotated[float, "width of the smooth step: |z| >= gamma/2 decides a bit"] = 1.0
    per_example: Annotated[bool, "codes depend on the token (false: one choice for all)"] = True
    max_active: MaxActive = 0
    entropy_weight: Annotated[float, "of the selectors' entropy: pushes bits to decide"] = 0.01
    entropy_steps: Annotated[int, "steps from 0 to the entropy weight (0: none)"] = 0
    penalty_weight: Annotated[float, "of 1 / (mass on real experts), if E is no power of 2"] = 1.0

    trained_by: ClassVar[TrainedBy] = "task"

    def check(self, num_experts: int, train: bool) -> None:
        ops.check_k(self.k, num_experts)
        ops.check_positive("gamma", self.gamma)
        for field in ("entropy_weight", "entropy_steps", "penalty_weight"):
            ops.check_not_negative(field, getattr(self, field))
        ops.check_max_active(self.max_active, num_experts)

    def init(self, key: Array, spec: GateSpec) -> GateParams:
        tasks, bits, small = spec.num_tasks, code_bits(spec.num_experts), self.gamma / 100

        def uniform(index: int, shape: tuple[int, ...], bound: float) -> Array:
            return jax.random.uniform(
                jax.random.fold_in(key, index), shape, jnp.float32, -bound, bound
            )

        params = {
            "code_MZ": uniform(0, (tasks, self.k * bits), small),
            "mix_MS": uniform(1, (tasks, self.k), 0.05),
        }
        if self.per_example:
            params["code_MDZ"] = uniform(2, (tasks, spec.d_model, self.k * bits), small)
            params["mix_MDS"] = uniform(3, (tasks, spec.d_model, self.k), 0.05)
        return params

    def init_state(self, spec: GateSpec) -> GateState:
        """The experts' codes, which never change."""
        return {"code_E": jnp.arange(spec.num_experts, dtype=jnp.int32)}

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        z_GTSM, w_GTS = self._codes(params, x_GTD, context)
        chosen_GTSE = selectors(z_GTSM, state["code_E"], self.gamma)
        weight_GTE = mix(w_GTS, chosen_GTSE)
        routing, cut_GTE = ops.heaviest(weight_GTE, self.max_active, context.valid_GT)
        total_GT1 = jnp.sum(weight_GTE, axis=-1, keepdims=True)
        probs_GTE = weight_GTE / jnp.maximum(total_GT1, TINY)
        # The gate has no logits of its own; any with these probabilities will do.
        logits_GTE = jnp.log(jnp.maximum(probs_GTE, TINY))
        losses = self._losses(chosen_GTSE, context) if context.train else {}
        entropy_GT = jnp.sum(smoothed_entropy(chosen_GTSE), axis=-1)
        return GateOutput(
            routing,
            RouterStats(logits_GTE, probs_GTE, probs_GTE),
            losses,
            means={"selector_entropy": ops.group_mean(entropy_GT, context.valid_GT)},
            cut_GTE=cut_GTE,
        )

    def _codes(self, params: GateParams, x_GTD: Array, context: GateContext) -> tuple[Array, Array]:
        """z [G, T, S, M] and w [G, T, S] of each token's task."""
        groups, tokens = context.valid_GT.shape
        z_GTMZ, w_GTMS = params["code_MZ"][None, None], params["mix_MS"][None, None]
        if self.per_example:
            z_GTMZ += _per_task(x_GTD, params["code_MDZ"])
            w_GTMS += _per_task(x_GTD, params["mix_MDS"])
        rows = context.task_GR.shape[1]
        task_GT11 = jnp.repeat(context.task_GR, tokens // rows, axis=1)[:, :, None, None]

        def of_task(a_GTMX: Array) -> Array:
            whole = jnp.broadcast_to(a_GTMX, (groups, tokens, *a_GTMX.shape[2:]))
            if a_GTMX.shape[2] == 1:
                return whole[:, :, 0]
            return jnp.take_along_axis(whole, task_GT11, axis=2)[:, :, 0]

        z_GTZ = of_task(z_GTMZ)
        return z_GTZ.reshape(groups, tokens, self.k, z_GTZ.shape[-1] // self.k), of_task(w_GTMS)

    def _losses(self, chosen_GTSE: Array, context: GateContext) -> dict[str, Array]:
        progress = 1.0
        if self.entropy_steps:
            progress = jnp.minimum(context.step.astype(jnp.float32) / self.entropy_steps, 1.0)
        entropy_GT = jnp.sum(smoothed_entropy(chosen_GTSE), axis=-1)
        losses = {"dselect_entropy": self.entropy_weight * progress * ops.mean(entropy_GT, context)}
        num_experts = chosen_GTSE.shape[-1]
        if 2 ** code_bits(num_experts) != num_experts:
            mass_GTS = jnp.sum(chosen_GTSE, axis=-1)
            range_GT = jnp.sum(1.0 / (mass_GTS + TINY), axis=-1)
            losses["dselect_range"] = self.penalty_weight * ops.mean(range_GT, context)
        return losses


def _per_task(x_GTD: Array, weight_MDX: Array) -> Float[Array, "G T M X"]:
    tasks, width, size = weight_MDX.shape
    flat_DY = jnp.swapaxes(weight_MDX, 0, 1).reshape(width, tasks * size)
    return ops.router_logits(x_GTD, flat_DY).reshape(*x_GTD.shape[:2], tasks, size)
