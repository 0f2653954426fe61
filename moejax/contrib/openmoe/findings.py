"""The numbers of the three findings, and as JSON."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from moejax.contrib.openmoe.drops import Drops
from moejax.contrib.openmoe.early import Early
from moejax.contrib.openmoe.tokens import Specialisation
from moejax.contrib.openmoe.verdict import (
    Verdict,
    drops_verdict,
    early_verdict,
    specialisation_verdict,
)
from moejax.record.routing import Routed


class Measured(NamedTuple):
    """The numbers of one checkpoint. The first text is the run's own held-out one."""

    run: str
    step: int
    steps: int
    """The number of steps of the whole run, from its config."""
    num_experts: int
    leak: str
    """The tokens visible to a token besides its past, as in the metrics; empty if none."""
    specialisation: Specialisation
    early: Early
    drops: list[Drops]
    routed: Routed
    """The run's own text, dropless."""
    token_text: list[str]
    """The text of each token; empty if unknown."""


def verdicts(measured: Measured) -> list[Verdict]:
    """The verdict on each finding."""
    return [
        specialisation_verdict(measured.specialisation),
        early_verdict(measured.early),
        drops_verdict(measured.drops),
    ]


def numbers(measured: Measured, judged: Sequence[Verdict]) -> dict[str, Any]:
    """The measurements as JSON types, without the routing; undefined values are null."""
    about = {
        name: getattr(measured, name) for name in ("run", "step", "steps", "num_experts", "leak")
    }
    tree = {
        **about,
        "verdicts": [verdict._asdict() for verdict in judged],
        "specialisation": dataclasses.asdict(measured.specialisation),
        "early": dataclasses.asdict(measured.early),
        "drops": [dataclasses.asdict(drops) | {"arm": drops.arm.name} for drops in measured.drops],
    }
    return _plain(tree)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
