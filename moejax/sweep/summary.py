"""The files of a finished sweep: results.csv, summary.json, sweep.png, and its table as text."""

import json
from pathlib import Path
from typing import Any

from moejax.record.files import write_whole
from moejax.sweep import figure, table
from moejax.sweep.comparison import Compared, Summary, compare, to_json
from moejax.sweep.definition import Sweep
from moejax.sweep.results import read_diverged, read_sweep, write_csv


def write(sweep: Sweep, folder: Path) -> str:
    """Write the files and return the table; without a finished trial there is no table or picture.
    Raises:
      UserError: a file of a trial, or the pilot's, cannot be read.
    """
    results = read_sweep(folder, sweep)
    summary = compare(sweep, results, read_diverged(folder, sweep))
    write_csv(folder, sweep, results, columns(summary))
    tree = json.dumps(to_json(summary), indent=1, allow_nan=False)
    write_whole(folder / "summary.json", tree + "\n")
    if not results:
        return ""
    figure.write_figure(folder, f"{sweep.source} in {folder}", results, summary)
    return table.render(results, summary)


def columns(summary: Summary) -> dict[tuple[str, int], dict[str, Any]]:
    """The comparison's columns of results.csv, by variant and seed."""
    rows = {}
    for variant in summary.variants:
        shared = _shared(variant)
        points = {point.seed: point for point in variant.trials}
        for seed in (*variant.seeds, *variant.unfinished, *variant.diverged):
            point = points.get(seed)
            rows[variant.variant, seed] = {
                "diverged": int(seed in variant.diverged),
                "difference": point and point.difference,
                "cost_ratio": point and point.cost_ratio,
                "missed_match": point and int(point.missed_match),
                **shared,
            }
    return rows


def _shared(variant: Compared) -> dict[str, Any]:
    difference = variant.difference
    return {
        "variant_mean": variant.mean,
        "variant_half_width": variant.half_width,
        "variant_difference": difference and difference.mean,
        "variant_difference_half_width": difference and difference.half_width,
        "variant_p": difference and difference.p,
        "variant_p_holm": variant.p_holm,
        "variant_cost_ratio": variant.cost_ratio,
        "variant_marks": " ".join(variant.marks),
        "verdict": variant.verdict,
    }
