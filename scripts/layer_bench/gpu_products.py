"""Grouped products that a GPU can run, each against one dense product of as many FLOPs.

The product is the one into the hidden layer: T k rows of width D, each by the [D, F] matrix of its
expert, everything in bfloat16. Every candidate is a function of (x_ND, w_EDF, sizes_E).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from moejax import gating
from moejax.kernels import grouped_matmul_gpu
from moejax.kernels.support import MissingKernelError
from scripts.layer_bench import timing
from scripts.layer_bench.problems import Shape

KIND, DENSE = "gpu-product", "dense"

LIMIT = 2.0**-8
"""Largest error allowed against float64, relative to the largest entry of each array. bfloat16 has
8 bits, so that rounding a result moves it by at most 2^-9 of itself; sums are meant to be in
float32, which adds next to nothing. A sum kept in bfloat16, or one row at the wrong expert, is
above."""

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Candidate(NamedTuple):
    """A grouped product. ``cells``: its rows lie in cells of that many times the mean load."""

    product: Product
    cells: float | None = None


def of_tokamax(implementation: str) -> Product:
    """A kernel of tokamax with its gradients, as `moejax.kernels.grouped_matmul` calls it."""
    options = {"implementation": implementation}

    @jax.custom_vjp
    def product(x_ND, w_EDF, sizes_E):
        return grouped_matmul_gpu.forward(x_ND, w_EDF, sizes_E, **options)

    def forward(x_ND, w_EDF, sizes_E):
        return product(x_ND, w_EDF, sizes_E), (x_ND, w_EDF, sizes_E)

    def backward(residuals, dy_NF):
        x_ND, w_EDF, sizes_E = residuals
        dx_ND = grouped_matmul_gpu.dx(dy_NF, w_EDF, sizes_E, **options)
        dw_EDF = grouped_matmul_gpu.dw(x_ND, dy_NF, sizes_E, **options)
        return dx_ND, dw_EDF, np.zeros(sizes_E.shape, jax.dtypes.float0)

    product.defvjp(forward, backward)
    return product


def over_cells(x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """One batched product; every group has as many rows. Written as `moejax.experts` has it."""
    del sizes_E
    x_SECD = x_ND.reshape(1, w_EDF.shape[0], -1, x_ND.shape[1])
    return jnp.einsum("secd,edf->secf", x_SECD, w_EDF).reshape(x_ND.shape[0], -1)


CANDIDATES: dict[str, Candidate] = {
    "tokamax-triton": Candidate(of_tokamax("triton")),
    "tokamax-mosaic_gpu": Candidate(of_tokamax("mosaic_gpu")),
    "lax.ragged_dot": Candidate(jax.lax.ragged_dot),
    "cells-1.25": Candidate(over_cells, 1.25),
    "cells-1.0": Candidate(over_cells, 1.0),
}


def without_tokamax() -> str | None:
    """The reason that tokamax's kernels cannot be measured, or None."""
    try:
        import tokamax  # noqa: F401  # only whether it is there
    except ImportError as error:
        if error.name == "tokamax":
            return "tokamax is not installed"
        return f"tokamax cannot be imported: {error}"
    return None


class Operands(NamedTuple):
    """A grouped product's inputs and its output's gradient, in bfloat16."""

    x_ND: jax.Array
    w_EDF: jax.Array
    sizes_E: np.ndarray
    dy_NF: jax.Array


def operands(shape: Shape, cells: float | None) -> Operands:
    """Loads of a router with random logits, or cells of equal size."""
    if cells is None:
        logits_TE = jax.random.normal(jax.random.key(0), (shape.T, shape.E))
        expert_TK = jax.lax.top_k(logits_TE, shape.k)[1]
        sizes_E = np.bincount(np.ravel(expert_TK), minlength=shape.E)
    else:
        slots = gating.make("mixtral", k=shape.k).capacity(shape.T, shape.E, cells)
        sizes_E = np.full(shape.E, slots)
    num_rows = int(sizes_E.sum())
    x_key, w_key, dy_key = jax.random.split(jax.random.key(1), 3)

    def normal(key: jax.Array, *dims: int) -> jax.Array:
        return jax.random.normal(key, dims, jnp.bfloat16)

    w_EDF = (normal(w_key, shape.E, shape.D, shape.F) / shape.D**0.5).astype(jnp.bfloat16)
    dy_NF = normal(dy_key, num_rows, shape.F)
    return Operands(normal(x_key, num_rows, shape.D), w_EDF, sizes_E, dy_NF)


def with_gradients(product: Product) -> Callable:
    """(dy_NF, x_ND, w_EDF, sizes_E) -> output, gradients of rows and matrices."""

    def both(dy_NF, x_ND, w_EDF, sizes_E):
        y_NF, vjp = jax.vjp(lambda x_ND, w_EDF: product(x_ND, w_EDF, sizes_E), x_ND, w_EDF)
        return y_NF, *vjp(dy_NF)

    return both


def largest_error(got: tuple, given: Operands) -> float:
    """Errors of output and gradients against numpy's products in float64, group by group.

    Differences are relative to the largest entry of an array. A group's answers are dropped before
    the next one's are computed: in float64 all of them would fill the memory of most machines.
    """
    y_NF, dx_ND, dw_EDF = (np.asarray(array) for array in got)
    x_ND, w_EDF, dy_NF = (np.asarray(a) for a in (given.x_ND, given.w_EDF, given.dy_NF))
    worst, largest = np.zeros(3), np.zeros(3)
    end = 0
    for expert, size in enumerate(given.sizes_E):
        own, end = slice(end, end + size), end + size
        x, w, dy = (a.astype(np.float64) for a in (x_ND[own], w_EDF[expert], dy_NF[own]))
        wanted = (x @ w, dy @ w.T, x.T @ dy)
        for i, (a, b) in enumerate(
            zip((y_NF[own], dx_ND[own], dw_EDF[expert]), wanted, strict=True)
        ):
            difference = np.abs(a.astype(np.float64) - b).max(initial=0.0)
            worst[i] = np.maximum(worst[i], difference)  # NaN stays
            largest[i] = np.maximum(largest[i], np.abs(b).max(initial=0.0))
    return float((worst / largest).max())


class Compiled:
    """A candidate's two programs on its operands, checked."""

    def __init__(self, candidate: Candidate, given: Operands):
        args = (given.x_ND, given.w_EDF, jnp.asarray(given.sizes_E, jnp.int32))
        forward = jax.jit(candidate.product).lower(*args).compile()
        both = jax.jit(with_gradients(candidate.product)).lower(given.dy_NF, *args).compile()
        self.run_forward: timing.Run = lambda: forward(*args)
        self.run_both: timing.Run = lambda: both(given.dy_NF, *args)
        self.error = largest_error(both(given.dy_NF, *args), given)


def dense_runs(shape: Shape) -> tuple[timing.Run, timing.Run]:
    """One [T k, D] by [D, F] product, forward, and forward and backward."""
    one = shape._replace(E=1, T=shape.T * shape.k, k=1)
    given = operands(one, 1.0)
    args = (given.x_ND, given.w_EDF[0])
    forward = jax.jit(jnp.matmul).lower(*args).compile()

    def gradients(dy_NF, x_ND, w_DF):
        y_NF, vjp = jax.vjp(jnp.matmul, x_ND, w_DF)
        return y_NF, *vjp(dy_NF)

    both = jax.jit(gradients).lower(given.dy_NF, *args).compile()
    return lambda: forward(*args), lambda: both(given.dy_NF, *args)


def rows(shape: Shape, rounds: int) -> Iterator[dict]:
    """Checks, then times; what cannot run or is wrong is a row that says why."""
    why = without_tokamax()
    given: dict[float | None, Operands] = {}
    compiled: dict[str, Compiled] = {}
    for name, candidate in CANDIDATES.items():
        if why is not None and name.startswith("tokamax"):
            yield not_measured(shape, KIND, name, why)
            continue
        if candidate.cells not in given:
            given[candidate.cells] = operands(shape, candidate.cells)
        made = attempt(
            shape, KIND, name, LIMIT, partial(Compiled, candidate, given[candidate.cells])
        )
        if isinstance(made, dict):
            yield made
        else:
            compiled[name] = made
    forward, both = dense_runs(shape)
    runs = {DENSE: forward, **{name: c.run_forward for name, c in compiled.items()}}
    forward_found, _ = timing.paired(forward, runs, rounds)
    runs = {DENSE: both, **{name: c.run_both for name, c in compiled.items()}}
    both_found, _ = timing.paired(both, runs, rounds)
    for name in both_found:
        row = {**head(shape, KIND, name), **fields("fwd", forward_found[name])}
        row.update(fields("fwdbwd", both_found[name]))
        if name in compiled:
            cells = CANDIDATES[name].cells
            row.update(max_error=compiled[name].error, limit=LIMIT, drops=cells is not None)
        flops = 6 * shape.T * shape.k * shape.D * shape.F
        yield {**row, "tflops": flops / both_found[name].ms / 1e9}


class Checked(Protocol):
    """Anything that knows its largest error."""

    error: float


Made = TypeVar("Made", bound=Checked)


def attempt(
    shape: Shape, kind: str, name: str, limit: float, make: Callable[[], Made]
) -> Made | dict:
    """The result of ``make``, or a row with the reason that there is nothing to time."""
    try:
        made = make()
    except MissingKernelError as error:
        return not_measured(shape, kind, name, str(error))
    except Exception as error:  # a kernel may fail to compile, or to fit, in any way it likes
        lines = str(error).strip().splitlines() or [""]
        return not_measured(shape, kind, name, f"{type(error).__name__}: {lines[0]}")
    if not made.error <= limit:
        why = f"wrong: off by {made.error:.1e} of the largest entry, at most {limit:.1e} is allowed"
        return {**not_measured(shape, kind, name, why), "wrong": True}
    return made


def head(shape: Shape, kind: str, name: str) -> dict:
    return {"kind": kind, "shape": shape.name, "impl": name}


def not_measured(shape: Shape, kind: str, name: str, why: str) -> dict:
    return {**head(shape, kind, name), "not_run": why}


def fields(field: str, t: timing.Timing) -> dict:
    """A timing as fields of a row."""
    return {f"{field}_ratio": t.ratio, f"{field}_spread": [t.low, t.high], f"{field}_ms": t.ms}
