"""Grouped matmul for NVIDIA GPUs: the kernels of the package tokamax.

`jax.lax.ragged_dot` is not used: on NVIDIA it materialises one masked copy of the rows per group.
The default is tokamax's Triton kernel, which takes float32 and bfloat16 and any width.
``implementation="mosaic_gpu"`` names the Hopper and Blackwell kernel (bfloat16, widths in whole
tiles); benchmarks compare the two. An implementation that cannot run raises, nothing falls back.
"""

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers

from moejax.kernels.support import MissingKernelError

DEFAULT_IMPLEMENTATION = "triton"

_FORWARD = RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([1], [1]), ([], [])),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)
_DX = RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([1], [2]), ([], [])),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)
_DW = RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([0], [0]), ([], [])),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def forward(x_ND, w_GDF, group_sizes_G, *, implementation=DEFAULT_IMPLEMENTATION) -> jax.Array:
    """y[n] = x[n] @ w[group of n]."""
    return _ragged_dot(x_ND, w_GDF, group_sizes_G, _FORWARD, implementation)


def dx(dy_NF, w_GDF, group_sizes_G, *, implementation=DEFAULT_IMPLEMENTATION) -> jax.Array:
    """dx[n] = dy[n] @ w[group of n].T"""
    return _ragged_dot(dy_NF, w_GDF, group_sizes_G, _DX, implementation)


def dw(x_ND, dy_NF, group_sizes_G, *, implementation=DEFAULT_IMPLEMENTATION) -> jax.Array:
    """dw[g] = sum over the rows n of group g of outer(x[n], dy[n]), in the dtype of x."""
    if implementation == "mosaic_gpu":
        # Its last block multiplies rows of no group by a 0 mask, which NaN would survive.
        owned = (jnp.arange(x_ND.shape[0]) < group_sizes_G.sum())[:, None]
        x_ND, dy_NF = jnp.where(owned, x_ND, 0), jnp.where(owned, dy_NF, 0)
    dw_GDF = _ragged_dot(x_ND, dy_NF, group_sizes_G, _DW, implementation)
    # For an empty group the Triton kernel of tokamax 0.0.12 reads the block of rows before it.
    return jnp.where(group_sizes_G[:, None, None] > 0, dw_GDF, 0)


def _ragged_dot(lhs, rhs, group_sizes_G, dimension_numbers, implementation) -> jax.Array:
    try:
        import tokamax
    except ImportError as error:
        raise MissingKernelError(
            "grouped_matmul on GPU needs the package tokamax; install moejax[gpu]"
        ) from error
    try:
        return tokamax.ragged_dot_general(
            lhs,
            rhs,
            group_sizes_G,
            ragged_dot_dimension_numbers=dimension_numbers,
            preferred_element_type=lhs.dtype,
            implementation=implementation,
        )
    except (ValueError, NotImplementedError) as error:
        # The operands were checked before; what remains is a kernel that is not there. Newer
        # tokamax has the Triton kernel only with its extra "cuda".
        raise MissingKernelError(
            f"tokamax cannot run grouped_matmul with its kernel {implementation!r} on this device "
            f"({error}); install moejax[gpu]"
        ) from error
