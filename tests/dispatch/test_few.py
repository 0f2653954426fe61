"""The transport of steps that decode gives what every other transport gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.dispatch import Dropless
from moejax.dispatch.api import dispatch
from moejax.dispatch.few import MOST_TOKENS, Few
from moejax.types import ExpertWeights
from tests import meshes

D, F, E = 8, 12, 8
SHAPES = {"pair by pair": (1, 3, 2), "every expert": (2, 6, 3), "dropless": (1, 24, 2)}


def weights(bias: bool) -> ExpertWeights:
    keys = jax.random.split(jax.random.key(1), 5)
    shapes = [(E, D, F), (E, D, F), (E, F, D), (E, F), (E, F)]
    drawn = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    return ExpertWeights(*drawn[: 5 if bias else 3])


def run(transport, name, bias, mesh=None):
    groups, tokens, k = SHAPES[name]
    routing = meshes.inactive(meshes.routing("zipf", groups, tokens, k, E))
    x_GTD = jax.random.normal(jax.random.key(0), (groups, tokens, D))
    with meshes.entered(mesh):
        return dispatch(
            x_GTD,
            routing,
            jnp.zeros((groups, tokens)),
            weights(bias),
            transport=transport,
            activation="clamped_swiglu" if bias else "swiglu",
        )


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("name", SHAPES)
def test_outputs_are_those_of_dropless(name, bias):
    groups, tokens, k = SHAPES[name]
    assert (groups * tokens > MOST_TOKENS) == (name == "dropless")
    assert (groups * tokens * k < E) == (name == "pair by pair")
    for got, wanted in zip(run(Few(), name, bias), run(Dropless(), name, bias), strict=True):
        # float32 sums of 12 products, in another order.
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


def test_an_inactive_pair_may_have_any_expert():
    """The output of the expert of an inactive pair is infinite."""
    own = weights(False)
    own = own._replace(down_EFD=own.down_EFD.at[3].set(jnp.inf))
    x_GTD = jax.random.normal(jax.random.key(0), (1, 1, D))
    routing = meshes.routing("balanced", 1, 1, 2, E)
    routing = type(routing)(jnp.array([[[1, 3]]]), jnp.array([[[0.5, 0.0]]]))
    y_GTD, kept = dispatch(
        x_GTD, routing, jnp.zeros((1, 1)), own, transport=Few(), activation="swiglu"
    )
    assert np.isfinite(y_GTD).all() and kept.tolist() == [[[True, False]]]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", meshes.ALL, ids=meshes.name)
@pytest.mark.parametrize("name", SHAPES)
def test_outputs_are_the_same_on_every_mesh(name, mesh):
    wanted, got = run(Dropless(), name, False), run(Few(), name, False, mesh)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
