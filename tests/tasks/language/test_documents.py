"""Rows of whole documents: what they hold, and how full they are."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.data.joined import Joined
from moejax.errors import UserError
from moejax.tasks.language.bins import OPEN, best_fit, greedy
from moejax.tasks.language.documents import Documents

SEP, BOS = 0, 1


def stream_of(documents, opened):
    """The tokens of documents that are joined by the separator, and where each begins."""
    opening = [BOS] if opened else []
    parts = [[*opening, *document] for document in documents]
    start_D = np.cumsum([0, *(len(part) + 1 for part in parts[:-1])]).astype(np.int64)
    joined = [token for part in parts for token in (*part, SEP)][:-1]
    return np.array(joined, np.uint16), start_D


def rows_of(documents, length, packing, opened=False):
    tokens_N, start_D = stream_of(documents, opened)
    return Documents(tokens_N, start_D, SEP, opened, length, packing, "a text")


def all_rows(rows):
    number_R = np.arange(len(rows))
    return rows.read(number_R, number_R)


def spans(batch):
    """The tokens of each piece: its inputs, and the target of the last."""
    for tokens, segment, valid in zip(
        batch["tokens"], batch["segment"], batch["valid"], strict=True
    ):
        for number in np.unique(segment[valid]):
            at = np.flatnonzero((segment == number) & valid)
            assert at[-1] - at[0] == len(at) - 1
            yield tokens[at[0] : at[-1] + 2].tolist()


def test_the_separator_that_ends_a_document_is_the_first_input_of_the_next():
    batch = all_rows(rows_of([[5, 6], [7], [8, 9]], 8, "greedy"))
    assert batch["tokens"].tolist() == [[0, 5, 6, 0, 7, 0, 8, 9, 0]]
    assert batch["segment"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert batch["valid"].all()


def test_an_opening_is_the_first_input_and_the_separator_is_none():
    batch = all_rows(rows_of([[5, 6], [7], [8]], 7, "greedy", opened=True))
    assert batch["tokens"].tolist() == [[1, 5, 6, 0, 1, 7, 0, 0], [1, 8, 0, 0, 0, 0, 0, 0]]
    assert batch["segment"][0].tolist() == [0, 0, 0, 0, 1, 1, 0]
    assert batch["valid"][0].tolist() == [True, True, True, False, True, True, False]
    assert batch["valid"][1].tolist() == [True, True, *5 * [False]]


def test_a_long_document_is_cut_into_full_rows_and_its_rest_packed():
    rows = rows_of([[4], [5, 6, 7, 8, 9, 2, 3]], 6, "greedy")
    batch = all_rows(rows)
    assert batch["tokens"].tolist() == [[2, 3, 0, 4, 0, 0, 0], [0, 5, 6, 7, 8, 9, 2]]
    assert batch["segment"][0].tolist() == [0, 0, 1, 1, 0, 0]
    assert rows.cut == 1 and rows.padding == pytest.approx(2 / 12)


LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 24), st.sampled_from(["greedy", "best_fit"]), st.booleans())
def test_every_token_of_every_document_is_a_target_once_an_epoch(lengths, length, packing, opened):
    """The separators behind them too, each predicted from its own document alone."""
    # No two tokens are equal, so that a target names its document.
    first = np.cumsum([2, *lengths])
    documents = [list(range(a, a + n)) for a, n in zip(first, lengths, strict=False)]
    rows = rows_of(documents, length, packing, opened)
    batch = all_rows(rows)
    assert batch["tokens"].shape == (len(rows), length + 1)
    assert batch["valid"].any(axis=1).all()
    found = {}
    for tokens in spans(batch):
        for token, before in zip(tokens[1:], tokens[:-1], strict=True):
            name = (before, SEP) if token == SEP else token
            assert name not in found
            found[name] = before
    wanted = {}
    for document in documents:
        before = [BOS if opened else SEP, *document]
        wanted |= dict(zip([*document, (document[-1], SEP)], before, strict=True))
    assert found == wanted
    # In grain's terms an element is a document with what it is predicted from, at its own cost.
    inputs = np.array(lengths) + 1
    assert batch["valid"].sum() == inputs.sum()
    assert rows.cut == np.sum(inputs > length)
    assert rows.padding == pytest.approx(1 - inputs.sum() / (len(rows) * length), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 24), st.sampled_from(["greedy", "best_fit"]), st.booleans())
def test_places_name_the_inputs_and_targets_in_the_stream(lengths, length, packing, opened):
    rng = np.random.default_rng(sum(lengths))
    documents = [rng.integers(2, 99, n).tolist() for n in lengths]
    rows = rows_of(documents, length, packing, opened)
    batch, place_BL = all_rows(rows), rows.places(np.arange(len(rows)))
    around_N = np.array([SEP, *rows.tokens_N, SEP])  # place -1, the stream, the place behind it
    valid_BL = batch["valid"]
    np.testing.assert_array_equal(
        around_N[place_BL + 1][valid_BL], batch["tokens"][:, :-1][valid_BL]
    )
    np.testing.assert_array_equal(
        around_N[place_BL + 2][valid_BL], batch["tokens"][:, 1:][valid_BL]
    )
    assert len(np.unique(place_BL[valid_BL])) == valid_BL.sum()


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("packing", ["greedy", "best_fit"])
def test_rows_are_read_one_by_one_in_any_order_and_from_a_map(tmp_path, packing, opened):
    rng = np.random.default_rng(0)
    documents = [rng.integers(2, 99, n).tolist() for n in rng.integers(1, 40, 60)]
    rows = rows_of(documents, 16, packing, opened)
    whole = all_rows(rows)
    np.asarray(rows.tokens_N).tofile(tmp_path / "stream")
    mapped = Documents(
        np.memmap(tmp_path / "stream", np.uint16, "r"), rows.start_D, SEP, opened, 16, packing, ""
    )
    for row in rng.permutation(len(rows))[:20]:
        one = mapped.read(np.array([row, row]), np.zeros(2, np.int64))
        for name, values in one.items():
            assert values.dtype == whole[name].dtype
            np.testing.assert_array_equal(values, whole[name][[row, row]])


def lognormal(count, mean, longest, seed=0):
    lengths = np.random.default_rng(seed).lognormal(np.log(mean), 1.0, count)
    return np.clip(lengths.astype(np.int64), 1, longest)


def grains_rows(way, cost_P, room, bins):
    import grain

    elements = grain.MapDataset.source([{"x": np.ones(cost, np.int32)} for cost in cost_P])
    packed = getattr(grain.experimental, way)(
        elements.to_iter_dataset(), length_struct={"x": room}, num_packing_bins=bins,
        shuffle_bins=False,
    )  # fmt: skip
    return sum(1 for _ in packed)


@pytest.mark.parametrize("mean", [4, 12, 40])
def test_no_more_rows_are_made_than_grain_makes_of_the_same_documents(mean):
    """Grain keeps as many rows open as ``greedy`` does, and for best fit all of them."""
    room = 64
    cost_P = lognormal(600, mean, room)
    ours = {way: int(way(cost_P, room).max()) + 1 for way in (greedy, best_fit)}
    first = grains_rows("FirstFitPackIterDataset", cost_P, room, OPEN)
    best = grains_rows("BestFitPackIterDataset", cost_P, room, len(cost_P))
    assert ours[greedy] <= first
    assert ours[best_fit] <= min(best, first)
    # No way can need fewer than the sum of the costs does.
    assert ours[best_fit] * room - cost_P.sum() <= max(0.01 * cost_P.sum(), 2 * room)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 40), st.data())
def test_best_fit_makes_as_many_rows_as_a_search_for_each_piece(room, data):
    cost_P = np.array(data.draw(st.lists(st.integers(1, room), max_size=60)), np.int64)
    row_P = best_fit(cost_P, room)
    left: list[int] = []
    for cost in sorted(cost_P.tolist(), reverse=True):
        fitting = [row for row, free in enumerate(left) if free >= cost]
        if not fitting:
            left.append(room)
        best = min(fitting, key=left.__getitem__) if fitting else len(left) - 1
        left[best] -= cost
    filled = np.bincount(row_P, cost_P, minlength=1) if len(row_P) else np.zeros(0)
    assert sorted(room - filled) == sorted(left)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.data())
def test_greedy_fills_the_first_row_with_room_of_the_newest(room, data):
    cost_P = np.array(data.draw(st.lists(st.integers(1, room), max_size=400)), np.int64)
    left: list[int] = []
    for cost, row in zip(cost_P.tolist(), greedy(cost_P, room).tolist(), strict=True):
        newest = range(max(len(left) - OPEN, 0), len(left))
        wanted = next((r for r in newest if left[r] >= cost), len(left))
        if wanted == len(left):
            left.append(room)
        assert row == wanted
        left[row] -= cost


def test_rows_are_in_the_order_of_their_first_documents():
    rows = rows_of([[9] * n for n in lognormal(300, 8, 60)], 32, "best_fit")
    plan = rows.plan
    first = [
        plan.document_P[a:b].min() for a, b in zip(plan.first_R, plan.first_R[1:], strict=False)
    ]
    assert first == sorted(first)


def test_a_stream_that_ends_with_a_separator_has_no_further_document():
    tokens_N, start_D = stream_of([[5, 6], [7]], False)
    rows = [
        Documents(tokens, start_D, SEP, False, 8, "greedy", "")
        for tokens in (tokens_N, np.append(tokens_N, np.uint16(SEP)))
    ]
    for name, values in all_rows(rows[0]).items():
        np.testing.assert_array_equal(all_rows(rows[1])[name], values)


def test_rows_of_several_files_are_those_of_one():
    rng = np.random.default_rng(0)
    documents = [rng.integers(2, 99, n).tolist() for n in rng.integers(1, 40, 30)]
    whole = rows_of(documents, 16, "best_fit")
    parts = np.split(np.asarray(whole.tokens_N), [7, 100, 333])
    joined = dataclasses.replace(whole, tokens_N=Joined(parts, np.dtype(np.uint16)))
    for name, values in all_rows(joined).items():
        np.testing.assert_array_equal(values, all_rows(whole)[name])


def test_an_empty_document_makes_no_piece():
    tokens_N = np.array([5, SEP, SEP, 6], np.uint16)
    rows = Documents(tokens_N, np.array([0, 2, 3]), SEP, False, 6, "greedy", "")
    assert [x[1:] for x in spans(all_rows(rows))] == [[5, SEP], [6, SEP]]


def test_text_that_cannot_be_packed_is_refused_with_the_remedy():
    tokens_N, start_D = stream_of([[5, 6], [7]], False)
    with pytest.raises(UserError, match="data.packing=greedy: where documents begin in 'wiki' is "):
        Documents(tokens_N, None, SEP, False, 8, "greedy", "wiki")
    message = "data.packing=best_fit: the documents of 'wiki' are not joined by token 0"
    with pytest.raises(UserError, match=message):
        Documents(tokens_N, np.array([0, 2]), SEP, False, 8, "best_fit", "wiki")
    with pytest.raises(UserError, match="train.seq_len: 0"):
        Documents(tokens_N, start_D, SEP, False, 0, "best_fit", "wiki")
