"""BASE: balanced linear assignment in training, each token's best expert in evaluation."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.gating import ops
from moejax.gating.gate import Stateless, token_choice_capacity
from moejax.gating.solvers.assignment import balanced_assignments
from moejax.gating.visibility import balanced_visibility
from moejax.types import (
    GateContext,
    GateOutput,
    GateParams,
    GateSpec,
    MoEConfig,
    TrainedBy,
    Visibility,
)


@dataclasses.dataclass(frozen=True)
class Base(Stateless):
    r"""Every expert gets the same number of tokens, at the highest total affinity.

    .. math::
       s = x W, \qquad
       a = \begin{cases} \text{balanced assignment of a group} & \text{training} \\
                         \operatorname{argmax}_e s_{te} & \text{evaluation} \end{cases}, \qquad
       \alpha_t = \sigma(s_{t, a_t}), \qquad
       y_t = \alpha_t f_{a_t}(x_t) + (1 - \alpha_t) x_t

    The assignment carries no gradient: the centroids W learn through alpha alone. There is nothing
    to balance and nothing to drop: with ``cells`` every slot is filled in training (E divides T),
    whatever the capacity factor. Evaluation is not balanced: with ``eval_transport=cells`` it has
    the same T/E slots and drops what does not fit; the default ``dropless`` drops nothing.

    ``residual=False`` omits (1 - alpha) x. In the authors' code f(x) = x + g(x) and no residual
    connection surrounds the layer, so its output is x + alpha g(x). In a block that adds the
    layer's output to x, ``residual=False`` gives the same. (Their output matrix starts at zero;
    the experts here do not.)

    Groups: ``group="sequence"`` balances each sequence; ``group="batch"`` the whole batch, on every
    mesh (scores [T, E] are gathered, tokens are not). The authors balance each worker's share and
    first shuffle tokens over the workers, so that a share resembles the batch. Here a group holds
    the same tokens on every mesh and needs no shuffle.

    Visibility: in training a token's expert depends on later tokens of its group; in evaluation on
    itself alone, except through capacity.

    Reference: Lewis, Bhosale, Dettmers, Goyal, Zettlemoyer, "BASE Layers", arXiv 2103.16716.
    Deviation: an exact solver (`moejax.gating.solvers.assignment`) instead of an auction. As in
    their code, centroids start orthogonal with gain 0.1.
    """

    residual: Annotated[bool, "keep a share 1 - alpha of the input in the output"] = True
    init_scale: Annotated[float, "initial length of the centroids (orthogonal)"] = 0.1

    trained_by: ClassVar[TrainedBy] = "task"

    def check(self, num_experts: int, train: bool) -> None:
        ops.check_positive("init_scale", self.init_scale)

    def columns(self, num_experts: int) -> int:
        return 1

    def init(self, key: Array, spec: GateSpec) -> GateParams:
        init = jax.nn.initializers.orthogonal(self.init_scale)
        return {"router_DE": init(key, (spec.d_model, spec.num_experts), jnp.float32)}

    def __call__(
        self, params: GateParams, state: tuple, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        score_GTE = ops.router_logits(x_GTD, params["router_DE"])
        means = {}
        if context.train:
            best = balanced_assignments(score_GTE, context.valid_GT)
            expert_GT = jnp.maximum(best.expert_T, 0)
            tokens_G = jnp.sum(context.valid_GT, axis=1, dtype=jnp.float32)
            means["assignment_gap"] = best.gap / jnp.maximum(tokens_G, 1.0)
        else:
            expert_GT = jnp.argmax(score_GTE, axis=-1).astype(jnp.int32)
        alpha_GT = jax.nn.sigmoid(ops.at_expert(score_GTE, expert_GT[..., None])[..., 0])
        identity_GT = jnp.where(context.valid_GT, 1.0 - alpha_GT, 0.0) if self.residual else None
        # A weight of 0 would mark the pair as absent.
        weight_GTK = ops.at_least_tiny(alpha_GT)[..., None]
        return GateOutput(
            ops.masked(expert_GT[..., None], weight_GTK, context.valid_GT),
            ops.softmax_stats(score_GTE),
            identity_weight_GT=identity_GT,
            means=means,
        )

    def capacity(self, num_tokens: int, num_experts: int, factor: float) -> int:
        return token_choice_capacity(num_tokens, num_experts, 1, 1.0)

    def visibility(self, moe: MoEConfig) -> Visibility:
        return balanced_visibility(moe, eval_factor=1.0)
