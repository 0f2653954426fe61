"""Each gate's way to be decoded: stated rightly, and equal to the whole text read at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import gating
from moejax.errors import UserError
from moejax.generate.causal import way_of
from moejax.generate.decode import CHUNK, Decoder, Weights, apart
from moejax.generate.prompts import Prompts
from moejax.generate.sampling import Sampling
from moejax.options import DispatchOptions, LatentOptions, RopeOptions
from moejax.tasks.language.task import LanguageModel
from moejax.types import Context, GateTraits, Slots
from tests import gates, lms

forget = gates.forgetting()
KEY = jax.random.key_data(jax.random.key(5))


def settings_of(row, **moe):
    flat = {"num_experts": gates.E, "eval_transport": "cells", "eval_capacity_factor": 0.5, **moe}
    return lms.changed(
        lms.config(),
        gate=row.make(),
        moe=DispatchOptions(**flat).config,
        vocab_size=gates.V,
        d_model=gates.D,
    )


def refusal(settings) -> str:
    try:
        way_of(settings)
    except UserError as error:
        return str(error)
    return ""


# ---------------------------------------------------------------- what a gate states


def routed(row, x, token, start, state, params):
    """The routing in evaluation of tokens ``start`` and following of one text."""
    length = x.shape[1]
    given = Context.of(
        1,
        length,
        token_BL=token,
        position_BL=jnp.arange(start, start + length)[None],
        step=jnp.int32(row.step),
        key=jax.random.key(3),
    ).grouped(1, False)
    output = row.make()(params, state, x, given)
    expert, weight = output.routing.expert_GTK, output.routing.weight_GTK
    share = jnp.zeros((length, gates.E))
    share = share.at[jnp.arange(length)[:, None], expert[0]].add(weight[0])
    if isinstance(output.mixing, Slots):  # whose routing is for information
        share = jnp.concatenate([share, output.mixing.dispatch_GTX[0]], axis=1)
    return np.asarray(share)


@pytest.mark.parametrize("row", gates.PARAMS)
def test_a_gate_states_whether_it_routes_a_token_without_its_text(row):
    """A token is routed alone, in its text, and after other tokens."""
    gate, changed, alone = row.make(), [], []
    params = gates.drawn(gate)
    state = gate.init_state(gates.spec())
    rng = np.random.default_rng(0)
    for seed in range(6):
        x, other = gates.tokens(seed, 1), gates.tokens(seed + 50, 1)
        token, others = rng.integers(0, gates.V, (2, 1, gates.T)).astype(np.int32)
        at = int(rng.integers(1, gates.T))
        early = np.arange(gates.T) < at
        whole = routed(row, x, token, 0, state, params)[at]
        mixed_x, mixed = jnp.where(early[:, None], other, x), np.where(early, others, token)
        after_others = routed(row, mixed_x, mixed, 0, state, params)[at]
        own = routed(row, x[:, at : at + 1], token[:, at : at + 1], at, state, params)[0]
        # The same numbers in a program of another shape.
        changed.append(not np.allclose(whole, after_others, rtol=1e-4, atol=1e-5))
        alone.append(np.allclose(whole, own, rtol=1e-4, atol=1e-5))
    traits = GateTraits.of(gate)
    assert traits.routes_alone == all(alone)
    assert not (traits.routes_alone and any(changed))
    draws = row.gate in ("random", "thor")
    assert traits.reads_past == (any(changed) or (draws and not all(alone)))


REFUSED = {
    "sentence": "--config.moe.gate.pool=running",
    "expert_choice": "--config.moe.gate.eval_policy=threshold",
    "soft": "train with a causal gate",
    "smear": "--config.moe.gate.name=lory",
    "replay": "recorded",
}


@pytest.mark.parametrize("row", gates.ROWS, ids=lambda row: row.name)
def test_only_gates_that_see_what_is_not_there_are_refused(row):
    settings = settings_of(row)
    dropless = DispatchOptions(num_experts=gates.E).config
    sees = row.make().visibility(dropless).eval_future
    problem = refusal(settings)
    assert bool(problem) == (sees or row.gate == "replay"), problem
    if problem:
        assert type(row.make()).__name__ in problem and "\n" not in problem
        assert row.fields or REFUSED[row.gate] in problem


def test_a_gate_that_chooses_among_texts_is_refused():
    fields = {"policy": "position", "eval_policy": "position"}
    settings = settings_of(gates.row("expert_choice", fields=fields), group="4")
    assert "other texts" in refusal(settings)


# ---------------------------------------------------------------- decoding


def model_of(settings, step=0):
    """A task, its parameters with routers that decide, and the weights to decode with."""
    task = LanguageModel(settings, (), 0.0, seq_len=16)
    params = task.init(jax.random.key(3))
    if settings.num_moe_layers:
        for place in settings.sparse_places:
            seeds = [10 * place + period for period in range(settings.num_periods)]
            drawn = [gates.drawn(settings.gate, seed=seed) for seed in seeds]
            router = jax.tree.map(lambda *x: jnp.stack(x), *drawn)
            params["periods"]["blocks"][str(place)]["ffn"]["router"] = router
    state = task.init_gate_state(gates.token_counts)
    own = apart(jax.tree.map(jnp.copy, params), settings.num_periods)
    return task, params, Weights(own, state, jnp.int32(step), KEY)


PROMPTS = [np.arange(1, 6), np.arange(3, 20), np.array([7]), np.arange(2, 13)]
NEW = CHUNK + 3


def check(settings, step=0, mesh=None):
    """Greedy decoding of unequal prompts, against each whole text, alone and without padding."""
    task, params, weights = model_of(settings, step)
    decoder = Decoder(task, weights, Sampling(), vocab=gates.V, mesh=mesh)
    progress = decoder.start(Prompts.of(PROMPTS, len(PROMPTS)), np.zeros(4), NEW)
    texts, found = [list(map(int, prompt)) for prompt in PROMPTS], []
    for _ in range(NEW):
        found.append(np.asarray(progress.logits_BV))
        progress, token_BN, _ = decoder.more(progress, 1)
        for text, new in zip(texts, token_BN, strict=True):
            text.extend(new.tolist())
    assert decoder.compiled == 2, "a step was compiled again as the text grew"
    dropless = DispatchOptions(num_experts=gates.E, eval_transport="dropless").config
    plain = task if not settings.num_moe_layers else LanguageModel(
        settings.with_experts(config=dropless), (), 0.0, seq_len=16
    )  # fmt: skip

    @jax.jit
    def whole(token_1L):
        given = Context.of(
            *token_1L.shape,
            token_BL=token_1L,
            step=weights.step,
            key=jax.random.fold_in(jax.random.wrap_key_data(KEY), weights.step),
        )
        return plain.built(params)(token_1L, given, weights.gate_state, False)[0][0]

    for row, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        wanted = np.asarray(whole(jnp.asarray([text])))[len(prompt) - 1 : -1]
        got = np.stack([logits[row] for logits in found])
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
        assert text[len(prompt) :] == wanted.argmax(axis=1).tolist()
    return decoder.way


QUICK = ("top_k", "hash-table=bigram-k=2", "random")


def causal_rows():
    for row in gates.ROWS:
        if not refusal(settings_of(row)):
            slow = () if row.name in QUICK else pytest.mark.slow
            yield pytest.param(row, id=row.name, marks=slow)


@pytest.mark.parametrize("row", list(causal_rows()))
def test_decoding_equals_reading_the_whole_text(row):
    way = check(settings_of(row), row.step)
    assert way == ("memory" if GateTraits.of(row.make()).routes_alone else "prefix")


MODELS = {
    "dense": lms.config(every=0),
    "windows and sinks": lms.config("top_k", num_layers=4, window=3, global_every=2, sinks=True),
    "dense first layer": lms.config("top_k", num_layers=5, every=2, first_dense=1),
    "latent attention": lms.config(
        latent=LatentOptions(kv_rank=6, plain_width=4, rope_width=4, value_width=4),
        rope=RopeOptions(theta=50.0, interleaved=True),
    ),
    "heads chosen per token": lms.config(every=0, moa_experts=5),
    "blocks that tokens may skip": lms.config("top_k", every=2, mod_capacity=0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_attention_is_decoded(name):
    settings = lms.changed(MODELS[name], d_model=gates.D, vocab_size=gates.V)
    if settings.num_moe_layers:
        moe = DispatchOptions(num_experts=gates.E).config
        settings = lms.changed(settings, gate=gating.make("top_k"), moe=moe)
    check(settings)


@functools.cache
def sampled():
    settings = settings_of(gates.row("top_k"))
    task, _, weights = model_of(settings)
    return Decoder(task, weights, Sampling(temperature=1.0), vocab=20, eos=(3,), with_visits=True)


def texts_of(prompts, batch, seed=5, tokens=20):
    decoder = sampled()
    progress = decoder.start(Prompts.of(prompts, batch), np.full(batch, seed), tokens)
    found, experts = [], []
    while sum(x.shape[1] for x in found) < tokens:
        progress, token_BN, visits = decoder.more(progress, tokens - sum(x.shape[1] for x in found))
        if not token_BN.shape[1]:
            break
        found.append(token_BN)
        assert visits is not None
        experts.append(visits.expert)
    ended = [text.tolist() + [3] for text in np.concatenate(found, axis=1)]
    texts = [text[: text.index(3)] for text in ended]
    experts = np.concatenate(experts, axis=1)
    return texts[: len(prompts)], [experts[row, : len(text)] for row, text in enumerate(texts)]


def test_a_text_is_the_same_whatever_is_beside_it():
    prompts = [np.arange(1, 6), np.arange(4, 13), np.array([7, 9])]
    together, visits = texts_of(prompts, 4)
    for number, prompt in enumerate(prompts):
        alone, own = texts_of([prompt], 1)
        assert alone[0] == together[number]
        np.testing.assert_array_equal(own[0], visits[number])
    assert together != texts_of(prompts, 4, seed=6)[0]
    assert all(token < 20 for text in together for token in text)
