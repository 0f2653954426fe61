"""P4: the loss and its slope along random lines through the gate's parameters. No training."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.dselect_k import gates
from experiments.dselect_k.gates import StaticGate
from experiments.dselect_k.oracle import Moments, mean_squared_error
from experiments.dselect_k.recovery import GAMMAS, NUM_EXPERTS, draw, know
from experiments.dselect_k.rows import Row, row

POINTS = (2001, 4001, 8001, 16001)


def along(
    weights: Callable[[Array], Array], start_P: Array, direction_P: Array, place_S: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """q(theta + s v) and dq/ds [S, E], the latter by differentiation, not from differences."""
    found = _along(weights, start_P, direction_P, jnp.asarray(place_S, jnp.float32))
    weight_SE, slope_SE = (np.asarray(array, np.float64) for array in found)
    return weight_SE, slope_SE


@functools.partial(jax.jit, static_argnums=0)
def _along(weights: Callable[[Array], Array], start_P: Array, direction_P: Array, place_S: Array):
    def at(place: Array) -> tuple[Array, Array]:
        return jax.jvp(lambda s: weights(start_P + s * direction_P), (place,), (jnp.ones(()),))

    return jax.lax.map(at, place_S, batch_size=4096)


def largest_jumps(
    weight_SE: np.ndarray, slope_SE: np.ndarray, moment: Moments
) -> tuple[float, float]:
    """Jumps between grid points of the mean squared error and of its derivative along the line."""
    second_EE, cross_E, _ = moment
    loss_S = mean_squared_error(weight_SE, moment)
    slope_S = np.sum(2 * (weight_SE @ second_EE - cross_E) * slope_SE, axis=-1)
    return float(np.max(np.abs(np.diff(loss_S)))), float(np.max(np.abs(np.diff(slope_S))))


def flat_weights(gate: StaticGate, num_experts: int) -> tuple[Callable[[Array], Array], int]:
    """A gate's weights as a function of one vector, and the vector's size."""
    flat_P, unflatten = jax.flatten_util.ravel_pytree(gate.init(jax.random.key(0), num_experts))
    return lambda flat_P: gate.evaluation(unflatten(flat_P), num_experts), flat_P.size


def random_line(size: int, seed: int) -> tuple[Array, Array]:
    """theta and v, both N(0, 1): on the way bits are decided, or logits change order."""
    start_key, direction_key = jax.random.split(jax.random.key(seed))
    return jax.random.normal(start_key, (size,)), jax.random.normal(direction_key, (size,))


def p4(lines: int, epochs: int = 0, points: tuple[int, ...] = POINTS) -> Iterator[Row]:
    """The largest jumps over s in [-1, 1], of finer and finer grids; its seeds are lines.

    Raises:
      ValueError: epochs is not 0. Nothing is trained here.
    """
    if epochs:
        raise ValueError(f"epochs={epochs}: P4 trains nothing")
    train = know(draw(1, NUM_EXPERTS))[0].train
    named = [({"gate": "top_k"}, gates.top_k()), ({"gate": "softmax"}, gates.softmax())]
    named += [({"gate": "dselect_k", "gamma": g}, gates.dselect_k(g)) for g in GAMMAS]
    for label, gate in named:
        place_S = np.linspace(-1.0, 1.0, points[-1])
        weights, size = flat_weights(gate, NUM_EXPERTS)
        finest = [along(weights, *random_line(size, seed), place_S) for seed in range(lines)]
        for count in points:
            every = (points[-1] - 1) // (count - 1)
            jumps = [largest_jumps(q[::every], slope[::every], train) for q, slope in finest]
            loss, slope = zip(*jumps, strict=True)
            yield row({**label, "points": count}, {"jump_of_loss": loss, "jump_of_slope": slope})
