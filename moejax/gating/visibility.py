"""The tokens that a token's output depends on because tokens compete for experts' slots."""

import dataclasses

from moejax.types import MoEConfig, Visibility


def capacity_visibility(k: int | float, moe: MoEConfig, columns: int | None = None) -> Visibility:
    """Visibility by capacity alone, for k choices per token in ``columns`` (k) columns.

    Only ``cells`` has a capacity, and a factor of E/k or more never binds. Below that, tokens
    compete for slots, and the priority decides: ``position`` serves tokens in order (no future);
    ``choice`` serves all first choices first, so for k > 1 a token's second choice queues behind
    later tokens; ``gate`` and ``random`` rank all tokens of the group against each other, and so
    does ``reroute``. A group of several sequences shares its slots.
    """
    several = moe.group != "sequence" and moe.group != "1"

    def phase(transport: str, factor: float) -> tuple[bool, bool]:
        if transport != "cells" or factor * k >= moe.num_experts:
            return False, False
        # The room for overflow is known only after all tokens have been served.
        ranked = moe.priority in ("gate", "random") or moe.reroute > 0
        future = ranked or (moe.priority == "choice" and (columns or k) > 1)
        return future, several

    train = phase(moe.transport, moe.capacity_factor)
    evaluation = phase(moe.eval_transport, moe.eval_capacity_factor)
    return Visibility(*train, *evaluation)


def balanced_visibility(moe: MoEConfig, eval_factor: float, k: int = 1) -> Visibility:
    """Visibility of gates that balance a group in training and are greedy in evaluation."""
    several = moe.group not in ("sequence", "1")
    by_capacity = capacity_visibility(k, dataclasses.replace(moe, eval_capacity_factor=eval_factor))
    some = moe.num_experts > k
    return Visibility(some, some and several, by_capacity.eval_future, by_capacity.eval_others)


def sparse_visibility(moe: MoEConfig, k: int, max_active: int) -> Visibility:
    """Visibility by capacity of gates that visit every expert of positive weight.

    Slots are sized for k experts per token. ``max_active``: most experts per token; 0 for all.
    """
    if 0 < max_active < moe.num_experts:
        return capacity_visibility(k, moe, columns=max_active)
    # Column e is expert e, so service column by column favours no token. Rerouting has no target
    # either: experts that a token does not visit have probability 0.
    return capacity_visibility(k, dataclasses.replace(moe, reroute=0), columns=1)
