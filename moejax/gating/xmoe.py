"""X-MoE: cosine routing in a low-dimensional space with a learned temperature."""

import dataclasses
import math
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.gating import ops
from moejax.gating.gate import Stateless, TokenChoice
from moejax.types import GateContext, GateOutput, GateParams, GateSpec, GateState, TrainedBy

SMALLEST_NORM = 1e-6
"""Vectors shorter than this are divided by it instead of their length, so 0 stays 0."""


def cosine_scores(
    token_GTR: Float[Array, "G T R"], centroid_RE: Float[Array, "R E"]
) -> Float[Array, "G T E"]:
    """Cosines of the angles between tokens and centroids; 0 for a vector of zeros."""

    def unit(x: Array, axis: int) -> Array:
        square = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
        return x * jax.lax.rsqrt(jnp.maximum(square, SMALLEST_NORM**2))

    return ops.router_logits(unit(token_GTR, -1), unit(centroid_RE, 0))


@dataclasses.dataclass(frozen=True)
class XMoE(Stateless, TokenChoice):
    r"""Top-k of cosines between a projected token and the experts' centroids.

    .. math::
       s_e = \frac{(P x) \cdot c_e}{\lVert P x \rVert \, \lVert c_e \rVert}, \quad
       h = s / \tau, \quad p = \operatorname{softmax}(h), \quad
       y = \sum_{e \in \operatorname{top}_k(h)} p_e f_e(x)

    The lengths of tokens and centroids do not matter, so the router cannot gain by pulling
    representations towards its centroids (representation collapse, the paper's subject). tau is
    learned as its logarithm and never falls below ``min_temperature``; without tau, p would be
    nearly uniform because cosines are bounded. The usual losses apply, but the z-loss is not
    needed.

    Visibility: a token sees neither later tokens nor other sequences, except through capacity.

    Reference: Chi et al., "On the Representation Collapse of Sparse Mixture of Experts",
    arXiv 2204.09179. The formula, its temperature and its clamp are those of Tutel's cosine router,
    which also has a bias of P (``bias=True``, at the cost of invariance to a token's length).
    rank = E / 2 is from memory of the paper and not verified; the authors' code (torchscale) has 16
    for every E. Deviation: lengths are at least 1e-6, in Tutel 1e-12.
    """

    k: Annotated[int, "experts per token"] = 1
    rank: Annotated[int, "width of the projection (0: half the experts, at least 2)"] = 0
    bias: Annotated[bool, "add a bias to the projection"] = False
    renormalize: Annotated[bool, "divide weights by the sum of the k kept"] = False
    temperature: Annotated[float, "initial tau"] = 0.5
    min_temperature: Annotated[float, "lower bound of tau"] = 0.01

    trained_by: ClassVar[TrainedBy] = "task"

    def check(self, num_experts: int, train: bool) -> None:
        ops.check_k(self.k, num_experts)
        if self.rank != 0 and self.rank < 2:
            raise ValueError(
                f"gate.rank={self.rank} must be at least 2 (cosines of numbers are signs), or 0 "
                "for half the experts"
            )
        ops.check_positive("min_temperature", self.min_temperature)
        if self.temperature < self.min_temperature:
            raise ValueError(
                f"gate.temperature={self.temperature} must be at least gate.min_temperature="
                f"{self.min_temperature}"
            )
        ops.check_trains(self.k, self.renormalize, num_experts, train)

    def init(self, key: Array, spec: GateSpec) -> GateParams:
        rank = self.rank or max(spec.num_experts // 2, 2)
        wide = dataclasses.replace(spec, num_experts=rank)
        centroid_key, size = jax.random.fold_in(key, 1), (rank, spec.num_experts)
        params = {
            "project_DR": ops.init_router(key, wide, 1.0),
            "centroid_RE": 0.01 * jax.random.normal(centroid_key, size, jnp.float32),
            "log_scale": jnp.float32(-math.log(self.temperature)),
        }
        return params | ({"bias_R": jnp.zeros(rank, jnp.float32)} if self.bias else {})

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        token_GTR = ops.router_logits(x_GTD, params["project_DR"])
        if self.bias:
            token_GTR = token_GTR + params["bias_R"]
        log_scale = jnp.minimum(params["log_scale"], -math.log(self.min_temperature))
        logits_GTE = jnp.exp(log_scale) * cosine_scores(token_GTR, params["centroid_RE"])
        expert_GTK, weight_GTK = ops.local_top_k(logits_GTE, self.k, self.renormalize)
        means = {"temperature": jnp.broadcast_to(jnp.exp(-log_scale), len(x_GTD))}
        return GateOutput(
            ops.masked(expert_GTK, weight_GTK, context.valid_GT),
            ops.softmax_stats(logits_GTE),
            means=means,
        )
