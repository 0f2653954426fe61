"""The feed-forward networks of sorted rows, each row through that of its group.

For groups g of `group_sizes_G` that follow each other in the rows of `x_ND`::

    y[n] = act(x[n] @ w_1[g(n)], ...) @ w_out[g(n)]

This is `grouped_matmul`, an activation and `grouped_matmul` again, and on TPU and GPU it is nothing
else. On CPU it is a kernel of its own, because there most of what an expert layer costs beside its
products is to write the hidden layer to memory and read it back.

Forward and backward are functions under `jax.jit` named `NAME` and `BACKWARD`, so that a count of
FLOPs from a jaxpr can find them and use the formula: each matrix is in one product forward and in
two backward, nothing is computed again.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moejax.kernels import grouped_ffn_cpu
from moejax.kernels.grouped_matmul import grouped_matmul
from moejax.kernels.support import resolve_platform, vary_over, varying_axes

NAME = "grouped_ffn"
BACKWARD = f"{NAME}_bwd"
"""Names of the jitted functions."""


def grouped_ffn(
    x_ND: Float[Array, "N D"],
    input_GDF: tuple[Float[Array, "G D F"], ...],
    output_GFO: Float[Array, "G F O"],
    group_sizes_G: Int[Array, "G"],
    activate: Callable[..., Array],
    *,
    platform: str | None = None,
) -> Float[Array, "N O"]:
    """Runs each row through the network of its group; differentiable in rows and matrices.

    Args:
      x_ND: rows sorted by group, float32 or bfloat16.
      input_GDF: the matrices into the hidden layer, one or more, of the dtype of `x_ND`.
      output_GFO: the matrix out of it, of the same dtype.
      group_sizes_G: int32, rows of each group, >= 0, summing to at most N. Groups may be empty.
      activate: ``activate(x @ w_1, ...)`` for each of `input_GDF`, element by element. It is part
        of the key under which programs are cached: pass the same function object every time.
      platform: "cpu", "tpu" or "gpu"; None takes JAX's default backend.

    Returns:
      y_ND in the dtype of `x_ND`. For rows past sum(group_sizes_G) and inside `jax.shard_map` the
      rules are those of `grouped_matmul`. The backward pass keeps `x_ND` and the arguments of
      `activate`; these and y_ND have the name "experts" for policies of `jax.checkpoint`.

    Raises:
      ValueError: shapes or dtypes do not fit.
    """
    _check_operands(x_ND, input_GDF, output_GFO, group_sizes_G)
    platform = resolve_platform(platform)
    axes = varying_axes(x_ND, *input_GDF, output_GFO, group_sizes_G)
    x_ND, sizes_G = vary_over(x_ND, axes), vary_over(group_sizes_G.astype(jnp.int32), axes)
    weights = tuple(vary_over(w, axes) for w in (*input_GDF, output_GFO))
    if platform == "cpu" and x_ND.shape[0]:
        return _ffn(activate, x_ND, weights, sizes_G)
    before = [grouped_matmul(x_ND, w, sizes_G, platform=platform) for w in weights[:-1]]
    before = checkpoint_name(before, "experts")
    y_ND = grouped_matmul(activate(*before), weights[-1], sizes_G, platform=platform)
    return checkpoint_name(y_ND, "experts")


def _check_operands(x_ND, input_GDF, output_GFO, group_sizes_G) -> None:
    groups, hidden, _ = output_GFO.shape
    width = input_GDF[0].shape[1] if input_GDF else 0
    if any(w.shape != (groups, width, hidden) for w in input_GDF) or not input_GDF:
        raise ValueError(
            "grouped_ffn takes inputs [G, D, F] and an output [G, F, O]; got "
            f"{[w.shape for w in input_GDF]} and {output_GFO.shape}"
        )
    if x_ND.ndim != 2 or x_ND.shape[1] != width or group_sizes_G.shape != (groups,):
        raise ValueError(
            f"grouped_ffn: x {x_ND.shape} and group_sizes {group_sizes_G.shape} do not fit "
            f"matrices of shape {input_GDF[0].shape} and {output_GFO.shape}"
        )
    dtypes = {x_ND.dtype, output_GFO.dtype, *(w.dtype for w in input_GDF)}
    if len(dtypes) > 1:
        raise ValueError(f"grouped_ffn takes operands of one dtype; got {sorted(map(str, dtypes))}")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ffn(activate, x_ND, weights, group_sizes_G):
    y_ND, _ = _forward_jit(x_ND, weights, group_sizes_G, activate=activate, save=False)
    return checkpoint_name(y_ND, "experts")


def _ffn_fwd(activate, x_ND, weights, group_sizes_G):
    y_ND, before = _forward_jit(x_ND, weights, group_sizes_G, activate=activate, save=True)
    y_ND, before = checkpoint_name((y_ND, before), "experts")
    return y_ND, (x_ND, before, weights, group_sizes_G)


def _ffn_bwd(activate, residuals, dy_ND):
    x_ND, before, weights, sizes_G = residuals
    dx, dw = _backward_jit(x_ND, dy_ND, before, weights, sizes_G, activate=activate)
    return dx, dw, np.zeros(sizes_G.shape, jax.dtypes.float0)


_ffn.defvjp(_ffn_fwd, _ffn_bwd)


def _named_jit(name: str, run: Callable, *static: str):
    def named(*operands, **options):
        return run(*operands, **options)

    named.__name__ = named.__qualname__ = name
    return jax.jit(named, static_argnames=static)


_forward_jit = _named_jit(NAME, grouped_ffn_cpu.forward, "activate", "save")
_backward_jit = _named_jit(BACKWARD, grouped_ffn_cpu.backward, "activate")
