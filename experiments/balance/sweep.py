"""What keeps experts busy: a loss, a bias, both or nothing.

Question: how uneven does routing become without help, what does each remedy cost in held-out loss,
and is a bias outside the gradient (loss-free balancing, arXiv 2408.15664) the cheaper one?

Sigmoid top-2 of 16, dropless, so that imbalance costs no tokens and only what it does to learning
is seen. The Switch loss with weight 0.01 or 0.1, the bias moved by 0.001 (the paper's) or 0.01 per
step (the run is short), the loss and the bias together, and neither.

    moejax sweep --experiment=experiments/balance/sweep.py --workdir=runs/balance

Argument: longer (1), seeds (3), baseline (none), only (all; as only=A+B). README.md beside this
file has what came out here.
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
