"""ReMoE: ReLU routing, kept sparse by an L1 loss with a self-regulating weight."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.gating import ops
from moejax.gating.gate import INIT_SCALE, InitScale, LinearRouter, MaxActive, PositiveWeights
from moejax.types import (
    GateContext,
    GateOutput,
    GateParams,
    GateSpec,
    GateState,
    MoEStats,
    RouterStats,
    TrainedBy,
)

SMALLEST, LARGEST = 1e-20, 1e20
"""Bounds of lambda, which could not rise again from 0."""
TINY = 1e-6
"""The least sum of weights whose shares get a gradient, which would be huge below it. Where all
weights are 0, the shares are uniform."""


@dataclasses.dataclass(frozen=True)
class ReMoE(LinearRouter, PositiveWeights):
    r"""A token visits every expert with a positive router output, which is the expert's weight.

    .. math::
       g = \operatorname{ReLU}(x W), \qquad y = \sum_{e: g_e > 0} g_e f_e(x)

    The output is continuous: an expert enters and leaves with weight 0, where top-k jumps. The
    number of experts per token is learned, and may be 0; an L1 loss that weighs busy experts more
    drives it to k on average:

    .. math::
       L = \lambda \frac{E}{k T^2} \sum_e \Big(\sum_t g_{te}\Big) \cdot |\{t : g_{te} > 0\}|,
       \qquad \lambda \leftarrow \begin{cases}
         1.2 \, \lambda & \text{if tokens visit more than } k \text{ experts} \\
         \lambda / 1.2 & \text{otherwise} \end{cases}

    This is the Switch loss with P = mean g and f = count / (k T), times lambda. lambda is float32
    state, updated once per optimizer step from the pairs of the whole batch (including those that
    ``max_active`` cut). It starts at 1e-8, so tokens visit about half of all experts in the first
    hundred steps or so: use ``dropless`` (the preset), and ``max_active`` to bound memory. Logged:
    ``moe/gate/lambda`` and ``moe/experts_per_token``.

    Visibility: a token sees neither later tokens nor other sequences, except through capacity.

    Reference: Wang, Chen, Zhu, "ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing",
    arXiv 2412.14711. Deviations: each layer has its own lambda, regulated by its own sparsity,
    where theirs is one number regulated by the mean over layers; the loss is computed per routing
    group (``moe.group``), theirs per micro-batch; lambda stays within [1e-20, 1e20].
    """

    k: Annotated[int, "experts per token that lambda aims at, on average"] = 2
    max_active: MaxActive = 0
    lambda_init: Annotated[float, "lambda before the first step"] = 1e-8
    lambda_factor: Annotated[float, "lambda is multiplied or divided by it after each step"] = 1.2
    init_scale: InitScale = INIT_SCALE

    trained_by: ClassVar[TrainedBy] = "task"

    def check(self, num_experts: int, train: bool) -> None:
        ops.check_k(self.k, num_experts)
        ops.check_max_active(self.max_active, num_experts)
        if not SMALLEST <= self.lambda_init <= LARGEST:
            raise ValueError(
                f"gate.lambda_init={self.lambda_init} must lie in [{SMALLEST:g}, {LARGEST:g}]"
            )
        if not self.lambda_factor > 1:
            raise ValueError(f"gate.lambda_factor={self.lambda_factor} must be above 1")
        ops.check_positive("init_scale", self.init_scale)

    def init_state(self, spec: GateSpec) -> GateState:
        return {"lambda": jnp.float32(self.lambda_init)}

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        logits_GTE = ops.router_logits(x_GTD, params["router_DE"])
        weight_GTE = jax.nn.relu(logits_GTE)
        routing, cut_GTE = ops.heaviest(weight_GTE, self.max_active, context.valid_GT)
        total_GT1 = jnp.sum(weight_GTE, axis=-1, keepdims=True)
        share_GTE = weight_GTE / jnp.maximum(total_GT1, TINY)
        positive_GT1 = total_GT1 > 0
        small_GTE = weight_GTE / jnp.where(positive_GT1, total_GT1, 1.0)
        small_GTE = jnp.where(positive_GT1, small_GTE, 1.0 / logits_GTE.shape[-1])
        # A total of NaN is not small, so NaN stays visible.
        fixed_GTE = jax.lax.stop_gradient(small_GTE)
        probs_GTE = jnp.where(total_GT1 <= TINY, fixed_GTE, share_GTE)
        losses, means = {}, {}
        if context.train:
            losses["remoe_l1"] = state["lambda"] * self._l1(weight_GTE, context.valid_GT)
            means["lambda"] = jnp.broadcast_to(state["lambda"], len(x_GTD))
        stats = RouterStats(logits_GTE, probs_GTE, probs_GTE)
        return GateOutput(routing, stats, losses, means=means, cut_GTE=cut_GTE)

    def _l1(self, weight_GTE: Array, valid_GT: Array) -> Array:
        """E / (k T^2) sum_e (sum_t g)(count) per group, averaged with valid tokens as weights."""
        weight_GTE = jnp.where(valid_GT[..., None], weight_GTE, 0.0)
        mass_GE = jnp.sum(weight_GTE, axis=1)
        count_GE = jnp.sum(weight_GTE > 0, axis=1).astype(jnp.float32)
        tokens_G = jnp.sum(valid_GT, axis=1).astype(jnp.float32)
        product_G = weight_GTE.shape[-1] / self.k * jnp.sum(mass_GE * count_GE, axis=1)
        per_token = jnp.sum(product_G / jnp.maximum(tokens_G, 1.0))
        return per_token / jnp.maximum(jnp.sum(tokens_G), 1.0)

    def update(self, state: GateState, stats: MoEStats) -> GateState:
        too_many = stats.pairs > self.k * stats.tokens
        factor = jnp.where(too_many, self.lambda_factor, 1.0 / self.lambda_factor)
        return {"lambda": jnp.clip(state["lambda"] * factor, SMALLEST, LARGEST)}
