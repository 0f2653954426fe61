"""FLOP counting against hand arithmetic and against XLA's own cost analysis."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Jaxpr, jaxprs_in_params
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moejax.train.cost import flops, peak
from moejax.train.cost.flops import count_flops
from tests import steps


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def counted(f, *args) -> float:
    return count_flops(jax.make_jaxpr(f)(*args))


def test_a_matmul_is_two_flops_per_multiply_add():
    assert counted(jnp.matmul, array(3, 5), array(5, 7)) == 2 * 3 * 5 * 7


def test_batched_and_multi_axis_contractions_count_every_axis_once():
    bmm = partial(jnp.einsum, "bij,bjk->bik")
    assert counted(bmm, array(4, 3, 5), array(4, 5, 7)) == 2 * 4 * 3 * 5 * 7
    heads = partial(jnp.einsum, "bld,dhk->blhk")
    assert counted(heads, array(2, 3, 5), array(5, 4, 6)) == 2 * (2 * 3) * 5 * (4 * 6)
    merge = partial(jnp.einsum, "blhk,hkd->bld")
    assert counted(merge, array(2, 3, 4, 6), array(4, 6, 5)) == 2 * (2 * 3) * (4 * 6) * 5


def test_elementwise_work_and_sorting_count_nothing():
    assert counted(lambda x: jnp.sum(jnp.sort(jnp.tanh(x) * 2)), array(64)) == 0


def test_a_convolution_counts_output_times_kernel():
    def conv(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "VALID")

    # 1 x 6 output channels x 8 x 7 positions, each 3 input channels x 3 x 2.
    assert counted(conv, array(1, 3, 10, 8), array(6, 3, 3, 2)) == 2 * (6 * 8 * 7) * (3 * 3 * 2)


def test_a_scan_counts_its_body_length_times():
    def scanned(x, w):
        return jax.lax.scan(lambda h, w: (h @ w, None), x, w)[0]

    assert counted(scanned, array(3, 5), array(11, 5, 5)) == 11 * 2 * 3 * 5 * 5


def test_a_cond_counts_its_most_expensive_branch():
    def either(flag, x, w):
        return jax.lax.cond(flag, lambda: x @ w @ w, lambda: x @ w)

    flag = jax.ShapeDtypeStruct((), jnp.bool_)
    assert counted(either, flag, array(3, 5), array(5, 5)) == 2 * (2 * 3 * 5 * 5)


def test_operations_inside_jit_custom_derivatives_and_checkpoint_count():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    def backward(residuals, dy):
        x, w = residuals
        return dy @ w.T, x.T @ dy

    product.defvjp(lambda x, w: (x @ w, (x, w)), backward)
    once = 2 * 3 * 5 * 5
    args = array(3, 5), array(5, 5)
    assert counted(jax.jit(product), *args) == once
    assert counted(lambda x, w: jax.nn.relu(x @ w), *args) == once  # relu is a custom_jvp

    def loss(x, w):
        return jnp.sum(jnp.sin(product(x, w)))

    assert counted(jax.grad(loss, (0, 1)), *args) == 3 * once
    # Rematerialised: the sine's argument is computed a second time in the backward pass.
    assert counted(jax.grad(jax.checkpoint(loss), (0, 1)), *args) == 4 * once


def test_a_shard_map_counts_every_shard(eight_devices):
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    over_mesh = partial(jax.shard_map, jnp.matmul, mesh=mesh)
    args = array(16, 5), array(5, 7)
    whole = counted(jnp.matmul, *args)
    rows = P(("data", "expert"))
    assert counted(over_mesh(in_specs=(rows, P()), out_specs=rows), *args) == whole
    # Manual over one axis only: the body sees a quarter of the rows, not an eighth.
    rows = P("expert")
    partly_manual = over_mesh(in_specs=(rows, P()), out_specs=rows, axis_names={"expert"})
    assert counted(partly_manual, *args) == whole
    # Replicated input: all eight devices repeat the same product.
    assert counted(over_mesh(in_specs=(P(), P()), out_specs=P()), *args) == 8 * whole


def _blocked(x_ND, w_GDF, sizes_G):
    """Stands for a kernel: a loop whose trip count is data."""

    def body(carry):
        i, y_NF = carry
        return i + 1, y_NF + x_ND @ w_GDF[i]

    y_NF = jnp.zeros((x_ND.shape[0], w_GDF.shape[2]), x_ND.dtype)
    return jax.lax.while_loop(lambda carry: carry[0] < sizes_G[0], body, (0, y_NF))[1]


@jax.jit
def grouped_matmul_dx(dy_NF, w_GDF, sizes_G):
    return _blocked(dy_NF, jnp.swapaxes(w_GDF, 1, 2), sizes_G)


@jax.jit
def grouped_matmul_dw(x_ND, dy_NF, sizes_G):
    return jnp.broadcast_to((x_ND.T @ dy_NF)[None], (sizes_G.shape[0], x_ND.shape[1], 7))


@jax.jit
def grouped_matmul_forward(x_ND, w_GDF, sizes_G):
    return _blocked(x_ND, w_GDF, sizes_G)


@jax.custom_vjp
def differentiable(x_ND, w_GDF, sizes_G):
    return grouped_matmul_forward(x_ND, w_GDF, sizes_G)


def _forward(x_ND, w_GDF, sizes_G):
    return differentiable(x_ND, w_GDF, sizes_G), (x_ND, w_GDF, sizes_G)


def _backward(residuals, dy_NF):
    x_ND, w_GDF, sizes_G = residuals
    return grouped_matmul_dx(dy_NF, w_GDF, sizes_G), grouped_matmul_dw(x_ND, dy_NF, sizes_G), None


differentiable.defvjp(_forward, _backward)
GROUPED_ARGS = array(6, 5), array(4, 5, 7), jax.ShapeDtypeStruct((4,), jnp.int32)


def test_grouped_matmul_is_counted_by_formula_forward_and_backward():
    once = 2 * 6 * 5 * 7
    assert counted(differentiable, *GROUPED_ARGS) == once

    def loss(x_ND, w_GDF, sizes_G):
        return jnp.sum(differentiable(x_ND, w_GDF, sizes_G) ** 2)

    assert counted(jax.grad(loss, (0, 1)), *GROUPED_ARGS) == 3 * once


def test_grouped_matmul_is_counted_inside_a_differentiated_scan():
    """There, jax moves the kernel's constants into a call of its own, under the same name."""

    def loss(x_ND, w_LGDF, sizes_G):
        def layer(h_ND, w_GDF):
            return jnp.tanh(differentiable(h_ND, w_GDF, sizes_G)), None

        return jnp.sum(jax.lax.scan(layer, x_ND, w_LGDF)[0])

    args = array(6, 7), array(3, 4, 7, 7), jax.ShapeDtypeStruct((4,), jnp.int32)
    assert counted(jax.grad(loss, (0, 1)), *args) == 3 * 3 * (2 * 6 * 7 * 7)


def test_a_grouped_matmul_around_others_counts_the_inner_ones():
    @jax.jit
    def grouped_matmul(x_ND, w_GDF, sizes_G):
        return differentiable(x_ND, w_GDF, sizes_G)

    def loss(x_ND, w_GDF, sizes_G):
        return jnp.sum(grouped_matmul(x_ND, w_GDF, sizes_G) ** 2)

    assert counted(jax.grad(loss, (0, 1)), *GROUPED_ARGS) == 3 * 2 * 6 * 5 * 7


def test_a_grouped_matmul_with_unreadable_operands_is_refused():
    @jax.jit
    def grouped_matmul(x_ND, y_ND, w_GDF):
        return (x_ND + y_ND) @ w_GDF[0]

    with pytest.raises(ValueError, match="must take .* shapes"):
        counted(grouped_matmul, array(6, 5), array(6, 5), array(4, 5, 7))


def test_a_while_loop_with_products_is_refused_and_one_without_is_not():
    with pytest.raises(ValueError, match="trip count"):
        counted(_blocked, *GROUPED_ARGS)

    def sinkhorn(x):
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x / x.sum(0), x)

    assert counted(sinkhorn, array(8, 4)) == 0


def test_a_ragged_dot_outside_a_grouped_matmul_is_refused():
    with pytest.raises(ValueError, match="ragged_dot"):
        counted(jax.lax.ragged_dot, *GROUPED_ARGS)


def _mlp_loss(layers, weights, x_ND):
    h_ND = layers(lambda h_ND, w: (h_ND + jax.nn.silu(h_ND @ w[0]) @ w[1], None), x_ND, weights)[0]
    return jnp.mean(h_ND**2)


def test_the_count_agrees_with_xla_on_an_unrolled_training_step():
    """XLA also counts element-wise work: a few FLOPs for each of N*F activations, beside 2*D in
    each product, hence up to 3 % more than ours and never less."""
    weights = (array(3, 128, 256), array(3, 256, 128))
    x_ND = array(512, 128)
    unrolled = partial(jax.lax.scan, unroll=True)
    ours = {
        name: counted(jax.value_and_grad(partial(_mlp_loss, layers), (0, 1)), weights, x_ND)
        for name, layers in (("scanned", jax.lax.scan), ("unrolled", unrolled))
    }
    assert ours["scanned"] == ours["unrolled"]
    # 3 layers of 2 products, each forward and backward into weights and input.
    assert ours["scanned"] == 3 * 2 * 3 * (2 * 512 * 128 * 256)

    step = jax.jit(jax.value_and_grad(partial(_mlp_loss, unrolled), (0, 1)))
    analysis = step.lower(weights, x_ND).compile().cost_analysis()
    assert analysis is not None
    assert 1.0 <= analysis["flops"] / ours["unrolled"] < 1.03


def jitted_names(jaxpr) -> set[str]:
    """Names of all jitted functions in a program, at any depth."""
    names = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("jit", "pjit"):
            names.add(str(eqn.params["name"]))
        for body in jaxprs_in_params(eqn.params):
            names |= jitted_names(body)
    return names


def traced_passes() -> Jaxpr:
    """A forward and backward pass of a model with routed experts and routed attention heads."""
    run = steps.make({"data": 1}, model__moa_experts=4)
    params = run.abstract_state.params
    batch = {name: jnp.zeros(x.shape, x.dtype) for name, x in run.data.shapes(2).items()}

    def loss(params):
        totals = run.task.countable().forward(
            params, run.task.init_gate_state(), batch, jnp.int32(0), jax.random.key(0), train=True
        )
        return run.task.objective(totals, totals.items)

    return jax.make_jaxpr(jax.grad(loss))(params).jaxpr


@pytest.fixture(scope="module")
def passes() -> Jaxpr:
    return traced_passes()


@pytest.mark.parametrize("name", [*flops.KERNELS, *flops.FIXED_ROWS])
def test_every_name_that_the_count_relies_on_is_in_a_traced_program(name, passes):
    assert any(found.startswith(name) for found in jitted_names(passes))


def test_renaming_the_functions_of_attention_heads_changes_the_count(passes, monkeypatch):
    """So a rename that the count did not follow could not go unnoticed."""
    fixed = count_flops(passes, grouped=False)
    assert fixed < count_flops(passes)
    monkeypatch.setattr(flops, "FIXED_ROWS", ("renamed",))
    assert count_flops(passes, grouped=False) < fixed


@pytest.mark.parametrize("name", flops.KERNELS)
def test_renaming_a_kernel_is_refused_or_changes_the_count(name, passes, monkeypatch):
    before = count_flops(passes)
    others = tuple(kernel for kernel in flops.KERNELS if kernel != name)
    monkeypatch.setattr(flops, "KERNELS", others)
    try:
        assert count_flops(passes) != before
    except ValueError as error:
        assert "cannot count the FLOPs" in str(error)


def test_published_peaks_are_found_by_device_kind():
    assert peak.published_peak("TPU v5 lite", "bfloat16") == 197e12
    assert peak.published_peak("TPU v5p", "bfloat16") == 459e12
    assert peak.published_peak("TPU v6 lite", "float32") == 918e12
    assert peak.published_peak("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
    assert peak.published_peak("NVIDIA H100 PCIe", "float32") == 378e12
    assert peak.published_peak("cpu", "float32") is None
    with pytest.raises(ValueError, match="float64"):
        peak.published_peak("cpu", "float64")


def test_virtual_cpu_devices_share_one_measured_peak(eight_devices, monkeypatch):
    monkeypatch.setattr(peak, "measure_matmul_flops", lambda **_: 7e9)
    assert peak.peak(eight_devices, "float32") == (7e9, "measured float32 matmul")
    assert peak.peak_flops(eight_devices[:1], "float32") == 7e9


def test_the_measured_rate_is_that_of_real_products():
    size = 256
    rate = peak.measure_matmul_flops(seconds=0.02, size=size)
    # Between one FLOP per nanosecond on one slow core and the largest CPUs of today.
    assert np.isfinite(rate) and 1e8 < rate < 1e15
