"""Plans against published examples and a Python loop; packing against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.dispatch import pack
from moejax.reference import kept_in_order

# The example of V-MoE's moe_test.py: 3 tokens, 3 experts, top 2, capacity 2.
VMOE_GATES = jnp.asarray([[0.4, 0.0, 0.2], [0.5, 0.1, 0.4], [0.3, 0.2, 0.6]])


def plan_for(expert, weight, score, num_experts, capacity, priority):
    return pack.plan_cells(
        expert, weight, score, num_experts=num_experts, capacity=capacity, priority=priority
    )


@pytest.mark.parametrize(
    ("priority", "slots"),
    [
        ("choice", [[(0, 0), (2, 1)], [(0, 1), (2, 2)], [(2, 0), (0, 2)]]),
        ("gate", [[(0, 1), (2, 2)], [(0, 0), (2, 1)], [(2, 0), (0, 2)]]),
    ],
)
def test_slots_equal_those_published_with_vmoe(priority, slots):
    """(expert, slot) of every choice; slot 2 of 2 means dropped."""
    weight, expert = jax.lax.top_k(VMOE_GATES, 2)
    plan = plan_for(expert[None], weight[None], weight[None, :, 0], 3, 2, priority)
    for t in range(3):
        for k in range(2):
            wanted_expert, wanted_slot = slots[t][k]
            assert expert[t, k] == wanted_expert
            assert bool(plan.kept_tK[t, k]) == (wanted_slot < 2)
            if wanted_slot < 2:
                assert plan.row_tK[t, k] == wanted_expert * 2 + wanted_slot


def serving_order_by_loop(priority, score, columns):
    tokens = len(score)
    by_score = sorted(range(tokens), key=lambda t: (-score[t], t))
    if priority == "position":
        return [(t, k) for t in range(tokens) for k in range(columns)]
    if priority == "random":
        return [(t, k) for t in by_score for k in range(columns)]
    order = range(tokens) if priority == "choice" else by_score
    return [(t, k) for k in range(columns) for t in order]


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["position", "choice", "gate", "random"]),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(0, 2**16),
)
def test_kept_pairs_agree_with_a_python_loop(priority, columns, capacity, seed):
    groups, tokens, num_experts = 2, 7, 4
    rng = np.random.default_rng(seed)
    expert = np.stack(
        [[rng.permutation(num_experts)[:columns] for _ in range(tokens)] for _ in range(groups)]
    )
    weight = rng.random((groups, tokens, columns)).astype(np.float32)
    weight[rng.random(weight.shape) < 0.2] = 0.0  # inactive columns and padding
    score = rng.integers(0, 3, (groups, tokens)).astype(np.float32)  # with ties
    arrays = jnp.asarray(expert), jnp.asarray(weight), jnp.asarray(score)
    plan = plan_for(*arrays, num_experts, capacity, priority)
    expected = [
        kept_in_order(
            expert[g].tolist(),
            weight[g].tolist(),
            capacity,
            serving_order_by_loop(priority, score[g].tolist(), columns),
        )
        for g in range(groups)
    ]
    np.testing.assert_array_equal(
        plan.kept_tK.reshape(groups, tokens, columns), np.asarray(expected)
    )
    check_inverse(plan, columns)


def check_inverse(plan, columns):
    """row -> pair and pair -> row undo each other, and every kept pair has a row of its own."""
    pairs = plan.kept_tK.size
    for row, pair in enumerate(np.asarray(plan.pair_M)):
        if pair < pairs:
            assert plan.kept_tK.reshape(-1)[pair] and plan.row_tK.reshape(-1)[pair] == row
    assert int((plan.pair_M < pairs).sum()) == int(plan.kept_tK.sum())


def test_sorted_plan_lists_pairs_by_expert_then_position():
    expert = jnp.asarray([[2, 0], [0, 1], [2, 1], [1, 0]])
    weight = jnp.asarray([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    plan, size = pack.plan_sorted(expert, weight, num_experts=3, rows=8)
    np.testing.assert_array_equal(size, [2, 1, 2])
    np.testing.assert_array_equal(plan.pair_M, [1, 2, 5, 0, 4, 8, 8, 8])
    np.testing.assert_array_equal(plan.kept_tK, weight > 0)
    check_inverse(plan, 2)


def test_pairs_of_experts_on_other_shards_have_no_row():
    """On a shard with experts 0 to 2: experts before and after these belong to other shards."""
    expert, weight = jnp.asarray([[-1, 2], [3, 0], [-2, 7]]), jnp.ones((3, 2))
    plan, size = pack.plan_sorted(expert, weight, num_experts=3, rows=6)
    np.testing.assert_array_equal(size, [1, 0, 1])
    np.testing.assert_array_equal(plan.kept_tK, [[False, True], [False, True], [False, False]])
    np.testing.assert_array_equal(plan.pair_M, [3, 1, 6, 6, 6, 6])


def test_pairs_are_sorted_even_if_their_keys_exceed_int32():
    many = 2**30
    expert, place = pack._stable_sort(jnp.asarray([many, 5, many, 0, 5, many - 1]), many)
    np.testing.assert_array_equal(expert, [0, 5, 5, many - 1, many, many])
    np.testing.assert_array_equal(place, [3, 1, 4, 5, 0, 2])


def test_one_row_stands_for_all_pairs_of_a_token_on_a_shard():
    expert = jnp.asarray([[0, 1, 3], [2, 3, 0], [1, 0, 2]])
    weight = jnp.asarray([[0.1, 0.8, 0.1], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
    visits, size = pack.plan_visits(expert, weight, shards=2, own=2)
    np.testing.assert_array_equal(size, [2, 3])
    np.testing.assert_array_equal(visits.pair_M, [0, 7, 2, 3, 8, 9])  # by shard, then by pair
    check_inverse(visits, 3)
    rows, x = jnp.arange(6.0)[:, None], jnp.asarray([[1.0], [10.0], [100.0]])
    np.testing.assert_array_equal(pack.gather_rows(x, visits)[:, 0], [1, 100, 1, 10, 100, 0])
    np.testing.assert_array_equal(pack.sum_rows(rows, visits)[:, 0], [0 + 2, 3, 1 + 4])
    gradient = jax.grad(lambda r: jnp.vdot(pack.sum_rows(r, visits), x))(rows)
    np.testing.assert_array_equal(gradient, pack.gather_rows(x, visits))


def test_gather_and_combine_have_the_gradients_of_their_definitions():
    """Against plain indexing differentiated by JAX, in float32: sums of at most 6 terms."""
    rng = np.random.default_rng(0)
    expert = jnp.asarray(rng.integers(0, 4, (2, 6, 1)))
    expert = jnp.concatenate([expert, (expert + 1) % 4], -1)
    weight = jnp.asarray(rng.random((2, 6, 2)), jnp.float32).at[0, 2].set(0.0)
    plan = plan_for(expert, weight, jnp.zeros((2, 6)), 4, 2, "position")
    assert 0 < int(plan.kept_tK.sum()) < int((weight > 0).sum())  # something is dropped
    x = jnp.asarray(rng.normal(size=(12, 5)), jnp.float32)
    mixer = jnp.asarray(rng.normal(size=(plan.pair_M.size, 5)), jnp.float32)
    flat_weight = weight.reshape(12, 2)

    def ours(x, w):
        rows = pack.gather_rows(x, plan) * mixer
        return jnp.sum(jnp.sin(pack.combine_rows(rows, w, plan)))

    def plain(x, w):
        token = plan.pair_M // 2
        rows = jnp.where((token < 12)[:, None], x[jnp.minimum(token, 11)], 0.0) * mixer
        picked = rows[plan.row_tK] * plan.kept_tK[..., None]
        return jnp.sum(jnp.sin(jnp.sum(w[..., None] * picked, axis=1)))

    np.testing.assert_allclose(ours(x, flat_weight), plain(x, flat_weight), rtol=1e-6)
    for got, wanted in zip(
        jax.grad(ours, (0, 1))(x, flat_weight), jax.grad(plain, (0, 1))(x, flat_weight), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_unused_rows_may_hold_anything():
    plan, _ = pack.plan_sorted(
        jnp.asarray([[0], [1]]), jnp.asarray([[0.0], [1.0]]), num_experts=2, rows=2
    )
    rows = jnp.asarray([[3.0], [jnp.nan]])
    y = pack.combine_rows(rows, jnp.asarray([[0.0], [1.0]]), plan)
    np.testing.assert_array_equal(y, [[0.0], [3.0]])
    gradient = jax.grad(lambda r, w: pack.combine_rows(r, w, plan).sum(), (0, 1))(
        rows, jnp.asarray([[0.0], [1.0]])
    )
    assert all(jnp.isfinite(g).all() for g in gradient)


def test_no_activation_is_scattered_forward_or_backward():
    """Packing and combining are gathers both ways; only int32 index plans are scattered."""
    expert, weight = jnp.zeros((1, 8, 2), jnp.int32).at[..., 1].set(1), jnp.ones((1, 8, 2))

    def step(x, weight):
        plan = plan_for(expert, weight, weight[..., 0], 4, 3, "position")
        return pack.combine_rows(pack.gather_rows(x, plan), weight.reshape(8, 2), plan).sum()

    text = str(jax.make_jaxpr(jax.grad(step, (0, 1)))(jnp.ones((8, 4)), weight))
    scattered = [line for line in text.splitlines() if "scatter" in line and ":f32" in line]
    assert not scattered, scattered
