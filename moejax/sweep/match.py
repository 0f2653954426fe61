"""Matched costs: the cost that an experiment equalises, and the widths that equalise it.

A page may define::

    MATCH = "active_flops"      # or "total_params", "step_time"
    BASELINE = "top_2"          # the variant that the others are compared with
    PILOT = "runs/pilot"        # an earlier sweep, or the deviation over seeds of its losses

or give the same, by lower-case name, as the dict of a function ``comparison(arg=None)``.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax.config.sources import Page
from moejax.errors import UserError, suggest
from moejax.sweep.count import count

TOLERANCE = 0.02
"""The relative difference from the baseline's cost beyond which a variant misses the match."""

MATCHES = {
    "active_flops": "FLOP per token, forward and backward",
    "total_params": "parameters",
    "step_time": "seconds per step, median",
}
"""The costs that can be matched, with their units."""

WIDTHS = ("moe.d_ff", "model.d_ff")
"""Fields that may be solved for: FLOPs and parameters are linear in them."""

SOLVE = "match"
MULTIPLE = 8
_PROBES = (64, 128)

Fields = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The page's settings of the comparison; None where it has none."""

    match: str | None = None
    baseline: str | None = None
    pilot: str | float | None = None


@dataclasses.dataclass(frozen=True)
class Solved:
    """A width that was solved for, and the ratio of its variant's cost to the baseline's."""

    variant: str
    field: str
    width: int
    ratio: float


def comparison_of(page: Page, variants: Sequence[str]) -> Comparison:
    """The settings of a page's comparison.

    Raises:
      UserError: an invalid value.
    """
    where = f"experiment {page.path!r}"
    names = [field.name for field in dataclasses.fields(Comparison)]
    settings = {name: getattr(page.module, name.upper(), None) for name in names}
    function = getattr(page.module, "comparison", None)
    if function is not None:
        returned = page.call(function) if callable(function) else function
        if not isinstance(returned, dict) or not set(returned) <= set(names):
            raise UserError(
                f"{where}: comparison() gives {returned!r}; return a dict with some of "
                f"{', '.join(names)}"
            )
        settings |= returned
    comparison = Comparison(**settings)
    _check_names(where, comparison, variants)
    _check_pilot(where, comparison.pilot)
    return comparison


def _check_names(where: str, comparison: Comparison, variants: Sequence[str]) -> None:
    match, baseline = comparison.match, comparison.baseline
    if match is not None and match not in list(MATCHES):
        raise UserError(f"{where}: MATCH={match!r} is unknown; use one of {', '.join(MATCHES)}")
    if baseline is not None and baseline not in variants:
        raise UserError(
            f"{where}: BASELINE={baseline!r} is not a variant; {suggest(str(baseline), variants)}"
        )
    if match is not None and baseline is None:
        raise UserError(f"{where}: MATCH={match!r} needs BASELINE, the variant to be matched")


def _check_pilot(where: str, pilot: Any) -> None:
    if pilot is None:
        return
    if isinstance(pilot, str):
        if not (Path(os.path.expanduser(pilot)) / "results.csv").is_file():
            raise UserError(f"{where}: PILOT={pilot!r} has no results.csv; name a sweep's folder")
        return
    number = isinstance(pilot, int | float) and not isinstance(pilot, bool)
    if not (number and math.isfinite(pilot) and pilot > 0):
        raise UserError(
            f"{where}: PILOT={pilot!r} must be a sweep's folder, or a standard deviation above 0"
        )


def solve(
    where: str,
    comparison: Comparison,
    variants: Mapping[str, Fields],
    config_of: Callable[[str, Fields], dict[str, Any]],
) -> dict[str, Solved]:
    """The widths of the variants that have "match" in place of a width.

    A variant's cost is a + b width. Two counts give a and b, and the width for the baseline's cost
    is rounded to a multiple of 8.

    Args:
      where: the prefix of error messages.
      variants: the fields of each variant, by its name.
      config_of: the resolved config of a variant with these fields.

    Raises:
      UserError: there is nothing to match, or no width matches.
    """
    asked = {
        name: [field for field in WIDTHS if fields.get(field) == SOLVE]
        for name, fields in variants.items()
    }
    asked = {name: fields for name, fields in asked.items() if fields}
    if not asked:
        return {}
    baseline = comparison.baseline
    for name, fields in asked.items():
        _check_solvable(f"{where}, variant {name}", name, fields, comparison)
    assert baseline is not None
    configs = [config_of(baseline, variants[baseline])]
    for name, (field,) in asked.items():
        configs += [config_of(name, {**variants[name], field: width}) for width in _PROBES]
    wanted, *probed = (float(getattr(cost, str(comparison.match))) for cost in count(configs))
    pairs = zip(probed[::2], probed[1::2], strict=True)
    return {
        name: _solved(f"{where}, variant {name}", name, field, wanted, pair)
        for (name, (field,)), pair in zip(asked.items(), pairs, strict=True)
    }


def _check_solvable(where: str, name: str, fields: Sequence[str], comparison: Comparison) -> None:
    given = f"{where}: {fields[0]}={SOLVE!r}"
    if len(fields) > 1:
        raise UserError(f"{where}: {' and '.join(fields)} are both {SOLVE!r}; give one a number")
    if comparison.match is None:
        raise UserError(f"{given} needs MATCH and BASELINE in the experiment")
    if comparison.match == "step_time":
        raise UserError(
            f"{given} cannot be solved before the run for MATCH='step_time'; give a number"
        )
    if name == comparison.baseline:
        raise UserError(f"{given}, but it is the baseline; give a number")


def _solved(
    where: str, name: str, field: str, wanted: float, probed: tuple[float, float]
) -> Solved:
    slope = (probed[1] - probed[0]) / (_PROBES[1] - _PROBES[0])
    offset = probed[0] - slope * _PROBES[0]
    if slope <= 0:
        raise UserError(f"{where}: {field}={SOLVE!r}, but its cost does not depend on {field}")
    width = MULTIPLE * round((wanted - offset) / slope / MULTIPLE)
    if width < MULTIPLE:
        raise UserError(
            f"{where}: {field}={SOLVE!r} has no solution: with a width of {MULTIPLE} it costs "
            f"{offset + slope * MULTIPLE:.4g}, the baseline {wanted:.4g}"
        )
    return Solved(name, field, width, (offset + slope * width) / wanted)
