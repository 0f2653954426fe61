"""A study as text: coefficients, errors, order and conclusions."""

import itertools
import math
import textwrap
from collections import Counter
from collections.abc import Sequence

from moejax.contrib.scaling.checks import Errors, Interval
from moejax.contrib.scaling.law import HIGHEST, SATURATION
from moejax.contrib.scaling.study import CUTOFF, TOLERANCE, RouterStudy, Study, coefficients

FULL_LAW = "log10 L = a log10 N + b log10 Eh + c log10 N log10 Eh + d"
REDUCED_LAW = "log10 L = b log10 Eh + d"
HAT = "1/Eh = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max"
_WIDTH = 100
ERROR_NOTE = """\
Errors are |predicted / measured - 1| of the loss. Held out: every (size, experts) cell, every size,
every number of experts in turn, predicted by the law fitted to the rest."""


def render(study: Study) -> str:
    """The whole report."""
    source = study.source
    laws = [REDUCED_LAW] * any(each.law.reduced for each in study.routers)
    laws += [FULL_LAW] * any(not each.law.reduced for each in study.routers)
    head = [f"{source.name}, loss in {source.unit}", *source.notes, *laws, HAT]
    parts = ["\n".join(head), *(_coefficients(each) for each in study.routers)]
    parts.append(f"{_errors(study.routers)}\n\n{ERROR_NOTE}")
    if any(each.effective for each in study.routers):
        parts.append(_effective(study.routers))
    if study.pairs:
        parts.append(_order(study))
    sentences = (textwrap.fill(each, _WIDTH, subsequent_indent="  ") for each in verdicts(study))
    return "\n\n".join([*parts, "\n".join(sentences)])


def _coefficients(study: RouterStudy) -> str:
    """The coefficients with their intervals, next to the paper's."""
    published = {**coefficients(study.paper), CUTOFF: study.paper_cutoff} if study.paper else {}
    lines = [[study.router, "fitted", "95 % interval", *["paper"] * bool(published)]]
    for name, value in study.coefficients.items():
        own = [name, _coefficient(name, value), _interval(name, study.intervals[name])]
        lines.append(own + [_coefficient(name, value) for value in [published.get(name)] if value])
    return f"{columns(lines)}\n{len(study.runs)} runs"


def _coefficient(name: str, value: float) -> str:
    if name == CUTOFF:
        return "none" if math.isinf(value) else number(value)
    if name in SATURATION:
        return number(value)
    return f"{value:.4f}"


def _interval(name: str, ends: Interval) -> str:
    low, high = ends
    if name == "E_max" and high >= math.exp(HIGHEST[1]) * 0.999:
        return f"above {number(low)}"
    if name == CUTOFF and math.isinf(high):
        return "none" if math.isinf(low) else f"above {number(low)}"
    return f"{_coefficient(name, low)} to {_coefficient(name, high)}"


def number(value: float) -> str:
    """Three digits: 1.85, 314, 16.5M, 937B."""
    if value < 1e3:
        return f"{value:.3g}"
    for scale, prefix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * scale:
            scaled = value / scale
            return f"{scaled:.0f}{prefix}" if scaled >= 99.95 else f"{scaled:.3g}{prefix}"
    raise AssertionError(value)


def _errors(studies: Sequence[RouterStudy]) -> str:
    paper = any(study.paper for study in studies)
    lines = [
        [
            "",
            "fitted",
            "",
            "cell out",
            "",
            "size out",
            "",
            "experts out",
            "",
            *["paper's", ""] * paper,
        ],
        ["error, %", *["mean", "max"] * (5 if paper else 4)],
    ]
    for study in studies:
        kinds = [study.fitted, study.cell, study.size, study.experts]
        kinds += [study.paper_errors] if paper else []
        lines.append([study.router, *(cell for kind in kinds for cell in _mean_and_max(kind))])
    return columns(lines)


def _mean_and_max(errors: Errors | None) -> tuple[str, str]:
    if errors is None:
        return "-", "-"
    return f"{100 * errors.mean:.2f}", f"{100 * errors.largest:.2f}"


def _effective(studies: Sequence[RouterStudy]) -> str:
    lines = [["size", "experts", "router", "effective size", "gain"]]
    for study in studies:
        lines += [
            [
                number(e.size),
                str(e.experts),
                study.router,
                number(e.value),
                f"x {e.value / e.size:.1f}",
            ]
            for e in study.effective
        ]
    return "Effective size: of the dense model with the same predicted loss.\n" + columns(lines)


def _order(study: Study) -> str:
    lines = [["order", "", "", "cells", "lower", "unclear", "higher", "least", "most"]]
    for (first, second), compared in study.pairs.items():
        signs, means = Counter(c.sign for c in compared), [c.mean for c in compared]
        ends = [f"{value:+.4f}" for value in (min(means), max(means))] if means else ["-", "-"]
        counts = [str(value) for value in (len(compared), signs[-1], signs[0], signs[1])]
        lines.append([first, "-", second, *counts, *ends])
    about = (
        "Loss of the first less the second's at equal size, experts and seed. Unclear: the 95 %\n"
        "interval of the seeds contains 0"
    )
    if any(c.seeds == 1 for compared in study.pairs.values() for c in compared):
        noise, freedom = study.noise
        about += (
            f"; single runs scatter by {noise:.4f} ({freedom} degrees of freedom)"
            if freedom
            else "; nothing was run with a second seed, so all is unclear"
        )
    return f"{columns(lines)}\n\n{about}."


def verdicts(study: Study) -> list[str]:
    """The conclusions in a sentence or two per router, and the order."""
    sentences = [sentence for each in study.routers for sentence in _verdict(each)]
    if study.rankings:
        sentences.append(_common_order(study))
    return sentences


def _common_order(study: Study) -> str:
    """The most frequent order, its exceptions, and how much of it is certain."""
    order, count = Counter(ranking.order for ranking in study.rankings).most_common(1)[0]
    others = [r.cell for r in study.rankings if r.order != order]
    where = ", ".join(f"{number(size)} E={experts}" for size, experts in others)
    signs = {
        (first, second, c.cell): c.sign
        for pair, compared in study.pairs.items()
        for c in compared
        for (first, second), c in ((pair, c), (pair[::-1], -c))
    }
    certain = sum(
        all(signs.get((*step, ranking.cell)) == -1 for step in itertools.pairwise(order))
        for ranking in study.rankings
    )
    return (
        f"Order, lowest loss first: {', '.join(order)} in {count} of {len(study.rankings)} cells"
        + (f"; not at {where}" if others else "")
        + f". In {certain} of them every step of it exceeds the seeds' scatter."
    )


def _verdict(study: RouterStudy) -> list[str]:
    sentences = []
    if study.law.reduced:
        size = number(study.runs[0].size)
        sentences.append(
            f"{study.router}: one size only ({size}), so a, c and N_cutoff are not determined; the "
            "reduced law is fitted."
        )
    if study.cell:
        count, total = study.cell.runs - len(study.missed), study.cell.runs
        missed = ", ".join(
            f"{number(p.run.size)} E={p.run.experts} ({p.run.name}, {100 * p.error:+.2f} %)"
            for p in study.missed
        )
        sentences.append(
            f"{study.router}: {count} of {total} runs of held-out cells are predicted within "
            f"{100 * TOLERANCE:.0f} %" + (f"; not {missed}." if missed else ".")
        )
    if study.law.at_bound:
        sentences.append(
            f"{study.router}: {' and '.join(study.law.at_bound)} ended on a bound of the search; "
            "these runs do not determine it."
        )
    return sentences


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:{'>' if place else '<'}{width}}"
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
