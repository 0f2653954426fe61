"""SparseMixer-v2 (GRIN, Phi-3.5-MoE): experts drawn by turns, and an estimate of the gradient."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.gating import ops
from moejax.gating.gate import INIT_SCALE, InitScale, LinearRouter, Stateless, TokenChoice
from moejax.types import GateContext, GateOutput, GateParams, GateState, TrainedBy

SHARE_OF_ONE = 0.25
"""Share of sampled experts that keep their weight; the others have a third of it."""


@dataclasses.dataclass(frozen=True)
class SparseMixer(Stateless, LinearRouter, TokenChoice):
    r"""k experts drawn one after the other, each among those whose logits are near the best.

    With the logits h = x W and without the experts of earlier rounds, round j keeps

    .. math::
       N_j = \{e : \max h - h_e \le 2 \epsilon \max(|h_e|, \max h)\}, \quad
       p_e = \frac{e^{h_e}}{\sum_{i \in N_j} e^{h_i}} \; (e \in N_j), \quad
       y = \sum_j g_j f_{c_j}(x)

    with the logits, the maximum and the probabilities of that round and epsilon = ``jitter``. In
    evaluation c_j is the best expert and its weight g_j = p_c; the weights are not renormalised. In
    training c_j is a sample of p (Gumbel noise), and

    .. math::
       g_j = m_j \, p_{c_j}, \qquad
       m_j = 1 \text{ if } c_j \text{ is the best or } u_j > 3/4, \text{ else } 1/3, \qquad
       \frac{\partial g_j}{\partial h_e} := p_{c_j} (\mathbb 1[e = c_j] - p_e)

    with u_j uniform in [0, 1). The gradient leaves m_j out: the task's gradient is met at the whole
    weight with probability 1/4 and at a third of it with 3/4, the nodes of Heun's third-order
    method, so that its mean estimates the difference that the choice of the expert makes.

    A token whose best expert is alone in every N_j has the constant weights 1, and teaches the
    router nothing. Small values of ``jitter`` leave few others.

    Visibility: a token sees neither later tokens nor other sequences, except through capacity.

    References: Liu et al., "GRIN: GRadient-INformed MoE" (SparseMixer-v2), arXiv 2409.12136; Liu,
    Gao, Chen (SparseMixer), arXiv 2310.00811. Phi-3.5-MoE (Abdin et al., arXiv 2404.14219) has
    k = 2, and the same rule in transformers' ``phimoe``.
    """

    k: Annotated[int, "experts per token"] = 2
    jitter: Annotated[float, "experts are near the best within twice this share of a logit"] = 0.1
    init_scale: InitScale = INIT_SCALE

    trained_by: ClassVar[TrainedBy] = "task"

    def check(self, num_experts: int, train: bool) -> None:
        ops.check_k(self.k, num_experts)
        if not 0.0 <= self.jitter <= 1.0:
            raise ValueError(f"gate.jitter={self.jitter} must lie in [0, 1]; 1 keeps every expert")
        if train and not self.jitter and num_experts > 1:
            raise ValueError(
                f"gate.jitter={self.jitter} leaves each token the best expert with weight 1, so "
                "the router gets no gradient; use gate.jitter=0.1"
            )
        ops.check_positive("init_scale", self.init_scale)

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        logits_GTE = ops.router_logits(x_GTD, params["router_DE"])
        free_GTE = jnp.ones(logits_GTE.shape, bool)
        experts, weights = [], []
        for turn in range(self.k):
            near_GTE = near_best(logits_GTE, free_GTE, self.jitter)
            best_GT1 = best_of(logits_GTE, near_GTE)
            if context.train:
                noise_GTE = ops.row_noise(
                    jax.random.gumbel, context, logits_GTE.shape[-1:], tag=2 * turn
                )
                chosen_GT1 = best_of(logits_GTE + noise_GTE, near_GTE)
                uniform_GT1 = ops.row_noise(jax.random.uniform, context, (1,), tag=2 * turn + 1)
                whole_GT1 = (chosen_GT1 == best_GT1) | (uniform_GT1 > 1.0 - SHARE_OF_ONE)
                weight_GT1 = estimated_weight(logits_GTE, near_GTE, chosen_GT1, whole_GT1)
            else:
                chosen_GT1 = best_GT1
                weight_GT1 = weight_among(logits_GTE, near_GTE, chosen_GT1)
            experts.append(chosen_GT1)
            weights.append(ops.at_least_tiny(weight_GT1))
            free_GTE &= jnp.arange(logits_GTE.shape[-1]) != chosen_GT1
        routing = ops.masked(
            jnp.concatenate(experts, axis=-1),
            jnp.concatenate(weights, axis=-1),
            context.valid_GT,
        )
        return GateOutput(routing, ops.softmax_stats(logits_GTE))


def near_best(
    logits_TE: Float[Array, "*T E"], free_TE: Bool[Array, "*T E"], jitter: float
) -> Bool[Array, "*T E"]:
    """The free experts whose logits lie within 2 ``jitter`` of the best free one, relative to the
    larger of their size and the best logit."""
    best_T1 = jnp.max(jnp.where(free_TE, logits_TE, -jnp.inf), axis=-1, keepdims=True)
    size_TE = jnp.maximum(jnp.abs(logits_TE), best_T1)
    return free_TE & (best_T1 - logits_TE <= 2.0 * jitter * size_TE)


def best_of(score_TE: Float[Array, "*T E"], near_TE: Bool[Array, "*T E"]) -> Int[Array, "*T 1"]:
    """The expert with the largest score among those of the mask."""
    score_TE = jnp.where(near_TE, score_TE, -jnp.inf)
    return jnp.argmax(score_TE, axis=-1, keepdims=True).astype(jnp.int32)


def weight_among(
    logits_TE: Float[Array, "*T E"], near_TE: Bool[Array, "*T E"], expert_T1: Int[Array, "*T 1"]
) -> Float[Array, "*T 1"]:
    """The softmax, over the experts of the mask, at one of them."""
    probs_TE = jax.nn.softmax(jnp.where(near_TE, logits_TE, -jnp.inf), axis=-1)
    return jnp.take_along_axis(probs_TE, expert_T1, axis=-1)


def estimated_weight(
    logits_TE: Float[Array, "*T E"],
    near_TE: Bool[Array, "*T E"],
    expert_T1: Int[Array, "*T 1"],
    whole_T1: Bool[Array, "*T 1"],
) -> Float[Array, "*T 1"]:
    """The weight of a sample, or a third of it, with the gradient of the whole weight."""
    weight_T1 = weight_among(logits_TE, near_TE, expert_T1)
    fixed_T1 = jax.lax.stop_gradient(weight_T1)
    return jnp.where(whole_T1, fixed_T1, fixed_T1 / 3.0) + (weight_T1 - fixed_T1)
