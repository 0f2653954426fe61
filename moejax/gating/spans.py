"""Means over spans of a sequence, and experts merged per span."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.gating import ops
from moejax.types import GateContext, GateOutput, Merge, Order


def by_sequence(
    x_GTD: Array, context: GateContext
) -> tuple[Float[Array, "G R L D"], Bool[Array, "G R L"]]:
    """Tokens in float32 and their validity, by sequence."""
    groups, rows = context.row_GR.shape
    x_GRLD = x_GTD.astype(jnp.float32).reshape(groups, rows, -1, x_GTD.shape[-1])
    return x_GRLD, context.valid_GT.reshape(x_GRLD.shape[:3])


def in_order(
    x_GTD: Array, context: GateContext, order: Order
) -> tuple[Float[Array, "G R L D"], Bool[Array, "G R L"]]:
    """``by_sequence``, with the tokens in the given order."""
    x_GRLD, valid_GRL = by_sequence(x_GTD, context)
    shape = (context.row_GR.size, x_GRLD.shape[2])
    x_BLD, valid_BL = x_GRLD.reshape(*shape, -1), valid_GRL.reshape(shape)
    return order.tokens(x_BLD).reshape(x_GRLD.shape), order.tokens(valid_BL).reshape(
        valid_GRL.shape
    )


def in_spans(
    x_GRLD: Float[Array, "G R L D"], valid_GRL: Bool[Array, "G R L"], size: int
) -> tuple[Float[Array, "G R N U D"], Bool[Array, "G R N U"]]:
    """Spans of U = ``size`` tokens, the last one padded; padding is 0."""
    missing = -x_GRLD.shape[2] % size
    x_GRLD = jnp.where(valid_GRL[..., None], x_GRLD, 0.0)
    x_GRLD = jnp.pad(x_GRLD, ((0, 0), (0, 0), (0, missing), (0, 0)))
    valid_GRL = jnp.pad(valid_GRL, ((0, 0), (0, 0), (0, missing)))
    shape = (*x_GRLD.shape[:2], -1, size)
    return x_GRLD.reshape(*shape, x_GRLD.shape[-1]), valid_GRL.reshape(shape)


def span_means(
    x_GRLD: Float[Array, "G R L D"], valid_GRL: Bool[Array, "G R L"], size: int
) -> tuple[Float[Array, "G R N D"], Bool[Array, "G R N"]]:
    """Means over the valid tokens of each span, and a mask of the spans that have any."""
    x_GRNUD, valid_GRNU = in_spans(x_GRLD, valid_GRL, size)
    count_GRN = jnp.sum(valid_GRNU, axis=3, dtype=jnp.float32)
    return jnp.sum(x_GRNUD, axis=3) / jnp.maximum(count_GRN, 1.0)[..., None], count_GRN > 0


def span_logits(
    x_GRND: Float[Array, "G R N D"], weight_DE: Float[Array, "D E"]
) -> Float[Array, "G R N E"]:
    """``ops.router_logits`` of one vector per span."""
    flat_GXD = x_GRND.reshape(len(x_GRND), -1, x_GRND.shape[-1])
    return ops.router_logits(flat_GXD, weight_DE).reshape(*x_GRND.shape[:3], -1)


def of_tokens(
    x_GRNE: Float[Array, "G R N E"], span: int, context: GateContext, order: Order
) -> Float[Array, "G T E"]:
    """Values of spans of ``span`` tokens, repeated for the tokens and put back in place."""
    groups, rows, _, experts = x_GRNE.shape
    length = context.valid_GT.shape[1] // rows
    x_GRLE = jnp.repeat(x_GRNE, span, axis=2)[:, :, :length]
    return order.places(x_GRLE.reshape(-1, length, experts)).reshape(groups, -1, experts)


def merge_output(
    logits_GRNE: Float[Array, "G R N E"],
    weight_GRNE: Float[Array, "G R N E"],
    span: int,
    context: GateContext,
    order: Order,
) -> GateOutput:
    """Experts merged by ``weight_GRNE`` for every span of ``span`` tokens.

    The routing has each valid token's span weights, column e for expert e. The statistics are those
    of the span's logits.
    """
    _, _, spans, experts = logits_GRNE.shape
    weight_GTE = of_tokens(weight_GRNE, span, context, order)
    routing, _ = ops.heaviest(weight_GTE, 0, context.valid_GT)
    in_place = order.token_BL is None
    valid_BL = None if in_place else context.valid_GT.reshape(context.row_GR.size, -1)
    return GateOutput(
        routing,
        ops.softmax_stats(of_tokens(logits_GRNE, span, context, order)),
        mixing=Merge(weight_GRNE.reshape(-1, spans, experts), span, valid_BL),
    )
