"""grouped_ffn on CPU: values and gradients against NumPy in float64, one network per group."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.kernels import grouped_ffn
from moejax.kernels.grouped_ffn import _check_operands as check_operands
from moejax.train.cost.flops import count_flops

# float32 sums of at most 200 products of numbers around 1, three products deep.
assert_close = partial(np.testing.assert_allclose, atol=2e-4, rtol=2e-5)
ROWS, WIDTH, HIDDEN, GROUPS = 203, 5, 6, 6


def swiglu(gate, up):
    return jax.nn.silu(gate) * up


def operands(sizes, dtype=jnp.float32, unowned=np.nan):
    """x, the three matrices, sizes and a cotangent; rows of no group hold `unowned`."""
    rng = np.random.default_rng(len(sizes))
    x, dy = rng.normal(size=(2, ROWS, WIDTH))
    x[sum(sizes) :] = dy[sum(sizes) :] = unowned
    gate, up = rng.normal(size=(2, len(sizes), WIDTH, HIDDEN)) / 2
    down = rng.normal(size=(len(sizes), HIDDEN, WIDTH)) / 2
    x, gate, up, down, dy = (jnp.asarray(a, dtype) for a in (x, gate, up, down, dy))
    return x, gate, up, down, jnp.asarray(sizes, jnp.int32), dy


def numpy_oracle(x, gate, up, down, sizes, dy):
    """y, dx and the matrices' gradients by hand; rows of no group are left out."""
    x, gate, up, down, dy = (np.asarray(a, np.float64) for a in (x, gate, up, down, dy))
    ends = np.cumsum(sizes)
    y, dx, grads = [], [], [np.zeros(w.shape) for w in (gate, up, down)]
    for g, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        rows, d_rows = x[start:end], dy[start:end]
        a, b = rows @ gate[g], rows @ up[g]
        sigmoid = 1 / (1 + np.exp(-a))
        y.append((a * sigmoid * b) @ down[g])
        d_hidden = d_rows @ down[g].T
        da, db = d_hidden * b * sigmoid * (1 + a * (1 - sigmoid)), d_hidden * a * sigmoid
        dx.append(da @ gate[g].T + db @ up[g].T)
        grads[0][g], grads[1][g] = rows.T @ da, rows.T @ db
        grads[2][g] = (a * sigmoid * b).T @ d_rows
    return np.concatenate(y), np.concatenate(dx), *grads


@jax.jit
def value_and_gradients(x, gate, up, down, sizes, dy):
    def run(x, gate, up, down):
        return grouped_ffn(x, (gate, up), down, sizes, swiglu)

    y, vjp = jax.vjp(run, x, gate, up, down)
    return y, *vjp(dy)


def check(sizes):
    arguments = operands(sizes)
    y, dx, *grads = value_and_gradients(*arguments)
    wanted_y, wanted_dx, *wanted_grads = numpy_oracle(*arguments)
    owned = sum(sizes)
    assert_close(y[:owned], wanted_y)
    assert_close(dx[:owned], wanted_dx)
    for got, wanted in zip(grads, wanted_grads, strict=True):
        assert_close(got, wanted)


@pytest.mark.parametrize(
    "sizes",
    [
        [33, 35, 1, 100, 3, 31],
        [0, 60, 0, 0, 143, 0],
        [0, 0, 203, 0, 0, 0],
        [30, 0, 50, 0, 0, 1],
        [0, 0, 0, 0, 0, 0],
    ],
    ids=["odd sizes", "empty groups", "one group", "rows of no group hold NaN", "no owned row"],
)
def test_value_and_gradients_equal_one_network_per_group(sizes):
    check(sizes)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, ROWS), min_size=GROUPS, max_size=GROUPS))
def test_any_partition_of_the_rows_is_computed_correctly(cuts):
    check(np.diff([0, *sorted(cuts)]).tolist())


def test_without_a_gradient_the_hidden_layer_of_all_rows_is_never_in_memory():
    x, w_in, w_out = jnp.zeros((2048, 16)), jnp.zeros((8, 16, 256)), jnp.zeros((8, 256, 16))
    sizes = jnp.full(8, 256)

    def temporaries(step):
        analysis = jax.jit(step).lower(x, w_in, w_out).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    def run(x, w_in, w_out):
        return grouped_ffn(x, (w_in,), w_out, sizes, jax.nn.relu)

    def gradient(*args):
        return jax.grad(lambda *a: run(*a).sum(), (0, 1, 2))(*args)

    hidden = 2048 * 256 * 4
    assert temporaries(run) < hidden / 2
    assert hidden < temporaries(gradient) < 2 * hidden  # what the activation needs, kept once


def test_bfloat16_gradients_of_matrices_are_summed_in_float32():
    sizes = [33, 35, 1, 100, 3, 31]
    half = operands(sizes, jnp.bfloat16)
    got = value_and_gradients(*half)
    wanted = numpy_oracle(*half)
    assert all(g.dtype == jnp.bfloat16 for g in got)
    # The hidden layer is rounded to 8 bits and sums of up to 100 rows keep that relative error.
    for g, w in zip(got, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(g, np.float64), w, rtol=0.03, atol=0.15)


def test_flops_are_counted_by_formula_also_inside_a_differentiated_scan():
    x, gate, up, down, sizes, _ = operands([33, 35, 1, 100, 3, 31])
    once = 3 * 2 * ROWS * WIDTH * HIDDEN

    def loss(x, weights):
        def layer(x, w):
            return x + grouped_ffn(x, w[:2], w[2], sizes, swiglu), None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0])

    stacked = jax.tree.map(lambda w: jnp.stack([w] * 4), (gate, up, down))
    assert count_flops(jax.make_jaxpr(loss)(x, stacked)) == 4 * once
    assert count_flops(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, stacked)) == 4 * 3 * once


def test_operands_that_do_not_fit_are_refused():
    """Called directly: under pytest the annotations of grouped_ffn refuse most of them first."""
    x, gate, up, down, sizes, _ = operands([33, 35, 1, 100, 3, 31])
    for message, arguments in (
        (r"inputs \[G, D, F\]", (x, (gate, down), down, sizes)),
        (r"inputs \[G, D, F\]", (x, (), down, sizes)),
        ("do not fit", (x[:, :3], (gate, up), down, sizes)),
        ("do not fit", (x, (gate, up), down, sizes[:2])),
        ("one dtype", (x.astype(jnp.bfloat16), (gate, up), down, sizes)),
    ):
        with pytest.raises(ValueError, match=message):
            check_operands(*arguments)
