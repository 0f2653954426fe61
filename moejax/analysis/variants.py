"""The variants of a sweep in words: names with their marks, intervals, numbers of seeds."""

from collections.abc import Sequence
from typing import Any

from moejax.sweep.picture import LEAKS, MISSED, Drawn, marks

Outcome = dict[str, Any]
"""One of the ``variants`` of summary.json (docs/sweeps.md)."""

MARKS = (
    f"{LEAKS}: a token's output may depend on more than itself and its past, so the loss is not "
    f"that of a causal model. {MISSED}: the cost misses the one that the sweep matches."
)


def interval(value: dict[str, Any]) -> str:
    """``mean ± half width`` of a 95 % interval."""
    half = value.get("half_width")
    return f"{value['mean']:.4f}" + (f" ± {half:.4f}" if half is not None else " (one seed)")


def seed_counts(variants: Sequence[Drawn]) -> str:
    """The number of finished seeds behind the means: "3 seeds", "2 to 3 seeds", "one seed"."""
    counts = sorted({len(variant.seeds) for variant in variants})
    if counts == [1]:
        return "one seed"
    return f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seeds"


def marked(variant: Outcome, name: str = "") -> str:
    """The name of a variant, or of one of its trials, with the variant's marks."""
    return f"{name or variant['variant']} {marks(variant)}".strip()


def by_name(summary: dict[str, Any]) -> dict[str, Outcome]:
    return {variant["variant"]: variant for variant in summary["variants"]}


def legend(summary: dict[str, Any]) -> str:
    """The end of a caption that explains the marks; empty if no variant has any."""
    return f" {MARKS}" if any(marks(variant) for variant in summary["variants"]) else ""
