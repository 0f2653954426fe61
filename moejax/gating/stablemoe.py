"""StableMoE: a routing learned together with its distillation into token ids, then frozen."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from moejax.gating import ops
from moejax.gating.gate import Stateless, TokenChoice
from moejax.types import (
    GateContext,
    GateOutput,
    GateParams,
    GateSpec,
    GateState,
    GateTraits,
    TrainedBy,
)

DISTILLED = ("embed_VR", "distill_RE")
"""Parameters of the distilled router."""


@dataclasses.dataclass(frozen=True)
class StableMoE(Stateless, TokenChoice):
    r"""Stage 1 routes by the token and distills a router of token ids, which stage 2 uses.

    .. math::
       s_e = x \cdot c_e, \quad d_e = D[\text{token}] \cdot \hat{c}_e, \quad
       a = \begin{cases} \operatorname{argmax} s & \text{stage 1} \\
                         \operatorname{argmax} d & \text{stage 2, evaluation} \end{cases}, \quad
       \alpha = \sigma(s_a), \quad y = \alpha f_a(x) + (1 - \alpha) x

    Stage 1, the first ``stage_steps`` steps, adds two losses, means over valid tokens:

    .. math::
       L_{balance} = \operatorname{mean}_t \frac{n_{a_t} - \bar{n}}{\bar{n}} \alpha_t, \qquad
       L_{distill} = -\operatorname{mean}_t \log \operatorname{softmax}(d_t)_{\operatorname{argmax}
       s_t}

    with n the tokens per expert of a routing group (``moe.group``). In stage 2 the assignment is a
    fixed table over the vocabulary: the distilled router gets no gradient, and the trainer freezes
    it (momentum, or Lion's sign of it, would still move it). alpha is still learned. Evaluation
    uses the distilled router in both stages.

    Visibility: a token sees neither later tokens nor other sequences, except through capacity.

    Reference: Dai et al., "StableMoE: Stable Routing Strategy for Mixture of Experts",
    arXiv 2204.08396; sizes and weights are from the authors' code (6000 of 60000 steps in stage 1,
    losses 0.3, a table of width 50). Deviations: experts start at random, not at the identity, and
    have no residual connection of their own; losses are means (their sums are divided by the number
    of tokens too), with balance per group instead of per device; the table of words is the only
    distilled router on offer.
    """

    stage_steps: Annotated[int, "steps of stage 1: a tenth of the run in the paper"] = 6000
    distill_dim: Annotated[int, "width of the distilled router's embedding"] = 50
    balance_weight: Annotated[float, "of the balance loss in stage 1"] = 0.3
    distill_weight: Annotated[float, "of the distillation loss in stage 1"] = 0.3
    residual: Annotated[bool, "keep a share 1 - alpha of the input in the output"] = True
    init_scale: Annotated[float, "initial length of the centroids (orthogonal)"] = 0.1

    k: ClassVar[int] = 1
    trained_by: ClassVar[TrainedBy] = "task"

    def check(self, num_experts: int, train: bool) -> None:
        for field in ("distill_dim", "init_scale"):
            ops.check_positive(field, getattr(self, field))
        for field in ("stage_steps", "balance_weight", "distill_weight"):
            ops.check_not_negative(field, getattr(self, field))

    def traits(self) -> GateTraits:
        return GateTraits(reads=("tokens",), frozen=self._frozen)

    def _frozen(self, step: Int[Array, ""]) -> dict[str, Bool[Array, ""]]:
        """In stage 2 the distilled router stays as it is."""
        return dict.fromkeys(DISTILLED, step >= self.stage_steps)

    def init(self, key: Array, spec: GateSpec) -> GateParams:
        if spec.vocab_size < 1:
            raise ValueError(
                "vocab_size=0: gate stablemoe looks up token ids; pass vocab_size to the layer"
            )
        keys = jax.random.split(key, 3)
        orthogonal = jax.nn.initializers.orthogonal(self.init_scale)
        table = (spec.vocab_size, self.distill_dim)
        return {
            "router_DE": orthogonal(keys[0], (spec.d_model, spec.num_experts), jnp.float32),
            "embed_VR": self.distill_dim**-0.5 * jax.random.normal(keys[1], table, jnp.float32),
            "distill_RE": orthogonal(keys[2], (self.distill_dim, spec.num_experts), jnp.float32),
        }

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        score_GTE = ops.router_logits(x_GTD, params["router_DE"])
        embed_GTR = jnp.take(params["embed_VR"], context.token_GT, axis=0, mode="clip")
        distilled_GTE = ops.router_logits(embed_GTR, params["distill_RE"])
        greedy_GT = jnp.argmax(score_GTE, axis=-1).astype(jnp.int32)
        learned_GT = jnp.argmax(distilled_GTE, axis=-1).astype(jnp.int32)
        learning = context.step < self.stage_steps if context.train else jnp.bool_(False)
        expert_GT = jnp.where(learning, greedy_GT, learned_GT)
        alpha_GT = jax.nn.sigmoid(ops.at_expert(score_GTE, expert_GT[..., None])[..., 0])
        losses = {}
        if context.train:
            log_GTE = jax.nn.log_softmax(distilled_GTE, axis=-1)
            surprise_GT = -ops.at_expert(log_GTE, greedy_GT[..., None])[..., 0]
            excess_GT = self._excess(expert_GT, score_GTE.shape[-1], context.valid_GT)
            losses = {
                "stable_balance": self.balance_weight * ops.mean(excess_GT * alpha_GT, context),
                "stable_distill": self.distill_weight * ops.mean(surprise_GT, context),
            }
            losses = {name: jnp.where(learning, loss, 0.0) for name, loss in losses.items()}
        identity_GT = jnp.where(context.valid_GT, 1.0 - alpha_GT, 0.0) if self.residual else None
        # A weight of 0 would mark the pair as absent.
        weight_GTK = ops.at_least_tiny(alpha_GT)[..., None]
        agreed_GT = (greedy_GT == learned_GT).astype(jnp.float32)
        used_GTE = jnp.where(learning, score_GTE, jax.lax.stop_gradient(distilled_GTE))
        return GateOutput(
            ops.masked(expert_GT[..., None], weight_GTK, context.valid_GT),
            ops.softmax_stats(used_GTE),
            losses,
            identity_weight_GT=identity_GT,
            means={"agreement": ops.group_mean(agreed_GT, context.valid_GT)},
        )

    def _excess(self, expert_GT: Array, num_experts: int, valid_GT: Array) -> Array:
        """n_e / mean - 1 of each token's expert, counted over its group."""
        hit_GTE = (expert_GT[..., None] == jnp.arange(num_experts)) & valid_GT[..., None]
        load_GE = jnp.sum(hit_GTE, axis=1).astype(jnp.float32)
        mean_G1 = jnp.mean(load_GE, axis=1, keepdims=True)
        excess_GE = load_GE / jnp.where(mean_G1 > 0, mean_G1, 1.0) - 1.0
        return jnp.take_along_axis(excess_GE, expert_GT, axis=1)
