"""BASE, S-BASE and DSelect-k in the layer: load, drops, state, and equality on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import gating
from moejax.gating import base_layer as base
from moejax.options import DispatchOptions
from moejax.types import Context, GateSpec
from tests import meshes
from tests.moes import B, D, E, L, context, make, run, same, tokens

CASES = {
    "base": ("base", {"transport": "cells"}),
    "base-two": ("base", {"transport": "dropless", "group": "2"}),
    "base-batch": ("base", {"transport": "dropless", "group": "batch"}),
    "sbase": ("sbase", {"transport": "cells"}),
    "sbase-batch": ("sbase", {"transport": "gather", "group": "batch"}),
    "sbase-rounded": ("sbase", {"gate_fields": (("rounding", "balanced"),)}),
    "sbase-top2-tol": (
        "sbase",
        {"transport": "dropless", "group": "4", "gate_fields": (("k", 2), ("tol", 1e-3))},
    ),
    "dselect_k": ("dselect_k", {"transport": "dropless"}),
    "dselect_k-cut": ("dselect_k", {"gate_fields": (("max_active", 3),)}),
}


def check(shape, case):
    gate, choices = CASES[case]
    valid = jnp.arange(L) < jnp.asarray([6, 6, 5, 6, 3, 6, 6, 4])[:, None]
    x, ctx = tokens(), context(valid_BL=valid)
    got, wanted = run(shape, gate, x, ctx, **choices), run(None, gate, x, ctx, **choices)
    same(got, wanted)
    stats, alone = got[0][1][1].stats, wanted[0][1][1].stats
    # Sums over groups in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), stats.gate, alone.gate)
    assert stats.gate and stats.load_E.sum() >= valid.sum()


SLOW = ("base-batch", "dselect_k-cut", "base-two", "sbase-top2-tol")


@pytest.mark.quick(1)
@pytest.mark.parametrize("case", ["sbase-batch", *SLOW])
def test_a_mesh_changes_nothing(case):
    """Groups that divide over the mesh, groups that do not, and one group for the whole batch."""
    check(meshes.LARGE, case)


NAMES = list(CASES)
PAIRWISE = [
    pytest.param(shape, NAMES[2 * i % len(NAMES)], id=meshes.name(shape))
    for i, shape in enumerate(meshes.ALL)
]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "case"), PAIRWISE)
def test_every_mesh_gives_the_same_results(shape, case):
    check(shape, case)


@pytest.mark.quick(1)
@pytest.mark.parametrize("group", ["sequence", "2"])
@pytest.mark.parametrize("fields", [("base", {}), ("sbase", {"rounding": "balanced"})])
def test_balanced_training_fills_every_slot_and_drops_nothing(fields, group):
    """Capacity is exactly tokens / experts, whatever the capacity factor."""
    gate, gate_fields = fields
    layer = make(gate, experts=3, gate_fields=gate_fields, group=group, capacity_factor=0.1)
    _, info = layer(tokens(), context())
    rows = layer.config.rows_per_group(B)
    assert layer.gate.capacity(rows * L, 3, 0.1) == rows * L // 3
    per_group = [np.bincount(g.ravel(), minlength=3) for g in np.asarray(info.routing.expert_GTK)]
    assert (np.asarray(per_group) == rows * L // 3).all() and info.kept_GTK.all()


@pytest.mark.slow
def test_base_balances_the_whole_batch_when_sequences_differ():
    """Each sequence prefers one expert: balancing per sequence must overrule it, per batch not."""
    x = tokens() + 20 * jax.random.normal(jax.random.key(9), (B, 1, D))
    whole = make("base", transport="dropless", group="batch")(x, context())[1]
    alone = make("base", transport="dropless")(x, context())[1]
    np.testing.assert_array_equal(whole.stats.load_E, B * L // E)
    kinds = lambda info: [
        len(set(row)) for row in np.asarray(info.routing.expert_GTK).reshape(B, L).tolist()
    ]
    assert np.mean(kinds(whole)) < np.mean(kinds(alone)) == L  # L < E: all different


def test_base_is_greedy_in_evaluation_and_keeps_a_share_of_its_input():
    layer, x = make("base", transport="dropless"), tokens()
    y, info = layer(x, train=False)
    score = x @ layer.router["router_DE"][...]
    np.testing.assert_array_equal(info.routing.expert_GTK[..., 0].reshape(B, L), score.argmax(-1))
    alpha = jax.nn.sigmoid(score.max(-1))
    np.testing.assert_allclose(info.routing.weight_GTK.reshape(B, L), alpha, rtol=1e-5)
    plain = make("base", transport="dropless", gate_fields={"residual": False})
    without, _ = plain(x, train=False)
    np.testing.assert_allclose(y, without + (1 - alpha)[..., None] * x, rtol=1e-5, atol=1e-6)


@pytest.mark.quick(1)
@pytest.mark.parametrize(("gate", "fields"), [
    ("base", {}), ("base", {"residual": False}), ("sbase", {}), ("sbase", {"k": 2}),
    ("sbase", {"score": "sigmoid"}), ("sbase", {"rounding": "balanced"}), ("dselect_k", {}),
    ("dselect_k", {"per_example": False}), ("dselect_k", {"k": 1, "max_active": 2}),
])  # fmt: skip
def test_the_task_gradient_reaches_every_parameter_of_the_gate(gate, fields):
    layer = make(gate, gate_fields=fields, transport="dropless")
    graph, params = nnx.split(layer)

    def task(params):
        return jnp.sum(jnp.sin(nnx.merge(graph, params)(tokens(), context())[0]))

    grads = nnx.to_pure_dict(jax.grad(task)(params))["router"]
    for name, grad in grads.items():
        assert jnp.isfinite(grad).all(), name
        # With one selector the mixing weight is the constant 1.
        assert (jnp.abs(grad).max() > 1e-5) or (fields.get("k") == 1 and "mix" in name), name


def test_the_average_bias_balances_evaluation_and_nothing_else_changes():
    layer = make("sbase", transport="dropless", gate_fields={"evaluation": "ema", "ema_decay": 0.5})
    layer.router["router_DE"][...] = jax.random.normal(jax.random.key(4), (D, E))
    x = tokens() + 1.0  # a common direction makes some experts everyone's favourite
    state = layer.init_gate_state()
    before = layer(x, gate_state=state, train=False)[1].stats.load_E
    for _ in range(3):
        _, info = layer(x, context(), gate_state=state)
        state = layer.update_gate_state(state, info.stats)
    mass = 1 - 0.5**3
    np.testing.assert_allclose(state["mass"], mass)
    np.testing.assert_allclose(
        state["bias_E"] / mass, info.stats.gate["bias"] / (B * L), rtol=1e-5, atol=1e-6
    )
    after = layer(x, gate_state=state, train=False)[1].stats.load_E
    assert after.max() < before.max()


@pytest.mark.slow
def test_residual_imbalance_is_reported_and_falls_with_epsilon():
    """The plan is balanced; the balance of its largest entries improves as it becomes sharper."""
    imbalance = {}
    for epsilon in (2.0, 0.05):
        sharp = make("sbase", transport="dropless", group="batch",
                     gate_fields={"epsilon": epsilon, "num_iters": 500})  # fmt: skip
        sharp.router["router_DE"][...] = jax.random.normal(jax.random.key(4), (D, E))
        stats = sharp(tokens() + 1.0, context())[1].stats
        assert stats.gate["column_error"] / stats.tokens < 0.02
        imbalance[epsilon] = float(stats.gate["residual_imbalance"] / stats.tokens)
        np.testing.assert_allclose(imbalance[epsilon], stats.load_E.max() / (B * L / E) - 1)
    assert imbalance[0.05] < imbalance[2.0]


@pytest.mark.parametrize(("gate", "group", "mark"), [
    ("base", "sequence", "train:future"), ("base", "batch", "train:future+others"),
    ("sbase", "4", "train:future+others"), ("dselect_k", "batch", ""),
])  # fmt: skip
def test_balancing_leaks_in_training_as_declared_and_not_in_evaluation(gate, group, mark):
    config = DispatchOptions(num_experts=E, transport="dropless", group=group).config
    assert make(gate).gate.visibility(config).mark == mark


def test_the_gap_of_an_assignment_is_reported_per_token(monkeypatch):
    """Groups of three and of two tokens, each 6 away from the optimum."""
    solve = base.balanced_assignments

    def far(score_GTE, valid_GT):
        return solve(score_GTE, valid_GT)._replace(gap=jnp.full(len(score_GTE), 6.0))

    monkeypatch.setattr(base, "balanced_assignments", far)
    gate = gating.make("base")
    valid = jnp.asarray([[True, True, True], [True, True, False]])
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    given = Context.of(2, 3, valid_BL=valid).grouped(1, True)
    means = jax.jit(lambda x: gate({"router_DE": jnp.eye(4)}, (), x, given).means)(x)
    np.testing.assert_array_equal(means["assignment_gap"], [2.0, 3.0])


def test_the_column_error_of_sinkhorn_counts_valid_tokens_only():
    """Padding that would all go to one expert does not enter the plan, which has converged."""
    gate = gating.make("sbase", num_iters=200, tol=0.0)
    x = jax.random.normal(jax.random.key(0), (2, 12, 4))
    valid = jnp.arange(12) < jnp.asarray([[12], [8]])
    x = jnp.where(valid[..., None], x, 9.0 * jnp.eye(4)[0])
    given = Context.of(2, 12, valid_BL=valid).grouped(1, True)
    state = gate.init_state(GateSpec(4, 4))
    means = jax.jit(lambda x: gate({"router_DE": jnp.eye(4)}, state, x, given).means)(x)
    assert (means["column_error"] < 1e-3).all()


@pytest.mark.slow
def test_one_expert_needs_no_balancing():
    for gate in ("base", "sbase"):
        layer = make(gate, experts=1)
        _, info = layer(tokens(), context())
        assert info.stats.load_E.tolist() == [B * L] and info.stats.dropped_E.sum() == 0
        assert layer.gate.visibility(layer.config).mark == ""


@pytest.mark.parametrize(("gate", "fields", "message"), [
    ("sbase", {"k": 9}, "gate.k=9"), ("sbase", {"epsilon": 0.0}, "gate.epsilon=0.0"),
    ("sbase", {"num_iters": 0}, "gate.num_iters=0"), ("sbase", {"tol": -1.0}, "gate.tol=-1.0"),
    ("sbase", {"rounding": "up"}, "gate.rounding='up' .* capacity, balanced"),
    ("sbase", {"rounding": "balanced", "k": 2}, "gate.k=2; use gate.k=1"),
    ("sbase", {"evaluation": "ot"}, "gate.evaluation='ot'"),
    ("sbase", {"ema_decay": 1.0}, "gate.ema_decay=1.0"), ("sbase", {"score": "relu"}, "gate.score"),
    ("base", {"init_scale": 0.0}, "gate.init_scale=0.0"),
    ("dselect_k", {"k": 9}, "gate.k=9"), ("dselect_k", {"gamma": 0.0}, "gate.gamma=0.0"),
    ("dselect_k", {"max_active": 9}, "gate.max_active=9"),
    ("dselect_k", {"entropy_weight": -1.0}, "gate.entropy_weight=-1.0"),
])  # fmt: skip
def test_values_out_of_range_are_refused_with_their_field(gate, fields, message):
    with pytest.raises(ValueError, match=message):
        make(gate, gate_fields=fields)


def test_state_is_read_and_never_written_by_the_layer():
    layer = make("sbase", gate_fields={"evaluation": "ema"})
    state = {"bias_E": jnp.arange(E, dtype=jnp.float32), "mass": jnp.float32(1.0)}
    _, trained = layer(tokens(), Context.of(B, L), gate_state=state)
    _, unbiased = layer(tokens(), Context.of(B, L))
    np.testing.assert_array_equal(trained.routing.expert_GTK, unbiased.routing.expert_GTK)
    _, evaluated = layer(tokens(), gate_state=state, train=False)
    assert (evaluated.routing.expert_GTK == E - 1).mean() > 0.9


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("gate", "fields"),
    [("sbase", {"evaluation": "ema"}), ("expert_choice_causal", {}), ("loss_free", {})],
)
def test_statistics_of_an_evaluation_cannot_update_the_state(gate, fields):
    layer = make(gate, transport="dropless", gate_fields=fields)
    state = layer.init_gate_state()
    _, info = layer(tokens(), context(), gate_state=state, train=False)
    with pytest.raises(ValueError, match="stats of an evaluation .* train=True"):
        layer.update_gate_state(state, info.stats)
    _, info = layer(tokens(), context(), gate_state=state)
    moved = layer.update_gate_state(state, info.stats)
    assert jax.tree.structure(moved) == jax.tree.structure(state)
