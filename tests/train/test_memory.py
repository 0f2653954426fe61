"""Bytes, checked by hand arithmetic and against arrays that exist."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.models import stack
from moejax.train.cost.budget import count_budget
from moejax.train.cost.memory import residual_bytes, tree_bytes_per_device
from tests import steps


def array(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def test_a_linear_map_keeps_no_residuals_besides_its_arguments():
    assert residual_bytes(jnp.matmul, array(8, 4), array(4, 6)) == 0


def test_an_activation_is_kept_in_its_own_dtype():
    def f(x, w):
        return jnp.exp(x @ w)  # exp keeps its output, [8, 6]

    assert residual_bytes(f, array(8, 4), array(4, 6)) == 8 * 6 * 4
    half = partial(array, dtype=jnp.bfloat16)
    assert residual_bytes(f, half(8, 4), half(4, 6)) == 8 * 6 * 2


def layers(checkpointed: bool, x, w):
    def body(h, w):
        return jnp.exp(h @ w), None

    return jax.lax.scan(jax.checkpoint(body) if checkpointed else body, x, w)[0]


def test_checkpoint_leaves_only_the_layer_boundaries():
    x, w = array(8, 4), array(3, 4, 4)
    plain = residual_bytes(partial(layers, False), x, w)
    checkpointed = residual_bytes(partial(layers, True), x, w)
    # Each of the 3 layers keeps its input and its exp, or its input alone.
    assert plain == 3 * 2 * (8 * 4 * 4)
    assert checkpointed == 3 * (8 * 4 * 4)


def test_bytes_per_device_follow_the_sharding(eight_devices):
    mesh = jax.make_mesh((2, 4), ("fsdp", "expert"), axis_types=(AxisType.Auto,) * 2)

    def sharded(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    tree = {
        "experts": sharded((8, 16, 32), jnp.float32, "expert", "fsdp"),  # 2 * 8 * 32 each
        "norm": sharded((16,), jnp.bfloat16),  # replicated
        "count": array(dtype=jnp.int32),  # no sharding: in full
    }
    assert tree_bytes_per_device(tree) == 2 * 8 * 32 * 4 + 16 * 2 + 4
    real = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), tree)
    on_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(real))
    assert tree_bytes_per_device(tree) == tree_bytes_per_device(real) == on_device


def activations(**changes) -> int:
    return count_budget(steps.make({"data": 2, "expert": 4}, **changes)).activation_bytes


@pytest.mark.slow
def test_expected_memory_includes_recomputation_and_the_transports_buffers(eight_devices):
    plain = activations()
    full, dots, exchange, experts = (
        activations(model__remat=remat) for remat in ("full", "dots", "exchange", "experts")
    )
    assert 0 < full < dots < exchange < experts < plain and dots < 0.5 * plain
    # Of two layers, full recomputation keeps the inputs: 16 floats of each of 16 tokens a device.
    assert full >= 2 * 16 * 16 * 4
    # Its receive buffers have room for the 32 pairs of each of the four expert shards, cells for
    # one shard's; of every row the input and two hidden layers are kept, in both layers.
    more_rows = 4 * 32 - 32
    more = 2 * more_rows * (16 + 2 * steps.F) * 4
    assert activations(moe__transport="dropless") >= plain + more
    assert activations(moe__transport="dropless_once") >= plain + more


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"model__remat": "full"}, {"moe__transport": "dropless"}])
def test_expected_memory_changes_like_that_of_the_compiled_program(
    changes, eight_devices, monkeypatch
):
    # In a loop both: unrolled layers, which nothing recomputes, keep less than their residuals.
    monkeypatch.setattr(stack, "MOST_UNROLLED", 0)

    def measured(**changes) -> tuple[int, int]:
        sizes = {"model__d_model": 64, "model__num_layers": 4, "moe__d_ff": 64, **changes}
        run = steps.make({"data": 2, "expert": 4}, **sizes)
        with jax.set_mesh(run.mesh):
            compiled = run.train_step.lower(*steps.shapes(run)).compile()
        return count_budget(run).activation_bytes, compiled.memory_analysis().temp_size_in_bytes

    (expected, real), (other_expected, other_real) = measured(), measured(**changes)
    # XLA keeps some values twice and computes some again.
    assert (other_expected - expected) / (other_real - real) == pytest.approx(1, abs=0.5)
