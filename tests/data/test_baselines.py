"""n-gram baselines, against a direct implementation and against entropies known in advance."""

from collections import Counter

import numpy as np
import pytest

from moejax.data.baselines import fit_ngrams, ngram_baselines


def witten_bell(train: list[int], context: tuple[int, ...], token: int, vocab_size: int) -> float:
    """The recursion of the module's docstring, by counting in Python."""
    n = len(context)
    lower = witten_bell(train, context[1:], token, vocab_size) if n else 1 / vocab_size
    grams = [tuple(train[i : i + n + 1]) for i in range(len(train) - n)]
    after = Counter(gram[-1] for gram in grams if gram[:-1] == context)
    total, types = sum(after.values()), len(after)
    return (after[token] + types * lower) / (total + types) if total else lower


@pytest.mark.parametrize("vocab_size", [5, 3000])  # 32-bit and 64-bit keys
def test_probabilities_equal_the_recursion(vocab_size):
    rng = np.random.default_rng(0)
    ids = rng.choice(vocab_size, 5, replace=False)
    train, heldout = ids[rng.integers(0, 4, 60)], ids[rng.integers(0, 5, 20)]  # one id is unseen
    by_order = fit_ngrams(train, vocab_size, context=2).log_probs(heldout)
    for n, log_probs in enumerate(by_order):
        for i, log_prob in enumerate(log_probs):
            context = tuple(heldout[max(i - n, 0) : i].tolist())
            expected = witten_bell(train.tolist(), context, heldout[i], vocab_size)
            assert np.exp(log_prob) == pytest.approx(expected, rel=1e-12)  # float64 both


@pytest.mark.parametrize("context", [(0, 1), (1, 1), (6, 6), (0, 6), (6, 0)])  # 6 is never seen
def test_probabilities_sum_to_one_after_seen_and_unseen_contexts(context):
    train = np.random.default_rng(1).integers(0, 6, 200).astype(np.uint16)
    model = fit_ngrams(train, 7, context=2)
    followed = [np.array([*context, token], dtype=np.uint16) for token in range(7)]
    sums = sum(np.exp([order[-1] for order in model.log_probs(tokens)]) for tokens in followed)
    np.testing.assert_allclose(sums, 1.0, rtol=1e-12)  # seven float64 terms


def test_a_second_order_source_is_learned_by_the_trigram_and_not_by_the_bigram():
    rng = np.random.default_rng(2)
    tokens = [0, 0]
    for noise in rng.random(60_000) < 0.1:
        tokens.append((tokens[-2] ^ tokens[-1]) ^ int(noise))
    stream = np.array(tokens, dtype=np.uint16)
    loss = ngram_baselines(stream[:50_000], [stream[None, 50_000:]], 2)
    entropy = -(0.1 * np.log(0.1) + 0.9 * np.log(0.9))
    # 10000 held-out tokens: the loss's standard error is 0.0066; four of them.
    assert loss["trigram"] == pytest.approx(entropy, abs=0.027)
    assert loss["bigram"] > entropy + 0.2


def test_uniform_noise_costs_the_logarithm_of_the_vocabulary():
    noise = np.random.default_rng(3).integers(0, 16, 100_000).astype(np.uint16)
    loss = ngram_baselines(noise[:90_000], [noise[None, 90_000:]], 16)
    assert loss["bigram"] == pytest.approx(np.log(16), abs=0.01)  # fitted noise costs a little
    assert np.log(16) - 0.01 < loss["trigram"] < np.log(16) + 0.1


def test_large_vocabularies_and_long_streams_are_counted_sparsely():
    rng = np.random.default_rng(4)
    stream = (rng.zipf(1.3, 400_000) % 200_000).astype(np.uint32)
    rows = [stream[None, 300_000:]]
    whole = ngram_baselines(stream[:300_000], rows, 200_000)
    part = ngram_baselines(stream[:300_000], rows, 200_000, max_train=50_000)
    assert whole["bigram"] < np.log(200_000)
    assert whole["bigram"] < part["bigram"] < whole["bigram"] + 1.0


def test_each_target_is_scored_once_from_the_tokens_before_it_in_its_own_row():
    rng = np.random.default_rng(5)
    train, rows = rng.integers(0, 5, 300), rng.integers(0, 6, (4, 7))
    loss = ngram_baselines(train, [rows[:3], rows[3:]], 6)
    for n, name in ((1, "bigram"), (2, "trigram")):
        expected = [
            np.log(witten_bell(train.tolist(), tuple(row[max(i - n, 0) : i].tolist()), row[i], 6))
            for row in rows
            for i in range(1, 7)  # the first token of a row is no target
        ]
        assert loss[name] == pytest.approx(-np.mean(expected), rel=1e-12)  # float64 both


def test_rows_shorter_than_the_context_are_scored():
    loss = ngram_baselines(np.array([0, 1, 0, 1], np.uint16), [np.array([[0, 1]], np.uint16)], 2)
    # After 0 came 1, twice: (2 + 1/2) / (2 + 1), with one type seen and 1/2 from below.
    assert loss["bigram"] == loss["trigram"] == pytest.approx(-np.log(2.5 / 3))


def test_sizes_that_cannot_be_counted_are_refused():
    for vocab_size, context in ((1 << 22, 2), (0, 1), (4, 3)):
        with pytest.raises(ValueError, match="out of range"):
            fit_ngrams(np.zeros(4, np.uint16), vocab_size, context)
