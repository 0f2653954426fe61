"""Losses, gradient norm and learning rate over steps."""

from collections.abc import Iterable

from moejax.analysis import figures, health
from moejax.analysis.figures import Scale
from moejax.analysis.page import Block, Choice, Figure, Page, Warning
from moejax.analysis.pages import by_source
from moejax.analysis.run import RunData
from moejax.train import scales

OF_ONE_TASK = {
    "mse": "Mean squared error of the task, in its target's units squared.",
    "log_loss": "Log loss of the task, in nats.",
    "accuracy": "Share of the task's examples whose target got the higher probability.",
    "auc": "Chance that an example with target 1 scores higher than one with target 0.",
}
"""Rows of several tasks have these as mse/NAME and so on."""

OF_ONE_SOURCE = {
    "accuracy": "Share of the source's tokens whose target got the highest probability.",
}
"""Rows of a mixture have this as accuracy/NAME."""

HITS = (0.0, 1.0)

SETTLED = 25
"""The first 1/SETTLED of the logged steps are far above all that follows and are left off scale."""


def scale_of(key: str, values: Iterable[float]) -> Scale:
    """The scale of a number of metrics.jsonl that is no loss of the run."""
    values, kind = list(values), key.partition("/")[0]
    if kind in ("accuracy", "auc"):
        name = "right predictions" if kind == "accuracy" else "area under the ROC curve"
        return Scale(name, "share", scales.SHARE, bounds=HITS, format=".1%")
    if kind == "log_loss":
        return figures.loss("log loss", "nats/example")
    if kind == "mse":
        least = scales.least_relative(values)
        return figures.from_0("mean squared error", "target units squared", least)
    if key == "grad_norm":
        return figures.from_0("gradient norm before clipping", "L2", scales.least_relative(values))
    if key == "learning_rate":
        return figures.from_0("learning rate", "per step", scales.least_relative(values))
    if key in ("aux/load_balance", "aux/importance", "aux/load"):
        return Scale(key.removeprefix("aux/"), "1 at balance", scales.SHARE)
    if key == "aux/z":
        return figures.from_0("z", "nats squared", scales.least_relative(values))
    return Scale(key.removeprefix("aux/"), "mean per token", scales.least_relative(values))


def page(run: RunData) -> Page:
    blocks: list[Block] = [Warning(finding.text) for finding in health.leak(run)]
    if run.train or run.held_out:
        blocks.append(loss(run))
    if apart := by_source.over_steps(run):
        blocks.append(apart)
    auxiliary = sorted({key for row in run.train for key in row if key.startswith("aux/")})
    of_one = OF_ONE_SOURCE if by_source.sources([run]) else OF_ONE_TASK
    others = {
        "gradient norm": ("grad_norm", "Norm of the gradient before clipping."),
        "learning rate": ("learning_rate", "Learning rate of the step."),
        "accuracy": (
            "accuracy",
            f"Share of {run.units.item}s whose target got the highest probability.",
        ),
        **{
            key: (key, of_one[key.partition("/")[0]])
            for key in sorted({key for row in run.held_out for key in row if "/" in key})
            if key.partition("/")[0] in of_one
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
        name: [_metric(run, key, caption)]
        for name, (key, caption) in others.items()
        if any(len(run.series(split, key)[0]) for split in ("train", "eval"))
    }
    if options:
        blocks.append(Choice("also recorded", options))
    return Page("Curves", blocks)


def loss(run: RunData, name: str = "loss") -> Figure:
    """Training and held-out loss, with the baselines as levels; ``name`` is the figure's."""
    traces, shown = [], []
    for split, label in (("train", "training"), ("eval", "held out")):
        steps, values = run.series(split, "loss")
        if len(steps):
            style = {"mode": "lines+markers"} if split == "eval" else {}
            traces.append(figures.line(label, steps, values, **style))
            shown += [*values[len(values) // SETTLED if split == "train" else 0 :]]
    steps = [0, run.last_step]
    baselines = run.saved.get("baselines", {})
    for baseline, value in baselines.items():
        traces.append(figures.level(f"{baseline} model {value:.3f}", steps, value))
    shown += baselines.values()
    scale = figures.loss("loss", run.units.loss, shown)
    spec = figures.chart(traces, "step", scale, yaxis=scale.axis(shown))
    caption = (
        f"Loss in {run.units.loss}, one run, without auxiliary losses. Training: of the logged "
        f"step's own batch; held out: of all evaluation rows.{_dotted(run)} The axis spans at "
        f"least {scale.least:.2g} {run.units.loss}; the first steps may lie above it."
    )
    return Figure(spec, caption, height=430, name=name)


def _dotted(run: RunData) -> str:
    if not run.saved.get("baselines"):
        return ""
    if run.units.item == "token":
        return (
            " Dotted: models of n-gram counts of the same text (Witten-Bell), evaluated on the "
            "same rows."
        )
    return " Dotted: predictions without a model, evaluated on the same rows."


def _metric(run: RunData, key: str, caption: str) -> Figure:
    traces = []
    for split, label in (("train", "training"), ("eval", "held out")):
        steps, values = run.series(split, key)
        if len(steps):
            traces.append(figures.line(label, steps, values))
    scale = scale_of(key, (value for trace in traces for value in trace["y"]))
    return Figure(figures.chart(traces, "step", scale), caption, height=320, name=f"curve-{key}")
