"""A layer with SMEAR or Lory: its outputs and what a token depends on, on any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax.experts import ffn_one
from moejax.gating import Lory, Smear
from tests import gates, meshes, moes
from tests.gates import D, E, G, T
from tests.gating.test_merging_gates import POLICIES, padded

# float32 products in another order.
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def layer(gate, experts=E):
    made = moejax.MoE(D, 12, experts, gate=gate, rngs=nnx.Rngs(0))
    made.router = nnx.data(jax.tree.map(nnx.Param, gates.drawn(gate, experts)))
    return made


def output(made, x, given):
    return jax.jit(lambda x: made(x, given)[0])(x)


def context(**known):
    return moejax.Context.of(G, T, key=jax.random.key(0), **known)


@pytest.mark.quick(1)
@pytest.mark.parametrize("gate", [Smear(), Lory(4), Lory(4, "paper")], ids=str)
def test_one_expert_equals_an_ffn(gate):
    made = layer(gate, experts=1)
    y = output(made, gates.tokens(), context())
    one = jax.tree.map(lambda w: w[0], made.expert_weights())
    close(y, ffn_one(one, gates.tokens().reshape(-1, D), "swiglu").reshape(y.shape))
    assert not any(gate.visibility(made.config))


def test_one_uniform_segment_uses_the_mean_expert():
    made = layer(Lory(T, "uniform"))
    y = output(made, gates.tokens(), context())
    mean = jax.tree.map(lambda w: w.mean(0), made.expert_weights())
    close(y, ffn_one(mean, gates.tokens().reshape(-1, D), "swiglu").reshape(y.shape))


@pytest.mark.quick(2)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_later_token_affects_earlier_ones_only_in_the_papers_first_segment(policy, train):
    """Each position in turn gets another token; earlier outputs must not change."""
    made = layer(Lory(6, policy))
    x, other = gates.tokens(), gates.tokens(5)
    run = jax.jit(lambda x: made(x, context(), train=train)[0])
    y = run(x)
    changed = jax.vmap(lambda t: run(jnp.where(jnp.arange(T)[:, None] == t, other, x)))(
        jnp.arange(T)
    )
    moved_PL = np.abs(changed - y).max((1, 3))  # changed position, position
    earlier = np.tril(np.ones((T, T), bool), -1)
    same_first = np.zeros_like(earlier)
    same_first[:6, :6] = True
    leaks = earlier & same_first & (policy == "paper")
    # The same sums of the same numbers, but for an ulp of a product over other rows.
    assert moved_PL[leaks].min(initial=1) > 1e-3 and moved_PL[earlier & ~leaks].max() < 1e-5
    # The past is seen: the last token of a segment merges the next one.
    assert moved_PL[5, 6:12].min() > 1e-3


@pytest.mark.quick(1)
@pytest.mark.parametrize("policy", ["learned", "bos"])
def test_the_output_of_a_prefix_equals_the_prefix_of_the_output(policy):
    made = layer(Lory(4, policy))
    whole = output(made, gates.tokens(), context())
    for n in (1, 4, 6):
        part = output(made, gates.tokens()[:, :n], moejax.Context.of(G, n))
        close(part, whole[:, :n])


def test_every_token_under_smear_depends_on_its_whole_sequence_and_on_no_other():
    made = layer(Smear())
    run = jax.jit(lambda x: made(x, context(), train=False)[0])
    y, other = run(gates.tokens()), gates.tokens(5)
    last = run(gates.tokens().at[1, -1].set(other[1, -1]))
    assert np.abs(last - y)[1].max(1).min() > 1e-4
    assert np.abs(last - y)[jnp.asarray([0, 2, 3])].max() < 1e-6


@pytest.mark.quick(1)
@pytest.mark.parametrize("gate", [Smear(), Lory(4, "bos")], ids=str)
def test_padding_may_hold_nan_forwards_and_backwards(gate):
    made, valid = layer(gate), padded()
    graph, params = nnx.split(made)

    @jax.jit
    def run(params, x):
        def objective(params):
            y, info = nnx.merge(graph, params)(x, context(valid_BL=valid))
            return jnp.sum(jnp.where(valid[..., None], jnp.sin(y), 0)), (y, info.stats)

        return jax.value_and_grad(objective, has_aux=True)(params)

    x = jnp.where(valid[..., None], gates.tokens(), 0.0)
    wanted, got = run(params, x), run(params, jnp.where(valid[..., None], x, jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(wanted))
    (_, (y, stats)), grads = wanted
    assert not np.asarray(y)[~np.asarray(valid)].any()
    assert stats.tokens == valid.sum() and stats.dropped_E.sum() == 0
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))


MESHES = [
    pytest.param(shape, gate, id=f"{gate}-{meshes.name(shape)}",
                 marks=() if (shape == meshes.LARGE and gate == "lory") else pytest.mark.slow)
    for i, shape in enumerate(meshes.ALL) for gate in (("smear", "lory")[i % 2],)
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "gate"), MESHES)
def test_every_mesh_gives_the_same_results(shape, gate):
    fields = (("segment", 4),) if gate == "lory" else ()
    place, late = jnp.arange(moes.L), jnp.asarray([0, 1, 3, 0, 0, 2, 0, 0])[:, None]
    valid = (place >= late) & (place < jnp.asarray([6, 6, 5, 6, 3, 6, 6, 0])[:, None])
    x, given = moes.tokens(), moes.context(valid_BL=valid)
    got, wanted = (moes.run(s, gate, x, given, gate_fields=fields) for s in (shape, None))
    moes.same(got, wanted)
    assert wanted[0][1][1].stats.load_E.sum() > 0
