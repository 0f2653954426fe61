"""The language model's numbers: precision, equal models, sizes, the untrained loss."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.tasks.task import from_tree, to_tree
from tests.lms import (
    CLOSE,
    MIXED,
    B,
    D,
    E,
    L,
    V,
    apply,
    built,
    changed,
    config,
    label,
    model_of,
    objective,
    run,
    tokens,
)


def matmul_operands(jaxpr):
    """(dtype, dtype, width of the result) of every matrix product, in loops and calls too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            left, right = (v.aval.dtype.name for v in eqn.invars)
            yield left, right, eqn.outvars[0].aval.shape[-1]
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from matmul_operands(inner)


@pytest.mark.slow
def test_bfloat16_compute_leaves_router_and_parameters_in_float32():
    experts = 5  # no other width of the model is 5, so a product of this width is the router's
    changes = {"moe": {"num_experts": experts, "transport": "dropless"}, "tie_embeddings": False}
    exact = config("top_k", **changes)
    half = dataclasses.replace(exact, dtype="bfloat16")
    graph, params = built(half)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
    jaxpr = jax.make_jaxpr(lambda p, t: apply(nnx.merge(graph, p), t, True))(params, tokens())
    products = list(matmul_operands(jaxpr.jaxpr))
    router = [product for product in products if product[2] == experts]
    rest = [product for product in products if product[2] != experts]
    assert router and {name for *names, _ in router for name in names} == {"float32"}
    assert len(rest) > 5 and {name for *names, _ in rest for name in names} == {"bfloat16"}

    (logits_BLV, aux), (wanted_BLV, _) = run(half, tokens()), run(exact, tokens())
    assert logits_BLV.dtype == jnp.float32 and aux.stats.entropy.dtype == jnp.float32
    # Two layers of products with 8 bits of mantissa; a wrong cast would be off by far more or 0.
    difference = np.abs(np.asarray(logits_BLV - wanted_BLV)).mean()
    assert 1e-4 < difference < 0.1
    grads = jax.eval_shape(
        jax.grad(lambda p: objective(apply(nnx.merge(graph, p), tokens(), True), tokens())), params
    )
    assert {x.dtype.name for x in jax.tree.leaves(grads)} == {"float32"}


@pytest.mark.quick(1)
@pytest.mark.parametrize("train", [True, False], ids=["cells", "dropless"])
def test_identical_experts_equal_the_dense_model(train):
    """Weights of a renormalised gate add up to 1, so equal experts are one FFN; none dropped."""
    sparse = config("mixtral", moe={"capacity_factor": E / 2})
    dense = changed(sparse, every=0, d_ff=sparse.experts.d_ff)
    tree, plain = to_tree(built(sparse)[1]), to_tree(built(dense)[1])
    merged = jax.tree.map(lambda x: x, plain)
    own, ffn = merged["periods"]["blocks"]["0"], plain["periods"]["blocks"]["0"]["ffn"]
    repeat = lambda name: jnp.repeat(ffn[name][:, None], E, axis=1)
    own["ffn"] = {
        "router": tree["periods"]["blocks"]["0"]["ffn"]["router"],
        "gate_EDF": repeat("gate_DF"),
        "up_EDF": repeat("up_DF"),
        "down_EFD": repeat("down_FD"),
    }
    params = from_tree(built(sparse)[1], merged)
    CLOSE(run(sparse, tokens(), train, params)[0], run(dense, tokens(), train)[0])


@pytest.mark.quick(1)
@pytest.mark.parametrize(("tied", "excess"), [(False, 0.5), (True, 0.9)])
def test_the_untrained_model_starts_near_the_uniform_distribution(tied, excess):
    """On random tokens its loss is ln(vocab) + 1/2: logits are standard normal.

    A tied head also starts by expecting the token it has just read: 0.9 in place of 1/2. (Logits
    scaled down so that the loss starts at ln(vocab) learn far more slowly at the same rates.)
    """
    vocab = 512
    settings = config(every=0, vocab_size=vocab, d_model=64, tie_embeddings=tied)
    token_BL = jax.random.randint(jax.random.key(0), (8, 32), 0, vocab)
    logits_BLV = jax.jit(lambda: apply(model_of(settings), token_BL, False)[0])()
    log_p_BLV = jax.nn.log_softmax(logits_BLV[:, :-1])
    loss = -jnp.take_along_axis(log_p_BLV, token_BL[:, 1:, None], axis=-1).mean()
    # The mean of 248 tokens' losses, whose spread is about 1.
    assert abs(loss - math.log(vocab) - excess) < 0.2


@pytest.mark.parametrize(
    "settings",
    [
        MIXED,
        config(every=0, tie_embeddings=False),
        config("switch", activation="gelu", expert_activation="relu", num_layers=4, every=2),
        config("shazeer", num_kv_heads=1, head_dim=6),
    ],
    ids=label,
)
def test_the_number_of_parameters_equals_the_formula(settings):
    c = settings
    matrices = {"swiglu": 3, "gelu": 2, "relu": 2}
    heads, own = c.attention, c.experts
    heads = 2 * D * heads.head_dim * (heads.num_heads + heads.num_kv_heads)
    dense = matrices[c.ffn.activation] * D * c.ffn.d_ff
    expert = matrices[own.activation] * D * own.d_ff
    router = D * E * (2 if type(c.gate).__name__ == "NoisyTopK" else 1)
    sparse = (E + own.shared_experts) * expert + router
    embeddings = (1 if c.text.tie_embeddings else 2) * V * D
    wanted = embeddings + D + c.num_layers * (2 * D + heads)
    wanted += c.num_moe_layers * sparse + (c.num_layers - c.num_moe_layers) * dense
    assert sum(x.size for x in jax.tree.leaves(built(settings)[1])) == wanted


def test_logits_and_statistics_have_their_documented_shapes():
    logits_BLV, aux = run(MIXED, tokens())
    assert logits_BLV.shape == (B, L, V) and set(aux.losses) >= {"load_balance", "z"}
    others = ("gate", "load_ME")
    shapes = {name: x.shape for name, x in vars(aux.stats).items() if name not in others}
    assert shapes["load_E"] == (2, E) and shapes["dropped_L"] == (2, L) and shapes["tokens"] == (2,)
