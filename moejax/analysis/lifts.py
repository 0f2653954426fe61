"""Heatmaps of a lift: a share over what it would be by chance."""

from typing import Any

import numpy as np

from moejax.analysis.figures import Spec, listed

OCTAVES = 3
"""The scale ends at lifts of 1/8 and 8, always: beyond, more colour says nothing more."""
WRITTEN = 16
"""Shares are written into the cells of maps of at most so many columns."""
DIGITS = 5
"""Of maps of many experts and layers, seventeen digits a number would be most of the report."""


def lift_cells(lift: np.ndarray, share: np.ndarray, **style: Any) -> Spec:
    """A heatmap of ``lift`` [rows, columns], coloured by its logarithm to base 2: 1 is neutral.

    ``share``, of the same shape, is written into the cells; hover texts find the lift as
    ``customdata[0]`` and the share as ``customdata[1]``. Lift 0 and unknown lift are gaps.
    """
    above_0 = np.nan_to_num(lift) > 0
    octaves = np.log2(lift, out=np.full(lift.shape, np.nan), where=above_0)
    edge = OCTAVES
    ticks = range(-edge, edge + 1)
    cells = {
        "type": "heatmap",
        "z": listed(octaves.round(DIGITS)),
        "customdata": listed(np.stack([lift, share], axis=-1).round(DIGITS)),
        "zmin": -edge,
        "zmax": edge,
        "zmid": 0,
        "colorbar": {
            "title": {"text": "lift, ratio", "side": "top"},
            "tickvals": list(ticks),
            "ticktext": [f"{2.0**tick:g}" for tick in ticks],
        },
        "hoverongaps": False,
    }
    if share.shape[1] <= WRITTEN:
        cells |= {"text": [[_percent(x) for x in row] for row in share], "texttemplate": "%{text}"}
    return cells | style


def cell_axes(rows: int, columns: int) -> dict[str, dict[str, Any]]:
    """Axes of numbered or named cells, the first row on top; not every number where many are."""
    return {
        "xaxis": {"dtick": max(1, columns // 16), "showgrid": False, "zeroline": False},
        "yaxis": {
            "dtick": max(1, rows // 16),
            "showgrid": False,
            "zeroline": False,
            "autorange": "reversed",
        },
    }


def _percent(share: float) -> str:
    if not share > 0:
        return ""
    return f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}"
