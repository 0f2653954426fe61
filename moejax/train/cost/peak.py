"""The best matrix-product rate of devices: published, or measured."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
    """The best matrix-product rate of some devices together, and the source of the number."""

    flops_per_second: float
    source: str
    """"published" or "measured <dtype> matmul"."""


def published_peak(device_kind: str, dtype: str) -> float | None:
    """Published dense FLOP/s of one device in "bfloat16" or "float32"; None if unknown."""
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
    """FLOP/s of the fastest ``size`` x ``size`` matrix product measured within ``seconds``."""
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
