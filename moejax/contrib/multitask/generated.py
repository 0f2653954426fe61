"""Generated tables of known structure: related regressions, groups of tasks, a recommender."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from moejax.contrib.multitask.tables import Table, as_rows, first_heldout, make_table, take
from moejax.errors import UserError

NOISE = 0.01
"""Standard deviation of the noise of correlated tasks and of groups."""

FEATURES = ("user", "item", "genre", "age", "hour")
GENRES, AGES, HOURS, FACTORS = 8, 5, 24, 4

RATING_SHARES = {"user": 0.15, "item": 0.2, "affinity": 0.4, "noise": 0.25}
"""Shares of the rating's variance, which is 1: habits of the user, quality of the item, fit of the
item to the user, and chance."""
MEAN_RATING = 3.5
LOGIT_SPREAD, FINISHED = 1.5, 0.5
"""Standard deviation and mean of the logit of finishing."""


class Correlated(NamedTuple):
    """Draws of ``draw_correlated``: inputs, labels without and with noise, and w of both tasks."""

    x_ND: Float[np.ndarray, "N D"]
    clean_NM: Float[np.ndarray, "N 2"]
    y_NM: Float[np.ndarray, "N 2"]
    w_MD: Float[np.ndarray, "2 D"]


def draw_correlated(
    seed: int, rows: int, rho: float, *, width: int = 100, waves: int = 10, c: float = 1.0
) -> Correlated:
    r"""Two regressions whose weight vectors have cosine rho.

    .. math::
       w_1 = c u_1, \quad w_2 = c (\rho u_1 + \sqrt{1 - \rho^2} u_2), \quad
       y_m = w_m x + \sum_{i=1}^{\text{waves}} \sin(\alpha_i w_m x + \beta_i) + N(0, 0.01^2)

    with u1, u2 orthonormal, x ~ N(0, I), alpha_i = i and beta_i = (i - 1)^2. The labels' Pearson
    correlation grows with rho, but is not rho: the sines are not linear.

    Reference: Ma et al. (MMoE), KDD 2018, doi 10.1145/3219819.3220007, which gives the formula but
    not alpha, beta, c and the number of sines; we take those of a public re-implementation.
    """
    if not -1.0 <= rho <= 1.0:
        raise UserError(f"task.rho: {rho} is not between -1 and 1")
    rng = np.random.default_rng([seed, 1])
    u_D2, _ = np.linalg.qr(rng.standard_normal((width, 2)))
    w_MD = c * np.stack([u_D2[:, 0], rho * u_D2[:, 0] + np.sqrt(1.0 - rho**2) * u_D2[:, 1]])
    x_ND = rng.standard_normal((rows, width))
    product_NM = x_ND @ w_MD.T
    clean_NM = product_NM.copy()
    for i in range(waves):
        clean_NM += np.sin((i + 1) * product_NM + i**2)
    y_NM = clean_NM + NOISE * rng.standard_normal(clean_NM.shape)
    return Correlated(x_ND, clean_NM, y_NM, w_MD)


def correlated(
    seed: int, rows: int, rho: float, eval_fraction: float = 0.1, width: int = 100
) -> Table:
    """``draw_correlated`` as a table of two tasks; the last rows are held out."""
    drawn = draw_correlated(seed, rows, rho, width=width)
    name = f"correlated tasks, rho={rho:g}, seed={seed}"
    return _table(drawn.x_ND, drawn.y_NM, drawn.clean_NM, eval_fraction, name)


class Groups(NamedTuple):
    """Draws of ``draw_groups``; ``weight_ME`` are the tasks' weights of the generating experts."""

    x_ND: Float[np.ndarray, "N D"]
    clean_NM: Float[np.ndarray, "N M"]
    y_NM: Float[np.ndarray, "N M"]
    weight_ME: Float[np.ndarray, "M E"]


def draw_groups(
    seed: int,
    rows: int,
    tasks: int,
    *,
    width: int = 10,
    experts_per_group: int = 4,
    hidden: int = 4,
) -> Groups:
    r"""Two halves of the tasks, each with its own generating experts.

    .. math:: y_m = \sum_e \operatorname{softmax}(a_m)_e f_e(x) + N(0, 0.01^2), \quad
       f_e(x) = v_e^\top \max(W_e x + b_e, 0)

    over the experts of the task's half, with all of W, b, v and a drawn from N(0, 1), each f_e
    brought to mean 0 and variance 1, and x ~ N(0, I). Tasks 0 .. tasks/2 - 1 are the first half.

    Inspired by the multi-task experiments of Hazimeh et al. (DSelect-k), arXiv 2106.03760, which do
    not state their sizes: the protocol is ours.
    """
    if tasks < 2 or tasks % 2:
        raise UserError(f"task.tasks: {tasks} tasks do not make two groups; use an even number")
    rng = np.random.default_rng([seed, 2])
    experts = 2 * experts_per_group
    in_EDF = rng.standard_normal((experts, width, hidden))
    shift_EF = rng.standard_normal((experts, hidden))
    out_EF = rng.standard_normal((experts, hidden))
    score_MG = rng.standard_normal((tasks, experts_per_group))
    share_MG = np.exp(score_MG) / np.exp(score_MG).sum(axis=1, keepdims=True)
    weight_ME, half = np.zeros((tasks, experts)), tasks // 2
    weight_ME[:half, :experts_per_group] = share_MG[:half]
    weight_ME[half:, experts_per_group:] = share_MG[half:]
    x_ND = rng.standard_normal((rows, width))
    hidden_NEF = np.maximum(np.einsum("nd,edf->nef", x_ND, in_EDF) + shift_EF, 0.0)
    f_NE = np.einsum("nef,ef->ne", hidden_NEF, out_EF)
    f_NE = (f_NE - f_NE.mean(axis=0)) / np.maximum(f_NE.std(axis=0), 1e-9)
    clean_NM = f_NE @ weight_ME.T
    y_NM = clean_NM + NOISE * rng.standard_normal(clean_NM.shape)
    return Groups(x_ND, clean_NM, y_NM, weight_ME)


def groups(seed: int, rows: int, tasks: int, eval_fraction: float = 0.1) -> Table:
    """``draw_groups`` as a table; the last rows are held out."""
    drawn = draw_groups(seed, rows, tasks)
    name = f"two groups of {tasks // 2} tasks, seed={seed}"
    return _table(drawn.x_ND, drawn.y_NM, drawn.clean_NM, eval_fraction, name)


def _table(
    x_ND: np.ndarray, y_NM: np.ndarray, clean_NM: np.ndarray, eval_fraction: float, name: str
) -> Table:
    rows, cut = as_rows(x_ND, None, y_NM), first_heldout(len(x_ND), eval_fraction)
    tasks = y_NM.shape[1]
    return make_table(
        take(rows, slice(cut)),
        take(rows, slice(cut, None)),
        [f"y{m + 1}" for m in range(tasks)],
        ["regression"] * tasks,
        dense=tuple(f"x{i + 1}" for i in range(x_ND.shape[1])),
        category=(),
        category_sizes=(),
        name=name,
        ideal_NM=clean_NM[cut:],
    )


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
    item's own and half those of the genre. The moment m depends on the hour and on the length of
    the genre. The parts a, b, p q and m are standardised over the rows, so that
    their weights are shares of variance. ``shared`` (s) is the structure common to both tasks.

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
    p_finished_N = 1.0 / (1.0 + np.exp(-(FINISHED + LOGIT_SPREAD * logit_N)))
    rating_N = expected_N + weight["noise"] * rng.standard_normal(rows)
    finished_N = rng.random(rows) < p_finished_N
    return Recommender(
        np.stack([user_N, item_N, genre_I[item_N], age_U[user_N], hour_N], axis=1),
        np.stack([rating_N, finished_N], axis=1),
        np.stack([expected_N, p_finished_N], axis=1),
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
    """``draw_recommender`` as a table with tasks rating and finished; the last rows held out."""
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
