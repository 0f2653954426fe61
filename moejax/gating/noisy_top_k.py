"""Noisy top-k gating with learned noise (Shazeer et al. 2017)."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.gating import ops
from moejax.gating.gate import Stateless, TokenChoice
from moejax.mesh import group_local
from moejax.types import (
    GateContext,
    GateOutput,
    GateParams,
    GateSpec,
    GateState,
    RouterStats,
    TrainedBy,
)


def load_probability(
    clean_TE: Float[Array, "*T E"], noisy_TE: Float[Array, "*T E"], std_TE: Array, k: int
) -> Float[Array, "*T E"]:
    r"""P(x, e): the probability that e is among the k best if only its own noise is drawn again.

    .. math:: P(x, e) = \Phi\left((h_e - \operatorname{kth\_excluding}(H, k, e)) / \sigma_e\right)

    The k-th largest value without e is the (k+1)-th value of H if e is now in the top k, and the
    k-th otherwise. P is 1 everywhere when k = E. Shazeer et al. 2017, appendix A.
    """
    if k == clean_TE.shape[-1]:
        return jnp.ones_like(clean_TE)
    top_TK, _ = jax.lax.top_k(noisy_TE, k + 1)
    kth, next_one = top_TK[..., k - 1 : k], top_TK[..., k : k + 1]
    threshold_TE = jnp.where(noisy_TE > next_one, next_one, kth)
    return jax.scipy.stats.norm.cdf((clean_TE - threshold_TE) / std_TE)


@dataclasses.dataclass(frozen=True)
class NoisyTopK(Stateless, TokenChoice):
    r"""Top-k of logits perturbed by learned Gaussian noise; softmax over the k kept.

    .. math::
       H = x W_g + \epsilon \cdot (\operatorname{softplus}(x W_n) + 0.01), \quad
       g = \operatorname{softmax}(\operatorname{KeepTopK}(H, k)), \quad y = \sum_e g_e f_e(x)

    Noise is drawn in training only. Both matrices start at zero, for equal load. The balance losses
    are ``importance`` (squared coefficient of variation of summed gate weights) and ``load`` (the
    same of summed P(x, e), differentiable through the noise); the paper gives both a weight of 0.1
    for its language models.

    Visibility: a token sees neither later tokens nor other sequences, except through capacity,
    which the original does not have.

    Reference: Shazeer et al., "Outrageously Large Neural Networks", arXiv 1701.06538, section 2.1
    and appendix A.
    """

    k: Annotated[int, "experts per token"] = 2
    min_std: Annotated[float, "smallest standard deviation of the noise"] = 0.01

    trained_by: ClassVar[TrainedBy] = "task"

    def check(self, num_experts: int, train: bool) -> None:
        ops.check_k(self.k, num_experts)
        ops.check_positive("min_std", self.min_std)
        if train and self.k == 1 and num_experts > 1:
            raise ValueError(
                "gate.k=1 gives noisy top-k the constant weight 1 (softmax over one kept logit), "
                "so the router gets no gradient from the task; use gate.k=2 or gate switch"
            )

    def init(self, key: Array, spec: GateSpec) -> GateParams:
        shape = (spec.d_model, spec.num_experts)
        return {
            "router_DE": jnp.zeros(shape, jnp.float32),
            "noise_DE": jnp.zeros(shape, jnp.float32),
        }

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        clean_GTE = ops.router_logits(x_GTD, params["router_DE"])
        std_GTE = jax.nn.softplus(ops.router_logits(x_GTD, params["noise_DE"])) + self.min_std
        noisy_GTE = clean_GTE
        if context.train:
            noise_GTE = ops.row_noise(jax.random.normal, context, clean_GTE.shape[-1:])
            noisy_GTE = clean_GTE + noise_GTE * std_GTE

        def select(clean: Array, noisy: Array, std: Array) -> tuple[Array, Array, Array]:
            expert, weight = ops.top_k_routing(noisy, self.k, renormalize=True)
            return expert, weight, load_probability(clean, noisy, std, self.k)

        expert_GTK, weight_GTK, load_GTE = group_local(select)(clean_GTE, noisy_GTE, std_GTE)
        routing = ops.masked(expert_GTK, weight_GTK, context.valid_GT)
        probs_GTE = jax.nn.softmax(clean_GTE, axis=-1)
        return GateOutput(routing, RouterStats(clean_GTE, probs_GTE, load_GTE))
