"""Twelve gates at equal active FLOPs.

Question: at one size, which gate learns most per unit of active compute, and does the difference
exceed the scatter of the seeds?

Every sparse variant has the same expert parameters, and per token the same expert FLOPs as the
dense layer: top-1 gates have 8 experts of width 256, top-2 gates have 16 of width 128, and
DeepSeek's has 32 of width 64, of which a token visits one shared and three routed ones. Gates that
choose the number of experts per token themselves (DSelect-k, ReMoE) are measured at their own cost
and marked.

    moejax sweep --experiment=experiments/gating/sweep.py --workdir=runs/gating

Argument: longer (1), seeds (3), baseline (top_2), only (all; as only=A+B). README.md beside this
file has the results.
"""

from experiments.small_lm import TOP_1, Question, Variant

ONE = {"moe.num_experts": 8, "moe.d_ff": 256}
TWO = {"moe.num_experts": 16, "moe.d_ff": 128}

VARIANTS: dict[str, Variant] = {
    "dense_ffn": {"moe.every": 0},
    "random": {"moe.gate.name": "random", "moe.gate.k": 1, **ONE},
    "hash": {"moe.gate.name": "hash", "moe.gate.table": "balanced", **ONE},
    "switch": {**TOP_1, **ONE},
    "top_2": {"moe.gate.name": "top_k", **TWO},
    "xmoe": {"moe.gate.name": "xmoe", "moe.gate.k": 2, "moe.gate.renormalize": True, **TWO},
    "base": {"moe.gate.name": "base", **ONE},
    "sbase": {"moe.gate.name": "sbase", **ONE},
    "expert_choice": {"moe.gate.name": "expert_choice", "moe.allow_future_leak": True, **TWO},
    "dselect_k": {"moe.gate.name": "dselect_k", **TWO},
    # From 1e-8, its default, lambda would need half of this short run to become effective.
    "remoe": {"moe.gate.name": "remoe", "moe.gate.lambda_init": 1e-4, **TWO},
    "deepseek_v3": {
        "moe.gate.name": "deepseek_v3",
        "moe.gate.k": 3,
        "moe.gate.bias_rate": 0.01,
        "moe.gate.num_groups": 1,
        "moe.gate.top_groups": 1,
        "moe.shared_experts": 1,
        "moe.num_experts": 31,
        "moe.d_ff": 64,
    },
}

QUESTION = Question(VARIANTS, baseline="top_2")
get_config, sweep, comparison = QUESTION.get_config, QUESTION.sweep, QUESTION.comparison
