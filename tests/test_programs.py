"""Communication of compiled programs, counted: collectives, their participants and their bytes."""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import gating
from moejax.dispatch import TRANSPORTS, Cells
from moejax.dispatch import api as dispatch_api
from moejax.dispatch.api import dispatch
from moejax.mesh import batch_spec, make_mesh
from moejax.models import stack
from moejax.types import Context, ExpertWeights, GateSpec, Routing
from tests import gates, meshes, steps
from tests.hlo import collectives

G, T, D, E, K = 8, 16, 8, 8, 2
LARGE = make_mesh(meshes.LARGE)


def laid_out(mesh, dims, dtype=jnp.float32, spec=None) -> Any:
    spec = batch_spec(mesh.abstract_mesh) if spec is None else spec
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))


def counted(found):
    return collections.Counter((c.kind, *sorted(c.axes)) for c in found)


# The reader of programs, on programs whose collectives are known.


def test_the_reader_of_programs_finds_every_collective_and_its_axes():
    def body(x):
        x = jax.lax.all_to_all(x, "expert", 0, 0, tiled=True)
        x = jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])
        whole = jax.lax.all_gather(x, ("data", "expert"), tiled=True)
        part = jax.lax.psum_scatter(whole, "expert", tiled=True)
        return part + jax.lax.psum(x.sum(), "data")

    program = jax.shard_map(body, mesh=LARGE, in_specs=P(("data", "expert")),
                            out_specs=P("expert"), check_vma=False)  # fmt: skip
    text = jax.jit(program).lower(laid_out(LARGE, (32, 3))).compile().as_text()
    found = collectives(text, LARGE)
    assert counted(found) == {
        ("all-to-all", "expert"): 1,
        ("collective-permute", "data"): 1,
        ("all-gather", "data", "expert"): 1,
        ("reduce-scatter", "expert"): 1,
        ("all-reduce", "data"): 1,
    }
    sizes = {c.kind: sum(c.sizes) for c in found}
    assert sizes["all-to-all"] == 4 * 3 and sizes["all-gather"] == 32 * 3


# The router.


QUICK = ("top_k", "shazeer", "expert_choice", "sbase", "lory-segment=4")
"""Gates with a selection, noise, experts that choose, iterations, and segments. The exam's own mesh
finds what the others would send beyond sums."""


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.name, marks=() if row.name in QUICK else pytest.mark.slow)
        for row in gates.ROWS
    ],
)
def test_routing_communicates_nothing(row):
    """In the global view, with groups spread over the mesh: noise, top-k and all statistics."""
    gate, spec = row.make(), GateSpec(D, E, vocab_size=16, token_counts=lambda: np.ones(16, int))

    def route(params, x_GTD, row_G):
        context = Context.of(G, T, row_B=row_G, key=jax.random.key(0)).grouped(1, train=True)
        out = gate(params, gate.init_state(spec), x_GTD, context)
        return out.routing, out.stats, out.means

    params = gate.init(jax.random.key(1), spec)
    with jax.set_mesh(LARGE):
        lowered = jax.jit(route).lower(
            params, laid_out(LARGE, (G, T, D)), laid_out(LARGE, (G,), jnp.int32)
        )
        assert collectives(lowered.compile().as_text(), LARGE) == []


@pytest.mark.parametrize(
    ("gate", "moved"), [("base", T * E * G), ("sbase", E)], ids=["base", "sbase"]
)
def test_balancing_the_batch_moves_scores_or_their_column_sums_and_no_tokens(gate, moved):
    """BASE gathers [T, E] scores once; Sinkhorn sums E columns (and a count) per iteration."""
    gate = gating.make(gate)

    def route(params, x_BLD):
        context = Context.of(G, T).grouped(G, train=True)
        return gate(params, (), x_BLD.reshape(1, G * T, D), context).routing.weight_GTK

    params = gate.init(jax.random.key(1), GateSpec(D, E))
    with jax.set_mesh(LARGE):
        text = jax.jit(route).lower(params, laid_out(LARGE, (G, T, D))).compile().as_text()
    found = collectives(text, LARGE)
    assert moved in [size for c in found for size in c.sizes]
    if moved == E:
        # The last top-k works on gathered scores, as do all batch-scoped selections.
        assert {c.kind for c in found if T * E * G not in c.sizes} == {"all-reduce"}
    assert max(size for c in found for size in c.sizes) <= T * E * G


# One layer's dispatch.


def layer(mesh, capacity, backward):
    """Text of the compiled dispatch in cells, or of gradients of tokens, weights and experts."""

    def run(x_GTD, weight_GTK, weights, expert_GTK):
        y_GTD, _ = dispatch(
            x_GTD,
            Routing(expert_GTK, weight_GTK),
            weight_GTK.max(-1),
            weights,
            transport=Cells(),
            activation="swiglu",
            capacity=capacity,
        )
        return y_GTD

    def objective(*args):
        return jnp.sum(jnp.sin(run(*args)))

    wide = laid_out(mesh, (E, D, steps.F), spec=P("expert", None, "tensor"))
    narrow = laid_out(mesh, (E, steps.F, D), spec=P("expert", "tensor", None))
    tokens, weight = laid_out(mesh, (G, T, D)), laid_out(mesh, (G, T, K))
    args = (tokens, weight, ExpertWeights(wide, wide, narrow), laid_out(mesh, (G, T, K), jnp.int32))
    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(objective, (0, 1, 2)) if backward else run)
        return program.lower(*args).compile().as_text()


@pytest.mark.parametrize("shape", [meshes.LARGE, {"expert": 8}], ids=meshes.name)
@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_cells_sends_k_copies_of_a_token_times_the_capacity_factor_and_nothing_else(shape, factor):
    mesh = make_mesh(shape)
    capacity = gating.make("mixtral", k=K).capacity(T, E, factor)
    found = collectives(layer(mesh, capacity, backward=False), mesh)
    assert counted(found) == {("all-to-all", "expert"): 2}
    tokens = G * T // mesh.size
    for exchange in found:
        assert set(exchange.dtypes) == {"f32"}
        assert sum(exchange.sizes) == tokens * K * factor * D


def test_the_gradient_of_cells_sends_as_much_again_and_sums_expert_gradients_over_data():
    text = layer(LARGE, T * K // E, backward=True)
    found = collectives(text, LARGE)
    exchanges = [c for c in found if c.kind == "all-to-all"]
    assert len(exchanges) == 4 and all(c.axes == {"expert"} for c in exchanges)
    assert len({sum(c.sizes) for c in exchanges}) == 1
    (total,) = [c for c in found if c.kind != "all-to-all"]
    assert (total.kind, total.axes) == ("all-reduce", {"data"})
    assert sorted(total.sizes) == [E // 4 * D * steps.F] * 3


@pytest.mark.parametrize("shape", [{"expert": 8}, {"data": 8}], ids=meshes.name)
def test_axes_of_size_one_cost_nothing(shape):
    """Experts alone: nothing to sum over data. Data alone: no exchange."""
    mesh = make_mesh(shape)
    found = counted(collectives(layer(mesh, T * K // E, backward=True), mesh))
    wanted = {("all-to-all", "expert"): 4} if "expert" in shape else {("all-reduce", "data"): 1}
    assert found == wanted


def test_a_split_hidden_width_adds_one_sum_of_tokens_each_way():
    """Forward: partial outputs. Backward: the tokens' gradient, beside that of the weights."""
    mesh = make_mesh({"data": 2, "expert": 2, "tensor": 2})
    tokens = G * T // 4
    (forward,) = [
        c for c in collectives(layer(mesh, 4, backward=False), mesh)
        if c.axes == {"tensor"}
    ]  # fmt: skip
    assert forward.kind == "all-reduce" and forward.sizes == (tokens * D,)
    both = [
        size for c in collectives(layer(mesh, 4, backward=True), mesh)
        if c.axes == {"tensor"} for size in c.sizes
    ]  # fmt: skip
    assert sorted(both) == sorted([tokens * D, tokens * D, tokens * K])


# The training step.


def holds_expert_weights(size):
    return size > 0 and size % 11 == 0


@functools.cache
def step_collectives(shape, unrolled=0, **changes):
    """Those in the program's text; with layers in a loop, unless ``unrolled`` are laid out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "MOST_UNROLLED", unrolled)
        run = steps.make(dict(shape), **changes)
        return collectives(steps.compiled_text(run), run.mesh)


def moves_expert_weights(found):
    return [(c, s) for c in found for s in c.sizes if holds_expert_weights(s)]


def test_a_training_step_moves_tokens_over_expert_and_expert_gradients_over_data():
    found = step_collectives(tuple(meshes.LARGE.items()))
    exchanges = [c for c in found if c.kind == "all-to-all"]
    assert len(exchanges) == 4, "two each way, in the loop over layers"
    assert sum(exchanges[0].sizes) == steps.BATCH * steps.LENGTH // 8 * K * 16
    assert not [c for c in found if c.kind not in ("all-to-all", "all-reduce")]
    moved = moves_expert_weights(found)
    assert {(c.kind, *c.axes) for c, _ in moved} == {("all-reduce", "data")}
    assert [size for _, size in moved] == [E // 4 * 16 * steps.F] * 3


def test_fsdp_gathers_weights_over_fsdp_only():
    shape = {"data": 2, "fsdp": 2, "expert": 2}
    found = step_collectives(tuple(shape.items()))
    gathered = [c for c in found if c.kind == "all-gather"]
    assert gathered and all(c.axes == {"fsdp"} for c in gathered)
    assert sorted(s for c, s in moves_expert_weights(gathered)) == [E // 2 * 16 * steps.F] * 3
    for collective, _ in moves_expert_weights(found):
        assert collective.axes <= {"data", "fsdp"}
    tokens = steps.BATCH * steps.LENGTH * 16
    assert tokens not in [size for c in gathered for size in c.sizes]
    assert {c.kind for c in found} <= {"all-gather", "all-reduce", "all-to-all"}


@pytest.mark.slow
def test_the_embedding_is_looked_up_where_the_tokens_are():
    """No device looks up the whole batch in its own columns of a split table."""
    found = step_collectives((("fsdp", 8),))
    assert {c.kind for c in found} == {"all-gather", "all-reduce"}
    table = steps.VOCAB * 16
    assert table in [size for c in found if c.kind == "all-gather" for size in c.sizes]


@pytest.mark.slow
def test_the_number_of_collectives_does_not_grow_with_depth():
    shallow = step_collectives(tuple(meshes.LARGE.items()))
    deep = step_collectives(tuple(meshes.LARGE.items()), model__num_layers=6)
    assert counted(shallow) == counted(deep)


@pytest.mark.slow
def test_unrolled_layers_exchange_the_same_as_layers_in_a_loop():
    """Each layer has four exchanges of the same size, and no other kind of collective."""
    shape = tuple(meshes.LARGE.items())
    loop, flat = step_collectives(shape), step_collectives(shape, unrolled=8)
    exchanges = [[c for c in found if c.kind == "all-to-all"] for found in (loop, flat)]
    layers = steps.make(dict(shape)).config.model.num_layers
    assert len(exchanges[1]) == 4 * layers == layers * len(exchanges[0])
    assert {c.sizes for c in exchanges[0]} == {c.sizes for c in exchanges[1]}
    assert set(counted(loop)) == set(counted(flat))


# As on TPU and GPU.


@pytest.mark.slow
@pytest.mark.parametrize(
    "transport",
    ["dropless", *(pytest.param(t, marks=pytest.mark.slow) for t in ("dropless_once", "gather"))],
)
def test_without_the_vma_check_outputs_and_gradients_are_the_same(transport, monkeypatch):
    """TPU and GPU kernels run under check_vma=False, where other code sums the gradients."""
    shape = {"data": 2, "expert": 2, "tensor": 2}
    routing = meshes.inactive(meshes.routing("zipf", G, T, K, E))
    keys = jax.random.split(jax.random.key(0), 4)
    x_GTD = jax.random.normal(keys[0], (G, T, D))
    weights = ExpertWeights(
        jax.random.normal(keys[1], (E, D, steps.F)),
        jax.random.normal(keys[2], (E, D, steps.F)),
        jax.random.normal(keys[3], (E, steps.F, D)) / steps.F,
    )
    checks = []
    shard_map = jax.shard_map

    def spy(*args, **kwargs):
        checks.append(kwargs.get("check_vma"))
        return shard_map(*args, **kwargs)

    monkeypatch.setattr(jax, "shard_map", spy)

    def run(x_GTD, weight_GTK, weights):
        y_GTD, kept_GTK = dispatch(
            x_GTD, Routing(routing.expert_GTK, weight_GTK), weight_GTK.max(-1), weights,
            transport=TRANSPORTS[transport](), activation="swiglu",
        )  # fmt: skip
        return jnp.sum(jnp.sin(y_GTD)), (y_GTD, kept_GTK)

    def outcome():
        jax.clear_caches()  # dispatch is jitted: without this the second would be the first
        with meshes.entered(shape):
            step = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))
            return jax.device_get(step(x_GTD, routing.weight_GTK, weights))

    checked = outcome()
    monkeypatch.setattr(dispatch_api, "kernels_pass_check_vma", lambda: False)
    unchecked = outcome()
    jax.clear_caches()
    assert checks == [True, False]
    # The same products; sums over devices may be taken in another order.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(close, unchecked, checked)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(checked[1]))
