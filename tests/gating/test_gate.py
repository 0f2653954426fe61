"""The gate contract: base classes, traits, capacity and visibility by capacity."""

import dataclasses
import inspect
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import moejax
from moejax import gating
from moejax.gating import ops
from moejax.gating.gate import token_choice_capacity
from moejax.gating.visibility import capacity_visibility, sparse_visibility
from moejax.options import DispatchOptions
from moejax.types import FORMER_MEMBERS, GateOutput, GateTraits

CLASSES = [getattr(gating, name) for name in gating.classes()]


@pytest.mark.parametrize("gate", CLASSES)
def test_a_gate_overrides_no_method_that_a_base_class_implements(gate):
    bases = [base for base in gate.__mro__[1:] if base is not object]
    for name, member in vars(gate).items():
        if inspect.isfunction(member) and not name.startswith("__"):
            assert not any(name in vars(base) for base in bases), f"{gate.__name__}.{name}"


@pytest.mark.parametrize("gate", CLASSES)
def test_base_classes_are_not_gates_and_never_implement_a_method_twice(gate):
    bases = [base for base in gate.__mro__[1:] if base is not object]
    assert bases and not set(bases) & set(CLASSES)
    implemented = [
        name for base in bases for name, m in vars(base).items() if inspect.isfunction(m)
    ]
    assert len(implemented) == len(set(implemented)), implemented


@dataclasses.dataclass(frozen=True)
class First(ops.Stateless):  # pyright: ignore
    """A gate as the first docs/add-a-gate.md showed it: no traits, and everything from ``ops``."""

    trained_by: ClassVar[str] = "task"

    def check(self, num_experts, train):
        pass

    def columns(self, num_experts):
        return 1

    def init(self, key, spec):
        return {"router_DE": ops.init_router(key, spec, scale=0.1)}

    def __call__(self, params, state, x_GTD, context):
        logits_GTE = ops.router_logits(x_GTD, params["router_DE"])
        stats = ops.softmax_stats(logits_GTE)
        expert_GTK = jnp.argmax(logits_GTE, axis=-1)[..., None].astype(jnp.int32)
        weight_GTK = ops.at_least_tiny(ops.at_expert(stats.probs_GTE, expert_GTK))
        return GateOutput(ops.masked(expert_GTK, weight_GTK, context.valid_GT), stats)

    def capacity(self, num_tokens, num_experts, factor):
        return ops.token_choice_capacity(num_tokens, num_experts, 1, factor)

    def visibility(self, moe):
        return ops.capacity_visibility(1, moe)


def layer(gate: Any) -> moejax.MoE:
    return moejax.MoE(8, 12, 4, gate=gate, vocab_size=16, rngs=nnx.Rngs(0))


def test_a_gate_without_traits_routes_as_top_1_does():
    gate: Any = First()
    assert GateTraits.of(gate) == GateTraits()
    x_BLD = jax.random.normal(jax.random.key(1), (2, 6, 8))
    same = gating.make("switch", jitter=0.0)
    y_BLD, info = layer(gate)(x_BLD)
    wanted_BLD, wanted = layer(same)(x_BLD)
    assert (info.routing.expert_GTK == wanted.routing.expert_GTK).all()
    assert (info.kept_GTK == wanted.kept_GTK).all()
    # top_k takes a weight from a log-sum-exp, which rounds otherwise.
    np.testing.assert_allclose(y_BLD, wanted_BLD, rtol=1e-5)
    assert len(jnp.unique(info.routing.expert_GTK)) > 1
    moe = DispatchOptions(num_experts=8, priority="random", group="2").config
    assert gate.visibility(moe) == same.visibility(moe)


@pytest.mark.parametrize("name", FORMER_MEMBERS)
def test_a_trait_stated_outside_traits_is_refused_by_name(name):
    gate: Any = type("Former", (First,), {name: None})()
    with pytest.raises(ValueError, match=f"gate Former has {name} .*from its method traits"):
        GateTraits.of(gate)
    with pytest.raises(ValueError, match=f"gate Former has {name} "):
        layer(gate)(jnp.zeros((1, 2, 8)))


def test_a_gates_own_traits_reach_the_layer():
    gate: Any = type("Reads", (First,), {"traits": lambda self: GateTraits(reads=("tokens",))})()
    with pytest.raises(ValueError, match="gate Reads routes by token ids"):
        layer(gate)(jnp.zeros((1, 2, 8)))
    known = moejax.Context.of(1, 2, token_BL=jnp.zeros((1, 2), jnp.int32))
    layer(gate)(jnp.zeros((1, 2, 8)), known)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4096), st.integers(1, 64), st.integers(1, 8), st.integers(1, 400))
def test_capacity_is_the_exact_ceiling_of_its_formula(tokens, num_experts, k, percent):
    """ceil(T k / E * factor) in rational arithmetic: no float crumb adds a slot."""
    k = min(k, num_experts)
    exact = math.ceil(tokens * k * percent / (num_experts * 100))
    got = token_choice_capacity(tokens, num_experts, k, percent / 100)
    assert got == max(1, min(exact, tokens))


@pytest.mark.parametrize(
    ("k", "priority", "group", "mark"),
    [
        (1, "position", "sequence", ""),
        (2, "position", "sequence", ""),
        (1, "choice", "sequence", ""),
        (2, "choice", "sequence", "train:future"),
        (1, "gate", "sequence", "train:future"),
        (2, "random", "1", "train:future"),
        (1, "position", "4", "train:others"),
        (2, "gate", "2", "train:future+others"),
    ],
)
def test_visibility_by_capacity_follows_the_table(k, priority, group, mark):
    moe = DispatchOptions(num_experts=8, priority=priority, group=group).config
    assert capacity_visibility(k, moe).mark == mark


def test_columns_compete_by_choice_only_if_max_active_selects_them():
    moe = DispatchOptions(num_experts=8, priority="choice").config
    marks = [sparse_visibility(moe, 1, max_active).mark for max_active in (0, 1, 3, 8)]
    assert marks == ["", "", "train:future", ""]


@pytest.mark.parametrize("gate", [gating.Hash(), gating.RL()])
def test_priority_gate_shows_no_later_token_if_all_weights_are_equal(gate):
    for priority, mark in (("gate", ""), ("random", "train:future")):
        moe = DispatchOptions(num_experts=8, priority=priority, group="sequence").config
        assert gate.visibility(moe).mark == mark


@pytest.mark.parametrize("change", [{"transport": "dropless"}, {"capacity_factor": 4.0}])
def test_capacity_that_never_binds_leaks_nothing(change):
    moe = DispatchOptions(num_experts=8, priority="gate", group="2", **change).config
    assert capacity_visibility(2, moe).mark == ""
