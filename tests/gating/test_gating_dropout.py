"""Gating dropout: one coin per step, local tokens on local steps, and the bytes saved."""

import functools
from types import SimpleNamespace
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import gating
from moejax.dispatch import exchange, pack
from moejax.mesh import batch_spec
from moejax.train.metrics.console import gate_advice
from moejax.train.setup import Run
from moejax.types import Context
from tests import meshes

B, L, D, F, E, K = 16, 6, 8, 12, 8, 2
ALWAYS = dict(local_share=1.0, local_shards=4, local_rows=4)


@functools.partial(jax.jit, static_argnames="gate")
def run(gate, params, x, context):
    return gate(params, (), x, context)


def route(gate, key=0, train=True, batch=B, **known):
    x = jax.random.normal(jax.random.key(1), (B, L, D))[:batch]
    params = {"router_DE": jax.random.normal(jax.random.key(2), (D, E))}
    context = Context.of(batch, L, key=jax.random.key(key), **known).grouped(1, train)
    return run(gate, params, x, context), x @ params["router_DE"]


def test_a_local_step_is_top_k_among_the_experts_of_the_rows_shard():
    out, logits = route(gating.make("gating_dropout", **ALWAYS))
    expert, weight = np.asarray(out.routing.expert_GTK), np.asarray(out.routing.weight_GTK)
    for row in range(B):
        home = row // 4 % 4
        for t in range(L):
            own = np.asarray(logits[row, t, 2 * home : 2 * home + 2])
            best = np.argsort(-own, kind="stable")
            np.testing.assert_array_equal(expert[row, t], 2 * home + best)
            wanted = np.exp(own[best]) / np.exp(own).sum()
            np.testing.assert_allclose(weight[row, t], wanted, rtol=1e-5)  # float32
    np.testing.assert_array_equal(out.means["local"], 1.0)


def test_without_renormalisation_the_weights_are_shares_among_all_experts():
    gate = gating.make("gating_dropout", k=1, renormalize=False, **ALWAYS)
    out, logits = route(gate)
    p = jax.nn.softmax(logits)
    wanted = jnp.take_along_axis(p, out.routing.expert_GTK, axis=-1)
    np.testing.assert_allclose(out.routing.weight_GTK, wanted, rtol=1e-5)  # float32
    assert (out.routing.expert_GTK[..., 0] // 2 == jnp.arange(B)[:, None] // 4 % 4).all()


def test_a_local_step_routes_the_jittered_tokens_of_top_k():
    local, clean = route(gating.make("gating_dropout", jitter=0.5, **ALWAYS))
    plain, _ = route(gating.make("top_k", jitter=0.5))
    np.testing.assert_array_equal(local.stats.logits_GTE, plain.stats.logits_GTE)
    home = np.arange(B)[:, None, None] // 4 % 4 == np.arange(E) // 2
    noisy = np.where(home, plain.stats.logits_GTE, -np.inf)
    best = np.argsort(-noisy, axis=-1, kind="stable")[..., :K]
    np.testing.assert_array_equal(local.routing.expert_GTK, best)
    without = np.argsort(-np.where(home, clean, -np.inf), axis=-1, kind="stable")[..., :K]
    assert (best != without).any(), "the jitter decides something"


@pytest.mark.parametrize(
    ("fields", "train"),
    [({"local_share": 0.0}, True), ({"local_shards": 0}, True), ({"local_share": 1.0}, False)],
    ids=["share 0", "off", "evaluation"],
)
def test_non_local_steps_equal_top_k(fields, train):
    ours, _ = route(gating.make("gating_dropout", **fields), train=train)
    plain, _ = route(gating.make("top_k"), train=train)
    jax.tree.map(np.testing.assert_array_equal, ours.routing, plain.routing)


def test_each_key_draws_one_coin_with_the_given_probability():
    """Whole steps are local or not; 400 draws at 0.3 have a standard deviation of 0.023."""
    gate = gating.GatingDropout(local_share=0.3)
    contexts = jax.vmap(lambda seed: Context.of(2, 1, key=jax.random.key(seed)).grouped(1, True))(
        jnp.arange(400)
    )
    local = np.asarray(jax.vmap(gate.is_local)(contexts))
    assert abs(np.mean(local) - 0.3) < 4 * 0.023
    for key in range(6):
        out, _ = route(gate, key)
        np.testing.assert_array_equal(out.means["local"], float(local[key]))
        at_home = out.routing.expert_GTK // 2 == jnp.arange(B)[:, None, None] // 4 % 4
        assert bool(at_home.all()) == local[key]
    assert 0 < sum(local[:6]) < 6, "both kinds of steps were seen"


def test_a_rows_shard_follows_from_its_id_and_not_from_its_position():
    """Micro-batches, and later steps, whose row ids continue those of the step before."""
    gate = gating.make("gating_dropout", **ALWAYS)
    whole, _ = route(gate)
    later, _ = route(gate, row_B=jnp.arange(B) + 7 * B)
    np.testing.assert_array_equal(later.routing.expert_GTK, whole.routing.expert_GTK)
    part, _ = route(gate, batch=8, row_B=jnp.arange(8) + 8)
    assert (part.routing.expert_GTK // 2 == (jnp.arange(8)[:, None, None] + 8) // 4 % 4).all()


@pytest.mark.parametrize(
    ("fields", "expert", "advice"),
    [
        ({}, 4, ""),
        ({}, 1, ""),
        ({"local_share": 0.0}, 2, ""),
        ({"local_shards": 0}, 2, ""),
        ({}, 2, "use gate.local_shards=2 and gate.local_rows=8"),
        ({"local_rows": 2}, 4, "use gate.local_shards=4 and gate.local_rows=4"),
    ],
)
def test_a_run_warns_at_its_start_if_fields_do_not_fit_the_mesh(fields, expert, advice):
    mesh = {"data": 1, "fsdp": 1, "expert": expert, "tensor": 2}
    model = SimpleNamespace(num_moe_layers=1, gate=gating.make("gating_dropout", **fields))
    run = SimpleNamespace(
        task=SimpleNamespace(model=model),
        mesh=SimpleNamespace(shape=mesh),
        config=SimpleNamespace(train=SimpleNamespace(batch_size=B)),
    )
    said = gate_advice(cast(Run, run))
    assert said.endswith(advice) and bool(said) == bool(advice) and "\n" not in said
    assert not said or said.startswith("moe.gate.local_shards=")
    model.gate = gating.make("mixtral")
    assert gate_advice(cast(Run, run)) == ""


def rows_sent(shape, routing):
    """Rows that each device sends to each shard of experts, from dropless's own offsets."""

    def sizes(expert_gTK, weight_gTK):
        flat = (a.reshape(-1, K) for a in (expert_gTK, weight_gTK))
        _, size_E = pack.plan_sorted(*flat, num_experts=E, rows=expert_gTK.size)
        site = exchange.Site(shards=shape["expert"], expert_axis="expert")
        return exchange.plan_traffic(size_E, site).there_send[None]

    mesh = jax.sharding.get_abstract_mesh()
    spec = batch_spec(mesh)
    run = jax.shard_map(sizes, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    send_SE = np.asarray(jax.jit(run)(routing.expert_GTK, routing.weight_GTK))
    return send_SE.reshape(len(send_SE), shape["expert"], -1).sum(-1)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("shape", "share"),
    [({"expert": 4}, 1.0), ({"data": 2, "expert": 4}, 1.0), ({"data": 2, "expert": 4}, 0.0)],
)
def test_a_local_step_sends_nothing_and_another_step_most_of_its_pairs(shape, share, eight_devices):
    shards = shape["expert"] * shape.get("data", 1)
    gate = gating.make("gating_dropout", local_share=share, local_shards=4, local_rows=B // shards)
    plain, _ = route(gate)
    with meshes.entered(shape):
        out, _ = route(gate)
        sent = rows_sent(shape, out.routing)
    np.testing.assert_array_equal(out.routing.expert_GTK, plain.routing.expert_GTK)
    assert sent.sum() == B * L * K, "dropless sends every pair"
    own = np.arange(shards) % shape["expert"]
    abroad = sent.sum() - sent[np.arange(shards), own].sum()
    if share:
        assert abroad == 0
    else:
        # Three of four experts are elsewhere: 144 of 192 pairs, give or take a few.
        assert abroad > 0.6 * sent.sum()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"local_share": 1.5}, r"gate\.local_share=1\.5 must lie in \[0, 1\]"),
        ({"local_shards": 3}, r"gate\.local_shards=3 does not divide num_experts=8"),
        ({"k": 3}, r"gate\.k=3 exceeds the 2 experts .* gate\.local_shards=4"),
        ({"local_rows": 0}, r"gate\.local_rows=0 must be above 0"),
    ],
)
def test_fields_that_contradict_each_other_are_reported_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        gating.make("gating_dropout", **fields).check(E, train=True)
    assert "\n" not in str(caught.value)
