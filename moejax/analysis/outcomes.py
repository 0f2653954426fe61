"""How each variant of a sweep came out, in words."""

from typing import Any

Outcome = dict[str, Any]
"""One of the ``variants`` of summary.json (docs/sweeps.md)."""


def interval(value: dict[str, Any]) -> str:
    """``mean ± half width`` of the 95 % interval, of a dict with both."""
    half = value.get("half_width")
    return f"{value['mean']:.4f}" + (f" ± {half:.4f}" if half is not None else " (one seed)")
