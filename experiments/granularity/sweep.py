"""Few wide experts or many narrow ones, with and without a shared expert.

Question: at equal expert parameters and active FLOPs, do finer experts help (DeepSeekMoE, arXiv
2401.06066), and does it help to apply one of them to every token (a shared expert)?

1 of 4 experts of width 256, 2 of 8 of 128, 4 of 16 of 64, 8 of 32 of 32; and with one shared
expert in place of a routed one: 1 + 3 of 15 of 64, 1 + 7 of 31 of 32. Softmax over all experts, not
renormalised (OLMoE's form, the only one of these that k = 1 can learn with).

    moejax sweep --experiment=experiments/granularity/sweep.py --workdir=runs/granularity

Argument: longer (1), seeds (3), baseline (4x1), only (all; as only=A+B). README.md beside this
file has the results.
"""

from experiments.small_lm import WIDTH, Question, Variant


def _split(parts: int, shared: int = 0) -> Variant:
    """The widest experts, each split into ``parts``; ``shared`` of these go to every token."""
    return {
        "moe.gate.name": "top_k",
        "moe.gate.renormalize": False,
        "moe.gate.k": parts - shared,
        "moe.num_experts": 4 * parts - shared,
        "moe.shared_experts": shared,
        "moe.d_ff": WIDTH // parts,
    }


VARIANTS: dict[str, Variant] = {
    "4x1": _split(1),
    "8x2": _split(2),
    "16x4": _split(4),
    "32x8": _split(8),
    "15x3_shared": _split(4, shared=1),
    "31x7_shared": _split(8, shared=1),
}

QUESTION = Question(VARIANTS, baseline="4x1")
get_config, sweep, comparison = QUESTION.get_config, QUESTION.sweep, QUESTION.comparison
