"""Balancing experts with a loss, a bias, both or neither.

Question: how uneven does routing become without a balancing mechanism, what does each mechanism
cost in held-out loss, and does a bias outside the gradient (loss-free balancing, arXiv 2408.15664)
cost less?

The gate is sigmoid top-2 of 16 and dropless, so that imbalance drops no tokens and only affects
learning. Variants: the Switch loss with weight 0.01 or 0.1; a bias step of 0.001 (the paper's) or
0.01 (because the run is short); loss and bias together; neither.

    moejax sweep --experiment=experiments/balance/sweep.py --workdir=runs/balance

Argument: longer (1), seeds (3), baseline (none), only (all; as only=A+B). README.md beside this
file has the results.
"""

from experiments.small_lm import Question, Variant


def _balanced(loss: float, bias_rate: float) -> Variant:
    return {
        "moe.gate.name": "loss_free",
        "moe.gate.bias_rate": bias_rate,
        "moe.losses.load_balance": loss,
        "moe.losses.z": 0.0,
        "moe.num_experts": 16,
        "moe.d_ff": 128,
    }


VARIANTS: dict[str, Variant] = {
    "none": _balanced(0.0, 0.0),
    "loss_0.01": _balanced(0.01, 0.0),
    "loss_0.1": _balanced(0.1, 0.0),
    "bias_0.001": _balanced(0.0, 0.001),
    "bias_0.01": _balanced(0.0, 0.01),
    "both": _balanced(0.01, 0.01),
}

QUESTION = Question(VARIANTS, baseline="none")
get_config, sweep, comparison = QUESTION.get_config, QUESTION.sweep, QUESTION.comparison
