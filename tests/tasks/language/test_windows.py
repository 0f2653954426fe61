"""Windows of a token stream: training batches by step and held-out batches."""

import numpy as np
import pytest

from moejax.data.batches import TrainBatches
from moejax.errors import UserError
from moejax.tasks.language.windows import heldout_windows, train_windows

TOKENS = np.arange(1003, dtype=np.uint16)  # 10 windows of 100 + 1, with 2 tokens left over


def windows_of(batch) -> list[int]:
    return [int(row[0]) // 100 for row in batch["tokens"]]


@pytest.fixture(scope="module")
def train() -> TrainBatches:
    return train_windows(TOKENS, seq_len=100, batch_size=4, seed=3)


def test_a_batch_has_the_contracts_shapes_and_types(train):
    batch = train.batch(2)
    assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
        "tokens": ((4, 101), "int32"),
        "valid": ((4, 100), "bool"),
        "row": ((4,), "int32"),
    }
    assert batch["valid"].all()
    assert batch["row"].tolist() == [8, 9, 10, 11]
    for row in batch["tokens"]:
        assert row[0] % 100 == 0
        np.testing.assert_array_equal(np.diff(row), 1)


def test_every_epoch_has_every_row_once_in_another_order(train):
    laid_out = np.array([windows_of(train.batch(step)) for step in range(10)]).reshape(4, 10)
    np.testing.assert_array_equal(np.sort(laid_out, axis=1), np.tile(np.arange(10), (4, 1)))
    assert len({tuple(epoch) for epoch in laid_out}) == 4
    assert tuple(range(10)) not in {tuple(epoch) for epoch in laid_out}


def test_a_batch_is_a_function_of_the_step_alone(train):
    forward = [train.batch(step) for step in range(8)]
    again = train_windows(TOKENS, 100, 4, 3)
    for step in (5, 0, 7, 7, 2):
        for name, values in again.batch(step).items():
            np.testing.assert_array_equal(values, forward[step][name])


def test_the_order_equals_the_iteration_order_of_grain(train):
    import grain

    order = iter(grain.MapDataset.range(10).seed(3).shuffle().repeat())
    expected = [next(order) for _ in range(40)]
    assert [w for step in range(10) for w in windows_of(train.batch(step))] == expected


def test_the_batch_size_does_not_change_the_order_of_rows(train):
    by_five = train_windows(TOKENS, 100, 5, 3)
    fours = [w for step in range(5) for w in windows_of(train.batch(step))]
    assert [w for step in range(4) for w in windows_of(by_five.batch(step))] == fours


def test_another_seed_gives_another_order(train):
    other = train_windows(TOKENS, 100, 4, 4)
    assert [windows_of(other.batch(s)) for s in range(3)] != [
        windows_of(train.batch(s)) for s in range(3)
    ]


@pytest.mark.parametrize("rows", [slice(0, 2), slice(2, 4), slice(1, None), slice(0, 0)])
def test_a_hosts_share_is_a_slice_of_the_global_batch(train, rows):
    whole, share = train.batch(3), train.batch(3, rows)
    for name, values in whole.items():
        np.testing.assert_array_equal(share[name], values[rows])
        assert share[name].dtype == values.dtype


def test_a_host_reads_its_own_rows_only():
    class Watched(np.ndarray):
        reads: list[int] = []

        def __getitem__(self, key):
            self.reads.append(key.start)
            return super().__getitem__(key)

    batches = train_windows(TOKENS.view(Watched), 100, 4, 3)
    share = batches.batch(1, slice(1, 3))
    assert Watched.reads == [100 * window for window in windows_of(share)]


def test_a_batch_may_span_epochs_and_contain_a_row_twice():
    batches = train_windows(TOKENS, 300, batch_size=8, seed=0)  # 3 rows
    starts = batches.batch(0)["tokens"][:, 0].tolist()
    assert sorted(starts[:3]) == sorted(starts[3:6]) == [0, 300, 600]


def test_row_ids_are_unique_below_2_to_the_31_and_start_again_there():
    batches = train_windows(TOKENS, 100, 4, 0)
    assert batches.batch((1 << 29) - 1)["row"].tolist() == [(1 << 31) - 4 + i for i in range(4)]
    assert batches.batch(1 << 29)["row"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("tokens, rows", [(100, 0), (101, 1), (200, 1), (201, 2)])
def test_a_corpus_below_one_row_is_refused_with_the_numbers(tokens, rows):
    if rows:
        assert train_windows(TOKENS[:tokens], 100, 4, 0).num_rows == rows
        assert len(heldout_windows(TOKENS[:tokens], 100, 1, 9)) == rows
        return
    message = f"{tokens} tokens, but one row of train.seq_len=100 needs 101"
    with pytest.raises(UserError, match=f"training text has {message}.*data.path"):
        train_windows(TOKENS[:tokens], 100, 4, 0)
    with pytest.raises(UserError, match=f"held-out text has {message}.*data.eval_fraction"):
        heldout_windows(TOKENS[:tokens], 100, 1, 9)


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match="train.seq_len: 0"):
        train_windows(TOKENS, 0, 4, 0)
    for seed in (-1, 1 << 32):
        with pytest.raises(UserError, match=f"train.seed: {seed} "):
            train_windows(TOKENS, 100, 4, seed)
    with pytest.raises(UserError, match="train.eval_rows: 0"):
        heldout_windows(TOKENS, 100, 4, 0)
    with pytest.raises(ValueError, match="negative"):
        train_windows(TOKENS, 100, 4, 0).batch(-1)


def test_evaluation_rows_are_spread_over_the_whole_text():
    batches = heldout_windows(TOKENS, seq_len=100, batch_size=2, rows=5)
    assert [w for batch in batches for w in windows_of(batch)][:5] == [0, 2, 4, 6, 8]
    assert [batch["row"].tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("rows, windows", [(4, [0, 2, 5, 7]), (7, [0, 1, 2, 4, 5, 7, 8])])
def test_rows_that_do_not_divide_the_text_reach_its_end(rows, windows):
    batches = heldout_windows(TOKENS, seq_len=100, batch_size=16, rows=rows)
    assert windows_of(batches[0])[:rows] == windows  # each the first of its tenth


def test_the_last_evaluation_batch_is_padded_with_invalid_rows():
    batches = heldout_windows(TOKENS, seq_len=100, batch_size=4, rows=1000)
    assert len(batches) == 3
    assert {batch["tokens"].shape for batch in batches} == {(4, 101)}
    valid = np.concatenate([batch["valid"] for batch in batches])
    np.testing.assert_array_equal(valid, np.arange(12)[:, None] < np.full(100, 10))
    assert not batches[-1]["tokens"][2:].any()
    rows = np.concatenate([batch["tokens"] for batch in batches])[:10]
    np.testing.assert_array_equal(rows[:, 1:].ravel(), np.arange(1, 1001))  # each token once
