"""Expert FFNs on stacked weights.

Three layouts of the same computation: rows in fixed cells per expert, rows sorted by expert, and
one expert on all rows. Under a ``tensor`` split each function sees a slice of F and returns a
partial sum over F; whoever called it reduces.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moejax.kernels import grouped_ffn
from moejax.kernels.support import resolve_platform
from moejax.types import ExpertWeights

ACTIVATIONS: tuple[str, ...] = ("swiglu", "gelu", "relu", "clamped_swiglu")
CLAMP, SLOPE = 7.0, 1.702
"""The limit of ``clamped_swiglu`` and the slope of its sigmoid."""


def is_gated(activation: str) -> bool:
    """True if the activation has a gate branch, hence a third weight matrix."""
    return activation in ("swiglu", "clamped_swiglu")


def activate(activation: str, gate: Array | None, up: Array) -> Array:
    """swiglu: silu(gate) * up; gelu (tanh form) and relu: of ``up`` alone.

    clamped_swiglu (GPT-OSS): g sigmoid(1.702 g) (u + 1), with g = min(gate, 7) and u = ``up``
    between -7 and 7.
    """
    if activation == "swiglu":
        assert gate is not None
        return jax.nn.silu(gate) * up
    if activation == "clamped_swiglu":
        assert gate is not None
        gate, up = jnp.minimum(gate, CLAMP), jnp.clip(up, -CLAMP, CLAMP)
        return gate * jax.nn.sigmoid(SLOPE * gate) * (up + 1)
    if activation == "gelu":
        return jax.nn.gelu(up)
    if activation == "relu":
        return jax.nn.relu(up)
    raise ValueError(f"activation={activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}")


# One function object per activation, so that programs that use it are found compiled.
_ACTIVATE = {
    "swiglu": lambda gate, up: activate("swiglu", gate, up),
    "gelu": lambda up: activate("gelu", None, up),
    "relu": lambda up: activate("relu", None, up),
    "clamped_swiglu": lambda gate, up: activate("clamped_swiglu", gate, up),
}


def cast(weights: ExpertWeights, dtype: jnp.dtype) -> ExpertWeights:
    """The weights in the compute dtype."""
    return jax.tree.map(lambda w: w.astype(dtype), weights)


def ffn_cells(
    weights: ExpertWeights, x_SECD: Float[Array, "S E C D"], activation: str
) -> Float[Array, "S E C D"]:
    """Expert e on the rows of its own cells, C from each of S sources."""
    if resolve_platform(None) == "cpu":
        return _ffn_cells_cpu(weights, x_SECD, activation)
    weights = cast(weights, x_SECD.dtype)
    up_SECF = _plus(jnp.einsum("secd,edf->secf", x_SECD, weights.up_EDF), weights.up_bias_EF)
    gate_SECF = None
    if weights.gate_EDF is not None:
        gate_SECF = jnp.einsum("secd,edf->secf", x_SECD, weights.gate_EDF)
        gate_SECF = _plus(gate_SECF, weights.gate_bias_EF)
    gate_SECF, up_SECF = checkpoint_name((gate_SECF, up_SECF), "experts")
    hidden_SECF = activate(activation, gate_SECF, up_SECF)
    return checkpoint_name(jnp.einsum("secf,efd->secd", hidden_SECF, weights.down_EFD), "experts")


def _plus(hidden_SECF: Array, bias_EF: Array | None) -> Array:
    return hidden_SECF if bias_EF is None else hidden_SECF + bias_EF[:, None]


def _ffn_cells_cpu(weights: ExpertWeights, x_SECD: Array, activation: str) -> Array:
    """The same rows as groups of equal size: XLA:CPU is 1.1 to 2 times slower with the einsums."""
    sources, experts, slots, width = x_SECD.shape
    rows_ND = jnp.swapaxes(x_SECD, 0, 1).reshape(-1, width)
    sizes_E = jnp.full(experts, sources * slots, jnp.int32)
    out_ND = ffn_sorted(weights, rows_ND, sizes_E, activation)
    return jnp.swapaxes(out_ND.reshape(experts, sources, slots, width), 0, 1)


def ffn_sorted(
    weights: ExpertWeights, x_ND: Float[Array, "N D"], sizes_E: Int[Array, "E"], activation: str
) -> Float[Array, "N D"]:
    """Rows sorted by expert, ``sizes_E`` of them for each; later rows are unspecified."""
    weights = cast(weights, x_ND.dtype)
    inputs = (weights.up_EDF,)
    if weights.gate_EDF is not None:
        inputs = (weights.gate_EDF, weights.up_EDF)
    if weights.up_bias_EF is not None:
        # The kernels know no biases: one more input, which is 1, has the biases as its weights.
        biases = [b for b in (weights.gate_bias_EF, weights.up_bias_EF) if b is not None]
        inputs = tuple(
            jnp.concatenate([w_EDF, b_EF[:, None]], axis=1)
            for w_EDF, b_EF in zip(inputs, biases, strict=True)
        )
        x_ND = jnp.pad(x_ND, ((0, 0), (0, 1)), constant_values=1)
    return grouped_ffn(x_ND, inputs, weights.down_EFD, sizes_E, _ACTIVATE[activation])


def ffn_one(
    weights: ExpertWeights, x_ND: Float[Array, "N D"], activation: str
) -> Float[Array, "N D"]:
    """One expert (leaves without their E axis) on all rows."""
    weights = cast(weights, x_ND.dtype)
    gate_NF = None if weights.gate_EDF is None else x_ND @ weights.gate_EDF
    up_NF = x_ND @ weights.up_EDF
    if weights.up_bias_EF is not None:
        up_NF += weights.up_bias_EF
    if gate_NF is not None and weights.gate_bias_EF is not None:
        gate_NF += weights.gate_bias_EF
    return activate(activation, gate_NF, up_NF) @ weights.down_EFD
