"""More experts at constant compute: the question of Clark et al. 2022 (arXiv 2202.01169).

Question: does the loss fall as a power of the number of experts, and do Hash, S-BASE and learned
top-1 routing rank as published (Hash worst, the other two close)?

Each layer has E = 2, 4, 8, 16 or 32 experts of the dense layer's width, one per token, so that
active FLOPs are constant and parameters grow; E = 1 is the dense model. `top_1` is Switch's gate
with its balance loss, where Clark et al. have RL-R and S-BASE; `hash` draws tables at random, as
theirs does.

    moejax sweep --experiment=experiments/experts/sweep.py --workdir=runs/experts
    moejax scaling runs/experts

Argument: longer (1), seeds (3), baseline (dense_ffn), only (all; as only=A+B). README.md beside
this file has the results.
"""

from experiments.small_lm import TOP_1, WIDTH, Question, Variant

ROUTERS: dict[str, Variant] = {
    "hash": {"moe.gate.name": "hash"},
    "sbase": {"moe.gate.name": "sbase"},
    "top_1": TOP_1,
}
EXPERTS = (2, 4, 8, 16, 32)

VARIANTS: dict[str, Variant] = {
    "dense_ffn": {"moe.every": 0},
    **{
        f"{router}_{experts}": {**gate, "moe.num_experts": experts, "moe.d_ff": WIDTH}
        for experts in EXPERTS
        for router, gate in ROUTERS.items()
    },
}

QUESTION = Question(VARIANTS, baseline="dense_ffn")
get_config, sweep, comparison = QUESTION.get_config, QUESTION.sweep, QUESTION.comparison
