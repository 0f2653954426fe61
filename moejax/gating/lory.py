"""Lory: one merged expert per segment, routed by the previous segment."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.gating import ops, spans
from moejax.gating.gate import INIT_SCALE, EveryExpert, InitScale, Stateless
from moejax.types import (
    GateContext,
    GateOutput,
    GateParams,
    GateSpec,
    GateTraits,
    MoEConfig,
    TrainedBy,
    Visibility,
)

FIRST_SEGMENTS = ("learned", "bos", "uniform", "paper")


@dataclasses.dataclass(frozen=True)
class Lory(Stateless, EveryExpert):
    r"""Every segment of a sequence is computed by one expert, a mean of the experts' weights.

    .. math::
       e_k = \operatorname{softmax}(W^\top \operatorname{mean}_{t \in k} x_t), \qquad
       \bar\theta_k = \sum_i e_{k-1,i} \theta_i, \qquad y_t = f(x_t; \bar\theta_k), \; t \in k

    Segments have ``segment`` valid tokens, counted from the first of a sequence; the last may have
    fewer. Padding belongs to no segment, wherever it lies. The mean of the previous segment gives
    the merging weights of a segment. The first segment has no predecessor; ``first_segment``
    selects the logits for it:

    * "learned": one learned logit per expert, the same for all sequences, initially 0. This is the
      default: it is causal, and the router is applied to means only.
    * "bos": the router's logits of the sequence's first valid token alone. Causal, and specific to
      a sequence unless all begin with the same token. A single token varies more than a mean of
      many, so its logits are larger.
    * "uniform": zeros, for the plain mean of the experts. Causal; learns nothing.
    * "paper": those of the segment's own mean, through which no gradient flows. Only the gradient
      is stopped, so tokens of this segment still depend on later ones.

    Nothing is selected, so the task loss alone trains the router; there is no auxiliary loss. A
    layer costs one FFN per token, and E / ``segment`` FFNs per token for the merging.

    The routing serves statistics only: it has E columns, column e for expert e, with the weights of
    the segment. ``transport`` and capacity are not used.

    Visibility: a token sees neither later tokens nor other sequences, whatever the group; with
    first_segment=paper it sees later tokens of the first segment, in training and in evaluation.

    Reference: Zhong, Xia, Chen, Lewis, "Lory: Fully Differentiable Mixture-of-Experts for
    Autoregressive Language Model Pre-training", arXiv 2405.03133. Deviations: the default first
    segment; segments of 32 tokens (theirs: 256 of texts with 4096); sequences are not composed of
    similar documents; experts are not copies of a dense model trained first, so a mean of E
    independent matrices is initially sqrt(E) times smaller; evaluation merges for every segment, as
    in training and in
    generation (theirs merges once, for the prompt).
    """

    segment: Annotated[int, "tokens in a segment"] = 32
    first_segment: Annotated[
        str, "logits of the first: 'learned', 'bos', 'uniform', 'paper' (leaks)"
    ] = "learned"
    init_scale: InitScale = INIT_SCALE

    trained_by: ClassVar[TrainedBy] = "task"

    def check(self, num_experts: int, train: bool) -> None:
        ops.check_choice("first_segment", self.first_segment, FIRST_SEGMENTS)
        ops.check_positive("segment", self.segment)
        ops.check_positive("init_scale", self.init_scale)

    def traits(self) -> GateTraits:
        return GateTraits(
            reads=("sequence",),
            reads_past=True,
            mixes="weights",
            causal_fields={"first_segment": "learned"},
            check_data=self._check_data,
        )

    def _check_data(self, layers: int, length: int, train_rows: int, eval_rows: int) -> None:
        """Raises ValueError if sequences of one segment would leave the router unused."""
        if train_rows and length <= self.segment and self.first_segment != "bos":
            raise ValueError(
                f"gate.segment={self.segment} makes one segment of a sequence of {length} tokens, "
                f"so the router learns nothing with gate.first_segment={self.first_segment}; use "
                f"gate.segment={max(length // 4, 1)} or gate.first_segment=bos"
            )

    def init(self, key: Array, spec: GateSpec) -> GateParams:
        params = {"router_DE": ops.init_router(key, spec, self.init_scale)}
        if self.first_segment == "learned":
            params["first_E"] = jnp.zeros(spec.num_experts, jnp.float32)
        return params

    def __call__(
        self, params: GateParams, state: tuple, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        order = ops.order_of(context)
        x_GRLD, valid_GRL = spans.in_order(x_GTD, context, order)
        mean_GRND, _ = spans.span_means(x_GRLD, valid_GRL, self.segment)
        own_GRNE = spans.span_logits(mean_GRND, params["router_DE"])
        own_GR1E = own_GRNE[:, :, :1]
        if self.first_segment == "learned":
            first_GR1E = jnp.broadcast_to(params["first_E"], own_GR1E.shape)
        elif self.first_segment == "uniform":
            first_GR1E = jnp.zeros_like(own_GR1E)
        elif self.first_segment == "bos":
            first_GR1D = jnp.where(valid_GRL[..., None], x_GRLD, 0.0)[:, :, :1]
            first_GR1E = spans.span_logits(first_GR1D, params["router_DE"])
        else:
            first_GR1E = jax.lax.stop_gradient(own_GR1E)
        logits_GRNE = jnp.concatenate([first_GR1E, own_GRNE[:, :, :-1]], axis=2)
        weight_GRNE = jax.nn.softmax(logits_GRNE, axis=-1)
        return spans.merge_output(logits_GRNE, weight_GRNE, self.segment, context, order)

    def visibility(self, moe: MoEConfig) -> Visibility:
        future = self.first_segment == "paper" and moe.num_experts > 1
        return Visibility(train_future=future, eval_future=future)
