"""Grouped FFN for CPU: expert by expert, and in each tile by tile, all products of a tile at once.

Only the part of the hidden layer that the backward pass needs leaves the cache; without a backward
pass, none. `grouped_matmul_cpu` gives reasons for the form of the loops; the backward pass adds:

* A matrix's gradient sums over the rows of a tile, and XLA:CPU is faster at such a product where
  its left operand has been copied transposed. The input's copy serves all matrices into the hidden
  layer. For the matrix out of it the gradient is computed transposed, because the rows of `dy_ND`
  are narrower than the hidden layer, and turned once per group.
"""

import functools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from moejax.kernels.grouped_matmul_cpu import (
    EDGE_HEIGHT,
    dot,
    in_range,
    least_height,
    run_if,
    tile_heights,
)
from moejax.kernels.support import vary_over, varying_axes

Weights = tuple[jax.Array, ...]
"""Input matrices [G, D, F], one or two, then the output matrix [G, F, O]."""


def forward(x_ND, weights: Weights, group_sizes_G, *, activate: Callable, save: bool):
    """y_NO and, if `save`, the arguments of the activation: one [N, F] per matrix into it."""
    num_rows = x_ND.shape[0]
    heights = tile_heights(num_rows, weights[0].shape[0])
    edge = min(EDGE_HEIGHT, heights[-1])
    end_G = jnp.cumsum(group_sizes_G)
    hidden = [w.shape[2] for w in weights[:-1]] if save else []
    axes = varying_axes(x_ND, *weights, group_sizes_G)
    buffers = tuple(
        vary_over(jnp.zeros((num_rows, width), x_ND.dtype), axes)
        for width in (weights[-1].shape[2], *hidden)
    )

    def products(w, top, height):
        x = lax.dynamic_slice_in_dim(x_ND, top, height)
        before = [dot(x, w_in, 1, 0, x.dtype) for w_in in w[:-1]]
        y = dot(activate(*before), w[-1], 1, 0, x.dtype)
        return (y, *before) if save else (y,)

    def visit_group(buffers, group):
        start, end, w = group

        def write_tile(height, row, buffers):
            return _write(buffers, products(w, row, height), row)

        def write_masked_tile(row, buffers):
            top = jnp.minimum(row, num_rows - edge)
            keep = in_range(top, edge, row, end)[:, None]
            old = [lax.dynamic_slice_in_dim(b, top, edge) for b in buffers]
            new = products(w, top, edge)
            new = [jnp.where(keep, n, o) for n, o in zip(new, old, strict=True)]
            return _write(buffers, new, top)

        def visit_tile(carry):
            row, buffers = carry
            # Masked tiles take over where the greatest tile would leave the buffer.
            at_edge = row > num_rows - heights[-1]
            buffers = run_if(at_edge, partial(write_masked_tile, row), buffers)
            wanted = least_height(heights, end - row)
            for i, height in enumerate(heights):
                here = (wanted == i) & ~at_edge
                buffers = run_if(here, partial(write_tile, height, row), buffers)
            return row + jnp.where(at_edge, edge, heights[-1]), buffers

        return lax.while_loop(lambda carry: carry[0] < end, visit_tile, (start, buffers))[1], None

    y_ND, *before = lax.scan(visit_group, buffers, (end_G - group_sizes_G, end_G, weights))[0]
    return y_ND, tuple(before)


def backward(x_ND, dy_ND, before, weights: Weights, group_sizes_G, *, activate: Callable):
    """dx_ND and the gradient of each matrix."""
    num_rows = x_ND.shape[0]
    heights = tile_heights(num_rows, weights[0].shape[0])
    end_G = jnp.cumsum(group_sizes_G)
    axes = varying_axes(x_ND, dy_ND, *before, *weights, group_sizes_G)

    def visit_group(dx_ND, group):
        start, end, w = group

        def add_tile(height, row, carry):
            dx_ND, sums = carry
            top = jnp.minimum(row, num_rows - height)
            keep = in_range(top, height, row, end)[:, None]

            def rows_of(array):
                # Every operand is masked: a row of no group may hold NaN in each.
                return jnp.where(keep, lax.dynamic_slice_in_dim(array, top, height), 0)

            x, dy = rows_of(x_ND), rows_of(dy_ND)
            hidden, activation_vjp = jax.vjp(activate, *map(rows_of, before))
            d_before = activation_vjp(dot(dy, w[-1], 1, 1, x.dtype))
            parts = (dot(d, m, 1, 1, jnp.float32) for d, m in zip(d_before, w[:-1], strict=True))
            dx = functools.reduce(jnp.add, parts).astype(x.dtype)
            dx = jnp.where(keep, dx, lax.dynamic_slice_in_dim(dx_ND, top, height))
            dx_ND = lax.dynamic_update_slice_in_dim(dx_ND, dx, top, 0)
            x_T = lax.optimization_barrier(x.T)
            new = [dot(x_T, d, 1, 0, jnp.float32) for d in d_before]
            new.append(dot(lax.optimization_barrier(dy.T), hidden, 1, 0, jnp.float32))
            return dx_ND, tuple(s + n for s, n in zip(sums, new, strict=True))

        def visit_tile(carry):
            row, rest = carry
            wanted = least_height(heights, end - row)
            for i, height in enumerate(heights):
                rest = run_if(wanted == i, partial(add_tile, height, row), rest)
            return row + heights[-1], rest

        shapes = [*(m.shape for m in w[:-1]), w[-1].shape[::-1]]
        zeros = tuple(vary_over(jnp.zeros(shape, jnp.float32), axes) for shape in shapes)
        carry = (start, (dx_ND, zeros))
        _, (dx_ND, sums) = lax.while_loop(lambda carry: carry[0] < end, visit_tile, carry)
        sums = (*sums[:-1], sums[-1].T)
        return dx_ND, tuple(s.astype(m.dtype) for s, m in zip(sums, w, strict=True))

    dx_ND = vary_over(jnp.zeros(x_ND.shape, x_ND.dtype), axes)
    return lax.scan(visit_group, dx_ND, (end_G - group_sizes_G, end_G, weights))


def _write(buffers, tiles, row):
    return tuple(
        lax.dynamic_update_slice_in_dim(buffer, tile, row, 0)
        for buffer, tile in zip(buffers, tiles, strict=True)
    )
