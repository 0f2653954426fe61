"""Tests of what this machine can run, for ``moejax doctor``."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import PyTree

import moejax
from moejax.config import settings
from moejax.errors import UserError
from moejax.job.launch import CPU_DEVICES, backend_is_running, started_devices
from moejax.job.memory import host_memory
from moejax.mesh import AXES, make_mesh

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
AXIS = "expert"
SECONDS = 1.0
"""Duration of the timed matmul."""


def report(cpu_devices: int) -> int:
    """Print the findings; return 0 if moejax can train here, 1 if something it needs fails.

    ``cpu_devices`` virtual CPU devices are made, unless JAX has started devices before.

    Raises:
      UserError: there are no devices as the environment asks for.
    """
    settings.fix()
    if not backend_is_running():
        jax.config.update(CPU_DEVICES, cpu_devices)
    _line("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    _line("packages", ", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    _line("host", f"{_cores()} cores, {_memory()}")
    try:
        devices = started_devices()
    except UserError:
        _line("devices", "none: moejax cannot train here")
        raise
    count = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    _line("devices", f"{count}, {jax.process_count()} process(es)")
    mesh = make_mesh({AXIS: -1})
    sizes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in AXES)
    _line("mesh", f"{sizes} with mesh.{AXIS}=-1")
    works = [_line_of(name, check(mesh)) for name, check in COLLECTIVES.items()]
    _line("ragged_all_to_all", ragged_all_to_all(mesh))
    _line("matmul", matmul_rate())
    works.append(_line_of("MoE layer", moe_layer(mesh)))
    healthy = all(works)
    print("moejax can train here" if healthy else "moejax cannot train here: see above")
    return 0 if healthy else 1


def _line(name: str, text: str) -> None:
    print(f"{name:<18} {text}")


def _line_of(name: str, text: str) -> bool:
    _line(name, text)
    return text.startswith("ok")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> str:
    return f"{host_memory() / 2**30:.1f} GiB memory"


def _try(mesh: Mesh, fn: Callable[[jax.Array], jax.Array], expected: np.ndarray) -> str:
    """Run ``fn`` on [n*n, 2] rows numbered from 0, n of them on each of n shards."""
    n = mesh.shape[AXIS]
    x = jnp.arange(2 * n * n, dtype=jnp.float32).reshape(n * n, 2)
    spec = PartitionSpec(AXIS)
    run = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec))
    try:
        result = jax.device_get(run(x))
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        return f"not on this backend ({str(error).splitlines()[0][:90]})"
    return "ok" if np.array_equal(result, expected) else "WRONG RESULT"


def _rows(n: int) -> np.ndarray:
    """The input of ``_try`` as [shard, row, column]."""
    return np.arange(2 * n * n, dtype=np.float32).reshape(n, n, 2)


def all_gather(mesh: Mesh) -> str:
    n = mesh.shape[AXIS]
    expected = np.tile(_rows(n).reshape(-1, 2), (n, 1))
    return _try(mesh, lambda x: jax.lax.all_gather(x, AXIS, tiled=True), expected)


def psum(mesh: Mesh) -> str:
    n = mesh.shape[AXIS]
    expected = np.tile(_rows(n).sum(0), (n, 1))
    return _try(mesh, lambda x: jax.lax.pcast(jax.lax.psum(x, AXIS), AXIS, to="varying"), expected)


def psum_scatter(mesh: Mesh) -> str:
    expected = _rows(mesh.shape[AXIS]).sum(0)
    return _try(mesh, lambda x: jax.lax.psum_scatter(x, AXIS, tiled=True), expected)


def all_to_all(mesh: Mesh) -> str:
    expected = _rows(mesh.shape[AXIS]).swapaxes(0, 1).reshape(-1, 2)
    return _try(mesh, lambda x: jax.lax.all_to_all(x, AXIS, 0, 0, tiled=True), expected)


def ragged_all_to_all(mesh: Mesh) -> str:
    """An all-to-all written as a ragged one; moejax has its own where XLA has none."""
    n = mesh.shape[AXIS]

    def exchange(x: jax.Array) -> jax.Array:
        one = jnp.ones(n, jnp.int32)
        mine = jnp.full(n, jax.lax.axis_index(AXIS), jnp.int32)
        to = jnp.arange(n, dtype=jnp.int32)
        out = jnp.zeros_like(x)
        return jax.lax.ragged_all_to_all(x, out, to, one, mine, one, axis_name=AXIS)

    text = _try(mesh, exchange, _rows(n).swapaxes(0, 1).reshape(-1, 2))
    return text if text == "ok" else f"{text}; moejax uses its portable equivalent"


COLLECTIVES: dict[str, Callable[[Mesh], str]] = {
    "all_gather": all_gather,
    "psum": psum,
    "psum_scatter": psum_scatter,
    "all_to_all": all_to_all,
}


def matmul_rate() -> str:
    """Sustained rate of one square matmul on one device."""
    on_cpu = jax.default_backend() == "cpu"
    n, dtype = (1024, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
    x = jnp.ones((n, n), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    start, runs = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        product(x, x).block_until_ready()
        runs += 1
    rate = 2 * n**3 * runs / (time.perf_counter() - start)
    return f"{rate / 1e9:,.0f} GFLOP/s on one device ({n} x {n}, {x.dtype})"


def moe_layer(mesh: Mesh) -> str:
    """One small MoE layer on the whole mesh, forward and backward."""
    devices = mesh.shape[AXIS]
    x_BLD = jax.random.normal(jax.random.key(0), (devices, 16, 32))
    with jax.set_mesh(mesh):
        gate = moejax.gating.make("mixtral")
        layer = moejax.MoE(32, 64, 2 * devices, gate=gate, rngs=nnx.Rngs(0))
        graph, params, rest = nnx.split(layer, nnx.Param, ...)

        def loss(params: PyTree) -> jax.Array:
            y_BLD, _ = nnx.merge(graph, params, rest)(x_BLD)
            return jnp.mean(jnp.square(y_BLD))

        step = jax.jit(jax.value_and_grad(loss))
        start = time.perf_counter()
        value, grads = jax.block_until_ready(step(params))
        compiled = time.perf_counter()
        jax.block_until_ready(step(params))
        milliseconds = (time.perf_counter() - compiled) * 1e3
    finite = all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((value, grads)))
    timing = f"compiled in {compiled - start:.1f} s, forward and backward {milliseconds:.1f} ms"
    return f"ok, {timing}" if finite else f"NOT FINITE, {timing}"
