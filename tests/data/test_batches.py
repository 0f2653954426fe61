"""Batches of numbered rows: the order of training rows, and the spread of held-out ones."""

import numpy as np
import pytest

from moejax.data.batches import TrainBatches, heldout_batches, spread_evenly
from moejax.errors import UserError


def read(row_B, position_B):
    """Rows whose only content is their number, counted from 1, and their position."""
    return {
        "number": np.stack([row_B + 1, position_B], axis=1),
        "valid": np.ones(len(row_B), dtype=bool),
    }


@pytest.mark.parametrize("shuffled", [True, False])
def test_a_reader_gets_rows_and_positions_as_whole_numbers(shuffled):
    batch = TrainBatches(5, 3, 0, read).batch(2) if shuffled else heldout_batches(5, 3, 5, read)[1]
    assert batch["number"].dtype == np.int64
    positions = [6, 7, 8] if shuffled else [3, 4, 0]  # the last is padding
    assert batch["number"][:, 1].tolist() == positions
    assert batch["row"].tolist() == ([6, 7, 8] if shuffled else [3, 4, 5])


def test_only_padding_is_invalid_and_it_is_zero():
    first, last = heldout_batches(10, 4, 6, read)
    assert first["number"][:, 0].tolist() == [1, 2, 4, 6]
    assert last["number"].tolist() == [[7, 4], [9, 5], [0, 0], [0, 0]]
    assert first["valid"].all() and last["valid"].tolist() == [True, True, False, False]
    assert {batch["row"].dtype.name for batch in (first, last)} == {"int32"}


@pytest.mark.parametrize("available", [1, 9, 10, 641, 4039])
@pytest.mark.parametrize("count", [1, 3, 7, 256])
def test_no_stretch_of_the_held_out_rows_is_left_out(available, count):
    rows = spread_evenly(available, count)
    chosen = min(count, available)
    assert len(rows) == len(set(rows)) == chosen
    gaps = np.diff([*rows, available])  # to the end of the rows too
    assert gaps.max() <= -(-available // chosen) and gaps.min() >= available // chosen


@pytest.mark.parametrize("count, rows", [(4, [0, 2, 5, 7]), (7, [0, 1, 2, 4, 5, 7, 8])])
def test_counts_that_do_not_divide_the_rows_reach_their_end(count, rows):
    assert spread_evenly(10, count).tolist() == rows
    assert spread_evenly(10, 99).tolist() == list(range(10))


def test_sides_without_rows_are_refused():
    with pytest.raises(UserError, match="data.path: there are no training rows; lower data.eval_f"):
        TrainBatches(0, 1, 0, read)
    with pytest.raises(UserError, match="data.eval_fraction: there are no held-out rows; raise it"):
        heldout_batches(0, 1, 1, read)
