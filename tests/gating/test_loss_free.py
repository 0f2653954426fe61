"""Loss-free balancing and limited routing against DeepSeek's formulas in plain numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import gating
from moejax.types import Context, GateSpec, MoEStats
from tests.gates import stats_of

GROUPS, T, E = 2, 24, 16


def sigmoid(h):
    return 1 / (1 + np.exp(-h))


def softmax(h):
    e = np.exp(h - h.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


SCORES = {
    "sigmoid": sigmoid, "softmax": softmax, "sqrt_softplus": lambda h: np.sqrt(np.log1p(np.exp(h))),
}  # fmt: skip


def published_gate(h, bias, *, k, score, num_groups, top_groups, group_score, route_scale):
    """DeepSeek-V3's gate for one token: experts and weights, with numpy's stable sorts."""
    original = SCORES[score](h)
    scores = original + bias
    if num_groups > 1:
        apart = scores.reshape(num_groups, -1)
        best = np.sort(apart, axis=1)[:, ::-1]
        worth = best[:, :2].sum(1) if group_score == "top2" else best[:, 0]
        keep = np.argsort(-worth, kind="stable")[:top_groups]
        mask = np.full(apart.shape, -np.inf)
        mask[keep] = 0
        scores = (apart + mask).reshape(-1)
    chosen = np.argsort(-scores, kind="stable")[:k]
    weights = original[chosen]
    if score != "softmax":
        weights = weights / weights.sum()
    return chosen, weights * route_scale


def logits(seed=0, scale=2.0):
    return scale * np.random.default_rng(seed).normal(size=(GROUPS, T, E)).astype(np.float32)


@functools.partial(jax.jit, static_argnames="gate")
def run(gate, params, state, x, context):
    return gate(params, state, x, context)


def call(gate, h, bias, valid=None, rows=1):
    """The gate on tokens whose logits are ``h`` (the router is the identity)."""
    groups, tokens, experts = h.shape
    known = {} if valid is None else {"valid_BL": jnp.asarray(valid)}
    context = Context.of(groups, tokens, **known).grouped(rows, True)
    x = jnp.asarray(h).reshape(groups // rows, rows * tokens, experts)
    params, state = {"router_DE": jnp.eye(experts)}, {"bias_E": jnp.asarray(bias)}
    return run(gate, params, state, x, context)


CASES = {
    "v3": dict(k=4, score="sigmoid", num_groups=4, top_groups=2, group_score="top2", scale=2.5),
    "v3 without groups": dict(
        k=3, score="sigmoid", num_groups=1, top_groups=1, group_score="top2", scale=1.0
    ),
    "v2": dict(k=3, score="softmax", num_groups=8, top_groups=3, group_score="max", scale=16.0),
    "v4": dict(
        k=3, score="sqrt_softplus", num_groups=1, top_groups=1, group_score="top2", scale=1.5
    ),
    "groups of one expert": dict(
        k=2, score="sigmoid", num_groups=16, top_groups=2, group_score="top2", scale=1.0
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_experts_and_weights_equal_the_published_ones(case):
    fields = dict(CASES[case])
    fields["route_scale"] = fields.pop("scale")
    rng = np.random.default_rng(3)
    # Biases below -1 make every biased score negative: a mask of 0 would win.
    bias = (rng.normal(size=E) - 1.5).astype(np.float32)
    gate = gating.make("loss_free", renormalize=fields["score"] != "softmax", **fields)
    gate.check(E, train=True)
    h = logits()
    routing = call(gate, h, bias).routing
    moved = 0
    for place in np.ndindex(h.shape[:2]):
        chosen, weights = published_gate(h[place].astype(np.float64), bias, **fields)
        np.testing.assert_array_equal(routing.expert_GTK[place], chosen)
        np.testing.assert_allclose(routing.weight_GTK[place], weights, rtol=1e-5)  # float32
        unlimited = published_gate(h[place], 0 * bias, **{**fields, "num_groups": 1})[0]
        moved += set(unlimited) != set(chosen)
    assert moved > T, "bias and groups decide something"


def test_adding_a_constant_to_every_bias_changes_nothing():
    gate = gating.make("loss_free", k=3, num_groups=4, top_groups=2)
    # Rounding moves a biased score by 1e-7 at most; no two of a token's are that close here.
    bias = np.random.default_rng(1).normal(size=E).astype(np.float32)
    one, other = (call(gate, logits(), bias + c).routing for c in (0.0, 2.0))
    np.testing.assert_array_equal(one.expert_GTK, other.expert_GTK)
    np.testing.assert_array_equal(one.weight_GTK, other.weight_GTK)


def test_softmax_scores_without_a_bias_equal_top_k():
    gate = gating.make("loss_free", k=3, score="softmax", renormalize=False)
    out = call(gate, logits(), np.zeros(E, np.float32)).routing
    expert, weight = gating.top_k_routing(jnp.asarray(logits()), 3)
    np.testing.assert_array_equal(out.expert_GTK, expert)
    np.testing.assert_allclose(out.weight_GTK, weight, rtol=1e-5)  # float32


def stats(load):
    zero = jnp.int32(0)
    load = jnp.asarray(load, jnp.int32)
    return MoEStats(zero, load, 0 * load, zero, zero, zero, load, zero)


def test_the_bias_moves_towards_balance_by_the_same_step_for_every_expert():
    gate = gating.make("loss_free", bias_rate=0.25)
    state = {"bias_E": jnp.asarray([0.0, 1.0, -1.0, 0.5])}
    got = gate.update(state, stats([9, 1, 4, 2]))  # mean 4
    np.testing.assert_array_equal(got["bias_E"], [-0.25, 1.25, -1.0, 0.75])
    for load in ([7, 7, 7, 7], [0, 0, 0, 0]):
        np.testing.assert_array_equal(gate.update(state, stats(load))["bias_E"], state["bias_E"])


def test_padding_does_not_move_the_bias():
    """The same tokens with and without padding that would all go to one expert."""
    gate = gating.make("loss_free")
    h = logits()
    padded = np.concatenate([h, np.broadcast_to(np.eye(E, dtype=np.float32)[0] * 9, h.shape)], 1)
    valid = np.arange(2 * T)[None] < np.asarray([T, T])[:, None]
    zero = {"bias_E": jnp.zeros(E)}
    plain, with_padding = call(gate, h, zero["bias_E"]), call(gate, padded, zero["bias_E"], valid)
    moved = gate.update(zero, stats_of(plain, jnp.ones((GROUPS, T), bool)))
    assert jnp.abs(moved["bias_E"]).max() > 0
    np.testing.assert_array_equal(
        moved["bias_E"], gate.update(zero, stats_of(with_padding, jnp.asarray(valid)))["bias_E"]
    )
    for name, value in plain.losses.items():
        np.testing.assert_allclose(with_padding.losses[name], value, rtol=1e-6)  # float32


def max_violation(load):
    return float(load.max() / load.mean() - 1)


@functools.partial(jax.jit, static_argnames=("gate", "steps"))
def simulate(gate, offset_E, steps):
    """Steps with fresh tokens whose logits are noise plus ``offset``; bias and last load."""
    tokens = 4096
    context = Context.of(1, tokens).grouped(1, True)
    params, spec = {"router_DE": jnp.eye(len(offset_E))}, GateSpec(len(offset_E), len(offset_E))

    def step(i, carry):
        state, _ = carry
        h = offset_E + jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (1, tokens, 8))
        out = gate(params, state, h, context)
        summed = stats_of(out, jnp.ones((1, tokens), bool))
        return gate.update(state, summed), summed.load_E

    zero = jnp.zeros(len(offset_E), jnp.int32)
    return jax.lax.fori_loop(0, steps, step, (gate.init_state(spec), zero))


@pytest.mark.slow
def test_skewed_logits_are_balanced_within_gap_over_rate_steps():
    gate = gating.LossFree(k=2, bias_rate=0.005)
    offset = jnp.linspace(0.0, 2.0, 8)
    steps = int(float(offset[-1] - offset[0]) / gate.bias_rate)
    _, before = simulate(gate, offset, 1)
    state, after = simulate(gate, offset, steps)
    assert max_violation(before) > 0.5
    assert max_violation(after) < 0.1
    assert (jnp.diff(state["bias_E"]) < 0).all(), "the favourites are held back most"


@pytest.mark.parametrize("rows", [1, 2])
def test_the_sequence_loss_counts_the_best_scores_without_bias_per_sequence(rows):
    """DeepSeek-V3, equations 17 to 20, sequence by sequence whatever the routing group."""
    k, weight = 3, 0.5
    gate = gating.make("loss_free", k=k, sequence_loss=weight, num_groups=4, top_groups=1)
    h = logits(5)
    valid = np.arange(T)[None] < np.asarray([T, T // 3])[:, None]
    bias = np.linspace(-1, 1, E).astype(np.float32)
    total = 0.0
    for h_TE, valid_T in zip(h, valid, strict=True):
        s = sigmoid(h_TE[valid_T].astype(np.float64))
        share = s / s.sum(-1, keepdims=True)
        f = np.zeros(E)
        for row in s:
            for e in np.argsort(-row)[:k]:
                f[e] += E / (k * len(s))
        total += len(s) * (f * share.mean(0)).sum()
    out = call(gate, h, bias, valid, rows)
    wanted = weight * total / valid.sum()
    np.testing.assert_allclose(out.losses["sequence_balance"], wanted, rtol=1e-5)  # float32
    assert wanted > weight, "not balanced"
    assert "device_balance" not in out.losses


@pytest.mark.parametrize("score", SCORES)
def test_the_routers_probabilities_are_the_scores_over_their_sum(score):
    """DeepSeek-V3, equation 19: what every balance loss and statistic sees, without the bias."""
    bias = np.linspace(-1, 1, E).astype(np.float32)
    h = logits(9)
    stats = call(gating.make("loss_free", score=score), h, bias).stats
    s = SCORES[score](h.astype(np.float64))
    wanted = s / s.sum(-1, keepdims=True)
    np.testing.assert_allclose(stats.probs_GTE, wanted, rtol=1e-5)  # float32
    np.testing.assert_allclose(stats.load_GTE, wanted, rtol=1e-5)
    np.testing.assert_array_equal(stats.logits_GTE, h)


def test_the_device_loss_counts_whole_groups_and_is_1_at_balance():
    """DeepSeek-V2's device-level loss: mean f of a device times its summed P."""
    k, devices = 2, 4
    gate = gating.make("loss_free", k=k, score="softmax", num_groups=devices, top_groups=2,
                       sequence_loss=0.0, device_loss=1.0)  # fmt: skip
    h = logits(7)
    out = call(gate, h, np.zeros(E, np.float32))
    values = []
    for expert_TK, h_TE in zip(np.asarray(out.routing.expert_GTK), h, strict=True):
        f = np.bincount(expert_TK.reshape(-1), minlength=E) * E / (k * T)
        p = softmax(h_TE.astype(np.float64)).mean(0)
        parts = [slice(d * E // devices, (d + 1) * E // devices) for d in range(devices)]
        values.append(sum(f[part].mean() * p[part].sum() for part in parts))
    np.testing.assert_allclose(out.losses["device_balance"], np.mean(values), rtol=1e-5)
    assert abs(np.mean(values) - 1) > 1e-3
    # Every token has two favourites on one device, each device as many tokens: always the same
    # two of its four experts.
    favourite = np.eye(E)[np.arange(T) % devices * 4] + np.eye(E)[np.arange(T) % devices * 4 + 1]
    h = 3 * np.broadcast_to(favourite, (GROUPS, T, E)).astype(np.float32)
    balanced = call(gate, h, np.zeros(E, np.float32))
    np.testing.assert_array_equal(
        np.unique(balanced.routing.expert_GTK), [0, 1, 4, 5, 8, 9, 12, 13]
    )
    np.testing.assert_allclose(balanced.losses["device_balance"], 1.0, rtol=1e-5)


def test_no_token_leaves_its_top_groups_even_when_all_scores_tie():
    limited = gating.limit_groups(jnp.zeros((5, 12)), 4, 2, "top2")
    np.testing.assert_array_equal(jnp.isfinite(limited).sum(-1), 6)
    np.testing.assert_array_equal(jnp.isfinite(limited[0]), [True] * 6 + [False] * 6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_groups": 3}, r"gate\.num_groups=3 does not divide num_experts=16"),
        ({"num_groups": 4, "top_groups": 5}, r"gate\.top_groups=5 .* gate\.num_groups=4"),
        ({"k": 5, "num_groups": 4}, r"gate\.k=5 experts do not fit in gate\.top_groups=1"),
        (
            {"score": "relu"},
            r"gate\.score='relu' is unknown; use one of sigmoid, softmax, sqrt",
        ),
        ({"group_score": "mean"}, r"gate\.group_score='mean' is unknown"),
        ({"bias_rate": -0.1}, r"gate\.bias_rate=-0\.1 must be 0 or above"),
        ({"k": 1}, r"gate\.k=1 with gate\.renormalize=True"),
    ],
)
def test_fields_that_contradict_each_other_are_reported_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        gating.make("loss_free", **fields).check(E, train=True)
    assert "\n" not in str(caught.value)


def test_a_preset_too_large_for_the_experts_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"gate\.k=8 .* raise num_experts or gate\.top_groups"):
        gating.make("deepseek_v3").check(8, train=True)
    gating.make("deepseek_v3").check(256, train=True)
    gating.make("deepseek_v2").check(160, train=True)


@pytest.mark.parametrize("score", ["sigmoid", "sqrt_softplus"])
def test_scores_that_all_underflow_still_have_weights_that_sum_to_the_scale(score):
    gate = gating.make("loss_free", route_scale=2.5, score=score)
    h = np.full((1, 3, E), -1e4, np.float32)
    out = call(gate, h, np.zeros(E, np.float32))
    np.testing.assert_allclose(out.routing.weight_GTK.sum(-1), 2.5, rtol=1e-6)
    np.testing.assert_allclose(out.stats.probs_GTE, 1 / E, rtol=1e-5)
