"""The comparison as a plain text table: one line per variant, with notes below."""

import statistics
import textwrap
from collections.abc import Callable, Sequence

from moejax.sweep.comparison import DIVERGED, LEAK, MISSED, UNFINISHED, Compared, Summary
from moejax.sweep.match import TOLERANCE
from moejax.sweep.results import Result
from moejax.sweep.seed_variance import Detectable
from moejax.sweep.statistics import ALONE, decimals

PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
NOTES = """\
Means over seeds. loss: held-out, at the last evaluation, with its 95 % interval over seeds. FLOP:
measured active FLOPs per token, forward and backward in training (mean over the run), forward in
evaluation (the last one). step: median. imbalance: max load / mean load - 1, in training (mean over
the run) and in the last evaluation. drops: pairs dropped in training (mean over the run).
results.csv has the numbers of every trial."""

_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
NOTE_WIDTH = 100
SURE = 10
"""Degrees of freedom from which a detectable difference is given without its interval."""
_LEFT = ("variant", "verdict", "marks")

Column = tuple[str, str, list[str]]
"""Two header lines and a cell for each variant."""


def unit(values: Sequence[float]) -> tuple[float, str]:
    """The scale and prefix, such as (1e6, "M"), in which the largest value is at least 1."""
    largest = max(values, default=0.0)
    return next(((scale, name) for scale, name in _UNITS if largest >= scale), (1.0, ""))


def render(results: Sequence[Result], summary: Summary) -> str:
    """The table and its notes. A variant without a finished trial has a line too."""
    variants = summary.variants
    columns: list[Column] = [
        ("", "variant", [v.variant for v in variants]),
        ("", "seeds", [_seeds(v) for v in variants]),
        ("loss", summary.unit, [interval(v.mean, v.half_width) for v in variants]),
    ]
    if summary.baseline:
        differences = [v.difference for v in variants]
        cells = [interval(d.mean, d.half_width, "+") if d else "-" for d in differences]
        columns += [
            ("difference", f"to {summary.baseline}", cells),
            ("cost", "ratio", [number(v.cost_ratio, ".3f") for v in variants]),
        ]
    columns += _measured(results, summary)
    if summary.baseline:
        columns.append(("", "verdict", [v.outcome for v in variants]))
    if any(v.marks for v in variants):
        columns.append(("", "marks", [" ".join(v.marks) for v in variants]))
    notes = [textwrap.fill(note, NOTE_WIDTH) for note in [*_notes(summary), *_missing(results)]]
    return "\n".join([align(columns), *_by_source(summary), "", NOTES, *notes])


def _by_source(summary: Summary) -> list[str]:
    """The held-out loss of each variant on each source of a mixture; nothing without one."""
    names = dict.fromkeys(name for v in summary.variants for name in v.by_source)
    if not names:
        return []
    columns: list[Column] = [("", "variant", [v.variant for v in summary.variants])]
    for name in names:
        own = [v.by_source.get(name) for v in summary.variants]
        cells = [interval(each.mean, each.half_width) if each else "-" for each in own]
        columns.append(("loss on", name, cells))
    return ["", align(columns)]


def _seeds(variant: Compared) -> str:
    wanted, finished = variant.wanted, len(variant.seeds)
    return str(wanted) if finished == wanted else f"{finished}/{wanted}"


def _measured(results: Sequence[Result], summary: Summary) -> list[Column]:
    scale, prefix = unit([r.train_flops_per_token for r in results])
    measured: list[tuple[str, str, Callable[[Result], float | None], str]] = [
        (f"{prefix}FLOP", "train", lambda r: r.train_flops_per_token / scale, ".3f"),
        ("", "eval", lambda r: r.eval_flops_per_token / scale, ".3f"),
        ("step", "ms", lambda r: 1000 * r.seconds_per_step, ".0f"),
        ("imbalance", "train", lambda r: r.train_max_vio, ".2f"),
        ("", "eval", lambda r: r.eval_max_vio, ".2f"),
        ("drops", "%", lambda r: _percent(r.train_drop_rate), ".1f"),
    ]
    own = [[r for r in results if r.variant == v.variant] for v in summary.variants]
    return [
        (above, below, [number(_mean([value(r) for r in finished]), digits) for finished in own])
        for above, below, value, digits in measured
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def number(value: float | None, digits: str) -> str:
    """A formatted number, or - for None."""
    return "-" if value is None else f"{value:{digits}}"


def interval(mean: float | None, half_width: float | None, sign: str = "") -> str:
    """``mean`` and the half-width of its interval, with as many decimals as the latter needs."""
    if mean is None:
        return "-"
    if half_width is None:
        return f"{mean:{sign}.4f}"
    digits = max(4, decimals(half_width))
    return f"{mean:{sign}.{digits}f} {PLUS_MINUS}{half_width:.{digits}f}"


def align(columns: Sequence[Column]) -> str:
    """Align columns: words to the left, numbers to the right."""
    cells = [[above, below, *rest] for above, below, rest in columns]
    sides = ["<" if column[1] in _LEFT else ">" for column in cells]
    widths = [max(map(len, column)) for column in cells]
    return "\n".join(
        "  ".join(f"{c:{s}{w}}" for c, s, w in zip(line, sides, widths, strict=True)).rstrip()
        for line in zip(*cells, strict=True)
    )


def _notes(summary: Summary) -> list[str]:
    """Notes on the columns, the marks and the detectable difference."""
    notes = []
    if summary.baseline:
        notes.append(
            f"difference: to {summary.baseline} at equal seeds, with its 95 % interval; less is "
            "better. verdict: paired t-test at level 5 % with Holm's correction over the variants, "
            f'or without it ("{ALONE.strip()}"). cost: {summary.cost} relative to '
            f"{summary.baseline}'s."
        )
    notes += mark_notes(summary)
    if summary.detectable:
        notes.append(detectable_note(summary.detectable, summary.unit))
    return notes


def _missing(results: Sequence[Result]) -> list[str]:
    """Notes on trials with missing rows."""
    return [
        f"{result.variant}, seed {result.seed}: metrics.jsonl has no rows for "
        f"{result.missing_steps} of {result.step} steps; means over training leave them out"
        for result in results
        if result.missing_steps
    ]


def mark_notes(summary: Summary) -> list[str]:
    """A line for each mark: the variants that have it, and its meaning."""
    marked = {
        mark: [v for v in summary.variants if mark in v.marks]
        for mark in (LEAK, MISSED, DIVERGED, UNFINISHED)
    }
    entries: dict[str, Callable[[Compared], str]] = {
        LEAK: lambda v: f"{v.variant} ({v.leak})",
        MISSED: lambda v: f"{v.variant} ({number(v.cost_ratio, '.3f')})",
        DIVERGED: lambda v: f"{v.variant} (seed {', '.join(map(str, v.diverged))})",
        UNFINISHED: lambda v: f"{v.variant} (seed {', '.join(map(str, v.unfinished))})",
    }
    meaning = {
        LEAK: "what a token's output may depend on besides itself and its past",
        MISSED: f"a trial's {summary.match} differs from {summary.baseline}'s by more than "
        f"{100 * TOLERANCE:g} %",
        DIVERGED: "left out of all means, which makes the variant's other seeds a biased sample",
        UNFINISHED: "left out of all means",
    }
    return [
        f"{mark}: {', '.join(entries[mark](v) for v in variants)}: {meaning[mark]}."
        for mark, variants in marked.items()
        if variants
    ]


def detectable_note(detectable: Detectable, unit: str) -> str:
    """The smallest detectable difference in words, with its uncertainty if that is large."""
    digits = decimals(detectable.difference)
    text = (
        f"{detectable.seeds} seeds detect a difference of {detectable.difference:.{digits}f} "
        f"{unit} in 80 % of sweeps"
    )
    if detectable.comparisons > 1:
        text += (
            f" ({detectable.difference_holm:.{digits}f} with Holm's correction for "
            f"{detectable.comparisons} variants)"
        )
    text += f"; from {detectable.source}"
    if detectable.factors is None or detectable.freedom >= SURE:
        return f"{text}."
    low, high = detectable.factors
    ends = " to ".join(
        f"{detectable.difference * factor:.{digits}f}" for factor in detectable.factors
    )
    return (
        f"{text}, {detectable.freedom} degree{'s' * (detectable.freedom > 1)} of freedom: "
        f"the true value may be {low:.2g} to {high:.2g} times that, {ends} {unit} (95 % interval)."
    )
