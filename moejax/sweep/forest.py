"""Differences to the baseline as a panel of the picture: a row per variant, and its verdict."""

from collections.abc import Mapping
from typing import Any

from moejax.sweep.comparison import Compared, Summary
from moejax.train import scales
from moejax.train.workdir.summary import ALERT, QUIET

BEYOND = 1.0
"""Intervals show up to this many widths of all points to their left and right."""


def rows(summary: Summary) -> list[Compared]:
    """The variants that have a difference."""
    return [variant for variant in summary.variants if variant.difference]


def draw(
    axes: Any, summary: Summary, styles: Mapping[str, tuple[str, str]], names: Mapping[str, str]
) -> None:
    """Seeds as small points, their mean with its 95 % interval, 0 as the dashed baseline.

    Args:
      styles: colour and shape of each variant.
      names: what each variant is called, with its marks.
    """
    found = rows(summary)
    axes.axvline(0, color=QUIET, linestyle="--", linewidth=1, zorder=1)
    for place, variant in enumerate(found):
        difference, (colour, shape) = variant.difference, styles[variant.variant]
        assert difference is not None
        seeds = [point.difference for point in variant.trials if point.difference is not None]
        axes.scatter(seeds, [place] * len(seeds), color=colour, s=12, alpha=0.6, zorder=2)
        if difference.half_width:
            bar = {"color": colour, "linewidth": 1.6, "capsize": 4, "zorder": 2}
            axes.errorbar(difference.mean, place, xerr=difference.half_width, **bar)
        edge = ALERT if variant.leak else colour
        face = "white" if variant.missed_match else colour
        style = {"marker": shape, "s": 52, "facecolors": face, "edgecolors": edge, "zorder": 3}
        axes.scatter([difference.mean], [place], **style)
        side = axes.get_yaxis_transform()
        axes.text(1.02, place, variant.outcome, transform=side, va="center", color=QUIET, size=9)
    axes.set_yticks(range(len(found)), [names[variant.variant] for variant in found])
    for label, variant in zip(axes.get_yticklabels(), found, strict=True):
        label.set(color=styles[variant.variant][0], fontweight="bold")
    axes.set_ylim(len(found) - 0.4, -0.6)
    _limit(axes, found, summary)
    axes.set(
        title=f"Difference to {summary.baseline} at equal seeds",
        xlabel=f"loss minus {summary.baseline}'s, {summary.unit}; left is better",
    )


def _limit(axes: Any, found: list[Compared], summary: Summary) -> None:
    """Room for all seeds, and for intervals up to a bound: those of two seeds are very wide.

    Never less than what is worth seeing, so that near variants stand near each other.
    """
    seeds = [p.difference for v in found for p in v.trials if p.difference is not None]
    low, high = min([0.0, *seeds]), max([0.0, *seeds])
    least = scales.least_loss(summary.unit, [v.mean for v in found if v.mean is not None])
    reach = BEYOND * max(high - low, least)
    ends = [
        v.difference.mean + side * v.difference.half_width
        for v in found
        if v.difference and v.difference.half_width
        for side in (-1, 1)
    ]
    inside = [min(max(end, low - reach), high + reach) for end in ends]
    axes.set_xlim(scales.span([low, high, *inside], least))
