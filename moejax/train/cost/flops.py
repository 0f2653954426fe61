"""Floating-point operations of a program, counted from its jaxpr, and what a device can do at best.

XLA's own cost analysis counts a loop body once, so the FLOPs of a scanned model cannot be read from
it. Here a scan counts length times its body. Only matrix products and convolutions are counted
(one multiply and one add each): element-wise work is below 1 % of a transformer's.
"""

import time
from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxprs_in_params

_KERNELS = ("grouped_matmul", "grouped_ffn")
_FIXED = ("head_queries", "head_outputs")
"""Jitted functions whose grouped matmuls have the same number of rows whatever the routing."""
# Work hidden in a kernel: its FLOPs cannot be read from operand shapes.
_OPAQUE = frozenset({"pallas_call", "ragged_dot_general"})


def count_flops(closed_jaxpr: ClosedJaxpr | Jaxpr, *, grouped: bool = True) -> float:
    """FLOPs that one call of a traced program executes, on all devices together.

    With ``grouped=False``, without those of experts' grouped matmuls: the share of a sparse model
    that does not depend on the routing.

    * ``dot_general``: 2 * batch * M * N * K; a convolution likewise.
    * ``scan``: length x body. ``cond``: its most expensive branch. ``shard_map``: the body's shapes
      are one shard's, so its count times the number of shards; work that a replicated input makes
      every device repeat is counted on each.
    * a jitted function whose name starts with ``grouped_matmul``: 2 * N * D * F from the shapes of
      its operands, whatever kernel or loop is inside. N is the number of rows handed to it,
      padding rows included.
    * one named ``grouped_ffn``: 2 * N * D * F for each matrix; ``grouped_ffn_bwd`` twice that.
    * rematerialisation counts again, because it runs again. For model-FLOPs utilisation trace the
      step with ``model.remat="none"``.

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
        is_ffn = str(params["name"]).startswith("grouped_ffn")
        flops = _grouped_ffn_flops(eqn) if is_ffn else _grouped_matmul_flops(eqn)
        if flops is not None:
            return flops if grouped else 0.0
    if name in ("jit", "pjit") and str(params["name"]).startswith(_FIXED):
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
    """Zeros that padding or dilation brings in are counted as if they were data."""
    kernel = eqn.invars[1].aval
    out_features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * eqn.outvars[0].aval.size * kernel.size / out_features


def _is_kernel(eqn: Any) -> bool:
    return eqn.primitive.name in ("jit", "pjit") and str(eqn.params["name"]).startswith(_KERNELS)


def _has_kernel(jaxpr: Jaxpr) -> bool:
    return any(
        _is_kernel(eqn) or any(_has_kernel(body) for body in jaxprs_in_params(eqn.params))
        for eqn in jaxpr.eqns
    )


def _grouped_matmul_flops(eqn: Any) -> float | None:
    """2 N D F, from (x_ND or dy_NF, w_GDF) or, for the weights' gradient, (x_ND, dy_NF).

    Differentiating a scan cuts what does not depend on its inputs out of a jitted function, into a
    call of the same name without operands (None for that); the results become further operands.
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
    """From (x_ND, [dy_ND and what was kept,] one or more w_GDF, w_GFD); None as above."""
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
    products = 2 if str(eqn.params["name"]).endswith("_bwd") else 1
    return products * 2.0 * rows[0] * sum(matrices)


def num_shards(params: dict[str, Any]) -> int:
    """How many shards a shard_map runs: the product of its manual axes' sizes.

    jax has renamed this parameter between releases, always ending in ``manual_axes``.
    """
    (manual_axes,) = (value for key, value in params.items() if key.endswith("manual_axes"))
    return prod(params["mesh"].shape[axis] for axis in manual_axes)


# Peak dense rates in FLOP/s as (bfloat16, float32). A device kind takes the first entry that its
# name starts with. float32 means a matmul at JAX's default precision: one bfloat16 pass on TPU,
# TF32 on NVIDIA GPUs. Vendors' figures "with sparsity" are halved.
_PUBLISHED: tuple[tuple[str, float, float], ...] = (
    # cloud.google.com/tpu/docs, one page per generation.
    ("TPU v4 lite", 138e12, 138e12),  # TPU v4i: Jouppi et al., ISCA 2021
    ("TPU v4", 275e12, 275e12),
    ("TPU v5 lite", 197e12, 197e12),
    ("TPU v5e", 197e12, 197e12),
    ("TPU v5", 459e12, 459e12),
    ("TPU v6", 918e12, 918e12),
    ("TPU7x", 1153.5e12, 1153.5e12),  # 2307 a chip, which JAX shows as two devices
    # NVIDIA data sheets: A100 (2020), H100 and H200 (2023), L40S (2023), Blackwell (2024).
    ("NVIDIA A100", 312e12, 156e12),
    ("NVIDIA H100 PCIe", 756e12, 378e12),
    ("NVIDIA H100 NVL", 835e12, 417.5e12),
    ("NVIDIA H100", 989.4e12, 494.7e12),
    ("NVIDIA GH200", 989.4e12, 494.7e12),
    ("NVIDIA H200 NVL", 835e12, 417.5e12),
    ("NVIDIA H200", 989.4e12, 494.7e12),
    ("NVIDIA L40S", 362e12, 183e12),
    ("NVIDIA B200", 2250e12, 1125e12),
    ("NVIDIA GB200", 2500e12, 1250e12),
)


class Peak(NamedTuple):
    """The best matrix-product rate of some devices together, and where the number is from."""

    flops_per_second: float
    source: str
    """"published" or "measured <dtype> matmul"."""


def published_peak(device_kind: str, dtype: str) -> float | None:
    """Published dense FLOP/s of one device in "bfloat16" or "float32"; None if it is not known."""
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"dtype={dtype!r} has no published peak here; use bfloat16 or float32")
    for prefix, bfloat16, float32 in _PUBLISHED:
        if device_kind.startswith(prefix):
            return bfloat16 if dtype == "bfloat16" else float32
    return None


def peak(devices: Sequence[jax.Device], dtype: str) -> Peak:
    """Peak rate of ``devices`` together: published if known, otherwise measured on the first.

    Virtual CPU devices share one machine, so a CPU counts once per process, however many devices
    it shows. ``dtype`` is "bfloat16" or "float32".
    """
    first = devices[0]
    published = published_peak(first.device_kind, dtype)
    if published is not None:
        return Peak(published * len(devices), "published")
    if first.platform == "cpu":
        rate, count = measure_matmul_flops(dtype=dtype), len({d.process_index for d in devices})
    else:
        rate, count = measure_matmul_flops(dtype=dtype, size=8192, device=first), len(devices)
    return Peak(rate * count, f"measured {dtype} matmul")


def peak_flops(devices: Sequence[jax.Device], dtype: str) -> float:
    """``peak(devices, dtype)`` without its source, in FLOP/s."""
    return peak(devices, dtype).flops_per_second


def measure_matmul_flops(
    seconds: float = 0.2,
    *,
    dtype: str = "float32",
    size: int = 1024,
    device: jax.Device | None = None,
) -> float:
    """FLOP/s of the fastest ``size`` x ``size`` matrix product seen within ``seconds``."""
    where = jax.local_devices()[0] if device is None else device
    matrix = jax.device_put(np.ones((size, size), jnp.dtype(dtype)), where)
    matmul = jax.jit(jnp.matmul)
    jax.block_until_ready(matmul(matrix, matrix))
    fastest = float("inf")
    end = time.perf_counter() + seconds
    while fastest == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(matmul(matrix, matrix))
        fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * size**3 / fastest
