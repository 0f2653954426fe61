"""Evaluation of a run for the three findings: verdicts, numbers and a page of the report."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from moejax.analysis.page import Page
from moejax.analysis.run import RunData
from moejax.analysis.sweep import SweepData
from moejax.contrib.openmoe import findings, measure, page
from moejax.errors import UserError
from moejax.record.files import replaced

NUMBERS = "openmoe.json"
"""Written next to the report."""


def pages(
    run: RunData | SweepData, args: argparse.Namespace, folder: Path, say: Callable[[str], None]
) -> list[Page]:
    """The page of the findings; prints their verdicts and writes `NUMBERS` into ``folder``.

    ``args``: the values of the flags in ``flags``; no page without ``--openmoe``.

    Raises:
      UserError: a sweep; what cannot be evaluated (see ``measure.measure``), or written.
    """
    if not args.openmoe:
        return []
    if isinstance(run, SweepData):
        raise UserError(
            f"--openmoe is for a run, and {run.folder} is a sweep; name one of its trials, such as "
            f"{run.folder}/trials/{run.trials[0].name}"
        )
    rows = measure.ROWS if args.rows is None else args.rows
    options = measure.Options(rows, tuple(args.data), args.step)
    measured = measure.measure(run.workdir, options, say)
    judged = findings.verdicts(measured)
    path = folder / NUMBERS
    content = json.dumps(findings.numbers(measured, judged), indent=1, allow_nan=False)
    with replaced(path) as temporary:
        temporary.write_text(content + "\n")
    for verdict in judged:
        say(str(verdict))
    return [page.page(measured, judged)]
