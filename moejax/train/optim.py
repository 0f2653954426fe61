"""Optimizers and learning-rate schedules: one table each, one chain for all.

Every optimizer is a *direction*: gradients in, an unscaled direction of ascent out. What surrounds
it is shared, clipping by global norm before it, decoupled weight decay and the schedule after it:

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

# ----------------------------------------------------------------------- which parameter is what


class _Kind(NamedTuple):
    """What a parameter's path and shape say about it."""

    stem: str
    """The leaf's name without its axis letters."""
    letters: str
    """Its trailing axes: the upper-case letters after the last ``_``, as in ``up_EDF``. Stacked
    layers lead and have no letter. A name without letters stands for a vector or, from two axes on,
    for matrices in the last two."""
    in_router: bool
    """Below a node named ``router`` or ``gate``: a gate's own parameter."""

    @property
    def is_matrix(self) -> bool:
        """Per layer and expert at least two axes, and no norm or bias by name."""
        return len(self.letters.replace("E", "")) >= 2 and self.stem not in ("scale", "bias")


def _kind(path: tuple[Any, ...], leaf: Any) -> _Kind:
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    *nodes, name = names or [""]
    stem, _, letters = name.rpartition("_")
    if not (stem and letters.isalpha() and letters.isupper() and len(letters) <= leaf.ndim):
        stem, letters = name, "DF"[: leaf.ndim]
    return _Kind(stem, letters, bool({"router", "gate"} & set(nodes)))


def decay_mask(params: PyTree) -> PyTree:
    """True where weight decay applies: weight matrices and embeddings.

    Never on norms, biases and other vectors. Never on a gate's parameters: gates use theirs
    differently (projections, centroids, selector bits), so one pull towards zero would mean
    something else in each and bias their comparison; the size of router logits has its own knob,
    ``moe.losses.z``.
    """

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        kind = _kind(path, leaf)
        return kind.is_matrix and not kind.in_router

    return jax.tree_util.tree_map_with_path(decays, params)


def muon_dimensions(params: PyTree) -> PyTree:
    """``MuonDimensionNumbers`` of the parameters that Muon treats, None for those AdamW keeps.

    AdamW keeps vectors, a gate's parameters, and what has a vocabulary axis (embeddings and output
    head), as in Jordan's recipe. Everything else is orthogonalised matrix by matrix: layers and
    experts (axis E) are batched, and heads x head width is one side (``query_DHI`` is D x HI,
    ``out_HID`` is HI x D).
    """

    def dimensions(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
        kind = _kind(path, leaf)
        embeds = "embed" in kind.stem or "V" in kind.letters
        if not kind.is_matrix or kind.in_router or embeds:
            return None
        axes = [i - len(kind.letters) for i, letter in enumerate(kind.letters) if letter != "E"]
        first_side = 1 if kind.letters[axes[0]] == "D" else len(axes) - 1
        return MuonDimensionNumbers(tuple(axes[:first_side]), tuple(axes[first_side:]))

    return jax.tree_util.tree_map_with_path(dimensions, params)


# ------------------------------------------------------------------------------------ directions


def _adam(optim_cfg: Any, params: PyTree) -> optax.GradientTransformation:
    """Loshchilov, Hutter (AdamW), arXiv 1711.05101."""
    return optax.scale_by_adam(b1=optim_cfg.b1, b2=optim_cfg.b2, eps=optim_cfg.eps)


def _lion(optim_cfg: Any, params: PyTree) -> optax.GradientTransformation:
    """Chen et al., arXiv 2302.06675. Wants 3 to 10 times less learning rate, and more decay."""
    return optax.scale_by_lion(b1=optim_cfg.b1, b2=optim_cfg.b2)


def _adafactor(optim_cfg: Any, params: PyTree) -> optax.GradientTransformation:
    """Shazeer, Stern, arXiv 1804.04235, with momentum and without relative step sizes.

    So the learning rate means what it means for AdamW (Zhai et al., arXiv 2106.04560, section 3.4).
    Matrices of 128 x 128 and more keep row and column sums of squares in place of every square;
    the decay of these is the paper's 1 - t^-0.8. ``b2`` and ``eps`` are not used.
    """
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.ema(optim_cfg.b1, debias=True),
    )


def _muon(optim_cfg: Any, params: PyTree) -> optax.GradientTransformation:
    """Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al., arXiv 2502.16982.

    Nesterov momentum ``b1``, five Newton-Schulz steps, then 0.2 sqrt(max(rows, columns)): the
    second paper's factor, which gives updates the size of AdamW's, so that both share learning
    rate and decay.
    """

    def adam_sized(updates: PyTree, params: PyTree) -> PyTree:
        def scale(update: jax.Array, sides: MuonDimensionNumbers) -> jax.Array:
            rows, columns = (
                math.prod(update.shape[axis] for axis in cast(tuple[int, ...], side))
                for side in sides
            )
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


DIRECTIONS: dict[str, Callable[[Any, PyTree], optax.GradientTransformation]] = {
    "adamw": _adam,
    "muon": _muon,
    "lion": _lion,
    "adafactor": _adafactor,
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
