"""Rows of whole documents: what they hold, and how full they are."""

import numpy as np
import pytest

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
