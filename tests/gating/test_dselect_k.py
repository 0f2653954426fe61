"""DSelect-k: worked numbers, smoothness, identities, losses, tasks and cuts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import moejax
from moejax import gating
from moejax.gating.solvers.selectors import code_bits, selectors
from moejax.types import Context, GateSpec

D = 6


def call(gate, x, num_experts, *, params=None, train=True, num_tasks=1, **known):
    spec = GateSpec(D, num_experts, num_tasks=num_tasks)
    params = gate.init(jax.random.key(1), spec) if params is None else params
    context = Context.of(*x.shape[:2], **known).grouped(1, train)
    return gate(params, gate.init_state(spec), x, context)


def tokens(groups=2, length=5, seed=0):
    return jax.random.normal(jax.random.key(seed), (groups, length, D))


def test_the_worked_example_is_reproduced():
    """Five experts have codes of three bits."""
    z = jnp.asarray([0.1, -0.2, 0.3])
    np.testing.assert_allclose(gating.smooth_step(z, 1.0), [0.648, 0.216, 0.896], rtol=1e-6)
    wanted = [0.028701, 0.247267, 0.007907, 0.068125, 0.052835]
    got = gating.dselect_k_weights(z[None], jnp.zeros(1), 5, 1.0)
    np.testing.assert_allclose(got, wanted, atol=5e-7)  # the digits given
    np.testing.assert_allclose(1 / got.sum(), 2.4701, atol=5e-5)


def test_the_smooth_step_equals_the_papers_and_is_flat_outside():
    for gamma in (0.5, 1.0, 3.0):
        z = jnp.linspace(-0.49, 0.49, 21) * gamma
        wanted = -2 / gamma**3 * z**3 + 3 / (2 * gamma) * z + 0.5
        np.testing.assert_allclose(gating.smooth_step(z, gamma), wanted, atol=1e-6)
        outside = gating.smooth_step(jnp.asarray([-9.0, -0.5, 0.5, 9.0]) * gamma, gamma)
        np.testing.assert_array_equal(outside, [0.0, 0.0, 1.0, 1.0])


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_smooth_step_has_a_continuous_derivative_at_its_knots(gamma):
    """Central differences across the knots agree with the gradient; those of top-k would not."""
    knots = jnp.asarray([-gamma / 2, 0.0, gamma / 2])
    slope = jax.vmap(jax.grad(lambda z: gating.smooth_step(z, gamma)))(knots)
    np.testing.assert_allclose(slope, [0.0, 1.5 / gamma, 0.0], atol=1e-6)
    step = 1e-3
    for knot, wanted in zip(knots, slope, strict=True):
        high, low = gating.smooth_step(jnp.asarray([knot + step, knot - step]), gamma)
        # The second derivative jumps by 6 / gamma^2 there: differences are off by step times that.
        assert abs((high - low) / (2 * step) - wanted) < 6 / gamma**2 * step + 1e-4


def test_selectors_are_products_over_the_bits_of_each_code():
    """By enumeration of all codes, most significant bit first."""
    z = jnp.asarray([0.2, -0.1, 0.4, 0.05])
    one = np.asarray(gating.smooth_step(z, 1.0))
    got = selectors(z[None], jnp.arange(16), 1.0)[0]
    for expert, bits in enumerate(itertools.product([0, 1], repeat=4)):
        wanted = np.prod([p if bit else 1 - p for p, bit in zip(one, bits, strict=True)])
        np.testing.assert_allclose(got[expert], wanted, rtol=1e-5)
    np.testing.assert_allclose(got.sum(), 1.0, rtol=1e-6)


@pytest.mark.parametrize(("experts", "bits"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (64, 6)])
def test_codes_have_as_many_bits_as_needed(experts, bits):
    assert code_bits(experts) == bits
    weight = gating.dselect_k_weights(jnp.zeros((2, bits)), jnp.zeros(2), experts, 1.0)
    np.testing.assert_allclose(weight, 1 / 2**bits, rtol=1e-6)
    with pytest.raises(ValueError, match=f"num_experts={experts} have codes of {bits} bits"):
        gating.dselect_k_weights(jnp.zeros((2, bits + 1)), jnp.zeros(2), experts, 1.0)


def test_a_narrow_step_selects_exactly_one_expert_per_selector():
    z = jnp.asarray([[1.0, -1.0, 1.0], [-1.0, -1.0, 1.0]])
    weight = gating.dselect_k_weights(z, jnp.log(jnp.asarray([3.0, 1.0])), 8, 1e-3)
    np.testing.assert_allclose(weight, [0, 0.25, 0, 0, 0, 0.75, 0, 0], rtol=1e-6)
    assert (weight > 0).sum() == 2


def test_all_experts_are_visited_until_bits_decide_and_then_only_existing_ones():
    gate, x = gating.make("dselect_k", k=2), tokens()
    assert (call(gate, x, 8).routing.weight_GTK > 0).all()
    params = gate.init(jax.random.key(1), GateSpec(D, 8))
    decided = call(gate, x, 8, params=jax.tree.map(lambda p: 1e4 * p, params))
    active = (decided.routing.weight_GTK > 0).sum(-1)
    assert active.min() >= 1 and active.max() <= 2


@pytest.mark.slow
def test_the_gradient_equals_the_formula_through_every_transport():
    """Inactive pairs are not sent; their gradient is 0, as in the formula."""
    x, grads = tokens(4, 8), {}
    for transport in ("dropless", "all_experts", "gather"):
        gate = gating.make("dselect_k", gamma=0.1)
        layer = moejax.MoE(D, 8, 4, gate=gate, transport=transport, rngs=nnx.Rngs(0))
        for leaf in jax.tree.leaves(layer.router, is_leaf=lambda p: isinstance(p, nnx.Param)):
            leaf[...] = leaf[...] * 30  # some bits decided, some not
        graph, params = nnx.split(layer)

        def task(params, graph=graph):
            y, info = nnx.merge(graph, params)(x)
            return jnp.sum(jnp.sin(y)), info.stats.load_E

        grads[transport], load = jax.grad(task, has_aux=True)(params)
        assert 0 < load.sum() < 4 * 8 * 4
    # float32 sums in another order.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    for other in ("all_experts", "gather"):
        jax.tree.map(close, nnx.to_pure_dict(grads["dropless"]), nnx.to_pure_dict(grads[other]))


@pytest.mark.parametrize("per_example", [True, False])
def test_a_static_gate_chooses_the_same_for_all_tokens_and_a_per_example_gate_does_not(per_example):
    gate = gating.make("dselect_k", per_example=per_example)
    weight = call(gate, 5 * tokens(), 8).routing.weight_GTK
    assert bool((weight == weight[0, 0]).all()) != per_example


@pytest.mark.slow
def test_each_task_has_its_own_gate():
    gate, x = gating.make("dselect_k"), tokens(3)
    params = gate.init(jax.random.key(1), GateSpec(D, 8, num_tasks=2))
    known = {"params": params, "num_tasks": 2, "task_B": jnp.asarray([0, 1, 1])}
    mixed = call(gate, x, 8, **known).routing.weight_GTK
    for row, task in enumerate([0, 1, 1]):
        own = jax.tree.map(lambda p, task=task: p[task : task + 1], params)
        alone = call(gate, x, 8, params=own).routing.weight_GTK
        np.testing.assert_allclose(mixed[row], alone[row], rtol=1e-5)  # another matmul


def test_the_losses_are_means_over_valid_tokens_in_training_only():
    gate = gating.make("dselect_k", k=2, entropy_weight=0.5, entropy_steps=10, penalty_weight=2.0)
    x, valid = tokens(2, 4), jnp.asarray([[True] * 4, [True, False, False, False]])
    params = gate.init(jax.random.key(1), GateSpec(D, 5))
    out = call(gate, x, 5, params=params, valid_BL=valid, step=jnp.int32(5))
    entropy, mass = [], []
    for t in x[valid]:
        z = (t @ params["code_MDZ"][0] + params["code_MZ"][0]).reshape(2, 3)
        r = np.asarray(selectors(z, jnp.arange(5), 1.0), np.float64)
        entropy.append(-(r * np.log(r + 1e-6)).sum())
        mass.append((1 / (r.sum(-1) + 1e-6)).sum())
    np.testing.assert_allclose(
        out.losses["dselect_entropy"], 0.5 * 5 / 10 * np.mean(entropy), rtol=1e-5
    )
    np.testing.assert_allclose(out.losses["dselect_range"], 2.0 * np.mean(mass), rtol=1e-5)
    assert call(gate, x, 5, train=False).losses == {}
    assert set(call(gate, x, 8).losses) == {"dselect_entropy"}


def test_pairs_cut_by_max_active_count_as_dropped():
    gate = gating.make("dselect_k", max_active=3)
    layer = moejax.MoE(D, 8, 8, gate=gate, transport="dropless", rngs=nnx.Rngs(0))
    valid = jnp.arange(5) < jnp.asarray([[5], [3]])
    _, info = layer(tokens(), Context.of(2, 5, valid_BL=valid))
    assert info.routing.expert_GTK.shape == (2, 5, 3)
    assert info.stats.load_E.sum() == 8 * 8, "every undecided weight is positive"
    assert info.stats.dropped_E.sum() == info.stats.dropped_L.sum() == 8 * 5
    np.testing.assert_array_equal(info.stats.dropped_L, [10, 10, 10, 5, 5])
    full = moejax.MoE(
        D, 8, 8, gate=gating.make("dselect_k"), transport="dropless", rngs=nnx.Rngs(0)
    )
    _, whole = full(tokens(), Context.of(2, 5, valid_BL=valid))
    heaviest = np.sort(whole.routing.weight_GTK, -1)[..., :-4:-1]
    np.testing.assert_allclose(info.routing.weight_GTK, heaviest)


@pytest.mark.slow
def test_training_decides_the_bits():
    """Adam on a task that needs two of four experts: the other weights end at exactly 0."""
    wanted = jnp.asarray([0.0, 0.7, 0.0, 0.3])
    gate = gating.make("dselect_k", per_example=False, entropy_weight=0.01)
    params, x = gate.init(jax.random.key(0), GateSpec(D, 4)), tokens(1, 1)
    adam = optax.adam(0.02)

    @jax.jit
    def step(params, state):
        def loss(params):
            out = call(gate, x, 4, params=params)
            error = jnp.sum((out.routing.weight_GTK[0, 0] - wanted) ** 2)
            return error + sum(out.losses.values())

        updates, state = adam.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = adam.init(params)
    for _ in range(300):
        params, state = step(params, state)
    weight = call(gate, x, 4, params=params).routing.weight_GTK[0, 0]
    np.testing.assert_allclose(weight, wanted, atol=0.02)
    assert (weight > 0).sum() == 2
