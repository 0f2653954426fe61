"""How each variant of a sweep came out, in words, and the marks it must not be read without."""

from collections.abc import Sequence
from typing import Any

Outcome = dict[str, Any]
"""One of the ``variants`` of summary.json (docs/sweeps.md)."""

LEAKS, MISSED = "\N{DAGGER}", "\N{DOUBLE DAGGER}"
MARKS = (
    f"{LEAKS}: a token's output may depend on more than itself and its past, so that the loss is "
    f"not that of a causal model. {MISSED}: the cost misses what the sweep matches."
)


def interval(value: dict[str, Any]) -> str:
    """``mean ± half width`` of the 95 % interval, of a dict with both."""
    half = value.get("half_width")
    return f"{value['mean']:.4f}" + (f" ± {half:.4f}" if half is not None else " (one seed)")


def of_seeds(variants: Sequence[Outcome]) -> str:
    """How many finished seeds a mean is over: "3 seeds", "2 to 3 seeds", "one seed"."""
    counts = sorted({len(variant["seeds"]) for variant in variants})
    if counts == [1]:
        return "one seed"
    return f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seeds"


def marks(variant: Outcome) -> str:
    return LEAKS * bool(variant["leak"]) + MISSED * bool(variant["missed_match"])


def marked(variant: Outcome, name: str = "") -> str:
    """Its name, or that of a trial of it, with its marks."""
    return f"{name or variant['variant']} {marks(variant)}".strip()


def by_name(summary: dict[str, Any]) -> dict[str, Outcome]:
    return {variant["variant"]: variant for variant in summary["variants"]}


def legend(summary: dict[str, Any]) -> str:
    """What the marks mean, as the end of a caption; nothing where no variant has any."""
    return f" {MARKS}" if any(marks(variant) for variant in summary["variants"]) else ""
