"""Results as a plain text table: one line per variant, mean and spread over its seeds."""

import statistics
from collections.abc import Callable, Sequence

from moejax.sweep.definition import Sweep
from moejax.sweep.results import Result

NOTES = """\
Mean over seeds, with their standard deviation where it is not 0. loss: held out, at the last
evaluation. active FLOP/token: measured, in training forward and backward (mean over the run), in
evaluation forward (the last one). step: median. imbalance: max load / mean load - 1, in training
(mean over the run) and in the last evaluation. drops: pairs dropped in training (mean over the
run). results.csv has every trial's numbers."""
LEAK_NOTE = "leaks: what a token's output may depend on besides itself and its past."

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def unit(values: Sequence[float]) -> tuple[float, str]:
    """A scale and its prefix (1e6, "M") that make the largest value at least 1."""
    largest = max(values, default=0.0)
    return next(((scale, name) for scale, name in _UNITS if largest >= scale), (1.0, ""))


def render(sweep: Sweep, results: Sequence[Result]) -> str:
    """The table and its notes. A variant without a finished trial has a line that says so."""
    scale, prefix = unit([r.train_flops_per_token for r in results])
    columns: list[tuple[str, str, Callable[[Result], float | None], str]] = [
        ("loss", "nats/byte", lambda r: r.loss, ".4f"),
        (f"active {prefix}FLOP", "/token train", lambda r: r.train_flops_per_token / scale, ".3f"),
        ("", "eval", lambda r: r.eval_flops_per_token / scale, ".3f"),
        ("step", "ms", lambda r: 1000 * r.seconds_per_step, ".0f"),
        ("imbalance", "train", lambda r: r.train_max_vio, ".2f"),
        ("", "eval", lambda r: r.eval_max_vio, ".2f"),
        ("drops", "%", lambda r: _percent(r.train_drop_rate), ".1f"),
    ]
    above, below = zip(*((top, bottom) for top, bottom, _, _ in columns), strict=True)
    lines = [["", "", *above, ""], ["variant", "seeds", *below, "leaks"]]
    for variant in sweep.variants:
        own = [result for result in results if result.variant == variant]
        wanted = sum(trial.variant == variant for trial in sweep.trials)
        seeds = str(wanted) if len(own) == wanted else f"{len(own)}/{wanted}"
        cells = [spread([value(r) for r in own], digits) for _, _, value, digits in columns]
        lines.append([variant, seeds, *cells, own[0].leak if own else ""])
    if not any(result.leak for result in results):
        return f"{align([line[:-1] for line in lines])}\n\n{NOTES}"
    return f"{align(lines)}\n\n{NOTES}\n{LEAK_NOTE}"


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def spread(values: Sequence[float | None], digits: str) -> str:
    """``mean ±deviation`` (sample standard deviation); - where there is nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = f"{statistics.fmean(known):{digits}}"
    deviation = f"{statistics.stdev(known) if len(known) > 1 else 0.0:{digits}}"
    return f"{text} ±{deviation}" if float(deviation) else text


def align(lines: Sequence[Sequence[str]]) -> str:
    """Columns side by side: those of words (the second line names them) left, numbers right."""
    sides = ["<" if name in ("variant", "leaks") else ">" for name in lines[1]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{c:{s}{w}}" for c, s, w in zip(line, sides, widths, strict=True)).rstrip()
        for line in lines
    )
