"""A sweep's files: its trials, finished or not, and its comparison.

`moejax sweep` writes summary.json when it ends. If trials have finished or diverged since, the
comparison is recomputed from the runs.
"""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moejax.analysis.run import RunData
from moejax.config.saved import holds_run
from moejax.errors import UserError
from moejax.record.files import parsed
from moejax.sweep.comparison import FORMAT, compare, to_json
from moejax.sweep.definition import Sweep, Trial
from moejax.sweep.folder import INDEX, log_of, read_index, workdir_of
from moejax.sweep.match import MATCHES, Comparison
from moejax.sweep.results import Result, read_diverged, read_trial

SUMMARY = "summary.json"

OF_SUMMARY = ("baseline", "match", "tolerance", "cost", "detectable", "variants")
OF_COST = ("name", "unit")
OF_DETECTABLE = ("difference", "seeds", "power", "level", "source")
OF_VARIANT = (
    "variant", "wanted", "seeds", "diverged", "mean", "half_width", "difference", "verdict",
    "cost", "cost_ratio", "missed_match", "leak", "trials",
)  # fmt: skip
OF_DIFFERENCE = ("mean", "half_width")
OF_TRIAL = ("seed", "loss", "cost")
"""The fields of summary.json that the pages read."""

TAIL = 15
"""The number of last lines of a log that are shown."""


@dataclasses.dataclass(frozen=True)
class TrialData:
    """One trial; ``run`` is None until it has written its config."""

    trial: Trial
    run: RunData | None
    log: str
    """The last lines of its output."""

    @property
    def name(self) -> str:
        return self.trial.name

    @property
    def variant(self) -> str:
        return self.trial.variant

    @property
    def seed(self) -> int:
        return self.trial.seed

    @property
    def finished(self) -> bool:
        return self.run is not None and self.run.finished

    @property
    def state(self) -> str:
        if self.finished:
            return "finished"
        if self.run is None or not self.run.last_step:
            return "no step logged" if self.log else "not started"
        return f"stopped or running, step {self.run.last_step} of {self.run.field('train.steps')}"


@dataclasses.dataclass(frozen=True)
class SweepData:
    """A sweep's folder: ``results`` in numbers, a finished trial each.

    ``summary`` is the tree of summary.json (docs/sweeps.md), or recomputed from ``results`` if
    there is none or it has other trials; ``stale`` then names these in a sentence.
    """

    name: str
    folder: Path
    experiment: str
    trials: list[TrialData]
    summary: dict[str, Any]
    stale: str
    results: list[Result]
    problems: list[str]

    @classmethod
    def read(cls, folder: str | Path) -> "SweepData":
        """Read a sweep, finished or not.

        Raises:
          UserError: the folder holds no sweep.
        """
        folder, problems = Path(folder), []
        index = read_index(folder)
        if not index.trials:
            raise UserError(f"{folder / INDEX} has no trials; restore it or name another folder")
        trials = [_trial(folder, trial, problems) for trial in index.trials]
        sweep = Sweep(index.experiment, index.trials)
        results, diverged = _results(folder, trials, problems), _diverged(folder, sweep, trials)
        summary, stale = _up_to_date(folder, sweep, results, diverged, problems)
        return cls(
            name=folder.resolve().name,
            folder=folder,
            experiment=sweep.source,
            trials=trials,
            summary=summary,
            stale=stale,
            results=results,
            problems=problems,
        )

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(trial.variant for trial in self.trials))

    def runs(self, variant: str) -> list[RunData]:
        """The finished runs of a variant."""
        of = [trial for trial in self.trials if trial.variant == variant and trial.finished]
        return [trial.run for trial in of if trial.run is not None]


def _trial(folder: Path, trial: Trial, problems: list[str]) -> TrialData:
    workdir, run = workdir_of(folder, trial), None
    if holds_run(workdir):
        try:
            run = RunData.read(workdir).per_byte()  # as the comparison is
        except UserError as error:
            problems.append(f"{trial.name}: {error}.")
    log = log_of(folder, trial)
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return TrialData(trial, run, "\n".join(lines[-TAIL:]))


def _diverged(folder: Path, sweep: Sweep, trials: Iterable[TrialData]) -> set[tuple[str, int]]:
    """Variant and seed of trials that ended at a value that was not finite."""
    diverged = set()
    for trial in trials:
        if not trial.finished:
            alone = dataclasses.replace(sweep, trials=(trial.trial,))
            try:
                diverged |= read_diverged(folder, alone)
            except UserError:
                pass  # a damaged file, which is among the problems of the sweep or of its run
    return diverged


def _results(folder: Path, trials: Iterable[TrialData], problems: list[str]) -> list[Result]:
    results = []
    for trial in trials:
        if trial.finished:
            try:
                results.append(read_trial(folder, trial.trial))
            except (UserError, OSError) as error:
                problems.append(f"{trial.name} is not in the comparison: {error}.")
            except KeyError as error:
                problems.append(f"{trial.name} is not in the comparison: it has no {error}.")
    return results


def _up_to_date(
    folder: Path,
    sweep: Sweep,
    results: Sequence[Result],
    diverged: set[tuple[str, int]],
    problems: list[str],
) -> tuple[dict[str, Any], str]:
    """The tree of summary.json, and a warning if it is not that of the file.

    Only the file knows baseline and match: without it, nothing has a baseline.
    """
    written = _read_summary(folder / SUMMARY, sweep.variants, problems)
    if written is None:
        return to_json(compare(sweep, results, diverged)), ""
    claims = Comparison(written["match"], written["baseline"])
    now = to_json(compare(Sweep(sweep.source, sweep.trials, claims), results, diverged))
    # The noise may be that of a pilot, which the file does not name.
    now["detectable"] = now["detectable"] or written["detectable"]
    before = {v["variant"]: _state(v) for v in written["variants"]}
    behind = [v["variant"] for v in now["variants"] if before.get(v["variant"]) != _state(v)]
    if not behind:
        return written, ""
    return now, (
        f"{SUMMARY} is older than the runs: it has other trials of {', '.join(behind)} than have "
        "finished or diverged by now. This report compares the runs themselves; run the sweep "
        f"command again to bring {SUMMARY}, results.csv and sweep.png up to date."
    )


def _state(variant: dict[str, Any]) -> tuple[int, list[int], list[int]]:
    return variant["wanted"], sorted(variant["seeds"]), sorted(variant["diverged"])


def _read_summary(
    path: Path, variants: Collection[str], problems: list[str]
) -> dict[str, Any] | None:
    """The file, if this version can read it."""
    if not path.exists():
        problems.append(
            f"There is no {SUMMARY}, which `moejax sweep` writes when it ends: nothing is compared "
            "with a baseline."
        )
        return None
    try:
        summary = parsed(path.read_text())
    except ValueError as error:
        problems.append(f"{SUMMARY} is not valid JSON ({error}).")
        return None
    if not isinstance(summary, dict) or summary.get("format") != FORMAT:
        problems.append(f"{SUMMARY} is of another version of moejax.")
        return None
    damage = next(_damages(summary, variants), "")
    if damage:
        problems.append(f"{SUMMARY} is damaged: {damage}. Nothing is compared with a baseline.")
        return None
    return summary


def _damages(summary: dict[str, Any], variants: Collection[str]) -> Iterator[str]:
    """The problems of a summary.json."""
    yield from _lacks("it", summary, OF_SUMMARY)
    if summary["baseline"] not in (None, *variants):
        yield f"its baseline {summary['baseline']!r} is no variant of the sweep"
    if summary["match"] not in (None, *MATCHES):
        yield f"its match {summary['match']!r} is no cost"
    yield from _lacks("its cost", summary["cost"], OF_COST)
    if summary["detectable"] is not None:
        yield from _lacks("its detectable", summary["detectable"], OF_DETECTABLE)
    yield from _is_list("its variants", summary["variants"])
    for number, variant in enumerate(summary["variants"], 1):
        where = f"its variant {number}"
        yield from _lacks(where, variant, OF_VARIANT)
        if variant["difference"] is not None:
            yield from _lacks(f"the difference of {where}", variant["difference"], OF_DIFFERENCE)
        for field in ("seeds", "diverged", "trials"):
            yield from _is_list(f"{field} of {where}", variant[field])
        for trial in variant["trials"]:
            yield from _lacks(f"a trial of {where}", trial, OF_TRIAL)


def _lacks(what: str, tree: Any, fields: Sequence[str]) -> Iterator[str]:
    if not isinstance(tree, dict):
        yield f"{what} is {tree!r:.40}"
    elif missing := [field for field in fields if field not in tree]:
        yield f"{what} has no {', '.join(missing)}"


def _is_list(what: str, value: Any) -> Iterator[str]:
    if not isinstance(value, list):
        yield f"{what} is {value!r:.40}"
