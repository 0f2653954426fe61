"""Transports by name and by value, and a transport from outside the package."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax.config import default, moe_config, validate
from moejax.dispatch import (
    TRANSPORTS,
    AllExperts,
    Cells,
    Dropless,
    exchange,
    without_slots,
)
from moejax.dispatch.api import dispatch
from moejax.errors import UserError
from moejax.experts import ffn_one
from moejax.options import DispatchOptions
from moejax.types import Counts, Transport
from tests import meshes

B, L, D, F, E = 4, 6, 8, 12, 4


@dataclasses.dataclass(frozen=True)
class Masked(Transport):
    """Every expert of every shard on all tokens, all at once."""

    def run(self, tokens, weights, job):
        x_tD, expert_tK, weight_tK = tokens.flat()
        x_TD, expert_TK, weight_TK = (
            exchange.gather_tokens(a, job.site) for a in (x_tD, expert_tK, weight_tK)
        )
        id_e = exchange.shard_index(job.site) * job.own_experts + jnp.arange(job.own_experts)
        hit_TKe = expert_TK[..., None] == id_e
        share_Te = jnp.sum(jnp.where(hit_TKe, weight_TK[..., None], 0.0), axis=1)
        out_eTD = jax.vmap(lambda expert: ffn_one(expert, x_TD, job.activation))(weights)
        y_tD = exchange.scatter_sum(jnp.einsum("te,etd->td", share_Te, out_eTD), job.site)
        return tokens.grouped(exchange.sum_over_tensor(y_tD, job.site), weight_tK > 0)

    def rows(self, counts: Counts):
        return counts.tokens * counts.num_experts, counts.tokens * counts.shards


@pytest.fixture
def masked(monkeypatch):
    """The one line that a transport of one's own needs."""
    monkeypatch.setitem(TRANSPORTS, "masked", Masked)


@pytest.fixture
def as_installed():
    """Without the checks of annotations that only this suite has, as in a user's program."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def make(**choices):
    return moejax.MoE(D, F, E, gate=moejax.gating.make("mixtral"), rngs=nnx.Rngs(0), **choices)


def outcome(layer, train):
    """Output and gradients."""
    graph, params = nnx.split(layer)
    x = jax.random.normal(jax.random.key(1), (B, L, D))

    def objective(params, x):
        y, info = nnx.merge(graph, params)(x, train=train)
        return jnp.sum(jnp.sin(y)) + info.losses["load_balance"], y

    return jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))(params, x)


@pytest.mark.parametrize("shape", [None, {"data": 2, "expert": 2, "tensor": 2}], ids=str)
def test_a_transport_from_outside_is_added_by_one_line(masked, shape):
    """By name, in a layer in training and in evaluation, on a mesh and without; and in a config."""
    named = make(transport="masked", eval_transport="masked")
    assert named.config.transport == named.config.eval_transport == Masked()
    with meshes.entered(shape):
        for train in (True, False):
            wanted = outcome(make(transport="dropless"), train)
            # float32 sums of the same products in another order.
            close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
            jax.tree.map(close, outcome(named, train), wanted)


def test_a_config_names_a_transport_from_outside(masked):
    config = default()
    config.moe.transport = "masked"
    config.moe.group = "batch"  # no slots, so that a group may be on several devices
    validate(config)
    assert moe_config(config).transport == Masked()
    config.moe.transport = "mask"
    with pytest.raises(UserError, match="did you mean 'masked'"):
        validate(config)


def test_a_config_gives_transports_with_a_capacity_factor_for_each_phase():
    config = default()
    config.moe.update(eval_transport="cells", capacity_factor=2.0, eval_capacity_factor=3.0)
    config.moe.update(priority="gate", reroute=1)
    moe = moe_config(config)
    assert moe.transport == Cells(2.0, "gate", 1) and moe.eval_transport == Cells(3.0, "gate", 1)
    assert moe_config(config, eval_transport="dropless").eval_transport == Dropless()


def test_only_cells_have_slots():
    assert set(TRANSPORTS) - set(without_slots()) == {"cells"}
    assert all(TRANSPORTS[name]().slot_rules is None for name in without_slots())


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"transport": "teleport"}, "^transport='teleport' is unknown; use one of cells, dropl"),
        ({"eval_transport": "x"}, "^eval_transport='x' is unknown; use one of cells, dropless,"),
        ({"priority": "vip"}, "^priority='vip' is unknown; use one of position, choice, gate, ran"),
        ({"transport": "gather", "priority": "vip"}, "^priority='vip' is unknown"),
        ({"reroute": -1}, "^reroute=-1 must be 0"),
        ({"capacity_factor": 0.0}, "^capacity_factor=0.0 must be a finite number above 0"),
        ({"eval_capacity_factor": -1.0}, "^eval_capacity_factor=-1.0 must be a finite"),
        ({"transport": Dropless(), "priority": "vip"}, "^priority='vip' is unknown"),
    ],
)  # fmt: skip
def test_a_bad_name_or_option_is_named_in_the_error(choices, message):
    with pytest.raises(ValueError, match=message):
        assert DispatchOptions(num_experts=E, **choices).config


def test_a_layer_accepts_transports_by_value_and_by_name():
    by_value = make(transport=Cells(2.0, "choice"), eval_transport=AllExperts())
    assert by_value.config.transport == Cells(2.0, "choice")
    by_name = make(
        transport="cells", capacity_factor=2.0, priority="choice", eval_transport="all_experts"
    )
    assert by_value.config == by_name.config
    mixed = make(transport=Dropless(), eval_transport="cells", eval_capacity_factor=1.5)
    assert mixed.config.eval_transport == Cells(1.5)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"transport": Cells(), "capacity_factor": 2.0}, "capacity_factor=2.0 belongs"),
        ({"eval_transport": Cells(), "eval_capacity_factor": 2.0}, "eval_capacity_factor=2.0"),
        ({"transport": Cells(), "eval_transport": Cells(), "reroute": 1}, "reroute=1 belongs"),
    ],
)
def test_an_option_that_a_value_would_ignore_is_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        make(**choices)


def test_preset_options_do_not_change_a_transport_value():
    layer = moejax.MoE(D, F, E, gate="stablemoe", vocab_size=9, transport=Cells(), rngs=nnx.Rngs(0))
    assert moejax.gating.preset_overrides("stablemoe")["capacity_factor"] == 2.0
    assert layer.config.transport == Cells(1.25)


def test_a_name_is_refused_where_a_transport_value_is_required(as_installed):
    name: Any = "cells"
    message = "transport='cells' is not a transport; use a value such as moejax.dispatch.Dropless()"
    with pytest.raises(ValueError, match=re.escape(message)):
        moejax.types.MoEConfig(E, name, Dropless())
    layer = make()
    routing = moejax.Routing(jnp.zeros((1, 1, 1), jnp.int32), jnp.ones((1, 1, 1)))
    with pytest.raises(ValueError, match=re.escape(message)):
        dispatch(jnp.ones((1, 1, D)), routing, jnp.ones((1, 1)), layer.expert_weights(),
                 transport=name, activation="swiglu")  # fmt: skip
