"""Tables of several tasks: generators against their formulas, batches by step."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.contrib.multitask import generated
from moejax.contrib.multitask.generated import correlated, draw_correlated, draw_groups, groups
from moejax.contrib.multitask.tables import as_rows, make_table
from moejax.data.batches import TrainBatches, heldout_batches
from moejax.errors import UserError

N = 20_000


def pearson(y_NM) -> float:
    return float(np.corrcoef(y_NM.T)[0, 1])


# The correlated tasks.


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, 1.0])
def test_labels_equal_the_papers_formula_plus_noise(rho):
    """By a loop: the project's sum over waves is vectorised over rows."""
    drawn = draw_correlated(0, 200, rho)
    for n in range(0, 200, 50):
        for m in range(2):
            t = float(drawn.w_MD[m] @ drawn.x_ND[n])
            waves = sum(np.sin(alpha * t + (alpha - 1) ** 2) for alpha in range(1, 11))
            np.testing.assert_allclose(drawn.clean_NM[n, m], t + waves, atol=1e-9)
    noise = drawn.y_NM - drawn.clean_NM
    assert 0.008 < noise.std() < 0.012  # 0.01, of 400 draws
    cosine = drawn.w_MD[0] @ drawn.w_MD[1] / np.prod(np.linalg.norm(drawn.w_MD, axis=1))
    np.testing.assert_allclose(cosine, rho, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(drawn.w_MD, axis=1), 1.0, atol=1e-12)


def test_inputs_and_labels_have_the_moments_of_their_distribution():
    drawn = draw_correlated(1, N, 0.5)
    # Standard errors at 20000 draws: 0.007 of a mean, 0.01 of a variance.
    np.testing.assert_allclose(drawn.x_ND.mean(axis=0), 0.0, atol=0.04)
    np.testing.assert_allclose(drawn.x_ND.var(axis=0), 1.0, atol=0.06)
    product = drawn.x_ND @ drawn.w_MD.T
    np.testing.assert_allclose(np.corrcoef(product.T)[0, 1], 0.5, atol=0.03)


def test_the_labels_correlation_grows_with_rho_to_one():
    found = [pearson(draw_correlated(0, N, rho).y_NM) for rho in (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)]
    assert all(a < b for a, b in zip(found, found[1:], strict=False))
    assert abs(found[0]) < 0.03 and found[-1] > 0.9999  # noise 0.01 beside a spread of 2.6


def test_a_seed_determines_the_table_and_rho_is_checked():
    assert correlated(3, 50, 0.9).fingerprint == correlated(3, 50, 0.9).fingerprint
    assert correlated(3, 50, 0.9).fingerprint != correlated(4, 50, 0.9).fingerprint
    assert correlated(3, 50, 0.9).fingerprint != correlated(3, 50, 0.5).fingerprint
    with pytest.raises(UserError, match=r"task.rho: 1.5 is not between"):
        correlated(0, 50, 1.5)


# Two groups of tasks.


def test_tasks_of_a_group_share_experts_and_those_of_different_groups_none():
    drawn = draw_groups(0, 2000, 8)
    assert (drawn.weight_ME[:4, :4] > 0).all() and not drawn.weight_ME[:4, 4:].any()
    assert (drawn.weight_ME[4:, 4:] > 0).all() and not drawn.weight_ME[4:, :4].any()
    np.testing.assert_allclose(drawn.weight_ME.sum(axis=1), 1.0)
    # Four functions explain the labels of one group, whatever its tasks, and eight those of both.
    many = draw_groups(0, 500, 32).clean_NM
    assert np.linalg.matrix_rank(many[:, :16] - many[:, :16].mean(0), tol=1e-8) == 4
    assert np.linalg.matrix_rank(many - many.mean(0), tol=1e-8) == 8


def test_an_odd_number_of_tasks_is_refused():
    with pytest.raises(UserError, match=r"task.tasks: 5 tasks do not make two groups"):
        groups(0, 100, 5)


# The recommender.


@pytest.fixture(scope="module")
def watched() -> generated.Recommender:
    return generated.draw_recommender(0, N)


def test_parts_explain_the_ratings_variance_as_designed(watched):
    """Alone, each part's squared correlation with the rating is its share; parts are nearly
    uncorrelated over 200 items (0.07 of standard error each)."""
    rating_N = watched.target_NM[:, 0]
    for column, part in enumerate(("user", "item", "affinity")):
        share = np.corrcoef(rating_N, watched.part_NP[:, column])[0, 1] ** 2
        assert abs(share - generated.RATING_SHARES[part]) < 0.08
    residual = rating_N - watched.ideal_NM[:, 0]
    np.testing.assert_allclose(residual.var(), generated.RATING_SHARES["noise"], rtol=0.05)


def test_knowledge_of_the_structure_beats_the_mean(watched):
    finished_N, chance_N = watched.target_NM[:, 1], watched.ideal_NM[:, 1]

    def log_loss(p):
        return -np.mean(finished_N * np.log(p) + (1 - finished_N) * np.log(1 - p))

    assert log_loss(chance_N) < log_loss(finished_N.mean()) - 0.1
    # Calibrated: of the views that should be finished with p = 0.4 to 0.6, half are.
    middle = np.abs(chance_N - 0.5) < 0.1
    assert abs(finished_N[middle].mean() - chance_N[middle].mean()) < 0.03


def test_the_hidden_factors_can_be_recovered_from_the_rows_alone(watched):
    """Least squares on one-hot users and items: the designed 35 % of the rating's variance, from
    training rows, measured on others."""
    user_N, item_N = watched.category_NC[:, 0], watched.category_NC[:, 1]
    onehot = np.concatenate([np.eye(500)[user_N], np.eye(200)[item_N]], axis=1)
    rating_N, cut = watched.target_NM[:, 0], N * 4 // 5
    gram = onehot[:cut].T @ onehot[:cut] + np.eye(700)
    mean = rating_N[:cut].mean()
    fitted = onehot[cut:] @ np.linalg.solve(gram, onehot[:cut].T @ (rating_N[:cut] - mean)) + mean
    explained = 1 - np.mean((rating_N[cut:] - fitted) ** 2) / rating_N[cut:].var()
    # Additive effects can also use part of the affinity, whose mean by user or item is not 0.
    assert 0.25 < explained < 0.75


def test_tasks_share_the_requested_structure():
    def overlap(shared):
        drawn = generated.draw_recommender(0, N, shared=shared)
        return pearson(drawn.target_NM)

    assert overlap(0.0) < overlap(0.5) < overlap(1.0)


def test_items_have_a_long_tail(watched):
    count_I = np.sort(np.bincount(watched.category_NC[:, 1], minlength=200))[::-1]
    wanted = N / np.arange(1, 201) / np.sum(1 / np.arange(1, 201))
    np.testing.assert_allclose(count_I[:20], wanted[:20], rtol=0.15)
    assert count_I[:20].sum() > 0.5 * N


def test_ids_are_below_the_sizes_of_their_columns():
    table = generated.recommender(0, 2000)
    for rows in (table.train, table.heldout):
        assert (rows.category_NC >= 0).all()
        assert (rows.category_NC < np.array(table.category_sizes)).all()
    assert [t.kind for t in table.targets] == ["regression", "binary"]
    assert table.ideal_NM is not None and len(table.ideal_NM) == len(table.heldout) == 200


# Batches.


def numbered(count):
    """Rows whose only feature is their number."""
    rows = as_rows(np.arange(count)[:, None], None, np.arange(count)[:, None] % 2.0)
    return dataclasses.replace(rows, target_NM=rows.target_NM.astype(np.float32))


def train_batches(count, batch_size, seed):
    rows = numbered(count)
    return TrainBatches(len(rows), batch_size, seed, rows.read)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 1000))
def test_every_epoch_has_every_row_once(rows, batch_size, seed):
    batches = train_batches(rows, batch_size, seed)
    steps = -(-2 * rows // batch_size)
    seen = np.concatenate([batches.batch(step)["dense"][:, 0] for step in range(steps)])
    for epoch in (seen[:rows], seen[rows : 2 * rows]):
        assert sorted(epoch) == list(range(rows))


def test_a_batch_depends_on_the_step_alone_and_a_hosts_share_is_a_slice():
    one, other = (train_batches(30, 8, 5) for _ in range(2))
    for step in (7, 0, 3):
        whole, part = one.batch(step), other.batch(step, slice(2, 6))
        for name in whole:
            np.testing.assert_array_equal(part[name], whole[name][2:6])
    assert one.batch(3)["row"].tolist() == list(range(24, 32))
    assert {name: (x.shape, x.dtype.name) for name, x in one.batch(0).items()} == {
        "dense": ((8, 1), "float32"),
        "category": ((8, 0), "int32"),
        "target": ((8, 1), "float32"),
        "present": ((8, 1), "bool"),
        "valid": ((8,), "bool"),
        "row": ((8,), "int32"),
    }


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 60))
def test_evaluation_has_each_chosen_row_once_and_padding_is_invalid(rows, batch_size, count):
    batches = heldout_batches(rows, batch_size, count, numbered(rows).read)
    seen = np.concatenate([b["dense"][b["valid"], 0] for b in batches])
    assert len(seen) == len(set(seen)) == min(rows, count)
    for batch in batches:
        assert len(batch["valid"]) == batch_size
        assert (
            not batch["present"][~batch["valid"]].any()
            and not batch["dense"][~batch["valid"]].any()
        )


def test_missing_targets_are_absent_and_zero():
    target = np.array([[1.0, np.nan], [2.0, 0.0], [np.nan, 1.0]])
    rows = as_rows(np.ones((3, 1)), None, target)
    np.testing.assert_array_equal(rows.present_NM, ~np.isnan(target))
    assert not rows.target_NM[~rows.present_NM].any()
    table = make_table(
        rows, rows, ["a", "b"], ["regression", "binary"],
        dense=("x",), category=(), category_sizes=(), name="t",
    )  # fmt: skip
    assert (table.targets[0].mean, table.targets[0].scale) == (1.5, 0.5)
    assert table.train.target_NM.tolist() == [[-1, 0], [1, 0], [0, 1]]
    assert (table.targets[1].mean, table.targets[1].scale, table.targets[1].rate) == (0, 1, 0.5)


def test_bad_sizes_are_refused_in_one_line():
    with pytest.raises(UserError, match="train.batch_size"):
        train_batches(3, 0, 0)
    with pytest.raises(UserError, match="train.seed"):
        train_batches(3, 1, -1)
    with pytest.raises(UserError, match="train.eval_rows"):
        heldout_batches(3, 1, 0, numbered(3).read)
    with pytest.raises(UserError, match="data.eval_fraction: 1.0 is not between"):
        correlated(0, 50, 0.5, eval_fraction=1.0)
