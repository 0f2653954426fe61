"""The particular behaviour of each gate, on routings that can be checked by hand or by counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from moejax import UserError, gating
from moejax.types import Context, GateSpec

GROUPS, TOKENS, WIDTH, EXPERTS = 3, 64, 4, 5


def call(name, logits=None, train=True, seed=0, **fields):
    """A gate on tokens whose logits are given (router = identity) or random."""
    gate = gating.make(name, **fields)
    if logits is not None:
        x = jnp.asarray(logits, jnp.float32)
        spec = GateSpec(x.shape[-1], x.shape[-1])
        params = {"router_DE": jnp.eye(x.shape[-1]), "noise_DE": jnp.zeros((x.shape[-1],) * 2)}
    else:
        x = jax.random.normal(jax.random.key(seed), (GROUPS, TOKENS, WIDTH))
        spec = GateSpec(WIDTH, EXPERTS)
        params = gate.init(jax.random.key(1), spec)
    context = Context.of(*x.shape[:2], key=jax.random.key(seed)).grouped(1, train)
    return gate(params, gate.init_state(spec), x, context)


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    "name", ["switch", "mixtral", "shazeer", "gshard", "dense", "base", "sbase"]
)
def test_every_router_breaks_ties_the_same_way_and_survives_extreme_logits(name):
    tied = call(name, np.zeros((1, 3, 4)), train=False).routing
    np.testing.assert_array_equal(
        tied.expert_GTK,
        np.broadcast_to(np.arange(tied.expert_GTK.shape[-1]), tied.expert_GTK.shape),
    )
    huge = call(name, np.array([[[1e4, -1e4, 0.0, 5e3]]]), train=False)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(huge))


def test_switch_weights_its_expert_by_its_probability():
    logits = np.array([[[1.0, 3.0, 2.0], [0.5, 0.0, -1.0]]])
    out = call("switch", logits, train=False)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_array_equal(out.routing.expert_GTK[0], [[1], [0]])
    wanted = [probs[0, 0, 1], probs[0, 1, 0]]
    np.testing.assert_allclose(out.routing.weight_GTK[0, :, 0], wanted, rtol=1e-6)  # float32


def test_switch_jitter_multiplies_the_router_input_within_its_range():
    """One token repeated: every logit stays within 1 +- jitter of the clean one, and varies."""
    logits = np.broadcast_to([2.0, 1.0, -3.0], (1, 500, 3))
    noisy = call("switch", logits, jitter=0.1).stats.logits_GTE
    ratio = np.asarray(noisy / logits)
    assert ratio.min() > 0.9 and ratio.max() < 1.1 and ratio.std() > 0.05
    np.testing.assert_array_equal(
        call("switch", logits, train=False, jitter=0.1).stats.logits_GTE, logits
    )


def test_a_routers_bias_is_a_parameter_that_starts_at_zero_and_is_added_to_its_logits():
    gate, spec = gating.TopK(k=2, bias=True), GateSpec(WIDTH, EXPERTS)
    params = gate.init(jax.random.key(1), spec)
    np.testing.assert_array_equal(params["bias_E"], np.zeros(EXPERTS))
    assert set(gating.TopK(k=2).init(jax.random.key(1), spec)) == {"router_DE"}
    params["bias_E"] = jnp.linspace(0.0, 8.0, EXPERTS)
    x = jax.random.normal(jax.random.key(0), (GROUPS, TOKENS, WIDTH))
    out = gate(params, (), x, Context.of(GROUPS, TOKENS).grouped(1, True))
    wanted = np.asarray(x, np.float64) @ params["router_DE"] + params["bias_E"]
    np.testing.assert_allclose(out.stats.logits_GTE, wanted, rtol=1e-5, atol=1e-5)  # float32
    np.testing.assert_array_equal(out.routing.expert_GTK, np.argsort(-wanted)[..., :2])


def test_mixtral_weights_sum_to_one():
    np.testing.assert_allclose(call("mixtral").routing.weight_GTK.sum(-1), 1.0, rtol=1e-6)


def test_shazeer_starts_with_equal_probabilities_and_balanced_noise():
    """Zero matrices: clean probabilities are uniform and the noise alone spreads the load."""
    out = call("shazeer")
    np.testing.assert_allclose(out.stats.probs_GTE, 1 / EXPERTS, rtol=1e-6)
    share = np.bincount(np.asarray(out.routing.expert_GTK).ravel(), minlength=EXPERTS)
    share = share / share.sum()
    # 384 draws of 5 equal chances: standard deviation 0.02.
    assert np.abs(share - 1 / EXPERTS).max() < 0.1
    np.testing.assert_allclose(out.stats.load_GTE.sum(-1).mean(), 2.0, atol=0.25)


def test_shazeers_load_is_the_selection_probability_under_noise_of_at_least_min_std():
    """Without noise in evaluation; the others' second best is 0.5 for the two chosen, else 1."""
    logits = np.array([2.0, 1.0, 0.5, -1.0])
    load = call("shazeer", logits[None, None], train=False, min_std=0.25).stats.load_GTE[0, 0]
    wanted = scipy.stats.norm.cdf((logits - [0.5, 0.5, 1.0, 1.0]) / (np.log(2) + 0.25))
    np.testing.assert_allclose(load, wanted, rtol=1e-5)  # float32


def test_shazeers_statistics_use_logits_without_noise():
    logits = np.broadcast_to([2.0, 1.0, 0.5, -1.0], (1, 300, 4))
    out = call("shazeer", logits)
    np.testing.assert_array_equal(out.stats.logits_GTE, logits)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(out.stats.probs_GTE, probs, rtol=1e-6)
    assert len(np.unique(out.routing.weight_GTK)) > 300, "the weights are noisy"


def test_gshard_keeps_the_second_expert_with_twice_its_weight_as_probability():
    """The paper: the second is dispatched with probability min(1, 2 g2)."""
    for gap in (0.2, 1.0, 2.0):
        logits = np.broadcast_to([gap, 0.0, -9.0], (1, 4000, 3))
        weight = call("gshard", logits).routing.weight_GTK[0]
        second = 1 / (1 + np.exp(gap))
        expected = min(1.0, 2 * second)
        kept = float((weight[:, 1] > 0).mean())
        assert abs(kept - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000) + 1e-6
        np.testing.assert_allclose(weight[:, 0], 1 - second, rtol=1e-5)  # not renormalised
        np.testing.assert_allclose(weight[:, 1][weight[:, 1] > 0], second, rtol=1e-5)


def test_gshard_visits_both_experts_in_evaluation():
    assert (call("gshard", train=False).routing.weight_GTK > 0).all()


def test_dense_visits_all_experts_with_softmax_weights():
    out = call("dense")
    np.testing.assert_array_equal(out.routing.weight_GTK, out.stats.probs_GTE)


def test_noise_depends_on_the_row_id_and_not_on_its_position():
    gate = gating.make("shazeer")
    params = gate.init(jax.random.key(1), GateSpec(WIDTH, EXPERTS))
    x = jax.random.normal(jax.random.key(0), (4, TOKENS, WIDTH))

    def experts(rows, x):
        context = Context.of(*x.shape[:2], key=jax.random.key(7), row_B=jnp.asarray(rows))
        return gate(params, (), x, context.grouped(1, True)).routing.expert_GTK

    whole = experts([10, 11, 12, 13], x)
    np.testing.assert_array_equal(experts([12, 10], x[jnp.asarray([2, 0])])[1], whole[0])
    assert (experts([11, 10, 12, 13], x) != whole).any()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("nope", {}, "gate 'nope' is unknown; .*valid: base, "),
        ("swich", {}, "did you mean 'switch'"),
        ("switch", {"kk": 1}, "gate 'switch' has no field 'kk'; did you mean 'k'"),
        ("no.such.module:Gate", {}, "cannot be imported"),
        ("math:pi", {}, "must be a dataclass"),
        (
            "moejax.options:DispatchOptions",
            {"num_experts": 4},
            "lacks check, .*trained_by, __call__",
        ),
    ],
)
def test_unknown_names_and_fields_are_reported_in_one_line(name, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        gating.make(name, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("top_k", {"k": 0}),
        ("top_k", {"k": 6}),
        ("top_k", {"jitter": 1.0}),
        ("switch", {"init_scale": 0.0}),
        ("shazeer", {"min_std": 0.0}),
        ("gshard", {"second_policy": "never"}),
        ("gshard", {"threshold": 0.0}),
        ("dense", {"init_scale": -1.0}),
    ],
)
def test_values_out_of_range_are_refused_with_their_field(name, fields):
    (field,) = fields
    with pytest.raises(ValueError, match=field):
        gating.make(name, **fields).check(EXPERTS, train=True)
