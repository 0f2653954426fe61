"""What gates that decide for stretches of a sequence share: their means, and merging by them."""

from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.gating import ops
from moejax.types import GateContext, GateOutput, Merge, TrainedBy


class MergesExperts(ops.Stateless):
    """What is the same of all gates that merge experts. No transport is used, and no capacity."""

    trained_by: ClassVar[TrainedBy] = "task"
    mixes: ClassVar[Literal["slots", "weights"]] = "weights"

    def columns(self, num_experts: int) -> int:
        """Column e of the routing is expert e."""
        return num_experts

    def capacity(self, num_tokens: int, num_experts: int, factor: float) -> int:
        """Room for every token: nothing is sent, so nothing is turned away."""
        return num_tokens


def by_sequence(
    x_GTD: Array, context: GateContext
) -> tuple[Float[Array, "G R L D"], Bool[Array, "G R L"]]:
    """Tokens in float32, and which are valid, sequence by sequence."""
    groups, rows = context.row_GR.shape
    x_GRLD = x_GTD.astype(jnp.float32).reshape(groups, rows, -1, x_GTD.shape[-1])
    return x_GRLD, context.valid_GT.reshape(x_GRLD.shape[:3])


def in_spans(
    x_GRLD: Float[Array, "G R L D"], valid_GRL: Bool[Array, "G R L"], size: int
) -> tuple[Float[Array, "G R N U D"], Bool[Array, "G R N U"]]:
    """Spans of U = ``size`` tokens, the last filled up with padding; what is not valid is 0."""
    missing = -x_GRLD.shape[2] % size
    x_GRLD = jnp.where(valid_GRL[..., None], x_GRLD, 0.0)
    x_GRLD = jnp.pad(x_GRLD, ((0, 0), (0, 0), (0, missing), (0, 0)))
    valid_GRL = jnp.pad(valid_GRL, ((0, 0), (0, 0), (0, missing)))
    shape = (*x_GRLD.shape[:2], -1, size)
    return x_GRLD.reshape(*shape, x_GRLD.shape[-1]), valid_GRL.reshape(shape)


def span_means(
    x_GRLD: Float[Array, "G R L D"], valid_GRL: Bool[Array, "G R L"], size: int
) -> tuple[Float[Array, "G R N D"], Bool[Array, "G R N"]]:
    """Means of the valid ones in spans of ``size``, the last maybe shorter; and which have any."""
    x_GRNUD, valid_GRNU = in_spans(x_GRLD, valid_GRL, size)
    count_GRN = jnp.sum(valid_GRNU, axis=3, dtype=jnp.float32)
    return jnp.sum(x_GRNUD, axis=3) / jnp.maximum(count_GRN, 1.0)[..., None], count_GRN > 0


def span_logits(
    x_GRND: Float[Array, "G R N D"], weight_DE: Float[Array, "D E"]
) -> Float[Array, "G R N E"]:
    """``ops.router_logits`` of one vector per span."""
    flat_GXD = x_GRND.reshape(len(x_GRND), -1, x_GRND.shape[-1])
    return ops.router_logits(flat_GXD, weight_DE).reshape(*x_GRND.shape[:3], -1)


def merge_output(
    logits_GRNE: Float[Array, "G R N E"],
    weight_GRNE: Float[Array, "G R N E"],
    span: int,
    context: GateContext,
) -> GateOutput:
    """Experts merged by ``weight_GRNE`` for every span of ``span`` tokens.

    The routing tells of each valid token its span's weights, column e those of expert e; the
    statistics are of its span's logits.
    """
    groups, rows, spans, experts = logits_GRNE.shape
    length = context.valid_GT.shape[1] // rows

    def of_tokens(x_GRNE: Array) -> Array:
        return jnp.repeat(x_GRNE, span, axis=2)[:, :, :length].reshape(groups, -1, experts)

    routing, _ = ops.heaviest(of_tokens(weight_GRNE), 0, context.valid_GT)
    return GateOutput(
        routing,
        ops.softmax_stats(of_tokens(logits_GRNE)),
        mixing=Merge(weight_GRNE.reshape(-1, spans, experts), span),
    )
