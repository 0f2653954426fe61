"""The TPU and GPU forms of grouped_matmul, as far as a CPU can test them.

The megablox kernels run in Pallas' interpreter, and compile ahead of time for a TPU v5e where the
compiler (libtpu) is installed. Of the GPU form the call to tokamax is checked, against a stand-in.
"""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.errors import UserError
from moejax.kernels import grouped_matmul, ragged_exchange
from moejax.kernels import grouped_matmul_cpu as cpu
from moejax.kernels import grouped_matmul_gpu as gpu
from moejax.kernels import grouped_matmul_tpu as tpu

PRODUCTS = ("forward", "dx", "dw")
SIZES = [100, 0, 37, 130, 0]  # 267 of 300 rows, in tiles of 128: every tile straddles groups


def operands(product, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(300, 24)), rng.normal(size=(300, 40))
    x[sum(SIZES) :] = dy[sum(SIZES) :] = np.nan
    w = rng.normal(size=(len(SIZES), 24, 40))
    chosen = {"forward": (x, w), "dx": (dy, w), "dw": (x, dy)}[product]
    return *(jnp.array(a, dtype) for a in chosen), jnp.array(SIZES, jnp.int32)


def assert_equal_on_owned_rows(product, got, expected, *, atol, rtol):
    rows = slice(None) if product == "dw" else slice(sum(SIZES))
    assert got.dtype == expected.dtype and got.shape == expected.shape
    got, expected = (np.asarray(a[rows], np.float32) for a in (got, expected))
    np.testing.assert_allclose(got, expected, atol=atol, rtol=rtol)


@pytest.mark.quick(1)
@pytest.mark.parametrize("product", PRODUCTS)
def test_megablox_interpreted_equals_the_cpu_form(product):
    args = operands(product)
    got = getattr(tpu, product)(*args, interpret=True)
    # Both sum in float32, in different orders.
    assert_equal_on_owned_rows(product, got, getattr(cpu, product)(*args), atol=1e-4, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("product", PRODUCTS)
def test_megablox_interpreted_equals_the_cpu_form_in_bfloat16(product):
    args = operands(product, jnp.bfloat16)
    got = getattr(tpu, product)(*args, interpret=True)
    # One unit in the last place of bfloat16, where the float32 sums round to different sides.
    assert_equal_on_owned_rows(product, got, getattr(cpu, product)(*args), atol=1e-4, rtol=2**-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("num_rows,width,out_width", [(64, 96, 40), (98304, 4096, 14336)])
def test_tpu_tiles_fit_the_vector_memory(dtype, num_rows, width, out_width):
    size = jnp.dtype(dtype).itemsize
    for in_width, other in ((width, out_width), (out_width, width)):
        rows, k, n = tpu.choose_tiling(num_rows, in_width, other, 16, dtype)
        assert rows % 128 == 0 and k % 128 == 0 and n % 128 == 0
        gmm = 2 * size * (rows * k + k * n + rows * n) + 4 * rows * n
        tgmm = 2 * size * (rows * k + rows * n + k * n) + 4 * k * n
        assert max(gmm, tgmm) <= 16 * 2**20


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_tpu_forms_compile_for_v5e(dtype):
    """megablox under check_vma=False, the ragged exchange under check_vma=True."""
    mesh = _v5e_mesh()

    def shape(dims, dtype):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, P("expert")))

    def compiled_text(function, check_vma, *shapes):
        program = jax.shard_map(
            function, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=check_vma
        )
        return jax.jit(program).lower(*shapes).compile().as_text() or ""

    def multiply(x, w, sizes):
        y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, platform="tpu"), x, w)
        return y, *vjp(y)

    shapes = shape((4 * 1000, 192), dtype), shape((32, 192, 256), dtype), shape((32,), jnp.int32)
    assert compiled_text(multiply, False, *shapes).count('"tpu_custom_call"') == 3

    def send(operand, output, *vectors):
        def exchange(operand):
            return ragged_exchange(operand, output, *vectors, axis_name="expert", platform="tpu")

        result, vjp = jax.vjp(exchange, operand)
        return result, *vjp(result)

    buffers = shape((4 * 256, 128), dtype), shape((4 * 512, 128), dtype)
    text = compiled_text(send, True, *buffers, *[shape((4 * 8,), jnp.int32)] * 4)
    assert "ragged-all-to-all" in text


def _v5e_mesh() -> Mesh:
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install libtpu")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
    return Mesh(np.array(devices), ("expert",), axis_types=(AxisType.Auto,))


def test_gpu_without_tokamax_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    x, w, sizes = operands("forward")
    with pytest.raises(UserError, match=r"install moejax\[gpu\]"):
        grouped_matmul(x, w, sizes, platform="gpu")


def test_a_kernel_that_tokamax_lacks_is_an_error_without_a_fallback(monkeypatch):
    def ragged_dot_general(*args, implementation, **kwargs):
        raise ValueError(f"Unknown implementation: {implementation}")

    stand_in = types.SimpleNamespace(ragged_dot_general=ragged_dot_general)
    monkeypatch.setitem(sys.modules, "tokamax", stand_in)
    with pytest.raises(UserError, match="triton"):
        x, w, sizes = operands("forward")
        gpu.forward(x, w, sizes)


@pytest.mark.parametrize("implementation", ["triton", "mosaic_gpu"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_gpu_products_are_the_right_ragged_dots(monkeypatch, product, implementation):
    """tokamax replaced by `jax.lax.ragged_dot_general`, with the flaws of its kernels put in."""
    calls = []

    def ragged_dot_general(lhs, rhs, group_sizes, **kwargs):
        calls.append(kwargs.pop("implementation"))
        owned = (jnp.arange(lhs.shape[0]) < group_sizes.sum())[:, None]
        if implementation == "triton":  # rows of no group are never read
            lhs, rhs = jnp.where(owned, lhs, 0), jnp.where(owned, rhs, 0) if rhs.ndim == 2 else rhs
        else:  # lhs is masked by a product, rhs is not
            lhs = lhs * owned
        out = jax.lax.ragged_dot_general(lhs, rhs, group_sizes, **kwargs)
        if product == "dw" and implementation == "triton":
            out = jnp.where(group_sizes[:, None, None] == 0, 7.0, out)
        return out

    stand_in = types.SimpleNamespace(ragged_dot_general=ragged_dot_general)
    monkeypatch.setitem(sys.modules, "tokamax", stand_in)
    args = operands(product)
    got = getattr(gpu, product)(*args, implementation=implementation)
    assert calls == [implementation]
    assert_equal_on_owned_rows(product, got, getattr(cpu, product)(*args), atol=1e-4, rtol=1e-5)
