"""Losses, gradient norm and learning rate over steps."""

import numpy as np

from moejax.analysis import figures, health
from moejax.analysis.page import Block, Choice, Figure, Page, Warning
from moejax.analysis.run import RunData

OF_ONE_TASK = {
    "mse": "Mean squared error of the task, in its target's units squared.",
    "log_loss": "Log loss of the task, in nats.",
    "accuracy": "Share of the task's examples whose target got the higher probability.",
    "auc": "Chance that an example with target 1 scores higher than one with target 0.",
}
"""Rows of several tasks have these as mse/NAME and so on."""

SETTLED = 25
"""The first 1/SETTLED of the logged steps are far above all that follows and are left off scale."""


def page(run: RunData) -> Page:
    blocks: list[Block] = [Warning(finding.text) for finding in health.leak(run)]
    if run.train or run.held_out:
        blocks.append(_loss(run))
    auxiliary = sorted({key for row in run.train for key in row if key.startswith("aux/")})
    others = {
        "gradient norm": ("grad_norm", "Norm of the gradient before clipping."),
        "learning rate": ("learning_rate", "Learning rate of the step."),
        "accuracy": (
            "accuracy",
            f"Share of {run.units.item}s whose target got the highest probability.",
        ),
        **{
            key: (key, OF_ONE_TASK[key.partition("/")[0]])
            for key in sorted({key for row in run.held_out for key in row if "/" in key})
            if key.partition("/")[0] in OF_ONE_TASK
        },
        **{
            key.removeprefix("aux/"): (
                key,
                f"Auxiliary loss {key}, per token and before its weight "
                f"({run.field(f'moe.losses.{key[4:]}', 'own')}) is applied.",
            )
            for key in auxiliary
        },
    }
    options = {
        name: [_metric(run, key, name, caption)]
        for name, (key, caption) in others.items()
        if any(len(run.series(split, key)[0]) for split in ("train", "eval"))
    }
    if options:
        blocks.append(Choice("also recorded", options))
    return Page("Curves", blocks)


def _loss(run: RunData) -> Figure:
    """Training and held-out loss, with the baselines as levels."""
    traces, shown = [], []
    for split, name in (("train", "training"), ("eval", "held out")):
        steps, loss = run.series(split, "loss")
        if len(steps):
            traces.append(
                figures.line(
                    name, steps, loss, **({"mode": "lines+markers"} if split == "eval" else {})
                )
            )
            shown += [*loss[len(loss) // SETTLED if split == "train" else 0 :]]
    steps = [0, run.last_step]
    baselines = run.saved.get("baselines", {})
    for name, value in baselines.items():
        traces.append(figures.level(f"{name} model {value:.3f}", steps, value))
    shown = [value for value in [*shown, *baselines.values()] if np.isfinite(value)]
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    margin = 0.06 * (high - low) or 0.1
    spec = figures.chart(
        traces, "step", run.units.loss, yaxis={"range": [low - margin, high + margin]}
    )
    caption = (
        f"Loss in {run.units.loss}, without auxiliary losses. Training: of the logged step's own "
        f"batch; held out: of all evaluation rows.{_dotted(run)}"
    )
    return Figure(spec, caption, height=430, name="loss")


def _dotted(run: RunData) -> str:
    if not run.saved.get("baselines"):
        return ""
    if run.units.item == "token":
        return (
            " Dotted: models of n-gram counts of the same text (Witten-Bell), evaluated on the "
            "same rows."
        )
    return " Dotted: what can be said without a model, evaluated on the same rows."


def _metric(run: RunData, key: str, name: str, caption: str) -> Figure:
    traces = []
    for split, label in (("train", "training"), ("eval", "held out")):
        steps, values = run.series(split, key)
        if len(steps):
            traces.append(figures.line(label, steps, values))
    return Figure(figures.chart(traces, "step", name), caption, height=320, name=f"curve-{key}")
