"""Floating-point operations of a program, counted from its jaxpr.

XLA's own cost analysis counts a loop body once, so the FLOPs of a scanned model cannot be read from
it. Here a scan counts length times its body. Only matrix products and convolutions are counted
(one multiply and one add each): element-wise work is below 1 % of a transformer's.
"""

from functools import partial
from math import prod
from typing import Any

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxprs_in_params

from moejax.dispatch.heads import FIXED_ROWS
from moejax.kernels.grouped_ffn import BACKWARD as GROUPED_FFN_BACKWARD
from moejax.kernels.grouped_ffn import NAME as GROUPED_FFN
from moejax.kernels.grouped_matmul import NAME as GROUPED_MATMUL

KERNELS = (GROUPED_MATMUL, GROUPED_FFN)
"""Beginnings of the names of jitted functions that are counted by formula."""
# Work hidden in a kernel: its FLOPs cannot be read from operand shapes.
_OPAQUE = frozenset({"pallas_call", "ragged_dot_general"})


def count_flops(closed_jaxpr: ClosedJaxpr | Jaxpr, *, grouped: bool = True) -> float:
    """FLOPs that one call of a traced program executes, on all devices together.

    With ``grouped=False`` those of the experts' grouped matmuls are left out: the rest is the part
    of a sparse model that does not depend on the routing.

    * ``dot_general``: 2 * batch * M * N * K; a convolution likewise.
    * ``scan``: length x body. ``cond``: its most expensive branch. ``shard_map``: the body's shapes
      are one shard's, so its count times the number of shards; work that a replicated input makes
      every device repeat is counted on each.
    * a jitted function whose name starts with ``grouped_matmul``: 2 * N * D * F from the shapes of
      its operands, whatever kernel or loop is inside. N is the number of rows passed to it,
      padding rows included.
    * one named ``grouped_ffn``: 2 * N * D * F for each matrix; ``grouped_ffn_bwd`` twice that.
    * recomputed operations count again, because they run again. For model-FLOPs utilisation trace
      the step with ``model.remat="none"``.

    Use: ``count_flops(jax.make_jaxpr(step)(*args))``; abstract arguments are enough.

    Raises:
      ValueError: a while loop holds matrix products (its trip count is unknown), or a Pallas kernel
        or ``ragged_dot`` lies outside a ``grouped_matmul``.
    """
    jaxpr = closed_jaxpr.jaxpr if isinstance(closed_jaxpr, ClosedJaxpr) else closed_jaxpr
    return sum((_equation_flops(eqn, grouped) for eqn in jaxpr.eqns), start=0.0)


def _equation_flops(eqn: Any, grouped: bool) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        return _dot_flops(eqn)
    if name == "conv_general_dilated":
        return _conv_flops(eqn)
    if name in _OPAQUE:
        raise ValueError(
            f"cannot count the FLOPs of {name}: wrap it in a jitted function named grouped_matmul*"
        )
    if _is_kernel(eqn) and not any(_has_kernel(body) for body in jaxprs_in_params(params)):
        is_ffn = str(params["name"]).startswith(GROUPED_FFN)
        flops = _grouped_ffn_flops(eqn) if is_ffn else _grouped_matmul_flops(eqn)
        if flops is not None:
            return flops if grouped else 0.0
    if name in ("jit", "pjit") and str(params["name"]).startswith(FIXED_ROWS):
        grouped = True
    count = partial(count_flops, grouped=grouped)
    if name == "cond":
        return max(map(count, params["branches"]))
    inner = sum(map(count, jaxprs_in_params(params)), start=0.0)
    if name == "scan":
        return params["length"] * inner
    if name == "shard_map":
        return num_shards(params) * inner
    if name == "while" and inner:
        raise ValueError(
            "cannot count the FLOPs of a while loop that holds matrix products: its trip count is "
            "not in the program; use jax.lax.scan, or name the jitted function grouped_matmul*"
        )
    return inner


def _dot_flops(eqn: Any) -> float:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    lhs_shape = eqn.invars[0].aval.shape
    return 2.0 * eqn.outvars[0].aval.size * prod(lhs_shape[axis] for axis in contracting)


def _conv_flops(eqn: Any) -> float:
    """FLOPs of a convolution. Zeros that padding or dilation adds count as if they were data."""
    kernel = eqn.invars[1].aval
    out_features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * eqn.outvars[0].aval.size * kernel.size / out_features


def _is_kernel(eqn: Any) -> bool:
    return eqn.primitive.name in ("jit", "pjit") and str(eqn.params["name"]).startswith(KERNELS)


def _has_kernel(jaxpr: Jaxpr) -> bool:
    return any(
        _is_kernel(eqn) or any(_has_kernel(body) for body in jaxprs_in_params(eqn.params))
        for eqn in jaxpr.eqns
    )


def _grouped_matmul_flops(eqn: Any) -> float | None:
    """2 N D F, from (x_ND or dy_NF, w_GDF) or, for the weights' gradient, (x_ND, dy_NF).

    Differentiating a scan moves operations that do not depend on its inputs out of a jitted
    function, into a call of the same name without operands (None for that call). Their results
    become further operands.
    """
    shapes = [var.aval.shape for var in eqn.invars if jnp.issubdtype(var.aval.dtype, jnp.floating)]
    match shapes:
        case []:
            return None
        case [(N, _), (_, D, F), *_]:
            return 2.0 * N * D * F
        case [(N, D), (M, F), *rest] if N == M and all(len(shape) != 3 for shape in rest):
            return 2.0 * N * D * F
        case _:
            raise ValueError(
                f"{eqn.params['name']} must take (rows, weights_GDF, sizes) or (rows, rows, "
                f"sizes); it was called with floating-point operands of shapes {shapes}"
            )


def _grouped_ffn_flops(eqn: Any) -> float | None:
    """FLOPs from (x_ND, [dy_ND and residuals,] one or more w_GDF, w_GFD); None as above."""
    shapes = [var.aval.shape for var in eqn.invars if jnp.issubdtype(var.aval.dtype, jnp.floating)]
    rows = [shape[0] for shape in shapes if len(shape) == 2]
    matrices = [shape[1] * shape[2] for shape in shapes if len(shape) == 3]
    if not shapes:
        return None
    if len(matrices) < 2 or not rows:
        raise ValueError(
            f"{eqn.params['name']} must take rows and at least two stacks of matrices; it was "
            f"called with floating-point operands of shapes {shapes}"
        )
    products = 2 if str(eqn.params["name"]).startswith(GROUPED_FFN_BACKWARD) else 1
    return products * 2.0 * rows[0] * sum(matrices)


def num_shards(params: dict[str, Any]) -> int:
    """The number of shards that a shard_map runs: the product of its manual axes' sizes.

    JAX has renamed this parameter between releases; the name always ends in ``manual_axes``.
    """
    (manual_axes,) = (value for key, value in params.items() if key.endswith("manual_axes"))
    return prod(params["mesh"].shape[axis] for axis in manual_axes)
