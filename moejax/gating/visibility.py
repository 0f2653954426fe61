"""The tokens that a token's output depends on because tokens compete for experts' slots."""

import dataclasses
from collections.abc import Callable

from moejax.types import MoEConfig, SlotRules, Visibility


def capacity_visibility(
    k: int | float,
    moe: MoEConfig,
    columns: int | None = None,
    with_gate: Callable[[SlotRules], SlotRules] = lambda rules: rules,
) -> Visibility:
    """Visibility by capacity alone, for k choices per token in ``columns`` (k) columns.

    Transports without slots show nothing, and a factor of E/k or more never binds. Below that,
    tokens compete for slots, and the priority decides: ``position`` serves tokens in order (no
    future); ``choice`` serves all first choices first, so for k > 1 a token's second choice queues
    behind later tokens; ``gate`` and ``random`` rank all tokens of the group against each other,
    and so does ``reroute``. A group of several sequences shares its slots. ``with_gate`` returns
    the rules that have the same effect as the given ones have with this gate.
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
    """The rules for gates that give experts probability 0: rerouting has no target."""
    return dataclasses.replace(rules, reroute=0)


def by_position(rules: SlotRules) -> SlotRules:
    """The rules for gates whose weights are all equal: priority "gate" serves by position."""
    return dataclasses.replace(rules, priority="position") if rules.priority == "gate" else rules


def balanced_visibility(moe: MoEConfig, k: int = 1, eval_factor: float | None = None) -> Visibility:
    """Visibility of gates that balance a group in training and are greedy in evaluation.

    ``eval_factor``: the capacity factor of evaluation if the gate, not the config, sets it.
    """
    several = moe.group not in ("sequence", "1")

    def greedy(rules: SlotRules) -> SlotRules:
        return dataclasses.replace(rules, capacity_factor=eval_factor or rules.capacity_factor)

    by_capacity = capacity_visibility(k, moe, with_gate=greedy)
    some = moe.num_experts > k
    return Visibility(some, some and several, by_capacity.eval_future, by_capacity.eval_others)


def sparse_visibility(moe: MoEConfig, k: int, max_active: int) -> Visibility:
    """Visibility by capacity of gates that visit every expert of positive weight.

    Slots are sized for k experts per token. ``max_active``: most experts per token; 0 for all.
    """
    if 0 < max_active < moe.num_experts:
        return capacity_visibility(k, moe, columns=max_active)
    # Column e is expert e, so service column by column favours no token; experts that a token does
    # not visit have probability 0.
    return capacity_visibility(k, moe, columns=1, with_gate=without_reroute)
