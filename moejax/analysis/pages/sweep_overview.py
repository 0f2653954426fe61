"""The outcome of a sweep in a picture and a table, with warnings and its trials."""

from collections import Counter
from typing import Any

from moejax.analysis import health
from moejax.analysis.page import Block, Choice, Page, Table, Text, Warning
from moejax.analysis.pages.comparison import losses
from moejax.analysis.pages.overview import QUARTER, at_end
from moejax.analysis.pages.sweep_load import drop_rate, spread
from moejax.analysis.run import RunData
from moejax.analysis.sweep import SweepData
from moejax.analysis.variants import Outcome, by_name, interval, legend, marked, marks
from moejax.sweep import picture
from moejax.sweep.results import PER_BYTE, step_seconds
from moejax.sweep.table import SURE
from moejax.train.cost import units


def page(sweep: SweepData) -> Page:
    finished = [trial for trial in sweep.trials if trial.finished]
    blocks: list[Block] = [Warning(sweep.stale)] if sweep.stale else []
    blocks += _outcome(sweep)
    blocks.append(Text(_verdict(sweep)))
    if len(finished) < len(sweep.trials):
        missing = len(sweep.trials) - len(finished)
        blocks.append(
            Warning(
                f"{missing} of {len(sweep.trials)} trials are not finished. If a variant lacks "
                "seeds, its mean and interval are over the finished ones."
            )
        )
    if _problems(sweep):
        blocks.append(Warning("Not everything could be read. " + " ".join(_problems(sweep))))
    blocks += _findings(sweep)
    blocks += _unfinished(sweep)
    blocks += [Table(("what ran", ""), _settings(sweep)), _variants(sweep)]
    return Page("Overview", blocks)


def _outcome(sweep: SweepData) -> list[Block]:
    """Every variant's loss as a picture, and beside drops and balance as a table."""
    measured = [v for v in sweep.summary["variants"] if v["mean"] is not None]
    if not measured:
        return []
    unit = sweep.summary.get("unit", PER_BYTE)
    header = (
        "variant", "n", f"loss, {unit}", "dropped, training", "dropped, evaluation",
        "busiest expert, training", "verdict",
    )  # fmt: skip
    rows = []
    for v in measured:
        runs = sweep.runs(v["variant"])
        drops = [spread([100 * drop_rate(run, split) for run in runs], ".2f", " %")
                 for split in ("train", "eval")]  # fmt: skip
        busiest = spread([1 + at_end(run, "moe/max_vio") for run in runs], ".2f", " x")
        cells = (interval(v), *drops, busiest, v.get("verdict") or "-")
        rows.append((marked(v), str(len(v["seeds"])), *cells))
    caption = (
        "Means over n finished seeds with the half width of their 95 % interval. Training: "
        f"{QUARTER}; evaluation: the last one. Busiest expert: load over the mean load."
    )
    return [
        losses(picture.drawn_variants(sweep.summary), unit, "overview-losses"),
        Table(header, rows, caption + legend(sweep.summary)),
        *_by_source(measured, unit),
        Table(("made by", ""), _made(sweep)),
    ]


def _by_source(measured: list[Outcome], unit: str) -> list[Block]:
    """The held-out loss of each variant on each source of a mixture; nothing without one."""
    names = list(dict.fromkeys(name for v in measured for name in v.get("by_source", {})))
    if not names:
        return []
    rows = []
    for v in measured:
        own = [v.get("by_source", {}).get(name) for name in names]
        rows.append((marked(v), *(interval(each) if each else "-" for each in own)))
    header = ("variant", *(f"loss on {name}, {unit}" for name in names))
    caption = (
        "Held-out loss on each source of the mixture at the last evaluation, means over the same "
        "seeds with the half width of their 95 % interval."
    )
    return [Table(header, rows, caption)]


def _made(sweep: SweepData) -> list[tuple[str, str]]:
    """Commit and command; seeds and overrides of the trials are in the tables below."""
    runs = sweep_runs(sweep)
    commits = sorted({str(run.saved.get("commit") or "unknown") for run in runs})
    first = next((run.saved["command"] for run in runs if run.saved.get("command")), "unknown")
    return [
        ("seeds", ", ".join(map(str, sorted({trial.seed for trial in sweep.trials})))),
        ("commit", ", ".join(commits)),
        ("command", f"moejax sweep --experiment={sweep.experiment} --workdir={sweep.folder}"),
        ("that of the first trial", first),
    ]


def sweep_runs(sweep: SweepData) -> list[RunData]:
    """The finished runs of all variants."""
    return [run for variant in sweep.variants for run in sweep.runs(variant)]


def _verdict(sweep: SweepData) -> str:
    """The comparison's outcome in sentences; each variant's verdict is on the comparison page."""
    done = sum(trial.finished for trial in sweep.trials)
    text = f"{done} of {len(sweep.trials)} trials of {len(sweep.variants)} variants are finished."
    summary = sweep.summary
    measured = [v for v in summary["variants"] if v["mean"] is not None]
    if not measured:
        return text
    unit = summary.get("unit", PER_BYTE)
    best = min(measured, key=lambda v: v["mean"])
    text += f" The lowest held-out loss has {marked(best)}, {interval(best)} {unit}{_but(best)}."
    fair = [v for v in measured if not marks(v)]
    if marks(best) and fair:
        conditions = ["do not miss the match"] * any(v["missed_match"] for v in measured)
        conditions += ["do not leak"] * any(v["leak"] for v in measured)
        first = min(fair, key=lambda v: v["mean"])
        text += f" Of those that {' and '.join(conditions)}: {marked(first)}, "
        text += f"{interval(first)}{_but(first)}."
    baseline = by_name(summary).get(summary["baseline"])
    verdicts: dict[str, list[str]] = {}
    for v in measured:
        if v is not baseline and v["verdict"]:
            verdicts.setdefault(v["verdict"], []).append(marked(v))
    if baseline and verdicts:
        listing = "; ".join(f"{', '.join(names)}: {verdict}" for verdict, names in verdicts.items())
        text += f" Against the baseline {marked(baseline)}: {listing}."
    return text + legend(summary)


def _but(variant: Outcome) -> str:
    """The caveats of its loss, in brackets."""
    buts = ["it leaks: see below"] if variant["leak"] else []
    if variant["missed_match"]:
        buts.append(f"at {variant['cost_ratio']:.2f} times the baseline's cost")
    if variant["diverged"]:
        buts.append(f"{len(variant['diverged'])} of {variant['wanted']} seeds diverged")
    return f" ({'; '.join(buts)})" if buts else ""


def _problems(sweep: SweepData) -> list[str]:
    """The problems of the sweep and of its trials, each once with the number of trials."""
    counts = Counter(problem for t in sweep.trials if t.run for problem in t.run.problems)
    return [*sweep.problems, *(f"{count} trials: {text}" for text, count in counts.items())]


def _findings(sweep: SweepData) -> list[Block]:
    """Warnings of finished trials: one row for one of all trials, otherwise one per variant."""
    by_kind: dict[str, dict[str, dict[int, str]]] = {}
    finished = [trial for trial in sweep.trials if trial.finished]
    for trial in finished:
        for kind, text in health.findings(trial.run) if trial.run else []:
            by_kind.setdefault(kind, {}).setdefault(trial.variant, {}).setdefault(trial.seed, text)
    rows = []
    for kind, by_variant in by_kind.items():
        first = next(iter(next(iter(by_variant.values())).values()))
        if sum(map(len, by_variant.values())) == len(finished) > 1:
            rows.append((kind, "all", "all", first))
            continue
        for variant, by_seed in by_variant.items():
            seeds = ", ".join(map(str, by_seed))
            rows.append((kind, variant, seeds, next(iter(by_seed.values()))))
    if not rows:
        return []
    caption = "Warnings of finished trials; the sentence is that of the first trial of the row."
    return [Table(("warning", "variant", "seeds", "sentence"), rows, caption)]


def _unfinished(sweep: SweepData) -> list[Block]:
    missing = [trial for trial in sweep.trials if not trial.finished]
    if not missing:
        return []
    states: dict[str, list[str]] = {}
    for trial in missing:
        states.setdefault(trial.state, []).append(trial.name)
    rows = [(state, ", ".join(names)) for state, names in states.items()]
    blocks: list[Block] = [Table(("state", "trials"), rows, "Trials that are not finished.")]
    logs: dict[str, list[Block]] = {t.name: [Text(t.log)] for t in missing if t.log}
    if logs:
        blocks.append(Choice("end of the log of", dict(logs)))
    return blocks


def _settings(sweep: SweepData) -> list[tuple[str, str]]:
    rows = [("experiment", sweep.experiment), ("folder", str(sweep.folder))]
    runs = sweep_runs(sweep)
    if runs:
        first = runs[0]
        of, batch = first.units, first.field("train.batch_size", 0)
        length = f" x {of.items_per_row}" if of.items_per_row > 1 else ""
        steps = sorted({run.field("train.steps", 0) for run in runs})
        rows += [
            ("data", str(first.saved.get("corpus", "?"))),
            ("training", f"{' or '.join(map(str, steps))} steps of {batch}{length} {of.item}s"),
        ]
        devices = first.saved.get("devices")
        if devices:
            rows.append(("devices", f"{devices['count']} {devices['kind']}"))
        seconds = sum(step_seconds(run.timings)[1] for run in runs if run.timings)
        if seconds == seconds:
            rows.append(("time", f"{units.duration(seconds)} of training steps, all trials"))
    summary = sweep.summary
    if summary.get("match"):
        tolerance = f"within {summary['tolerance']:.0%}"
        rows.append(("matched", f"{summary['match']}, {tolerance} of the baseline"))
    detectable = summary.get("detectable")
    if detectable:
        after = detectable.get("difference_holm")
        holm = f"; {after:.4f} after Holm's correction over all variants" if after else ""
        rows.append(
            (
                "can be detected",
                f"a difference of {detectable['difference']:.4f} {summary.get('unit', PER_BYTE)}, "
                f"with probability {detectable['power']:.0%} at level {detectable['level']} and "
                f"{detectable['seeds']} seeds ({detectable['source']})"
                + holm
                + _uncertainty(detectable),
            )
        )
    return rows


def _uncertainty(detectable: dict[str, Any]) -> str:
    """The uncertainty of a detectable difference with few degrees of freedom."""
    freedom, factors = detectable.get("freedom", 0), detectable.get("factors")
    if not factors or freedom >= SURE:
        return ""
    low, high = factors
    return (
        f"; {freedom} degree{'s' * (freedom > 1)} of freedom: the true value may be {low:.2g} to "
        f"{high:.2g} times that"
    )


def _variants(sweep: SweepData) -> Table:
    """Each variant with the overrides that make it."""
    rows = []
    for variant in sweep.variants:
        trial = next(each.trial for each in sweep.trials if each.variant == variant)
        names = [o.removeprefix("--config.") for o in trial.overrides if "train.seed=" not in o]
        rows.append((variant, " ".join(names)))
    return Table(("variant", "differs from the experiment's page in"), rows)
