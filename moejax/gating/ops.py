"""Arithmetic of routers: pure functions of arrays, float32 inside."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moejax.mesh import group_local
from moejax.types import (
    GateContext,
    GateSpec,
    Order,
    RouterStats,
    Routing,
)

SCORES: tuple[str, ...] = ("softmax", "sigmoid")


def init_router(key: PRNGKeyArray, spec: GateSpec, scale: float) -> Float[Array, "D E"]:
    """Router matrix: truncated normal with standard deviation sqrt(scale / d_model)."""
    init = jax.nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal")
    return init(key, (spec.d_model, spec.num_experts), jnp.float32)


def router_logits(x_GTD: Array, weight_DE: Array) -> Float[Array, "G T E"]:
    """``x @ W`` in float32 at full precision, for activations of any dtype.

    Routing decisions are discontinuous in the logits: in bfloat16 nearby experts swap (Switch
    Transformer, table 2).
    """
    return jnp.einsum(
        "gtd,de->gte",
        x_GTD.astype(jnp.float32),
        weight_DE.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )


def local_top_k(logits_GTE: Array, k: int, renormalize: bool) -> tuple[Array, Array]:
    """``top_k_routing`` per group, on the device that has the group's tokens."""

    def select(logits: Array) -> tuple[Array, Array]:
        return top_k_routing(logits, k, renormalize=renormalize)

    return group_local(select)(logits_GTE)


def top_k_routing(
    logits_TE: Float[Array, "*T E"], k: int, *, score: str = "softmax", renormalize: bool = False
) -> tuple[Int[Array, "*T K"], Float[Array, "*T K"]]:
    """The k experts with the largest logits, best first, and their combine weights.

    ``score="softmax"``: weights are softmax probabilities over all E; with ``renormalize`` they are
    divided by their sum, which equals a softmax over the k kept logits (and is computed so).
    ``score="sigmoid"``: weights are sigmoids of the logits, optionally divided by their sum.
    Ties go to the lower expert id. Works on any leading axes. A weight that underflows becomes the
    smallest normal float32, because weight 0 marks a pair as absent. The weight of a logit of -inf
    is 0, so that an expert can be excluded.

    Raises:
      ValueError: k not in [1, E], or an unknown score.
    """
    num_experts = logits_TE.shape[-1]
    if not 1 <= k <= num_experts:
        raise ValueError(f"k={k} must lie in [1, num_experts={num_experts}]")
    if score not in SCORES:
        raise ValueError(f"score={score!r} is unknown; use one of {', '.join(SCORES)}")
    logits_TE = logits_TE.astype(jnp.float32)
    top_TK, expert_TK = jax.lax.top_k(logits_TE, k)
    if score == "softmax":
        return expert_TK.astype(jnp.int32), softmax_of(top_TK, logits_TE, renormalize)
    if renormalize:
        # In logarithms, because scores that all underflow still have shares of their sum.
        weight_TK = jax.nn.softmax(jax.nn.log_sigmoid(top_TK), axis=-1)
    else:
        weight_TK = jax.nn.sigmoid(top_TK)
    return expert_TK.astype(jnp.int32), _positive(weight_TK, top_TK)


def softmax_of(chosen_TK: Array, logits_TE: Array, renormalize: bool) -> Array:
    """Weights of the chosen logits: softmax over the chosen ones (``renormalize``) or over all."""
    if renormalize:
        return _positive(jax.nn.softmax(chosen_TK, axis=-1), chosen_TK)
    total_T1 = jax.nn.logsumexp(logits_TE, axis=-1, keepdims=True)
    return _positive(jnp.exp(chosen_TK - total_T1), chosen_TK)


def _positive(weight_TK: Array, chosen_TK: Array) -> Array:
    """Weights above 0, except where a logit of -inf excludes the expert."""
    return jnp.where(chosen_TK == -jnp.inf, weight_TK, at_least_tiny(weight_TK))


def at_least_tiny(weight: Array) -> Array:
    """Weights above 0: one that underflows to 0 would mark its pair as absent."""
    return jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)


def masked(expert_GTK: Array, weight_GTK: Array, valid_GT: Array) -> Routing:
    """A routing in which padding visits no expert (all its weights are 0)."""
    return Routing(expert_GTK, jnp.where(valid_GT[..., None], weight_GTK, 0.0))


def softmax_stats(logits_GTE: Array) -> RouterStats:
    """Statistics of a softmax router, with the probabilities as the load estimate."""
    probs_GTE = jax.nn.softmax(logits_GTE, axis=-1)
    return RouterStats(logits_GTE, probs_GTE, probs_GTE)


def row_noise(
    draw: Callable[[PRNGKeyArray, tuple[int, ...], Any], Array],
    context: GateContext,
    shape: tuple[int, ...],
    tag: int = 0,
) -> Float[Array, "G T ..."]:
    """Noise ``[G, T, *shape]`` keyed by (seed, step, layer, global row id) and ``tag``.

    ``draw(key, shape, dtype)`` is a sampler such as ``jax.random.normal``. It draws float32 even
    under ``jax_enable_x64``, where the default dtype would give other values.

    Each sequence draws its own block from its own key, so the noise of a row is the same on every
    mesh, in every micro-batch split and at every position in the batch. The i-th valid token gets
    the i-th draw, wherever the padding lies.

    Raises:
      ValueError: the context has no key.
    """
    if context.key is None:
        raise ValueError(
            "this gate draws random numbers: pass a context with a PRNG key, "
            "moejax.Context.of(B, L, key=...), or rngs=nnx.Rngs(...)"
        )
    groups, rows = context.row_GR.shape
    length = context.token_GT.shape[1] // rows
    key = jax.random.fold_in(context.key, tag)

    def one_row(row: Array) -> Array:
        return draw(jax.random.fold_in(key, row), (length, *shape), jnp.float32)

    noise_BL = jax.vmap(one_row)(context.row_GR.reshape(-1))
    return order_of(context).places(noise_BL).reshape(groups, rows * length, *shape)


def order_of(context: GateContext) -> Order:
    """The order of the tokens of each sequence, padding last."""
    valid_BL = context.valid_GT.reshape(context.row_GR.size, -1)
    if context.padded_behind or valid_BL.shape[1] == 1:
        return Order()
    return group_local(Order.of)(valid_BL)


def local_best(score_GTE: Array, k: int) -> Int[Array, "G T K"]:
    """The k experts with the largest scores, best first, found on the group's own device."""

    def select(score: Array) -> Array:
        return jax.lax.top_k(score, k)[1].astype(jnp.int32)

    return group_local(select)(score_GTE)


def softmax_weights(logits_GTE: Array, expert_GTK: Array, renormalize: bool) -> Array:
    """Softmax weights, as in ``top_k_routing``, of experts that were chosen by other scores."""
    return softmax_of(at_expert(logits_GTE, expert_GTK), logits_GTE, renormalize)


def at_expert(value_GTE: Array, expert_GTK: Array) -> Float[Array, "G T K"]:
    """The values of the chosen experts."""
    return jnp.take_along_axis(value_GTE, expert_GTK, axis=-1)


def followed(
    own_GTK: Int[Array, "G T K"], context: GateContext, num_experts: int
) -> tuple[Int[Array, "G T K"], Float[Array, "G T"]]:
    """The experts that the context gives, or a token's own choice where its ids are all -1.

    The second value is a share of the input for ``GateOutput.identity_weight_GT``: 0, and NaN for
    valid tokens whose ids lie outside [-1, E), are -1 in part or name an expert twice. In a
    compiled program nothing can be raised; the NaN reaches output and loss.
    """
    given_GTK = context.expert_GTK
    assert given_GTK is not None
    absent_GT = jnp.all(given_GTK == -1, axis=-1)
    outside_GT = jnp.any((given_GTK < 0) | (given_GTK >= num_experts), axis=-1)
    sorted_GTK = jnp.sort(given_GTK, axis=-1)
    twice_GT = jnp.any(sorted_GTK[..., 1:] == sorted_GTK[..., :-1], axis=-1)
    wrong_GT = (outside_GT | twice_GT) & ~absent_GT
    expert_GTK = jnp.where((absent_GT | wrong_GT)[..., None], own_GTK, given_GTK)
    return expert_GTK.astype(own_GTK.dtype), jnp.where(wrong_GT & context.valid_GT, jnp.nan, 0.0)


def heaviest(
    weight_GTE: Float[Array, "G T E"], max_active: int, valid_GT: Bool[Array, "G T"]
) -> tuple[Routing, Bool[Array, "G T E"] | None]:
    """The routing of gates that visit every expert with positive weight.

    Columns are all experts, or the ``max_active`` heaviest (0: all). With ``max_active`` the second
    value is a mask of the pairs that were cut, otherwise None.
    """
    num_experts = weight_GTE.shape[-1]
    if max_active in (0, num_experts):
        expert_GTK = jnp.broadcast_to(jnp.arange(num_experts, dtype=jnp.int32), weight_GTE.shape)
        return masked(expert_GTK, weight_GTE, valid_GT), None

    def select(weight: Array) -> tuple[Array, Array]:
        heaviest, expert = jax.lax.top_k(weight, max_active)
        return heaviest, expert.astype(jnp.int32)

    weight_GTK, expert_GTK = group_local(select)(weight_GTE)
    routing = masked(expert_GTK, weight_GTK, valid_GT)
    wanted_GTE = (weight_GTE > 0) & valid_GT[..., None]
    return routing, wanted_GTE & ~has_pair(routing, num_experts)


def has_pair(routing: Routing, num_experts: int) -> Bool[Array, "G T E"]:
    """A mask of the experts that each token visits."""
    active_GTK1 = (routing.weight_GTK > 0)[..., None]
    return jnp.any(active_GTK1 & (routing.expert_GTK[..., None] == jnp.arange(num_experts)), axis=2)


def constant_stats(prob_E: Float[Array, "E"], groups: int, tokens: int) -> RouterStats:
    """Statistics of a router that gives every token the same distribution."""
    shape = (groups, tokens, prob_E.size)
    probs_GTE = jnp.broadcast_to(prob_E, shape)
    logits_E = jnp.log(jnp.maximum(prob_E, jnp.finfo(jnp.float32).tiny))
    return RouterStats(jnp.broadcast_to(logits_E, shape), probs_GTE, probs_GTE)


def uniform_stats(num_experts: int, groups: int, tokens: int) -> RouterStats:
    """Statistics of a router with a uniform distribution."""
    return constant_stats(jnp.full(num_experts, 1.0 / num_experts, jnp.float32), groups, tokens)


def imbalance(mass_GTE: Float[Array, "G T E"]) -> Float[Array, "G"]:
    """max_e m_e / mean - 1 of each group's summed mass: 0 when all experts have the same."""
    mass_GE = jnp.sum(mass_GTE, axis=1)
    mean_G = jnp.mean(mass_GE, axis=1)
    worst_G = jnp.max(mass_GE, axis=1) / jnp.where(mean_G > 0, mean_G, 1.0) - 1.0
    return jnp.where(mean_G > 0, worst_G, 0.0)


def group_mean(value_GT: Float[Array, "G T"], valid_GT: Bool[Array, "G T"]) -> Float[Array, "G"]:
    """Mean over the valid tokens of each group; 0 where there are none."""
    total_G = jnp.sum(jnp.where(valid_GT, value_GT, 0.0), axis=1)
    return total_G / jnp.maximum(jnp.sum(valid_GT, axis=1, dtype=jnp.float32), 1.0)


def mean(value_GT: Float[Array, "G T"], context: GateContext) -> Float[Array, ""]:
    """Mean over the valid tokens; 0 where there are none."""
    count = jnp.maximum(jnp.sum(context.valid_GT, dtype=jnp.float32), 1.0)
    return jnp.sum(jnp.where(context.valid_GT, value_GT, 0.0)) / count


def check_choice(field: str, value: str, valid: tuple[str, ...]) -> None:
    """Raises ValueError unless the gate's field has one of the ``valid`` values."""
    if value not in valid:
        raise ValueError(f"gate.{field}={value!r} is unknown; use one of {', '.join(valid)}")


def check_k(k: int, num_experts: int) -> None:
    """Raises ValueError unless 1 <= k <= num_experts."""
    if not 1 <= k <= num_experts:
        raise ValueError(
            f"gate.k={k} must lie between 1 and num_experts={num_experts}; lower k or add experts"
        )


def check_max_active(max_active: int, num_experts: int) -> None:
    """Raises ValueError unless ``max_active`` is a number of experts, or 0 for all."""
    if not 0 <= max_active <= num_experts:
        raise ValueError(
            f"gate.max_active={max_active} must lie between 1 and num_experts={num_experts}, or be "
            "0 for all"
        )


def check_positive(field: str, value: int | float) -> None:
    """Raises ValueError unless the gate's field is above 0."""
    if not value > 0:
        raise ValueError(f"gate.{field}={value} must be above 0")


def check_not_negative(field: str, value: int | float) -> None:
    """Raises ValueError unless the gate's field is 0 or above."""
    if not value >= 0:
        raise ValueError(f"gate.{field}={value} must be 0 or above")


def check_trains(k: int, renormalize: bool, num_experts: int, train: bool) -> None:
    """Raises ValueError if the weights would be constant in training."""
    if train and k == 1 and renormalize and num_experts > 1:
        raise ValueError(
            "gate.k=1 with gate.renormalize=True gives every token the same constant weight, so "
            "the router gets no gradient; set gate.renormalize=False (Switch) or gate.k=2"
        )


def __getattr__(name: str) -> Any:
    # Gates that follow an earlier docs/add-a-gate.md take these from here.
    if name in ("Stateless", "token_choice_capacity"):
        return getattr(importlib.import_module("moejax.gating.gate"), name)
    if name == "capacity_visibility":
        return importlib.import_module("moejax.gating.visibility").capacity_visibility
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
