"""Held-out losses of predictors that need no training loop, for tables of several tasks."""

import numpy as np
from jaxtyping import Bool, Float

from moejax.contrib.multitask.tables import Rows, Table, Target, take
from moejax.data.batches import spread_evenly

MOST_ROWS, MOST_COLUMNS, ROUNDS = 20_000, 1000, 50
RIDGE = 1.0
"""Added to the diagonal of X^T X, like one more row per column with a target of 0."""


def table_baselines(table: Table, rows: int) -> dict[str, float]:
    """Losses over the held-out rows of an evaluation of ``rows`` rows, summed over tasks like the
    loss of a run: squared errors in units of the target's standard deviation and log losses in
    nats, each averaged over the rows (a missing target counts 0).

    ``mean``: the mean of the training rows, or their share of ones. ``linear``: least squares and
    logistic regression with a small ridge, on numbers and one-hot categories, from the first 20,000
    training rows; left out above 1000 columns. ``ideal``, for generated tables: the expectation
    under the generator.
    """
    row_N = spread_evenly(len(table.heldout), rows)
    held, losses = take(table.heldout, row_N), {}
    mean_NM = np.broadcast_to([target.guess for target in table.targets], held.target_NM.shape)
    losses["mean"] = loss_of(mean_NM, held, table.targets)
    width = 1 + len(table.dense) + sum(table.category_sizes)
    if width <= MOST_COLUMNS:
        losses["linear"] = loss_of(_linear(table, held), held, table.targets)
    if table.ideal_NM is not None:
        losses["ideal"] = loss_of(table.ideal_NM[row_N], held, table.targets)
    return losses


def loss_of(
    prediction_NM: Float[np.ndarray, "N M"], rows: Rows, targets: tuple[Target, ...]
) -> float:
    """Loss of predictions, standardised as targets are; probabilities for binary tasks."""
    total = 0.0
    for m, target in enumerate(targets):
        prediction_N = prediction_NM[:, m].astype(np.float64)
        target_N = rows.target_NM[:, m].astype(np.float64)
        if target.kind == "binary":
            p_N = np.clip(prediction_N, 1e-7, 1 - 1e-7)
            loss_N = -target_N * np.log(p_N) - (1 - target_N) * np.log(1 - p_N)
        else:
            loss_N = np.square(prediction_N - target_N)
        total += float(np.mean(np.where(rows.present_NM[:, m], loss_N, 0.0)))
    return total


def design(rows: Rows, sizes: tuple[int, ...]) -> Float[np.ndarray, "N X"]:
    """1, the numbers, and one-hot categories."""
    parts = [np.ones((len(rows), 1), np.float32), rows.dense_NF]
    parts += [
        np.eye(size, dtype=np.float32)[rows.category_NC[:, c]] for c, size in enumerate(sizes)
    ]
    return np.concatenate(parts, axis=1)


def _linear(table: Table, held: Rows) -> np.ndarray:
    """Predictions of linear models for some held-out rows."""
    train = take(table.train, slice(MOST_ROWS))
    x_NX, held_NX = design(train, table.category_sizes), design(held, table.category_sizes)
    predictions = [
        _fit(x_NX, train.target_NM[:, m], train.present_NM[:, m], held_NX, target)
        for m, target in enumerate(table.targets)
    ]
    return np.stack(predictions, axis=1)


def _fit(
    x_NX: Float[np.ndarray, "N X"],
    y_N: Float[np.ndarray, "N"],
    present_N: Bool[np.ndarray, "N"],
    held_NX: Float[np.ndarray, "H X"],
    target: Target,
) -> Float[np.ndarray, "H"]:
    if not present_N.all():
        x_NX, y_N = x_NX[present_N], y_N[present_N]
    gram_XX = (x_NX.T @ x_NX).astype(np.float64)
    ridge_XX = RIDGE * np.eye(len(gram_XX))
    ridge_XX[0, 0] = 1e-6
    if target.kind == "regression":
        return held_NX @ np.linalg.solve(gram_XX + ridge_XX, x_NX.T @ y_N)
    # The Hessian of the log loss is at most X^T X / 4 (Boehning, 1992): every round decreases it.
    inverse_XX = np.linalg.inv(gram_XX / 4 + ridge_XX)
    w_X = np.zeros(len(gram_XX))
    for _ in range(ROUNDS):
        p_N = 1.0 / (1.0 + np.exp(-(x_NX @ w_X)))
        w_X = w_X + inverse_XX @ (x_NX.T @ (y_N - p_N) - ridge_XX @ w_X)
    return 1.0 / (1.0 + np.exp(-(held_NX @ w_X)))
