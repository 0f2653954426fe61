"""A sweep's comparison: that of summary.json, or one made anew where the runs say something else.

`moejax sweep` writes summary.json when it ends. Until it ends again, trials that have finished or
diverged since are in the runs alone.
"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from moejax.record.files import parsed
from moejax.sweep.comparison import FORMAT, compare, to_json
from moejax.sweep.definition import Sweep
from moejax.sweep.match import MATCHES, Comparison
from moejax.sweep.results import Result

NAME = "summary.json"

OF_SUMMARY = ("baseline", "match", "tolerance", "cost", "detectable", "variants")
OF_COST = ("name", "unit")
OF_DETECTABLE = ("difference", "seeds", "power", "level", "source")
OF_VARIANT = (
    "variant", "wanted", "seeds", "diverged", "mean", "half_width", "difference", "verdict",
    "cost", "cost_ratio", "missed_match", "leak", "trials",
)  # fmt: skip
OF_DIFFERENCE = ("mean", "half_width")
OF_TRIAL = ("seed", "loss", "cost")
"""What pages read of it."""


def up_to_date(
    folder: Path,
    sweep: Sweep,
    results: Sequence[Result],
    diverged: set[tuple[str, int]],
    problems: list[str],
) -> tuple[dict[str, Any], str]:
    """The tree of summary.json, and what to say if it is not that of the file.

    What is compared with what is known from the file alone: without it, nothing has a baseline.
    """
    written = _read(folder / NAME, sweep.variants, problems)
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
        f"{NAME} is older than the runs: it has other trials of {', '.join(behind)} than have "
        "finished or diverged by now. This report compares the runs themselves; run the sweep "
        f"command again to bring {NAME}, results.csv and sweep.png up to date."
    )


def _state(variant: dict[str, Any]) -> tuple[int, list[int], list[int]]:
    return variant["wanted"], sorted(variant["seeds"]), sorted(variant["diverged"])


def _read(path: Path, variants: Collection[str], problems: list[str]) -> dict[str, Any] | None:
    """The file, if this version can read it."""
    if not path.exists():
        problems.append(
            f"There is no {NAME}, which `moejax sweep` writes when it has run: nothing is compared "
            "with a baseline."
        )
        return None
    try:
        summary = parsed(path.read_text())
    except ValueError as error:
        problems.append(f"{NAME} is not valid JSON ({error}).")
        return None
    if not isinstance(summary, dict) or summary.get("format") != FORMAT:
        problems.append(f"{NAME} is of another version of moejax.")
        return None
    damage = next(_damages(summary, variants), "")
    if damage:
        problems.append(f"{NAME} is damaged: {damage}. Nothing is compared with a baseline.")
        return None
    return summary


def _damages(summary: dict[str, Any], variants: Collection[str]) -> Iterator[str]:
    """What is wrong with it."""
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
