"""grouped_matmul on CPU: values and gradients against NumPy and `jax.lax.ragged_dot`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.kernels import grouped_matmul
from moejax.kernels.grouped_matmul import _check_operands as check_operands
from moejax.kernels.grouped_matmul_cpu import tile_heights

# float32 sums of at most 1500 products of standard normals, in an order NumPy does not share.
assert_close = partial(np.testing.assert_allclose, atol=3e-4, rtol=1e-5)


def operands(num_rows, width, out_width, sizes, dtype=jnp.float32, unowned=np.nan):
    """x, w, sizes and a cotangent; rows of no group hold `unowned`."""
    rng = np.random.default_rng(num_rows + width)
    x = rng.normal(size=(num_rows, width))
    w = rng.normal(size=(len(sizes), width, out_width))
    dy = rng.normal(size=(num_rows, out_width))
    x[sum(sizes) :] = dy[sum(sizes) :] = unowned
    return (
        jnp.array(x, dtype),
        jnp.array(w, dtype),
        jnp.array(sizes, jnp.int32),
        jnp.array(dy, dtype),
    )


def numpy_oracle(x, w, sizes, dy):
    """y and dx of the rows that belong to a group, and dw, by one float64 product per group."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    ends = np.cumsum(sizes)
    y, dx, dw = [], [], np.zeros(w.shape)
    for g, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        y.append(x[start:end] @ w[g])
        dx.append(dy[start:end] @ w[g].T)
        dw[g] = x[start:end].T @ dy[start:end]
    return np.concatenate(y), np.concatenate(dx), dw


@jax.jit
def value_and_gradients(x, w, sizes, dy):
    y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
    return y, *vjp(dy)


# The first cases share a shape, and so one compiled program.
CASES = {
    "odd widths, no size a multiple of a tile": (203, 5, 3, [33, 35, 1, 100, 3, 31]),
    "even groups": (203, 5, 3, [32, 32, 32, 32, 32, 32]),
    "empty groups first, last and between": (203, 5, 3, [0, 60, 0, 0, 143, 0]),
    "all rows in one group": (203, 5, 3, [0, 0, 203, 0, 0, 0]),
    "rows of no group": (203, 5, 3, [30, 0, 50, 0, 0, 1]),
    "only rows of no group": (203, 5, 3, [0] * 6),
    "one group": (37, 4, 2, [37]),
    "one row": (1, 3, 2, [0, 1, 0]),
    "large groups of several tiles to the end of the buffer": (1500, 2, 2, [700, 1, 799]),
    "the fine heights of many rows": (2100, 2, 2, [300, 150, 262, 280, 0, 240, 600, 200]),
    "more groups than rows": (20, 3, 2, [0] * 30 + [11] + [0] * 8 + [9]),
}


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_equal_one_product_per_group(case):
    num_rows, width, out_width, sizes = CASES[case]
    x, w, sizes_G, dy = operands(num_rows, width, out_width, sizes)
    y, dx, dw = value_and_gradients(x, w, sizes_G, dy)
    expected_y, expected_dx, expected_dw = numpy_oracle(x, w, sizes, dy)
    owned = sum(sizes)
    assert_close(y[:owned], expected_y)
    assert_close(dx[:owned], expected_dx)
    assert_close(dw, expected_dw)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 203), min_size=6, max_size=6))
def test_any_partition_of_the_rows_is_computed_correctly(cuts):
    """Splits of 203 rows into 6 groups and a rest, through one compiled program."""
    sizes = np.diff([0, *sorted(cuts)]).tolist()
    x, w, sizes_G, dy = operands(203, 5, 3, sizes)
    y, dx, dw = value_and_gradients(x, w, sizes_G, dy)
    expected_y, expected_dx, expected_dw = numpy_oracle(x, w, sizes, dy)
    assert_close(y[: sum(sizes)], expected_y)
    assert_close(dx[: sum(sizes)], expected_dx)
    assert_close(dw, expected_dw)


def test_value_and_gradients_equal_those_of_ragged_dot():
    x, w, sizes, dy = operands(203, 5, 3, [31, 0, 60, 5, 0, 107])
    _, ragged_vjp = jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, sizes), x, w)
    y, dx, dw = value_and_gradients(x, w, sizes, dy)
    ragged_dx, ragged_dw = ragged_vjp(dy)
    assert_close(y, jax.lax.ragged_dot(x, w, sizes))
    assert_close(dx, ragged_dx)
    assert_close(dw, ragged_dw)


def test_no_rows_give_an_empty_output_and_zero_weight_gradients():
    x, w, sizes, dy = operands(0, 4, 3, [0, 0])
    y, dx, dw = value_and_gradients(x, w, sizes, dy)
    assert y.shape == (0, 3) and dx.shape == (0, 4)
    np.testing.assert_array_equal(dw, np.zeros((2, 4, 3)))


def test_bfloat16_is_accumulated_in_float32_and_rounded_once():
    sizes = [300, 0, 212]
    x, w, sizes_G, dy = operands(512, 48, 40, sizes, jnp.bfloat16)
    y, dx, dw = value_and_gradients(x, w, sizes_G, dy)
    assert y.dtype == dx.dtype == dw.dtype == jnp.bfloat16
    for got, expected in zip((y, dx, dw), numpy_oracle(x, w, sizes, dy), strict=True):
        # Half a unit in the last of 8 bits, and the float32 sums' own error near zero.
        np.testing.assert_allclose(
            np.asarray(got, np.float64), expected, rtol=2**-8 * 1.01, atol=1e-4
        )


def test_the_three_products_carry_the_names_that_flop_counters_look_for():
    x, w, sizes, dy = operands(32, 6, 5, [20, 12])

    def gradients(x, w):
        _, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
        return vjp(dy)

    jaxpr = jax.make_jaxpr(gradients)(x, w)
    shapes = {
        eqn.params["name"]: [v.aval.shape for v in eqn.invars]
        for eqn in jaxpr.jaxpr.eqns
        if str(eqn.params.get("name", "")).startswith("grouped_matmul")
    }
    assert shapes == {
        "grouped_matmul": [(32, 6), (2, 6, 5), (2,)],
        "grouped_matmul_dx": [(32, 5), (2, 6, 5), (2,)],
        "grouped_matmul_dw": [(32, 6), (32, 5), (2,)],
    }


def test_memory_does_not_grow_with_the_number_of_groups():
    """The output is written in place: temporaries hold tiles, no copy of the rows."""
    x, _, _, dy = operands(1024, 32, 64, [1024])

    def temporaries(num_groups):
        w = jnp.zeros((num_groups, 32, 64))
        sizes = jnp.zeros(num_groups, jnp.int32)
        compiled = value_and_gradients.lower(x, w, sizes, dy).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    rows = 1024 * 64 * 4
    assert temporaries(4) < rows
    assert temporaries(64) < rows


@pytest.mark.parametrize("num_rows,num_groups", [(16384, 64), (8192, 8), (4096, 64), (4096, 128)])
def test_tiles_hold_few_surplus_rows_when_groups_are_balanced(num_rows, num_groups):
    heights = tile_heights(num_rows, num_groups)
    sizes = np.random.default_rng(0).multinomial(num_rows, np.full(num_groups, 1 / num_groups))
    full, rest = np.divmod(sizes, heights[-1])
    tail = [min(h for h in (0, *heights) if h >= r) for r in rest]
    assert (full * heights[-1] + tail).sum() <= 1.25 * num_rows
    assert len(heights) <= 10


def test_operands_that_do_not_fit_are_refused():
    x, w, sizes, _ = operands(8, 4, 3, [5, 3])
    # Called directly because the type checks of the test run would be first.
    with pytest.raises(ValueError, match="D=4 but w has D=3"):
        check_operands(x, w.swapaxes(1, 2), sizes)
    with pytest.raises(ValueError, match=r"group_sizes \[G\]; got"):
        check_operands(x, w, sizes[:1])
    with pytest.raises(ValueError, match="both float32 or both bfloat16"):
        grouped_matmul(x, w.astype(jnp.bfloat16), sizes)
    with pytest.raises(ValueError, match="platform='cuda': expected one of cpu, tpu, gpu"):
        grouped_matmul(x, w, sizes, platform="cuda")
