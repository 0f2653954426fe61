"""Arithmetic that token-choice gates share. Pure functions of arrays, float32 inside."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

# Under this roof too: `ops.top_k_routing`.
from moejax.gating.weights import SCORES as SCORES
from moejax.gating.weights import at_least_tiny as at_least_tiny
from moejax.gating.weights import softmax_of
from moejax.gating.weights import top_k_routing as top_k_routing
from moejax.kernels.support import resolve_platform
from moejax.mesh import group_local
from moejax.types import (
    GateContext,
    GateSpec,
    GateState,
    MoEConfig,
    MoEStats,
    Order,
    RouterStats,
    Routing,
    SlotRules,
    Visibility,
)


class Stateless:
    """The state methods of gates that remember nothing between steps."""

    def init_state(self, spec: GateSpec) -> GateState:
        return ()

    def update(self, state: GateState, stats: MoEStats) -> GateState:
        return state


def init_router(key: PRNGKeyArray, spec: GateSpec, scale: float) -> Float[Array, "D E"]:
    """Router matrix: truncated normal with standard deviation sqrt(scale / d_model)."""
    init = jax.nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal")
    return init(key, (spec.d_model, spec.num_experts), jnp.float32)


def router_logits(x_GTD: Array, weight_DE: Array) -> Float[Array, "G T E"]:
    """``x @ W`` in float32 at full precision, whatever the activations' dtype.

    Routing decisions are discontinuous in the logits: in bfloat16 nearby experts swap (Switch
    Transformer, table 2).
    """
    return jnp.einsum(
        "gtd,de->gte",
        x_GTD.astype(jnp.float32),
        weight_DE.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )


def masked(expert_GTK: Array, weight_GTK: Array, valid_GT: Array) -> Routing:
    """A routing in which padding visits nobody (all its weights are 0)."""
    return Routing(expert_GTK, jnp.where(valid_GT[..., None], weight_GTK, 0.0))


def softmax_stats(logits_GTE: Array) -> RouterStats:
    """Statistics of a softmax router without a load estimate of its own."""
    probs_GTE = jax.nn.softmax(logits_GTE, axis=-1)
    return RouterStats(logits_GTE, probs_GTE, probs_GTE)


def order_of(context: GateContext) -> Order:
    """The order in which the tokens of each sequence [G R] are counted: padding last."""
    valid_BL = context.valid_GT.reshape(context.row_GR.size, -1)
    if context.padded_behind or valid_BL.shape[1] == 1:
        return Order()
    return group_local(Order.of)(valid_BL)


def row_noise(
    draw: Callable[[PRNGKeyArray, tuple[int, ...], Any], Array],
    context: GateContext,
    shape: tuple[int, ...],
    tag: int = 0,
) -> Float[Array, "G T ..."]:
    """Noise ``[G, T, *shape]`` keyed by (seed, step, layer, global row id) and ``tag``.

    ``draw(key, shape, dtype)`` is a sampler such as ``jax.random.normal``. It draws float32 under
    ``jax_enable_x64`` too, where a sampler's own default is another, with other values.

    Each sequence draws its own block from its own key, so the noise of a row is the same on every
    mesh, in every micro-batch split and at every place in the batch. Its i-th valid token gets the
    i-th draw, wherever there is padding.

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


def each_group(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """``fn`` of one group as a function of arrays that lead with G.

    Where ``fn`` loops until it is done, a batch goes on until its slowest member is. On CPU groups
    run one after the other instead: none waits, and the arrays of one stay in the cache.
    """
    if resolve_platform(None) != "cpu":
        return jax.vmap(fn)
    return lambda *args: jax.lax.map(lambda group: fn(*group), args)


def local_top_k(logits_GTE: Array, k: int, renormalize: bool) -> tuple[Array, Array]:
    """``top_k_routing`` per group, run where each group's tokens are."""

    def select(logits: Array) -> tuple[Array, Array]:
        return top_k_routing(logits, k, renormalize=renormalize)

    return group_local(select)(logits_GTE)


def local_best(score_GTE: Array, k: int) -> Int[Array, "G T K"]:
    """The k experts with the largest scores, best first, found where each group's tokens are."""

    def select(score: Array) -> Array:
        return jax.lax.top_k(score, k)[1].astype(jnp.int32)

    return group_local(select)(score_GTE)


def softmax_weights(logits_GTE: Array, expert_GTK: Array, renormalize: bool) -> Array:
    """Softmax weights of experts chosen by other scores, as ``top_k_routing`` weighs its own."""
    return softmax_of(at_expert(logits_GTE, expert_GTK), logits_GTE, renormalize)


def heaviest(
    weight_GTE: Float[Array, "G T E"], max_active: int, valid_GT: Bool[Array, "G T"]
) -> tuple[Routing, Bool[Array, "G T E"] | None]:
    """The routing of gates that visit every expert with positive weight.

    Columns are all experts, or the ``max_active`` heaviest (0: all); then also a mask of the pairs
    that were cut.
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


def token_choice_capacity(num_tokens: int, num_experts: int, k: int, factor: float) -> int:
    """C = ceil(T k / E * factor), at least 1 and at most T (a token visits an expert once)."""
    # The subtraction keeps 1.1 * 10 at 11 although the product is 11.000000000000002.
    slots = math.ceil(num_tokens * k / num_experts * factor - 1e-9)
    return max(1, min(slots, num_tokens))


def capacity_visibility(
    k: int | float,
    moe: MoEConfig,
    columns: int | None = None,
    with_gate: Callable[[SlotRules], SlotRules] = lambda rules: rules,
) -> Visibility:
    """What capacity alone lets a token see, for k choices per token in ``columns`` (k) columns.

    Transports without slots show nothing, and a factor of E/k or more never binds. Otherwise:
    ``position`` serves tokens in order (no future); ``choice`` serves all first choices first, so
    for k > 1 a token's second choice queues behind later tokens; ``gate`` and ``random`` rank all
    tokens of the group against each other, and so does ``reroute``. A group of several sequences
    shares its slots. ``with_gate``: the rules that give the same slots with this gate.
    """
    several = moe.group != "sequence" and moe.group != "1"

    def phase(rules: SlotRules | None) -> tuple[bool, bool]:
        if rules is None:
            return False, False
        rules = with_gate(rules)
        if rules.capacity_factor * k >= moe.num_experts:
            return False, False
        future = rules.ranks_tokens or (rules.priority == "choice" and (columns or k) > 1)
        return future, several

    train, evaluation = phase(moe.transport.slot_rules), phase(moe.eval_transport.slot_rules)
    return Visibility(*train, *evaluation)


def without_reroute(rules: SlotRules) -> SlotRules:
    """The rules with gates that give experts probability 0: there is nowhere to reroute to."""
    return dataclasses.replace(rules, reroute=0)


def by_position(rules: SlotRules) -> SlotRules:
    """The rules with gates whose weights are all equal: priority "gate" serves by position."""
    return dataclasses.replace(rules, priority="position") if rules.priority == "gate" else rules


def balanced_visibility(moe: MoEConfig, k: int = 1, eval_factor: float | None = None) -> Visibility:
    """Of gates that balance a group in training and are greedy in evaluation (BASE, S-BASE).

    ``eval_factor``: the capacity factor of evaluation, if it is the gate's and not the config's.
    """
    several = moe.group not in ("sequence", "1")

    def greedy(rules: SlotRules) -> SlotRules:
        return dataclasses.replace(rules, capacity_factor=eval_factor or rules.capacity_factor)

    by_capacity = capacity_visibility(k, moe, with_gate=greedy)
    some = moe.num_experts > k
    return Visibility(some, some and several, by_capacity.eval_future, by_capacity.eval_others)


def at_expert(value_GTE: Array, expert_GTK: Array) -> Float[Array, "G T K"]:
    """The values of the chosen experts."""
    return jnp.take_along_axis(value_GTE, expert_GTK, axis=-1)


def has_pair(routing: Routing, num_experts: int) -> Bool[Array, "G T E"]:
    """Whether a token visits an expert."""
    active_GTK1 = (routing.weight_GTK > 0)[..., None]
    return jnp.any(active_GTK1 & (routing.expert_GTK[..., None] == jnp.arange(num_experts)), axis=2)


def imbalance(mass_GTE: Float[Array, "G T E"]) -> Float[Array, "G"]:
    """max_e m_e / mean - 1 of a group's summed mass: 0 when every expert has the same."""
    mass_GE = jnp.sum(mass_GTE, axis=1)
    mean_G = jnp.mean(mass_GE, axis=1)
    worst_G = jnp.max(mass_GE, axis=1) / jnp.where(mean_G > 0, mean_G, 1.0) - 1.0
    return jnp.where(mean_G > 0, worst_G, 0.0)


def group_mean(value_GT: Float[Array, "G T"], valid_GT: Bool[Array, "G T"]) -> Float[Array, "G"]:
    """Mean over the valid tokens of each group; 0 where there are none."""
    total_G = jnp.sum(jnp.where(valid_GT, value_GT, 0.0), axis=1)
    return total_G / jnp.maximum(jnp.sum(valid_GT, axis=1, dtype=jnp.float32), 1.0)


def mean(value_GT: Float[Array, "G T"], context: GateContext) -> Float[Array, ""]:
    """Mean over valid tokens; 0 when there are none."""
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
