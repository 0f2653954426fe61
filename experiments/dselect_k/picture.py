"""Plot of experts' weights over steps, for top-k and for DSelect-k."""

import numpy as np

from experiments.dselect_k import gates
from experiments.dselect_k.recovery import NUM_EXPERTS, RATES, paths
from experiments.dselect_k.recovery import draw as draw_problems
from experiments.dselect_k.training import STEPS_PER_EPOCH, Setting

SEED = 0


def draw(path: str, epochs: int) -> None:
    """Seed 0 of P1. Its true experts in colour, with their true weights as dashes."""
    import matplotlib.pyplot as plt

    problem = draw_problems(SEED + 1, NUM_EXPERTS)
    settings = [Setting(rate) for rate in RATES]
    true_E = problem.weight_ME[SEED, 0]
    order = np.argsort(-true_E, kind="stable")
    figure, axes = plt.subplots(
        len(RATES), 2, figsize=(10, 5.6), sharex=True, sharey=True, layout="constrained"
    )
    for column, (name, gate) in enumerate(
        (("top-k", gates.top_k()), ("DSelect-k, gamma = 1", gates.dselect_k(1.0)))
    ):
        weight_LSE = paths(gate, settings, problem, epochs)[SEED]
        for line, rate in enumerate(RATES):
            axis = axes[line, column]
            for place, expert in enumerate(order):
                true = true_E[expert] > 0
                style = {"color": f"C{place}", "zorder": 3} if true else {"color": "0.75"}
                axis.plot(weight_LSE[line, :, expert], linewidth=0.8, **style)
                if true:
                    axis.axhline(true_E[expert], color=f"C{place}", linestyle="--", linewidth=0.8)
            axis.set_title(f"{name}, learning rate {rate:g}", fontsize="medium")
    # Logarithmic: a gate decides in the first hundreds of steps, top-k then wavers for thousands.
    axes[0, 0].set(xscale="log", xlim=(1, epochs * STEPS_PER_EPOCH), ylim=(-0.02, 1.02))
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for axis in axes[:, 0]:
        axis.set_ylabel("weight of an expert, share")
    figure.suptitle(
        "Weights of 16 frozen experts: in colour the four that made the data (dashes: their true "
        "weights); one seed", fontsize="medium",
    )  # fmt: skip
    figure.savefig(path, dpi=130)
    plt.close(figure)
