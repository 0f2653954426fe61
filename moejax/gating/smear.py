"""SMEAR: one merged expert per sequence."""

import dataclasses
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.gating import ops, spans
from moejax.gating.gate import EveryExpert, Stateless
from moejax.types import (
    GateContext,
    GateOutput,
    GateParams,
    GateSpec,
    GateTraits,
    MoEConfig,
    Order,
    TrainedBy,
    Visibility,
)

EPSILON = 1e-5
"""The epsilon of the layer norms, as in the authors' code."""


@dataclasses.dataclass(frozen=True)
class Smear(Stateless, EveryExpert):
    r"""One expert per sequence, whose weights are a weighted mean of the experts' weights.

    .. math::
       p = \operatorname{softmax}(\operatorname{LN}(\operatorname{mean}_t x_t) \cdot
           \operatorname{LN}_w(W) + b), \qquad
       \bar\theta = \sum_e p_e \theta_e, \qquad y_t = f(x_t; \bar\theta)

    The mean is over valid tokens. LN has a learned scale and offset over D; LN_w normalises each
    expert's column of W over D and scales it by a learned vector. Both this vector and the standard
    deviation of W start at ``init_scale``. Nothing is selected, so the task loss alone trains the
    router; there is no auxiliary loss. A layer costs one FFN per token, plus the weights of E FFNs
    multiplied once per sequence for the merging.

    ``expert_dropout`` (in training): each expert is omitted from a sequence with this probability,
    and the softmax is over the others. A sequence that would lose all experts keeps all.

    The routing serves statistics only: it has E columns, column e for expert e, with p_e of the
    sequence as weight. ``transport`` and capacity are not used; in a group of several sequences
    each has its own merged expert.

    Visibility: earlier tokens depend on later ones through the mean, in training and in evaluation,
    so this gate is for encoders; for a decoder see ``lory``. Other sequences have no influence.
    With one expert a token sees itself alone.

    Reference: Muqeeth, Liu, Raffel, "Soft Merging of Experts with Adaptive Routing", arXiv
    2306.03745. Deviations: LN_w has no learned offset, which would add the same number to all
    logits; experts are the layer's FFNs, theirs adapters with biases; if dropout omits all experts,
    they weight them equally.
    """

    expert_dropout: Annotated[float, "share of experts omitted per sequence in training"] = 0.1
    init_scale: Annotated[float, "std of the router, and its norm's scale, at the start"] = 0.01

    trained_by: ClassVar[TrainedBy] = "task"

    def check(self, num_experts: int, train: bool) -> None:
        ops.check_positive("init_scale", self.init_scale)
        if not 0 <= self.expert_dropout < 1:
            raise ValueError(
                f"gate.expert_dropout={self.expert_dropout} must be 0 or above, and below 1"
            )

    def traits(self) -> GateTraits:
        return GateTraits(reads=("sequence",), reads_past=True, mixes="weights", causal_gate="lory")

    def init(self, key: Array, spec: GateSpec) -> GateParams:
        width, experts = spec.d_model, spec.num_experts
        return {
            "router_DE": self.init_scale * jax.random.normal(key, (width, experts), jnp.float32),
            "router_scale_D": jnp.full(width, self.init_scale, jnp.float32),
            "bias_E": jnp.zeros(experts, jnp.float32),
            "norm_scale_D": jnp.ones(width, jnp.float32),
            "norm_offset_D": jnp.zeros(width, jnp.float32),
        }

    def __call__(
        self, params: GateParams, state: tuple, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        x_GRLD, valid_GRL = spans.by_sequence(x_GTD, context)
        length = x_GRLD.shape[2]
        mean_GRND, _ = spans.span_means(x_GRLD, valid_GRL, length)
        normed_GRND = normalised(mean_GRND) * params["norm_scale_D"] + params["norm_offset_D"]
        router_ED = normalised(params["router_DE"].T) * params["router_scale_D"]
        logits_GRNE = spans.span_logits(normed_GRND, router_ED.T) + params["bias_E"]
        kept_GRNE = logits_GRNE
        if context.train and self.expert_dropout:
            kept_GRNE = jnp.where(self._keep(logits_GRNE, context), logits_GRNE, -jnp.inf)
        weight_GRNE = jax.nn.softmax(kept_GRNE, axis=-1)
        return spans.merge_output(logits_GRNE, weight_GRNE, length, context, Order())

    def _keep(self, logits_GRNE: Array, context: GateContext) -> Bool[Array, "G R N E"]:
        """A mask of the experts that dropout keeps, drawn once per sequence."""

        def once(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return jnp.broadcast_to(jax.random.uniform(key, shape[1:], dtype), shape)

        groups, rows, _, experts = logits_GRNE.shape
        drawn_GTE = ops.row_noise(once, context, (experts,))
        drawn_GRNE = drawn_GTE.reshape(groups, rows, -1, experts)[:, :, :1]
        keep_GRNE = drawn_GRNE >= self.expert_dropout
        return keep_GRNE | ~jnp.any(keep_GRNE, axis=-1, keepdims=True)

    def visibility(self, moe: MoEConfig) -> Visibility:
        some = moe.num_experts > 1
        return Visibility(train_future=some, eval_future=some)


def normalised(x: Float[Array, "*X D"]) -> Float[Array, "*X D"]:
    """Mean 0 and variance 1 over the last axis: a layer norm without scale and offset."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + EPSILON)
