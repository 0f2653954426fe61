"""Tokens moved between experts along shortest paths: the exact phase of balanced assignment.

The residual graph of an assignment has one node per expert and one more, the *market*, through
which experts trade the right to an extra token (if E does not divide T, r experts have one). The
cost of arc i -> j is the smallest loss of a token of i that moves to j; arcs to and from the market
are free. An assignment is optimal for its counts if the graph has no negative cycle, and moving
tokens along a shortest path preserves this (successive shortest paths; Ahuja, Magnanti, Orlin,
"Network Flows", 1993, section 9.7). One round moves tokens along a whole shortest-path tree at
once, since every arc of the tree is on a shortest path.

Axes: N = E + 1 nodes, experts and the market. All numbers are int32.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moejax.kernels.support import varying_like

FAR = 2**31 - 1
"""The cost of an arc that does not exist."""


class Flow(NamedTuple):
    """Each token's expert (-1: none), and a mask of the experts entitled to an extra token."""

    expert_T: Int[Array, "T"]
    extra_E: Bool[Array, "E"]


def exchange(
    value_TE: Int[Array, "T E"], flow: Flow, share: Int[Array, ""], left_over: Int[Array, ""]
) -> tuple[Flow, Int[Array, ""]]:
    """Moves tokens until every expert has ``share`` of them, plus its extra token if entitled.

    ``flow`` must be optimal for its own counts: each token at its best expert for some prices, and
    the ``left_over`` extra tokens with the experts of highest price. Returns the balanced flow and
    the number of rounds; each round brings at least one token closer, so T + E rounds suffice.
    """
    tokens, num_experts = value_TE.shape
    if not tokens:
        return flow, jnp.int32(0)

    def surplus(flow: Flow) -> Array:
        due_E = share + flow.extra_E.astype(jnp.int32)
        return _count(flow.expert_T, num_experts) - due_E

    def unbalanced(carry: tuple[Flow, Array]) -> Array:
        flow, rounds = carry
        return jnp.any(surplus(flow) > 0) & (rounds < tokens + num_experts)

    def one_round(carry: tuple[Flow, Array]) -> tuple[Flow, Array]:
        flow, rounds = carry
        surplus_N = jnp.append(surplus(flow), 0)
        cost_NN = _arc_costs(value_TE, flow, left_over > 0)
        parent_N = _shortest_path_tree(cost_NN, surplus_N > 0)
        needy_N = _has_deficit_below(parent_N, surplus_N)
        to_T = _candidates(value_TE, flow, cost_NN, parent_N, needy_N, rounds)
        room_N = jnp.append(_count(to_T, num_experts), 1)
        room_N = jnp.where(parent_N == num_experts, 1, room_N)
        room_N = jnp.where(needy_N & (parent_N >= 0), room_N, 0)
        sent_N = _tree_flow(parent_N, surplus_N, room_N)
        return _apply(flow, to_T, parent_N, sent_N), rounds + 1

    start = varying_like((flow, jnp.int32(0)), value_TE)
    return lax.while_loop(unbalanced, one_round, start)


def potentials(
    value_TE: Int[Array, "T E"], flow: Flow, left_over: Int[Array, ""]
) -> Float[Array, "E"]:
    """Prices that prove a balanced flow optimal: the middle of the set of such prices.

    Its two ends are the shortest distances to each node and from each node.
    """
    num_experts = value_TE.shape[1]
    cost_NN = _arc_costs(value_TE, flow, left_over > 0)
    zero_N = jnp.zeros(num_experts + 1, jnp.int32)
    into_N, _ = _distances(cost_NN, zero_N)
    out_of_N, _ = _distances(cost_NN.T, zero_N)
    price_E = (out_of_N.astype(jnp.float32) - into_N.astype(jnp.float32))[:num_experts] / 2
    return price_E - jnp.min(price_E)


def scatter_hash(tokens: int, num_experts: int, seed: Array | int) -> Array:
    """A pseudo-random uint32 per (token, expert), which selects among equal tokens."""
    token_T1 = jnp.arange(tokens, dtype=jnp.uint32)[:, None]
    column_E = jnp.arange(num_experts, dtype=jnp.uint32)
    mixed = token_T1 * jnp.uint32(0x9E3779B1) ^ column_E * jnp.uint32(0x85EBCA77)
    mixed ^= jnp.asarray(seed).astype(jnp.uint32) * jnp.uint32(0xC2B2AE3D)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x2C1B3C6D)
    mixed = (mixed ^ (mixed >> 12)) * jnp.uint32(0x297A2D39)
    return mixed ^ (mixed >> 15)


def _count(expert_T: Array, num_experts: int) -> Array:
    return jnp.sum(expert_T[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)


def _loss_TE(value_TE: Array, expert_T: Array) -> Array:
    """The loss of each token if it moved to each expert (negative: gain)."""
    own_T1 = jnp.take_along_axis(value_TE, jnp.maximum(expert_T, 0)[:, None], axis=1)
    return own_T1 - value_TE


def _arc_costs(value_TE: Array, flow: Flow, has_extra: Array) -> Int[Array, "N N"]:
    """cost[i, j] of the arc i -> j; FAR if there is none."""
    num_experts = value_TE.shape[1]
    at_T = jnp.where(flow.expert_T < 0, num_experts, flow.expert_T)
    cost_EE = jnp.full((num_experts, num_experts), FAR, jnp.int32)
    cost_EE = cost_EE.at[at_T].min(_loss_TE(value_TE, flow.expert_T), mode="drop")
    cost_EE = jnp.where(jnp.eye(num_experts, dtype=bool), FAR, cost_EE)
    to_market_E1 = jnp.where(~flow.extra_E & has_extra, 0, FAR)[:, None]
    from_market_N = jnp.append(jnp.where(flow.extra_E, 0, FAR), FAR)
    cost_EN = jnp.concatenate([cost_EE, to_market_E1], axis=1)
    return jnp.concatenate([cost_EN, from_market_N[None]]).astype(jnp.int32)


def _reach(cost_NN: Array, distance_N: Array) -> Int[Array, "N N"]:
    """distance[i] + cost[i, j]; FAR if either is."""
    exists_NN = (cost_NN < FAR) & (distance_N < FAR)[:, None]
    return jnp.where(exists_NN, cost_NN + jnp.where(distance_N < FAR, distance_N, 0)[:, None], FAR)


def _distances(cost_NN: Array, start_N: Array) -> tuple[Array, Array]:
    """Bellman-Ford from ``start_N``: distances, and the sweep that last improved each (0: none).

    Arcs may have negative costs but cycles may not, so at most N sweeps improve a distance.
    """

    def sweep(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        distance_N, improved_N, turn, _ = carry
        through_N = jnp.min(_reach(cost_NN, distance_N), axis=0)
        better_N = through_N < distance_N
        improved_N = jnp.where(better_N, turn, improved_N)
        return jnp.minimum(through_N, distance_N), improved_N, turn + 1, jnp.any(better_N)

    start = (start_N, jnp.zeros_like(start_N), jnp.int32(1), jnp.bool_(True))
    start = varying_like(start, cost_NN)
    return lax.while_loop(lambda carry: carry[3], sweep, start)[:2]


def _shortest_path_tree(cost_NN: Array, is_source_N: Array) -> Int[Array, "N"]:
    """Each node's predecessor on a shortest path from the sources; -1 for roots and the unreached.

    A predecessor must have reached its final distance in an earlier sweep than the node: tight arcs
    may form a cycle where tokens tie, but these arcs do not.
    """
    distance_N, improved_N = _distances(cost_NN, jnp.where(is_source_N, 0, FAR))
    earlier_NN = improved_N[:, None] < improved_N[None, :]
    reach_NN = jnp.where(earlier_NN, _reach(cost_NN, distance_N), FAR)
    return jnp.where(improved_N > 0, jnp.argmin(reach_NN, axis=0), -1).astype(jnp.int32)


def _fixpoint(step: Callable[[Array], Array], start_N: Array) -> Array:
    """Applies ``step`` until nothing changes: one pass per level of the tree."""

    def once(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        new_N = step(carry[0])
        return new_N, jnp.any(new_N != carry[0])

    start = (start_N, varying_like(jnp.bool_(True), start_N))
    return lax.while_loop(lambda carry: carry[1], once, start)[0]


def _is_child(parent_N: Array) -> Bool[Array, "N N"]:
    """[i, j]: j is a child of i."""
    return parent_N[None, :] == jnp.arange(parent_N.size)[:, None]


def _has_deficit_below(parent_N: Array, surplus_N: Array) -> Bool[Array, "N"]:
    """Nodes that have a deficit or a descendant with one."""
    child_NN = _is_child(parent_N)
    return _fixpoint(lambda n: n | jnp.any(child_NN & n, axis=1), surplus_N < 0)


def _candidates(
    value_TE: Array, flow: Flow, cost_NN: Array, parent_N: Array, needy_N: Array, seed: Array
) -> Int[Array, "T"]:
    """For each token the one arc of the tree it may use, as the arc's child expert; -1 for none.

    Only tokens that attain the cost of an arc may use it. A token that attains several is assigned
    to one of them, so no two arcs share a token.
    """
    tokens, num_experts = value_TE.shape
    parent_E = parent_N[:num_experts]
    cost_E = cost_NN[jnp.maximum(parent_E, 0), jnp.arange(num_experts)]
    fits_TE = (parent_E == flow.expert_T[:, None]) & needy_N[:num_experts]
    fits_TE &= (flow.expert_T >= 0)[:, None] & (_loss_TE(value_TE, flow.expert_T) == cost_E)
    # The low bits hold the column, so that a plain maximum finds the column of the largest lot.
    bits = max(num_experts - 1, 1).bit_length()
    lot_TE = (scatter_hash(tokens, num_experts, seed + 1) >> (bits + 1)).astype(jnp.int32)
    lot_TE = (lot_TE << bits) | jnp.arange(num_experts, dtype=jnp.int32)
    winner_T = jnp.max(jnp.where(fits_TE, lot_TE, -1), axis=1)
    return jnp.where(winner_T >= 0, winner_T & (2**bits - 1), -1)


def _tree_flow(parent_N: Array, surplus_N: Array, room_N: Array) -> Int[Array, "N"]:
    """The number of tokens that move into each node from its parent.

    Demand is added up from the leaves, within the room of each arc; then supply is handed down from
    the roots, first to a node's own deficit and then to its children in order.
    """
    child_NN = _is_child(parent_N)
    deficit_N, supply_N = jnp.maximum(-surplus_N, 0), jnp.maximum(surplus_N, 0)

    def ask(wanted_N: Array) -> Array:
        below_N = jnp.sum(jnp.where(child_NN, wanted_N, 0), axis=1, dtype=jnp.int32)
        return jnp.clip(deficit_N + below_N - supply_N, 0, room_N)

    wanted_N = _fixpoint(ask, jnp.zeros_like(room_N))
    node_N = jnp.arange(parent_N.size)
    older_sibling_NN = (parent_N[:, None] == parent_N) & (node_N < node_N[:, None])
    before_N = jnp.sum(jnp.where(older_sibling_NN, wanted_N, 0), axis=1, dtype=jnp.int32)

    def give(sent_N: Array) -> Array:
        left_N = jnp.maximum(sent_N + supply_N - deficit_N, 0)
        share_N = jnp.clip(left_N[jnp.maximum(parent_N, 0)] - before_N, 0, wanted_N)
        return jnp.where(parent_N >= 0, share_N, 0)

    return _fixpoint(give, jnp.zeros_like(room_N))


def _apply(flow: Flow, to_T: Array, parent_N: Array, sent_N: Array) -> Flow:
    """Moves the first ``sent_N`` candidates of every arc and the entitlements on the market."""
    tokens, num_experts = to_T.size, flow.extra_E.size
    by_market_E = parent_N[:num_experts] == num_experts
    sent_E = jnp.where(by_market_E, 0, sent_N[:num_experts])
    size_E = _count(to_T, num_experts)
    # Candidates are sorted by arc and then by token, those without an arc first; those up to the
    # last permitted one of each arc move. Keys are below T E, the size of the scores.
    key_T = to_T * tokens + jnp.arange(tokens, dtype=to_T.dtype)
    placed = jnp.sum(size_E, dtype=jnp.int32)
    start_E = jnp.cumsum(size_E, dtype=jnp.int32) - size_E + (tokens - placed)
    last_E = jnp.sort(key_T)[jnp.maximum(start_E + jnp.minimum(sent_E, size_E) - 1, 0)]
    at_E = jnp.maximum(to_T, 0)
    goes_T = (to_T >= 0) & (sent_E[at_E] > 0) & (key_T <= last_E[at_E])
    gives_up_E = by_market_E & (sent_N[:num_experts] > 0)
    gains_E = (jnp.arange(num_experts) == parent_N[num_experts]) & (sent_N[num_experts] > 0)
    return Flow(jnp.where(goes_T, to_T, flow.expert_T), (flow.extra_E & ~gives_up_E) | gains_E)
