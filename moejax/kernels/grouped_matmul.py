"""Matrix multiplication of sorted rows, each by the matrix of its group.

For groups g of `group_sizes_G` that follow each other in the rows of `x_ND`::

    y[n] = x[n] @ w[g(n)]          2 N D F floating point operations, whatever the number of groups

    dx[n] = dy[n] @ w[g(n)].T      dw[g] = sum over the rows n of g of outer(x[n], dy[n])

The three products are functions under `jax.jit` whose names begin with `NAME`, so that a count of
FLOPs from a jaxpr can find them and use the formula.
"""

from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.kernels import grouped_matmul_cpu, grouped_matmul_gpu, grouped_matmul_tpu
from moejax.kernels.support import Platform, resolve_platform, vary_over, varying_axes

_IMPLEMENTATIONS: dict[str, ModuleType] = {
    "cpu": grouped_matmul_cpu,
    "tpu": grouped_matmul_tpu,
    "gpu": grouped_matmul_gpu,
}
_DTYPES = (jnp.float32, jnp.bfloat16)

NAME = "grouped_matmul"
"""The beginning of the jitted functions' names."""


def grouped_matmul(
    x_ND: Float[Array, "N D"],
    w_GDF: Float[Array, "G D F"],
    group_sizes_G: Int[Array, "G"],
    *,
    platform: str | None = None,
) -> Float[Array, "N F"]:
    """Multiplies each row by the matrix of its group; differentiable in `x_ND` and `w_GDF`.

    Args:
      x_ND: rows sorted by group, float32 or bfloat16.
      w_GDF: one matrix per group, of the dtype of `x_ND`.
      group_sizes_G: int32, rows of each group, >= 0, summing to at most N. Groups may be empty.
      platform: "cpu", "tpu" or "gpu"; None takes JAX's default backend.

    Returns:
      y_NF in the dtype of `x_ND`, accumulated in float32 (on TPU and GPU float32 operands are
      multiplied in the platform's default precision). Rows from sum(group_sizes_G) on belong to
      no group: their outputs, and their gradients with respect to `x_ND`, are unspecified,
      possibly NaN, and must not be read. Such rows of `x_ND` and of the output's cotangent may
      hold anything, NaN included, without touching any other row or the gradient of `w_GDF`.

    Inside `jax.shard_map` the operands may vary over different axes: the gradient of an operand is
    summed over the axes it does not vary over. See `moejax.kernels.kernels_pass_check_vma` for
    ``check_vma=True``.

    Raises:
      ValueError: shapes or dtypes do not fit.
      MissingKernelError: the platform's kernel is not installed.
    """
    _check_operands(x_ND, w_GDF, group_sizes_G)
    axes = varying_axes(x_ND, w_GDF, group_sizes_G)
    x_ND, w_GDF, group_sizes_G = (vary_over(a, axes) for a in (x_ND, w_GDF, group_sizes_G))
    return _product(resolve_platform(platform), x_ND, w_GDF, group_sizes_G.astype(jnp.int32))


def _check_operands(x_ND, w_GDF, group_sizes_G) -> None:
    if x_ND.ndim != 2 or w_GDF.ndim != 3 or group_sizes_G.shape != w_GDF.shape[:1]:
        raise ValueError(
            "grouped_matmul takes x [N, D], w [G, D, F] and group_sizes [G]; got "
            f"{x_ND.shape}, {w_GDF.shape} and {group_sizes_G.shape}"
        )
    if x_ND.shape[1] != w_GDF.shape[1]:
        raise ValueError(f"grouped_matmul: x has D={x_ND.shape[1]} but w has D={w_GDF.shape[1]}")
    if x_ND.dtype != w_GDF.dtype or x_ND.dtype not in _DTYPES:
        raise ValueError(
            "grouped_matmul takes x and w both float32 or both bfloat16; got "
            f"{x_ND.dtype} and {w_GDF.dtype}"
        )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(platform: Platform, x_ND, w_GDF, group_sizes_G):
    return _forward_jit(x_ND, w_GDF, group_sizes_G, platform=platform)


def _product_fwd(platform, x_ND, w_GDF, group_sizes_G):
    y_NF = _forward_jit(x_ND, w_GDF, group_sizes_G, platform=platform)
    return y_NF, (x_ND, w_GDF, group_sizes_G)


def _product_bwd(platform, residuals, dy_NF):
    x_ND, w_GDF, group_sizes_G = residuals
    dx_ND = _dx_jit(dy_NF, w_GDF, group_sizes_G, platform=platform)
    dw_GDF = _dw_jit(x_ND, dy_NF, group_sizes_G, platform=platform)
    return dx_ND, dw_GDF, np.zeros(group_sizes_G.shape, jax.dtypes.float0)


_product.defvjp(_product_fwd, _product_bwd)


def _named_jit(name: str, product: str, empty_shape):
    """A jitted function called `name` that runs the platform's `product`, or zeros without rows."""

    def run(rows, operand, group_sizes_G, *, platform):
        if rows.shape[0] == 0:
            zeros = jnp.zeros(empty_shape(rows, operand, group_sizes_G), rows.dtype)
            return vary_over(zeros, varying_axes(rows, operand, group_sizes_G))
        return getattr(_IMPLEMENTATIONS[platform], product)(rows, operand, group_sizes_G)

    run.__name__ = run.__qualname__ = name
    return jax.jit(run, static_argnames=("platform",))


_forward_jit = _named_jit(NAME, "forward", lambda x, w, sizes: (0, w.shape[2]))
_dx_jit = _named_jit(f"{NAME}_dx", "dx", lambda dy, w, sizes: (0, w.shape[1]))
_dw_jit = _named_jit(
    f"{NAME}_dw", "dw", lambda x, dy, sizes: (sizes.shape[0], x.shape[1], dy.shape[1])
)
