"""Sentence-level gating: experts depend on an average over the sequence."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.gating import ops
from moejax.gating.spans import by_sequence, span_means
from moejax.types import (
    GateContext,
    GateOutput,
    GateParams,
    GateSpec,
    MoEConfig,
    TrainedBy,
    Visibility,
)

POOLS = ("mean", "running", "previous")


@dataclasses.dataclass(frozen=True)
class Sentence(ops.Stateless):
    r"""Tokens are routed by an average of their sequence instead of by themselves.

    .. math::
       h_t = W^\top m_t, \quad S_t = \operatorname{top}_k(h_t), \quad
       y_t = \sum_{e \in S_t} \operatorname{softmax}(h_t)_e f_e(x_t)

    with m_t by ``pool``, always over valid tokens of the token's own sequence:

    * "mean" (the paper's, for encoders): of all of them, so that all tokens of a sequence visit
      the same experts. In a decoder this shows the future to the past.
    * "running": of those up to t.
    * "previous": of the segment of ``segment`` tokens before the token's own; in the first segment,
      and behind padding, a learned vector. Every segment has one choice of experts.

    The softmax is over the k kept logits (``renormalize``) or over all. A sequence loads few
    experts: the preset takes ``dropless``, and balance losses over the batch.

    Visibility: "mean" sees the future, in training and in evaluation; "running" and "previous" see
    the past only, except through capacity.

    Reference: Kudugunta et al., "Beyond Distillation: Task-level Mixture-of-Experts for Efficient
    Inference", arXiv 2110.03742, which compares token, sentence and task; "previous" follows the
    segment routing of Lory, Zhong et al., arXiv 2405.03133, whose first segment sees itself.
    """

    pool: Annotated[str, "'mean' of the sequence (leaks), 'running' or 'previous' segment"] = "mean"
    segment: Annotated[int, "tokens in a segment of pool=previous"] = 32
    k: Annotated[int, "experts per token"] = 2
    renormalize: Annotated[bool, "softmax over the k kept logits instead of over all"] = True
    init_scale: Annotated[float, "router init: std = sqrt(init_scale / d_model)"] = 0.1

    trained_by: ClassVar[TrainedBy] = "task"
    causal: ClassVar[Mapping[str, Any]] = {"pool": "running"}

    def check(self, num_experts: int, train: bool) -> None:
        ops.check_choice("pool", self.pool, POOLS)
        ops.check_k(self.k, num_experts)
        ops.check_positive("segment", self.segment)
        ops.check_positive("init_scale", self.init_scale)
        ops.check_trains(self.k, self.renormalize, num_experts, train)

    def columns(self, num_experts: int) -> int:
        return self.k

    def init(self, key: Array, spec: GateSpec) -> GateParams:
        router_key, first_key = jax.random.split(key)
        params = {"router_DE": ops.init_router(router_key, spec, self.init_scale)}
        if self.pool == "previous":
            params["first_D"] = jax.random.normal(first_key, (spec.d_model,), jnp.float32)
        return params

    def __call__(
        self, params: GateParams, state: tuple, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        x_GRLD, valid_GRL = by_sequence(x_GTD, context)
        length = x_GRLD.shape[2]
        position_L = jnp.arange(length)
        if self.pool == "running":
            pooled_GRSD, span_L = running_means(x_GRLD, valid_GRL), position_L
        elif self.pool == "previous":
            mean_GRSD, some_GRS = span_means(x_GRLD, valid_GRL, self.segment)
            pooled_GRSD = shifted(mean_GRSD, some_GRS, params["first_D"])
            span_L = position_L // self.segment
        else:
            pooled_GRSD, _ = span_means(x_GRLD, valid_GRL, length)
            span_L = jnp.zeros_like(position_L)
        pooled_GTD = pooled_GRSD.reshape(len(x_GTD), -1, x_GTD.shape[-1])
        logits_GTE = ops.router_logits(pooled_GTD, params["router_DE"])
        logits_GRSE = logits_GTE.reshape(*pooled_GRSD.shape[:3], -1)
        logits_GTE = jnp.take(logits_GRSE, span_L, axis=2).reshape(*x_GTD.shape[:2], -1)
        expert_GTK, weight_GTK = ops.local_top_k(logits_GTE, self.k, self.renormalize)
        routing = ops.masked(expert_GTK, weight_GTK, context.valid_GT)
        return GateOutput(routing, ops.softmax_stats(logits_GTE))

    def capacity(self, num_tokens: int, num_experts: int, factor: float) -> int:
        return ops.token_choice_capacity(num_tokens, num_experts, self.k, factor)

    def visibility(self, moe: MoEConfig) -> Visibility:
        by_capacity = ops.capacity_visibility(self.k, moe)
        if self.pool != "mean" or moe.num_experts == 1:
            return by_capacity
        return by_capacity.union(Visibility(train_future=True, eval_future=True))


def running_means(
    x_GRLD: Float[Array, "G R L D"], valid_GRL: Bool[Array, "G R L"]
) -> Float[Array, "G R L D"]:
    """For each position the mean of the valid ones up to it; 0 where there are none."""
    total_GRLD = jnp.cumsum(jnp.where(valid_GRL[..., None], x_GRLD, 0.0), axis=2)
    count_GRL = jnp.cumsum(valid_GRL, axis=2, dtype=jnp.float32)
    return total_GRLD / jnp.maximum(count_GRL, 1.0)[..., None]


def shifted(
    mean_GRSD: Float[Array, "G R S D"], some_GRS: Bool[Array, "G R S"], first_D: Float[Array, "D"]
) -> Float[Array, "G R S D"]:
    """Each span gets the mean of the one before; ``first_D`` where there is none."""
    mean_GRSD = jnp.where(some_GRS[..., None], mean_GRSD, first_D)
    first_GR1D = jnp.broadcast_to(first_D, (*mean_GRSD.shape[:2], 1, first_D.size))
    return jnp.concatenate([first_GR1D, mean_GRSD[:, :, :-1]], axis=2)
