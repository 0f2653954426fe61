"""Prompts as batches, and tokens as text."""

import numpy as np
import pytest

from moejax.data.tokenizers.byte import ByteTokenizer
from moejax.generate.prompts import Prompts, batches, bucket
from moejax.generate.text import Continuation


def test_prompts_are_padded_in_front_to_few_lengths():
    assert [bucket(n) for n in (1, 16, 17, 24, 25, 33, 96, 97)] == [16, 16, 24, 24, 32, 48, 96, 128]
    given = [np.array([5, 6, 7]), np.arange(1, 18)]
    token_BP, valid_BP = Prompts.of(given, 3)
    assert token_BP.shape == (3, 24)
    assert valid_BP.sum(axis=1).tolist() == [3, 17, 0]
    for row, prompt in enumerate(given):
        np.testing.assert_array_equal(token_BP[row][valid_BP[row]], prompt)
        assert valid_BP[row, -len(prompt) :].all()


def test_prompts_of_similar_length_share_a_batch():
    assert batches([40, 3, 5, 41, 2], 2) == [[1, 2], [4, 0], [3]]


def fed(text: bytes, parts: list[int], stops=(), most=10**6, eos=(0,)):
    """A continuation that got these bytes in parts, and what was ready after each part."""
    found = Continuation(
        ByteTokenizer(), np.frombuffer("Ein Prompt é".encode(), np.uint8), stops, eos
    )
    ready, begin = [], 0
    for end in [*parts, len(text)]:
        found.add(list(text[begin:end]), most)
        ready.append(found.ready)
        begin = end
    return found, ready


def test_only_whole_characters_are_ready():
    text = "aé€😀z"
    data = text.encode()
    found, ready = fed(data, list(range(1, len(data))))
    assert found.text == text and found.ready == text
    for n, part in enumerate(ready, 1):
        assert part == data[:n].decode("utf-8", "ignore")


def test_bytes_that_are_no_text_are_replaced():
    found, _ = fed(b"a\xffb\xc3", [1, 2, 3])
    assert found.text == "a\ufffdb\ufffd" and found.tokens == [97, 255, 98, 195]


@pytest.mark.parametrize("parts", [[], [3], [4, 5, 6], list(range(1, 12))], ids=str)
def test_a_stop_string_ends_a_text_across_tokens(parts):
    found, ready = fed(b"one STOP two", parts, stops=("STOP", "never"))
    assert (found.text, found.finish) == ("one ", "stop")
    assert bytes(found.tokens) == b"one STOP"
    assert all("one ".startswith(text) for text in ready), "a part of a stop string was shown"


def test_what_only_looks_like_a_stop_string_is_held_back_and_then_shown():
    found, ready = fed(b"aST. b", [3, 4], stops=("STOP",))
    assert ready == ["a", "aST.", "aST. b"] and found.finish == ""


def test_the_first_of_several_stop_strings_counts():
    found, _ = fed(b"a\n\nbc", [], stops=("bc", "\n"))
    assert found.text == "a" and bytes(found.tokens) == b"a\n"


def test_the_end_of_a_text_is_no_token_of_it():
    found, _ = fed(b"ab\0cd", [1])
    assert (found.text, found.finish, bytes(found.tokens)) == ("ab", "eos", b"ab")


def test_a_text_has_no_more_tokens_than_wanted():
    found, _ = fed(b"abcdef", [2], most=3)
    assert (found.text, found.finish) == ("abc", "length")
