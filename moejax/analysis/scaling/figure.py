"""Runs and laws as a picture: loss against experts, and two sources beside each other."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax.analysis.scaling.checks import fit_runs
from moejax.analysis.scaling.law import Law
from moejax.analysis.scaling.runs import Run, Source
from moejax.analysis.scaling.study import Study
from moejax.analysis.scaling.table import number
from moejax.errors import UserError
from moejax.sweep.figure import COLOURS
from moejax.train.summary import QUIET, STYLE


def figure(study: Study) -> Any:
    """A panel per router: points are runs, lines the law, one colour per size."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        count = len(study.routers)
        drawn, panels = _panels(count)
        sizes = sorted({run.size for each in study.routers for run in each.runs})
        for axes, each in zip(panels, study.routers, strict=True):
            axes.set_title(each.router)
            for size in sizes:
                colour = COLOURS[1:][sizes.index(size) % (len(COLOURS) - 1)]
                own = [run for run in each.runs if run.size == size]
                if own:
                    _points(axes, own, [run.loss for run in own], colour, "o")
                    _law(axes, each.law, own, colour, "-", 1.0)
                    last = max(run.experts for run in own)
                    _label(axes, last, float(each.law.loss(size, last)), number(size), colour)
            _finish(axes, [run.experts for run in each.runs])
        panels[0].set_ylabel(f"final held-out loss, {study.source.unit}")
        _note(drawn, f"{study.source.name}: points are runs, lines the fitted law, a colour is N")
        return drawn


def beside(study: Study, other: Source) -> Any:
    """Two panels, the study's source and another: loss relative to that of E = 1.

    Colours go by the router's name, in which case and hyphens do not count: sbase is S-Base. Where
    a source has several sizes, all their runs are drawn, and the law of the smallest and largest.

    Raises:
      UserError: a router of either has no run with E = 1 at any of its sizes.
    """
    import matplotlib

    sides = [(study.source, {each.router: each.law for each in study.routers})]
    sides.append((other, {name: fit_runs(other.of(name)) for name in other.routers}))
    names = list(dict.fromkeys(_plain(name) for _, laws in sides for name in laws))
    with matplotlib.rc_context(STYLE):
        drawn, panels = _panels(2)
        for axes, (source, laws) in zip(panels, sides, strict=True):
            for router, law in laws.items():
                style = COLOURS[1:][names.index(_plain(router)) % (len(COLOURS) - 1)]
                _relative(axes, source, router, law, style)
            experts = [run.experts for router in laws for run in source.of(router)]
            sizes = sorted({run.size for router in laws for run in source.of(router)})
            spread = number(sizes[0]) + (f" to {number(sizes[-1])}" if len(sizes) > 1 else "")
            axes.set_title(f"{source.name}, N = {spread}")
            axes.axhline(1.0, color=QUIET, linewidth=0.8)
            _finish(axes, experts)
        panels[0].set_ylabel("held-out loss / that of E = 1 at the same size")
        _note(
            drawn,
            "points are runs, lines the fitted law; of several sizes, solid the smallest and "
            "dashed the largest",
        )
        return drawn


def _relative(axes: Any, source: Source, router: str, law: Law, colour: str) -> None:
    runs = source.of(router)
    sizes = sorted({run.size for run in runs if run.experts > 1})
    alone = {n: [r.loss for r in runs if r.size == n and r.experts == 1] for n in sizes}
    sizes = [size for size in sizes if alone[size]]
    if not sizes:
        raise UserError(
            f"{source.name}: {router} has no run with E=1 (or a dense one of its size) to be "
            "relative to; leave it out with --router, or draw without --beside"
        )
    for size in sizes:
        own = [run for run in runs if run.size == size]
        base = float(np.mean(alone[size]))
        _points(axes, own, [run.loss / base for run in own], colour, "o")
        if size in (sizes[0], sizes[-1]):
            line = "-" if size == sizes[0] else (0, (4, 2))
            _law(axes, law, own, colour, line, base)
    last = max(run.experts for run in runs if run.size == sizes[0])
    base = float(np.mean(alone[sizes[0]]))
    _label(axes, last, float(law.loss(sizes[0], last)) / base, router, colour)


def _plain(router: str) -> str:
    return "".join(letter for letter in router.casefold() if letter.isalnum())


def _panels(count: int) -> tuple[Any, list[Any]]:
    """A figure outside pyplot, with panels side by side that share the y axis."""
    from matplotlib.figure import Figure

    width = max(4.2 * count, 6.0)
    drawn: Any = Figure(figsize=(width, 4.8), dpi=110, layout="constrained")
    drawn.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))
    return drawn, list(drawn.subplots(1, count, sharey=True, squeeze=False)[0])


def _points(
    axes: Any, runs: Sequence[Run], values: Sequence[float], colour: str, shape: str
) -> None:
    axes.scatter(
        [run.experts for run in runs],
        values,
        color=colour,
        marker=shape,
        s=20,
        edgecolors="white",
        linewidths=0.5,
        zorder=3,
    )


def _law(axes: Any, law: Law, runs: Sequence[Run], colour: str, line: Any, base: float) -> None:
    """The law over the range of experts of runs of one size."""
    experts = [run.experts for run in runs]
    e = np.geomspace(min(experts), max(experts), 100)
    axes.plot(e, law.loss(runs[0].size, e) / base, color=colour, linestyle=line, linewidth=1.3)


def _label(axes: Any, experts: int, value: float, text: str, colour: str) -> None:
    axes.annotate(
        text,
        (experts, value),
        xytext=(6, 0),
        textcoords="offset points",
        color=colour,
        va="center",
        fontweight="bold",
    )


def _finish(axes: Any, experts: Sequence[int]) -> None:
    from matplotlib import ticker

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(min(experts) / 1.25, max(experts) * (max(experts) / min(experts)) ** 0.18)
    axes.set_xticks(sorted(set(experts)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_locator(ticker.MaxNLocator(8))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("experts E")


def _note(drawn: Any, text: str) -> None:
    escaped = text.replace("$", r"\$")  # matplotlib would read it as mathematics
    drawn.text(0.012, 0.022, escaped, color=QUIET, va="center", fontsize=9)
