"""StableMoE: the table of stage 2, the losses of stage 1, and the router frozen after it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import gating
from moejax.types import Context, GateSpec, GateTraits
from tests import steps

G, T, D, E, V = 3, 16, 6, 4, 40
STAGE = 10


def made(**fields):
    gate = gating.make("stablemoe", stage_steps=STAGE, distill_dim=5, **fields)
    params = gate.init(jax.random.key(0), GateSpec(D, E, vocab_size=V))
    keys = jax.random.split(jax.random.key(1), len(params))
    return gate, {
        name: jax.random.normal(key, params[name].shape)
        for name, key in zip(params, keys, strict=True)
    }


def tokens():
    return jax.random.normal(jax.random.key(2), (G, T, D))


def ids():
    return jax.random.randint(jax.random.key(3), (G, T), 0, V)


def call(gate, params, step=0, train=True, **known):
    known = {"token_BL": ids(), "step": jnp.int32(step), **known}
    return gate(params, (), tokens(), Context.of(G, T, **known).grouped(1, train))


@pytest.mark.parametrize(("step", "train"), [(STAGE, True), (999, True), (0, False), (999, False)])
def test_stage_2_and_evaluation_look_up_a_table_over_the_vocabulary(step, train):
    gate, params = made()
    table_V = np.argmax(
        np.asarray(params["embed_VR"], np.float64) @ np.asarray(params["distill_RE"]), -1
    )
    routing = call(gate, params, step, train).routing
    np.testing.assert_array_equal(routing.expert_GTK[..., 0], table_V[ids()])
    assert len(set(table_V)) == E


def test_stage_1_takes_the_nearest_centroid():
    gate, params = made()
    score = np.asarray(tokens() @ params["router_DE"], np.float64)
    for step in (0, STAGE - 1):
        routing = call(gate, params, step).routing
        np.testing.assert_array_equal(routing.expert_GTK[..., 0], score.argmax(-1))


@pytest.mark.parametrize("step", [0, STAGE])
def test_alpha_weighs_the_expert_and_keeps_the_rest_of_the_input_in_both_stages(step):
    gate, params = made()
    out = call(gate, params, step)
    score = jnp.take_along_axis(tokens() @ params["router_DE"], out.routing.expert_GTK, -1)[..., 0]
    alpha = 1 / (1 + np.exp(-np.asarray(score, np.float64)))
    np.testing.assert_allclose(out.routing.weight_GTK[..., 0], alpha, rtol=1e-5)
    assert out.identity_weight_GT is not None
    np.testing.assert_allclose(out.identity_weight_GT, 1 - alpha, rtol=1e-4, atol=1e-6)
    gate, params = made(residual=False)
    assert call(gate, params, step).identity_weight_GT is None


def test_the_losses_are_the_papers_sums_over_the_number_of_tokens():
    gate, params = made(balance_weight=0.2, distill_weight=0.7)
    valid = np.arange(T) < np.array([[T], [T - 5], [3]])
    out = call(gate, params, valid_BL=jnp.asarray(valid))
    score = np.asarray(tokens() @ params["router_DE"], np.float64)
    distilled = np.asarray(params["embed_VR"][ids()] @ params["distill_RE"], np.float64)
    balance, distill = 0.0, 0.0
    for g in range(G):
        own = np.flatnonzero(valid[g])
        chosen = score[g, own].argmax(-1)
        for e in range(E):
            count, mean = (chosen == e).sum(), len(own) / E
            balance += (
                (count - mean)
                / mean
                * sum(1 / (1 + np.exp(-score[g, t, e])) for t in own[chosen == e])
            )
        for t in own:
            log_p = distilled[g, t] - np.log(np.exp(distilled[g, t]).sum())
            distill -= log_p[score[g, t].argmax()]
    count = valid.sum()
    np.testing.assert_allclose(out.losses["stable_balance"], 0.2 * balance / count, rtol=1e-4)
    np.testing.assert_allclose(out.losses["stable_distill"], 0.7 * distill / count, rtol=1e-4)
    later = call(gate, params, STAGE, valid_BL=jnp.asarray(valid))
    assert all(loss == 0 for loss in later.losses.values())
    assert call(gate, params, train=False).losses == {}


def test_the_distilled_router_is_frozen_from_the_first_step_of_stage_2_on():
    frozen = GateTraits.of(gating.make("stablemoe", stage_steps=STAGE)).frozen
    for step, still in ((0, False), (STAGE - 1, False), (STAGE, True), (999, True)):
        assert frozen(jnp.int32(step)) == {"embed_VR": still, "distill_RE": still}


def test_distillation_trains_the_distilled_router_alone_and_stage_2_gives_it_no_gradient():
    gate, params = made(balance_weight=0.0)

    def losses(params, step):
        return sum(call(gate, params, step).losses.values())

    moved = {n: bool(g.any()) for n, g in jax.grad(losses)(params, 0).items()}
    assert moved == {"router_DE": False, "embed_VR": True, "distill_RE": True}

    def everything(params):
        out = call(gate, params, STAGE)
        return jnp.sum(jnp.sin(out.stats.logits_GTE)) + jnp.sum(out.routing.weight_GTK**2)

    moved = {n: bool(g.any()) for n, g in jax.grad(everything)(params).items()}
    assert moved == {"router_DE": True, "embed_VR": False, "distill_RE": False}


def test_stablemoe_needs_a_vocabulary():
    with pytest.raises(ValueError, match="vocab_size"):
        gating.make("stablemoe").init(jax.random.key(0), GateSpec(D, E))


@pytest.mark.parametrize(
    "fields",
    [{"distill_dim": 0}, {"init_scale": 0.0}, {"stage_steps": -1}, {"distill_weight": -1.0}],
)
def test_values_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        gating.make("stablemoe", **fields).check(E, train=True)


@pytest.mark.slow
def test_the_trainer_keeps_the_distilled_router_bit_equal_in_stage_2():
    """Momentum from stage 1 would keep moving it for a while, and Lion's sign would for ever."""
    changes = {"moe__gate__stage_steps": 2, "optim__name": "lion", "model__num_layers": 1}
    run = steps.make({"data": 1}, "stablemoe", **changes)
    seen = []
    state = run.init_state()
    with jax.set_mesh(run.mesh):
        for step in range(4):
            seen.append(jax.device_get(routers(state.params)))
            state, metrics = run.train_step(state, run.put(steps.batch(step)))
        seen.append(jax.device_get(routers(state.params)))
    assert np.isfinite(metrics["total_loss"])
    for name in ("embed_VR", "distill_RE", "router_DE"):
        changed = [bool((a[name] != b[name]).any()) for a, b in zip(seen, seen[1:], strict=False)]
        assert changed == [True, True, name == "router_DE", name == "router_DE"], name


def routers(params):
    return params["periods"]["blocks"]["0"]["ffn"]["router"]
