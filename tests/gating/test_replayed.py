"""Gate `replay` in a layer: the recorded layer's own output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import MoE, gating
from moejax.record import routing as recording
from moejax.record.routing import Recording, from_arrays
from moejax.train import record_routing
from moejax.types import Context

EXPERTS, LENGTH = 4, 16


def layer(gate, **choices):
    """With one seed all have the same experts, whatever the gate."""
    rngs = nnx.Rngs(0)
    return MoE(
        8, 8, EXPERTS, gate=gate, vocab_size=4, rngs=rngs, eval_capacity_factor=0.5, **choices
    )


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("gate", "choices"),
    [
        (gating.make("base"), {}),
        (gating.make("stablemoe"), {}),
        (gating.make("switch"), {"eval_transport": "cells"}),
        (gating.make("top_k", k=2), {"eval_transport": "cells", "reroute": 1}),
    ],
    ids=["base", "stablemoe", "switch, dropping", "top_k, rerouting"],
)
def test_a_layer_that_replays_its_own_routing_gives_the_same_output(gate, choices, tmp_path):
    x_BLD = jax.random.normal(jax.random.key(1), (2, LENGTH, 8))
    token_BL = np.zeros((2, LENGTH), np.int32)
    known = Context.of(2, LENGTH, token_BL=token_BL)
    own_BLD, info = layer(gate, **choices)(x_BLD, known, train=False)
    arrays = {
        name: np.asarray(x)[None] for name, x in record_routing.whole_routing(x_BLD, info).items()
    }
    arrays |= {"token": token_BL, "digest": np.arange(2, dtype=np.uint64)}
    part = from_arrays(arrays, EXPERTS)
    about = {"num_experts": EXPERTS, "sees": []}
    recording.save(tmp_path / "routing.npz", Recording(part, part, about))

    replay = layer(gating.make("replay", path=str(tmp_path / "routing.npz")))
    again_BLD, replayed = replay(x_BLD, train=False)
    # Both are sums of the same two terms or three, in float32; another transport, another order.
    np.testing.assert_allclose(again_BLD, own_BLD, atol=1e-6)
    for counted in ("load_E", "dropped_E", "unserved_tokens"):
        np.testing.assert_array_equal(
            getattr(replayed.stats, counted), getattr(info.stats, counted), counted
        )
    # Behind padding too, a token follows what was recorded of its position.
    pad = ((0, 0), (3, 0))
    given = Context.of(2, LENGTH + 3, valid_BL=jnp.pad(jnp.ones((2, LENGTH), bool), pad))
    late_BLD, late = replay(jnp.pad(x_BLD, (*pad, (0, 0))), given, train=False)
    np.testing.assert_allclose(late_BLD[:, 3:], own_BLD, atol=1e-6)
    np.testing.assert_array_equal(late.stats.load_E, info.stats.load_E)
    packed = Context.of(2, LENGTH, segment_BL=jnp.zeros((2, LENGTH), jnp.int32))
    with pytest.raises(ValueError, match=r"replay follows .* whole rows.*give each text the row"):
        replay(x_BLD, packed, train=False)
    assert (int(info.stats.dropped_E.sum()) > 0) == ("eval_transport" in choices)
    assert (arrays["identity"] != 0).any() == (info.identity_weight_GT is not None)
