"""Grouped matmul for TPU: the megablox Pallas kernels that come with JAX.

`jax.lax.ragged_dot` is not used: compiled for v5e it is charged for every (row, group) pair.
The kernels want whole row tiles, so the rows are padded to a multiple of the tile; rows of no group
are skipped (forward, dx) or masked (dw).
"""

import jax
import jax.numpy as jnp

_LANES = 128
_MAX_ROW_TILE = 512
_MAX_TILE = 1024


def forward(x_ND, w_GDF, group_sizes_G, *, interpret: bool = False) -> jax.Array:
    """y[n] = x[n] @ w[group of n]. `interpret` runs the kernel on CPU, slowly, for tests."""
    return _rows_times_matrix(x_ND, w_GDF, group_sizes_G, False, interpret)


def dx(dy_NF, w_GDF, group_sizes_G, *, interpret: bool = False) -> jax.Array:
    """dx[n] = dy[n] @ w[group of n].T"""
    return _rows_times_matrix(dy_NF, w_GDF, group_sizes_G, True, interpret)


def dw(x_ND, dy_NF, group_sizes_G, *, interpret: bool = False) -> jax.Array:
    """dw[g] = sum over the rows n of group g of outer(x[n], dy[n]), in the dtype of x."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tiling = choose_tiling(
        x_ND.shape[0], x_ND.shape[1], dy_NF.shape[1], group_sizes_G.shape[0], x_ND.dtype
    )
    x_ND, dy_NF = (_pad_rows(a, tiling[0]) for a in (x_ND, dy_NF))
    return tgmm(x_ND.T, dy_NF, group_sizes_G, x_ND.dtype, tiling=tiling, interpret=interpret)


def _rows_times_matrix(rows, w_GDF, group_sizes_G, transpose_w: bool, interpret: bool):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    num_rows, width = rows.shape
    out_width = w_GDF.shape[1 if transpose_w else 2]
    tiling = choose_tiling(num_rows, width, out_width, w_GDF.shape[0], rows.dtype)
    out = gmm(
        _pad_rows(rows, tiling[0]),
        w_GDF,
        group_sizes_G,
        rows.dtype,
        tiling=tiling,
        transpose_rhs=transpose_w,
        interpret=interpret,
    )
    return out[:num_rows]


def choose_tiling(
    num_rows: int, width: int, out_width: int, num_groups: int, dtype
) -> tuple[int, int, int]:
    """Tile sizes (rows, width, out_width) whose double-buffered blocks fit 16 MiB of VMEM.

    A row tile that straddles groups is computed once per group in it, so it should not be much
    higher than a group.
    """
    mean = max(num_rows // num_groups, 1)
    row_tile = _LANES
    while row_tile < _MAX_ROW_TILE and row_tile * 2 <= mean:
        row_tile *= 2
    width_limit = _MAX_TILE * 2 // jnp.dtype(dtype).itemsize
    return (row_tile, _tile(width, width_limit), _tile(out_width, _MAX_TILE))


def _tile(size: int, limit: int) -> int:
    return min(-(-size // _LANES) * _LANES, limit)


def _pad_rows(rows: jax.Array, tile: int) -> jax.Array:
    missing = -rows.shape[0] % tile
    return jnp.pad(rows, ((0, missing), (0, 0))) if missing else rows
