"""Finding 2 on routings whose change is known."""

import numpy as np
import pytest

from moejax.contrib.openmoe.early import cosine_of_others, cosines, early
from tests.contrib.openmoe.routings import E, L, N, V, routed, tokens


def test_a_reversed_router_has_no_saturation_and_a_constant_one_has_all():
    """Layer 0 sends every token elsewhere at first, layer 1 does not move."""
    token_NL = tokens()
    last = np.stack([token_NL % E, (token_NL + 1) % E])[..., None]
    then = np.stack([(token_NL + 2) % E, (token_NL + 1) % E])[..., None]
    found = early([(5, routed(token_NL, then)), (9, routed(token_NL, last))], "probe")
    assert found.last == 9 and found.kinds == V and found.tokens == N * L
    first, end = found.steps
    assert first.saturation == [0, 1] and first.first_saturation == [0, 1]
    assert first.cosine == pytest.approx([0, 1])
    assert end.saturation == [1, 1] and end.cosine == pytest.approx([1, 1])
    assert found.chance == [1 / E] * 2


def test_saturation_counts_all_choices_and_first_saturation_only_first_ones():
    token_NL = tokens()
    last = np.stack([token_NL % E, (token_NL + 1) % E], axis=-1)[None]
    then = np.stack([(token_NL + 1) % E, (token_NL + 2) % E], axis=-1)[None]
    found = early([(1, routed(token_NL, then)), (2, routed(token_NL, last))], "probe").steps[0]
    assert found.saturation == [0.5] and found.first_saturation == [0]
    assert found.cosine == pytest.approx([0.5])  # (1/2, 1/2, 0) and (0, 1/2, 1/2)


def test_cosines_equal_those_of_a_loop():
    rng = np.random.default_rng(0)
    then, last = rng.random((5, E)), rng.random((5, E))

    def cosine(a, b):
        return a @ b / np.sqrt((a @ a) * (b @ b))

    np.testing.assert_allclose(cosines(then, last), list(map(cosine, then, last)))
    pairs = [cosine(last[i], last[j]) for i in range(5) for j in range(5) if i != j]
    assert cosine_of_others(last) == pytest.approx(np.mean(pairs))
    assert np.isnan(cosine_of_others(last[:1]))


def test_without_frequent_ids_there_is_no_cosine():
    token_NL = np.arange(N * L).reshape(N, L)
    found = early([(1, routed(token_NL, token_NL % E))], "probe")
    assert found.kinds == 0 and np.isnan(found.steps[0].cosine[0])
    with pytest.raises(ValueError, match="no recordings"):
        early([], "probe")
