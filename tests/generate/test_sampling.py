"""The distribution of the next token."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.generate.sampling import Sampling, drawn, processed

B, V = 6, 40
RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.normal(scale=3.0, size=(B, V)), jnp.float32)
TEXT = RNG.integers(0, V, (B, 12))
SEEN = jnp.zeros((B, V), bool).at[np.arange(B)[:, None], TEXT].set(True)

CHOICES = {
    "temperature": Sampling(temperature=0.7),
    "top_k": Sampling(temperature=1.0, top_k=5),
    "more than there are": Sampling(temperature=1.0, top_k=V + 5),
    "top_p": Sampling(temperature=1.0, top_p=0.8),
    "a small top_p": Sampling(temperature=1.0, top_p=1e-4),
    "min_p": Sampling(temperature=1.0, min_p=0.1),
    "min_p of 1": Sampling(temperature=1.0, min_p=1.0),
    "penalty": Sampling(temperature=1.0, repetition_penalty=1.7),
    "reward": Sampling(temperature=1.0, repetition_penalty=0.6),
    "all": Sampling(1.3, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
}


def theirs(sampling: Sampling) -> np.ndarray:
    """The same by transformers' own processors, in the order of its `generate`."""
    import torch
    from transformers.generation import logits_process as process

    steps: list = [process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    steps.append(process.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(process.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(process.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(process.MinPLogitsWarper(sampling.min_p))
    logits: Any = torch.tensor(np.asarray(LOGITS))
    for step in steps:
        logits = step(torch.from_numpy(TEXT), logits)
    return logits.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("sampling", CHOICES.values(), ids=CHOICES)
def test_logits_are_processed_as_transformers_does(sampling):
    wanted, got = theirs(sampling), np.asarray(processed(LOGITS, SEEN, sampling))
    np.testing.assert_array_equal(np.isinf(got), np.isinf(wanted))
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize("sampling", [CHOICES["top_p"], CHOICES["all"], CHOICES["min_p of 1"]])
def test_logits_are_processed_as_defined(sampling):
    """Row by row in float64, by the definitions."""
    got = np.asarray(processed(LOGITS, SEEN, sampling))
    for row in range(B):
        z = np.asarray(LOGITS[row], np.float64)
        penalised = np.where(
            z < 0, z * sampling.repetition_penalty, z / sampling.repetition_penalty
        )
        z = np.where(np.asarray(SEEN[row]), penalised, z) / sampling.temperature
        kept = np.ones(V, bool)
        if sampling.top_k:
            kept &= z >= np.sort(z)[-sampling.top_k]
        order = np.argsort(-z)
        p = np.where(kept, np.exp(z - z.max()), 0.0)
        p /= p.sum()
        before = np.concatenate([[0.0], np.cumsum(p[order])[:-1]])
        kept[order] &= before < sampling.top_p
        kept &= p >= sampling.min_p * p.max()
        assert kept.any()
        np.testing.assert_array_equal(np.isfinite(got[row]), kept)
        np.testing.assert_allclose(got[row][kept], z[kept], rtol=1e-5)


def test_without_temperature_the_most_likely_token_is_taken():
    got = drawn(LOGITS, SEEN, Sampling(top_p=0.5), jnp.zeros(B, jnp.uint32), jnp.int32(0))
    np.testing.assert_array_equal(got, LOGITS.argmax(axis=1))


def test_tokens_are_drawn_with_their_probabilities():
    sampling, number = Sampling(temperature=2.0, top_k=4), 4000
    logits = jnp.broadcast_to(LOGITS[:1], (number, V))
    seen = jnp.zeros((number, V), bool)
    seeds = jnp.arange(number, dtype=jnp.uint32)
    token_N = np.asarray(drawn(logits, seen, sampling, seeds, jnp.int32(3)))
    wanted = np.asarray(jax.nn.softmax(processed(LOGITS[:1], seen[:1], sampling)))[0]
    share = np.bincount(token_N, minlength=V) / number
    # Four standard deviations of a share.
    assert (np.abs(share - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / number)).all()


def test_a_draw_depends_on_its_own_seed_and_place_alone():
    sampling = Sampling(temperature=5.0)
    seeds = jnp.asarray([3, 1, 4, 1, 5, 9], jnp.uint32)

    def draw(rows, count):
        return np.asarray(
            drawn(
                LOGITS[np.asarray(rows)],
                SEEN[np.asarray(rows)],
                sampling,
                seeds[np.asarray(rows)],
                jnp.int32(count),
            )
        )

    rows = list(range(B))
    together = np.stack([draw(rows, count) for count in range(30)])
    alone = np.stack([draw([2], count) for count in range(30)])
    np.testing.assert_array_equal(together[:, 2:3], alone)
    assert len(set(map(tuple, together.T.tolist()))) == B and len(set(alone.ravel())) > 5


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1.0), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("min_p", 2.0),
     ("repetition_penalty", 0.0), ("temperature", float("nan")), ("temperature", float("inf"))],
)  # fmt: skip
def test_values_outside_their_range_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field}="):
        Sampling(**{field: value})
