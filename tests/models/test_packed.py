"""Documents packed into rows, through the language model's task, against each in a row alone."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import gating
from moejax.dispatch import Dropless
from moejax.options import LatentOptions, RopeOptions
from moejax.tasks.language.documents import Documents
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


PACKED = packed(DOCUMENTS, L)


def rows_of_corpus(packing, opened):
    """Rows of a corpus: the same documents, and one that is cut, with padding inside a row."""
    documents = [*DOCUMENTS[:4], np.random.default_rng(9).integers(0, V, 2 * L), *DOCUMENTS[4:]]
    joined = [np.append(document, V - 1) for document in documents]
    start_D = np.cumsum([0, *map(len, joined[:-1])])
    tokens_N = np.concatenate(joined)[:-1].astype(np.uint16)
    rows = Documents(tokens_N, start_D, V - 1, opened, L, packing, "")
    row_B = np.arange(len(rows), dtype=np.int64)
    assert rows.cut
    return {**rows.read(row_B, row_B), "row": row_B.astype(np.int32)}


def places_of(batch):
    """Row, first input and number of inputs of each document."""
    for row, (segment, valid) in enumerate(zip(batch["segment"], batch["valid"], strict=True)):
        for number in np.unique(segment[valid]):
            at = np.flatnonzero((segment == number) & valid)
            yield row, at[0], len(at)


def each_alone(batch):
    """The documents of a batch, each in a row of its own with padding behind."""
    documents = [batch["tokens"][row, at : at + n + 1] for row, at, n in places_of(batch)]
    batches = [packed([document], L) for document in documents]
    rows = {name: np.concatenate([x[name] for x in batches]) for name in ("tokens", "valid")}
    return {**rows, "row": np.arange(len(documents), dtype=np.int32)}


def per_token(x_BL, places):
    """The inputs of all documents, one after another."""
    return np.concatenate([x_BL[row, at : at + n] for row, at, n in places])


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


def compare(settings, train, shape=None, batch=PACKED):
    alone, places = each_alone(batch), list(places_of(batch))
    rows = -(-len(alone["row"]) // 8) * 8
    wanted = program(settings, train)(padded_rows(alone, rows))
    program.cache_clear()
    with meshes.entered(shape):
        got = program(settings, train)(padded_rows(batch, rows))
    program.cache_clear()
    of_alone = [(i, 0, n) for i, (_, _, n) in enumerate(places)]
    CLOSE(per_token(got[0], places), per_token(wanted[0], of_alone))
    # The tokens of a routed block are tapped in another order.
    taps = got[1] if not (train and settings.depths.capacity) else {}
    for name, tapped in taps.items():
        for layer, of_wanted in zip(tapped, wanted[1][name], strict=True):
            CLOSE(per_token(layer, places), per_token(of_wanted, of_alone), err_msg=name)
    assert got[2].items == wanted[2].items == batch["valid"].sum()
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


OF_CORPUS = [
    lms.slow_unless(case == ("best_fit", False, True), case)
    for case in itertools.product(("greedy", "best_fit"), (False, True), (False, True))
]


@pytest.mark.parametrize("case", OF_CORPUS, ids=str)
def test_documents_of_a_corpus_are_computed_as_in_rows_of_their_own(case):
    packing, opened, train = case
    compare(MODELS["plain"], train, batch=rows_of_corpus(packing, opened))


@pytest.mark.slow
@pytest.mark.parametrize("name", [x for x in MODELS if x != "plain"])
def test_models_compute_documents_of_a_corpus_as_in_rows_of_their_own(name):
    compare(MODELS[name], True, batch=rows_of_corpus("best_fit", False))


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False])
def test_a_document_does_not_depend_on_its_neighbours(train):
    """Bit for bit: another text beside it, of the same length, enters no sum of its own."""
    batch = rows_of_corpus("best_fit", False)
    row, at, n = next(x for x in places_of(batch) if x[1] > 0)
    outside_BL = np.ones(batch["tokens"].shape, bool)
    outside_BL[row, at : at + n + 1] = False
    other_BL = np.where(outside_BL, (batch["tokens"] + 1) % V, batch["tokens"])
    run = program(MODELS["plain"], train)
    logits = [run({**batch, "tokens": tokens})[0] for tokens in (batch["tokens"], other_BL)]
    own = np.s_[row, at : at + n]
    np.testing.assert_array_equal(logits[1][own], logits[0][own])
    assert not np.array_equal(logits[1], logits[0])


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
