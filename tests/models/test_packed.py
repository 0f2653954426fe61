"""Documents packed into rows, through the language model's task, against each in a row alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import gating
from moejax.dispatch import Dropless
from moejax.options import LatentOptions, RopeOptions
from moejax.tasks.language.packing import packed
from moejax.tasks.language.task import LanguageModel
from moejax.types import Context, MoEConfig
from tests import lms, meshes
from tests.lms import CLOSE, E, V

L = 12
LENGTHS = [6, 5, 2, 13, 3, 4, 4]
"""Rows: three documents that fill it; one that does; three, with padding behind."""
DOCUMENTS = [np.random.default_rng(i).integers(0, V, n) for i, n in enumerate(LENGTHS)]
LATENT = LatentOptions(kv_rank=6, plain_width=4, rope_width=4, value_width=4)


def model(gate: Any = "top_k", attention=(), **changes):
    settings = lms.config("top_k", **changes)
    settings = lms.changed(settings, moe=MoEConfig(E, Dropless(), Dropless()))
    made = gating.make(gate) if isinstance(gate, str) else gate
    settings = lms.changed(settings, gate=made)
    for name, value in dict(attention).items():
        lms.NESTED.setdefault(name, ("attention", name))
        settings = lms.changed(settings, **{name: value})
    return settings


FLAT = {"rope": RopeOptions(theta=None)}
MODELS = {
    "grouped queries, a sliding window, sinks": model(
        num_kv_heads=2, attention={"window": 3, "sinks": True}
    ),
    "a chunk and a temperature": model(
        attention={"window": 4, "window_kind": "chunk", "temperature": 0.5,
                   "temperature_length": 3, **FLAT},
    ),
    "latent attention": model("loss_free", latent=LATENT),
    "latent attention, chunks": model(
        latent=LATENT, attention={"window": 4, "window_kind": "chunk"}
    ),
    "plain": model(),
    "biases, normalised heads, capped scores": model(
        attention={"bias": "all", "qk_norm": "head", "score_cap": 2.0}
    ),
    "a window in every second layer": model(
        num_layers=4, global_every=2, global_rope=False, attention={"window": 3}
    ),
    "yarn": model(
        attention={"rope": RopeOptions(theta=50.0, scaling="yarn", factor=4.0, trained_length=8)}
    ),
    "normalised projections, scale": model(attention={"qk_norm": "projection", "scale": 0.7}),
    "heads chosen per token": model(every=0, moa_experts=5),
    "heads chosen per token, a window": model(every=0, moa_experts=5, attention={"window": 3}),
    "blocks that all tokens pass": model(every=2, mod_capacity=1.0),
    "means of the text so far": model(gating.make("sentence", pool="running")),
    "means of the text before": model(gating.make("sentence", pool="previous", segment=2)),
    "hashes of two tokens": model(gating.make("hash", table="bigram")),
}  # fmt: skip
PREDICTED = model(every=2, mod_capacity=0.5)
"""Evaluation alone: in training such a model takes no packed rows."""
QUICK = [*MODELS][:3]
CASES = [
    lms.slow_unless(name in QUICK[:2] and train == (name == QUICK[0]), (name, train))
    for name in MODELS
    for train in (True, False)
]


def padded_rows(batch, rows):
    """With further rows, all of them padding."""
    missing = rows - len(batch["row"])
    return {name: np.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))) for name, x in batch.items()}


ALONE = {
    name: np.concatenate([packed([document], L)[name] for document in DOCUMENTS])
    for name in ("tokens", "valid")
} | {"row": np.arange(len(DOCUMENTS), dtype=np.int32)}
PLACES = [(0, 0), (0, 6), (0, 11), (1, 0), (2, 0), (2, 3), (2, 7)]


def per_token(x_BL, places):
    """The inputs of all documents, one after another."""
    parts = [
        x_BL[row, start : start + n - 1] for (row, start), n in zip(places, LENGTHS, strict=True)
    ]
    return np.concatenate(parts)


@functools.cache
def program(settings, train):
    task = LanguageModel(settings, (), 0.0, L)
    params = task.init(jax.random.key(1))
    # Biases, sinks and some routers start at zero.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(tree, moved)

    def tap(x_BLD, info):
        shape = x_BLD.shape[:2]
        return {
            "expert": info.routing.expert_GTK.reshape(*shape, -1),
            "weight": info.routing.weight_GTK.reshape(*shape, -1),
        }

    @jax.jit
    def run(params, batch):
        state, step, key = task.init_gate_state(), jnp.int32(0), jax.random.key(3)

        def loss(params):
            logits, aux = task.apply(params, state, batch, step, key, train, tap)
            totals = task._totals(logits, aux, batch)
            return totals.loss, (logits, aux.taps or {}, totals)

        (_, found), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return *found, grads

    return lambda batch: jax.device_get(run(params, jax.tree.map(jnp.asarray, batch)))


def compare(settings, train, shape=None):
    rows = 8
    wanted = program(settings, train)(padded_rows(ALONE, rows))
    program.cache_clear()
    with meshes.entered(shape):
        got = program(settings, train)(padded_rows(packed(DOCUMENTS, L), rows))
    program.cache_clear()
    alone = [(i, 0) for i in range(len(DOCUMENTS))]
    CLOSE(per_token(got[0], PLACES), per_token(wanted[0], alone))
    # The tokens of a routed block are tapped in another order.
    taps = got[1] if not (train and settings.depths.capacity) else {}
    for name, tapped in taps.items():
        for layer, of_wanted in zip(tapped, wanted[1][name], strict=True):
            CLOSE(per_token(layer, PLACES), per_token(of_wanted, alone), err_msg=name)
    assert got[2].items == wanted[2].items == sum(LENGTHS) - len(LENGTHS)
    CLOSE(got[2].loss, wanted[2].loss)
    assert got[2].metrics["accuracy"] == wanted[2].metrics["accuracy"]
    if got[2].stats is not None:
        np.testing.assert_array_equal(got[2].stats.load_E, wanted[2].stats.load_E)
    # Sums over 30 tokens of gradients of size 10, in another order.
    jax.tree.map(functools.partial(CLOSE, rtol=1e-4, atol=1e-4), got[3], wanted[3])
    assert max(np.abs(x).max() for x in jax.tree.leaves(got[3])) > 0.1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_packed_document_is_computed_as_in_a_row_of_its_own(case):
    """Logits, routing, loss, counts and gradients."""
    name, train = case
    compare(MODELS[name], train)


@pytest.mark.slow
def test_a_packed_document_skips_the_same_blocks_in_evaluation():
    compare(PREDICTED, train=False)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"data": 2, "expert": 4}, {"fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("name", [*QUICK, "heads chosen per token"])
def test_packed_documents_give_the_same_on_a_mesh(name, shape):
    compare(MODELS[name], True, shape)


def test_documents_fill_rows_in_order_and_their_last_tokens_are_no_inputs():
    batch = packed([np.array([5, 6, 1]), np.array([7, 1]), np.array([8, 9, 9, 1])], 4)
    assert batch["tokens"].tolist() == [[5, 6, 1, 7, 1], [8, 9, 9, 1, 0]]
    assert batch["segment"].tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
    assert batch["valid"].tolist() == [[True, True, False, True], [True, True, True, False]]
    assert batch["row"].tolist() == [0, 1]


@pytest.mark.parametrize("size", [1, 6])
def test_a_document_that_no_row_takes_is_refused(size):
    with pytest.raises(ValueError, match=f"document 1 has {size} tokens.* takes 2 to 5; cut it"):
        packed([np.arange(3), np.arange(size)], 4)


def test_a_model_sees_the_documents_of_its_batch_and_no_promise_of_padding_behind():
    seen = []

    class Told(LanguageModel):
        def built(self, params):
            return lambda token_BL, context, *rest: seen.append(context) or (token_BL, None)

    task = Told(None, (), 0.0, 4, padded_behind=True)  # type: ignore[arg-type]
    batch = packed([np.array([5, 6, 1]), np.array([7, 1])], 4)
    apply = lambda batch: task.apply({}, (), batch, jnp.int32(0), jax.random.key(0), True)
    apply(batch)
    apply({name: x for name, x in batch.items() if name != "segment"})
    assert np.asarray(seen[0].segment_BL).tolist() == [[0, 0, 0, 1]]
    assert np.asarray(seen[0].position_BL)[0, 3] == 0 and not seen[0].padded_behind
    assert seen[1].segment_BL is None and seen[1].padded_behind


def test_a_memory_takes_one_text_per_row():
    settings = MODELS["plain"]
    lm = lms.model_of(settings)
    token_BL = jnp.zeros((1, 1), jnp.int32)
    given = Context.of(1, 1, token_BL=token_BL, segment_BL=jnp.ones((1, 1), jnp.int32))
    with pytest.raises(ValueError, match="context.segment_BL: decoding .*a row of its own"):
        lm(token_BL, given, lm.init_gate_state(), False, memory=lm.empty_memory(1, 4))
