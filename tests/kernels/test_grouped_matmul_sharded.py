"""grouped_matmul inside shard_map: experts sharded, weights replicated over the data axis."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moejax.kernels import grouped_matmul, kernels_pass_check_vma

NUM_EXPERTS, WIDTH, OUT_WIDTH, ROWS = 8, 6, 5, 40
# float32 sums of a few hundred products.
assert_close = partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-5)


def problem(num_devices, num_expert_shards):
    """Per device 40 rows, the last three of no group, and its own sizes of its local experts."""
    rng = np.random.default_rng(num_devices)
    local = NUM_EXPERTS // num_expert_shards
    sizes = np.stack(
        [rng.multinomial(ROWS - 3, np.ones(local) / local) for _ in range(num_devices)]
    )
    sizes[0, 0], sizes[0, -1] = sizes[0].sum(), 0
    sizes[0, 1:-1] = 0
    x = rng.normal(size=(num_devices, ROWS, WIDTH)).astype(np.float32)
    dy = rng.normal(size=(num_devices, ROWS, OUT_WIDTH)).astype(np.float32)
    w = rng.normal(size=(NUM_EXPERTS, WIDTH, OUT_WIDTH)).astype(np.float32)
    return x, w, sizes, dy


def oracle(x, w, sizes, dy, num_expert_shards):
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    for device, (x_d, dy_d, sizes_d) in enumerate(zip(x, dy, sizes, strict=True)):
        start = 0
        for i, size in enumerate(sizes_d):
            expert = device % num_expert_shards * len(sizes_d) + i
            rows = slice(start, start + size)
            y[device, rows] = x_d[rows] @ w[expert]
            dx[device, rows] = dy_d[rows] @ w[expert].T
            dw[expert] += x_d[rows].T @ dy_d[rows]
            start += size
    return y, dx, dw


@pytest.mark.quick(2)
@pytest.mark.parametrize("data,expert", [(1, 2), (2, 4), (8, 1), (1, 8)])
def test_value_and_gradients_are_correct_under_check_vma(eight_devices, data, expert):
    mesh = jax.make_mesh(
        (data, expert),
        ("data", "expert"),
        axis_types=(AxisType.Auto,) * 2,
        devices=eight_devices[: data * expert],
    )
    x, w, sizes, dy = problem(data * expert, expert)
    assert (sizes > 0).any() and (sizes == 0).any()

    def local(x, w, sizes):
        y = grouped_matmul(x, w, sizes)
        return jnp.where((jnp.arange(ROWS) < sizes.sum())[:, None], y, 0)

    tokens = P(("data", "expert"))
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(tokens, P("expert"), tokens), out_specs=tokens, check_vma=True
    )

    @jax.jit
    def run(x, w, sizes, dy):
        y, vjp = jax.vjp(lambda x, w: sharded(x, w, sizes), x, w)
        return y, *vjp(dy)

    flat = (x.reshape(-1, WIDTH), w, sizes.reshape(-1).astype(np.int32), dy.reshape(-1, OUT_WIDTH))
    y, dx, dw = run(*(jnp.array(a) for a in flat))
    expected_y, expected_dx, expected_dw = oracle(x, w, sizes, dy, expert)
    owned = np.arange(ROWS) < ROWS - 3
    assert_close(y.reshape(dy.shape), expected_y)
    assert_close(dx.reshape(x.shape)[:, owned], expected_dx[:, owned])
    assert_close(dw, expected_dw)


def test_kernels_are_refused_under_check_vma_exactly_as_predicted(eight_devices):
    """The TPU kernels are refused exactly where `kernels_pass_check_vma` says so."""
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,), devices=eight_devices[:2])

    def trace(platform, check_vma):
        program = jax.shard_map(
            lambda x, w, sizes: grouped_matmul(x, w, sizes, platform=platform),
            mesh=mesh,
            in_specs=P("expert"),
            out_specs=P("expert"),
            check_vma=check_vma,
        )
        shapes = ((256, 128), jnp.float32), ((4, 128, 128), jnp.float32), ((4,), jnp.int32)
        jax.eval_shape(program, *(jax.ShapeDtypeStruct(*shape) for shape in shapes))

    assert kernels_pass_check_vma("cpu")
    trace("cpu", check_vma=True)
    assert not kernels_pass_check_vma("tpu")
    trace("tpu", check_vma=False)
    with pytest.raises(ValueError, match="check_vma"):
        trace("tpu", check_vma=True)
