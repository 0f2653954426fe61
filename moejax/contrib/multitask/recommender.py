"""A generated recommender: who watched what, how it was rated and whether it was finished."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from moejax.contrib.multitask.tables import Table, as_rows, first_heldout, make_table, take
from moejax.errors import UserError

FEATURES = ("user", "item", "genre", "age", "hour")
GENRES, AGES, HOURS, FACTORS = 8, 5, 24, 4

RATING_SHARES = {"user": 0.15, "item": 0.2, "affinity": 0.4, "noise": 0.25}
"""Shares of the rating's variance, which is 1: habits of the user, quality of the item, how well
the item suits the user, and chance."""
MEAN_RATING = 3.5
LOGIT_SPREAD, FINISHED = 1.5, 0.5
"""Standard deviation and mean of the logit of finishing."""


class Recommender(NamedTuple):
    """Draws of ``draw_recommender``. ``ideal_NM``: expected rating, and probability of finishing.

    ``part_NP``: the standardised parts user, item, affinity and moment of each row.
    """

    category_NC: Int[np.ndarray, "N C"]
    target_NM: Float[np.ndarray, "N 2"]
    ideal_NM: Float[np.ndarray, "N 2"]
    part_NP: Float[np.ndarray, "N P"]


def draw_recommender(
    seed: int, rows: int, *, users: int = 500, items: int = 200, shared: float = 0.5
) -> Recommender:
    r"""Ratings and finished views of N (user, item, hour) triples with known structure.

    .. math::
       \text{rating} = 3.5 + \sqrt{.15}\, a_u + \sqrt{.2}\, b_i + \sqrt{.4}\, p_u q_i
         + \sqrt{.25}\, \epsilon, \qquad
       P(\text{finished}) = \sigma\big(0.5 + 1.5 (\sqrt{s}\, p_u q_i + \sqrt{1 - s}\, m)\big)

    User factors p are half the user's own and half those of the age group, item factors q half the
    item's and half those of the genre. The moment m depends on the hour and, by a length of its
    own, on the genre. The parts a, b, p q and m are brought to mean 0 and variance 1 over the rows,
    so that their weights are shares of variance. ``shared`` (s) is what the tasks have in common.

    Items are drawn with P proportional to 1 / rank (a long tail), users by a lognormal activity.
    """
    if users < 2 or items < 2:
        raise UserError(f"task.num_users, task.num_items: {users} and {items} must be at least 2")
    if not 0.0 <= shared <= 1.0:
        raise UserError(f"task.shared: {shared} is not between 0 and 1")
    rng = np.random.default_rng([seed, 3])
    age_U, genre_I = rng.integers(0, AGES, users), rng.integers(0, GENRES, items)
    p_UK = _half(rng, rng.standard_normal((AGES, FACTORS))[age_U])
    q_IK = _half(rng, rng.standard_normal((GENRES, FACTORS))[genre_I])
    activity_U = np.exp(rng.standard_normal(users))
    popularity_I = 1.0 / (1.0 + rng.permutation(items))
    user_N = rng.choice(users, rows, p=activity_U / activity_U.sum())
    item_N = rng.choice(items, rows, p=popularity_I / popularity_I.sum())
    hour_N = rng.integers(0, HOURS, rows)
    length_G = rng.standard_normal(GENRES)
    evening_N = np.cos(2 * np.pi * (hour_N - 20) / HOURS)
    part_NP = np.stack([
        rng.standard_normal(users)[user_N],
        rng.standard_normal(items)[item_N],
        np.sum(p_UK[user_N] * q_IK[item_N], axis=1),
        evening_N - length_G[genre_I[item_N]],
    ], axis=1)  # fmt: skip
    part_NP = (part_NP - part_NP.mean(axis=0)) / np.maximum(part_NP.std(axis=0), 1e-9)
    weight = {name: share**0.5 for name, share in RATING_SHARES.items()}
    expected_N = MEAN_RATING + part_NP[:, :3] @ [weight[n] for n in ("user", "item", "affinity")]
    logit_N = part_NP[:, 2:] @ [shared**0.5, (1.0 - shared) ** 0.5]
    chance_N = 1.0 / (1.0 + np.exp(-(FINISHED + LOGIT_SPREAD * logit_N)))
    rating_N = expected_N + weight["noise"] * rng.standard_normal(rows)
    finished_N = rng.random(rows) < chance_N
    return Recommender(
        np.stack([user_N, item_N, genre_I[item_N], age_U[user_N], hour_N], axis=1),
        np.stack([rating_N, finished_N], axis=1),
        np.stack([expected_N, chance_N], axis=1),
        part_NP,
    )


def recommender(
    seed: int,
    rows: int,
    eval_fraction: float = 0.1,
    *,
    users: int = 500,
    items: int = 200,
    shared: float = 0.5,
) -> Table:
    """``draw_recommender`` as a table of the tasks rating and finished; the last rows held out."""
    drawn = draw_recommender(seed, rows, users=users, items=items, shared=shared)
    all_rows = as_rows(None, drawn.category_NC, drawn.target_NM)
    cut = first_heldout(rows, eval_fraction)
    return make_table(
        take(all_rows, slice(cut)),
        take(all_rows, slice(cut, None)),
        ["rating", "finished"],
        ["regression", "binary"],
        dense=(),
        category=FEATURES,
        category_sizes=(users, items, GENRES, AGES, HOURS),
        name=f"recommender of {users} users and {items} items, seed={seed}",
        ideal_NM=drawn.ideal_NM[cut:],
    )


def _half(rng: np.random.Generator, group: np.ndarray) -> np.ndarray:
    """Factors that are half the group's and half their own, in variance."""
    return np.sqrt(0.5) * (group + rng.standard_normal(group.shape))
