"""Mixture-of-Depths: the choice of tokens, the output of a block, and its gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.layers.depths import Depths, choose
from moejax.models.stack import Block
from moejax.options import DepthsOptions
from moejax.types import Context, LayerAux
from tests import lms
from tests.layers import blocks

B, L, D = 3, 8, lms.D
CHOOSE = jax.jit(choose, static_argnames="options")
LENGTHS = np.array([8, 6, 2])
"""Valid tokens: all, some, and fewer than a row of L has room for."""
VALID = np.arange(L) < LENGTHS[:, None]
CLOSE = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
"""float32 against float64, through two norms, a softmax and sums of 24 products."""


@functools.cache
def built(predictor="mlp", capacity=0.4):
    """The router predicts in a block that is not causal: such blocks may be routed too."""
    config = lms.config(
        every=0,
        mod_capacity=capacity,
        mod_every=1,
        mod_predictor=predictor,
        causal=predictor == "mlp",
    )
    return nnx.split(Block(config, 0, rngs=nnx.Rngs(5))), config


def block_of(params, predictor="mlp", capacity=0.4):
    return nnx.merge(built(predictor, capacity)[0][0], params)


def tokens(seed=1):
    return 2.0 * jax.random.normal(jax.random.key(seed), (B, L, D))


def context():
    """Positions with holes, as of tokens that were packed before."""
    position_BL = 3 * jnp.arange(L) + jnp.array([[0], [2], [5]])
    return Context.of(B, L, valid_BL=jnp.asarray(VALID), position_BL=position_BL)


@functools.cache
def program(predictor, train, capacity=0.4):
    def run(params, x_BLD):
        return block_of(params, predictor, capacity)(x_BLD, context(), (), train, None)

    return jax.jit(run)


def scores(params, x_BLD, predictor):
    """r and the logit of the prediction, in numpy."""
    router = jax.tree.map(np.float64, nnx.to_pure_dict(params["depths"]["router"]))
    x = np.asarray(x_BLD, np.float64)
    r = x @ router["weight_D"]
    if predictor == "router":
        return r, r
    hidden = x @ router["hidden_DF"] + router["hidden_bias_F"]
    cube = hidden + 0.044715 * hidden**3
    gelu = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * cube))
    return r, gelu @ router["out_F"] + router["out_bias"]


def best(r_L, valid_L, tenths):
    """The places of the best valid tokens, so many tenths of them rounded up, ascending; of equals
    the earlier."""
    order = sorted(np.flatnonzero(valid_L), key=lambda t: (-r_L[t], t))
    return sorted(order[: -(-tenths * len(order) // 10)])


@settings(max_examples=60, deadline=None)
@given(
    score=st.lists(st.integers(-2, 2), min_size=14, max_size=14),
    valid=st.lists(st.booleans(), min_size=14, max_size=14),
    tenths=st.sampled_from([1, 4, 10]),
)
def test_the_best_valid_tokens_are_chosen_in_ascending_order_and_ties_go_to_the_earlier(
    score, valid, tenths
):
    score_BL = np.array(score, np.float32).reshape(2, 7)
    valid_BL = np.array(valid).reshape(2, 7)
    options = DepthsOptions(tenths / 10)
    chosen = jax.device_get(CHOOSE(score_BL, valid_BL, options=options))
    for row in range(2):
        wanted = best(score_BL[row], valid_BL[row], tenths)
        index, valid_C = chosen.index_BC[row], chosen.valid_BC[row]
        assert len(index) == options.chosen(7) and len(set(index.tolist())) == len(index)
        assert list(index[: len(wanted)]) == wanted, "and padding behind them"
        assert list(valid_C) == [True] * len(wanted) + [False] * (len(index) - len(wanted))
        assert list(np.flatnonzero(chosen.slot_BL[row] < len(index))) == wanted
        assert all(index[chosen.slot_BL[row, t]] == t for t in wanted)


@pytest.mark.parametrize("predictor", ["mlp", "router"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_routed_block_equals_a_loop_over_the_chosen_tokens_at_their_own_positions(
    predictor, train
):
    (_, params), config = built(predictor)
    x_BLD, position_BL = tokens(), np.asarray(context().position_BL)
    y_BLD, aux = program(predictor, train)(params, x_BLD)
    r_BL, logit_BL = scores(params, x_BLD, predictor)
    wanted, through, right, nats = np.asarray(x_BLD, np.float64).copy(), [], [], []
    for row in range(B):
        top = best(r_BL[row], VALID[row], 4)  # ceil(0.4 n)
        ahead = [t for t in np.flatnonzero(VALID[row]) if logit_BL[row, t] > 0]
        chosen = top if train else ahead
        member = np.isin(np.arange(L), top)
        through += chosen
        right += list((member == (logit_BL[row] > 0))[VALID[row]])
        signed = np.where(member, 1, -1) * logit_BL[row]
        nats += list(np.log1p(np.exp(-signed))[VALID[row]])
        if chosen:
            f = blocks.change(
                block_of(params, predictor),
                np.asarray(x_BLD, np.float64)[row, chosen],
                position_BL[row, chosen],
                config,
            )
            wanted[row, chosen] += r_BL[row, chosen, None] * f
    assert 0 < len(through) < LENGTHS.sum(), "some tokens must pass and some must not"
    CLOSE(y_BLD[VALID], wanted[VALID])
    CLOSE(aux.means["mod/selected"], len(through) / LENGTHS.sum())
    CLOSE(aux.means["mod/agreement"], np.mean(right))
    CLOSE(aux.losses["mod_predictor"], np.mean(nats))


def test_with_full_capacity_and_unit_weights_a_routed_block_equals_a_plain_one():
    x_BLD = tokens().at[..., 0].set(1.0)
    (_, params), _ = built(capacity=1.0)
    params = jax.tree.map(jnp.asarray, params)
    params["depths"]["router"]["weight_D"][...] = jnp.eye(D)[0]

    def both(params, x_BLD):
        block = block_of(params, capacity=1.0)
        routed, *_ = block(x_BLD, context(), (), True, None)
        block.depths = None
        return routed, block(x_BLD, context(), (), True, None)[0]

    routed, plain = jax.jit(both)(params, x_BLD)
    assert np.abs(plain - x_BLD).max() > 0.1
    # (x + a) + b against x + (a + b), in float32.
    np.testing.assert_allclose(routed[VALID], plain[VALID], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("predictor", ["mlp", "router"])
def test_the_task_trains_the_router_and_the_cross_entropy_the_predictor(predictor):
    @jax.jit
    def gradients(params, x_BLD):
        def of(loss):
            def value(params, x_BLD):
                y, aux = block_of(params, predictor)(x_BLD, context(), (), True, None)
                return loss(y, aux)

            return jax.grad(value, (0, 1))(params, x_BLD)

        task = of(lambda y, aux: jnp.sum(jnp.where(VALID[..., None], jnp.sin(y), 0)))
        return task, of(lambda y, aux: aux.losses["mod_predictor"])

    (task, _), (entropy, entropy_x) = gradients(built(predictor)[0][1], tokens())
    largest = lambda tree: max(np.abs(g).max() for g in jax.tree.leaves(tree))
    for grads in (task, entropy):
        grads["router"] = grads["depths"]["router"].pop("weight_D")
    assert largest(task["router"]) > 1e-3
    if predictor == "mlp":
        assert largest(task["depths"]) == 0 and largest(entropy["depths"]) > 1e-4
        assert largest(entropy["router"]) == 0 and largest(entropy_x) == 0
    else:
        assert largest(entropy["router"]) > 1e-4 and largest(entropy_x) > 1e-4
    assert largest({k: v for k, v in entropy.items() if k not in ("depths", "router")}) == 0


def test_a_token_with_even_odds_skips_the_block_in_evaluation():
    """For zeros both predictors give sigmoid(0), which is not above 1/2."""
    for predictor in ("mlp", "router"):
        y_BLD, aux = program(predictor, False)(built(predictor)[0][1], jnp.zeros((B, L, D)))
        np.testing.assert_array_equal(y_BLD, 0.0)
        assert aux.means["mod/selected"] == 0.0


def test_the_chosen_tokens_keep_their_ids_and_positions():
    """Scores are the tokens themselves: the second, fourth and sixth of six tokens are chosen."""
    depths = Depths(1, DepthsOptions(0.5, predictor="router"), rngs=nnx.Rngs(0))
    depths.router["weight_D"][...] = jnp.ones(1)
    x_BLD = jnp.asarray([[1.0, 5.0, 2.0, 7.0, 3.0, 6.0]])[..., None]
    known = {
        "token_BL": jnp.asarray([[10, 11, 12, 13, 14, 15]]),
        "position_BL": jnp.asarray([[0, 1, 2, 0, 1, 2]]),
    }
    seen = []

    def change(x_BCD, context):
        seen.append(context)
        return x_BCD, LayerAux()

    depths(x_BLD, dataclasses.replace(Context.of(1, 6), **known), True, change)
    (told,) = seen
    np.testing.assert_array_equal(told.token_BL, [[11, 13, 15]])
    np.testing.assert_array_equal(told.position_BL, [[1, 0, 2]])


def test_packed_texts_are_refused_where_they_would_compete_for_a_block():
    """In training only: the prediction of evaluation is one token's own, which keeps its text."""
    depths = Depths(4, DepthsOptions(0.5), rngs=nnx.Rngs(0))
    segment_L = np.array([0, 0, 0, 1, 1, 1])
    known = {"token_BL": jnp.arange(6)[None], "segment_BL": jnp.asarray(segment_L)[None]}
    packed = Context.of(1, 6, **known)
    x_BLD = jax.random.normal(jax.random.key(3), (1, 6, 4))
    seen = []

    def change(x_BLD, context):
        seen.append(context)
        return x_BLD, LayerAux()

    with pytest.raises(ValueError, match="depths.capacity=0.5 .*a row of its own"):
        depths(x_BLD, packed, True, change)
    depths(x_BLD, packed, False, change)
    (told,) = seen
    np.testing.assert_array_equal(told.segment_BL[0], segment_L[np.asarray(told.token_BL[0])])


@pytest.mark.parametrize("predictor", ["mlp", "router"])
def test_padding_may_hold_nan_forwards_and_backwards(predictor):
    """Three of four tokens are chosen, of which the second sequence has two."""
    depths = Depths(4, DepthsOptions(0.75, predictor=predictor), rngs=nnx.Rngs(0))
    graph, params = nnx.split(depths)
    valid_BL = jnp.asarray([[True] * 4, [True, True, False, False]])
    x_BLD = jnp.where(valid_BL[..., None], jax.random.normal(jax.random.key(1), (2, 4, 4)), jnp.nan)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(params, x_BLD):
        given = Context.of(2, 4, valid_BL=valid_BL)
        change = lambda x, context: (jnp.sin(x), LayerAux())
        y_BLD, aux = nnx.merge(graph, params)(x_BLD, given, True, change)
        return jnp.sum(jnp.where(valid_BL[..., None], y_BLD, 0.0)) + aux.losses["mod_predictor"]

    by_params, by_x = gradients(params, x_BLD)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(by_params))
    assert np.isfinite(by_x).all() and (by_x[1, 2:] == 0).all()


def test_capacity_is_rounded_up_and_is_at_least_one():
    def chosen(capacity, length):
        return DepthsOptions(capacity).chosen(length)

    assert [chosen(0.125, n) for n in (8, 9, 16, 1)] == [1, 2, 2, 1]
    assert chosen(0.1, 30) == 3 and chosen(1.0, 7) == 7 and chosen(1e-6, 5) == 1


def test_options_that_do_not_fit_are_refused_by_name():
    for fields, every, text in (
        ({"mod_capacity": 1.5}, 0, "capacity=1.5 must be >= 0 and <= 1"),
        ({"mod_every": 0}, 0, "every=0 must be >= 1"),
        ({"mod_predictor": "none"}, 0, "predictor='none' is unknown; use one of mlp, router"),
        ({"mod_every": 2}, 1, "depths.every=2 must divide every=1"),
    ):
        with pytest.raises(ValueError, match=text):
            lms.config(every=every, **{"mod_capacity": 0.5, **fields})
    lms.config(every=4, num_layers=4, mod_capacity=0.5, mod_every=2)
    lms.config(every=1, mod_capacity=0.0, mod_every=2)
    assert [DepthsOptions(0.5, every=2).routes(i) for i in range(4)] == [False, True, False, True]
