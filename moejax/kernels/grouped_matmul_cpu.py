"""Grouped matmul for CPU: a loop over the groups, and in each over tiles of its rows.

XLA:CPU has no grouped matmul: it expands `jax.lax.ragged_dot` to one masked copy of the rows per
group, G times the work. Here the work follows the rows. Reasons for the form of the loops
(measured on XLA:CPU of jax 0.10):

* Matmuls of fewer than about 256 rows are slower per row (a tile of 32 rows takes almost twice its
  share), and with many experts a group is no larger than that. So a group is one matmul of nearly
  its own size: tiles come in several heights, each a compiled matmul, and a group takes the least
  that holds it, or several of the greatest and a rest.
* A tile may reach past the end of its group: groups are visited in order, so the next one
  overwrites the surplus rows. Only the last rows of the buffer need a masked tile.
* A height is picked by loops of one or no turn, because `lax.cond` and `lax.switch` copy the
  output buffer that passes through them on every tile.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from moejax.kernels.support import vary_over, varying_axes

_HEIGHT_MULTIPLE = 16
_HEIGHTS_OVER_MEAN = (1 / 4, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1, 9 / 8, 5 / 4, 3 / 2, 2)
_FEW_ROWS = 2048
_HEIGHTS_OVER_MEAN_OF_FEW_ROWS = (1 / 2, 1, 2)
_LARGE_GROUP = 512
_LARGE_GROUP_HEIGHTS = (128, 256, 384, 512)
EDGE_HEIGHT = 128


def tile_heights(num_rows: int, num_groups: int) -> tuple[int, ...]:
    """Ascending static heights of tiles, for groups of num_rows / num_groups rows in the mean.

    They are closest where balanced groups are, so that a tile holds few surplus rows (a sixteenth
    in the mean), and few in number, because each is compiled: three where the rows are so few that
    compiling takes longer than running. Groups above the greatest height take several tiles.
    """
    if num_rows <= _HEIGHT_MULTIPLE:
        return (num_rows,)
    mean = num_rows / num_groups
    if mean > _LARGE_GROUP:
        return _LARGE_GROUP_HEIGHTS
    few = num_rows < _FEW_ROWS
    ratios = _HEIGHTS_OVER_MEAN_OF_FEW_ROWS if few else _HEIGHTS_OVER_MEAN
    wanted = {-(-int(mean * ratio) // _HEIGHT_MULTIPLE) * _HEIGHT_MULTIPLE for ratio in ratios}
    return tuple(sorted(h for h in wanted if 0 < h <= num_rows)) or (_HEIGHT_MULTIPLE,)


def forward(x_ND: jax.Array, w_GDF: jax.Array, group_sizes_G: jax.Array) -> jax.Array:
    """y[n] = x[n] @ w[group of n]."""
    return _rows_times_matrix(x_ND, w_GDF, group_sizes_G, contract_w=0)


def dx(dy_NF: jax.Array, w_GDF: jax.Array, group_sizes_G: jax.Array) -> jax.Array:
    """dx[n] = dy[n] @ w[group of n].T"""
    return _rows_times_matrix(dy_NF, w_GDF, group_sizes_G, contract_w=1)


def _rows_times_matrix(rows, w_GDF, group_sizes_G, *, contract_w: int) -> jax.Array:
    num_rows = rows.shape[0]
    heights = tile_heights(num_rows, w_GDF.shape[0])
    edge = min(EDGE_HEIGHT, heights[-1])
    end_G = jnp.cumsum(group_sizes_G)
    out = jnp.zeros((num_rows, w_GDF.shape[2 - contract_w]), rows.dtype)
    out = vary_over(out, varying_axes(rows, w_GDF, group_sizes_G))

    def visit_group(out, group):
        start, end, w = group

        def visit_tile(carry):
            row, out = carry
            # Masked tiles take over where the greatest tile would leave the buffer.
            at_edge = row > num_rows - heights[-1]
            write = partial(_write_masked_tile, rows, w, contract_w, edge, row, end)
            out = run_if(at_edge, write, out)
            wanted = least_height(heights, end - row)
            for i, height in enumerate(heights):
                write = partial(_write_tile, rows, w, contract_w, height, row)
                out = run_if((wanted == i) & ~at_edge, write, out)
            return row + jnp.where(at_edge, edge, heights[-1]), out

        return lax.while_loop(lambda carry: carry[0] < end, visit_tile, (start, out))[1], None

    return lax.scan(visit_group, out, (end_G - group_sizes_G, end_G, w_GDF))[0]


def least_height(heights: tuple[int, ...], num_rows):
    """The index of the least height that holds `num_rows`, or of the greatest."""
    return sum((num_rows > height).astype(jnp.int32) for height in heights[:-1])


def run_if(condition, update, buffer):
    """update(buffer) or buffer, in place."""
    return lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (carry[0] & False, update(carry[1])),
        (condition, buffer),
    )[1]


def _write_tile(rows, w, contract_w, height, row, out):
    tile = lax.dynamic_slice_in_dim(rows, row, height)
    return lax.dynamic_update_slice_in_dim(out, dot(tile, w, 1, contract_w, rows.dtype), row, 0)


def _write_masked_tile(rows, w, contract_w, height, row, end, out):
    """Writes only the rows of [row, row + height) before `end`, in a tile moved up to fit."""
    top = jnp.minimum(row, rows.shape[0] - height)
    tile = lax.dynamic_slice_in_dim(rows, top, height)
    product = dot(tile, w, 1, contract_w, rows.dtype)
    keep = in_range(top, height, row, end)[:, None]
    product = jnp.where(keep, product, lax.dynamic_slice_in_dim(out, top, height))
    return lax.dynamic_update_slice_in_dim(out, product, top, 0)


def dw(x_ND: jax.Array, dy_NF: jax.Array, group_sizes_G: jax.Array) -> jax.Array:
    """dw[g] = sum over the rows n of group g of outer(x[n], dy[n]), in the dtype of x."""
    num_rows = x_ND.shape[0]
    heights = tile_heights(num_rows, group_sizes_G.shape[0])
    end_G = jnp.cumsum(group_sizes_G)

    def tile_product(row, end):
        def product(height):
            # Both operands are masked: a row of another group may hold NaN in either.
            top = jnp.minimum(row, num_rows - height)
            keep = in_range(top, height, row, end)[:, None]
            x = jnp.where(keep, lax.dynamic_slice_in_dim(x_ND, top, height), 0)
            dy = jnp.where(keep, lax.dynamic_slice_in_dim(dy_NF, top, height), 0)
            # The mask copies the tile anyway. Copied transposed, and the transpose kept out of the
            # matmul, it is a product that XLA:CPU gives to its faster kernel.
            x = lax.optimization_barrier(x.T)
            return dot(x, dy, 1, 0, jnp.float32)

        branches = [partial(product, height) for height in heights]
        return lax.switch(least_height(heights, end - row), branches)

    def visit_group(_, group):
        start, end = group
        first = (start + heights[-1], tile_product(start, end))
        _, total = lax.while_loop(
            lambda carry: carry[0] < end,
            lambda carry: (carry[0] + heights[-1], carry[1] + tile_product(carry[0], end)),
            first,
        )
        return None, total.astype(x_ND.dtype)

    return lax.scan(visit_group, None, (end_G - group_sizes_G, end_G))[1]


def in_range(top, height, start, end):
    """A mask of the rows top, top + 1, ... that lie in [start, end)."""
    row = top + jnp.arange(height)
    return (row >= start) & (row < end)


def dot(a, b, contract_a: int, contract_b: int, dtype) -> jax.Array:
    """A matmul over one axis of each, accumulated in float32."""
    dimensions = (((contract_a,), (contract_b,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32).astype(dtype)
