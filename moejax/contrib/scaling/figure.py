"""Pictures of runs and laws: loss against experts, and two sources side by side."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax.contrib.scaling.checks import check_enough, fit_runs
from moejax.contrib.scaling.law import Law
from moejax.contrib.scaling.runs import Run, Source
from moejax.contrib.scaling.study import Study
from moejax.contrib.scaling.table import number
from moejax.errors import UserError
from moejax.sweep.figure import COLOURS
from moejax.train import scales
from moejax.train.workdir.summary import QUIET, STYLE

_COLOURS = COLOURS[1:]
_LABEL_HEIGHT = 0.04
"""Height of a label as a share of the axes' height."""

Label = tuple[int, float, str, str]
"""Experts and value beside which a text of a colour stands."""


def figure(study: Study) -> Any:
    """A panel per router: points are runs, lines the law, one colour per size."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        drawn, panels = _panels(len(study.routers))
        sizes = sorted({run.size for each in study.routers for run in each.runs})
        colours = {size: _COLOURS[i % len(_COLOURS)] for i, size in enumerate(sizes)}
        labels: list[list[Label]] = []
        shown = [run.loss for each in study.routers for run in each.runs]
        least = scales.least_loss(study.source.unit, shown)
        for axes, each in zip(panels, study.routers, strict=True):
            axes.set_title(each.router)
            labels.append([])
            for size in sorted({run.size for run in each.runs}):
                own = [run for run in each.runs if run.size == size]
                _points(axes, own, 1.0, colours[size])
                labels[-1].append(_law(axes, each.law, own, 1.0, colours[size], number(size)))
        panels[0].set_ylabel(f"final held-out loss, {study.source.unit}")
        experts = [run.experts for each in study.routers for run in each.runs]
        _finish(panels, labels, experts, least)
        text = f"{study.source.name}: points are {len(shown)} runs, lines the fitted law"
        _note(drawn, f"{text}, a colour is N; losses on a logarithmic axis of {least:.2g} or more")
        return drawn


def beside(study: Study, other: Source) -> Any:
    """Two panels, the study's source and another: loss relative to that of E = 1.

    Colours go by the router's name, in which case and hyphens do not count: sbase is S-Base. Where
    a source has several sizes, its smallest and largest are drawn.

    Raises:
      UserError: a router of the other source has too few runs, or one of either none with E = 1.
    """
    import matplotlib

    for name in other.routers:
        check_enough(f"{other.name}: {name}", other.of(name))
    sides = [(study.source, {each.router: each.law for each in study.routers})]
    sides.append((other, {name: fit_runs(other.of(name)) for name in other.routers}))
    plain = list(dict.fromkeys(_plain(name) for _, laws in sides for name in laws))
    with matplotlib.rc_context(STYLE):
        drawn, panels = _panels(2)
        labels: list[list[Label]] = []
        for axes, (source, laws) in zip(panels, sides, strict=True):
            labels.append([])
            for router, law in laws.items():
                colour = _COLOURS[plain.index(_plain(router)) % len(_COLOURS)]
                labels[-1] += _relative(axes, source, router, law, colour)
            axes.set_title(source.name)
            axes.axhline(1.0, color=QUIET, linewidth=0.8, zorder=1)
        panels[0].set_ylabel("held-out loss / that of E = 1 at the same size, ratio")
        runs = [run for source, laws in sides for router in laws for run in source.of(router)]
        _finish(panels, labels, [run.experts for run in runs], scales.RELATIVE)
        text = f"points are {len(runs)} runs, lines the fitted law"
        _note(drawn, f"{text}; hollow and dashed: the largest size; logarithmic axes")
        return drawn


def _relative(axes: Any, source: Source, router: str, law: Law, colour: str) -> list[Label]:
    runs = source.of(router)
    alone = {run.size: [] for run in runs if run.experts > 1}
    for run in runs:
        if run.experts == 1 and run.size in alone:
            alone[run.size].append(run.loss)
    sizes = sorted(size for size, losses in alone.items() if losses)
    if not sizes:
        raise UserError(
            f"{source.name}: {router} has no run with E=1 (or a dense one of its size) to be "
            "relative to; leave it out with --router, or draw without --beside"
        )
    labels = []
    for size in dict.fromkeys([sizes[0], sizes[-1]]):
        own, base = [run for run in runs if run.size == size], float(np.mean(alone[size]))
        hollow = size != sizes[0]
        _points(axes, own, base, colour, hollow)
        text = router if len(sizes) == 1 else f"{router} {number(size)}"
        labels.append(_law(axes, law, own, base, colour, text, "--" if hollow else "-"))
    return labels


def _plain(router: str) -> str:
    return "".join(letter for letter in router.casefold() if letter.isalnum())


def _panels(count: int) -> tuple[Any, list[Any]]:
    """A figure outside pyplot, with panels side by side on the same scales."""
    from matplotlib.figure import Figure

    drawn: Any = Figure(figsize=(max(4.6 * count, 9.0), 4.8), dpi=110, layout="constrained")
    drawn.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))
    return drawn, list(drawn.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0])


def _points(axes: Any, runs: Sequence[Run], base: float, colour: str, hollow: bool = False) -> None:
    axes.scatter(
        [run.experts for run in runs],
        [run.loss / base for run in runs],
        color="white" if hollow else colour,
        edgecolors=colour if hollow else "white",
        s=20,
        linewidths=1.0 if hollow else 0.5,
        zorder=3,
    )


def _law(
    axes: Any, law: Law, runs: Sequence[Run], base: float, colour: str, text: str, line: str = "-"
) -> Label:
    """The law over the range of experts of runs of one size; what to write at its end."""
    experts, size = [run.experts for run in runs], runs[0].size
    e = np.geomspace(min(experts), max(experts), 100)
    values = law.loss(size, e) / base
    axes.plot(e, values, color=colour, linestyle=line, linewidth=1.3)
    return max(experts), float(values[-1]), text, colour


def _finish(
    panels: Sequence[Any], labels: Sequence[list[Label]], experts: Sequence[int], least: float
) -> None:
    """Scales, losses over at least ``least``, then the labels, moved apart where they touch."""
    from matplotlib import ticker

    first, last = min(experts), max(experts)
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlim(first / 1.25, last * (last / first) ** 0.3)
        axes.set_xticks(sorted(set(experts)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.yaxis.set_major_locator(ticker.MaxNLocator(8))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("experts E, number")
    low, high = panels[0].get_ylim()
    if high - low < least:
        panels[0].set_ylim(scales.span([low, high], least))  # all panels share it
    low, high = np.log(panels[0].get_ylim())
    for axes, own in zip(panels, labels, strict=True):
        below = -1.0
        for at, value, text, colour in sorted(own, key=lambda label: label[1]):
            below = max((np.log(value) - low) / (high - low), below + _LABEL_HEIGHT)
            style = {"color": colour, "va": "center", "fontweight": "bold", "fontsize": 8.5}
            axes.annotate(
                text,
                (at, below),
                xycoords=("data", "axes fraction"),
                xytext=(6, 0),
                textcoords="offset points",
                **style,
            )


def _note(drawn: Any, text: str) -> None:
    escaped = text.replace("$", r"\$")  # matplotlib would read it as mathematics
    drawn.text(0.012, 0.022, escaped, color=QUIET, va="center", fontsize=9)
