"""``moejax report RUN --openmoe``: evaluates, says what appears, writes the numbers."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from moejax.analysis.page import Page
from moejax.errors import UserError

NUMBERS = "openmoe.json"
"""Written next to the report."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the report's command that belong to ``--openmoe``."""
    parser.add_argument(
        "--openmoe",
        action="store_true",
        help="of a run: also evaluate a checkpoint for OpenMoE's three findings (takes minutes)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="with --openmoe: sequences of each text (default 256)",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="PATH",
        help="with --openmoe: another text, out of domain; may be given again",
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="with --openmoe: checkpoint (default: the newest)"
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses flags that would have no effect.

    Raises:
      UserError: one of them without ``--openmoe``.
    """
    for flag in ("rows", "data", "step"):
        if getattr(args, flag) not in (None, []) and not args.openmoe:
            raise UserError(f"--{flag} has no effect without --openmoe")


def page(workdir: Path, args: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> Page:
    """The page of the findings; says their verdicts and writes `NUMBERS` into ``folder``.

    Raises:
      UserError: what cannot be evaluated (see ``measure.measure``), or written.
    """
    # They import JAX, which a report of what was recorded does without.
    from moejax.analysis.openmoe import findings, measure
    from moejax.analysis.openmoe import page as pages

    rows = measure.ROWS if args.rows is None else args.rows
    options = measure.Options(rows, tuple(args.data), args.step)
    found = measure.measure(workdir, options, say)
    judged = findings.verdicts(found)
    path = folder / NUMBERS
    try:
        content = json.dumps(findings.numbers(found, judged), indent=1, allow_nan=False)
        path.write_text(content + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    for verdict in judged:
        say(str(verdict))
    return pages.page(found, judged)
