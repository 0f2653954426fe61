"""LIMoE's entropy losses against scipy, and the layer with these losses and counts per task."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax import losses
from tests.moes import B, E, L, context, make, tokens

TASK = jnp.arange(B) % 2
VALID = jnp.arange(L) < jnp.asarray([6, 5, 4, 3, 2, 1, 0, 6])[:, None]
FLOOR = (np.log(3), np.log(8))


def probabilities(seed=0, sharpness=2.0):
    return jax.nn.softmax(sharpness * jax.random.normal(jax.random.key(seed), (B, L, E)))


def values(prob, valid=VALID, task=TASK, floor=FLOOR):
    return losses.task_entropies(prob, valid, task, jnp.asarray(floor, jnp.float32))


def test_both_losses_of_both_tasks_equal_scipys_entropies_over_valid_tokens():
    prob, found = probabilities(), values(probabilities())
    # A floor that is reached, so that the loss is 0, and one that is not.
    assert float(found["global_entropy_0"]) == 0.0 < float(found["global_entropy_1"])
    for task, floor in enumerate(FLOOR):
        own = np.asarray(prob)[np.asarray(VALID & (TASK == task)[:, None])]
        local = scipy.stats.entropy(own, axis=1).mean()
        lack = max(0.0, floor - scipy.stats.entropy(own.mean(axis=0)))
        # float32 sums of at most 24 tokens and 8 experts
        np.testing.assert_allclose(found[f"local_entropy_{task}"], local, rtol=1e-5)
        np.testing.assert_allclose(found[f"global_entropy_{task}"], lack, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16), st.floats(0.0, 50.0))
def test_a_mixture_has_at_least_the_mean_entropy_of_its_parts(seed, sharpness):
    """With the floor at log E the losses of a task add up to at most log E (Jensen)."""
    found = values(probabilities(seed, sharpness), floor=(np.log(E), np.log(E)))
    for task in (0, 1):
        local, lack = found[f"local_entropy_{task}"], found[f"global_entropy_{task}"]
        assert local >= 0 and lack >= 0 and local + lack <= np.log(E) + 1e-5  # float32 rounding


def test_the_losses_are_largest_where_the_router_is_undecided_and_where_it_sends_all_to_one():
    undecided, one = jnp.full((B, L, E), 1 / E), jnp.zeros((B, L, E)).at[..., 5].set(1.0)
    floor = (np.log(E), np.log(E))
    # float32 sums of up to 12 tokens and 8 experts
    np.testing.assert_allclose(
        [values(undecided, floor=floor)[f"{kind}_entropy_1"] for kind in ("local", "global")],
        [np.log(E), 0.0],
        atol=1e-5,
    )
    np.testing.assert_allclose(
        [values(one, floor=floor)[f"{kind}_entropy_1"] for kind in ("local", "global")],
        [0.0, np.log(E)],
        atol=1e-5,
    )


def test_padding_may_hold_nan_and_a_task_without_tokens_has_zero_losses_and_gradients():
    logits = jax.random.normal(jax.random.key(0), (B, L, E))

    def total(logits, task):
        return sum(values(jax.nn.softmax(logits), task=task).values())

    step = jax.jit(jax.value_and_grad(total))
    value, grad = step(jnp.where(VALID[..., None], logits, jnp.nan), TASK)
    wanted, wanted_grad = step(logits, TASK)
    np.testing.assert_array_equal(value, wanted)
    # Softmax's own gradient of NaN is NaN; what reaches it from the losses is 0.
    np.testing.assert_array_equal(grad[VALID], wanted_grad[VALID])
    assert np.isfinite(wanted_grad).all() and np.abs(wanted_grad[VALID]).max() > 0
    found = values(jax.nn.softmax(logits), task=jnp.zeros(B, jnp.int32))
    assert found["local_entropy_1"] == found["global_entropy_1"] == 0.0


def descended(weights, steps=200):
    """A router whose text all goes to expert 0, after steps down the weighted losses; the logits of
    the tokens [B, L, E]."""
    x = jax.random.normal(jax.random.key(1), (B, L, E))
    away = jnp.zeros((2, E)).at[1, 0].set(3.0)
    names = ("local_entropy_0", "local_entropy_1", "global_entropy_0", "global_entropy_1")

    def logits(router):
        return x @ router["w"] + router["bias"][TASK][:, None]

    def loss(router):
        prob = jax.nn.softmax(logits(router))
        found = losses.task_entropies(prob, VALID, TASK, jnp.log(jnp.full(2, 4.0)))
        return sum(weight * found[name] for weight, name in zip(weights, names, strict=True))

    def down(router, _):
        return jax.tree.map(lambda p, g: p - 0.5 * g, router, jax.grad(loss)(router)), None

    start = {"w": 0.1 * jnp.eye(E), "bias": away}
    first = jax.grad(loss)(start)
    end, _ = jax.lax.scan(down, start, length=steps)
    return first, logits(start), logits(end)


def served(logits, task):
    return len(np.unique(np.argmax(logits, axis=-1)[VALID & (TASK == task)[:, None]]))


@pytest.mark.slow
def test_entropy_losses_alone_spread_text_that_all_goes_to_one_expert():
    first, before, after = descended((0.0, 1.0, 0.0, 1.0))
    assert served(before, 1) == 1
    assert first["bias"][1, 0] > 0, "away from the expert that has it all"
    assert (first["bias"][1, 1:] < 0).all(), "towards every other"
    assert (first["bias"][0] == 0).all(), "images are none of text's business"
    assert served(after, 1) >= 4, "the floor is log 4"
    _, _, alone = descended((0.0, 1.0, 0.0, 0.0))
    assert served(alone, 1) == 1, "the local loss by itself keeps what is decided"


def layer_run(**choices):
    layer = make("switch", num_tasks=2, **choices)
    return jax.jit(lambda x: layer(x, context(valid_BL=VALID, task_B=TASK))[1])(tokens())


def test_a_layer_with_floors_reports_entropy_losses_and_counts_per_task():
    info = layer_run(entropy_floors=FLOOR, group="2")
    wanted = values(info.router.probs_GTE.reshape(B, L, E))
    for name, loss in wanted.items():
        # the same sums inside another program
        np.testing.assert_allclose(info.losses[name], loss, rtol=1e-6, atol=1e-6)
    load = np.asarray(info.stats.load_ME)
    np.testing.assert_array_equal(load.sum(axis=0), info.stats.load_E)
    expert = np.asarray(info.routing.expert_GTK).reshape(B, L)
    for task in (0, 1):
        own = expert[np.asarray(VALID & (TASK == task)[:, None])]
        np.testing.assert_array_equal(load[task], np.bincount(own, minlength=E))


def test_a_layer_with_one_task_has_no_entropy_losses_and_every_task_needs_a_floor():
    layer = make("switch")
    info = jax.eval_shape(lambda x: layer(x, context())[1], tokens())
    assert info.stats.load_ME is None and not any("entropy" in name for name in info.losses)
    with pytest.raises(ValueError, match=r"entropy_floors=\(1.0,\).*num_tasks=2"):
        make("switch", num_tasks=2, entropy_floors=(1.0,))
