"""Several arrays as one: equal to their concatenation, however it is read."""

import numpy as np
import pytest

from moejax.data.joined import Joined, TokenSizes

RNG = np.random.default_rng(0)
PARTS = [
    RNG.integers(0, 200, n).astype(t) for n, t in ((7, "<u2"), (0, "<u2"), (5, ">i4"), (9, "u1"))
]
WHOLE = np.concatenate(PARTS).astype(np.uint16)


def test_every_slice_and_index_is_that_of_the_concatenation():
    joined = Joined(PARTS, np.dtype("<u2"))
    assert (len(joined), joined.size, joined.shape) == (21, 21, (21,))
    for begin in range(-23, 24):
        for end in range(-23, 24):
            read = joined[begin:end]
            np.testing.assert_array_equal(read, WHOLE[begin:end])
            assert read.dtype == np.uint16
            if 0 <= begin <= end <= 21:
                view = joined.view(begin, end)
                np.testing.assert_array_equal(view[:], WHOLE[begin:end])
                assert len(view) == end - begin
    assert [int(joined[i]) for i in range(-21, 21)] == [*WHOLE.tolist(), *WHOLE.tolist()]
    np.testing.assert_array_equal(joined[::3], WHOLE[::3])
    at = RNG.integers(-21, 21, (4, 6))
    np.testing.assert_array_equal(joined[at], WHOLE[at])
    np.testing.assert_array_equal(np.asarray(joined), WHOLE)


@pytest.mark.parametrize("at", [21, -22])
def test_an_index_outside_is_an_error(at):
    with pytest.raises(IndexError):
        Joined(PARTS, np.dtype("<u2"))[at]


def test_a_slice_of_one_part_is_not_copied():
    joined = Joined(PARTS, np.dtype("<u2"))
    assert np.shares_memory(joined[1:6], PARTS[0])
    assert not np.shares_memory(joined[1:9], PARTS[0])


def test_sizes_are_looked_up_where_they_are_read():
    size_V = RNG.integers(0, 9, 200).astype(np.uint32)
    sizes = TokenSizes(Joined(PARTS, np.dtype("<u2")), size_V)
    np.testing.assert_array_equal(sizes[3:15], size_V[WHOLE[3:15]])
    assert len(sizes) == 21 and int(sizes[20]) == size_V[WHOLE[20]]
