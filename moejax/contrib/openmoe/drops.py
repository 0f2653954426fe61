"""Finding 3, drop towards the end: when slots go first come, first served, late tokens lose.

A choice is dropped when its expert is full. A token counts as dropped when any of its choices is,
or when all are; both are given, beside the share of choices.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float

from moejax.analysis.statistics.values import ratio
from moejax.contrib.openmoe.interval import Interval, over_rows
from moejax.record.routing import Routed


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to assign slots in evaluation. ``capacity_factor`` 0: every pair has room.

    ``priority``: "position" is first come, first served; "gate" is batch-prioritised routing
    (Riquelme et al., arXiv 2106.05974), which lets a token's place depend on later tokens.
    ``k``: experts per token where it is not the run's own; 0: the run's.
    """

    capacity_factor: float
    priority: str = "position"
    k: int = 0

    @property
    def name(self) -> str:
        if not self.capacity_factor:
            return "dropless"
        order = {"position": "first come", "gate": "batch-prioritised"}[self.priority]
        return f"{order}, {self.capacity_factor:g} x mean load" + (f", k={self.k}" * bool(self.k))


@dataclasses.dataclass(frozen=True)
class Drops:
    """Drops of one arm on one text, over all MoE layers. Rates are shares in [0, 1]."""

    text: str
    arm: Arm
    k: int
    """Choices a token has: columns of the routing."""
    rows: int
    choices: list[float]
    """Share of choices dropped, by position."""
    any: list[float]
    """Share of tokens with a dropped choice, by position."""
    all: list[float]
    """Share of tokens with all choices dropped, by position."""
    by_layer: list[float]
    """Share of choices dropped, by MoE layer."""
    rate: Interval
    """Share of choices dropped."""
    rise: Interval
    """Least-squares line through the share of choices dropped: its rise from first to last
    position."""
    early: Interval
    """Share of choices dropped in the first quarter of positions."""
    late: Interval
    """Share of choices dropped in the last quarter of positions."""


def drops(text: str, arm: Arm, routed: Routed) -> Drops:
    """Count the drops of a routing.

    Raises:
      ValueError: fewer rows than intervals need.
    """
    active, dropped = routed.active_MNLK, routed.active_MNLK & ~routed.kept_MNLK
    wanted_NL, lost_NL = active.sum(axis=(0, 3)), dropped.sum(axis=(0, 3))
    served = active.any(axis=-1)  # tokens that have any choice
    quarter = max(routed.token_NL.shape[1] // 4, 1)

    def of(part: slice) -> Interval:
        def rate(row_n: np.ndarray) -> float:
            lost, wanted = lost_NL[row_n, part].sum(), wanted_NL[row_n, part].sum()
            return float(ratio(lost, wanted))

        return over_rows(routed.rows, rate)

    def rate_L(dropped_MNL: Any) -> list[float]:
        return ratio(dropped_MNL.sum(axis=(0, 1)), served.sum(axis=(0, 1))).tolist()

    return Drops(
        text=text,
        arm=arm,
        k=active.shape[-1],
        rows=routed.rows,
        choices=ratio(lost_NL.sum(axis=0), wanted_NL.sum(axis=0)).tolist(),
        any=rate_L(dropped.any(axis=-1)),
        all=rate_L(served & ~(active & ~dropped).any(axis=-1)),
        by_layer=ratio(dropped.sum(axis=(1, 2, 3)), active.sum(axis=(1, 2, 3))).tolist(),
        rate=of(slice(None)),
        rise=over_rows(
            routed.rows,
            lambda row_n: rise(lost_NL[row_n].sum(axis=0), wanted_NL[row_n].sum(axis=0)),
        ),
        early=of(slice(quarter)),
        late=of(slice(-quarter, None)),
    )


def rise(lost_L: Float[np.ndarray, " L"], wanted_L: Float[np.ndarray, " L"]) -> float:
    """The rise of a least-squares line through lost / wanted, from first to last position.

    Positions are weighted by their choices; those without any are left out.
    """
    length = len(wanted_L)
    place_L = np.linspace(0.0, 1.0, length) if length > 1 else np.zeros(length)
    weight_L = wanted_L / max(wanted_L.sum(), 1)
    rate_L = np.where(wanted_L > 0, lost_L / np.maximum(wanted_L, 1), 0.0)
    centred_L = place_L - np.sum(weight_L * place_L)
    across = np.sum(weight_L * centred_L**2)
    return float(ratio(np.sum(weight_L * centred_L * rate_L), np.asarray(across)))
