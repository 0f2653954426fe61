"""Expert prototyping against the sum of Switch layers that it equals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax import gating

B, L, D, F, E = 3, 20, 8, 12, 12


def call(layer, x, context):
    return jax.jit(lambda x, context: layer(x, context))(x, context)


@pytest.mark.slow
def test_prototyping_equals_a_sum_of_k_switch_layers_with_a_kth_of_the_experts_each():
    """Outputs, drops and balance loss; the Switch layers hold slices of its weights."""
    k, factor = 3, 0.75
    whole = moejax.MoE(
        D, F, E, gate=gating.make("prototypes", k=k), rngs=nnx.Rngs(0), capacity_factor=factor
    )
    whole.router["router_DE"][...] = jax.random.normal(jax.random.key(4), (D, E))
    x = jax.random.normal(jax.random.key(1), (B, L, D))
    valid = jnp.arange(L) < jnp.asarray([L, L - 5, 0])[:, None]
    context = moejax.Context.of(B, L, valid_BL=valid)
    y, info = call(whole, x, context)

    size, total, balance, dropped = E // k, 0.0, [], []
    for first in range(0, E, size):
        own = slice(first, first + size)
        gate = gating.make("switch", jitter=0.0)
        part = moejax.MoE(D, F, size, gate=gate, rngs=nnx.Rngs(0), capacity_factor=factor)
        part.router["router_DE"][...] = whole.router["router_DE"][:, own]
        for name in ("gate_EDF", "up_EDF", "down_EFD"):
            getattr(part, name)[...] = getattr(whole, name)[own]
        y_part, info_part = call(part, x, context)
        total += y_part
        balance.append(info_part.losses["load_balance"])
        dropped.append(info_part.stats.dropped_E)
        column = first // size
        np.testing.assert_array_equal(
            info.routing.expert_GTK[..., column], first + info_part.routing.expert_GTK[..., 0]
        )
        # Two ways of computing a softmax in float32.
        np.testing.assert_allclose(
            info.routing.weight_GTK[..., column], info_part.routing.weight_GTK[..., 0], rtol=2e-6
        )
        np.testing.assert_array_equal(info.kept_GTK[..., column], info_part.kept_GTK[..., 0])
        np.testing.assert_array_equal(info.stats.dropped_K[column], info_part.stats.dropped_E.sum())
    assert info.stats.dropped_E.sum() > 0
    np.testing.assert_array_equal(info.stats.dropped_E, jnp.concatenate(dropped))
    # k float32 terms in another order, and the same for the losses.
    np.testing.assert_allclose(y, total, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(info.losses["load_balance"], np.mean(balance), rtol=1e-5)


def test_a_worked_example_is_reproduced():
    """Logits (0, log 3 | log 4, 0): experts 1 and 2 with weights 3/4 and 4/5."""
    gate = gating.make("prototypes", k=2)
    logits = jnp.log(jnp.asarray([[[1.0, 3.0, 4.0, 1.0]]]))
    context = moejax.Context.of(1, 1).grouped(1, False)
    out = gate({"router_DE": jnp.eye(4)}, (), logits, context)
    np.testing.assert_array_equal(out.routing.expert_GTK, [[[1, 2]]])
    np.testing.assert_allclose(out.routing.weight_GTK, [[[0.75, 0.8]]], rtol=1e-6)  # float32
    np.testing.assert_allclose(out.stats.probs_GTE, [[[0.125, 0.375, 0.4, 0.1]]], rtol=1e-6)


def test_one_prototype_equals_switch_and_one_expert_per_prototype_cannot_be_trained():
    x = jax.random.normal(jax.random.key(1), (1, L, D))
    context = moejax.Context.of(1, L).grouped(1, False)
    params = {"router_DE": jax.random.normal(jax.random.key(2), (D, E))}
    ours, switch = (
        gating.make(name, k=1)(params, (), x, context).routing for name in ("prototypes", "switch")
    )
    np.testing.assert_array_equal(ours.expert_GTK, switch.expert_GTK)
    np.testing.assert_allclose(ours.weight_GTK, switch.weight_GTK, rtol=1e-6)  # float32
    with pytest.raises(ValueError, match=r"gate\.k=12 .* no gradient"):
        gating.make("prototypes", k=E).check(E, train=True)
    gating.make("prototypes", k=E).check(E, train=False)


def test_prototypes_that_do_not_divide_the_experts_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"gate\.k=5 .* num_experts=12; use num_experts=15"):
        gating.make("prototypes", k=5).check(E, train=True)
