"""Losses of each source of a mixture: of one run over steps, and at the end of several."""

from collections.abc import Iterable, Sequence

import numpy as np

from moejax.analysis import figures
from moejax.analysis.page import Figure
from moejax.analysis.run import RunData

LOSS = "loss/"
"""Begins the keys of rows that have the loss of one source."""
SETTLED = 25
"""As on the page of curves: the first 1/SETTLED of the logged steps are left off scale."""


def sources(runs: Iterable[RunData]) -> list[str]:
    """The names of the sources that any of the runs has losses of, in the order of the mixture."""
    found: dict[str, None] = {}
    for run in runs:
        last = [*run.train[-1:], *run.held_out[-1:]]
        recorded = [key.removeprefix(LOSS) for row in last for key in row if key.startswith(LOSS)]
        named = [name for name in run.saved.get("mixture", {}) if name in recorded]
        found |= dict.fromkeys([*named, *recorded])
    return list(found)


def metrics(runs: Sequence[RunData]) -> dict[str, tuple[str, str]]:
    """The losses of the sources, for a choice of metrics: its name -> split and key."""
    return {
        f"{words} of {name}": (split, f"{LOSS}{name}")
        for name in sources(runs)
        for words, split in (("held-out loss", "eval"), ("training loss", "train"))
    }


def over_steps(run: RunData) -> Figure | None:
    """Held-out loss (thick) and training loss (thin) of each source; None without a mixture."""
    traces, shown = [], []
    for index, name in enumerate(sources([run])):
        for split, width, opacity in (("train", 0.9, 0.5), ("eval", 2.2, 1.0)):
            steps, values = run.series(split, f"{LOSS}{name}")
            there = np.isfinite(values)  # a batch may have no row of a source
            steps, values = steps[there], values[there]
            if not len(steps):
                continue
            label = f"{name}, {'training' if split == 'train' else 'held out'}"
            style = {"line": {"color": f"C{index % 8}", "width": width}, "opacity": opacity}
            mode = "lines" if split == "train" else "lines+markers"
            traces.append(figures.line(label, steps, values, mode=mode, **style))
            shown += [*values[len(values) // SETTLED if split == "train" else 0 :]]
    if not traces:
        return None
    scale = figures.loss("loss", run.units.loss, shown)
    spec = figures.chart(traces, "step", scale, yaxis=scale.axis(shown), showlegend=True)
    caption = (
        f"Loss of each source of the mixture in {run.units.loss}, one run. Thick: held out, of the "
        "source's own evaluation rows; thin: training, of its rows in the logged step's batch."
    )
    return Figure(spec, caption, height=430, name="loss-by-source")
