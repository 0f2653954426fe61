"""Sentence-level gating: experts depend on a mean over the sequence."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.gating import ops, spans
from moejax.gating.gate import INIT_SCALE, FixedK, InitScale, Renormalize, Stateless
from moejax.gating.visibility import capacity_visibility
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

POOLS = ("mean", "running", "previous")


@dataclasses.dataclass(frozen=True)
class Sentence(Stateless, FixedK):
    r"""Tokens are routed by a mean over their sequence instead of by themselves.

    .. math::
       h_t = W^\top m_t, \quad S_t = \operatorname{top}_k(h_t), \quad
       y_t = \sum_{e \in S_t} \operatorname{softmax}(h_t)_e f_e(x_t)

    ``pool`` selects the mean m_t, always over valid tokens of the token's own sequence, or of its
    own text if several are packed into one row (which costs L x L x d_model per row):

    * "mean" (the paper's, for encoders): over all of them, so that all tokens of a sequence visit
      the same experts. In a decoder earlier tokens then depend on later ones.
    * "running": over those up to t.
    * "previous": over the previous segment of ``segment`` tokens; in the first segment, a learned
      vector. All tokens of a segment visit the same experts. Segments are counted in valid tokens
      from the first one; padding belongs to none, wherever it lies.

    The softmax is over the k kept logits (``renormalize``) or over all. A sequence loads few
    experts, so the preset uses ``dropless`` and balance losses over the batch.

    Visibility: "mean" sees the future, in training and in evaluation; "running" and "previous" see
    neither later tokens nor other sequences, except through capacity.

    Reference: Kudugunta et al., "Beyond Distillation: Task-level Mixture-of-Experts for Efficient
    Inference", arXiv 2110.03742, which compares tokens, sentences and tasks; "previous" follows the
    segment routing of Lory, Zhong et al., arXiv 2405.03133, whose first segment sees itself.
    """

    pool: Annotated[str, "'mean' of the sequence (leaks), 'running' or 'previous' segment"] = "mean"
    segment: Annotated[int, "tokens in a segment of pool=previous"] = 32
    k: Annotated[int, "experts per token"] = 2
    renormalize: Renormalize = True
    init_scale: InitScale = INIT_SCALE

    trained_by: ClassVar[TrainedBy] = "task"

    def check(self, num_experts: int, train: bool) -> None:
        ops.check_choice("pool", self.pool, POOLS)
        ops.check_k(self.k, num_experts)
        ops.check_positive("segment", self.segment)
        ops.check_positive("init_scale", self.init_scale)
        ops.check_trains(self.k, self.renormalize, num_experts, train)

    def traits(self) -> GateTraits:
        return GateTraits(reads=("sequence",), reads_past=True, causal_fields={"pool": "running"})

    def init(self, key: Array, spec: GateSpec) -> GateParams:
        router_key, first_key = jax.random.split(key)
        params = {"router_DE": ops.init_router(router_key, spec, self.init_scale)}
        if self.pool == "previous":
            params["first_D"] = jax.random.normal(first_key, (spec.d_model,), jnp.float32)
        return params

    def __call__(
        self, params: GateParams, state: tuple, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        pooled_GRND, span, order = self._pooled(params, x_GTD, context)
        logits_GRNE = spans.span_logits(pooled_GRND, params["router_DE"])
        logits_GTE = spans.of_tokens(logits_GRNE, span, context, order)
        expert_GTK, weight_GTK = ops.local_top_k(logits_GTE, self.k, self.renormalize)
        routing = ops.masked(expert_GTK, weight_GTK, context.valid_GT)
        return GateOutput(routing, ops.softmax_stats(logits_GTE))

    def _pooled(
        self, params: GateParams, x_GTD: Array, context: GateContext
    ) -> tuple[Float[Array, "G R N D"], int, Order]:
        """One vector per span of tokens, the span's length, and the order of the tokens."""
        if context.packed:
            return self._by_text(params, x_GTD, context), 1, Order()
        order = ops.order_of(context) if self.pool == "previous" else Order()
        x_GRLD, valid_GRL = spans.in_order(x_GTD, context, order)
        if self.pool == "running":
            return running_means(x_GRLD, valid_GRL), 1, order
        span = self.segment if self.pool == "previous" else x_GRLD.shape[2]
        mean_GRND, _ = spans.span_means(x_GRLD, valid_GRL, span)
        if self.pool == "previous":
            first_GR1D = jnp.broadcast_to(params["first_D"], mean_GRND[:, :, :1].shape)
            mean_GRND = jnp.concatenate([first_GR1D, mean_GRND[:, :, :-1]], axis=2)
        return mean_GRND, span, order

    def _by_text(
        self, params: GateParams, x_GTD: Array, context: GateContext
    ) -> Float[Array, "G R L D"]:
        """One vector per token, for rows with several texts."""
        x_GRLD, valid_GRL = spans.by_sequence(x_GTD, context)
        taken_GRLL = self._taken(valid_GRL, context.segment_GT.reshape(valid_GRL.shape))
        count_GRL = jnp.sum(taken_GRLL, axis=-1, dtype=jnp.float32)[..., None]
        total_GRLD = jnp.einsum(
            "grts,grsd->grtd",
            taken_GRLL.astype(jnp.float32),
            jnp.where(valid_GRL[..., None], x_GRLD, 0.0),
            precision=jax.lax.Precision.HIGHEST,
        )
        mean_GRLD = total_GRLD / jnp.maximum(count_GRL, 1.0)
        if self.pool != "previous":
            return mean_GRLD
        return jnp.where(count_GRL > 0, mean_GRLD, params["first_D"])

    def _taken(
        self, valid_GRL: Bool[Array, "G R L"], segment_GRL: Int[Array, "G R L"]
    ) -> Bool[Array, "G R L L"]:
        """For each token a mask of the tokens in its mean, all of its own text."""
        own_GRLL = segment_GRL[..., :, None] == segment_GRL[..., None, :]
        own_GRLL &= valid_GRL[..., None, :]
        if self.pool == "mean":
            return own_GRLL
        earlier_LL = jnp.tri(valid_GRL.shape[2], dtype=bool)
        if self.pool == "running":
            return own_GRLL & earlier_LL
        count_GRL = jnp.sum(own_GRLL & earlier_LL, axis=-1, dtype=jnp.int32)
        part_GRL = (count_GRL - 1) // self.segment
        return own_GRLL & (part_GRL[..., None, :] == part_GRL[..., :, None] - 1)

    def visibility(self, moe: MoEConfig) -> Visibility:
        by_capacity = capacity_visibility(self.k, moe)
        if self.pool != "mean" or moe.num_experts == 1:
            return by_capacity
        return by_capacity.union(Visibility(train_future=True, eval_future=True))


def running_means(
    x_GRLD: Float[Array, "G R L D"], valid_GRL: Bool[Array, "G R L"]
) -> Float[Array, "G R L D"]:
    """The mean over valid positions up to each; 0 where there are none."""
    total_GRLD = jnp.cumsum(jnp.where(valid_GRL[..., None], x_GRLD, 0.0), axis=2)
    count_GRL = jnp.cumsum(valid_GRL, axis=2, dtype=jnp.float32)
    return total_GRLD / jnp.maximum(count_GRL, 1.0)[..., None]
