"""Optimizers and learning-rate schedules: one table each, one chain for all.

Every optimizer is a *direction*: gradients in, an unscaled direction of ascent out. The rest is
shared: clipping by global norm before it, decoupled weight decay and the schedule after it.

    w <- w - lr(step) * (direction(clip(gradient)) + weight_decay * w)
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from moejax.errors import UserError, suggest
from moejax.train.parameters import Parameter, parameter, size


def make_optimizer(
    optim_cfg: Any, steps: int, params: PyTree
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a run, and its learning rate as a function of completed updates.

    Args:
      optim_cfg: the config's ``optim`` section.
      steps: ``train.steps``, over which the schedule stretches unless ``decay_steps`` is set.
      params: the parameters or their shapes; only names and shapes are read.

    Returns:
      ``(optimizer, schedule)``; the optimizer's state is a pytree of arrays.

    Raises:
      UserError: an unknown name, or a value out of its range.
    """
    _check(optim_cfg)
    schedule = make_schedule(optim_cfg, steps)
    clip = optim_cfg.clip_norm
    optimizer = optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        DIRECTIONS[optim_cfg.name](optim_cfg, params),
        optax.add_decayed_weights(optim_cfg.weight_decay, mask=decay_mask(params)),
        optax.scale_by_learning_rate(schedule),
    )
    return optimizer, schedule


# ------------------------------------------------------------------------------------- schedules


def make_schedule(optim_cfg: Any, steps: int) -> optax.Schedule:
    r"""Learning rate of the update that follows ``step`` completed ones.

    Warm-up is linear: update 1 has peak / warmup_steps, update ``warmup_steps`` the peak. The last
    update of ``decay_steps``, or of ``steps`` where that is 0, has r = ``final_fraction`` of it, as
    have all that follow. With p in [0, 1] the share of the decay's updates done, the factor is

    * cosine: r + (1 - r) (1 + cos(pi p)) / 2, from the end of warm-up (arXiv 1608.03983);
    * wsd: 1 - (1 - r) p, over the last ``decay_fraction`` of all steps (warm-up, stable, decay;
      Hu et al., arXiv 2404.06395; Haegele et al., arXiv 2405.18392);
    * constant: 1.

    A run shorter than its warm-up never reaches the peak.
    """
    name, peak, warmup = optim_cfg.schedule, optim_cfg.learning_rate, optim_cfg.warmup_steps
    steps = optim_cfg.decay_steps or steps
    decay_start = {
        "cosine": warmup,
        "wsd": max(warmup, steps - round(optim_cfg.decay_fraction * steps)),
        "constant": steps,
    }[name]
    fall = 1.0 - optim_cfg.final_fraction

    def schedule(step: Any) -> jax.Array:
        update = jnp.asarray(step, jnp.float32) + 1.0
        warm = jnp.minimum(1.0, update / max(warmup, 1))
        if name == "constant":
            return peak * warm
        p = jnp.clip((update - decay_start) / max(steps - decay_start, 1), 0.0, 1.0)
        curve = (1.0 - jnp.cos(math.pi * p)) / 2.0 if name == "cosine" else p
        return peak * warm * (1.0 - fall * curve)

    return schedule


SCHEDULES = ("cosine", "wsd", "constant")

# ------------------------------------------------------------------------- rules by parameter name


def decay_mask(params: PyTree) -> PyTree:
    """True where weight decay applies: weight matrices and embeddings.

    Never on norms, biases and other vectors. Never on a gate's parameters: gates use theirs
    differently (projections, centroids, selector bits), so one pull towards zero would mean
    something else in each and bias their comparison; the size of router logits has its own knob,
    ``moe.losses.z``. Parameters that weigh routed against shared experts count as a gate's.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: parameter(path, leaf).decays, params)


def muon_dimensions(params: PyTree) -> PyTree:
    """``MuonDimensionNumbers`` of the parameters that Muon updates, None for those AdamW updates.

    AdamW updates vectors, a gate's parameters, and matrices with a vocabulary axis (embeddings and
    output head), as in Jordan's recipe. Everything else is orthogonalised matrix by matrix: layers,
    experts and tasks are batched (see ``Parameter.sides``).
    """

    def dimensions(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
        known = parameter(path, leaf)
        return MuonDimensionNumbers(*known.sides) if known.orthogonal and known.sides else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


# ------------------------------------------------------------------------------------ directions


def _adam(optim_cfg: Any, params: PyTree) -> optax.GradientTransformation:
    """Loshchilov, Hutter (AdamW), arXiv 1711.05101."""
    return optax.scale_by_adam(b1=optim_cfg.b1, b2=optim_cfg.b2, eps=optim_cfg.eps)


def _lion(optim_cfg: Any, params: PyTree) -> optax.GradientTransformation:
    """Chen et al., arXiv 2302.06675. Needs a 3 to 10 times lower learning rate, and more decay."""
    return optax.scale_by_lion(b1=optim_cfg.b1, b2=optim_cfg.b2)


def _adafactor(optim_cfg: Any, params: PyTree) -> optax.GradientTransformation:
    """Shazeer, Stern, arXiv 1804.04235, with momentum and without relative step sizes.

    So the learning rate has the same meaning as for AdamW (Zhai et al., arXiv 2106.04560, section
    3.4). Matrices of 128 x 128 and more keep sums of squares by row and column instead of every
    square, and an update is clipped to a root mean square of 1, both separately for each layer's,
    expert's and task's matrix. The decay of the sums is the paper's 1 - t^-0.8. ``b2`` and ``eps``
    are not used.
    """
    return optax.chain(scale_by_factored_squares(), optax.ema(optim_cfg.b1, debias=True))


LEAST_SIDE = 128
"""The least number of rows and columns for which squares are kept as sums over rows and columns."""


class FactoredSquares(NamedTuple):
    """Means of squared gradients.

    ``squares`` has a dict in the place of each parameter: either ``square``, of the parameter's
    shape, or ``row`` and ``column``. Each name ends in axis letters, which give its sharding.
    """

    count: jax.Array
    squares: PyTree


def scale_by_factored_squares() -> optax.GradientTransformation:
    r"""Adafactor's direction, computed separately for each matrix.

    .. math::
       \beta_t = 1 - t^{-0.8}, \quad
       R_t = \beta_t R_{t-1} + (1 - \beta_t) \operatorname{mean}_{columns} g^2, \quad
       C_t = \beta_t C_{t-1} + (1 - \beta_t) \operatorname{mean}_{rows} g^2, \\
       u = g \big/ \sqrt{R_t C_t / \operatorname{mean} R_t}, \qquad
       u / \max(1, \operatorname{rms}(u))

    with g^2 itself where a side is shorter than ``LEAST_SIDE``. ``optax.scale_by_factored_rms`` and
    ``clip_by_block_rms`` do this for one matrix. For a stack of matrices they use its two longest
    axes, one of which may be the experts', and one root mean square, which would couple experts.
    """

    def init(params: PyTree) -> FactoredSquares:
        squares = jax.tree_util.tree_map_with_path(_no_squares, params)
        return FactoredSquares(jnp.zeros((), jnp.int32), squares)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, FactoredSquares]:
        del params
        beta = 1.0 - (state.count + 1).astype(jnp.float32) ** -0.8
        squares = jax.tree_util.tree_map_with_path(
            lambda path, grad, old: _averaged(parameter(path, grad), grad, old, beta),
            updates,
            state.squares,
        )
        updates = jax.tree_util.tree_map_with_path(
            lambda path, grad, kept: _scaled(parameter(path, grad), grad, kept), updates, squares
        )
        return updates, FactoredSquares(jnp.asarray(optax.safe_increment(state.count)), squares)

    return optax.GradientTransformation(init, update)


def _no_squares(path: tuple[Any, ...], leaf: jax.Array) -> dict[str, jax.Array]:
    known = parameter(path, leaf)
    sides = known.sides
    if sides is None or min(size(leaf.shape, side) for side in sides) < LEAST_SIDE:
        return {f"square_{known.letters}": jnp.zeros(leaf.shape, leaf.dtype)}

    def without(axes: tuple[int, ...]) -> tuple[str, jax.Array]:
        gone = {axis % leaf.ndim for axis in axes}
        shape = tuple(n for axis, n in enumerate(leaf.shape) if axis not in gone)
        kept = tuple(axis for axis in range(-len(known.letters), 0) if axis not in axes)
        return known.letters_of(kept), jnp.zeros(shape, leaf.dtype)

    (row, rows), (column, columns) = without(sides[1]), without(sides[0])
    return {f"row_{row}": rows, f"column_{column}": columns}


def _averaged(
    known: Parameter, grad: jax.Array, old: dict[str, jax.Array], beta: jax.Array
) -> dict[str, jax.Array]:
    square = jnp.square(grad) + 1e-30  # as optax, so that a gradient of 0 gives an update of 0
    rows, columns = known.sides or ((), ())
    means = {"square": square, "row": jnp.mean(square, columns), "column": jnp.mean(square, rows)}
    return {
        name: beta * value + (1.0 - beta) * means[name.partition("_")[0]]
        for name, value in old.items()
    }


def _scaled(known: Parameter, grad: jax.Array, squares: dict[str, jax.Array]) -> jax.Array:
    values = {name.partition("_")[0]: value for name, value in squares.items()}
    if "square" in values:
        update = grad * jax.lax.rsqrt(values["square"])
    else:
        rows, columns = known.sides or ((), ())
        row, column = (
            jnp.expand_dims(values[name], tuple(axis % grad.ndim for axis in other))
            for name, other in (("row", columns), ("column", rows))
        )
        share = row / jnp.mean(row, rows, keepdims=True)
        update = grad * jax.lax.rsqrt(share) * jax.lax.rsqrt(column)
    rms = jnp.sqrt(jnp.mean(jnp.square(update), known.own_axes, keepdims=True))
    return update / jnp.maximum(rms, 1.0)


def _muon(optim_cfg: Any, params: PyTree) -> optax.GradientTransformation:
    """Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al., arXiv 2502.16982.

    Nesterov momentum ``b1``, five Newton-Schulz steps, then 0.2 sqrt(max(rows, columns)): the
    second paper's factor, which gives updates the size of AdamW's, so that both share learning
    rate and decay.
    """

    def adam_sized(updates: PyTree, params: PyTree) -> PyTree:
        def scale(update: jax.Array, sides: MuonDimensionNumbers) -> jax.Array:
            rows, columns = (size(update.shape, cast(tuple[int, ...], side)) for side in sides)
            return update * (0.2 * math.sqrt(max(rows, columns)))

        return jax.tree.map(scale, updates, muon_dimensions(updates))

    labels = jax.tree.map(
        lambda sides: "adam" if sides is None else "muon",
        muon_dimensions(params),
        is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers),
    )
    orthogonal = optax.chain(
        scale_by_muon(beta=optim_cfg.b1, weight_dimension_numbers=muon_dimensions),
        optax.stateless(adam_sized),
    )
    return optax.partition({"muon": orthogonal, "adam": _adam(optim_cfg, params)}, labels)


def _sgd(optim_cfg: Any, params: PyTree) -> optax.GradientTransformation:
    """The gradient with momentum ``b1``; with b1 = 0 the optimizer keeps no state."""
    return optax.trace(optim_cfg.b1) if optim_cfg.b1 else optax.identity()


DIRECTIONS: dict[str, Callable[[Any, PyTree], optax.GradientTransformation]] = {
    "adamw": _adam,
    "muon": _muon,
    "lion": _lion,
    "adafactor": _adafactor,
    "sgd": _sgd,
}


def _check(optim_cfg: Any) -> None:
    for field, valid in (("name", DIRECTIONS), ("schedule", SCHEDULES)):
        value = optim_cfg[field]
        if value not in valid:
            raise UserError(f"optim.{field}={value!r} is unknown; {suggest(value, valid)}")
    for field, low, high, remedy in (
        ("learning_rate", 1e-30, math.inf, "a positive number such as 3e-3"),
        ("weight_decay", 0.0, math.inf, "0 or more"),
        ("b1", 0.0, 1.0 - 1e-9, "at least 0 and below 1"),
        ("b2", 0.0, 1.0 - 1e-9, "at least 0 and below 1"),
        ("eps", 1e-30, math.inf, "a positive number such as 1e-8"),
        ("warmup_steps", 0, math.inf, "0 or more"),
        ("decay_steps", 0, math.inf, "0 (train.steps) or more"),
        ("decay_fraction", 0.0, 1.0, "between 0 and 1"),
        ("final_fraction", 0.0, 1.0, "between 0 and 1"),
        ("clip_norm", 0.0, math.inf, "0 (off) or more"),
    ):
        value = optim_cfg[field]
        if not (low <= value <= high and math.isfinite(value)):
            raise UserError(f"optim.{field}={value} must be {remedy}")
    decay, warmup = optim_cfg.decay_steps, optim_cfg.warmup_steps
    if 0 < decay <= warmup and optim_cfg.schedule != "constant":
        raise UserError(
            f"optim.decay_steps={decay} must be above optim.warmup_steps={warmup}, or 0 for "
            "train.steps"
        )
