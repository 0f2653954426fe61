"""ReMoE: the loss's formula, the controller against plain Python, continuity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax import gating, losses
from moejax.types import Context, GateSpec, MoEStats
from tests import steps

G, T, D, E = 3, 16, 6, 8


def tokens():
    return jax.random.normal(jax.random.key(0), (G, T, D))


def call(gate, train=True, state=None, **known):
    params = gate.init(jax.random.key(1), GateSpec(D, E))
    state = gate.init_state(GateSpec(D, E)) if state is None else state
    return gate(params, state, tokens(), Context.of(G, T, **known).grouped(1, train)), params


def test_weights_are_the_relu_of_the_logits():
    out, params = call(gating.make("remoe"))
    logits = np.asarray(tokens(), np.float64) @ np.asarray(params["router_DE"], np.float64)
    np.testing.assert_allclose(out.routing.weight_GTK, np.maximum(logits, 0), atol=1e-6)
    active = out.routing.weight_GTK > 0
    assert 0.3 < active.mean() < 0.7, "about half of all experts at the start"


def test_the_loss_is_lambda_times_the_switch_loss_of_relu_weights():
    """In numpy by the paper's formula, group by group; then by our Switch loss."""
    gate = gating.make("remoe", k=3)
    valid = np.arange(T) < np.array([[T], [T - 5], [3]])
    out, params = call(gate, state={"lambda": jnp.float32(0.25)}, valid_BL=jnp.asarray(valid))
    g = np.maximum(np.asarray(tokens(), np.float64) @ np.asarray(params["router_DE"]), 0)
    wanted = 0.0
    for row, own in zip(g, valid, strict=True):
        count, share = own.sum(), own.sum() / valid.sum()
        kept = row[own]
        wanted += share * E / (3 * count**2) * (kept.sum(0) * (kept > 0).sum(0)).sum()
    np.testing.assert_allclose(out.losses["remoe_l1"], 0.25 * wanted, rtol=1e-5)
    # Switch's f counts shares of all pairs; ReMoE's divides by k T in their place.
    row, own = g[0], valid[0]
    pairs = (row > 0).sum()
    switch = losses.load_balance(
        jnp.asarray((row > 0).sum(0)[None], jnp.float32), jnp.asarray(row[None], jnp.float32),
        jnp.asarray(own[None]),
    )  # fmt: skip
    one = gate(
        params, {"lambda": jnp.float32(1.0)}, tokens()[:1], Context.of(1, T).grouped(1, True)
    )
    np.testing.assert_allclose(one.losses["remoe_l1"], switch * pairs / (3 * T), rtol=1e-5)
    assert call(gate, train=False)[0].losses == {}


def test_only_active_experts_get_a_gradient_from_the_loss():
    gate = gating.make("remoe")
    x = tokens()[:1, :1]

    def loss(params):
        out = gate(params, {"lambda": jnp.float32(1.0)}, x, Context.of(1, 1).grouped(1, True))
        return sum(out.losses.values())

    params = gate.init(jax.random.key(1), GateSpec(D, E))
    moved_E = (jax.grad(loss)(params)["router_DE"] != 0).any(0)
    np.testing.assert_array_equal(moved_E, (x[0, 0] @ params["router_DE"]) > 0)


@pytest.mark.slow
def test_lambda_equals_that_of_a_controller_in_plain_python():
    """Over steps of the trainer, from the pairs it logged (cut ones too), layer by layer."""
    fields = {"k": 4, "max_active": 3, "lambda_init": 1e-3, "lambda_factor": 3.0}
    fields = {f"moe__gate__{name}": value for name, value in fields.items()}
    run = steps.make({"data": 1}, "remoe", optim__learning_rate=0.05, **fields)
    wanted, turns = np.full(2, 1e-3), []
    state = run.init_state()
    with jax.set_mesh(run.mesh):
        for step in range(8):
            before = np.asarray(state.gate_state["lambda"])
            np.testing.assert_allclose(before, wanted, rtol=1e-5)  # float32 products
            state, metrics = run.train_step(state, run.put(steps.batch(step)))
            stats = jax.device_get(metrics["totals"].stats)
            # The lambda used is that of before the update.
            np.testing.assert_allclose(stats.gate["lambda"] / stats.tokens, before, rtol=1e-5)
            sparsity = [1 - int(stats.load_E[i].sum()) / (int(stats.tokens[i]) * 8) for i in (0, 1)]
            too_dense = [s < 1 - 4 / 8 for s in sparsity]
            wanted = [w * 3 if up else w / 3 for w, up in zip(wanted, too_dense, strict=True)]
            turns += too_dense
    assert state.gate_state["lambda"].dtype == jnp.float32
    assert 0 < sum(turns) < len(turns), "it went up and down"


@pytest.mark.parametrize(("pairs", "wanted"), [(39, 0.5 / 1.2), (40, 0.5 / 1.2), (41, 0.5 * 1.2)])
def test_lambda_rises_only_where_tokens_visit_more_than_k_experts(pairs, wanted):
    """Twenty tokens and k = 2: 40 pairs are exactly k for each, and not too many."""
    zero, load_E = jnp.int32(0), jnp.zeros(E, jnp.int32).at[3].set(pairs)
    known = MoEStats(jnp.int32(20), load_E, 0 * load_E, zero, zero, zero, load_E / 2, zero)
    after = gating.make("remoe", k=2).update({"lambda": jnp.float32(0.5)}, known)
    np.testing.assert_allclose(after["lambda"], wanted, rtol=1e-6)  # float32


def test_lambda_never_reaches_0_or_infinity():
    gate = gating.make("remoe")
    out, _ = call(gate)
    from tests.gates import stats_of

    stats = stats_of(out, jnp.ones((G, T), bool))
    for pairs, start in ((0, 1e-20), (1000, 1e20)):
        given = {"lambda": jnp.float32(start)}
        load = jnp.zeros(E, jnp.int32).at[0].set(pairs)
        after = gate.update(given, moejax.types.dataclasses.replace(stats, load_E=load))
        np.testing.assert_allclose(after["lambda"], start, rtol=1e-6)


def along(gate_name, **fields):
    """The layer's output along a segment between two tokens: the largest change from one of a
    thousand points to the next, that over ten of them, and how often experts come or go."""
    gate = gating.make(gate_name, **fields)
    layer = moejax.MoE(D, 8, E, gate=gate, transport="dropless", rngs=nnx.Rngs(0))
    layer.router["router_DE"][...] = jax.random.normal(jax.random.key(5), (D, E))
    ends = jax.random.normal(jax.random.key(6), (2, D))
    s = jnp.linspace(0, 1, 1001)[:, None]
    y, info = jax.jit(lambda x: layer(x, train=False))(((1 - s) * ends[0] + s * ends[1])[None])
    pairs = jax.nn.one_hot(info.routing.expert_GTK, E) * (info.routing.weight_GTK > 0)[..., None]
    visited = np.asarray(pairs.sum(2)[0])
    fine, coarse = (np.abs(np.diff(np.asarray(y[0, ::n]), axis=0)).max() for n in (1, 10))
    return fine, coarse, np.abs(np.diff(visited, axis=0)).sum()


@pytest.mark.slow
def test_the_output_is_continuous_where_that_of_top_k_jumps():
    """Ten times finer steps make ten times smaller changes, or the same jump."""
    fine, coarse, changes = along("remoe")
    assert changes >= 2, "experts come and go on the way"
    assert fine < coarse / 5
    jump, coarse_jump, switches = along("top_k", k=2)
    assert switches >= 2 and jump > coarse_jump / 2 and jump > 5 * fine


@pytest.mark.parametrize(
    "fields",
    [
        {"lambda_init": 0.0},
        {"lambda_factor": 1.0},
        {"k": 0},
        {"max_active": 9},
        {"init_scale": 0.0},
    ],
)
def test_values_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        gating.make("remoe", **fields).check(E, train=True)
