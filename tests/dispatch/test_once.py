"""Sending each token once per shard: the traffic, and outputs equal to those of dropless."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import experts
from moejax.dispatch import Dropless, DroplessOnce, exchange
from moejax.dispatch.api import dispatch
from moejax.mesh import batch_spec
from moejax.types import ExpertWeights, Job, Site, Tokens
from tests import meshes
from tests.dispatch.test_transports import EXPERTS, GROUPS, TOKENS, WIDTH, weights

P = jax.sharding.PartitionSpec
TENSOR = {"data": 2, "expert": 2, "tensor": 2}


def inputs():
    return jax.random.normal(jax.random.key(1), (GROUPS, TOKENS, WIDTH))


def sends(transport, shape, routing, monkeypatch):
    """The arguments of the transport's exchange: rows from each device to each shard, their widths
    and the room in the receive buffer, for each of its sends."""
    shards, found = shape["expert"], []

    def run(x_gTD, routing, w):
        sizes = []
        real = exchange.send_rows

        def spy(rows_ND, traffic, capacity, site):
            sizes.append(traffic.there_send.reshape(1, shards, -1).sum(-1))
            found.append((rows_ND.shape[1], capacity))
            return real(rows_ND, traffic, capacity, site)

        with monkeypatch.context() as patch:
            patch.setattr(exchange, "send_rows", spy)
            tokens = Tokens(x_gTD, routing.expert_GTK, routing.weight_GTK, x_gTD[..., 0])
            job = Job(EXPERTS, "swiglu", Site(shards, "expert"))
            y_gTD, _ = transport.run(tokens, w, job)
        return y_gTD, sizes

    with meshes.entered(shape):
        mesh = jax.sharding.get_abstract_mesh()
        tokens = batch_spec(mesh)
        program = jax.shard_map(run, in_specs=(tokens, tokens, P("expert")), out_specs=tokens)
        _, sizes = jax.jit(program)(inputs(), routing, weights("swiglu"))
    return [(np.asarray(size), *rest) for size, rest in zip(sizes, found, strict=True)]


def visits(routing, shape):
    """By a loop: (tokens with an expert on a shard, their pairs there), per device and shard."""
    devices, shards = shape.get("data", 1) * shape["expert"], shape["expert"]
    active = np.asarray(routing.weight_GTK) > 0
    tokens, pairs = np.zeros((2, devices, shards), int)
    for group, token in np.ndindex(GROUPS, TOKENS):
        device = group * devices // GROUPS
        visited = np.asarray(routing.expert_GTK)[group, token][active[group, token]]
        owners = [int(expert) // (EXPERTS // shards) for expert in visited]
        for shard in set(owners):
            tokens[device, shard] += 1
        for shard in owners:
            pairs[device, shard] += 1
    return tokens, pairs


CASES = [(meshes.LARGE, 3), ({"expert": 2}, 5), ({"expert": 8}, 2)]
SLOW_CASES = [({"expert": 2}, 5), (TENSOR, 3)]


@pytest.mark.parametrize(
    ("shape", "columns"),
    [CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:])],
    ids=str,
)
def test_a_token_is_sent_once_to_each_shard_that_holds_its_active_experts(
    shape, columns, monkeypatch
):
    routing = meshes.inactive(meshes.routing("zipf", GROUPS, TOKENS, columns, EXPERTS))
    tokens, pairs = visits(routing, shape)
    (rows, about) = sends(DroplessOnce(), shape, routing, monkeypatch)
    np.testing.assert_array_equal(rows[0], tokens)
    np.testing.assert_array_equal(about[0], tokens)
    assert rows[1] == WIDTH and about[1] == 2 * columns
    every_token = GROUPS * TOKENS // shape.get("data", 1)
    assert rows[2] == about[2] == every_token, "no room for copies in the receive buffer"
    ((copies, *_),) = sends(Dropless(), shape, routing, monkeypatch)
    np.testing.assert_array_equal(copies, pairs)

    remote = ~np.tile(np.eye(shape["expert"], dtype=bool), (shape.get("data", 1), 1))
    assert 0 < tokens[remote].sum() <= pairs[remote].sum()
    if shape["expert"] < EXPERTS:  # else a shard has one expert, and a token one pair there
        assert tokens[remote].sum() < pairs[remote].sum()


def test_unwritten_rows_of_the_receive_buffer_are_not_counted_as_pairs(monkeypatch):
    """A receive buffer of ones, as a device's memory may be, reads as pairs of expert 1."""
    routing = meshes.inactive(meshes.routing("half_empty", GROUPS, TOKENS, 2, EXPERTS))

    def ones(rows_ND, capacity):
        return jnp.broadcast_to(1.0 + 0.0 * rows_ND[:1], (capacity, rows_ND.shape[1]))

    def run(x_gTD, routing, w):
        sizes = []

        def count(weights, rows_PD, size_e, activation):
            sizes.append(size_e)
            return rows_PD

        with monkeypatch.context() as patch:
            patch.setattr(exchange, "buffer_like", ones)
            patch.setattr(experts, "ffn_sorted", count)
            tokens = Tokens(x_gTD, routing.expert_GTK, routing.weight_GTK, x_gTD[..., 0])
            DroplessOnce().run(tokens, w, Job(EXPERTS, "swiglu", Site(1, "expert")))
        return sizes

    with meshes.entered({"expert": 1}):
        given = batch_spec(jax.sharding.get_abstract_mesh())
        specs = {"in_specs": (given, given, P("expert")), "out_specs": P("expert")}
        program = jax.jit(jax.shard_map(run, **specs))
        x_gTD, w_EDF = jnp.ones((GROUPS, TOKENS, WIDTH)), jnp.ones((EXPERTS, WIDTH, WIDTH))
        (size_E,) = program(x_gTD, routing, ExpertWeights(None, w_EDF, w_EDF))
    active_N = np.asarray(routing.expert_GTK)[np.asarray(routing.weight_GTK) > 0]
    np.testing.assert_array_equal(size_E, np.bincount(active_N, minlength=EXPERTS))


@functools.cache
def stepped(transport, mesh_name):
    del mesh_name

    def objective(x, weight_GTK, w, expert_GTK):
        routing = meshes.Routing(expert_GTK, weight_GTK)
        score = weight_GTK.max(-1)
        y, kept = dispatch(x, routing, score, w, transport=transport, activation="swiglu")
        return jnp.sum(jax.random.normal(jax.random.key(2), y.shape) * y), (y, kept)

    return jax.jit(jax.value_and_grad(objective, (0, 1, 2), has_aux=True))


def both(shape, routing):
    with meshes.entered(shape):
        args = (inputs(), routing.weight_GTK, weights("swiglu"), routing.expert_GTK)
        name = meshes.name(shape)
        return [jax.device_get(stepped(t, name)(*args)) for t in (DroplessOnce(), Dropless())]


@pytest.mark.parametrize(
    ("shape", "columns"),
    [(meshes.LARGE, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)],
    ids=str,
)
def test_outputs_and_gradients_equal_those_of_dropless(shape, columns):
    routing = meshes.inactive(meshes.routing("zipf", GROUPS, TOKENS, columns, EXPERTS))
    got, wanted = both(shape, routing)
    # float32 sums of a token's pairs and of an expert's 48 rows at most, in another order.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, wanted)
    inactive = np.asarray(routing.weight_GTK) == 0
    assert inactive.any() and not got[1][1][inactive].any(), "a gradient without a pair"


@pytest.mark.slow
def test_without_an_expert_axis_the_result_equals_dropless():
    routing = meshes.inactive(meshes.routing("zipf", GROUPS, TOKENS, 3, EXPERTS))
    jax.tree.map(np.testing.assert_array_equal, *both({"data": 2}, routing))
