"""Capacity: the number of slots per expert, and the order in which tokens get them.

Question: what do dropped pairs cost in held-out loss when capacity is short, and does serving the
tokens of largest gate weight first (batch-prioritised routing, V-MoE) recover it in a language
model?

Top-2 of 8 with slots per sequence, capacity factors 0.75, 1 and 2, and priority `position` (first
come, first served) or `gate` (largest weight first), compared with a dropless run. Under `gate` a
token's slot depends on later tokens in training. Evaluation is dropless for all variants, so that
only what was learned differs.

    moejax sweep --experiment=experiments/capacity/sweep.py --workdir=runs/capacity

Argument: longer (1), seeds (3), baseline (dropless), only (all; as only=A+B). README.md beside this
file has the results.
"""

from experiments.small_lm import Question, Variant

PRIORITIES = ("position", "gate")
FACTORS = (0.75, 1.0, 2.0)

TOP_2 = {"moe.gate.name": "top_k", "moe.num_experts": 8, "moe.d_ff": 128}

VARIANTS: dict[str, Variant] = {
    "dropless": {**TOP_2},
    **{
        f"{priority}_{factor:g}": {
            **TOP_2,
            "moe.transport": "cells",
            "moe.capacity_factor": factor,
            "moe.priority": priority,
        }
        for factor in FACTORS
        for priority in PRIORITIES
    },
}

QUESTION = Question(VARIANTS, baseline="dropless", match=None)
get_config, sweep, comparison = QUESTION.get_config, QUESTION.sweep, QUESTION.comparison
